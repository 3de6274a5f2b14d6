"""Rewriting in one pass against teacher forcing and against transformers' generate; training from scratch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from encoders_support import (
    assert_same_states,
    photo,
    reference,
    reference_run,
    teacher_forced,
    tokenizer,
    write_reference,
)

from unifusion_jax import encoders, layers
from unifusion_jax.encoders import Encoder, InternVLConfig, Processor, Prompt, decoding
from unifusion_jax.encoders.lm_loss import next_token_loss

PROMPTS = [
    Prompt("make the ring yellow and small", [photo(1, 90, 40)]),
    Prompt("a red square"),
    Prompt("one", [photo(2, 64, 32), photo(3, 32, 32)], system="be brief"),
]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoders.load(write_reference(tmp_path_factory.mktemp("rewrite"), "grouped"), dtype="float32")


@pytest.fixture(scope="module")
def greedy(encoder):
    return encoder.rewrite(PROMPTS, max_new_tokens=NEW_TOKENS, max_tiles=4)


class EarlyStop(Processor):
    """A processor whose answers end at a chosen token, since a random model hardly ever closes its turn."""

    @property
    def stop_ids(self):
        return STOP_IDS


STOP_IDS: tuple[int, ...] = ()


def stopping_at(encoder, *ids: int) -> Encoder:
    globals()["STOP_IDS"] = ids
    fields = {field.name: getattr(encoder.processor, field.name) for field in dataclasses.fields(Processor)}
    return Encoder(encoder.config, encoder.params, EarlyStop(**fields), layers=encoder.layers)


def test_states_equal_teacher_forcing(encoder, greedy):
    assert [len(ids) for ids in greedy.token_ids] == [NEW_TOKENS] * 3
    theirs = teacher_forced(encoder, greedy, PROMPTS)
    assert theirs.is_image[0].sum() == 12 and not theirs.is_image[1].any()
    assert_same_states(greedy.states, theirs)


def test_tokens_equal_transformers_generate(encoder, greedy):
    for prompt, answer in zip(PROMPTS, greedy.token_ids, strict=True):
        batch = encoder.prepare([prompt], max_tiles=4)
        images = {}
        if batch.pixels is not None:
            images["pixel_values"] = torch.tensor(batch.pixels[0]).permute(0, 3, 1, 2)
        out = reference("grouped").generate(
            input_ids=torch.tensor(batch.token_ids).long(),
            attention_mask=torch.ones(batch.token_ids.shape, dtype=torch.long),
            **images,
            generation_config=transformers.GenerationConfig(
                max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=encoder.processor.stop_ids[0], pad_token_id=0
            ),
        )
        assert out[0, batch.token_ids.shape[1] :].tolist() == answer


def test_rows_stop_on_their_own(encoder, greedy):
    stop = greedy.token_ids[0][4]
    stopper = stopping_at(encoder, stop)
    together = stopper.rewrite(PROMPTS, max_new_tokens=NEW_TOKENS, max_tiles=4)
    for before, after in zip(greedy.token_ids, together.token_ids, strict=True):
        assert after == (before[: before.index(stop)] if stop in before else before)
    assert len(together.token_ids[0]) <= 4 and max(map(len, together.token_ids)) > len(together.token_ids[0])
    assert together.texts == [encoder.processor.decode(ids) for ids in together.token_ids]
    assert_same_states(together.states, teacher_forced(encoder, together, PROMPTS))


def test_an_empty_answer_keeps_image_tokens_only(encoder, greedy):
    stopper = stopping_at(encoder, *(ids[0] for ids in greedy.token_ids))
    rewrite = stopper.rewrite(PROMPTS, max_new_tokens=NEW_TOKENS, max_tiles=4)
    assert rewrite.texts == ["", "", ""] and rewrite.token_ids == [[], [], []]
    np.testing.assert_array_equal(rewrite.states.mask, rewrite.states.is_image)
    assert_same_states(rewrite.states, teacher_forced(encoder, rewrite, PROMPTS))


def test_answers_do_not_depend_on_the_batch(encoder, greedy):
    options = {"max_new_tokens": NEW_TOKENS, "max_tiles": 4}
    sampled = encoder.rewrite(PROMPTS, temperature=1.5, seed=7, **options)
    assert sampled.token_ids != greedy.token_ids
    alone = encoder.rewrite(PROMPTS[2:], temperature=1.5, seed=7, **options)
    assert alone.token_ids[0] == sampled.token_ids[2]
    turned = encoder.rewrite(PROMPTS[::-1], temperature=1.5, seed=[1, 7, 7], **options)
    assert turned.token_ids[1:] == sampled.token_ids[1::-1] and turned.token_ids[0] != sampled.token_ids[2]
    assert_same_states(sampled.states, teacher_forced(encoder, sampled, PROMPTS))


def test_top_p_draws_from_the_likeliest_tokens_only(encoder, greedy):
    options = {"max_new_tokens": NEW_TOKENS, "max_tiles": 4, "temperature": 1.5, "seed": 7}
    # The likeliest token alone: greedy, whatever the temperature.
    assert encoder.rewrite(PROMPTS, top_p=1e-6, **options).token_ids == greedy.token_ids
    assert encoder.rewrite(PROMPTS, top_p=1.0, **options).token_ids != greedy.token_ids


def test_nucleus_keeps_the_fewest_tokens_that_reach_the_probability():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]]))
    kept = np.isfinite(decoding.nucleus(logits, jnp.float32(0.7)))
    np.testing.assert_array_equal(kept, [[False, True, False, True], [True, False, False, False]])
    np.testing.assert_array_equal(
        np.isfinite(decoding.nucleus(logits, jnp.float32(0.76)))[0], [False, True, True, True]
    )


def test_layers_cut_before_the_loop_compute_what_a_scan_does(encoder, monkeypatch):
    # Another number of tokens than in the other tests, so that both are traced here.
    both = [encoder.rewrite(PROMPTS, max_new_tokens=9, max_tiles=4)]
    jax.clear_caches()
    monkeypatch.setattr(layers, "_LARGEST_CUT_BYTES", 0)
    both.append(encoder.rewrite(PROMPTS, max_new_tokens=9, max_tiles=4))
    jax.clear_caches()
    assert both[0].token_ids == both[1].token_ids
    assert_same_states(*(each.states for each in both))


def test_whether_an_answer_ended_is_told(encoder, greedy):
    assert greedy.finished == [False] * 3
    stop = greedy.token_ids[0][4]
    stopped = stopping_at(encoder, stop).rewrite(PROMPTS, max_new_tokens=NEW_TOKENS, max_tiles=4)
    assert stopped.finished == [len(ids) < NEW_TOKENS for ids in stopped.token_ids]
    assert stopped.finished[0]


def test_system_prompt_serves_prompts_without_their_own(encoder, greedy):
    brief = encoder.rewrite(PROMPTS, system_prompt="be brief", max_new_tokens=NEW_TOKENS, max_tiles=4)
    own = [dataclasses.replace(prompt, system="be brief", target="ignored") for prompt in PROMPTS]
    assert brief.token_ids == encoder.rewrite(own, max_new_tokens=NEW_TOKENS, max_tiles=4).token_ids
    assert brief.token_ids[2] == greedy.token_ids[2] and brief.token_ids[0] != greedy.token_ids[0]


def test_rewrite_errors(encoder):
    with pytest.raises(ValueError, match=r"leaves no room for max_new_tokens=500 within the decoder's 512 positions"):
        encoder.rewrite(PROMPTS[:1], max_new_tokens=500)
    with pytest.raises(ValueError, match=r"Expected max_new_tokens >= 1 and temperature >= 0, got 0"):
        encoder.rewrite(PROMPTS[:1], max_new_tokens=0)
    with pytest.raises(ValueError, match=r"top_p is a probability in \(0, 1\], got 1.5"):
        encoder.rewrite(PROMPTS[:1], max_new_tokens=4, top_p=1.5)
    with pytest.raises(ValueError, match=r"Got 2 seeds for 1 prompts"):
        encoder.rewrite(PROMPTS[:1], max_new_tokens=4, seed=[1, 2])


def test_loss_equals_torch(encoder):
    prompts = [dataclasses.replace(prompt, target="the picture shows two rings") for prompt in PROMPTS[:2]]
    batch = encoder.prepare([*prompts, PROMPTS[2]], max_tiles=4)
    loss, metrics = jax.jit(encoder.loss_fn)(encoder.params, batch)
    logits = torch.tensor(reference_run(reference("grouped"), batch)[1][:, :-1])
    labels = torch.tensor(np.where(batch.is_target, batch.token_ids, -100)[:, 1:]).long()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    right = (logits.argmax(-1) == labels).sum() / (labels >= 0).sum()
    assert float(metrics["token_accuracy"]) == pytest.approx(float(right))
    assert int(metrics["target_tokens"]) == int((labels >= 0).sum()) == int(batch.is_target.sum())
    with pytest.raises(ValueError, match="no is_target marks"):
        next_token_loss(encoder.module(encoder.params), dataclasses.replace(batch, is_target=None))


def test_an_encoder_trained_from_scratch_answers_what_it_learned(tmp_path):
    config = InternVLConfig.demo(400)
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_layers=2, max_positions=128))
    encoder = Encoder.create(config, tokenizer(), 5, layers=(1, 2))
    pictures = [photo(1, 32, 32), photo(2, 32, 32)]
    answers = ["a small red square", "two green triangles"]
    prompts = [Prompt("say", [picture], target=answer) for picture, answer in zip(pictures, answers, strict=True)]
    batch = encoder.prepare(prompts)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, momentum = carry
            (loss, _), grads = jax.value_and_grad(encoder.loss_fn, has_aux=True)(params, batch)
            momentum = jax.tree.map(lambda m, g: 0.9 * m + jnp.sign(g), momentum, grads)
            return (jax.tree.map(lambda p, m: p - 3e-4 * m, params, momentum), momentum), loss

        zeros = jax.tree.map(jnp.zeros_like, params)
        (params, _), losses = jax.lax.scan(step, (params, zeros), length=60)
        return params, losses

    params, losses = train(encoder.params)
    assert losses[0] > 4 and losses[-1] < 0.05
    encoder.with_params(params).save(tmp_path)
    again = encoders.load(tmp_path, dtype="float32")
    # Only the pictures differ, so the answers show that the model sees them.
    rewrite = again.rewrite([dataclasses.replace(prompt, target=None) for prompt in prompts], max_new_tokens=16)
    assert rewrite.texts == answers
    # The decoded text, encoded again, is the same condition.
    assert again.layers == (1,)
    assert_same_states(rewrite.states, again.export(again.prepare(prompts)))
