"""The notebooks: all are valid and clean, and the first one runs from top to bottom."""

import dataclasses
from pathlib import Path

import nbclient
import nbformat
import pytest
from commands import SETTINGS
from IPython.core.inputtransformer2 import TransformerManager
from pipeline_support import shaken_model

from unifusion_jax import exported, weights
from unifusion_jax.pipeline import BUNDLED_CHECKPOINT

FOLDER = Path("notebooks")
NAMES = ("hub_encoder", "inference", "own_images")


def bundled() -> bool:
    try:
        return weights.resolve(BUNDLED_CHECKPOINT).is_dir()
    except FileNotFoundError:
        return False


def test_these_are_all():
    assert tuple(sorted(file.stem for file in FOLDER.glob("*.ipynb"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_valid_without_outputs_and_every_cell_compiles(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)
    for cell in code:
        compile(TransformerManager().transform_cell(cell.source), name, "exec")


def execute(name, folder, monkeypatch, **environment):
    for variable, value in (SETTINGS | environment).items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


# A tiny model always, and the one of the package where it is part of it.
@pytest.mark.parametrize("checkpoint", ["tiny", *(["bundled"] if bundled() else [])])
def test_inference_runs_from_top_to_bottom(frozen, tmp_path, monkeypatch, checkpoint):
    environment = {"UNIFUSION_STEPS": "2"}
    if checkpoint == "tiny":
        model = shaken_model(frozen)
        (tmp_path / "model").mkdir()
        exported.write(tmp_path / "model", dataclasses.replace(model.config), model.model_config, model.params)
        environment["UNIFUSION_CHECKPOINT"] = str(tmp_path / "model")
    notebook = execute("inference", tmp_path, monkeypatch, **environment)
    shown = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs if "data" in output
    ]
    assert sum("image/png" in output["data"] for output in shown) == 6


def test_the_hub_is_not_asked_unless_told(tmp_path, monkeypatch):
    notebook = execute("hub_encoder", tmp_path, monkeypatch, HF_HUB_OFFLINE="1")
    assert not any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
