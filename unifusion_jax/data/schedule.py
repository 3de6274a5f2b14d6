"""Which kind of batch comes when: a seeded schedule over streams that every host computes alike, at any step, in O(1).

The steps are cut into blocks of `BLOCK_STEPS`. Every block holds each stream the same number of times (its weight's
share, by largest remainders, never less than once), in an order drawn from `fold(seed, "schedule", block)`. So

    how often a stream came before step k  =  block(k) * its share  +  a count inside one block

which a restart needs in order to know where in each stream's shuffled records it is: nothing is saved or replayed.
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int64

BLOCK_STEPS = 4096  # shares are exact over one block, and resolved to 1/4096
_SHUFFLE_ROUNDS = 4  # the least that grain's index shuffle (a block cipher on the index) takes


@functools.lru_cache(maxsize=4096)
def fold(seed: int, *parts: int | str) -> int:
    """Derives a 32-bit seed from a seed and a path of names and numbers; the same on every host and Python version."""
    path = "/".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=4).digest(), "little")


def shuffled(position: int, count: int, seed: int) -> int:
    """The index at `position` of endless epochs over `count` items, each epoch in its own order.

    Every epoch, positions [e * count, (e + 1) * count), holds each index exactly once; O(1) memory and time.
    """
    epoch, offset = divmod(position, count)
    return index_shuffle(offset, max_index=count - 1, seed=fold(seed, "epoch", epoch), rounds=_SHUFFLE_ROUNDS)


def shares(weights: Sequence[float | int], total: int) -> Int64[np.ndarray, "n"]:
    """Whole numbers proportional to the weights that add up to `total`, each at least 1 (largest remainders).

    Raises:
      ValueError: a weight is not a positive number, or there are more weights than `total`.
    """
    values = np.asarray(weights, np.float64)
    if values.ndim != 1 or values.size == 0 or not np.all(np.isfinite(values)) or np.any(values <= 0):
        raise ValueError(f"weights must be positive numbers, got {list(weights)}")
    if values.size > total:
        raise ValueError(f"{values.size} streams do not fit into a schedule block of {total} steps; use fewer buckets")
    exact = values / values.sum() * total
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    # What is missing goes to the largest remainders; what the minimum of 1 used up comes from the most favoured.
    while (missing := total - int(counts.sum())) != 0:
        order = np.argsort(counts - exact, kind="stable")
        if missing > 0:
            counts[order[:missing]] += 1
        else:
            takers = [index for index in order[::-1] if counts[index] > 1][:-missing]
            counts[takers] -= 1
    return counts


class Schedule:
    """An endless order of streams.

    Args:
      weights: how often each stream comes, relative to the others.
      seed: seed of the order.
      block_steps: length of a block.
    """

    def __init__(self, weights: Sequence[float | int], seed: int, block_steps: int = BLOCK_STEPS):
        self.counts = shares(weights, block_steps)
        self.seed = seed
        self.block_steps = block_steps
        self._block = functools.lru_cache(maxsize=4)(self._make_block)

    def __getitem__(self, step: int) -> tuple[int, int]:
        """(stream of batch `step`, how many batches that stream had before)."""
        block, offset = divmod(step, self.block_steps)
        streams, ranks = self._block(block)
        stream = int(streams[offset])
        return stream, block * int(self.counts[stream]) + int(ranks[offset])

    def __getstate__(self) -> dict:
        return {"counts": self.counts, "seed": self.seed, "block_steps": self.block_steps}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._block = functools.lru_cache(maxsize=4)(self._make_block)

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The block's streams in order, and for each place how often its stream came before in the block."""
        ordered = np.repeat(np.arange(len(self.counts)), self.counts)
        # RandomState rather than Generator: NumPy guarantees its stream for ever (NEP 19).
        streams = ordered[np.random.RandomState(fold(self.seed, "schedule", block)).permutation(self.block_steps)]
        ranks = np.empty(self.block_steps, np.int64)
        for stream, count in enumerate(self.counts):
            ranks[streams == stream] = np.arange(count)
        return streams, ranks


class EpochSchedule:
    """A finite order: every stream exactly as many batches as `repeat` passes over its records need, in seeded order.

    Args:
      batches: number of batches of each stream.
      seed: seed of the order.
    """

    def __init__(self, batches: Sequence[int], seed: int):
        ordered = np.repeat(np.arange(len(batches)), batches)
        self.streams = ordered[np.random.RandomState(fold(seed, "schedule", "epochs")).permutation(len(ordered))]
        self.ranks = np.empty(len(ordered), np.int64)
        for stream, count in enumerate(batches):
            self.ranks[self.streams == stream] = np.arange(count)

    def __len__(self) -> int:
        return len(self.streams)

    def __getitem__(self, step: int) -> tuple[int, int]:
        """(stream of batch `step`, how many batches that stream had before)."""
        return int(self.streams[step]), int(self.ranks[step])
