"""The transformer block that LAP, the refiner and the DiT share: pre-norm attention with QK-norm, then SwiGLU."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from unifusion_jax.dit.rope import apply_rope
from unifusion_jax.layers import RMSNorm, SwiGLU, linear
from unifusion_jax.parallel import target
from unifusion_jax.parallel.attention import attention

RopeTable = tuple[Float[Array, "T F"], Float[Array, "T F"]]
# Keys and values from elsewhere that a block attends to besides those of its own tokens.
KeyValues = tuple[Float[Array, "B K A E"], Float[Array, "B K A E"]]


class SelfAttention(nnx.Module):
    """Bidirectional multi-head self-attention with RMS-normalised queries and keys (QK-norm) and optional rotation."""

    def __init__(self, features: int, num_heads: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.head_dim = features // num_heads
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query = linear(features, features, ("embed", "heads"), **options)
        self.key = linear(features, features, ("embed", "heads"), **options)
        self.value = linear(features, features, ("embed", "heads"), **options)
        self.out = linear(features, features, ("heads", "embed"), **options)
        self.query_norm = RMSNorm(self.head_dim, param_dtype=param_dtype)
        self.key_norm = RMSNorm(self.head_dim, param_dtype=param_dtype)

    def project(
        self, x: Float[Array, "B T D"], rope: RopeTable | None
    ) -> tuple[Float[Array, "B T A E"], Float[Array, "B T A E"], Float[Array, "B T A E"]]:
        """Returns normalised, rotated queries and keys, and values."""
        query, key, value = self._heads(x)
        query, key = self.query_norm(query), self.key_norm(key)
        if rope is not None:
            query, key = apply_rope(query, rope), apply_rope(key, rope)
        return query, key, value

    def _heads(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T A E"], Float[Array, "B T A E"], Float[Array, "B T A E"]]:
        sizes = (*x.shape[:2], self.num_heads, self.head_dim)
        return self.query(x).reshape(sizes), self.key(x).reshape(sizes), self.value(x).reshape(sizes)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "B M"] | None,
        rope: RopeTable | None,
        fused: KeyValues | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the attended tokens; `mask` marks the keys that exist, those of `fused` (normalised, rotated) first."""
        alone = mask is None and rope is None and fused is None
        if alone and target.current().has_row_kernel(x.shape[1], self.head_dim):
            from unifusion_jax.parallel import row_attention  # Pallas takes a second to import

            query, key, value = self._heads(x)
            scales = (self.query_norm.scale[...], self.key_norm.scale[...])
            return self.out(row_attention.attend(query, key, value, *scales, eps=self.query_norm.eps).reshape(x.shape))
        query, key, value = self.project(x, rope)
        if fused is not None:
            key, value = (
                jnp.concatenate([other.astype(own.dtype), own], axis=1)
                for other, own in zip(fused, (key, value), strict=True)
            )
        return self.out(attention(query, key, value, kv_mask=mask).reshape(x.shape))


class Block(nnx.Module):
    """Pre-norm transformer block: x + attn(norm x), then x + ffn(norm x).

    `modulation`, six vectors (shift, scale, gate for attention, then for the feed-forward), turns it into the adaLN block of
    DiT (Peebles & Xie 2023, section 3.2); without it the block is the plain one of LAP and the refiner.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        ffn_size: int,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = RMSNorm(features, param_dtype=param_dtype)
        self.attention = SelfAttention(features, num_heads, **options)
        self.ffn_norm = RMSNorm(features, param_dtype=param_dtype)
        self.ffn = SwiGLU(features, ffn_size, **options)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Bool[Array, "B M"] | None = None,
        rope: RopeTable | None = None,
        modulation: Float[Array, "B 6 D"] | None = None,
        fused: KeyValues | None = None,
    ) -> Float[Array, "B T D"]:
        """Applies the block; `mask` marks the keys that exist: those of `fused`, then the tokens."""
        if modulation is None:
            x = x + self.attention(self.attention_norm(x), mask, rope, fused)
            return x + self.ffn(self.ffn_norm(x))
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (modulation[:, i, None] for i in range(6))
        x = x + gate_a * self.attention(modulate(self.attention_norm(x), shift_a, scale_a), mask, rope, fused)
        return x + gate_f * self.ffn(modulate(self.ffn_norm(x), shift_f, scale_f))


def modulate(
    x: Float[Array, "B T D"], shift: Float[Array, "B 1 D"], scale: Float[Array, "B 1 D"]
) -> Float[Array, "B T D"]:
    """The adaLN transform x * (1 + scale) + shift."""
    return x * (1 + scale) + shift
