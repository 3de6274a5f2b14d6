"""Tensors of files onto devices: each host copies only the slices that its devices hold, once, straight into place.

A parameter is filled from pieces, arrays that already look like the parameter (or like one layer of it) but are views of a
mapped file: transposed, cut and reshaped without being read. What a device needs is copied from the view into the buffer
that becomes the device array, converted and transposed on the way. On CPU that buffer is the array (no second copy); on an
accelerator it is freed when the transfer is done.
"""

import collections
import dataclasses
import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

_ALIGNMENT_BYTES = 64  # XLA on CPU takes a buffer over as it is when it starts at a multiple of this
_STRIP_BYTES = 8 << 20  # of a file, copied and released at a time by one thread
# A transposing copy goes through tiles that stay in the second-level cache. Rows of a tile are padded: rows that lie a power
# of two apart would share cache lines. Without tiles, numpy transposes bfloat16 14 times slower.
_TILE_ROWS, _TILE_COLUMNS, _TILE_PADDING = 512, 256, 32

Bounds = tuple[tuple[int, int], ...]  # start and end along each axis


@dataclasses.dataclass(frozen=True)
class Piece:
    """What fills a parameter, or one layer of a stacked one.

    Attributes:
      layer: row of the parameter's first axis; None for the whole parameter.
      read: returns the values in the parameter's layout, preferably as a view of a mapped file.
    """

    layer: int | None
    read: Callable[[], np.ndarray]


def copy_threads() -> ThreadPoolExecutor:
    """Returns the threads that copy; more than a few only wait for memory."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="weights")


def assemble(
    shape: tuple[int, ...], dtype: Any, pieces: Sequence[Piece], sharding: Sharding | None, threads: Executor
) -> jax.Array:
    """Makes one parameter.

    Args:
      shape: of the whole parameter; `pieces` must cover it.
      dtype: to which values are converted.
      pieces: its parts.
      sharding: where it goes; None for the default device. Slices of devices of other hosts are not read.
      threads: from `copy_threads`.
    """
    buffers = {
        bounds: _aligned_empty(tuple(end - start for start, end in bounds), dtype) for bounds in _local(shape, sharding)
    }
    waiting: collections.deque[Future[None]] = collections.deque()
    for target, source in _copies(buffers, pieces):
        if len(waiting) >= 32:  # bounds what a transformation that has to compute holds in memory
            waiting.popleft().result()
        waiting.append(threads.submit(copy, target, source))
    for future in waiting:
        future.result()
    if sharding is None:
        return jax.device_put(next(iter(buffers.values())))
    return jax.make_array_from_callback(
        shape, sharding, lambda index: buffers[_bounds(index, shape)], dtype=np.dtype(dtype)
    )


def _bounds(index: Any, shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _local(shape: tuple[int, ...], sharding: Sharding | None) -> set[Bounds]:
    """Returns the distinct slices that this host's devices hold; devices with copies of one slice share its buffer."""
    if sharding is None:
        return {tuple((0, size) for size in shape)}
    return {_bounds(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()}


def _copies(buffers: dict[Bounds, np.ndarray], pieces: Sequence[Piece]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Lists what is to be copied where, in strips."""
    for piece in pieces:
        source = piece.read()
        for bounds, buffer in buffers.items():
            target, rest = buffer, bounds
            if piece.layer is not None:
                (first, end), *rest = bounds
                if not first <= piece.layer < end:
                    continue
                target = buffer[piece.layer - first, ...]
            yield from _strips(target, source[(..., *(slice(*part) for part in rest))])


def _strips(target: np.ndarray, source: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts a copy along the axis with the longest steps in the file, so that a strip is one stretch of it."""
    if source.nbytes <= _STRIP_BYTES:
        yield target, source
        return
    steps = [abs(stride) if size > 1 else 0 for stride, size in zip(source.strides, source.shape, strict=True)]
    axis = steps.index(max(steps))
    rows = max(1, _STRIP_BYTES * source.shape[axis] // source.nbytes)
    for start in range(0, source.shape[axis], rows):
        cut = (slice(None),) * axis + (slice(start, start + rows),)
        yield target[cut], source[cut]


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copies `source` into `target` of the same shape, converting, and lets go of the file's pages it came from."""
    transposed = source.ndim == 2 and min(source.shape) > 1 and source.strides[0] < source.strides[1]
    if transposed:
        _copy_transposed(target, source)
    elif target.dtype == source.dtype:
        np.copyto(_bits(target), _bits(source))
    else:
        np.copyto(target, source, casting="unsafe")
    _release(source)


def _copy_transposed(target: np.ndarray, source: np.ndarray) -> None:
    stored = source.T  # as in the file: along its rows it is contiguous, or nearly so
    tile = np.empty((_TILE_ROWS, _TILE_COLUMNS + _TILE_PADDING), target.dtype)
    for row in range(0, stored.shape[0], _TILE_ROWS):
        for column in range(0, stored.shape[1], _TILE_COLUMNS):
            block = stored[row : row + _TILE_ROWS, column : column + _TILE_COLUMNS]
            part = tile[: block.shape[0], : block.shape[1]]
            if block.dtype == part.dtype:
                np.copyto(_bits(part), _bits(block))
            else:
                np.copyto(part, block, casting="unsafe")
            into = target[column : column + _TILE_COLUMNS, row : row + _TILE_ROWS]
            np.copyto(_bits(into), _bits(part).T)


def _bits(array: np.ndarray) -> np.ndarray:
    """Views an array as integers: numpy's loops for bfloat16 copy one element at a time."""
    return array.view(f"u{array.itemsize}") if array.itemsize <= 8 else array


def _release(source: np.ndarray) -> None:
    """Unmaps the pages of a mapped file that hold `source`; they stay in the system's cache, outside of this process."""
    owner: Any = source
    while isinstance(owner, np.ndarray):
        owner = owner.base
    owner = owner.obj if isinstance(owner, memoryview) else owner
    if not isinstance(owner, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED") or not source.size:
        return
    start = np.frombuffer(owner, np.uint8).ctypes.data
    low, high = np.lib.array_utils.byte_bounds(source)
    first = (low - start) // mmap.PAGESIZE * mmap.PAGESIZE
    owner.madvise(mmap.MADV_DONTNEED, first, high - start - first)


def _aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT_BYTES
    return raw[start : start + size].view(dtype).reshape(shape)
