"""The T5 encoder against transformers: states, buckets of positions, words, layouts, full size, errors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from encoders_support import TEXTS, least_cosine, photo, relative_error
from flax import nnx
from transformers.models.t5.modeling_t5 import T5Attention
from vision_support import (
    T5_VARIANTS,
    hidden_states,
    t5_reference,
    t5_tokenizer,
    write_t5,
)

from unifusion_jax import encoders
from unifusion_jax.encoders import EncoderBatch, Prompt
from unifusion_jax.encoders.encoder import abstract_model
from unifusion_jax.encoders.t5 import T5Config, relative_buckets
from unifusion_jax.verifi import SYSTEM_PROMPTS

PROMPTS = [Prompt("a red square"), Prompt(TEXTS[1] + " and " + TEXTS[0]), Prompt("one"), Prompt("")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_t5(tmp_path_factory.mktemp("t5"), name) for name in T5_VARIANTS}


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: encoders.load(folder, dtype="float32") for name, folder in folders.items()}


def every_layer(encoder) -> range:
    return range(encoder.config.num_layers + 1)


def inputs(batch: EncoderBatch) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor(batch.token_ids).long(),
        "attention_mask": torch.tensor(np.ascontiguousarray(batch.mask)).long(),
    }


@pytest.mark.parametrize("variant", T5_VARIANTS)
def test_every_layer_equals_transformers(loaded, variant):
    encoder = loaded[variant]
    batch = encoder.prepare(PROMPTS)
    assert len(set(batch.mask.sum(axis=1))) == 4
    ours = encoder.layer_states(batch, layers=every_layer(encoder))
    theirs, _ = hidden_states(t5_reference(variant).encoder, inputs(batch))
    error = relative_error(ours, theirs, batch.mask)
    print(f"{variant}: worst layer {error:.1e} of its rms")  # docs/encoders.md gives the command that shows these
    assert ours.shape == theirs.shape and error < 1e-4


@pytest.mark.parametrize("left", [False, True])
def test_long_rows_padded_on_either_side(loaded, left):
    places = np.arange(150)
    lengths = np.array([[150], [40], [1]])
    mask = places >= 150 - lengths if left else places < lengths
    batch = EncoderBatch.from_tokens(np.random.default_rng(3).integers(0, 180, mask.shape), mask)
    encoder = loaded["wide"]
    theirs, _ = hidden_states(t5_reference("wide").encoder, inputs(batch))
    assert relative_error(encoder.layer_states(batch, layers=every_layer(encoder)), theirs, mask) < 1e-4


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (32, 1000), (8, 20), (12, 50), (64, 128)])
def test_buckets_equal_transformers(buckets, distance):
    config = T5Config(10, 8, 1, 2, 4, 8, buckets=buckets, max_distance_tokens=distance)
    distances = np.arange(-3000, 3000)
    theirs = T5Attention._relative_position_bucket(torch.tensor(distances), True, buckets, distance)
    np.testing.assert_array_equal(relative_buckets(distances, config), theirs)


def test_encoder_alone_loads_bit_equal(loaded, tmp_path):
    encoder = encoders.load(write_t5(tmp_path, "wide", "encoder"), dtype="float32")
    assert encoder.config == loaded["wide"].config
    jax.tree.map(np.testing.assert_array_equal, encoder.params, loaded["wide"].params)


@pytest.mark.parametrize("variant", T5_VARIANTS)
def test_bfloat16_states_follow_float32(loaded, folders, variant):
    batch = loaded[variant].prepare(PROMPTS)
    rough = encoders.load(folders[variant])
    assert {leaf.dtype for leaf in jax.tree.leaves(rough.params)} == {jnp.dtype(jnp.bfloat16)}
    layers = every_layer(rough)
    exact = np.asarray(loaded[variant].layer_states(batch, layers=layers))
    cosine = least_cosine(rough.layer_states(batch, layers=layers), exact, batch.mask)
    print(f"{variant}: least bfloat16 cosine of any token and layer {cosine:.5f}")
    assert cosine > 0.999


def test_words_are_tokenised_like_the_reference_and_kept(loaded):
    encoder = loaded["wide"]
    for text in (*TEXTS[:2], "", "</s> see <extra_id_0> <pad>"):
        row = encoder.processor.prepare_row(Prompt(text))
        assert row.token_ids[-1] == 1 and not row.keep[-1] and row.keep[:-1].all() and not row.is_image.any()
        if "<" in text:  # spelled, not meant
            control = set(t5_tokenizer().get_added_vocab().values()) - {t5_tokenizer().unk_token_id}
            assert not set(row.token_ids[:-1]) & control
        else:
            assert row.token_ids.tolist() == t5_tokenizer()(text)["input_ids"]
    answered = encoder.processor.prepare_row(Prompt("a red square", target=TEXTS[0]))
    assert answered.token_ids.tolist() == t5_tokenizer()(TEXTS[0])["input_ids"]
    assert answered.keep[:-1].all() and answered.is_target.all() and not answered.keep[-1]
    assert not encoder.processor.prepare_row(Prompt("a", target="")).keep.any()


def test_export_gives_the_words_alone(loaded):
    encoder = loaded["wide"]
    batch = encoder.prepare(PROMPTS)
    exported = encoder.export(batch)
    states = np.asarray(encoder.layer_states(batch))
    assert encoder.layers == (1, 4)
    for row in range(len(PROMPTS)):
        words = int(batch.mask[row].sum()) - 1
        assert exported.mask[row].sum() == words
        np.testing.assert_allclose(exported.states[row, :words], states[row, :words], atol=1e-5)
    assert not np.any(exported.states[~np.asarray(exported.mask)])


def test_full_size_has_the_published_parameter_count():
    config = T5Config.flan_t5_xxl()
    model = abstract_model(config, "bfloat16")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 4_762_310_656
    batch = EncoderBatch(*[jax.ShapeDtypeStruct((2, 512), kind) for kind in (jnp.int32, bool, bool, bool)])
    graphdef = nnx.split(model, nnx.Param, ...)[0]
    states = jax.eval_shape(lambda params, batch: nnx.merge(graphdef, params).states(batch, (1, 24)), params, batch)
    assert states.shape == (2, 512, 2, 4096) and states.dtype == jnp.bfloat16


def test_clear_errors(loaded, folders, tmp_path):
    encoder = loaded["wide"]
    with pytest.raises(ValueError, match=r"has no decoder \(T5 only reads\), so it cannot rewrite"):
        encoder.rewrite([Prompt("a")], max_new_tokens=3)
    with pytest.raises(ValueError, match="has 1 images, but this encoder reads text only"):
        encoder.prepare([Prompt("a", [photo(0, 8, 8)])])
    with pytest.raises(
        ValueError, match=r"T5 has no system turn, got the system message 'be brief'.*system_prompts=.none"
    ):
        encoder.prepare([Prompt("a", system="be brief")])
    encoder.prepare([Prompt("a", system=SYSTEM_PROMPTS["none"].of(task)) for task in ("text_to_image", "joint")])
    with pytest.raises(ValueError, match="2049 tokens a row"):
        encoder.export(EncoderBatch.from_tokens(np.zeros((1, 2049), int)))
    with pytest.raises(ValueError, match=r"numbers from 0 .* to 4 .* got \(5,\)"):
        encoder.layer_states(encoder.prepare(PROMPTS), layers=(5,))
    raw = json.loads((folders["wide"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "feed_forward_proj": "relu"}))
    with pytest.raises(ValueError, match=r"feed_forward_proj='relu' is not supported, expected one of \['gated-gelu'"):
        encoders.load(tmp_path)
    for change, message in (
        ({"buckets": 30}, "buckets must be a positive multiple of 4, got 30"),
        ({"max_distance_tokens": 8}, "must exceed the distances with a bucket of their own, 8, got 8"),
        ({"num_heads": 0}, "T5Config.num_heads must be positive, got 0"),
        ({"activation": "tanh"}, "Unknown activation 'tanh'"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(T5Config.flan_t5_xxl(), **change)
