"""Decoding large latents within a memory budget: overlapping tiles, blended where they meet.

How many bytes a decoder holds at its peak is counted on its traced program, so any network can be tiled without a formula
of its own.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core
from jaxtyping import Array, Float

Decode = Callable[[Float[Array, "B h w c"]], Float[Array, "B h2 w2 c2"]]

# Sides of tiles are multiples of this, so that few different programs are compiled.
_TILE_STEP_CELLS = 4
# Neighbours share this part of a tile. Its outer quarters, where a tile sees the zeros around it, take no part.
_OVERLAP = 0.25
# Compiled programs copy some values into other layouts. Where attention over many cells leads, XLA on CPUs holds one and a
# half times what is counted.
_SAFETY = 2


def decode_within(decode: Decode, latents: Float[Array, "B h w c"], max_bytes: int) -> Float[Array, "B h2 w2 c2"]:
    """Runs `decode` on as much of `latents` at a time as holds at most `max_bytes` of activations.

    The whole batch if that fits, and then this is `decode(latents)`; else one image at a time; else one tile of an image at
    a time, all tiles of one size, so that the program holds the decoder once.

    Raises:
      ValueError: when not even the smallest tile fits, with the bytes it needs.
    """
    _, height, width, channels = latents.shape
    tile = tile_cells(decode, latents.shape, latents.dtype, max_bytes)
    if tile is None:
        return decode(latents)
    if tile == (height, width):
        return jax.lax.map(lambda image: decode(image[None])[0], latents)
    example = jax.eval_shape(decode, jax.ShapeDtypeStruct((1, *tile, channels), latents.dtype))
    scale = example.shape[1] // tile[0]
    rows, row_weights = _placed(height, tile[0], scale)
    columns, column_weights = _placed(width, tile[1], scale)
    steps = np.stack(np.meshgrid(np.arange(len(rows)), np.arange(len(columns)), indexing="ij"), -1).reshape(-1, 2)

    def one_image(image: Float[Array, "h w c"]) -> Float[Array, "h2 w2 c2"]:
        def add_tile(canvas: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
            row, column = step
            top, left = jnp.asarray(rows)[row], jnp.asarray(columns)[column]
            piece = jax.lax.dynamic_slice(image, (top, left, 0), (*tile, channels))
            weight = jnp.asarray(row_weights)[row][:, None, None] * jnp.asarray(column_weights)[column][:, None]
            piece = decode(piece[None])[0] * weight
            corner = (top * scale, left * scale, 0)
            below = jax.lax.dynamic_slice(canvas, corner, piece.shape)
            return jax.lax.dynamic_update_slice(canvas, below + piece, corner), None

        canvas = jnp.zeros((height * scale, width * scale, example.shape[-1]), example.dtype)
        return jax.lax.scan(add_tile, canvas, jnp.asarray(steps))[0]

    return jax.lax.map(one_image, latents)


def tile_cells(decode: Decode, shape: tuple[int, ...], dtype: Any, max_bytes: int) -> tuple[int, int] | None:
    """Returns the height and width in latent cells of the largest tile that fits, or None when the whole batch does.

    `shape` is that of the latents, [B, h, w, c]. Raises ValueError when the smallest tile does not fit.
    """
    _, height, width, channels = shape

    @functools.cache
    def needed(count: int, tile: tuple[int, int]) -> int:
        return needed_bytes(decode, (count, *tile, channels), dtype)

    if needed(shape[0], (height, width)) <= max_bytes:
        return None
    smallest = 2 * _TILE_STEP_CELLS
    steps = range(smallest, max(height, width) + _TILE_STEP_CELLS, _TILE_STEP_CELLS)
    sizes = [(min(height, side), min(width, side)) for side in steps] or [(height, width)]
    fitting, failing = -1, len(sizes)
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        fits = needed(1, sizes[middle]) <= max_bytes
        fitting, failing = (middle, failing) if fits else (fitting, middle)
        # What a tile needs grows with its size, but for the one from which on attention works in smaller blocks.
        if failing - fitting == 1 and failing + 1 < len(sizes) and needed(1, sizes[failing + 1]) <= max_bytes:
            fitting, failing = failing + 1, len(sizes)
    if fitting < 0:
        raise ValueError(
            f"max_bytes={max_bytes} is too little: the smallest tile, {sizes[0][0]} x {sizes[0][1]} latent cells, needs "
            f"{needed(1, sizes[0])} bytes of activations. Raise max_bytes, or load the autoencoder in bfloat16."
        )
    return sizes[fitting]


def needed_bytes(decode: Decode, shape: tuple[int, ...], dtype: Any = jnp.float32) -> int:
    """Returns the bytes of activations to allow for `decode` on latents of this shape: what is counted, and a margin."""
    return _SAFETY * activation_bytes(decode, jax.ShapeDtypeStruct(shape, dtype))


def _placed(cells: int, tile: int, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Spreads tiles evenly over an axis.

    Returns their first cells [tiles], and for each of their pixels the share [tiles, tile * scale] that it has in the
    result; the shares that fall on one pixel sum to 1.
    """
    overlap = max(1, int(tile * _OVERLAP))
    count = 1 if tile >= cells else math.ceil((cells - overlap) / (tile - overlap))
    starts = np.round(np.linspace(0, cells - tile, count)).astype(np.int32)
    pixels = np.arange(tile * scale) + 0.5
    shares = np.ones((count, tile * scale))
    for left, right in zip(range(count - 1), range(1, count), strict=True):
        shared = (starts[left] + tile - starts[right]) * scale
        rising = np.clip(2.0 * pixels[:shared] / shared - 0.5, 0.0, 1.0)
        shares[right, :shared] *= rising
        shares[left, -shared:] *= rising[::-1]
    total = np.zeros(cells * scale)
    for start, share in zip(starts, shares, strict=True):
        total[start * scale : (start + tile) * scale] += share
    for start, share in zip(starts, shares, strict=True):
        share /= total[start * scale : (start + tile) * scale]
    return starts, shares.astype(np.float32)


