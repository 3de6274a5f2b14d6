"""Single-pass rewriting (VERIFI): the answer is decoded and its states are collected in the same pass.

The prompt goes through the decoder once (prefill), which gives the states of its image tokens; each decoded token goes
through once more as the input of the next step, which gives its states. Nothing is encoded again.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from unifusion_jax.encoders.batch import AnyArray, EncoderBatch, LayerStates, pytree
from unifusion_jax.encoders.decoder import KVCache, Positions
from unifusion_jax.encoders.model import LanguageModel


@pytree
@dataclasses.dataclass(frozen=True)
class Decoded:
    """Answers of a batch.

    Attributes:
      token_ids: the answers.
      lengths: how many of their tokens are words; a closing token is not.
      finished: whether the answer ended by itself, not for want of room.
      states: of image tokens and words.
    """

    token_ids: Int[AnyArray, "B max_new"]
    lengths: Int[AnyArray, "B"]
    finished: Bool[AnyArray, "B"]
    states: LayerStates


@pytree
@dataclasses.dataclass(frozen=True)
class Drawing:
    """How tokens are drawn.

    Attributes:
      keys: one random key a row. A row's answer depends on its own prompt and key only.
      temperature: divides the scores; 0 takes the most likely token.
      top_p: tokens are drawn from the fewest that together have this probability (Holtzman et al. 2020); 1 draws from all.
    """

    keys: Any
    temperature: Float[AnyArray, ""]
    top_p: Float[AnyArray, ""]


def compact_index(keep: Bool[Array, "B S"], count: int) -> tuple[Int[Array, "B C"], Bool[Array, "B C"]]:
    """Returns positions of the first `count` kept tokens of each row in their order, and which of them exist."""
    order = jnp.argsort(~keep, axis=1, stable=True)[:, :count]
    order = jnp.pad(order, ((0, 0), (0, count - order.shape[1])))
    return order, jnp.arange(count) < jnp.sum(keep, axis=1, keepdims=True)


def nucleus(logits: Float[Array, "B V"], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """Returns the scores, minus infinity for all but the fewest tokens that together reach probability `top_p`."""
    falling = -jnp.sort(-logits, axis=-1)
    likelihood = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(likelihood, axis=-1) - likelihood  # of all likelier tokens: 0 for the first, which always stays
    least = jnp.min(jnp.where((before < top_p) | (before == 0), falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def sample_tokens(logits: Float[Array, "B V"], drawing: Drawing, step: Int[Array, ""]) -> Int[Array, "B"]:
    """Draws one token a row, from the row's own key; the most likely one where the temperature is 0."""

    def draw() -> Array:
        scaled = logits / drawing.temperature
        # Sorting the vocabulary is not done where nothing is to be cut off.
        scaled = jax.lax.cond(drawing.top_p < 1, lambda: nucleus(scaled, drawing.top_p), lambda: scaled)
        keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(drawing.keys)
        return jax.vmap(jax.random.categorical)(keys, scaled)

    most_likely = jnp.argmax(logits, axis=-1)
    return jax.lax.cond(drawing.temperature > 0, draw, lambda: most_likely).astype(jnp.int32)


@pytree
@dataclasses.dataclass(frozen=True)
class _Loop:
    """What the decoding loop carries: `token` is the next input of each row, `done` rows have met a stop token."""

    step: Int[AnyArray, ""]
    token: Int[AnyArray, "B"]
    done: Bool[AnyArray, "B"]
    token_ids: Int[AnyArray, "B max_new"]
    states: Float[AnyArray, "B max_new N H"]
    cache: KVCache


