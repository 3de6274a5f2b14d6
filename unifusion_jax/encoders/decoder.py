"""The causal decoder of every language model family, as one scanned block that exports the states of chosen layers.

Layer k is the residual stream after block k, counted from 1; layer 0 is what enters the first block; the last layer is
taken before the final norm. Only the first `max(layers)` blocks run, and only the exported layers of the kept tokens
are held.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from unifusion_jax import layers as nn
from unifusion_jax.encoders.batch import AnyArray, pytree
from unifusion_jax.parallel.attention import attention

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.

    Source: `apply_scaling` of meta-llama/llama-models.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder.

    Attributes:
      vocab_size: rows of the embedding table.
      hidden_size: width H.
      num_layers: blocks.
      num_heads: query heads A.
      num_kv_heads: key-value heads G, a divisor of A.
      head_dim: E, even; A * E need not equal H.
      ffn_size: inner width of the gated feed-forward layer.
      max_positions: longest sequence in tokens.
      rms_eps: of all norms.
      norm_offset: 0, or 1 for norms that multiply by 1 + scale.
      rope_theta: base of the rotary frequencies.
      rope_scaling: changes those frequencies.
      attention_bias: biases on the q, k and v maps (never on the output map).
      qk_norm: RMS norm of each query and key head before the rotation.
      activation: of the gate.
      tie_embeddings: logits use the embedding table.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_positions: int = 32768
    rms_eps: float = 1e-6
    norm_offset: float = 0.0
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = True
    qk_norm: bool = False
    activation: str = "silu"
    tie_embeddings: bool = False

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "ffn_size",
            "max_positions",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"DecoderConfig.{name} must be positive, got {getattr(self, name)}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "DecoderConfig.num_heads must be a multiple of num_kv_heads, got "
                f"{self.num_heads} and {self.num_kv_heads}."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"DecoderConfig.head_dim must be even for rotary positions, got {self.head_dim}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"Unknown activation {self.activation!r}, expected one of {sorted(ACTIVATIONS)}.")

    @property
    def rope_frequencies(self) -> Float[np.ndarray, "half"]:
        """Radians per position of each rotary pair, float32, shape (head_dim / 2,)."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        frequencies = 1.0 / np.float32(self.rope_theta) ** exponents
        if self.rope_scaling is None:
            return frequencies
        scaling = self.rope_scaling
        turns = scaling.original_max_positions * frequencies / (2 * np.pi)
        ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(ramp, 0.0, 1.0)
        return ((1 - kept) * frequencies / scaling.factor + kept * frequencies).astype(np.float32)

    def check_layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Returns `layers` as a tuple; raises ValueError unless they are distinct and within 0 .. num_layers."""
        layers = tuple(int(layer) for layer in layers)
        wrong = [layer for layer in layers if not 0 <= layer <= self.num_layers]
        if wrong or not layers or len(set(layers)) != len(layers):
            raise ValueError(
                f"Layers must be distinct numbers from 0 (the embeddings) to {self.num_layers} (the last block), at "
                f"least one, got {layers}."
            )
        return layers


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


class Embedding(nnx.Module):
    """The token table; computes in the type of its parameter, whatever that is (nnx.Embed would fix it when built)."""

    def __init__(self, rows: int, width: int, *, param_dtype: Any, rngs: nnx.Rngs):
        # The row count of published tables (151,674) is not divisible by usual mesh sizes: the width is sharded.
        init = nnx.initializers.normal(0.02)
        self.embedding = nnx.Param(init(rngs.params(), (rows, width), param_dtype), axes=(None, "embed"))

    def __call__(self, token_ids: Int[Array, "*batch"]) -> Float[Array, "*batch H"]:
        """Looks tokens up."""
        return jnp.take(self.embedding[...], token_ids, axis=0)

    def scores(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch V"]:
        """Scores every token by its embedding (tied output head)."""
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
        self.o = nn.linear(query, width, ("heads", "embed"), **options)
        if config.qk_norm:
            norm = {"eps": config.rms_eps, "offset": config.norm_offset, "param_dtype": param_dtype}
            self.q_norm = nn.RMSNorm(config.head_dim, **norm)
            self.k_norm = nn.RMSNorm(config.head_dim, **norm)

    def qkv(self, x: Float[Array, "B S H"], rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns rotated queries [B, S, A, E] and keys [B, S, G, E], and values [B, S, G, E]."""
        query, key, value = (
            projection(x).reshape(*x.shape[:2], -1, self.config.head_dim) for projection in (self.q, self.k, self.v)
        )
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return rotate(query, rope), rotate(key, rope), value