def activation_bytes(function: Callable[..., Any], *inputs: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes that `function` holds at its peak, its inputs and its constants (weights) not counted.

    Its program is walked in order and each intermediate counts from where it is made to its last use. A compiler that
    fuses holds less; copies into other layouts and scratch space of kernels come on top.
    """
    closed = jax.make_jaxpr(function)(*inputs)
    return _peak_bytes(closed.jaxpr)


def _peak_bytes(jaxpr: jax_core.Jaxpr) -> int:
    last_use: dict[Any, int] = {}
    for index, equation in enumerate(jaxpr.eqns):
        last_use |= {value: index for value in equation.invars if not isinstance(value, jax_core.Literal)}
    last_use |= {value: len(jaxpr.eqns) for value in jaxpr.outvars if not isinstance(value, jax_core.Literal)}
    given = {*jaxpr.invars, *jaxpr.constvars}
    held = peak = 0
    for index, equation in enumerate(jaxpr.eqns):
        made = sum(_bytes(value) for value in equation.outvars)
        inner = max((_peak_bytes(part) for part in _inner(equation)), default=0)
        # a called program makes these results itself; a loop's body works beside the results of its rounds
        loop = equation.primitive.name in ("scan", "while")
        peak = max(peak, held + (made + inner if loop else max(made, inner)))
        held += sum(_bytes(value) for value in equation.outvars if value in last_use)
        ended = {value for value in equation.invars if not isinstance(value, jax_core.Literal)} - given
        held -= sum(_bytes(value) for value in ended if last_use[value] == index)
    return peak


def _inner(equation: Any) -> list[jax_core.Jaxpr]:
    """The programs that one step of a program calls, such as the body of a loop."""
    parts = jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda x: isinstance(x, jax_core.Jaxpr | jax_core.ClosedJaxpr)
    )
    closed = [part.jaxpr for part in parts if isinstance(part, jax_core.ClosedJaxpr)]
    return closed + [part for part in parts if isinstance(part, jax_core.Jaxpr)]


def _bytes(value: Any) -> int:
    return math.prod(value.aval.shape) * value.aval.dtype.itemsize
