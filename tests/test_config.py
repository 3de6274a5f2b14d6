import dataclasses
import glob
from pathlib import Path

import ml_collections
import pytest

from unifusion_jax.config import from_mapping, to_config_dict, to_json, to_plain
from unifusion_jax.training.config import TrainConfig


def test_round_trip_through_config_dict_and_json():
    import json

    config = TrainConfig()
    assert from_mapping(TrainConfig, to_config_dict(config)) == config
    assert from_mapping(TrainConfig, json.loads(to_json(config))) == config


@pytest.mark.parametrize("file", sorted(glob.glob("configs/**/*.py", recursive=True)))
def test_every_config_file_is_valid_and_says_how_to_run_it(file):
    import importlib.util

    spec = importlib.util.spec_from_file_location("config_file", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = from_mapping(TrainConfig, module.get_config())
    assert to_plain(config)["total_steps"] > 0
    assert f"--config={file}" in module.__doc__ and "Hardware:" in module.__doc__
    assert len(Path(file).read_text().splitlines()) <= 120


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"batch_sise": 4},
            ValueError,
            r"Unknown key config.batch_sise. Did you mean config.batch_size\? Known keys: ",
        ),
        (
            {"dit": {"num_layer": 4}},
            ValueError,
            r"Unknown key config.dit.num_layer. Did you mean config.dit.num_layers",
        ),
        ({"batch_size": "four"}, TypeError, r"config.batch_size must be int, got 'four' \(str\)"),
        ({"batch_size": True}, TypeError, "config.batch_size must be int, got True"),
        (
            {"optimizer": {"learning_rate": "fast"}},
            TypeError,
            "config.optimizer.learning_rate must be float, got 'fast'",
        ),
        ({"task": "unifuse"}, TypeError, "config.task must be .*'unifusion'.*got 'unifuse'"),
        ({"encoder": {"layers": [1, "4"]}}, TypeError, r"config.encoder.layers\[1\] must be int, got '4'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"ema_decay": 1.0}, ValueError, r"ema_decay must be in \[0, 1\), got 1.0"),
    ],
)
def test_mistakes_are_named_with_the_nearest_valid_key(changes, error, message):
    with pytest.raises(error, match=message):
        from_mapping(TrainConfig, ml_collections.ConfigDict(changes, convert_dict=True))


def test_an_integer_is_a_fine_float_and_a_list_a_fine_tuple():
    config = from_mapping(TrainConfig, {"optimizer": {"learning_rate": 1}, "encoder": {"layers": [1, 4]}})
    assert config.optimizer.learning_rate == 1.0
    assert config.encoder.layers == (1, 4)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 1
