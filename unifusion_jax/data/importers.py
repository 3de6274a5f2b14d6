"""Other people's data sets, read as a list of entries: image folders with JSON lines, WebDataset tars, Parquet files.

Listing is quick and strict: it reads all metadata and no pixels, and refuses the input with the place of each
malformed line. Loading an entry's images comes later (`preparation`), where a bad file is skipped and counted.

Keys of an entry, in every format:

    text               caption of the image (text_to_image); for edits optional: the description of the result
    instruction        what to do with the source images (edit, multi_reference)
    file_name          the image's path in the folder (in Parquet: column `image`; in tars: KEY.png, .jpg, .webp)
    source_file_name   reference images: a path or a list (in Parquet: `source_image`; in tars: KEY.source0.png, ...)
    target             optional: the description that conditions the model, if there already is one
    task               optional: one of the tasks, else told by the keys above
"""

import dataclasses
import glob
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unifusion_jax.data import images, parquet, records

_MAX_LISTED = 10  # malformed lines named in one error
_KNOWN_KEYS = ("file_name", "text", "instruction", "source_file_name", "target", "task", "image", "source_image")
_EXPECTED = "text (or, for edits, source_file_name and instruction)"


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFile:
    """One encoded image, not yet read.

    Attributes:
      name: how reports call it.
      read: returns its bytes; raises OSError when it is not there.
    """

    name: str
    read: Callable[[], bytes]


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """One future record.

    Attributes:
      id: of the record: the image's name and a hash of what else makes the entry; equal for repeated entries.
      where: file and line (or member, or row) that it comes from.
      task, prompt, target, facts: as in `Record`.
      image: the image to generate.
      references: reference images.
    """

    id: str
    where: str
    task: str
    prompt: str
    target: str | None
    facts: Mapping[str, Any]
    image: ImageFile
    references: tuple[ImageFile, ...]


class InputError(ValueError):
    """The input cannot be used as it is; nothing was written."""


def list_entries(pattern: str, *, task: str | None = None, rename: Mapping[str, str] | None = None) -> list[Entry]:
    """Lists what there is to import, in an order that depends on names and line numbers only.

    Args:
      pattern: a folder of images with `*.jsonl`, a folder of `*.tar` or `*.parquet`, one such file, or a glob of any.
      task: of entries that name none and have no source images: text_to_image (the default), reconstruction, joint.
      rename: other names of the keys, as {"caption": "text"}.

    Raises:
      InputError: nothing there, no metadata, malformed metadata (with file and line), or a path that leaves the folder.
    """
    paths = [Path(path) for path in sorted(glob.glob(pattern))] if glob.has_magic(pattern) else [Path(pattern)]
    if not paths or not paths[0].exists():
        raise InputError(f"there is nothing at {pattern}; expected a folder, a file or a glob of them")
    entries: list[Entry] = []
    problems: list[str] = []
    root = Path(os.path.commonpath([path.parent if path.is_file() else path for path in paths]))
    for file in [file for path in paths for file in _files(path)]:
        prefix = "" if file.parent == root else f"{file.parent.relative_to(root).as_posix()}/"
        for found in _READERS[file.suffix](file):
            try:
                if isinstance(found, str):
                    raise InputError(found)
                where, fields, open_image = found
                renamed = {(rename or {}).get(key, key): value for key, value in fields.items() if value is not None}
                entries.append(_entry(prefix, where, renamed, open_image, task))
            except InputError as error:
                problems.append(str(error))
    if problems:
        more = f"\n  ... and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        lines = "".join(f"\n  {problem}" for problem in problems[:_MAX_LISTED])
        raise InputError(f"{len(problems)} malformed entries; mend or remove them:{lines}{more}")
    if not entries:
        raise InputError(f"{pattern} describes no images: its metadata is empty")
    return entries


def _files(path: Path) -> list[Path]:
    """The metadata files, tars or Parquet files that a path stands for."""
    if path.is_file():
        if path.suffix in _READERS:
            return [path]
        raise InputError(f"{path} is not a {', '.join(_READERS)} file")
    for suffix in _READERS:
        files = sorted(path.glob(f"*{suffix}"))
        if files:
            return files
    count = sum(1 for file in path.rglob("*") if file.suffix.lower() in images.IMAGE_SUFFIXES)
    example = json.dumps({"file_name": "a.png", "text": "what the image shows"})
    raise InputError(
        f"{path} has {count} images but nothing that says what they show. Write a metadata.jsonl into it with a line "
        f"like {example} for each image, or point --input at *.tar (WebDataset) or *.parquet files"
    )


# A reader yields (where, fields, open_image) for each entry, or a string for what is wrong with a malformed one.
# `open_image(kind, name)` gives the image named by the value of a key.
_Found = tuple[str, dict[str, Any], Callable[[Any], ImageFile]] | str


def _read_jsonl(path: Path) -> Iterator[_Found]:
    folder = path.parent

    def open_image(name: Any) -> ImageFile:
        if not isinstance(name, str) or not name:
            raise InputError(f"a file name must be a non-empty string, got {name!r}")
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
            raise InputError(f"{name!r} leads out of the folder {folder}; use paths inside it")
        return ImageFile(name, (folder / name).read_bytes)

    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # also UnicodeDecodeError
                yield f"{where}: not a line of JSON: {error}"
                continue
            if not isinstance(fields, dict):
                yield f'{where}: expected an object like {{"file_name": ..., "text": ...}}, got {type(fields).__name__}'
                continue
            yield where, fields, open_image


