"""Batches for training: the same global order on every host, resumable at any step, read ahead by Grain.

The unit is the global batch index k. Everything about batch k (its stream, its records, their order) is computed from
the seed and k, so the iterator's whole state is k: it fits any number of hosts and workers, and a resumed run continues
exactly.
"""

import concurrent.futures
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags

from unifusion_jax.data import images, records
from unifusion_jax.data.buckets import Bucket
from unifusion_jax.data.mixture import Mixture, Stream
from unifusion_jax.data.schedule import EpochSchedule, Schedule, fold, shuffled

_ENDLESS_STEPS = 2**40  # Grain wants a length
_STATE_KEYS = ("next_step", "batch_size", "seed", "repeat", "mixture")

BuildRow = Callable[[records.Record, Bucket], Any]
Collate = Callable[[Sequence[Any], Bucket], Any]


class DataError(ValueError):
    """A record could not be turned into a row; the message names the record, its source and the batch."""


class Batch(NamedTuple):
    """This host's rows of one global batch.

    Attributes:
      step: index of the global batch.
      stream: name of the stream it was drawn from.
      bucket: its static shapes.
      ids: record ids of this host's rows.
      is_real: [rows] bool; False for rows that only fill up the last batch of a finite pass.
      data: what `collate` made.
    """

    step: int
    stream: str
    bucket: Bucket
    ids: tuple[str, ...]
    is_real: np.ndarray
    data: Any


