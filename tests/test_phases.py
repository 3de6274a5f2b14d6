"""Continuing from another encoder: one run, one command, the DiT and its optimizer go on."""

import jax
import numpy as np
import pytest
from test_conditioning import ONE_TASK, T5
from test_training import assert_same, killed, logged, parsed
from vision_support import write_t5

from unifusion_jax import UniFusion
from unifusion_jax.parallel.mesh import make_mesh
from unifusion_jax.train import run
from unifusion_jax.training.checkpoints import latest_step
from unifusion_jax.training.loop import fit
from unifusion_jax.training.phases import Phase, config_at, phases
from unifusion_jax.training.tasks import make_task, parameter_shapes


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return write_t5(tmp_path_factory.mktemp("phases_t5"), "wide")


def swapping(frozen, t5, **changes):
    """Two steps with T5, then LAP over the vision-language model."""
    encoder = {"path": str(t5), "verifi": False, "system_prompts": "none", "dtype": "float32"}
    first = {"steps": 2, "encoder": encoder, "conditioning": {"strategy": "last_layer", "refiner_heads": 2}}
    settled = {"data__budgets": T5["data__budgets"], "total_steps": 6, "checkpoint__every_steps": 1, "first": first}
    settled["checkpoint__keep"] = 6
    return parsed(frozen, **(ONE_TASK | settled | changes))


@pytest.fixture(scope="module")
def straight(frozen, t5, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("swapped") / "run"
    run(swapping(frozen, t5), workdir)
    return workdir


def test_one_run_trains_both_encoders_and_exports_the_second(straight):
    assert [line["step"] for line in logged(straight)] == [2, 4, 6]
    model = UniFusion.load(straight)
    assert model.config.conditioning.strategy == "lap" and model.model_config.num_layers == 2
    assert_same(model.params, UniFusion.load(straight / "export").params)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_interrupted_around_the_swap_equals_the_uninterrupted_one(straight, frozen, t5, tmp_path, stop):
    killed(straight, tmp_path / "run", stop)
    strategy = UniFusion.load(tmp_path / "run").config.conditioning.strategy
    assert strategy == ("last_layer" if stop <= 2 else "lap")
    run(swapping(frozen, t5), tmp_path / "run")
    assert_same(UniFusion.load(tmp_path / "run").params, UniFusion.load(straight).params)
    assert logged(tmp_path / "run")[-2:] == logged(straight)[-2:]


def test_the_dit_its_average_and_its_moments_go_on(frozen, t5, tmp_path):
    config = swapping(frozen, t5)
    mesh = make_mesh(config.mesh)
    first, second = phases(config)
    before, writer = fit(make_task(first.config, mesh), first.config, tmp_path, mesh, phase=first)
    writer.close()
    assert latest_step(tmp_path) == 2 and config_at(config, 2) == first.config and config_at(config, 3) == config
    task = make_task(second.config, mesh)
    none = Phase(second.config, 2, 2)  # swaps, and trains nothing
    after, writer = fit(task, config, tmp_path, mesh, phase=none, before=parameter_shapes(first.config, mesh))
    writer.close()

    def leaves(tree, of_dit):
        named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        return {name: leaf for name, leaf in named.items() if ("'conditioner'" not in name) == of_dit}

    old, new = leaves(before, of_dit=True), leaves(after, of_dit=True)
    assert old.keys() == new.keys() and int(after.step) == 2
    assert_same(new, old)
    assert any("mu" in name and np.any(np.asarray(leaf)) for name, leaf in new.items())
    fresh = leaves(after, of_dit=False)
    assert {name for name in fresh if ".lap." in name.replace("']['", ".")}
    assert not any(np.any(np.asarray(leaf)) for name, leaf in fresh.items() if "opt_state" in name)
    again = leaves(after.params, of_dit=False)
    assert_same(again, leaves(after.ema, of_dit=False))


def test_a_second_phase_that_does_not_fit_is_refused_before_the_first_begins(frozen, t5, tmp_path):
    config = swapping(frozen, t5, conditioning__lap_heads=3)
    with pytest.raises(ValueError, match=r"conditioning.lap_heads=3 does not divide"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_the_model_itself_swaps_encoders(frozen, t5):
    with pytest.raises(ValueError, match=r"first.steps=2 swaps encoders, which task='autoencoder' has none of"):
        swapping(frozen, t5, task="autoencoder")
