import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from unifusion_jax import weights
from unifusion_jax.weights import CONV, LINEAR, Rule, SafetensorsFolder

RULES = [
    Rule("layers.{layer}.proj.weight", "stack.blocks.proj.kernel", LINEAR),
    Rule("conv.weight", "conv.kernel", CONV),
    Rule("norm.weight", "norm.scale"),
]
ABSTRACT = {
    "stack": {"blocks": {"proj": {"kernel": jax.ShapeDtypeStruct((2, 3, 5), jnp.float32)}}},
    "conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 2, 4), jnp.float32)},
    "norm": {"scale": jax.ShapeDtypeStruct((5,), jnp.float32)},
}


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "layers.0.proj.weight": rng.normal(size=(5, 3)).astype(np.float32),
        "layers.1.proj.weight": rng.normal(size=(5, 3)).astype(np.float32),
        "conv.weight": rng.normal(size=(4, 2, 3, 3)).astype(np.float32),
        "norm.weight": rng.normal(size=(5,)).astype(np.float32),
    }


def save(folder, tensors, name="model.safetensors"):
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / name)


def test_load_transposes_and_stacks(tmp_path, tensors):
    save(tmp_path, tensors)
    params = weights.load(ABSTRACT, SafetensorsFolder(tmp_path), RULES)
    np.testing.assert_array_equal(params["stack"]["blocks"]["proj"]["kernel"][1], tensors["layers.1.proj.weight"].T)
    np.testing.assert_array_equal(params["conv"]["kernel"][:, :, 1, 3], tensors["conv.weight"][3, 1])


def test_tables_run_backwards(tensors):
    params = weights.load(ABSTRACT, tensors, RULES)
    again = weights.to_tensors(params, RULES)
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[name], value)


def test_all_problems_are_reported_together(tmp_path, tensors):
    del tensors["layers.1.proj.weight"]
    tensors["norm.weight"] = np.zeros(6, np.float32)
    tensors["extra.weight"] = np.zeros(1, np.float32)
    save(tmp_path, tensors)
    with pytest.raises(ValueError) as caught:
        weights.load(ABSTRACT, SafetensorsFolder(tmp_path), RULES)
    text = str(caught.value)
    assert "3 weights" in text
    assert "missing: stack.blocks.proj.kernel for layers [1]" in text
    assert "unexpected: extra.weight" in text
    assert "norm.weight -> norm.scale: got (6,), the config expects (5,)" in text


def test_rename_maps_and_ignores(tensors):
    renamed = {f"model.{name}": value for name, value in tensors.items()} | {"head.weight": np.zeros(2)}

    def rename(name):
        return name.removeprefix("model.") if name.startswith("model.") else None

    params = weights.load(ABSTRACT, renamed, RULES, rename=rename)
    np.testing.assert_array_equal(params["norm"]["scale"], tensors["norm.weight"])


def test_shards_with_an_index(tmp_path, tensors):
    names = sorted(tensors)
    save(tmp_path, {name: tensors[name] for name in names[:2]}, "a.safetensors")
    save(tmp_path, {name: tensors[name] for name in names[2:]}, "b.safetensors")
    index = {name: "a.safetensors" if i < 2 else "b.safetensors" for i, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert SafetensorsFolder(tmp_path).names() == names
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists files that .* lacks: \['b.safetensors'\]"):
        SafetensorsFolder(tmp_path)


def test_truncated_file_is_named(tmp_path, tensors):
    save(tmp_path, tensors)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"model.safetensors is not a complete safetensors file .* Fetch it again"):
        SafetensorsFolder(tmp_path)


def test_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"got pytorch_model.bin\). Pickled weights are never loaded"):
        SafetensorsFolder(tmp_path)


def test_bfloat16_survives(tmp_path):
    value = np.arange(5).astype(ml_dtypes.bfloat16)
    weights.save({"norm.weight": value}, tmp_path / "model.safetensors")
    read = SafetensorsFolder(tmp_path).read("norm.weight")
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read, value)


@pytest.mark.parametrize("path", ["/no/such/folder", "not a path or id"])
def test_missing_folder_is_explained(path):
    with pytest.raises(FileNotFoundError, match=r"Expected a folder with config\.json"):
        weights.resolve(path)


def test_unknown_bundled_checkpoint_lists_what_there_is():
    with pytest.raises(FileNotFoundError, match=r"does not come with the package; bundled are \["):
        weights.resolve("bundled:demo/nothing")


def test_json_that_is_not_json_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        weights.read_json(tmp_path / "config.json")
