"""A trained model as a folder: `config.json` and `model.safetensors`, which `UniFusion.load` reads."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from unifusion_jax import weights
from unifusion_jax.config import from_mapping, to_plain
from unifusion_jax.model import ModelConfig, UniFusionModel
from unifusion_jax.training.config import TrainConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_FORMAT = "unifusion_jax"


def write(folder: Path, config: TrainConfig, model: ModelConfig, params: weights.Params, *, dtype: Any = None) -> None:
    """Writes a model folder. `dtype` is the type to store; the parameters' own when None."""
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="."))
    tensors = {name: np.asarray(value if dtype is None else value.astype(dtype)) for name, value in flat.items()}
    weights.save(tensors, folder / WEIGHTS_FILE, metadata={"format": _FORMAT})
    content = {"format": _FORMAT, "model": to_plain(model), "config": to_plain(config)}
    temporary = folder / (CONFIG_FILE + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / CONFIG_FILE)


def read_configs(folder: Path) -> tuple[TrainConfig, ModelConfig]:
    """Reads the configs of a model folder. Raises ValueError for a folder of another kind."""
    content = weights.read_json(folder / CONFIG_FILE)
    if content.get("format") != _FORMAT:
        raise ValueError(
            f"{folder / CONFIG_FILE} does not describe a unifusion_jax model (its keys: {sorted(content)[:8]}). Pass a folder "
            "written by `python -m unifusion_jax.export`, a training's workdir, or its export/ folder."
        )
    return (
        from_mapping(TrainConfig, content["config"], "config.json: config"),
        from_mapping(ModelConfig, content["model"], "config.json: model"),
    )


def read_params(folder: Path, model: ModelConfig) -> weights.Params:
    """Reads float32 parameters; raises ValueError when they are of another architecture, listing what differs."""
    abstract = abstract_params(model)
    rules = [weights.Rule(name, name) for name in traverse_util.flatten_dict(abstract, sep=".")]
    return weights.load(abstract, weights.SafetensorsFolder(folder), rules, dtype=jnp.float32)


def abstract_params(model: ModelConfig) -> weights.Params:
    """Returns the shapes of a model's parameters."""
    module = nnx.eval_shape(lambda: UniFusionModel(model, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))
