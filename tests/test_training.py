import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from training_support import SPLIT, tiny_config

from unifusion_jax import autoencoders, encoders
from unifusion_jax.config import from_mapping
from unifusion_jax.layers import Int8
from unifusion_jax.parallel.mesh import make_mesh
from unifusion_jax.pipeline import UniFusion
from unifusion_jax.train import run
from unifusion_jax.training.checkpoints import Checkpoints
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.health import NonFiniteError
from unifusion_jax.training.loop import fit
from unifusion_jax.training.metrics import MetricWriter
from unifusion_jax.training.tasks import make_task


def parsed(frozen, **changes) -> TrainConfig:
    return from_mapping(TrainConfig, tiny_config(str(frozen), **changes))


def one_device(config):
    """The mesh of tests in which sharding plays no part: its programs compile sooner."""
    return make_mesh(config.mesh, jax.devices()[:1])


def train(config, workdir, mesh=None):
    mesh = mesh or make_mesh(config.mesh)
    state, writer = fit(make_task(config, mesh), config, workdir, mesh)
    writer.close()
    return state


def logged(workdir):
    """What the training computed, without what the clock says."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timing = {"images_per_s", "step_time_s", "data_wait_s", "mfu"}
    return [{key: value for key, value in line.items() if key not in timing} for line in lines]


def killed(workdir, copy, step):
    """Copies a run as it would lie there had it been killed after its checkpoint at `step`."""
    shutil.copytree(workdir, copy, dirs_exist_ok=True)
    later = [folder for folder in (copy / "checkpoints").iterdir() if folder.name.isdigit() and int(folder.name) > step]
    assert later
    for folder in later:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def straight(frozen, tmp_path_factory):
    """Ten steps in one go."""
    workdir = tmp_path_factory.mktemp("straight")
    return train(parsed(frozen), workdir), workdir


def assert_same(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), left, right)


def test_metrics_have_the_promised_keys(straight):
    _, workdir = straight
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    for line in lines:
        assert {"loss", "grad_norm", "images_per_s", "step_time_s", "data_wait_s", "mfu", "loss_t0"} <= line.keys()
        assert line["mfu"] is None  # a CPU has no peak in the table
        assert line["loss"] > 0
    assert any(line["loss_edit"] is not None for line in lines)
    assert list((workdir / "tensorboard").iterdir())


def test_what_was_logged_after_a_checkpoint_is_not_logged_twice(tmp_path):
    writer = MetricWriter(tmp_path, start_step=0)
    for step, values in ((2, {"loss": 2.0}), (4, {"loss": 1.0}), (4, {"evaluation/all": 0.5}), (6, {"loss": 0.5})):
        writer.write(step, values)
    writer.close()
    resumed = MetricWriter(tmp_path, start_step=4)
    resumed.write(4, {"evaluation/all": 0.25})
    resumed.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 2, "loss": 2.0}, {"step": 4, "loss": 1.0}, {"step": 4, "evaluation/all": 0.25}]


def test_interrupted_run_equals_the_uninterrupted_one_bit_for_bit(straight, frozen, tmp_path):
    # Stops at 5 with checkpoints at 3 and 5; the log interval of 2 is cut in the middle.
    train(parsed(frozen, total_steps=5), tmp_path)
    resumed = train(parsed(frozen), tmp_path)
    state, workdir = straight
    assert_same(resumed, state)
    assert logged(tmp_path)[-2:] == logged(workdir)[-2:]


def test_restore_on_another_mesh_is_bit_equal(straight, frozen):
    state, workdir = straight
    for sizes in ({"data": 1, "fsdp": 4, "tensor": 2}, {"data": 8, "fsdp": 1, "tensor": 1}):
        config = parsed(frozen, mesh=sizes | {"sequence": 1})
        restored = train(config, workdir)  # nothing is left to train, so this only restores
        assert_same(restored, state)
        kernel = restored.params["dit"]["blocks"]["blocks"]["block"]["ffn"]["gate"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape)[1] == 32 // sizes["fsdp"]


def test_a_run_in_parts_on_a_mesh_that_splits_the_model_computes_the_same(straight, frozen, tmp_path):
    _, workdir = straight
    train(parsed(frozen, total_steps=4, **SPLIT), tmp_path)
    for sharded, plain in zip(logged(tmp_path), logged(workdir), strict=False):
        # Sums run in another order on another mesh: float32 agrees to about 1e-4 after a few Adam steps.
        assert sharded["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        assert sharded["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(("optimizer", "moments"), [("adamw", 2), ("muon", 1)])
def test_optimizer_state_is_sharded_like_the_parameters(straight, frozen, tmp_path, optimizer, moments):
    mesh = {"slice": 2, "data": 1, "fsdp": 4}
    state = train(parsed(frozen, mesh=mesh, total_steps=2, optimizer__name=optimizer), tmp_path)
    # The first step of the warm-up has rate 0, so until here every optimizer sees the same weights.
    assert logged(tmp_path)[0]["loss"] == pytest.approx(logged(straight[1])[0]["loss"], rel=1e-4)
    kernel = state.params["dit"]["blocks"]["blocks"]["block"]["ffn"]["gate"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    alike = [
        leaf
        for path, leaf in leaves
        if "['dit']['blocks']['blocks']['block']['ffn']['gate']" in jax.tree_util.keystr(path)
    ]
    assert len(alike) == moments
    assert all(leaf.sharding == kernel.sharding for leaf in alike)
    assert state.ema["dit"]["blocks"]["blocks"]["block"]["ffn"]["gate"]["kernel"].sharding == kernel.sharding


def test_checkpoint_of_another_architecture_names_the_first_difference(straight, frozen):
    _, workdir = straight
    config = parsed(frozen)
    config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, ffn_size=64))
    with pytest.raises(
        ValueError, match=r"First difference: ema.dit.blocks.blocks.block.ffn.down.kernel.* \(2, 48, 32\)"
    ):
        train(config, workdir)


def test_run_writes_a_model_that_loads_and_generates(frozen, tmp_path):
    config = parsed(frozen, total_steps=2, preview__every_steps=2, evaluation__prompts=2, evaluation__steps=2)
    result = run(config, tmp_path)
    assert 0 <= result["seen/all_correct"] <= 1
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert (tmp_path / "samples/step_00000002.png").exists()
    from_export, from_workdir = UniFusion.load(tmp_path / "export"), UniFusion.load(tmp_path)
    assert_same(from_export.params, from_workdir.params)
    image = from_export.generate(["a red circle"], steps=2)[0]
    assert image.size == (96, 96)
    assert image.tobytes() == from_workdir.generate(["a red circle"], steps=2)[0].tobytes()


def test_init_from_starts_from_an_exported_model(straight, frozen, tmp_path):
    state, _ = straight
    config = parsed(frozen)
    task = make_task(config, make_mesh(config.mesh))
    task.export(state.inference_params, tmp_path / "export")
    again = make_task(dataclasses.replace(config, init_from=str(tmp_path / "export")), make_mesh(config.mesh))
    assert_same(again.init(jax.random.key(9)), state.inference_params)


@pytest.mark.parametrize("name", ["encoder", "autoencoder"])
def test_the_frozen_networks_can_be_trained_further(frozen, name):
    sources = ({"name": "shapes", "task": "text_to_image"},)
    config = parsed(frozen, task=name, init_from=str(frozen / name), data__sources=sources)
    task = make_task(config, make_mesh(config.mesh))
    load = {"encoder": encoders.load, "autoencoder": autoencoders.load}[name]
    assert_same(task.init(jax.random.key(9)), load(frozen / name, dtype="float32").params)
    assert task.model_config == load(frozen / name, dtype="float32").config


def test_the_frozen_encoder_can_be_held_in_8_bits(frozen, tmp_path):
    config = parsed(frozen, total_steps=1, log_every_steps=1, encoder__quantize="int8")
    encoder = make_task(config, make_mesh(config.mesh)).encoder
    assert isinstance(encoder.params["decoder"]["layers"]["blocks"]["ffn"]["up"]["kernel"], Int8)
    train(config, tmp_path, one_device(config))
    assert np.isfinite(logged(tmp_path)[0]["loss"])


def test_a_workdir_of_another_config_is_refused_and_kept(frozen, tmp_path):
    run(parsed(frozen, total_steps=2), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"holds a run of another config.*\n  optimizer.learning_rate: 0.001 -> 0.5"):
        run(parsed(frozen, total_steps=4, optimizer__learning_rate=0.5), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert Checkpoints(tmp_path).latest_step() == 2


def test_a_loss_that_is_not_finite_stops_the_run_with_its_interval(frozen, tmp_path):
    config = parsed(frozen, optimizer__learning_rate=1e30, optimizer__warmup_steps=0, log_every_steps=2)
    with pytest.raises(NonFiniteError, match=r"became (nan|inf) somewhere within steps \[\d+, \d+\]"):
        train(config, tmp_path, one_device(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder__path": "/no/such/encoder"}, "No folder '/no/such/encoder'"),
        ({"data__size_px": 100}, "data.size_px must be a multiple of 16 px"),
        ({"data__budgets": {}}, "config.data.budgets is empty"),
        ({"dit__latent_channels": 4}, "latent channels .* is 16, the model takes 4"),
        (
            {"data__budgets": {"text_to_image": {"max_tokens": 20, "max_tiles": 0, "max_kept_tokens": 20}}},
            "no token budget for the task 'edit'",
        ),
    ],
)
def test_configs_that_cannot_run_say_why(frozen, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(parsed(frozen, total_steps=1, **changes), tmp_path)


def test_a_prompt_over_the_token_budget_names_the_record_and_the_mend(frozen, tmp_path):
    small = {"max_tokens": 30, "max_tiles": 0, "max_kept_tokens": 20}
    config = parsed(frozen, total_steps=1, data__budgets={"text_to_image": small, "edit": small | {"max_tiles": 1}})
    message = (
        r"record 'shapes/train/[^']+' of .* cannot be used: ValueError: The prompt has \d+ tokens .* the budget is 30. "
    )
    with pytest.raises(
        ValueError, match=message + r"Shorten the text, lower max_tiles, or raise max_tokens \(at most 512"
    ):
        train(config, tmp_path)


def test_training_lowers_the_loss(frozen, tmp_path):
    config = parsed(
        frozen, total_steps=60, log_every_steps=20, checkpoint__every_steps=100, optimizer__learning_rate=3e-3
    )
    train(config, tmp_path, one_device(config))
    losses = [line["loss"] for line in logged(tmp_path)]
    assert losses[-1] < 0.9 * losses[0]
