"""The encoder against transformers: states of every layer, all spellings of weights, full sizes, saving."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from encoders_support import (
    VARIANTS,
    least_cosine,
    moved_left,
    photo,
    reference,
    reference_run,
    relative_error,
    tokenizer,
    write_processor,
    write_reference,
)
from flax import nnx

from unifusion_jax import encoders
from unifusion_jax.encoders import Encoder, EncoderBatch, InternVLConfig, Prompt, vision
from unifusion_jax.encoders.decoder import DecoderConfig
from unifusion_jax.encoders.encoder import abstract_model
from unifusion_jax.encoders.vision import VisionConfig, pixel_shuffle
from unifusion_jax.parallel.mesh import MeshConfig, make_mesh

PROMPTS = [
    Prompt("a red square"),
    Prompt("make the ring yellow", [photo(1, 90, 40)], target="the picture shows a yellow ring"),
    Prompt("put the first left of the second", [photo(2, 50, 60), photo(3, 32, 32)], target="", system="short answers"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_reference(tmp_path_factory.mktemp(name), name) for name in VARIANTS}


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: encoders.load(folder, dtype="float32") for name, folder in folders.items()}


@pytest.fixture(scope="module")
def runs(loaded):
    """Variant -> (batch with images, our states of every layer); the batch has 256 tokens a row."""
    made = {}
    for name, encoder in loaded.items():
        batch = encoder.prepare(PROMPTS, max_tokens=256, max_tiles=4)
        made[name] = batch, np.asarray(encoder.layer_states(batch, layers=every_layer(encoder)))
    return made


def every_layer(encoder) -> range:
    return range(encoder.config.decoder.num_layers + 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_and_the_logits_equal_transformers(loaded, runs, variant):
    batch, ours = runs[variant]
    theirs, their_logits = reference_run(reference(variant), batch)
    assert ours.shape == theirs.shape and batch.pixels.shape[1] > 5 and len(set(batch.mask.sum(axis=1))) == 3
    error = relative_error(ours, theirs, batch.mask)
    print(f"{variant}: worst layer {error:.1e} of its rms")  # docs/encoders.md gives the command that shows these
    assert error < 1e-4
    decoder = loaded[variant].module(loaded[variant].params).decoder
    logits = decoder.logits(jnp.asarray(ours[:, :, -1]))
    assert relative_error(logits[:, :, None], their_logits[:, :, None], batch.mask) < 1e-4


def test_text_only_equals_transformers(loaded):
    encoder = loaded["grouped"]
    batch = encoder.prepare(
        [Prompt("two green triangles"), Prompt("one"), Prompt("naïve 日本語 circle")], max_tokens=220
    )
    assert batch.pixels is None
    ours = encoder.layer_states(batch, layers=every_layer(encoder))
    assert relative_error(ours, reference_run(reference("grouped"), batch)[0], batch.mask) < 1e-4


def test_padding_on_the_left_changes_nothing(loaded, runs):
    encoder = loaded["grouped"]
    right, states = runs["grouped"]
    left = dataclasses.replace(right, **moved_left(right))
    ours = np.asarray(encoder.layer_states(left, layers=every_layer(encoder)))
    np.testing.assert_allclose(ours[left.mask], states[right.mask], atol=2e-5)
    theirs, _ = reference_run(reference("grouped"), left, positions=np.maximum(left.mask.cumsum(axis=1) - 1, 0))
    assert relative_error(ours, theirs, left.mask) < 1e-4


def test_large_tiles_go_through_the_tower_one_by_one(loaded, runs, monkeypatch):
    encoder, (batch, every) = loaded["grouped"], runs["grouped"]
    monkeypatch.setattr(vision, "_LARGE_IMAGE_TOKENS", 1)
    states = jax.jit(lambda params, batch: encoder.module(params).states(batch, (2,)))(encoder.params, batch)
    np.testing.assert_allclose(states[batch.mask], every[:, :, (2,)][batch.mask], atol=1e-5)


def test_any_subset_of_layers_in_any_order(loaded, runs):
    encoder = loaded["grouped"]
    batch, every = runs["grouped"]
    for layers in ((0,), (2, 0, 4)):
        np.testing.assert_allclose(encoder.layer_states(batch, layers=layers), every[:, :, layers], atol=1e-5)
    assert encoder.layers == (1, 4)
    with pytest.raises(ValueError, match=r"distinct numbers from 0 .* to 5 .* got \(1, 6\)"):
        encoder.layer_states(batch, layers=(1, 6))
    with pytest.raises(ValueError, match=r"got \(2, 2\)"):
        encoder.layer_states(batch, layers=(2, 2))


def test_export_moves_kept_tokens_together_in_order(loaded, runs):
    encoder = loaded["grouped"]
    batch, states = runs["grouped"][0], runs["grouped"][1][:, :, [1, 4]]
    exported = encoder.export(batch)
    counts = batch.keep.sum(axis=1)
    assert exported.states.shape[1] == counts.max() == batch.max_kept()
    for row in range(3):
        np.testing.assert_allclose(exported.states[row, : counts[row]], states[row][batch.keep[row]], atol=1e-5)
        np.testing.assert_array_equal(exported.is_image[row, : counts[row]], batch.is_image[row][batch.keep[row]])
    np.testing.assert_array_equal(exported.mask.sum(axis=1), counts)
    assert not np.any(exported.states[~np.asarray(exported.mask)])
    assert encoder.export(batch, max_kept=300).mask.shape == (3, 300)
    with pytest.raises(ValueError, match=r"keeps .* tokens, room is for max_kept=3"):
        encoder.export(batch, max_kept=3)


@pytest.mark.parametrize(("variant", "layout"), [("grouped", "current"), ("grouped", "original"), ("tied", "current")])
def test_all_spellings_load_bit_equal(loaded, tmp_path, variant, layout):
    encoder = encoders.load(write_reference(tmp_path, variant, layout), dtype="float32")
    assert encoder.config == dataclasses.replace(loaded[variant].config, vision=encoder.config.vision)
    jax.tree.map(np.testing.assert_array_equal, encoder.params, loaded[variant].params)
    assert "书生" in encoder.processor.system
    batch = encoder.prepare(PROMPTS)
    np.testing.assert_array_equal(batch.token_ids, loaded[variant].prepare(PROMPTS).token_ids)


def test_older_tower_transposes_tokens(tmp_path):
    folder = write_reference(tmp_path, "grouped", "original")
    raw = json.loads((folder / "config.json").read_text())
    raw["ps_version"] = "v1"
    (folder / "config.json").write_text(json.dumps(raw))
    assert encoders.load(folder).config.vision.shuffle_transposed
    grid = torch.randn(2, 4, 4, 3)
    # Version 1 lacks the last permutation of the current code.
    theirs = reference("grouped").model.pixel_shuffle(grid)
    np.testing.assert_array_equal(pixel_shuffle(jnp.asarray(grid.numpy()), 2), theirs)
    np.testing.assert_array_equal(pixel_shuffle(jnp.asarray(grid.numpy()), 2, transposed=True), theirs.transpose(1, 2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_folder_loads_in_transformers_with_the_same_states(loaded, runs, tmp_path, variant):
    encoder = loaded[variant]
    encoder.save(tmp_path)
    model = transformers.InternVLForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    batch, ours = runs[variant]
    theirs, _ = reference_run(model, batch)
    assert relative_error(ours, theirs, batch.mask) < 1e-4
    again = encoders.load(tmp_path, dtype="float32")
    assert again.config == encoder.config
    assert again.processor.system == encoder.processor.system and again.processor.tiling == encoder.processor.tiling
    jax.tree.map(np.testing.assert_array_equal, again.params, encoder.params)


def _count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("config", "decoder", "projector"),
    [
        (InternVLConfig.internvl3_8b(), 7_612_820_992, 27_540_480),
        (InternVLConfig.internvl3_2b(), 1_776_283_136, None),
        (InternVLConfig.internvl3_1b(), 629_697_920, None),
    ],
)
def test_full_sizes_have_the_published_parameter_counts(config, decoder, projector):
    params = nnx.to_pure_dict(nnx.state(abstract_model(config, "bfloat16"), nnx.Param))
    assert _count(params["decoder"]) == decoder
    assert _count(params["vision"]) == 304_012_288
    assert projector is None or _count(params["projector"]) == projector
    assert config.tokens_per_tile == 256
    batch = EncoderBatch(
        *[jax.ShapeDtypeStruct((2, 600), dtype) for dtype in (jnp.int32, bool, bool, bool)],
        pixels=jax.ShapeDtypeStruct((2, 2, 448, 448, 3), jnp.float32),
    )
    graphdef = nnx.split(abstract_model(config, "bfloat16"), nnx.Param, ...)[0]
    layers = encoders.default_layers(config.decoder.num_layers)
    states = jax.eval_shape(
        lambda params, batch: (model := nnx.merge(graphdef, params)).decoder.states(
            model.embed(batch), batch.mask, layers
        ),
        params,
        batch,
    )
    assert states.shape == (2, 600, len(layers), config.decoder.hidden_size) and states.dtype == jnp.bfloat16


def test_demo_size_fits_its_budget():
    params = nnx.to_pure_dict(nnx.state(abstract_model(InternVLConfig.demo(1536), "float32"), nnx.Param))
    assert _count(params) <= 2_700_000
    assert InternVLConfig.demo(1536).tokens_per_tile == 4
    assert encoders.default_layers(10) == (1, 4, 7, 10) and encoders.default_layers(28)[-1] == 28


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_states_follow_float32(folders, runs, variant):
    encoder = encoders.load(folders[variant])
    assert {leaf.dtype for leaf in jax.tree.leaves(encoder.params)} == {jnp.dtype(jnp.bfloat16)}
    batch, exact = runs[variant]
    rough = encoder.layer_states(batch, layers=every_layer(encoder))
    cosine = least_cosine(rough, exact, batch.mask)
    print(f"{variant}: least bfloat16 cosine of any token and layer {cosine:.5f}")
    assert rough.dtype == jnp.bfloat16 and cosine > 0.999


@pytest.mark.parametrize("rows", [3, 4])
def test_sharded_over_a_mesh_gives_the_same_states(folders, runs, rows):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    encoder = encoders.load(folders["grouped"], dtype="float32", mesh=mesh)
    kernel = encoder.params["decoder"]["layers"]["blocks"]["ffn"]["gate"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, ("fsdp",), ("tensor",))
    batch, states = runs["grouped"]
    repeated = jax.tree.map(lambda leaf: np.resize(leaf, (rows, *leaf.shape[1:])), batch)
    ours = np.asarray(encoder.layer_states(repeated))
    assert ours.shape[0] == rows
    np.testing.assert_allclose(ours[:3][batch.mask], states[:, :, [1, 4]][batch.mask], atol=1e-4)


def test_a_folder_without_tokenizer_runs_token_batches(folders, loaded, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folders["grouped"] / name).read_bytes())
    encoder = encoders.load(tmp_path, dtype="float32")
    ids = np.arange(12).reshape(2, 6)
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    batch = EncoderBatch.from_tokens(ids, mask)
    np.testing.assert_array_equal(encoder.layer_states(batch), loaded["grouped"].layer_states(batch))
    assert encoder.export(batch).mask.sum() == 9
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer \(none of tokenizer.json, vocab.json"):
        encoder.prepare([Prompt("a")])


def test_clear_errors(folders, tmp_path):
    with pytest.raises(ValueError, match="Expected integer token ids"):
        EncoderBatch.from_tokens(np.zeros((2, 3)), np.ones((2, 3)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(
        ValueError, match=r"Unsupported encoder model_type='bert'.*supported: .*internvl, internvl_chat, llama"
    ):
        encoders.load(tmp_path)
    raw = json.loads((folders["grouped"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(FileNotFoundError, match=r"No \*.safetensors file"):
        encoders.load(tmp_path)
    tensors = safetensors.torch.load_file(folders["grouped"] / "model.safetensors")
    del tensors["language_model.model.layers.3.mlp.up_proj.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: decoder.layers.blocks.ffn.up.kernel for layers \[3\]"):
        encoders.load(tmp_path)
    raw["text_config"]["intermediate_size"] = 53
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        ValueError, match=r"shape: .*mlp.*got \(52, 36\).*expects \(53, 36\)|got \(36, 52\), the config"
    ):
        encoders.load(tmp_path)
    raw["text_config"]["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="Unsupported rotary scaling 'yarn'"):
        encoders.load(tmp_path)
    raw["text_config"]["model_type"] = "mamba"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="Unsupported language model 'mamba'"):
        encoders.load(tmp_path)
    with pytest.raises(ValueError, match="multiple of num_kv_heads, got 3 and 2"):
        DecoderConfig(10, 8, 1, 3, 2, 4, 8)
    with pytest.raises(ValueError, match=r"multiple of patch_px \* shuffle, got 30, 8 and 2"):
        VisionConfig(image_px=30, patch_px=8)
    with pytest.raises(ValueError, match=r"tokenizer has \d+ tokens, the model rows for 100"):
        Encoder.create(InternVLConfig.demo(100), tokenizer())
    encoder = encoders.load(folders["grouped"])
    with pytest.raises(ValueError, match="has 600 tokens a row, the decoder takes 512"):
        encoder.export(EncoderBatch.from_tokens(np.zeros((1, 600), int), np.ones((1, 600))))


def test_processor_settings_in_the_newer_file(folders, tmp_path):
    write_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "config.json").write_bytes((folders["grouped"] / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folders["grouped"] / "model.safetensors").read_bytes())
    settings = {"image_processor": {"max_patches": 6, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    tiling = encoders.load(tmp_path).processor.tiling
    assert (tiling.max_tiles, tiling.mean, tiling.tile_px) == (6, (0.5, 0.5, 0.5), 32)