def decode(
    model: LanguageModel,
    batch: EncoderBatch,
    drawing: Drawing,
    stop_ids: Int[Array, "stops"],
    *,
    layers: Sequence[int],
    image_tokens: int,
    max_new_tokens: int,
) -> Decoded:
    """Decodes an answer to each prompt and collects the states of `layers` of image tokens and decoded words.

    Args:
      model: encoder with an output head.
      batch: prompts that end where the answer begins.
      drawing: how tokens are chosen.
      stop_ids: tokens that end an answer.
      layers: which states to collect.
      image_tokens: room for image tokens a row.
      max_new_tokens: most words a row.
    """
    mask = jnp.asarray(batch.mask)
    positions = model.positions(batch)
    # An answer goes on after the largest position of its prompt, on all axes where there are three.
    following = 1 + jnp.max(jnp.where(mask, positions, -1).reshape(-1, *mask.shape), axis=(0, 2))
    image_index, image_mask = compact_index(jnp.asarray(batch.is_image) & mask, image_tokens)
    logits, image_states, cache = _prefill(model, batch, positions, image_index, layers, max_new_tokens)
    step, rows = jnp.zeros((), jnp.int32), (mask.shape[0], max_new_tokens)
    states = jnp.zeros((*rows, *image_states.shape[2:]), image_states.dtype)
    drawn = _draw(logits, drawing, stop_ids, step)
    loop = _Loop(step, *drawn, jnp.full(rows, stop_ids[0]), states, cache)
    loop = _words(model, loop, following, drawing, stop_ids, layers)
    is_word = ~jnp.any(loop.token_ids[:, :, None] == stop_ids, axis=-1)
    states = _join(image_states, image_mask, loop.states, is_word)
    return Decoded(loop.token_ids, jnp.sum(is_word, axis=1), loop.done, states)


def _draw(
    logits: Float[Array, "B V"], drawing: Drawing, stop_ids: Int[Array, "stops"], step: Int[Array, ""]
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """Draws the next token of each row, and tells which rows it ends."""
    token = sample_tokens(logits, drawing, step)
    return token, jnp.any(token[:, None] == stop_ids, axis=1)


def _words(
    model: LanguageModel,
    first: _Loop,
    following: Int[Array, "B"],
    drawing: Drawing,
    stop_ids: Int[Array, "stops"],
    layers: Sequence[int],
) -> _Loop:
    """Decodes until all rows are done or the room is full; `following` are the positions of the first new tokens."""
    max_new_tokens = first.token_ids.shape[1]
    prompt_slots = first.cache.mask.shape[1] - max_new_tokens
    decoder = model.decoder
    blocks = decoder.layers.cut()

    def body(loop: _Loop) -> _Loop:
        slot = prompt_slots + loop.step
        cache = dataclasses.replace(loop.cache, mask=loop.cache.mask.at[:, slot].set(True))
        x, states, cache = decoder.cached_states(
            model.embed_tokens(loop.token[:, None]),
            (following + loop.step)[:, None],
            cache,
            slot,
            layers,
            blocks=blocks,
        )
        token, stopped = _draw(decoder.logits(x[:, 0]), drawing, stop_ids, loop.step + 1)
        return _Loop(
            step=loop.step + 1,
            token=token,
            done=loop.done | stopped,
            token_ids=loop.token_ids.at[:, loop.step].set(jnp.where(loop.done, stop_ids[0], loop.token)),
            states=jax.lax.dynamic_update_slice_in_dim(loop.states, states, loop.step, axis=1),
            cache=cache,
        )

    return jax.lax.while_loop(lambda loop: (loop.step < max_new_tokens) & ~jnp.all(loop.done), body, first)


def _prefill(
    model: LanguageModel,
    batch: EncoderBatch,
    positions: Positions,
    image_index: Int[Array, "B C"],
    layers: Sequence[int],
    max_new_tokens: int,
) -> tuple[Float[Array, "B V"], Float[Array, "B C N H"], KVCache]:
    """Runs the prompts; returns the scores of the first new token, the states of image tokens, and the filled cache."""
    mask = jnp.asarray(batch.mask)
    embeddings = model.embed(batch)
    cache = model.decoder.empty_cache(jnp.pad(mask, ((0, 0), (0, max_new_tokens))), embeddings.dtype)
    hidden, image_states, cache = model.decoder.cached_states(
        embeddings, positions, cache, 0, layers, images=model.image_blocks(batch), keep_index=image_index
    )
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return model.decoder.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]), image_states, cache


def _join(
    image_states: Float[Array, "B C N H"],
    image_mask: Bool[Array, "B C"],
    word_states: Float[Array, "B W N H"],
    word_mask: Bool[Array, "B W"],
) -> LayerStates:
    """Puts image tokens before words, as the prompt does, and moves each row's tokens together."""
    valid = jnp.concatenate([image_mask, word_mask], axis=1)
    index, mask = compact_index(valid, valid.shape[1])
    states = jnp.take_along_axis(jnp.concatenate([image_states, word_states], axis=1), index[:, :, None, None], axis=1)
    is_image = jnp.arange(valid.shape[1]) < jnp.sum(image_mask, axis=1, keepdims=True)
    return LayerStates(jnp.where(mask[:, :, None, None], states, 0), mask, is_image)