def _read_tar(path: Path) -> Iterator[_Found]:
    """WebDataset: members that share the name up to its first dot are one sample."""
    samples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, base = os.path.split(member.name)
                stem, _, extension = base.partition(".")
                sample = samples.setdefault(os.path.join(folder, stem), {})
                if extension in ("txt", "json"):
                    sample[extension] = _read_range(path, member.offset_data, member.size)
                else:
                    sample[extension.lower()] = (member.name, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise InputError(
            f"{path} is not a readable, uncompressed tar file ({error}); copy or unpack it again"
        ) from error

    def open_image(member: tuple[str, int, int]) -> ImageFile:
        name, offset, size = member
        return ImageFile(f"{path.name}/{name}", lambda: _read_range(path, offset, size))

    for key, sample in samples.items():
        yield _sample_fields(f"{path}/{key}", key, sample, open_image)


def _sample_fields(where: str, key: str, sample: dict[str, Any], open_image: Callable[[Any], ImageFile]) -> _Found:
    if not set(sample) - {"txt", "json"}:
        return f"{where}: the sample has a caption but no image; got {sorted(sample)}"
    try:
        fields = json.loads(sample["json"].decode("utf-8-sig")) if "json" in sample else {}
        if "txt" in sample:
            fields.setdefault("text", sample["txt"].decode("utf-8-sig").strip())
    except (ValueError, AttributeError) as error:
        return f"{where}: its .json or .txt cannot be read: {error}"
    pictures = {name: value for name, value in sample.items() if f".{name.split('.')[-1]}" in images.IMAGE_SUFFIXES}
    plain = [value for name, value in sorted(pictures.items()) if "." not in name]
    sources = [value for name, value in sorted(pictures.items()) if name.startswith("source") and "." in name]
    if len(plain) != 1:
        return f"{where}: expected one image KEY.png, .jpg or .webp, got {sorted(sample)}"
    fields["file_name"] = plain[0]
    fields.pop("source_file_name", None)
    if sources:
        fields["source_file_name"] = sources
    return where, fields, open_image


def _read_parquet(path: Path) -> Iterator[_Found]:
    try:
        table = parquet.Table(path)
    except parquet.ParquetError as error:
        raise InputError(str(error)) from error

    def open_image(cell: Any) -> ImageFile:
        if not isinstance(cell, parquet.Cell):
            raise InputError(f"expected a column of images, got {cell!r}; see --rename")
        name = f"{path.name}:{cell.row}/{cell.column}" + ("" if cell.place is None else f"[{cell.place}]")
        return ImageFile(name, lambda: table.image(cell))

    for row, fields in enumerate(table.rows()):
        yield f"{path}:{row}", fields, open_image


_READERS: dict[str, Callable[[Path], Iterator[_Found]]] = {
    ".jsonl": _read_jsonl,
    ".tar": _read_tar,
    ".parquet": _read_parquet,
}


def _entry(prefix: str, where: str, fields: dict[str, Any], open_image: Callable, default_task: str | None) -> Entry:
    """Checks an entry's keys and makes the record's texts of them.

    Raises:
      InputError: with `where`.
    """
    try:
        names = _names(fields.get("source_file_name", fields.get("source_image", [])))
        task = fields.get("task") or ("multi_reference" if len(names) > 1 else "edit" if names else default_task)
        task = task or "text_to_image"
        if task not in records.TASKS:
            raise InputError(f"unknown task {task!r}; expected one of {', '.join(records.TASKS)}")
        image_key = "image" if "image" in fields and "file_name" not in fields else "file_name"
        prompt_key = "instruction" if names else "text"
        needed = {image_key, prompt_key} if task != "reconstruction" else {image_key}
        missing = sorted(needed - set(fields))
        if missing:
            raise InputError(
                f"missing {', '.join(missing)}; got the keys {sorted(fields)}, expected file_name and {_EXPECTED}"
            )
        for key in ("text", "instruction", "target"):
            if not isinstance(fields.get(key, ""), str):
                raise InputError(f"{key} must be a string, got {fields[key]!r}")
        image = open_image(fields[image_key])
        references = tuple(open_image(name) for name in names)
        if task in ("reconstruction", "joint") and not references:
            references = (image,)
        least, most = records.REFERENCES[task]
        if len(references) < least or (most is not None and len(references) > most):
            raise InputError(f"the task {task} does not go with {len(references)} source images")
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    prompt, target = fields.get(prompt_key) or "", fields.get("target")
    if task == "reconstruction":
        prompt, target = records.RECONSTRUCTION_PROMPT, ""
    elif names and target is None:
        target = fields.get("text")
    identity = json.dumps([task, prompt, target, [reference.name for reference in references]])
    digest = hashlib.blake2b(identity.encode(), digest_size=4).hexdigest()
    facts = {key: value for key, value in fields.items() if key not in _KNOWN_KEYS and not _is_image(value)}
    return Entry(f"{prefix}{image.name}#{digest}", where, task, prompt, target, facts, image, references)


def _is_image(value: Any) -> bool:
    """Whether a value is an image column that the entry does not use."""
    return isinstance(value[0] if isinstance(value, list) and value else value, parquet.Cell)


def _names(value: Any) -> Sequence[Any]:
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


def _read_range(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)