class Block(nnx.Module):
    """One pre-norm block: x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, config: DecoderConfig, *, param_dtype: Any, rngs: nnx.Rngs):
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

    def __call__(self, x: Float[Array, "B S H"], rope: Rope, kv_mask: Bool[Array, "B S"]) -> Float[Array, "B S H"]:
        """Runs the block over whole sequences."""
        query, key, value = self.attention.qkv(self.attention_norm(x), rope)
        return self._finish(x, attention(query, key, value, causal=True, kv_mask=kv_mask))

    def cached(
        self, x: Float[Array, "B S H"], rope: Rope, cache: KVCache, layer: Int[Array, ""], slot: Int[Array, ""]
    ) -> tuple[Float[Array, "B S H"], KVCache]:
        """The same, writing this layer's keys and values to `slot` and the following, and attending over the cache."""
        query, key, value = self.attention.qkv(self.attention_norm(x), rope)
        start = (layer, 0, slot, 0, 0)
        keys = jax.lax.dynamic_update_slice(cache.key, key[None].astype(cache.key.dtype), start)
        values = jax.lax.dynamic_update_slice(cache.value, value[None].astype(cache.value.dtype), start)
        mixed = attention(query, keys[layer], values[layer], causal=True, kv_mask=cache.mask, query_offset=slot)
        return self._finish(x, mixed), KVCache(keys, values, cache.mask)

    def _finish(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        x = x + self.attention.o(mixed.reshape(*mixed.shape[:2], -1))
        return x + self.ffn(self.ffn_norm(x))


class Decoder(nnx.Module):
    """Embedding table, blocks, final norm and output head of a causal language model."""

    def __init__(self, config: DecoderConfig, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, param_dtype=param_dtype, rngs=rngs)
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
        keep_index: Int[Array, "B C"] | None = None,
        remat: nn.Remat | None = None,
    ) -> Float[Array, "B C N H"]:
        """Exports the states of `layers`, in that order.

        Args:
          embeddings: what enters the first block.
          mask: existing tokens; padding may stand on either side.
          layers: 0 .. num_layers, distinct.
          keep_index: positions of the tokens to export, gathered layer by layer; all tokens when None (then C = S).
          remat: wraps the scanned block, e.g. `jax.checkpoint`.
        """
        layers = self.config.check_layers(layers)
        rope = self._rope(token_positions(mask))
        slots, buffer = _export_slots(embeddings, layers, keep_index)

        def apply(block: Block, carry: tuple, slot: jax.Array) -> tuple[tuple, None]:
            x, buffer = carry
            x = block(x, rope, mask)
            return (x, buffer.at[slot].set(_gather(x, keep_index))), None

        depth = max(layers)
        if depth:
            (_, buffer), _ = self.layers.scan(apply, (embeddings, buffer), slots[:depth], length=depth, remat=remat)
        return jnp.moveaxis(buffer[:-1], 0, 2)

    def hidden(
        self, embeddings: Float[Array, "B S H"], mask: Bool[Array, "B S"], *, remat: nn.Remat | None = None
    ) -> Float[Array, "B S H"]:
        """Returns the residual stream after the last block, before the final norm."""
        return self.states(embeddings, mask, (self.config.num_layers,), remat=remat)[:, :, 0]

    def cached_states(
        self,
        embeddings: Float[Array, "B S H"],
        positions: Int[Array, "B S"],
        cache: KVCache,
        slot: Int[Array, ""] | int,
        layers: Sequence[int],
        *,
        keep_index: Int[Array, "B C"] | None = None,
    ) -> tuple[Float[Array, "B S H"], Float[Array, "B C N H"], KVCache]:
        """Runs all blocks on tokens that occupy cache slots from `slot` on; their slots must be set in `cache.mask`.

        Serves the prefill (all prompt tokens, slot 0) and each decoding step (one token).

        Returns:
          The residual stream after the last block, the states of `layers`, and the cache with the new keys and values.
        """
        layers = self.config.check_layers(layers)
        rope = self._rope(positions)
        slots, buffer = _export_slots(embeddings, layers, keep_index, depth=self.config.num_layers)
        start = jnp.asarray(slot, jnp.int32)

        def apply(block: Block, carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            (x, buffer, cache), (layer, slot) = carry, inputs
            x, cache = block.cached(x, rope, cache, layer, start)
            return (x, buffer.at[slot].set(_gather(x, keep_index)), cache), None

        numbers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        (x, buffer, cache), _ = self.layers.scan(apply, (embeddings, buffer, cache), (numbers, slots))
        return x, jnp.moveaxis(buffer[:-1], 0, 2), cache

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

    def _rope(self, positions: Int[Array, "B S"]) -> Rope:
        angles = positions[:, :, None, None].astype(jnp.float32) * self.config.rope_frequencies
        return jnp.cos(angles), jnp.sin(angles)


def _gather(x: Float[Array, "B S H"], keep_index: Int[Array, "B C"] | None) -> Float[Array, "B C H"]:
    return x if keep_index is None else jnp.take_along_axis(x, keep_index[:, :, None], axis=1)


def _export_slots(
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
    kept = _gather(embeddings, keep_index)
    buffer = jnp.zeros((len(layers) + 1, *kept.shape), kept.dtype)
    return slots, buffer.at[layers.index(0)].set(kept) if 0 in layers else buffer
