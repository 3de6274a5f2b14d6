"""The preparation job: entries in, record shards and a report out; what is broken is skipped, counted and listed.

Shard k of n takes the k-th n-th of the entries, so the output depends on the input and the options alone.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tqdm

from unifusion_jax.data import images, importers, records, shards
from unifusion_jax.data.jobs import JobError, Outcome, ShardedOutput, Skipped

_ENTRIES_PER_SHARD = 2048
_MAX_SHARDS = 1024
_CHUNK = 64  # entries decoded side by side
# Left out on purpose or for nothing; these do not count against max_skipped_share.
FILTERED = ("too_small", "duplicate")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to prepare, and how.

    Attributes:
      input: see `importers.list_entries`.
      output: the data set's folder.
      shards: number of files; 0: one for every 2048 entries.
      max_skipped_share: the job stops when more than this share of all entries is broken.
      task: task of entries that name none and have no source images.
      rename: other names of the metadata keys, as {"caption": "text"}.
      min_side_px: leave out smaller images (0: none).
      max_pixels: skip larger images as decompression bombs.
      dry_run: check everything, write nothing.
      overwrite: replace a data set that is already in `output`.
      threads: files decoded side by side.
    """

    input: str
    output: str
    shards: int = 0
    max_skipped_share: float = 0.05
    task: str | None = None
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    min_side_px: int = 0
    max_pixels: int = images.MAX_PIXELS
    dry_run: bool = False
    overwrite: bool = False
    threads: int = 8

    def __post_init__(self):
        if not 0 <= self.shards <= 99_999:
            raise JobError(f"shards must lie in [0, 99999] (0 chooses), got {self.shards}")
        if not 0 <= self.max_skipped_share <= 1:
            raise JobError(f"max_skipped_share is a share in [0, 1], got {self.max_skipped_share}")
        if self.min_side_px < 0 or self.threads < 1:
            raise JobError(f"expected min_side_px >= 0 and threads >= 1, got {self.min_side_px} and {self.threads}")
        if not 1 <= self.max_pixels <= images.MAX_PIXELS:
            raise JobError(
                f"max_pixels must lie in [1, {images.MAX_PIXELS}] (what training decodes), got {self.max_pixels}; "
                "make larger images smaller first"
            )


def prepare(settings: Settings, *, progress: bool = True) -> Outcome:
    """Runs the job.

    Args:
      settings: what to do.
      progress: show a progress bar.

    Returns:
      What was done. `outcome.stopped` tells why a job ended early; its finished records are kept, and the same call
      again goes on from there.

    Raises:
      JobError: the output folder is in use by something else.
      importers.InputError: the input's metadata is malformed; nothing was written.
    """
    entries = importers.list_entries(settings.input, task=settings.task, rename=settings.rename)
    job = _Job(settings, entries)
    with tqdm.tqdm(total=len(entries), unit="image", desc="prepare", disable=not progress) as bar:
        return job.run(bar)


class _Job:
    def __init__(self, settings: Settings, entries: Sequence[importers.Entry]):
        self.settings = settings
        self.entries = entries
        self.outcome = Outcome(settings.input, len(entries), FILTERED)
        wanted = settings.shards or min(_MAX_SHARDS, math.ceil(len(entries) / _ENTRIES_PER_SHARD))
        num_shards = min(wanted, len(entries))
        seen: set[str] = set()
        self.repeated = set()
        for position, entry in enumerate(entries):
            if entry.id in seen:
                self.repeated.add(position)
            seen.add(entry.id)
        facts = [settings.task, settings.min_side_px, settings.max_pixels, num_shards, [entry.id for entry in entries]]
        fingerprint = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
        self.output = ShardedOutput(Path(settings.output), num_shards, fingerprint)

    def run(self, bar: tqdm.tqdm) -> Outcome:
        finished = {} if self.settings.dry_run else self.output.open(overwrite=self.settings.overwrite)
        done: list[Path] = []
        with concurrent.futures.ThreadPoolExecutor(self.settings.threads) as pool:
            for shard, path in enumerate(self.output.paths):
                positions = self.output.entries_of(shard, len(self.entries))
                if shard in finished:
                    self.outcome.add(finished[shard])
                    bar.update(len(positions))
                elif self.settings.dry_run:
                    for _ in self._load(pool, positions, bar):
                        pass
                else:
                    self._write_shard(shard, self._load(pool, positions, bar))
                done.append(path)
                if self.outcome.stopped:
                    break
        if not self.outcome.written and not self.outcome.stopped:
            self.outcome.stopped = "not one entry could be used"
        if not self.settings.dry_run:
            self.output.finish(done, self.outcome)
        return self.outcome

    def _write_shard(self, shard: int, loaded: Iterator[tuple[records.Record, tuple[int, int]]]) -> None:
        before = len(self.outcome.skipped)
        written: collections.Counter = collections.Counter()
        with shards.ShardWriter(self.output.paths[shard]) as writer:
            try:
                for record, size_px in loaded:
                    writer.add(record, size_px)
                    written[record.task] += 1
            except KeyboardInterrupt:
                self.outcome.stopped = "interrupted"  # what is written so far is still committed
        self.output.note(shard, self.outcome.stopped is None, written, self.outcome.skipped[before:])

    def _load(
        self, pool: concurrent.futures.Executor, positions: range, bar: tqdm.tqdm
    ) -> Iterator[tuple[records.Record, tuple[int, int]]]:
        """Yields records in order, notes what is skipped, and ends early when too much is."""
        for start in range(positions.start, positions.stop, _CHUNK):
            chunk = range(start, min(start + _CHUNK, positions.stop))
            for result in pool.map(self._load_one, chunk):
                bar.update()
                if isinstance(result, Skipped):
                    self.outcome.skipped.append(result)
                    if self._too_many():
                        return
                else:
                    self.outcome.written[result[0].task] += 1
                    yield result

    def _load_one(self, position: int) -> tuple[records.Record, tuple[int, int]] | Skipped:
        entry = self.entries[position]
        if position in self.repeated:
            return Skipped("duplicate", entry.image.name, entry.where, "the same entry came before")
        loaded: list[bytes] = []
        size_px = (0, 0)
        for file in (entry.image, *entry.references):
            try:
                data, *size = images.normalise(file.read(), max_pixels=self.settings.max_pixels)
            except images.ImageError as error:
                return Skipped(error.reason, file.name, entry.where, str(error))
            except OSError as error:
                return Skipped("missing", file.name, entry.where, f"cannot be read: {error}")
            if min(size) < self.settings.min_side_px:
                message = f"{size[1]}x{size[0]} px, below min_side_px={self.settings.min_side_px}"
                return Skipped("too_small", file.name, entry.where, message)
            size_px = size_px if loaded else (size[0], size[1])
            loaded.append(data)
        record = records.Record(
            entry.id, entry.task, entry.prompt, entry.target, loaded[0], tuple(loaded[1:]), entry.facts
        )
        return record, size_px

    def _too_many(self) -> bool:
        share = self.settings.max_skipped_share
        if self.outcome.broken <= share * len(self.entries):
            return False
        self.outcome.stopped = (
            f"more than {share:.1%} of {len(self.entries)} entries are broken (max_skipped_share={share}); mend them, "
            "or allow more with --max_skipped_share, and run the same command again to go on"
        )
        return True
