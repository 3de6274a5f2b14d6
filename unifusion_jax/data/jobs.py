"""What jobs that write a data set share: an output folder that remembers which shards are done, and a report.

Every file appears under its final name only when it is whole, so a job that was stopped or killed goes on with its first
unfinished shard.
"""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unifusion_jax.data import shards

REPORT_FILE = "report.json"
_PROGRESS_FOLDER = ".progress"


class JobError(ValueError):
    """The job cannot start, or had to stop."""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An entry that did not become a record."""

    reason: str
    file: str
    where: str
    message: str


@dataclasses.dataclass
class Outcome:
    """What a job did.

    Attributes:
      input: where the entries are from.
      entries: how many there are.
      filtered: reasons for skipping that were asked for or do no harm; these entries do not count as broken.
      written: records, by task.
      skipped: what was left out.
      facts: further counts, for the report.
      waiting: shards that other hosts have not finished yet.
      stopped: why the job ended early, None when it is complete.
    """

    input: str
    entries: int
    filtered: tuple[str, ...] = ()
    written: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    skipped: list[Skipped] = dataclasses.field(default_factory=list)
    facts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    waiting: int = 0
    stopped: str | None = None

    @property
    def broken(self) -> int:
        """Skipped entries that count against a bound on their share."""
        return sum(skip.reason not in self.filtered for skip in self.skipped)

    def add(self, state: dict[str, Any]) -> None:
        """Counts a shard that an earlier run, or another host, finished."""
        self.written.update(state["written"])
        self.skipped += [Skipped(**skip) for skip in state["skipped"]]
        self.facts.update(state.get("facts", {}))

    def as_json(self) -> dict[str, Any]:
        """The content of `report.json`."""
        by_reason: dict[str, list[dict[str, str]]] = {}
        for skip in self.skipped:
            entry = {"file": skip.file, "where": skip.where, "message": skip.message}
            by_reason.setdefault(skip.reason, []).append(entry)
        return {
            "input": self.input,
            "complete": self.stopped is None,
            "stopped": self.stopped,
            "entries": self.entries,
            "written": self.written.total(),
            "tasks": dict(self.written),
            **dict(sorted(self.facts.items())),
            "skipped": len(self.skipped),
            "skipped_by_reason": {reason: len(entries) for reason, entries in sorted(by_reason.items())},
            "skipped_files": dict(sorted(by_reason.items())),
        }

    def summary(self, files_per_reason: int = 5) -> str:
        """The report for people."""
        tasks = ", ".join(f"{count} {task}" for task, count in self.written.items()) or "none"
        lines = [f"{self.entries} entries: {self.written.total()} records ({tasks}), {len(self.skipped)} skipped"]
        lines += [f"  {name.replace('_', ' ')}: {count}" for name, count in sorted(self.facts.items())]
        for reason, entries in self.as_json()["skipped_files"].items():
            lines.append(f"  {reason}: {len(entries)}")
            lines += [
                f"    {entry['file']} ({entry['where']}): {entry['message']}" for entry in entries[:files_per_reason]
            ]
            if len(entries) > files_per_reason:
                lines.append(f"    ... and {len(entries) - files_per_reason} more, all in {REPORT_FILE}")
        return "\n".join(lines)


class ShardedOutput:
    """A data set's folder that a job fills shard by shard. Shard k of n takes the k-th n-th of the entries.

    Attributes:
      folder: the data set's.
      paths: of its shards.
    """

    def __init__(self, folder: Path, num_shards: int, fingerprint: str):
        """Names the folder; nothing is read or written before `open`.

        Args:
          folder: the data set's.
          num_shards: number of files.
          fingerprint: differs between jobs of other input or options, which must not go on with each other's shards.
        """
        self.folder, self.fingerprint = folder, fingerprint
        self.paths = [shards.shard_path(folder, "records", shard, num_shards) for shard in range(num_shards)]

    def entries_of(self, shard: int, entries: int) -> range:
        """Returns the entries of a shard."""
        start, stop = (entries * edge // len(self.paths) for edge in (shard, shard + 1))
        return range(start, stop)

    def open(self, *, overwrite: bool = False) -> dict[int, dict[str, Any]]:
        """Makes sure that the folder is this job's; returns the states of finished shards by number.

        Raises:
          JobError: the folder holds something else.
        """
        progress = self.folder / _PROGRESS_FOLDER
        if overwrite:
            self._remove_dataset()
        if self.folder.exists() and not self.folder.is_dir():
            raise JobError(f"{self.folder} is a file; --output must be a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not progress.exists() and any(file != progress for file in self.folder.iterdir()):
            what = "a finished data set" if (self.folder / shards.DATASET_FILE).exists() else "other files"
            raise JobError(
                f"{self.folder} already holds {what}; choose another --output, or replace it with --overwrite"
            )
        progress.mkdir(exist_ok=True)
        return self.finished()

    def finished(self) -> dict[int, dict[str, Any]]:
        """Returns the states of finished shards by number, those of other hosts too."""
        found = {}
        for file in sorted((self.folder / _PROGRESS_FOLDER).glob("*.json")):
            state = json.loads(file.read_text(encoding="utf-8"))
            if state["fingerprint"] != self.fingerprint:
                raise JobError(
                    f"{self.folder} holds an unfinished data set made from other input or with other options; "
                    "repeat the command that began it, choose another --output, or start anew with --overwrite"
                )
            if state["done"] and self.paths[int(file.stem)].exists():
                found[int(file.stem)] = state
        return found

    def note(self, shard: int, done: bool, written: Any, skipped: Sequence[Skipped], facts: Any = None) -> None:
        """Remembers what a shard holds, after it was written."""
        state = {
            "fingerprint": self.fingerprint,
            "done": done,
            "written": dict(written),
            "skipped": [dataclasses.asdict(skip) for skip in skipped],
            "facts": dict(facts or {}),
        }
        shards.write_json(self.folder / _PROGRESS_FOLDER / f"{shard:05d}.json", state)

    def finish(self, done: Sequence[Path], outcome: Outcome, facts: dict[str, Any] | None = None) -> None:
        """Describes what there is; a complete job leaves no traces of its progress."""
        complete = outcome.stopped is None
        shards.write_dataset_file(self.folder, done, complete=complete, facts=facts)
        shards.write_json(self.folder / REPORT_FILE, outcome.as_json())
        if complete:
            self._remove_progress()

    def _remove_progress(self) -> None:
        for file in (self.folder / _PROGRESS_FOLDER).glob("*.json*"):
            file.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another host may be as far
            (self.folder / _PROGRESS_FOLDER).rmdir()

    def _remove_dataset(self) -> None:
        """Removes what jobs write, nothing else."""
        for pattern in ("records-*-of-*.arrayrecord*", "records-*-of-*.index.npz*", shards.DATASET_FILE, REPORT_FILE):
            for file in self.folder.glob(pattern):
                file.unlink()
        self._remove_progress()
