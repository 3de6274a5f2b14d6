"""The one attention function: every network calls it, and kernels are chosen here.

Letters: B batch, S queries, K keys, A query heads, G key-value heads, E head dimension.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Up to this many tokens a row, of which there are then many, attention is done without matrix products. None leaves it to the
# platform: 32 on accelerators; 0 on a CPU, which has no matrix units to idle (a step of the demo takes 0.40 s with it, 0.365 s
# without).
FEW_TOKENS: int | None = None


def attention(
    query: Float[Array, "B S A E"],
    key: Float[Array, "B K G E"],
    value: Float[Array, "B K G E"],
    *,
    causal: bool = False,
    kv_mask: Bool[Array, "B K"] | None = None,
    mask: Bool[Array, "B S K"] | None = None,
    bias: Float[Array, "#B A S K"] | None = None,
    query_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
) -> Float[Array, "B S A E"]:
    """Scaled dot-product attention with grouped key-value heads; the softmax runs in float32.

    `causal` lets query i see keys up to i + `query_offset` (the offset is the cache position when decoding); `kv_mask` marks
    the keys that exist; `mask` is any further restriction. All given restrictions must hold. `scale` defaults to E**-0.5;
    `bias` is added to the scaled products.
    A query that may see nothing returns the mean of the values, never NaN. Raises ValueError when A is not a multiple of G.
    """
    heads, kv_heads = query.shape[2], key.shape[2]
    if heads % kv_heads:
        raise ValueError(f"Query heads must be a multiple of key-value heads, got {heads} and {kv_heads}.")
    visible = _visible(query.shape[1], key.shape[1], causal, kv_mask, mask, query_offset)
    if visible is None and bias is None and key.shape == query.shape and key.shape[1] <= few_tokens():
        return few_token_attention(query, key, value, scale=scale)
    return jax.nn.dot_product_attention(query, key, value, bias=bias, mask=visible, scale=scale, implementation="xla")


def few_tokens() -> int:
    """Returns the longest row that `few_token_attention` is used for."""
    if FEW_TOKENS is not None:
        return FEW_TOKENS
    return 0 if jax.default_backend() == "cpu" else 32


def few_token_attention(
    query: Float[Array, "B N A E"],
    key: Float[Array, "B N A E"],
    value: Float[Array, "B N A E"],
    *,
    scale: float | None = None,
) -> Float[Array, "B N A E"]:
    """Attention of many rows of a few tokens, each seeing its whole row, such as LAP's over the layers of every token.

    Products of N x E matrices with N about 10 leave matrix units idle, and heads have to be moved in front of tokens for
    them. Here scores are sums over E of elementwise products, which a compiler fuses, reading queries and keys where they
    lie; the backward pass makes the scores again rather than keep them. What is written besides the result are scores of
    N * N * A numbers a row, N / E of a query's size each.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale

    def mix(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        wide = [part.astype(jnp.float32) for part in (query, key, value)]
        scores = jnp.sum(wide[0][:, :, None] * wide[1][:, None], axis=-1) * factor
        weights = jax.nn.softmax(scores, axis=2)
        return jnp.sum(weights[..., None] * wide[2][:, None], axis=2).astype(query.dtype)

    return jax.checkpoint(mix, prevent_cse=False)(query, key, value)


def _visible(
    num_queries: int,
    num_keys: int,
    causal: bool,
    kv_mask: Bool[Array, "B K"] | None,
    mask: Bool[Array, "B S K"] | None,
    query_offset: int | Int[Array, ""],
) -> Bool[Array, "#B 1 #S K"] | None:
    """Combines the restrictions into one mask that broadcasts over heads, or None when there is none."""
    parts = []
    if causal:
        parts.append((jnp.arange(num_keys) <= jnp.arange(num_queries)[:, None] + query_offset)[None, None])
    if kv_mask is not None:
        parts.append(kv_mask[:, None, None, :])
    if mask is not None:
        parts.append(mask[:, None])
    combined = None
    for part in parts:
        combined = part if combined is None else combined & part
    return combined
