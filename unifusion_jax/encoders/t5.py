"""T5 version 1.1 (Flan-T5 too): a bidirectional text encoder with relative positions.

Layer k is the residual stream after block k, counted from 1; layer 0 is the embeddings; the last layer is taken before
the final norm, as everywhere else. Source of the layout: google-research/t5x `t5_1_1/xxl.gin` and arXiv 1910.10683.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from unifusion_jax import layers as nn
from unifusion_jax.encoders.batch import EncoderBatch
from unifusion_jax.encoders.decoder import Embedding, export_slots, gather_kept, layer_key_values
from unifusion_jax.encoders.decoder_config import ACTIVATIONS, check_layers
from unifusion_jax.parallel.attention import attention

# The names that `feed_forward_proj` gives to gated activations.
_GATES = {"gated-gelu": "gelu_pytorch_tanh", "gated-silu": "silu"}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 encoder.

    Attributes:
      vocab_size: rows of the embedding table.
      hidden_size: width H.
      num_layers: blocks.
      num_heads: attention heads A.
      head_dim: E; A * E need not equal H.
      ffn_size: inner width of the gated feed-forward layer.
      buckets: learned position biases a head, half of them for keys behind the query.
      max_distance_tokens: distances from here on share one bucket.
      rms_eps: of all norms.
      activation: of the gate.
      max_positions: longest sequence in tokens. The network itself has no bound; this one keeps its S * S biases small.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    ffn_size: int
    buckets: int = 32
    max_distance_tokens: int = 128
    rms_eps: float = 1e-6
    activation: str = "gelu_pytorch_tanh"
    max_positions: int = 2048

    decodes = False

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "head_dim", "ffn_size", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"T5Config.{name} must be positive, got {getattr(self, name)}.")
        if self.buckets < 4 or self.buckets % 4:
            raise ValueError(f"T5Config.buckets must be a positive multiple of 4, got {self.buckets}.")
        if self.max_distance_tokens <= self.buckets // 4:
            raise ValueError(
                "T5Config.max_distance_tokens must exceed the distances with a bucket of their own, "
                f"{self.buckets // 4}, got {self.max_distance_tokens}."
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"Unknown activation {self.activation!r}, expected one of {sorted(ACTIVATIONS)}.")

    @classmethod
    def flan_t5_xxl(cls) -> "T5Config":
        """Encoder of Flan-T5-XXL and T5 1.1 XXL: 4.76 billion parameters."""
        return cls(32128, 4096, 24, 64, 64, 10240)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, has_head: bool = True) -> "T5Config":
        """Reads a `config.json`, of the whole model or of the encoder alone; an output head takes no part.

        Raises:
          ValueError: naming key and value, for what is not supported (the first T5 has no gated feed-forward layer).
        """
        gate = config.get("feed_forward_proj", "relu")
        if gate not in _GATES:
            raise ValueError(
                f"feed_forward_proj={gate!r} is not supported, expected one of {sorted(_GATES)}: only T5 version 1.1 "
                "and models made from it (Flan-T5) are."
            )
        return cls(
            vocab_size=config.get("vocab_size", 32128),
            hidden_size=config.get("d_model", 512),
            num_layers=config.get("num_layers", 6),
            num_heads=config.get("num_heads", 8),
            head_dim=config.get("d_kv", 64),
            ffn_size=config.get("d_ff", 2048),
            buckets=config.get("relative_attention_num_buckets", 32),
            max_distance_tokens=config.get("relative_attention_max_distance", 128),
            rms_eps=config.get("layer_norm_epsilon", 1e-6),
            activation=_GATES[gate],
        )

    @property
    def key_value_shape(self) -> tuple[int, int]:
        """Key-value heads G and their width E."""
        return self.num_heads, self.head_dim

    def build(self, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs) -> "T5":
        """Makes the network with random parameters."""
        return T5(self, param_dtype=param_dtype, rngs=rngs)


def relative_buckets(distances: Int[np.ndarray, "*shape"], config: T5Config) -> Int[np.ndarray, "*shape"]:
    """Returns the bucket of each distance (key position minus query position).

    Keys behind the query (distance > 0) use the upper half. Within a half, distances below a quarter of all buckets have
    their own, larger ones share logarithmically growing ranges. Float32 like the reference, whose rounding decides at the
    edges of ranges.
    """
    half = config.buckets // 2
    exact = half // 2
    size = np.abs(distances)
    ratio = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(np.log(config.max_distance_tokens / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int64), half - 1)
    return np.where(size < exact, size, far) + np.where(distances > 0, half, 0)


class Block(nnx.Module):
    """One pre-norm block: x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, config: T5Config, *, param_dtype: Any, rngs: nnx.Rngs):
        self.config = config
        width, inner = config.hidden_size, config.num_heads * config.head_dim
        options = {"dtype": None, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = nn.RMSNorm(width, eps=config.rms_eps, param_dtype=param_dtype)
        self.q = nn.linear(width, inner, ("embed", "heads"), **options)
        self.k = nn.linear(width, inner, ("embed", "heads"), **options)
        self.v = nn.linear(width, inner, ("embed", "heads"), **options)
        self.o = nn.linear(inner, width, ("heads", "embed"), **options)
        self.ffn_norm = nn.RMSNorm(width, eps=config.rms_eps, param_dtype=param_dtype)
        self.ffn = nn.SwiGLU(width, config.ffn_size, activation=ACTIVATIONS[config.activation], **options)

    def __call__(
        self, x: Float[Array, "B S H"], kv_mask: Bool[Array, "B S"], bias: Float[Array, "1 A S S"]
    ) -> Float[Array, "B S H"]:
        """Runs the block; every token sees every existing one."""
        normed = self.attention_norm(x)
        query, key, value = (
            projection(normed).reshape(*x.shape[:2], -1, self.config.head_dim)
            for projection in (self.q, self.k, self.v)
        )
        # The products are not scaled: T5 folds the factor into its initialisation.
        mixed = attention(query, key, value, kv_mask=kv_mask, bias=bias, scale=1.0)
        x = x + self.o(mixed.reshape(*x.shape[:2], -1))
        return x + self.ffn(self.ffn_norm(x))

    def key_values(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch F"]:
        """Returns the keys and the values that this block makes of what enters it, F = 2 A E."""
        normed = self.attention_norm(x)
        return jnp.concatenate([self.k(normed), self.v(normed)], axis=-1)


class T5(nnx.Module):
    """Embedding table, blocks that share one table of position biases, and the final norm."""

    def __init__(self, config: T5Config, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, scale=1.0, param_dtype=param_dtype, rngs=rngs
        )
        self.position_bias = nn.normal(
            (config.buckets, config.num_heads), (None, None), param_dtype=param_dtype, rngs=rngs
        )
        self.layers = nn.Stack(
            lambda rngs: Block(config, param_dtype=param_dtype, rngs=rngs), config.num_layers, rngs=rngs
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_eps, param_dtype=param_dtype)

    def bias(self, length: int) -> Float[Array, "1 A S S"]:
        """Returns what is added to the attention products of `length` queries and keys."""
        distances = np.arange(1 - length, length)
        values = jnp.take(self.position_bias[...], relative_buckets(distances, self.config), axis=0)
        places = jnp.arange(length)
        return jnp.take(values.T, places - places[:, None] + length - 1, axis=1)[None]

    def states(
        self,
        batch: EncoderBatch,
        layers: Sequence[int],
        *,
        keep_index: Int[Array, "B C"] | None = None,
        remat: nn.Remat | None = None,
    ) -> Float[Array, "B C N H"]:
        """Exports the states of `layers`, in that order; see `decoder.Decoder.states` for the arguments."""
        layers = check_layers(layers, self.config.num_layers)
        embeddings, mask = self.embed_tokens(jnp.asarray(batch.token_ids)), jnp.asarray(batch.mask)
        bias = self.bias(mask.shape[1])
        slots, buffer = export_slots(embeddings, layers, keep_index)

        def apply(block: Block, carry: tuple, slot: jax.Array) -> tuple[tuple, None]:
            x, buffer = carry
            x = block(x, mask, bias)
            return (x, buffer.at[slot].set(gather_kept(x, keep_index))), None

        depth = max(layers)
        if depth:
            (_, buffer), _ = self.layers.scan(apply, (embeddings, buffer), slots[:depth], length=depth, remat=remat)
        return jnp.moveaxis(buffer[:-1], 0, 2)

    def final_norm(self, states: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
        """Returns states after the final norm."""
        return self.norm(states)

    def key_values(self, states: Float[Array, "B C N H"], layers: Sequence[int]) -> Float[Array, "B C N F"]:
        """Returns keys and values of `layers` from the states of the layers before them, F = 2 A E."""
        return layer_key_values(self.layers, states, layers)
