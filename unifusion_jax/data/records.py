"""The record: one training example of any task, and its form on disk.

A prepared data set is a folder of ArrayRecord shards (`records-00000-of-00004.arrayrecord`), each beside a small index
(`records-00000-of-00004.index.npz`: task, height and width of every record, so that bucketing decodes nothing), and one
`dataset.json` that describes the whole and is written last.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
from jaxtyping import UInt8

from unifusion_jax.data import images

TASKS = ("text_to_image", "reconstruction", "joint", "edit", "multi_reference")
SCHEMA_VERSION = 1
# How many reference images a task needs: (at least, at most).
REFERENCES = {
    "text_to_image": (0, 0),
    "reconstruction": (1, None),
    "joint": (1, None),
    "edit": (1, None),
    "multi_reference": (2, None),
}
RECONSTRUCTION_PROMPT = "Reproduce this image."

Pixels = UInt8[np.ndarray, "h w 3"]
# The serialised form: a map with exactly these keys.
_FIELDS = {
    "version": int,
    "id": str,
    "task": str,
    "prompt": str,
    "target": (str, type(None)),
    "image": bytes,
    "images": list,
    "facts": dict,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One training example.

    Attributes:
      id: unique within its data set; every error names it.
      task: one of `TASKS`.
      prompt: what a user would type: a caption, or an edit instruction.
      target: the description that the VLM decodes and the DiT reads (VERIFI). None: not rewritten, the prompt itself
        conditions; "": no text at all, only the reference images condition.
      image: the image to generate: pixels [h, w, 3] uint8, or an encoded PNG, JPEG or WebP file.
      images: reference images, in the order that the prompt counts them.
      facts: further facts about the example (category, scene graph); kept, never read by training.
    """

    id: str
    task: str
    prompt: str
    target: str | None
    image: Any = dataclasses.field(repr=False)
    images: tuple = dataclasses.field(default=(), repr=False)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        where = f"record {self.id!r}"
        if not self.id:
            raise ValueError("a record's id must not be empty; errors name records by it")
        if self.task not in TASKS:
            raise ValueError(f"{where}: unknown task {self.task!r}; expected one of {', '.join(TASKS)}")
        least, most = REFERENCES[self.task]
        if len(self.images) < least or (most is not None and len(self.images) > most):
            expected = f"{least} or more" if most is None else f"exactly {most}"
            raise ValueError(f"{where}: {self.task} takes {expected} reference images, got {len(self.images)}")
        for name, image in (("image", self.image), *(("a reference image", image) for image in self.images)):
            _check_image(where, name, image)

    def replace(self, **changes: Any) -> "Record":
        """A copy with some fields changed, checked like a new record."""
        return dataclasses.replace(self, **changes)


def as_record(item: Any) -> Record:
    """Makes a `Record` of any object with a record's fields, as sources may bring their own class."""
    if isinstance(item, Record):
        return item
    missing = [name for name in ("id", "task", "prompt", "target", "image") if not hasattr(item, name)]
    if missing:
        raise ValueError(f"a source yielded {type(item).__name__} without {', '.join(missing)}; expected a Record")
    references = tuple(getattr(item, "images", ()))
    facts = getattr(item, "facts", None) or {}
    return Record(item.id, item.task, item.prompt, item.target, item.image, references, facts)


def derive(record: Record, task: str) -> Record:
    """Makes a reconstruction or joint example of a text-to-image one; the paper's base stage mixes them in.

    Args:
      record: a text_to_image record.
      task: "reconstruction": the image itself is the only condition; "joint": image and caption both condition.

    Raises:
      ValueError: the record or the task is of another kind.
    """
    if record.task == task:
        return record
    if record.task != "text_to_image":
        raise ValueError(f"record {record.id!r}: only text_to_image records can be derived from, got {record.task!r}")
    if task == "reconstruction":
        return record.replace(task=task, prompt=RECONSTRUCTION_PROMPT, target="", images=(record.image,))
    if task == "joint":
        return record.replace(task=task, images=(record.image,))
    raise ValueError(f"cannot derive {task!r} from text_to_image; expected reconstruction or joint")


def to_bytes(record: Record) -> bytes:
    """Serialises a record as a msgpack map; encoded images are kept byte for byte, pixel arrays become PNG.

    Raises:
      ValueError: `facts` holds something that msgpack cannot.
    """
    fields = {
        "version": SCHEMA_VERSION,
        "id": record.id,
        "task": record.task,
        "prompt": record.prompt,
        "target": record.target,
        "image": _encoded(record.image),
        "images": [_encoded(image) for image in record.images],
        "facts": dict(record.facts),
    }
    try:
        return bytes(msgpack.packb(fields, use_bin_type=True))  # pyright: ignore[reportArgumentType]
    except (TypeError, OverflowError, ValueError) as error:
        raise ValueError(f"record {record.id!r} cannot be serialised: {error}; facts must be JSON-like") from error


def from_bytes(data: bytes, *, where: str = "record") -> Record:
    """Reads what `to_bytes` wrote; images stay encoded.

    Args:
      data: the serialised record.
      where: how to name it in an error, as shard and position.

    Raises:
      ValueError: not a record, of another schema version, or with missing or wrong fields.
    """
    try:
        fields = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ValueError(f"{where} is not a serialised record ({error}); was the shard made by prepare?") from error
    if not isinstance(fields, dict) or "version" not in fields:
        raise ValueError(f"{where} is not a record: expected a map with a version, got {type(fields).__name__}")
    if fields["version"] != SCHEMA_VERSION:
        raise ValueError(
            f"{where} has schema version {fields['version']!r}, this program reads {SCHEMA_VERSION}; "
            "prepare the data again, or use the version of unifusion_jax that wrote it"
        )
    if set(fields) != set(_FIELDS):
        raise ValueError(f"{where} has the keys {sorted(map(str, fields))}, expected {sorted(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if not isinstance(fields[name], kind):
            raise ValueError(f"{where}: {name} is of type {type(fields[name]).__name__}, expected {kind}")
    del fields["version"]
    try:
        return Record(**{**fields, "images": tuple(fields["images"])})
    except ValueError as error:
        raise ValueError(f"{where} is malformed: {error}") from error


def _check_image(where: str, name: str, image: Any) -> None:
    if isinstance(image, bytes):
        return
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{where}: {name} must be a uint8 array or encoded bytes, got {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"{where}: {name} must be uint8 [h, w, 3], got {image.dtype} {list(image.shape)}")


def _encoded(image: Any) -> bytes:
    return image if isinstance(image, bytes) else images.encode_png(image)
