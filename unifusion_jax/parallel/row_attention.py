"""Attention of many rows of a few tokens as one Pallas kernel for TPU: LAP's, over the layers of every token.

A row is one condition token and its N tokens are the encoder's layers. Written with XLA's operations, normalised queries and
keys and the scores of every row go through HBM. Here a block of rows is read once, normalised, attended within and written
once; the backward pass reads queries, keys and values again and computes the rest anew.

Products of 10 x 128 matrices would leave the matrix unit idle. So the 16 rows of a block are multiplied together and scores
between different rows are masked away. What is computed for nothing is less than a hundredth of a LAP block's arithmetic.

Letters: R rows, N tokens of a row, A heads, E head dimension.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from unifusion_jax.layers import rms_normalised
from unifusion_jax.parallel import target
from unifusion_jax.parallel.sharding import activation_spec

_BLOCK_ROWS = 16  # rows of a tile in 16-bit types
_BLOCK_LANES = 512  # with 7 arrays in and out, twice, well within the smallest vector memory

_Parts = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def attend(
    query: Float[Array, "R N A E"],
    key: Float[Array, "R N A E"],
    value: Float[Array, "R N A E"],
    query_scale: Float[Array, " E"],
    key_scale: Float[Array, " E"],
    *,
    eps: float,
) -> Float[Array, "R N A E"]:
    """Returns softmax(q k^T / sqrt(E)) v within each row, q and k being RMS-normalised queries and keys times their scales.

    The norms and the softmax run in float32, products in the type of the inputs. `eps` is the norms'. On a mesh rows and heads
    are split. Off TPU the kernel's program is interpreted, which is for tests.
    """
    aim = target.current()
    run = functools.partial(_attention, eps, aim.device.platform != "tpu")
    if aim.mesh is not None and aim.mesh.size > 1:
        axes = ("rows", None, "heads", None)
        spec = activation_spec("rows of few tokens", query.shape, axes, aim.mesh, whole=("heads",))
        whole = PartitionSpec(None)
        run = jax.shard_map(
            run,
            mesh=aim.mesh,
            in_specs=(spec, spec, spec, whole, whole),
            out_specs=spec,
            check_vma=False,  # the kernel does not say over which axes its results vary
        )
    return run(query, key, value, query_scale, key_scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(eps: float, interpret: bool, *parts: jax.Array) -> jax.Array:
    (out,) = _call(_forward_kernel, parts, (), eps, interpret)
    return out


def _forward(eps: float, interpret: bool, *parts: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _attention(eps, interpret, *parts), parts


def _backward(eps: float, interpret: bool, parts: _Parts, gradient: jax.Array) -> tuple[jax.Array, ...]:
    *of_rows, query_scale, key_scale = _call(_backward_kernel, parts, (gradient,), eps, interpret)
    sums = (jnp.sum(of_blocks, axis=(0, 1, 2)) for of_blocks in (query_scale, key_scale))
    return (*of_rows, *(total.astype(scale.dtype) for total, scale in zip(sums, parts[3:], strict=True)))


_attention.defvjp(_forward, _backward)


def _call(
    kernel: Callable[..., None],
    parts: tuple[jax.Array, ...],
    gradients: tuple[jax.Array, ...],
    eps: float,
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel over blocks of rows and groups of heads.

    The layer axis goes first: XLA lays LAP's activations out like that, for then no tile is padded, and nothing is copied.
    """
    of_rows, scales = (*parts[:3], *gradients), parts[3:]
    rows, tokens, heads, head_dim = of_rows[0].shape
    group = max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * head_dim <= _BLOCK_LANES))
    grid = (pl.cdiv(rows, _BLOCK_ROWS), heads // group)
    block = pl.BlockSpec((tokens, _BLOCK_ROWS, group * head_dim), lambda i, j: (0, i, j))
    whole = pl.BlockSpec((1, head_dim), lambda i, j: (0, 0))
    flat = jax.ShapeDtypeStruct((tokens, rows, heads * head_dim), of_rows[0].dtype)
    num_out, products = (3, 6) if gradients else (1, 2)  # backward: scores, attended, and four gradients
    out_shape, out_specs = [flat] * num_out, [block] * num_out
    if gradients:  # of the scales: a sum for each block
        out_shape += [jax.ShapeDtypeStruct((*grid, 1, head_dim), jnp.float32)] * 2
        out_specs += [pl.BlockSpec((1, 1, 1, head_dim), lambda i, j: (i, j, 0, 0))] * 2
    results = pl.pallas_call(
        functools.partial(kernel, head_dim=head_dim, num_rows=rows, eps=eps),
        grid=grid,
        in_specs=[block] * len(of_rows) + [whole] * 2,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * flat.size * tokens * _BLOCK_ROWS,
            transcendentals=rows * tokens * heads * tokens * _BLOCK_ROWS,
            bytes_accessed=(len(of_rows) + num_out) * flat.size * flat.dtype.itemsize,
        ),
        interpret=interpret,
    )(
        *(part.reshape(rows, tokens, heads * head_dim).swapaxes(0, 1) for part in of_rows),
        *(scale[None] for scale in scales),
    )
    back = [part.swapaxes(0, 1).reshape(rows, tokens, heads, head_dim) for part in results[:num_out]]
    return back + list(results[num_out:])