@dataclasses.dataclass
class BatchLoader:
    """Makes batch k. A plain function of k with its settings, so that Grain may call it in any thread or process.

    Attributes are the arguments of `make_batches`.
    """

    mixture: Mixture
    batch_size: int
    seed: int
    rows: Sequence[int]
    build_row: BuildRow
    collate: Collate
    repeat: int | None
    read_threads: int

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, got {self.batch_size}")
        if not self.rows or min(self.rows) < 0 or max(self.rows) >= self.batch_size:
            raise ValueError(f"a host's rows lie in the global batch, [0, {self.batch_size}), got {list(self.rows)}")
        streams = self.mixture.streams
        if self.repeat is None:
            self.schedule: Schedule | EpochSchedule = Schedule([stream.weight for stream in streams], self.seed)
            self.total_steps = _ENDLESS_STEPS
        else:
            if self.repeat < 1:
                raise ValueError(f"repeat must be at least 1 pass, or None for endless batches; got {self.repeat}")
            batches = [-(-len(stream.indices) * self.repeat // self.batch_size) for stream in streams]
            self.schedule = EpochSchedule(batches, self.seed)
            self.total_steps = len(self.schedule)
        self._make_pool()

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_pool"}  # threads stay in their process

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._make_pool()

    def indices(self, step: int) -> tuple[Stream, list[int], list[bool]]:
        """Which records this host's rows of global batch `step` are.

        Returns:
          (stream, indices into its source, which of them are real: False where a finite pass has no records left and
          the stream's last record only fills the batch).
        """
        number, occurrence = self.schedule[step]
        stream = self.mixture.streams[number]
        count = len(stream.indices)
        seed = fold(self.seed, "shuffle", stream.name)
        first = occurrence * self.batch_size
        last = count * self.repeat - 1 if self.repeat is not None else first + self.batch_size
        positions = [first + row for row in self.rows]
        indices = [int(stream.indices[shuffled(min(position, last), count, seed)]) for position in positions]
        return stream, indices, [position <= last for position in positions]

    def __call__(self, step: int) -> Batch:
        """Loads this host's rows of global batch `step`.

        Raises:
          DataError: a record cannot be read, decoded or built; it is never replaced by another.
        """
        stream, indices, is_real = self.indices(step)
        ids, built = zip(*self._pool.map(lambda index: self._row(step, stream, index), indices), strict=True)
        data = self.collate(list(built), stream.bucket)
        return Batch(step, stream.name, stream.bucket, ids, np.array(is_real), data)

    def close(self) -> None:
        """Stops the threads that read rows."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _make_pool(self) -> None:
        # Grain's threads read ahead whole batches; the rows of a batch share this pool, so that the first is quick too.
        # It starts no thread before its first row.
        self._pool = concurrent.futures.ThreadPoolExecutor(self.read_threads, thread_name_prefix="rows")

    def _row(self, step: int, stream: Stream, index: int) -> tuple[str, Any]:
        name = f"number {index}"
        try:
            record = records.derive(records.as_record(stream.source[index]), stream.bucket.task)
            name = repr(record.id)
            return record.id, self.build_row(fit_record(record, stream.bucket), stream.bucket)
        except Exception as error:
            # Re-raised as one picklable kind, because the original may not survive the way out of a worker process.
            raise DataError(
                f"batch {step}: record {name} of {stream.name} cannot be used: {type(error).__name__}: {error}. "
                "Nothing is skipped silently; mend the record or prepare the data set again without it."
            ) from error


def fit_record(record: records.Record, bucket: Bucket) -> records.Record:
    """Decodes a record's images and brings its target to the bucket's size.

    References keep their size (the encoder tiles any), except those of the target's own size, which are fitted alike so
    that an edit's two pictures still show the same cut.

    Returns:
      The record with uint8 arrays for images.
    """
    target = images.to_pixels(record.image)
    references = []
    for reference in record.images:
        pixels = target if reference is record.image else images.to_pixels(reference)
        same = pixels.shape == target.shape
        references.append(images.fit(pixels, bucket.height_px, bucket.width_px) if same else pixels)
    return record.replace(image=images.fit(target, bucket.height_px, bucket.width_px), images=tuple(references))


class BatchIterator(Iterator[Batch]):
    """Iterates over batches; close it when done, best as a context manager.

    `get_state()` is a small JSON-able dictionary: the index of the next global batch, and what must not change.
    """

    def __init__(self, loader: BatchLoader, *, start_step: int, num_workers: int, prefetch_batches: int):
        if num_workers < 0 or prefetch_batches < 1:
            raise ValueError(
                f"expected num_workers >= 0 and prefetch_batches >= 1, got {num_workers} and {prefetch_batches}"
            )
        self._loader = loader
        self._num_workers = num_workers
        self._prefetch_batches = prefetch_batches
        self._ahead: grain.DatasetIterator | None = None
        self._closed = False
        self._next_step = self._checked(start_step)

    @property
    def total_steps(self) -> int | None:
        """Number of batches, None when endless."""
        return None if self._loader.repeat is None else self._loader.total_steps

    @property
    def mixture(self) -> Mixture:
        """The streams."""
        return self._loader.mixture

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("this batch iterator is closed; make a new one with make_batches")
        if self._next_step >= self._loader.total_steps:
            self._stop_ahead()
            raise StopIteration
        if self._ahead is None:
            self._ahead = self._start()
        try:
            batch = next(self._ahead)
        except BaseException:
            self.close()  # a failed pipeline must not keep threads or processes alive that block the exit
            raise
        self._next_step += 1
        return batch._replace(data=jax.tree.map(_owned, batch.data), is_real=_owned(batch.is_real))

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-able; independent of the number of hosts and workers."""
        loader = self._loader
        values = (self._next_step, loader.batch_size, loader.seed, loader.repeat, loader.mixture.fingerprint)
        return dict(zip(_STATE_KEYS, values, strict=True))

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved position.

        Raises:
          ValueError: the state is malformed, or was saved with other data, batch size or seed, whose steps mean others.
        """
        if not isinstance(state, dict) or set(state) != set(_STATE_KEYS):
            raise ValueError(f"a data iterator's state has the keys {list(_STATE_KEYS)}, got {state!r}")
        now = self.get_state()
        changed = [f"{key} was {state[key]!r}, is {now[key]!r}" for key in _STATE_KEYS[1:] if state[key] != now[key]]
        if changed:
            raise ValueError(
                f"the data of this run changed since its checkpoint ({'; '.join(changed)}); its position means nothing "
                "here. Restore data.sources, batch_size and seed, or start a new workdir from the checkpoint's weights"
            )
        self._stop_ahead()
        self._next_step = self._checked(state["next_step"])

    def close(self) -> None:
        """Stops reading ahead and ends worker processes. Harmless when repeated."""
        self._closed = True
        self._stop_ahead()
        self._loader.close()

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checked(self, step: Any) -> int:
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= self._loader.total_steps:
            raise ValueError(f"a data step lies in [0, {self._loader.total_steps}], got {step!r}")
        return step

    def _start(self) -> grain.DatasetIterator:
        # The loader is mapped over the indices that are left, so a position never passes through Grain's own state,
        # which depends on the number of workers.
        steps = grain.MapDataset.range(self._next_step, self._loader.total_steps)
        ahead = self._prefetch_batches
        read = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
        dataset = steps.map(self._loader).to_iter_dataset(read)
        if self._num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own, also in programs that use argparse
            options = grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=ahead)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_init_worker)
        return iter(dataset)

    def _stop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def make_batches(
    mixture: Mixture,
    *,
    batch_size: int,
    seed: int,
    build_row: BuildRow,
    collate: Collate,
    rows: Sequence[int] | None = None,
    start_step: int = 0,
    repeat: int | None = None,
    num_workers: int = 0,
    prefetch_batches: int = 2,
    read_threads: int | None = None,
) -> BatchIterator:
    """Makes the batches of one host.

    Args:
      mixture: the streams, from `make_mixture`.
      batch_size: rows of the global batch, all hosts together.
      seed: seed of schedule and shuffle.
      build_row: (record with uint8 arrays, bucket) -> row: tiling and tokenising. Called in threads, and with
        `num_workers` in other processes (then it must be picklable).
      collate: (rows of this host, bucket) -> NumPy pytree.
      rows: which rows of the global batch this host loads, see `parallel.sharding.host_rows`; None for all.
      start_step: the first global batch.
      repeat: None: endless, streams by their weights. A number: every record exactly that often, weights unused; each
        stream's last batch is filled up and says so in `is_real`; then the iterator ends.
      num_workers: worker processes; 0 reads in threads of this process.
      prefetch_batches: batches read ahead (by each worker).
      read_threads: threads that decode the rows of a batch; default one per core, at most 16.

    Raises:
      ValueError: sizes that do not fit together.
    """
    threads = read_threads or min(16, os.cpu_count() or 1)
    rows = range(batch_size) if rows is None else rows
    loader = BatchLoader(mixture, batch_size, seed, rows, build_row, collate, repeat, read_threads=threads)
    return BatchIterator(loader, start_step=start_step, num_workers=num_workers, prefetch_batches=prefetch_batches)


def _init_worker(worker: int, workers: int) -> None:
    # A worker that happens to use JAX must not reach for the accelerator that the trainer holds.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Schedulers announce the end to every process of a job. The trainer then still needs its batches, and ends the workers.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _owned(leaf: Any) -> Any:
    # Arrays from workers are views of shared memory that is freed with them; a consumer that keeps or aliases one
    # (`jax.device_put` on CPU may) must own the bytes.
    return np.array(leaf) if isinstance(leaf, np.ndarray) and type(leaf) is not np.ndarray else leaf
