"""Record shards on disk: writing them so that a crash loses nothing finished, and reading them at random.

Layout of a data set folder, made by `prepare` and `rewrite`:

    records-00000-of-00004.arrayrecord    serialised records, group_size 1 (each is read without its neighbours)
    records-00000-of-00004.index.npz      task (index into TASKS), height_px, width_px of each record's image
    dataset.json                          schema version, counts, shard sizes; written last, `complete` says so
"""

import collections
import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import (
    array_record_data_source,
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
)

from unifusion_jax.data import images, records

DATASET_FILE = "dataset.json"
_WRITER_OPTIONS = "group_size:1"


def shard_path(folder: str | Path, name: str, shard: int, shards: int) -> Path:
    """`FOLDER/name-00000-of-00004.arrayrecord`."""
    return Path(folder) / f"{name}-{shard:05d}-of-{shards:05d}.arrayrecord"


class ShardWriter:
    """Writes one shard under a temporary name and gives it its final name when it is whole.

    Used as a context manager: leaving it normally commits, leaving it by an exception removes the temporary file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._writer = array_record_module.ArrayRecordWriter(str(self._temporary), _WRITER_OPTIONS)
        self._columns: list[tuple[int, int, int]] = []

    def __len__(self) -> int:
        return len(self._columns)

    def add(self, record: records.Record, size_px: tuple[int, int] | None = None) -> None:
        """Appends a record. `size_px` is its image's (height, width), read from the image when not given."""
        height_px, width_px = size_px or image_size_px(record.image)
        self._writer.write(records.to_bytes(record))
        self._columns.append((records.TASKS.index(record.task), height_px, width_px))

    def commit(self) -> None:
        """Closes the shard, writes its index and renames both into place."""
        self._writer.close()
        columns = np.array(self._columns, np.int32).reshape(-1, 3)
        index_path = _index_path(self.path)
        temporary_index = index_path.with_name(index_path.name + ".tmp")
        with open(temporary_index, "wb") as file:
            np.savez(file, task=columns[:, 0].astype(np.uint8), height_px=columns[:, 1], width_px=columns[:, 2])
        os.replace(temporary_index, index_path)
        os.replace(self._temporary, self.path)  # last: a shard that has its name has its index

    def abort(self) -> None:
        """Closes and removes the temporary file."""
        self._writer.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if error_type is None:
            self.commit()
        else:
            self.abort()