def _forward_kernel(query: Any, key: Any, value: Any, query_scale: Any, key_scale: Any, out: Any, **sizes: Any) -> None:
    mask, heads = _same_row(query.shape), _heads(query.shape, sizes["head_dim"])
    for lanes in heads:
        q, k, v = (_read(part, lanes, sizes["num_rows"]) for part in (query, key, value))
        mixed = _head(q, k, v, query_scale[...], key_scale[...], mask=mask, eps=sizes["eps"])
        out[:, :, lanes] = mixed.reshape(*query.shape[:2], -1)


def _backward_kernel(
    query: Any, key: Any, value: Any, gradient: Any, query_scale: Any, key_scale: Any, *outs: Any, **sizes: Any
) -> None:
    mask, heads = _same_row(query.shape), _heads(query.shape, sizes["head_dim"])
    sums = [jnp.zeros((1, sizes["head_dim"]), jnp.float32)] * 2
    for lanes in heads:
        *parts, wanted = (_read(part, lanes, sizes["num_rows"]) for part in (query, key, value, gradient))
        function = functools.partial(_head, mask=mask, eps=sizes["eps"])
        of_parts = jax.vjp(function, *parts, query_scale[...], key_scale[...])[1](wanted)
        for out, found in zip(outs[:3], of_parts[:3], strict=True):
            out[:, :, lanes] = found.reshape(*query.shape[:2], -1)
        sums = [total + found.astype(jnp.float32) for total, found in zip(sums, of_parts[3:], strict=True)]
    for out, total in zip(outs[3:], sums, strict=True):
        out[...] = total[None, None]


def _heads(shape: tuple[int, ...], head_dim: int) -> list[slice]:
    return [slice(start, start + head_dim) for start in range(0, shape[2], head_dim)]


def _same_row(shape: tuple[int, ...]) -> jax.Array:
    """Marks pairs of a block's N * R tokens, layers first, that belong to one row."""
    pairs = (shape[0] * shape[1],) * 2
    row, other = (jax.lax.broadcasted_iota(jnp.int32, pairs, axis) % shape[1] for axis in (0, 1))
    return row == other


def _read(part: Any, lanes: slice, num_rows: int) -> Float[Array, "M E"]:
    """Reads a head; what lies behind the last row, which may be anything, becomes 0: 0 times NaN would be NaN."""
    block = part[:, :, lanes]
    if num_rows % _BLOCK_ROWS:
        row = jax.lax.broadcasted_iota(jnp.int32, block.shape, 1) + pl.program_id(0) * _BLOCK_ROWS
        block = jnp.where(row < num_rows, block, jnp.zeros_like(block))
    return block.reshape(-1, block.shape[-1])


def _head(
    query: Float[Array, "M E"],
    key: Float[Array, "M E"],
    value: Float[Array, "M E"],
    query_scale: Float[Array, "1 E"],
    key_scale: Float[Array, "1 E"],
    *,
    mask: jax.Array,
    eps: float,
) -> Float[Array, "M E"]:
    """Attends within the rows of a block with one head."""
    precision = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    dot = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:  # as unifusion_jax.layers.RMSNorm
        return rms_normalised(x, eps).astype(x.dtype) * scale.astype(x.dtype)

    scores = dot(norm(query, query_scale), norm(key, key_scale), (((1,), (1,)), ((), ()))) * query.shape[-1] ** -0.5
    scores = jnp.where(mask, scores, -1e30)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return dot(weights.astype(value.dtype), value, (((1,), (0,)), ((), ()))).astype(query.dtype)
