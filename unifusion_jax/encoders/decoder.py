"""The causal decoder of every language model family, as one scanned block that exports the states of chosen layers.

Layer k is the residual stream after block k, counted from 1; layer 0 is what enters the first block; the last layer is
taken before the final norm. Only the first `max(layers)` blocks run, and only the exported layers of the kept tokens
are held.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from unifusion_jax import layers as nn
from unifusion_jax.encoders.batch import AnyArray, pytree
from unifusion_jax.encoders.decoder_config import ACTIVATIONS, DecoderConfig
from unifusion_jax.parallel.attention import attention
from unifusion_jax.parallel.sharding import constrain

__all__ = ["Decoder", "DecoderConfig", "KVCache", "Positions", "token_positions"]

# One position a token, or its time, row and column (M-RoPE).
Positions = Int[Array, "B S"] | Int[Array, "3 B S"]


@pytree
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers in K slots, and which slots hold a token."""

    key: Float[AnyArray, "layers B K G E"]
    value: Float[AnyArray, "layers B K G E"]
    mask: Bool[AnyArray, "B K"]


Rope = tuple[jax.Array, jax.Array]


def token_positions(mask: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Counts existing tokens from 0, so that padding on either side changes nothing."""
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def rotate(x: Float[Array, "B S heads E"], rope: Rope) -> Float[Array, "B S heads E"]:
    """Applies rotary positions to (first half, second half) pairs, in float32."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Context:
    """What all layers of one call share: rotary angles, and where queries and keys stand.

    Attributes:
      rope: cosines and sines [B, S, 1, E / 2] of the layers without a window.
      sliding_rope: those of sliding layers.
      query_order: each query's place among the existing tokens of its row; window and image blocks go by it, so that
        unused slots between prompt and answer do not count.
      key_order: the same of the keys.
      key_mask: which keys exist.
      query_offset: slot of the first query.
      query_images: number of the image whose tokens see each other, 0 for all other tokens; None without such images.
      key_images: the same of the keys.
    """

    rope: Rope
    sliding_rope: Rope
    query_order: Int[Array, "B S"]
    key_order: Int[Array, "B K"]
    key_mask: Bool[Array, "B K"]
    query_offset: Int[Array, ""] | int = 0
    query_images: Int[Array, "B S"] | None = None
    key_images: Int[Array, "B K"] | None = None

    def visible(self, sliding: Bool[Array, ""], window_tokens: int | None) -> Bool[Array, "B S K"] | None:
        """Returns what limits attention other than order and existence of tokens (order too, with image blocks)."""
        if window_tokens is None and self.query_images is None:
            return None
        distance = self.query_order[:, :, None] - self.key_order[:, None, :]
        seen = jnp.ones(distance.shape, bool)
        if self.query_images is not None and self.key_images is not None:
            same = self.query_images[:, :, None] == self.key_images[:, None, :]
            seen = (distance >= 0) | (same & (self.query_images > 0)[:, :, None])
        return seen if window_tokens is None else seen & ((distance < window_tokens) | ~sliding)


class Embedding(nnx.Module):
    """The token table; computes in the type of its parameter, whatever that is (nnx.Embed would fix it when built)."""

    def __init__(self, rows: int, width: int, *, scale: float, param_dtype: Any, rngs: nnx.Rngs):
        # The row count of published tables (151,674) is not divisible by usual mesh sizes: the width is sharded.
        self.scale = scale
        self.embedding = nn.normal((rows, width), (None, "embed"), param_dtype=param_dtype, rngs=rngs)

    def __call__(self, token_ids: Int[Array, "*batch"]) -> Float[Array, "*batch H"]:
        """Looks tokens up; the scale is rounded to the table's type first, as Gemma's is."""
        found = jnp.take(self.embedding[...], token_ids, axis=0)
        return found if self.scale == 1.0 else found * jnp.asarray(self.scale, found.dtype)

    def scores(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch V"]:
        """Scores every token by its embedding, not scaled (tied output head)."""
        return x @ self.embedding[...].T


class Attention(nnx.Module):
    """Causal attention with grouped key-value heads and rotary positions."""

    def __init__(self, config: DecoderConfig, *, param_dtype: Any, rngs: nnx.Rngs):
        self.config = config
        width, query, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        options = {"dtype": None, "param_dtype": param_dtype, "rngs": rngs}
        self.q = nn.linear(width, query, ("embed", "heads"), bias=config.attention_bias, **options)
        self.k = nn.linear(width, kv, ("embed", "kv_heads"), bias=config.attention_bias, **options)
        self.v = nn.linear(width, kv, ("embed", "kv_heads"), bias=config.attention_bias, **options)
        self.o = nn.linear(query, width, ("heads", "embed"), bias=config.output_bias, **options)
        if config.qk_norm:
            norm = {"eps": config.rms_eps, "offset": config.norm_offset, "param_dtype": param_dtype}
            self.q_norm = nn.RMSNorm(config.head_dim, **norm)
            self.k_norm = nn.RMSNorm(config.head_dim, **norm)

    def qkv(
        self, x: Float[Array, "B S H"], context: Context, sliding: Bool[Array, ""]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns rotated queries [B, S, A, E] and keys [B, S, G, E], and values [B, S, G, E]."""
        query, key, value = (
            projection(x).reshape(*x.shape[:2], -1, self.config.head_dim) for projection in (self.q, self.k, self.v)
        )
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        rope = context.rope
        if self.config.sliding_rope_theta is not None:
            rope = jax.tree.map(lambda own, other: jnp.where(sliding, own, other), context.sliding_rope, rope)
        return rotate(query, rope), rotate(key, rope), value

    def mix(
        self,
        query: Float[Array, "B S A E"],
        key: Float[Array, "B K G E"],
        value: Float[Array, "B K G E"],
        context: Context,
        sliding: Bool[Array, ""],
    ) -> Float[Array, "B S H"]:
        """Attends and applies the output map."""
        mixed = attention(
            query,
            key,
            value,
            causal=context.query_images is None,
            kv_mask=context.key_mask,
            mask=context.visible(sliding, self.config.window_tokens if self.config.slides else None),
            query_offset=context.query_offset,
            scale=self.config.attention_scale,
        )
        return self.o(mixed.reshape(*mixed.shape[:2], -1))


class Block(nnx.Module):
    """One pre-norm block: x + attention(norm x), then x + feed-forward(norm x); each sum's addend normed if configured."""

    def __init__(self, config: DecoderConfig, *, param_dtype: Any, rngs: nnx.Rngs):
        self.config = config
        norm = {"eps": config.rms_eps, "offset": config.norm_offset, "param_dtype": param_dtype}
        self.attention_norm = nn.RMSNorm(config.hidden_size, **norm)
        self.attention = Attention(config, param_dtype=param_dtype, rngs=rngs)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, **norm)
        self.ffn = nn.SwiGLU(
            config.hidden_size,
            config.ffn_size,
            activation=ACTIVATIONS[config.activation],
            dtype=None,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        if config.post_norms:
            self.attention_post_norm = nn.RMSNorm(config.hidden_size, **norm)
            self.ffn_post_norm = nn.RMSNorm(config.hidden_size, **norm)

    def __call__(self, x: Float[Array, "B S H"], context: Context, sliding: Bool[Array, ""]) -> Float[Array, "B S H"]:
        """Runs the block over whole sequences; `sliding` tells whether this layer has a window."""
        query, key, value = self.attention.qkv(self.attention_norm(x), context, sliding)
        return self._finish(x, self.attention.mix(query, key, value, context, sliding))

    def cached(
        self,
        x: Float[Array, "B S H"],
        context: Context,
        sliding: Bool[Array, ""],
        cache: KVCache,
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "B S H"], KVCache]:
        """The same, writing this layer's keys and values to the queries' slots, and attending over the cache."""
        query, key, value = self.attention.qkv(self.attention_norm(x), context, sliding)
        start = (layer, 0, context.query_offset, 0, 0)
        keys = jax.lax.dynamic_update_slice(cache.key, key[None].astype(cache.key.dtype), start)
        values = jax.lax.dynamic_update_slice(cache.value, value[None].astype(cache.value.dtype), start)
        mixed = self.attention.mix(query, keys[layer], values[layer], context, sliding)
        return self._finish(x, mixed), KVCache(keys, values, cache.mask)

    def key_values(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch F"]:
        """Returns the keys, not rotated, and the values that this block makes of what enters it, F = 2 G E."""
        normed = self.attention_norm(x)
        key, value = self.attention.k(normed), self.attention.v(normed)
        if self.config.qk_norm:
            key = self.attention.k_norm(key.reshape(*x.shape[:-1], -1, self.config.head_dim)).reshape(key.shape)
        return jnp.concatenate([key, value], axis=-1)

    def _finish(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        if not self.config.post_norms:
            x = x + mixed
            return x + self.ffn(self.ffn_norm(x))
        x = x + self.attention_post_norm(mixed)
        return x + self.ffn_post_norm(self.ffn(self.ffn_norm(x)))


class Decoder(nnx.Module):
    """Embedding table, blocks, final norm and output head of a causal language model."""

    def __init__(self, config: DecoderConfig, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(
            config.vocab_size, config.hidden_size, scale=config.embedding_scale, param_dtype=param_dtype, rngs=rngs
        )
        self.layers = nn.Stack(
            lambda rngs: Block(config, param_dtype=param_dtype, rngs=rngs), config.num_layers, rngs=rngs
        )
        self.norm = nn.RMSNorm(
            config.hidden_size, eps=config.rms_eps, offset=config.norm_offset, param_dtype=param_dtype
        )
        if not config.tie_embeddings:
            self.head = nn.linear(
                config.hidden_size,
                config.vocab_size,
                ("embed", None),
                dtype=None,
                param_dtype=param_dtype,
                kernel_init=nnx.initializers.normal(0.02),
                rngs=rngs,
            )

    def states(
        self,
        embeddings: Float[Array, "B S H"],
        mask: Bool[Array, "B S"],
        layers: Sequence[int],
        *,
        positions: Positions | None = None,
        images: Int[Array, "B S"] | None = None,
        keep_index: Int[Array, "B C"] | None = None,
        remat: nn.Remat | None = None,
    ) -> Float[Array, "B C N H"]:
        """Exports the states of `layers`, in that order.

        Args:
          embeddings: what enters the first block.
          mask: existing tokens; padding may stand on either side.
          layers: 0 .. num_layers, distinct.
          positions: of the rotation; existing tokens counted from 0 when None.
          images: tokens of one positive number see each other in both directions; the others have 0. Causal when None.
          keep_index: positions of the tokens to export, gathered layer by layer; all tokens when None (then C = S).
          remat: wraps the scanned block, e.g. `jax.checkpoint`.
        """
        layers = self.config.check_layers(layers)
        order = token_positions(mask)
        ropes = self._ropes(order if positions is None else positions)
        context = Context(*ropes, order, order, mask, query_images=images, key_images=images)
        embeddings = constrain(embeddings, "batch", "length", None)
        slots, buffer = export_slots(embeddings, layers, keep_index)
        buffer = constrain(buffer, None, "batch", "length", None)

        def apply(block: Block, carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            (x, buffer), (slot, sliding) = carry, inputs
            x = constrain(block(x, context, sliding), "batch", "length", None)
            return (x, buffer.at[slot].set(gather_kept(x, keep_index))), None

        depth = max(layers)
        if depth:
            inputs = (slots[:depth], self.config.sliding[:depth])
            (_, buffer), _ = self.layers.scan(apply, (embeddings, buffer), inputs, length=depth, remat=remat)
        return jnp.moveaxis(buffer[:-1], 0, 2)

    def cached_states(
        self,
        embeddings: Float[Array, "B S H"],
        positions: Positions,
        cache: KVCache,
        slot: Int[Array, ""] | int,
        layers: Sequence[int],
        *,
        images: Int[Array, "B S"] | None = None,
        keep_index: Int[Array, "B C"] | None = None,
        blocks: Sequence[Block] | None = None,
    ) -> tuple[Float[Array, "B S H"], Float[Array, "B C N H"], KVCache]:
        """Runs all blocks on tokens that occupy cache slots from `slot` on; their slots must be set in `cache.mask`.

        Serves the prefill (all prompt tokens, slot 0; only there `images` may be given, see `states`) and each decoding
        step (one token).

        `blocks`, where given, are those of `layers.cut`, and run one after the other instead of by a scan.

        Returns:
          The residual stream after the last block, the states of `layers`, and the cache with the new keys and values.
        """
        layers = self.config.check_layers(layers)
        slots, buffer = export_slots(embeddings, layers, keep_index, depth=self.config.num_layers)
        start = jnp.asarray(slot, jnp.int32)
        tokens, room = embeddings.shape[1], cache.mask.shape[1]
        key_order = token_positions(cache.mask)
        context = Context(
            *self._ropes(positions),
            query_order=jax.lax.dynamic_slice_in_dim(key_order, start, tokens, axis=1),
            key_order=key_order,
            key_mask=cache.mask,
            query_offset=start,
            query_images=images,
            key_images=None if images is None else jnp.pad(images, ((0, 0), (0, room - tokens))),
        )

        def apply(block: Block, carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            (x, buffer, cache), (layer, slot, sliding) = carry, inputs
            x, cache = block.cached(x, context, sliding, cache, layer)
            return (x, buffer.at[slot].set(gather_kept(x, keep_index)), cache), None

        inputs = (np.arange(self.config.num_layers, dtype=np.int32), slots, self.config.sliding)
        carry = (embeddings, buffer, cache)
        if blocks is None:
            carry, _ = self.layers.scan(apply, carry, inputs)
        else:
            for number, block in enumerate(blocks):
                carry, _ = apply(block, carry, tuple(jnp.asarray(each[number]) for each in inputs))
        x, buffer, cache = carry
        return x, jnp.moveaxis(buffer[:-1], 0, 2), cache

    def final_norm(self, states: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
        """Returns states as the output head reads them."""
        return self.norm(states)

    def key_values(self, states: Float[Array, "B C N H"], layers: Sequence[int]) -> Float[Array, "B C N F"]:
        """Returns keys and values of `layers` from the states of the layers before them; see `Block.key_values`."""
        return layer_key_values(self.layers, states, layers)

    def empty_cache(self, mask: Bool[Array, "B K"], dtype: Any) -> KVCache:
        """Returns a cache of zeros with room for the K slots of `mask`."""
        config = self.config
        shape = (config.num_layers, *mask.shape, config.num_kv_heads, config.head_dim)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), mask)

    def logits(self, hidden: Float[Array, "*batch H"]) -> Float[Array, "*batch V"]:
        """Returns next-token scores of states of the last layer (final norm included), in float32."""
        normed = self.norm(hidden)
        scores = self.embed.scores(normed) if self.config.tie_embeddings else self.head(normed)
        return scores.astype(jnp.float32)

    def _ropes(self, positions: Positions) -> tuple[Rope, Rope]:
        """Returns cosines and sines [B, S, 1, E / 2] of the layers without and with a window."""
        if positions.ndim == 3:
            turns = jnp.moveaxis(positions[self.config.rope_axis], 0, -1)[:, :, None, :].astype(jnp.float32)
        else:
            turns = positions[:, :, None, None].astype(jnp.float32)
        plain, sliding = (turns * self.config.rope_frequencies(sliding=kind) for kind in (False, True))
        return (jnp.cos(plain), jnp.sin(plain)), (jnp.cos(sliding), jnp.sin(sliding))


def layer_key_values(
    blocks: nn.Stack, states: Float[Array, "B C N H"], layers: Sequence[int]
) -> Float[Array, "B C N F"]:
    """Applies `key_values` of the blocks that make `layers` to what enters each of them."""
    numbers = [layer - 1 for layer in layers]
    found = blocks.chosen(numbers, lambda block, x: block.key_values(x), jnp.moveaxis(states, 2, 0))
    return jnp.moveaxis(found, 0, 2)


def gather_kept(x: Float[Array, "B S H"], keep_index: Int[Array, "B C"] | None) -> Float[Array, "B C H"]:
    """Takes the tokens at `keep_index` out of `x`; all of them when None."""
    return x if keep_index is None else jnp.take_along_axis(x, keep_index[:, :, None], axis=1)


def export_slots(
    embeddings: Float[Array, "B S H"],
    layers: tuple[int, ...],
    keep_index: Int[Array, "B C"] | None,
    *,
    depth: int | None = None,
) -> tuple[Int[np.ndarray, "depth"], Float[Array, "rows B C H"]]:
    """Returns each block's row in the export buffer, and the buffer: a row a layer, the last for layers not wanted."""
    slots = np.full(max(max(layers), depth or 0), len(layers), np.int32)
    for row, layer in enumerate(layers):
        if layer:
            slots[layer - 1] = row
    kept = gather_kept(embeddings, keep_index)
    buffer = jnp.zeros((len(layers) + 1, *kept.shape), kept.dtype)
    return slots, buffer.at[layers.index(0)].set(kept) if 0 in layers else buffer
