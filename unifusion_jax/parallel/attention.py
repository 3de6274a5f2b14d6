"""The one attention function: every network calls it, and kernels are chosen here.

Whole sequences go to the kernel of the platform that is compiled for (`unifusion_jax.parallel.target`): splash attention on
TPU, cuDNN's flash attention on NVIDIA GPUs, XLA's own operations on CPU. What the kernels do not serve (a bias, an arbitrary
mask, decoding into a cache, a few tokens) is done with XLA's operations everywhere.

On a mesh a kernel works on each device's samples, heads and, where there is a "sequence" axis, queries; keys and values are
gathered along that axis, and their gradients are summed over it.

Letters: B batch, S queries, K keys, A query heads, G key-value heads, E head dimension.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from unifusion_jax.parallel import target
from unifusion_jax.parallel.sharding import activation_spec

# cuDNN's flash attention takes these heads, in 16-bit types.
_CUDNN_LARGEST_HEAD, _CUDNN_HEAD_MULTIPLE = 128, 8
# Shorter sequences fill no block of a kernel.
_LEAST_KERNEL_TOKENS = 128
# Where no kernel keeps the scores of all queries from being written out, they are worked on in blocks. On CPU these stay in the
# cache, from sequences of two blocks on. (Shorter ones are trained on: a gradient through blocks takes a tenth longer.)
_BLOCK_TOKENS = 256
# Accelerators want large products: they get the most queries whose scores are this many for a head (16 MiB in float32).
_BLOCK_SCORES = 2**22


def attention(
    query: Float[Array, "B S A E"],
    key: Float[Array, "B K G E"],
    value: Float[Array, "B K G E"],
    *,
    causal: bool = False,
    window_tokens: int | None = None,
    kv_mask: Bool[Array, "B K"] | None = None,
    mask: Bool[Array, "B S K"] | None = None,
    bias: Float[Array, "#B A S K"] | None = None,
    query_offset: int | Int[Array, ""] = 0,
    scale: float | None = None,
) -> Float[Array, "B S A E"]:
    """Scaled dot-product attention with grouped key-value heads; the softmax runs in float32.

    `causal` lets query i see keys up to i + `query_offset` (the offset is the cache position when decoding); `window_tokens`
    lets it see only keys less than so many places away; `kv_mask` marks the keys that exist; `mask` is any further
    restriction. All given restrictions must hold. `scale` defaults to E**-0.5; `bias` is added to the scaled products.
    A query that may see nothing returns an average of values, never NaN; its gradient means nothing. Raises ValueError when A
    is not a multiple of G.
    """
    heads, kv_heads = query.shape[2], key.shape[2]
    if heads % kv_heads:
        raise ValueError(f"Query heads must be a multiple of key-value heads, got {heads} and {kv_heads}.")
    aim = target.current()
    restricted = causal or window_tokens is not None or kv_mask is not None or mask is not None
    if not restricted and bias is None and key.shape == query.shape and key.shape[1] <= aim.few_tokens_limit:
        return few_token_attention(query, key, value, scale=scale)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    whole = mask is None and bias is None and isinstance(query_offset, int) and query_offset == 0
    kernel = aim.chosen_kernel if whole and min(query.shape[1], key.shape[1]) >= _LEAST_KERNEL_TOKENS else "xla"
    if kernel == "splash":
        from unifusion_jax.parallel import splash  # Pallas takes a second to import

        shards = None if aim.mesh is None or aim.mesh.size == 1 else (aim.mesh, _spec(query, aim.mesh))
        if shards is not None:
            key, value = (_with_heads_for(part, heads, *shards) for part in (key, value))
        return splash.attend(
            query,
            key,
            value,
            kv_mask=kv_mask,
            causal=causal,
            window_tokens=window_tokens,
            scale=factor,
            interpret=aim.device.platform != "tpu",
            shards=shards,
        )
    if kernel == "cudnn" and _cudnn_takes(query, key, ordered=causal or window_tokens is not None):
        return _on_shards(query, key, value, kv_mask, causal, window_tokens, factor, aim.mesh)

    def attend(query: jax.Array, mask: jax.Array | None, bias: jax.Array | None, offset: int | jax.Array) -> jax.Array:
        visible = _visible(query.shape[1], key.shape[1], causal, window_tokens, kv_mask, mask, offset)
        return jax.nn.dot_product_attention(
            query, key, value, bias=bias, mask=visible, scale=scale, implementation="xla"
        )

    most = _most_block_tokens(aim.device.platform, query.shape[1], key.shape[1])
    if query.shape[1] > most:
        return _in_blocks(attend, query, mask, bias, query_offset, most)
    return attend(query, mask, bias, query_offset)


def _most_block_tokens(platform: str, num_queries: int, num_keys: int) -> int:
    """Returns how many queries are worked on at a time."""
    if platform != "cpu":
        return max(_BLOCK_TOKENS, _BLOCK_SCORES // num_keys)
    return _BLOCK_TOKENS if num_queries >= 2 * _BLOCK_TOKENS else num_queries


def _in_blocks(
    attend: Callable[..., jax.Array],
    query: Float[Array, "B S A E"],
    mask: Bool[Array, "B S K"] | None,
    bias: Float[Array, "#B A S K"] | None,
    offset: int | Int[Array, ""],
    most: int,
) -> Float[Array, "B S A E"]:
    """Calls `attend(query, mask, bias, offset)` for one block of `most` queries after another: only its scores are held."""
    tokens = query.shape[1]
    blocks = -(-tokens // most)
    size = -(-tokens // blocks)

    def cut(x: jax.Array | None, axis: int) -> jax.Array | None:
        if x is None:
            return None
        around = [(0, 0)] * x.ndim
        around[axis] = (0, blocks * size - tokens)
        return jnp.moveaxis(jnp.pad(x, around).reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)

    parts = (cut(query, 1), cut(mask, 1), cut(bias, 2), offset + size * jnp.arange(blocks))
    done = jnp.moveaxis(jax.lax.map(lambda part: attend(*part), parts), 0, 1)
    return done.reshape(query.shape[0], blocks * size, *query.shape[2:])[:, :tokens]


def _spec(query: Float[Array, "B S A E"], mesh: Mesh) -> PartitionSpec:
    """Returns over which mesh axes batch, tokens and heads of the queries are split."""
    return activation_spec(
        "attention's queries", query.shape, ("batch", "length", "heads", None), mesh, whole=("heads",)
    )


def _with_heads_for(part: jax.Array, heads: int, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """Repeats key-value heads that the mesh's tensor axis, by which the query heads are split, does not divide."""
    axis = spec[2]
    if axis is None or part.shape[2] % mesh.shape[axis] == 0:
        return part
    return jnp.repeat(part, heads // part.shape[2], axis=2)


def _cudnn_takes(query: Float[Array, "B S A E"], key: Float[Array, "B K G E"], *, ordered: bool) -> bool:
    head = query.shape[-1]
    fits = head <= _CUDNN_LARGEST_HEAD and head % _CUDNN_HEAD_MULTIPLE == 0
    # An order is told by a bias, whose gradient kernel takes even lengths.
    even = query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    return fits and (even or not ordered) and query.dtype in (jnp.bfloat16, jnp.float16)


def _on_shards(
    query: Float[Array, "B S A E"],
    key: Float[Array, "B K G E"],
    value: Float[Array, "B K G E"],
    kv_mask: Bool[Array, "B K"] | None,
    causal: bool,
    window_tokens: int | None,
    scale: float,
    mesh: Mesh | None,
) -> Float[Array, "B S A E"]:
    """Flash attention on a mesh's devices, each with its part of the work."""

    run = functools.partial(flash_attention, causal=causal, window_tokens=window_tokens, scale=scale)
    if mesh is None or mesh.size == 1:
        return run(query, key, value, kv_mask)
    batch, tokens, heads, _ = _spec(query, mesh)
    if causal or window_tokens is not None:
        tokens = None  # the kernel counts queries from 0, so each device of a sequence axis does all of them
    spec, of_keys = PartitionSpec(batch, tokens, heads), PartitionSpec(batch, None, heads)
    key, value = (_with_heads_for(part, query.shape[2], mesh, spec) for part in (key, value))
    arguments = (query, key, value) if kv_mask is None else (query, key, value, kv_mask)
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(spec, of_keys, of_keys, PartitionSpec(batch))[: len(arguments)],
        out_specs=spec,
        check_vma=False,
    )(*arguments)


