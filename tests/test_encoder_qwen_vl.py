"""Qwen2.5-VL against transformers: states, positions, rewriting, key layouts, prompt, full size, images beyond the budget."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import transformers
from encoders_support import assert_same_states, least_cosine, moved_left, photo, relative_error, teacher_forced
from flax import nnx
from vision_support import (
    PROMPTS,
    QWEN_VARIANTS,
    hidden_states,
    qwen_inputs,
    qwen_reference,
    qwen_tokenizer,
    write_qwen,
)

from unifusion_jax import encoders
from unifusion_jax.encoders import EncoderBatch, Prompt
from unifusion_jax.encoders.encoder import abstract_model
from unifusion_jax.encoders.native import NativeConfig
from unifusion_jax.encoders.qwen_vl import QwenVisionConfig, QwenVLConfig, mrope_positions
from unifusion_jax.parallel.mesh import MeshConfig, make_mesh


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_qwen(tmp_path_factory.mktemp("qwen"), name) for name in QWEN_VARIANTS}


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: encoders.load(folder, dtype="float32") for name, folder in folders.items()}


@pytest.fixture(scope="module")
def runs(loaded):
    """Variant -> (batch, our states of every layer)."""
    batches = {name: encoder.prepare(PROMPTS, max_tokens=144) for name, encoder in loaded.items()}
    return {name: (batch, states_of(loaded[name], batch)) for name, batch in batches.items()}


def states_of(encoder, batch) -> np.ndarray:
    return np.asarray(encoder.layer_states(batch, layers=range(encoder.config.num_layers + 1)))


@pytest.mark.parametrize("variant", QWEN_VARIANTS)
def test_every_layer_and_the_logits_equal_transformers(loaded, runs, variant):
    batch, ours = runs[variant]
    assert len(set(batch.mask.sum(axis=1))) == 3 and (batch.grid[2, :, 0].max(), batch.grid[1, :, 0].max()) == (2, 0)
    assert (
        batch.pixels.shape[2:] == (8, 8, 3)
        and batch.pixels.shape[1] % loaded[variant].config.vision.window_tiles ** 2 == 0
    )
    theirs, their_logits = hidden_states(qwen_reference(variant), qwen_inputs(batch, PROMPTS))
    error = relative_error(ours, theirs, batch.mask)
    print(f"{variant}: worst layer {error:.1e} of its rms")  # docs/encoders.md gives the command that shows these
    assert ours.shape == theirs.shape and error < 1e-4
    decoder = loaded[variant].module(loaded[variant].params).decoder
    logits = decoder.logits(jnp.asarray(ours[:, :, -1]))
    assert relative_error(logits[:, :, None], their_logits[:, :, None], batch.mask) < 1e-4


def test_padding_on_the_left_and_more_room_for_tiles(loaded, runs):
    batch = runs["wide"][0]
    spare = 20  # not a whole number of windows
    left = dataclasses.replace(
        batch,
        **moved_left(batch),
        pixels=np.pad(batch.pixels, ((0, 0), (0, spare), (0, 0), (0, 0), (0, 0)), constant_values=7.0),
        grid=np.pad(batch.grid, ((0, 0), (0, spare), (0, 0)), constant_values=-1),
    )
    theirs, _ = hidden_states(qwen_reference("wide"), qwen_inputs(left, PROMPTS))
    assert relative_error(states_of(loaded["wide"], left), theirs, left.mask) < 1e-4


def test_text_only_equals_transformers(loaded):
    batch = loaded["wide"].prepare([Prompt("two green triangles"), Prompt("one")], max_tokens=60)
    assert batch.pixels is None and batch.grid is None
    theirs, _ = hidden_states(qwen_reference("wide"), qwen_inputs(batch, []))
    assert relative_error(states_of(loaded["wide"], batch), theirs, batch.mask) < 1e-4
    # The same rows in a batch of fixed shapes that has room for tiles.
    processor = loaded["wide"].processor
    rows = [processor.prepare_row(Prompt("two green triangles")), processor.prepare_row(Prompt("one"))]
    roomy = processor.collate(rows, max_tokens=60, row_tiles=18)
    assert roomy.pixels.shape[1] == 18 and (roomy.grid == -1).all()
    assert relative_error(states_of(loaded["wide"], roomy), theirs, batch.mask) < 1e-4


def test_positions_equal_transformers(loaded, runs):
    batch = runs["wide"][0]
    ours = mrope_positions(*(jnp.asarray(getattr(batch, name)) for name in ("mask", "is_image", "grid")))
    inputs = qwen_inputs(batch, PROMPTS)
    theirs, _ = qwen_reference("wide").model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    np.testing.assert_array_equal(np.asarray(ours)[:, batch.mask], theirs.numpy()[:, batch.mask])


@pytest.mark.parametrize(("variant", "layout"), [("wide", "current"), ("wide", "flat"), ("tied", "flat")])
def test_all_layouts_load_bit_equal(loaded, tmp_path, variant, layout):
    encoder = encoders.load(write_qwen(tmp_path, variant, layout), dtype="float32")
    assert encoder.config == loaded[variant].config
    jax.tree.map(np.testing.assert_array_equal, encoder.params, loaded[variant].params)


@pytest.mark.parametrize("variant", QWEN_VARIANTS)
def test_bfloat16_states_follow_float32(folders, runs, variant):
    batch, exact = runs[variant]
    cosine = least_cosine(states_of(encoders.load(folders[variant]), batch), exact, batch.mask)
    print(f"{variant}: least bfloat16 cosine of any token and layer {cosine:.5f}")
    assert cosine > 0.999


def test_rewriting_equals_teacher_forcing_and_generate(loaded):
    encoder = loaded["wide"]
    rewrite = encoder.rewrite(PROMPTS, max_new_tokens=6)
    assert_same_states(rewrite.states, teacher_forced(encoder, rewrite, PROMPTS, max_tiles=None))
    for prompt, ours in zip(PROMPTS, rewrite.token_ids, strict=True):
        batch = encoder.prepare([dataclasses.replace(prompt, target="")])
        out = qwen_reference("wide").generate(
            **qwen_inputs(batch, [prompt]),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=6, do_sample=False, eos_token_id=list(encoder.processor.stop_ids), pad_token_id=0
            ),
        )
        answer = out[0, batch.token_ids.shape[1] :].tolist()
        assert ours == [token for token in answer if token not in encoder.processor.stop_ids]


def test_prompt_is_the_published_template(loaded):
    processor = loaded["wide"].processor
    pictures = [photo(1, 40, 30), photo(2, 16, 60)]
    row = processor.prepare_row(Prompt("make it <|image_pad|> yellow", pictures))
    counts = [processor.tiling.cut(picture).spans[0] for picture in pictures]
    images = "".join(f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in counts)
    expected = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    expected += f"{images}WORDS<|im_end|>\n<|im_start|>assistant\n"
    before, after = expected.split("WORDS")
    words = processor.chat.encode("make it <|image_pad|> yellow")[0]
    tokenizer = qwen_tokenizer()
    assert row.token_ids.tolist() == tokenizer(before)["input_ids"] + words + tokenizer(after)["input_ids"]
    assert row.is_image.sum() == sum(counts) == (row.token_ids == processor.image_id).sum()
    plain = processor.prepare_row(Prompt("a red square", system=""))
    assert (
        plain.token_ids.tolist()
        == tokenizer("<|im_start|>user\na red square<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    )
    assert processor.tiling == NativeConfig(tile_px=8, window_tiles=3, min_area_px=6 * 64, max_area_px=30 * 64)


def test_newer_files_spell_areas_as_edges(folders, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["wide"] / name).read_bytes())
    size = {"shortest_edge": 200, "longest_edge": 900}
    settings = {"image_processor": {"size": size, "image_mean": [0.5] * 3, "image_std": None}}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    tiling = encoders.load(tmp_path).processor.tiling
    assert (tiling.min_area_px, tiling.max_area_px, tiling.mean) == (200, 900, (0.5, 0.5, 0.5))
    assert tiling.std == NativeConfig().std


def test_more_images_than_the_budget_allows(loaded):
    encoder = loaded["wide"]
    many = Prompt("one", [photo(seed, 64, 40) for seed in range(6)])
    with pytest.raises(
        ValueError, match=r"Prompt 0 has \d+ tokens \(144 of them image tokens, \d+ tiles\), the budget is 60"
    ):
        encoder.prepare([many], max_tokens=60)
    with pytest.raises(ValueError, match=r"Prompt 0 has \d+ tokens \(864 of them .* the budget is 512"):
        encoder.prepare([dataclasses.replace(many, images=many.images * 6)])
    row = encoder.processor.prepare_row(many)
    with pytest.raises(ValueError, match=r"Prompt 0 has \d+ tiles, room is for 90"):
        encoder.processor.collate([row], row_tiles=90)
    assert encoder.prepare([many], max_tiles=4).is_image.sum() <= 24
    with pytest.raises(ValueError, match="2000 x 3 px has an aspect ratio of 667"):
        encoder.prepare([Prompt("a", [PIL.Image.new("RGB", (2000, 3))])])


def test_sharded_over_a_mesh_gives_the_same_states(folders, runs):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    encoder = encoders.load(folders["wide"], dtype="float32", mesh=mesh)
    batch, states = runs["wide"]
    repeated = jax.tree.map(lambda leaf: np.resize(leaf, (4, *leaf.shape[1:])), batch)
    np.testing.assert_allclose(states_of(encoder, repeated)[:3][batch.mask], states[batch.mask], atol=1e-4)


def test_full_size_has_the_published_parameter_count():
    config = QwenVLConfig.qwen2_5_vl_7b()
    model = abstract_model(config, "bfloat16")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
    # The decoder of InternVL3-8B with 390 more rows in both tables.
    assert count == {"decoder": 7_612_820_992 + 2 * 390 * 3584, "vision": 676_550_144}
    tokens = [jax.ShapeDtypeStruct((2, 900), kind) for kind in (jnp.int32, bool, bool, bool)]
    batch = EncoderBatch(
        *tokens,
        pixels=jax.ShapeDtypeStruct((2, 640, 28, 28, 3), jnp.float32),
        grid=jax.ShapeDtypeStruct((2, 640, 3), jnp.int32),
    )
    graphdef = nnx.split(model, nnx.Param, ...)[0]
    states = jax.eval_shape(lambda params, batch: nnx.merge(graphdef, params).states(batch, (1, 28)), params, batch)
    assert states.shape == (2, 900, 2, 3584) and states.dtype == jnp.bfloat16


def test_clear_errors(folders, tmp_path):
    raw = json.loads((folders["wide"] / "config.json").read_text())

    def refused(match: str, **changes) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**raw, **changes}))
        with pytest.raises(ValueError, match=match):
            encoders.load(tmp_path)

    text = raw["text_config"]
    refused(
        "Unsupported rotary scaling 'yarn' of Qwen2.5-VL",
        text_config={**text, "rope_parameters": {"rope_type": "yarn"}},
    )
    refused("out_hidden_size=50 must equal", vision_config={**raw["vision_config"], "out_hidden_size": 50})
    with pytest.raises(ValueError, match=r"multiple of 4 \* num_heads, got 1280 and 15"):
        QwenVisionConfig(num_heads=15)
    with pytest.raises(ValueError, match=r"full_layers must lie in 0 .. 3, got \(7, 15, 23, 31\)"):
        QwenVisionConfig(num_layers=4)
    with pytest.raises(ValueError, match="frames must be positive, got 0"):
        QwenVisionConfig(frames=0)