def write_dataset_file(
    folder: str | Path, paths: Sequence[Path], *, complete: bool = True, facts: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Describes finished shards in `dataset.json` (atomically) and returns its content.

    Args:
      folder: the data set.
      paths: its shards, in reading order.
      complete: False when the job stopped early; such a data set is refused by default when read.
      facts: further entries, as how the data set was made.
    """
    shards, tasks, aspects = [], collections.Counter(), collections.Counter()
    for path in paths:
        columns = _read_index(path)
        shards.append({"file": path.name, "records": len(columns["task"]), "bytes": path.stat().st_size})
        tasks.update(records.TASKS[task] for task in columns["task"])
        aspects.update(
            f"{width / height:.2f}" for height, width in zip(columns["height_px"], columns["width_px"], strict=True)
        )
    content = {
        "schema_version": records.SCHEMA_VERSION,
        "complete": complete,
        "records": sum(shard["records"] for shard in shards),
        "tasks": {task: tasks[task] for task in records.TASKS if tasks[task]},
        "aspect_ratios": {aspect: aspects[aspect] for aspect in sorted(aspects, key=float)},
        "shards": shards,
        **(facts or {}),
    }
    write_json(Path(folder) / DATASET_FILE, content)
    return content


def write_records(
    items: Iterable[records.Record],
    folder: str | Path,
    *,
    shards: int = 1,
    name: str = "records",
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes records as a data set, dealing them out to the shards in turn.

    Args:
      items: any number of records.
      folder: created; must not already hold a data set.
      shards: number of files.
      name: their common name.
      facts: further entries for `dataset.json`.

    Returns:
      The content of `dataset.json`.

    Raises:
      ValueError: the folder already holds a data set, or `shards` is not positive.
    """
    folder = Path(folder)
    if shards < 1:
        raise ValueError(f"shards must be at least 1, got {shards}")
    if (folder / DATASET_FILE).exists():
        raise ValueError(f"{folder} already holds a data set; choose another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    writers = [ShardWriter(shard_path(folder, name, shard, shards)) for shard in range(shards)]
    committed = 0
    try:
        for position, item in enumerate(items):
            writers[position % shards].add(item)
        for writer in writers:
            writer.commit()
            committed += 1
    finally:
        for writer in writers[committed:]:
            writer.abort()
    return write_dataset_file(folder, [writer.path for writer in writers], facts=facts)


@dataclasses.dataclass
class _FileInstruction:
    """What array_record's data source takes in place of a path: a file with its known number of records."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class RecordSource:
    """Random access to a prepared data set.

    Attributes:
      path: the folder.
      info: the content of `dataset.json`.
      tasks: index into `records.TASKS` of every record, [n] uint8.
      heights_px, widths_px: size of every record's image (upright), [n] int32.
    """

    def __init__(self, path: str | Path, *, allow_incomplete: bool = False):
        """Opens the data set.

        Args:
          path: a folder made by `prepare`, `rewrite` or `write_records`.
          allow_incomplete: also read a data set whose making was stopped, as far as it goes.

        Raises:
          ValueError: no data set, unfinished, of another schema, empty, or a shard is missing or truncated.
        """
        self.path = Path(path)
        self.info = _read_dataset_file(self.path)
        if not self.info["complete"] and not allow_incomplete:
            raise ValueError(
                f"{self.path} is unfinished ({self.info['records']} records written before the job stopped); "
                "run the same prepare command again to finish it"
            )
        columns = [_check_shard(self.path, shard) for shard in self.info["shards"] if shard["records"]]
        if not columns:
            raise ValueError(f"{self.path} holds no records; see its report.json for what was skipped and why")
        self.tasks = np.concatenate([column["task"] for column in columns])
        self.heights_px = np.concatenate([column["height_px"] for column in columns])
        self.widths_px = np.concatenate([column["width_px"] for column in columns])
        # With the counts given, no shard is opened before one of its records is read.
        self._reader = array_record_data_source.ArrayRecordDataSource(
            [
                _FileInstruction(str(self.path / shard["file"]), 0, shard["records"], shard["records"])
                for shard in self.info["shards"]
                if shard["records"]
            ]
        )

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> records.Record:
        return records.from_bytes(self._reader[int(index)], where=f"{self.path}: record number {index}")

    def __repr__(self) -> str:
        return f"RecordSource({str(self.path)!r}, {len(self)} records)"


def image_size_px(image: Any) -> tuple[int, int]:
    """(height, width) of a record's image, from the header when it is encoded."""
    if isinstance(image, bytes):
        return images.inspect(image)[1:]
    return int(image.shape[0]), int(image.shape[1])


def write_json(path: Path, content: Any) -> None:
    """Writes JSON under a temporary name, then renames: readers see the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _index_path(path: Path) -> Path:
    return path.with_suffix(".index.npz")


def _read_index(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(_index_path(path), allow_pickle=False) as file:
            return {name: file[name] for name in ("task", "height_px", "width_px")}
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{_index_path(path)} is missing or damaged ({error}); prepare the data set again") from error


def _read_dataset_file(folder: Path) -> dict[str, Any]:
    path = folder / DATASET_FILE
    if not path.exists():
        raise ValueError(
            f"{folder} is not a prepared data set: it has no {DATASET_FILE}. "
            f"Make one with: python -m unifusion_jax.prepare --input=YOUR_IMAGES --output={folder}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, _, _, _ = (content[key] for key in ("schema_version", "complete", "records", "shards"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); prepare the data set again") from error
    if version != records.SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {version!r}, this program reads {records.SCHEMA_VERSION}; prepare again"
        )
    return content


def _check_shard(folder: Path, shard: dict[str, Any]) -> dict[str, np.ndarray]:
    path = folder / shard["file"]
    if not path.exists():
        raise ValueError(f"{folder}: shard {shard['file']} is missing; copy the whole data set, or prepare it again")
    if path.stat().st_size != shard["bytes"]:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, expected {shard['bytes']}: truncated or changed; "
            "copy it again, or prepare the data set again"
        )
    columns = _read_index(path)
    if any(len(column) != shard["records"] for column in columns.values()):
        raise ValueError(
            f"{_index_path(path)} has {len(columns['task'])} entries, expected {shard['records']}; prepare again"
        )
    return columns