def flash_attention(
    query: Float[Array, "B S A E"],
    key: Float[Array, "B K G E"],
    value: Float[Array, "B K G E"],
    kv_mask: Bool[Array, "B K"] | None = None,
    *,
    causal: bool,
    window_tokens: int | None,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B S A E"]:
    """Calls cuDNN's flash attention so that it skips keys that do not exist, where it can; see `attention`.

    Where every query sees every key, the order of keys means nothing: those that exist are moved to the front, and the kernel
    is told how many they are. With an order it gets the mask as a bias. `implementation` is for tests on other machines.
    """
    ordered = causal or window_tokens is not None
    mask = lengths = None
    if kv_mask is not None and not ordered:
        front = jnp.argsort(~kv_mask, axis=1, stable=True)[:, :, None, None]
        key, value = (jnp.take_along_axis(part, front, axis=1) for part in (key, value))
        lengths = jnp.maximum(1, jnp.sum(kv_mask, axis=1, dtype=jnp.int32))
    elif ordered:
        mask = _visible(query.shape[1], key.shape[1], causal, window_tokens, kv_mask, None, 0)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        key_value_seq_lengths=lengths,
        scale=scale,
        implementation=implementation,
    )


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
    window_tokens: int | None,
    kv_mask: Bool[Array, "B K"] | None,
    mask: Bool[Array, "B S K"] | None,
    query_offset: int | Int[Array, ""],
) -> Bool[Array, "#B 1 #S K"] | None:
    """Combines the restrictions into one mask that broadcasts over heads, or None when there is none."""
    parts = []
    ahead = jnp.arange(num_keys) - (jnp.arange(num_queries)[:, None] + query_offset)
    if causal:
        parts.append((ahead <= 0)[None, None])
    if window_tokens is not None:
        parts.append((jnp.abs(ahead) < window_tokens)[None, None])
    if kv_mask is not None:
        parts.append(kv_mask[:, None, None, :])
    if mask is not None:
        parts.append(mask[:, None])
    combined = None
    for part in parts:
        combined = part if combined is None else combined & part
    return combined
