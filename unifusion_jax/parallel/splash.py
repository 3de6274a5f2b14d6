"""Splash attention, Pallas' flash attention kernel for TPU, with the shapes and masks of this project.

The kernel takes blocks of 128 or more tokens, and skips blocks that a causal or windowed mask hides as a whole. Which keys of
a row exist is told by segment numbers: 1 for existing keys and for all queries, 0 for the others.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

LANES = 128
_BLOCKS = (768, 640, 512, 384)  # larger ones do not fit the vector memory in the backward pass


def block_tokens(tokens: int) -> int:
    """Returns the block length for a sequence: the one that pads it least, the larger of equals."""
    if tokens <= _BLOCKS[-1]:
        return -(-tokens // LANES) * LANES
    return min(_BLOCKS, key=lambda block: (-(-tokens // block) * block, -block))


def attend(
    query: Float[Array, "B S A E"],
    key: Float[Array, "B K G E"],
    value: Float[Array, "B K G E"],
    *,
    kv_mask: Bool[Array, "B K"] | None,
    causal: bool,
    window_tokens: int | None,
    scale: float,
    interpret: bool,
    shards: tuple[Mesh, PartitionSpec] | None = None,
) -> Float[Array, "B S A E"]:
    """Attends with the kernel; see `unifusion_jax.parallel.attention.attention` for the arguments.

    `interpret` runs the kernel's program step by step where there is no TPU. `shards` are the mesh, and the partition of the
    queries' batch, tokens and heads, by which the work is split; keys are gathered along the tokens.
    """
    tokens, num_keys = query.shape[1], key.shape[1]
    spec = PartitionSpec(None, None, None) if shards is None else shards[1]
    ways = _ways(shards[0], spec[1]) if shards else 1
    block_q, block_k = block_tokens(-(-tokens // ways)), block_tokens(num_keys)
    query = _padded(query * jnp.asarray(scale, query.dtype), block_q * ways)
    key, value = _padded(key, block_k), _padded(value, block_k)
    exists = kv_mask
    if exists is None and key.shape[1] > num_keys:
        exists = jnp.ones((key.shape[0], num_keys), bool)
    arguments = [query, key, value]
    if exists is not None:
        arguments.append(_padded(exists, block_k).astype(jnp.int32))
    if shards is None:
        kernel = _kernel(query.shape, key.shape[1], (block_q, block_k), causal, window_tokens, (1, 1), interpret)
        return _run(kernel, *arguments)[:, :tokens]
    mesh, split = shards[0], (ways, _ways(shards[0], spec[2]))
    if causal or window_tokens is not None:
        kernel = _kernel(query.shape, key.shape[1], (block_q, block_k), causal, window_tokens, split, interpret)
        of_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(spec[2], spec[1])))
    else:  # each device's part is like any other (and the library does not split a mask that hides nothing)
        part = (query.shape[0], query.shape[1] // split[0], query.shape[2] // split[1], query.shape[3])
        kernel = _kernel(part, key.shape[1], (block_q, block_k), causal, window_tokens, (1, 1), interpret)
        of_kernel = jax.tree.map(lambda _: PartitionSpec(), kernel)
    of_keys = PartitionSpec(spec[0], None, spec[2])
    specs = [spec, of_keys, of_keys, PartitionSpec(spec[0])][: len(arguments)]
    out = jax.shard_map(
        _run,
        mesh=mesh,
        in_specs=(of_kernel, *specs),
        out_specs=spec,
        check_vma=False,  # the kernel does not say over which axes its results vary
    )(kernel, *arguments)
    return out[:, :tokens]


def _run(
    kernel: kernels.SplashAttentionKernel,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    exists: jax.Array | None = None,
) -> jax.Array:
    """Attends on one device, sample by sample; the kernel takes heads before tokens."""
    heads_first = [jnp.swapaxes(part, 1, 2) for part in (query, key, value)]
    segments = None
    if exists is not None:
        segments = kernels.SegmentIds(q=jnp.ones(query.shape[:2], jnp.int32), kv=exists)
    attended: Any = jax.vmap(kernel)(*heads_first, segments)  # a pair only where residuals are asked for
    return jnp.swapaxes(attended, 1, 2)


@functools.lru_cache(maxsize=64)
def _mask(shape: tuple[int, int], causal: bool, window_tokens: int | None) -> masks.Mask:
    if window_tokens is not None:
        return masks.LocalMask(shape, (window_tokens - 1, 0 if causal else window_tokens - 1), 0)
    return masks.CausalMask(shape) if causal else masks.FullMask(shape)


def _kernel(
    query: tuple[int, ...],
    num_keys: int,
    blocks: tuple[int, int],
    causal: bool,
    window_tokens: int | None,
    split: tuple[int, int],
    interpret: bool,
) -> kernels.SplashAttentionKernel:
    """Makes the kernel for queries of this shape, to be split in so many parts of their tokens and heads."""
    block_q, block_k = blocks
    sizes = kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_q_dq=block_q,
        block_kv_dq=block_k,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([_mask((query[1], num_keys), causal, window_tokens)] * query[2]),
        block_sizes=sizes,
        head_shards=split[1],
        q_seq_shards=split[0],
        interpret=interpret,
    )


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    """Adds zeros behind the tokens of [B, tokens, ...] up to a multiple."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2))) if missing else x


def _ways(mesh: Mesh, axes: str | Sequence[str] | None) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    ways = 1
    for name in names:
        ways *= mesh.shape[name]
    return ways
