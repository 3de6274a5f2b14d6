"""How weights get onto devices: what is read, what is held, where it lands."""

import json
import tracemalloc

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub.utils import filter_repo_objects
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from unifusion_jax import placement, weights
from unifusion_jax.parallel.mesh import MeshConfig, make_mesh
from unifusion_jax.weights import CONV, IDENTITY, LINEAR, Rule, SafetensorsFolder, Transform

WIDTH, OUT, DEPTH = 64, 48, 6

# The rows of each of 4 groups are 2 of q and 1 of k; q's are cut out and joined, which no view can do.
JOINED = Transform(lambda x: x.reshape(4, 3, -1, WIDTH)[:, :2].reshape(-1, WIDTH).T, None)
FUSED = tuple(Transform(lambda x, i=i: x.reshape(3, -1, WIDTH)[i].T, None) for i in range(3))
RULES = [
    Rule("layers.{layer}.proj.weight", "stack.proj.kernel", LINEAR),
    *(Rule("layers.{layer}.qkv.weight", f"stack.{name}.kernel", FUSED[i]) for i, name in enumerate("qkv")),
    Rule("layers.{layer}.grouped.weight", "stack.joined.kernel", JOINED),
    Rule("embed.weight", "embed", IDENTITY),
    Rule("conv.weight", "conv", CONV),
    Rule("scale", "scale", IDENTITY),
]
SHAPES = {
    "stack.proj.kernel": (DEPTH, WIDTH, OUT),
    **{f"stack.{name}.kernel": (DEPTH, WIDTH, 16) for name in "qkv"},
    "stack.joined.kernel": (DEPTH, WIDTH, 32),
    "embed": (40, WIDTH),
    "conv": (3, 3, 8, 16),
    "scale": (),
}
SPECS = {
    "stack.proj.kernel": PartitionSpec(None, "fsdp", "tensor"),
    **{f"stack.{name}.kernel": PartitionSpec(None, "fsdp", "tensor") for name in "qkv"},
    "stack.joined.kernel": PartitionSpec("tensor", None, "fsdp"),
    "embed": PartitionSpec("tensor"),
    "conv": PartitionSpec(None, None, None, "fsdp"),
    "scale": PartitionSpec(),
}


def unflatten(flat):
    return weights.traverse_util.unflatten_dict(flat, sep=".")


