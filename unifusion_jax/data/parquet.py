"""Parquet tables of images; the one place that needs pyarrow, which is an optional extra."""

import bisect
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class ParquetError(ValueError):
    """The table cannot be read, or pyarrow is not installed."""


class Cell(NamedTuple):
    """Where an image is: column, row in the file, and place in the cell's list (None: the cell is no list)."""

    column: str
    row: int
    place: int | None


class Table:
    """A Parquet file with columns of encoded images, as binary or as the {"bytes", "path"} of Hugging Face datasets.

    A column may also hold a list of images. Other columns are read when listing; images by row group, when needed.
    """

    def __init__(self, path: Path):
        """Opens the file and checks its columns.

        Raises:
          ParquetError: pyarrow is missing, the file is damaged, or no column holds images.
        """
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ParquetError(
                f"reading {path} needs pyarrow, which is not installed: pip install 'unifusion_jax[parquet]'"
            ) from error
        self.path = path
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ParquetError(f"{path} is not a readable Parquet file ({error}); copy it again") from error
        schema = self._file.schema_arrow
        self._images = {field.name: _is_list(field.type) for field in schema if _holds_images(field.type)}
        self._others = [name for name in schema.names if name not in self._images]
        if not self._images:
            raise ParquetError(f"{path} has no column of images (binary, or a struct with bytes); got {schema.names}")
        rows = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._ends = list(itertools.accumulate(rows))
        self._cache: dict[str, tuple[int, Any]] = {}
        self._lock = threading.Lock()  # ParquetFile is not safe to read from several threads

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields a dict for each row; images are given as `Cell`."""
        row = 0
        lists = [name for name, is_list in self._images.items() if is_list]
        for group in range(self._file.num_row_groups):
            others = self._file.read_row_group(group, columns=self._others).to_pylist() if self._others else None
            lengths = {name: self._lengths(group, name) for name in lists}
            for offset in range(self._ends[group] - row):
                fields = {key: _plain(value) for key, value in others[offset].items()} if others else {}
                for name, is_list in self._images.items():
                    cells = [
                        Cell(name, row + offset, place) for place in range(lengths[name][offset] if is_list else 0)
                    ]
                    fields[name] = cells if is_list else Cell(name, row + offset, None)
                yield fields
            row = self._ends[group]

    def image(self, cell: Cell) -> bytes:
        """The encoded image in a cell.

        Raises:
          FileNotFoundError: the cell is null, or holds a path in place of bytes.
        """
        group = bisect.bisect_right(self._ends, cell.row)
        offset = cell.row - (self._ends[group - 1] if group else 0)
        with self._lock:
            if self._cache.get(cell.column, (None, None))[0] != group:
                self._cache[cell.column] = (group, self._file.read_row_group(group, columns=[cell.column]).column(0))
            value = self._cache[cell.column][1][offset].as_py()
        value = value if cell.place is None or value is None else value[cell.place]
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise FileNotFoundError(f"row {cell.row} of {self.path} holds no bytes in {cell.column}")
        return data

    def _lengths(self, group: int, column: str) -> list[int]:
        values = self._file.read_row_group(group, columns=[column]).column(0)
        return [len(value) if value.is_valid else 0 for value in values]


def _is_list(kind: Any) -> bool:
    return str(kind).startswith(("list", "large_list", "fixed_size_list"))


def _holds_images(kind: Any) -> bool:
    if _is_list(kind):
        kind = kind.value_type
    if str(kind).startswith("struct"):
        names = [kind.field(position).name for position in range(kind.num_fields)]
        return "bytes" in names
    return str(kind) in ("binary", "large_binary")


def _plain(value: Any) -> Any:
    """A cell as JSON could hold it: dates, decimals and the like become text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