def abstract(dtype=jnp.bfloat16):
    return unflatten({name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in SHAPES.items()})


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)
    shapes = {"embed.weight": (40, WIDTH), "conv.weight": (16, 8, 3, 3), "scale": ()}
    for layer in range(DEPTH):
        shapes[f"layers.{layer}.proj.weight"] = (OUT, WIDTH)
        shapes[f"layers.{layer}.qkv.weight"] = (48, WIDTH)
        shapes[f"layers.{layer}.grouped.weight"] = (48, WIDTH)
    return {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("shards")
    names = sorted(tensors)
    index = {name: f"model-{1 + i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(index.values()):
        shard = {name: tensors[name] for name in names if index[name] == file}
        safetensors.numpy.save_file(shard, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


@pytest.fixture(scope="module")
def shardings():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    return {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}


@pytest.fixture(scope="module")
def expected(tensors):
    flat = {
        "stack.proj.kernel": [tensors[f"layers.{i}.proj.weight"].T for i in range(DEPTH)],
        "stack.joined.kernel": [
            np.delete(tensors[f"layers.{i}.grouped.weight"].reshape(12, 4, WIDTH), [2, 5, 8, 11], 0)
            .reshape(-1, WIDTH)
            .T
            for i in range(DEPTH)
        ],
        "embed": tensors["embed.weight"],
        "conv": np.einsum("oihw->hwio", tensors["conv.weight"]),
        "scale": tensors["scale"],
    }
    for i, name in enumerate("qkv"):
        flat[f"stack.{name}.kernel"] = [
            tensors[f"layers.{layer}.qkv.weight"][16 * i : 16 * (i + 1)].T for layer in range(DEPTH)
        ]
    return {name: np.asarray(value) for name, value in flat.items()}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_shard_holds_its_slice_in_the_target_dtype(folder, shardings, expected, dtype, sharded):
    placed = unflatten(shardings) if sharded else None
    params = weights.load(abstract(dtype), SafetensorsFolder(folder), RULES, shardings=placed)
    for name, value in weights.traverse_util.flatten_dict(params, sep=".").items():
        assert value.dtype == dtype
        if sharded:
            assert value.sharding == shardings[name]
            assert len(value.addressable_shards) == 8
        for shard in value.addressable_shards:
            np.testing.assert_array_equal(
                np.asarray(shard.data), expected[name][shard.index].astype(dtype), err_msg=name
            )


def recorded(monkeypatch):
    """Records (address of the buffer written, bytes of the file copied, those read by a transformation) of each copy."""
    copies = []
    original = placement.copy

    def copy(target, source):
        base = target
        while isinstance(base.base, np.ndarray):
            base = base.base
        is_mapped = not isinstance(base_of(source), np.ndarray)
        copies.append((base.ctypes.data, source.nbytes, is_mapped))
        original(target, source)

    def base_of(array):
        while isinstance(array, np.ndarray) and array.base is not None:
            array = array.base
        return array

    monkeypatch.setattr(placement, "copy", copy)
    return copies


def test_each_shard_reads_its_own_bytes_once(folder, shardings, monkeypatch):
    copies = recorded(monkeypatch)
    files = SafetensorsFolder(folder)
    name = "stack.proj.kernel"
    only = {"layers": [rule for rule in RULES if rule.target == name]}["layers"]
    view = weights.load(
        unflatten({name: jax.ShapeDtypeStruct(SHAPES[name], jnp.bfloat16)}),
        files,
        only,
        rename=lambda tensor: tensor if ".proj." in tensor else None,
        shardings=unflatten({name: shardings[name]}),
    )
    by_buffer = {}
    for buffer, size, is_mapped in copies:
        assert is_mapped  # straight from the file
        by_buffer[buffer] = by_buffer.get(buffer, 0) + size
    slice_bytes = DEPTH * (WIDTH // 2) * (OUT // 2) * 4  # float32 in the file
    # 8 devices, 2 of which hold the same slice: 4 slices, each read once, nothing read twice.
    assert sorted(by_buffer.values()) == [slice_bytes] * 4
    assert len(view["stack"]["proj"]["kernel"].addressable_shards) == 8


def test_a_fused_tensor_is_cut_before_it_is_read_and_layers_stay_with_their_devices(folder, shardings, monkeypatch):
    copies = recorded(monkeypatch)
    weights.load(abstract(), SafetensorsFolder(folder), RULES, shardings=unflatten(shardings))
    total = sum(np.prod(shape) * 4 for shape in SHAPES.values())
    assert sum(size for _, size, _ in copies) == total
    # Only what no view can express was copied before: the grouped tensor's joined rows.
    assert sum(size for _, size, is_mapped in copies if not is_mapped) == np.prod(SHAPES["stack.joined.kernel"]) * 4


def test_slices_of_other_hosts_are_not_read(folder, monkeypatch):
    """A sharding whose map names two of eight devices stands for a host of a larger job."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    name = "stack.proj.kernel"

    class TwoOfEight(NamedSharding):
        def addressable_devices_indices_map(self, shape):
            return dict(list(super().addressable_devices_indices_map(shape).items())[2:4])

    sharding = TwoOfEight(mesh, PartitionSpec(None, "fsdp"))
    copies = recorded(monkeypatch)
    files = SafetensorsFolder(folder)
    buffers = {}
    monkeypatch.setattr(
        jax, "make_array_from_callback", lambda shape, sharding, fill, dtype: buffers.update({0: fill}) or jnp.zeros(())
    )
    pieces = [placement.Piece(i, lambda i=i: files.read(f"layers.{i}.proj.weight").T) for i in range(DEPTH)]
    with placement.copy_threads() as threads:
        placement.assemble(SHAPES[name], jnp.float32, pieces, sharding, threads)
    assert sum(size for _, size, _ in copies) == np.prod(SHAPES[name]) * 4 * 2 // 8
    rows = slice(16, 24)
    np.testing.assert_array_equal(
        buffers[0]((slice(None), rows, slice(None)))[3], files.read("layers.3.proj.weight").T[rows]
    )


def test_a_stacked_parameter_is_assembled_without_a_second_copy(tmp_path):
    layers, width = 16, 512  # 8 MiB of bfloat16
    rng = np.random.default_rng(0)
    stored = {
        f"layers.{i}.proj.weight": rng.normal(size=(width, width)).astype(ml_dtypes.bfloat16) for i in range(layers)
    }
    weights.save(stored, tmp_path / "model.safetensors")
    shape = jax.ShapeDtypeStruct((layers, width, width), jnp.bfloat16)
    files, rules = SafetensorsFolder(tmp_path), [Rule("layers.{layer}.proj.weight", "kernel", LINEAR)]
    made = []
    original = placement._aligned_empty

    def remember(*arguments):
        made.append(original(*arguments))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "_aligned_empty", remember)
        tracemalloc.start()
        value = weights.load({"kernel": shape}, files, rules)["kernel"]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    size = layers * width * width * 2
    # numpy held the buffer and, per thread, one tile; the device array is that buffer.
    assert size <= peak < 1.3 * size
    assert [buffer.ctypes.data for buffer in made] == [value.unsafe_buffer_pointer()]
    np.testing.assert_array_equal(np.asarray(value[5]), stored["layers.5.proj.weight"].T)


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("shape", [(700, 513), (513, 700), (1, 9), (9, 1)])
def test_tiled_transpose_equals_numpy(tmp_path, shape, stored, monkeypatch):
    monkeypatch.setattr(placement, "_STRIP_BYTES", 100_000)
    value = np.random.default_rng(0).normal(size=shape).astype(stored)
    weights.save({"w": value}, tmp_path / "model.safetensors")
    leaf = jax.ShapeDtypeStruct(shape[::-1], jnp.bfloat16)
    loaded = weights.load({"w": leaf}, SafetensorsFolder(tmp_path), [Rule("w", "w", LINEAR)])["w"]
    np.testing.assert_array_equal(np.asarray(loaded), value.T.astype(ml_dtypes.bfloat16))


def test_finish_sees_each_parameter_as_it_arrives(folder, expected):
    seen = []

    def finish(name, value):
        seen.append(name)
        return value * 2 if name == "embed" else value

    params = weights.load(abstract(jnp.float32), SafetensorsFolder(folder), RULES, finish=finish)
    assert sorted(seen) == sorted(SHAPES)
    np.testing.assert_array_equal(params["embed"], expected["embed"] * 2)


def test_a_device_of_choice(folder, expected):
    device = jax.devices()[3]
    placed = unflatten(dict.fromkeys(SHAPES, SingleDeviceSharding(device)))
    params = weights.load(abstract(jnp.float32), SafetensorsFolder(folder), RULES, shardings=placed)
    assert params["embed"].devices() == {device}
    np.testing.assert_array_equal(params["embed"], expected["embed"])


def test_a_layer_too_many_is_unexpected(folder):
    shapes = abstract()
    shapes["stack"]["proj"]["kernel"] = jax.ShapeDtypeStruct((DEPTH - 1, WIDTH, OUT), jnp.bfloat16)
    with pytest.raises(
        ValueError, match=r"(?s)1 weights of .*unexpected: layers.5.proj.weight \(the config has 5 layers\)"
    ):
        weights.load(shapes, SafetensorsFolder(folder), RULES)


def test_a_fused_tensor_that_does_not_divide_is_named(folder):
    broken = [Rule("embed.weight", "embed", Transform(lambda x: x.reshape(3, -1, WIDTH)[0], None))]
    with pytest.raises(ValueError, match=r"shape: embed.weight -> embed: got \(40, 64\), cannot reshape"):
        weights.load(
            {"embed": jax.ShapeDtypeStruct((40, WIDTH), jnp.float32)},
            SafetensorsFolder(folder),
            broken,
            rename=lambda name: name if name == "embed.weight" else None,
        )


def test_nothing_is_read_when_something_does_not_fit(folder, monkeypatch):
    copies = recorded(monkeypatch)
    with pytest.raises(ValueError, match=r"unexpected: scale"):
        weights.load(abstract(), SafetensorsFolder(folder), RULES[:-1])
    assert not copies


def test_one_tensor_in_two_files_is_refused_and_variants_give_way(tmp_path):
    value = np.ones(3, np.float32)
    safetensors.numpy.save_file({"w": value}, tmp_path / "model.safetensors")
    safetensors.numpy.save_file({"w": value * 2}, tmp_path / "model.fp16.safetensors")
    np.testing.assert_array_equal(SafetensorsFolder(tmp_path).read("w"), value)
    safetensors.numpy.save_file({"w": value}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"'w' is in both model.safetensors and other.safetensors"):
        SafetensorsFolder(tmp_path)


def test_index_without_a_map_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no 'weight_map'"):
        SafetensorsFolder(tmp_path)


def test_truncated_shard_is_named(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "model-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model-2.safetensors is not a complete safetensors file .* Fetch it again"):
        SafetensorsFolder(tmp_path)


class Hub:
    """Stands in for the hub: hands out the files of one repository that the patterns allow."""

    def __init__(self, root, files):
        self.root, self.files = root, files

    def snapshot_download(self, repository, *, allow_patterns, ignore_patterns=None):
        chosen = filter_repo_objects(self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for name in chosen:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text("{}")
        return str(self.root)

    def fetched(self):
        return sorted(str(file.relative_to(self.root)) for file in self.root.rglob("*") if file.is_file())


MODEL = ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja", "merges.txt"]
OTHER = ["pytorch_model.bin", "modeling_x.py", "README.md", "original/model.safetensors", "onnx/config.json"]


def test_of_a_hub_repository_only_what_is_needed_is_fetched(tmp_path, monkeypatch):
    hub = Hub(tmp_path, MODEL + OTHER)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    assert weights.resolve("owner/model") == tmp_path
    assert hub.fetched() == sorted(MODEL)


def test_of_a_hub_pipeline_only_the_part_is_fetched(tmp_path, monkeypatch):
    part = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    files = ["model_index.json", "transformer/big.safetensors", "transformer/config.json", "vae/vae.bin", *part]
    hub = Hub(tmp_path, files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    assert weights.resolve("owner/pipeline", subfolder="vae") == tmp_path / "vae"
    assert hub.fetched() == part


def test_a_hub_repository_of_the_part_itself(tmp_path, monkeypatch):
    hub = Hub(tmp_path, MODEL + OTHER)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    assert weights.resolve("owner/vae", subfolder="vae") == tmp_path
    assert hub.fetched() == sorted(MODEL)


def test_a_local_pipeline(tmp_path):
    (tmp_path / "vae").mkdir()
    assert (
        weights.resolve(tmp_path, subfolder="vae") == tmp_path
    )  # neither has a config.json: the caller says what is missing
    (tmp_path / "vae/config.json").write_text("{}")
    assert weights.resolve(tmp_path, subfolder="vae") == tmp_path / "vae"
    (tmp_path / "config.json").write_text("{}")
    assert weights.resolve(tmp_path, subfolder="vae") == tmp_path
