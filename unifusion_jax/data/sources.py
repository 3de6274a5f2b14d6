"""Where records come from: a registry of random-access sources, and the configuration of their mixture.

A run's `data.sources` is a list of plain mappings:

    [{"name": "shapes", "tasks": {"text_to_image": 0.97, "reconstruction": 0.03}, "weight": 0.9},
     {"name": "records", "path": "/data/mine", "weight": 0.1, "derive": {"reconstruction": 0.02, "joint": 0.02}}]

`weight` is the source's share of the batches. `tasks` picks and weighs its tasks (default: all it holds, by their
number of records). `derive` gives shares of the source to tasks made from its text_to_image records. Other keys go to
the source.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from unifusion_jax.data import records, shards

DERIVED_TASKS = ("reconstruction", "joint")


@runtime_checkable
class Source(Protocol):
    """Random access to records: item k is the same on every host and in every process; safe to read from threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Records of one source that share task and image size.

    Attributes:
      source: where to read them.
      task: their task.
      size_px: (height, width) of their images.
      indices: which records of the source.
    """

    source: Source
    task: str
    size_px: tuple[int, int]
    indices: Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One entry of `data.sources`; see the module's head.

    Attributes:
      name: a registered source.
      weight: share of the run's batches, relative to the other sources.
      tasks: weight of each task within the source; None: by number of records.
      derive: share of the source's batches (together below 1) that use its text_to_image records as another task.
      options: what the source's constructor takes.
    """

    name: str
    weight: float | int = 1.0
    tasks: Mapping[str, float | int] | None = None
    derive: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.name not in SOURCES:
            near = difflib.get_close_matches(str(self.name), SOURCES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"there is no data source {self.name!r}; expected one of {', '.join(SOURCES)}{hint}")
        named = (("tasks", self.tasks or {}, records.TASKS), ("derive", self.derive, DERIVED_TASKS))
        for what, weights, allowed in named:
            unknown = sorted(set(weights) - set(allowed))
            if unknown:
                raise ValueError(
                    f"data source {self.name!r}: {what} names {unknown}, expected some of {', '.join(allowed)}"
                )
        _check_weights(self.name, self.weight, self.tasks, self.derive)
        if sum(self.derive.values()) >= 1:
            raise ValueError(
                f"data source {self.name!r}: derive takes {sum(self.derive.values())} of it; expected less than 1"
            )

    @classmethod
    def from_mapping(cls, entry: Mapping[str, Any]) -> "SourceConfig":
        """Reads one entry of `data.sources`; `task: NAME` is short for `tasks: {NAME: 1}`.

        Raises:
          ValueError: no name, an unknown source or task, or a weight that is not a positive number.
        """
        rest = dict(entry)
        if "name" not in rest:
            raise ValueError(f"a data source needs a name ({', '.join(SOURCES)}), got the keys {sorted(rest)}")
        if "task" in rest and "tasks" in rest:
            raise ValueError(f"data source {rest['name']!r}: give either task or tasks, got both")
        tasks = {rest.pop("task"): 1.0} if "task" in rest else rest.pop("tasks", None)
        tasks = dict(tasks) if tasks else None
        name, weight, derive = rest.pop("name"), rest.pop("weight", 1.0), dict(rest.pop("derive", None) or {})
        _check_weights(name, weight, tasks, derive)
        return cls(name, weight, tasks, derive, options=rest)

    def open(self) -> list[Part]:
        """Opens the source.

        Returns:
          Its parts of the wanted tasks, and of text_to_image where `derive` needs them.

        Raises:
          ValueError: the source refuses its options, or lacks a wanted task.
        """
        wanted = set(self.tasks) if self.tasks else None
        needed = wanted | {"text_to_image"} if wanted and self.derive else wanted
        try:
            parts = SOURCES[self.name](needed, **self.options)
        except TypeError as error:
            raise ValueError(
                f"data source {self.name!r} does not take the options {dict(self.options)}: {error}"
            ) from error
        held = {part.task for part in parts}
        lacking = sorted((needed or ({"text_to_image"} if self.derive else set())) - held)
        if lacking:
            raise ValueError(f"data source {self.name!r} has no records of {lacking}; it has {', '.join(sorted(held))}")
        return parts


def parts_of(source: Source) -> list[Part]:
    """Parts of a source whose records all have one task and one image size, as told by its first record."""
    if len(source) < 1:
        raise ValueError(f"{source!r} holds no records")
    first = records.as_record(source[0])
    return [Part(source, first.task, shards.image_size_px(first.image), range(len(source)))]


def record_parts(source: shards.RecordSource, tasks: set[str] | None = None) -> list[Part]:
    """Parts of a prepared data set, by task and image size, in a fixed order; nothing is decoded."""
    columns = np.stack([source.tasks.astype(np.int64), source.heights_px, source.widths_px], axis=1)
    kinds, kind_of = np.unique(columns, axis=0, return_inverse=True)
    order = np.argsort(kind_of.ravel(), kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(kind_of.ravel(), minlength=len(kinds)))[:-1])
    parts = []
    for (task, height_px, width_px), indices in zip(kinds.tolist(), groups, strict=True):
        if tasks is None or records.TASKS[task] in tasks:
            parts.append(Part(source, records.TASKS[task], (height_px, width_px), indices))
    return parts


def register(name: str) -> Callable[[Callable[..., list[Part]]], Callable[..., list[Part]]]:
    """Decorator: makes `open_it(tasks, **options) -> list[Part]` available as `{"name": name, **options}`."""

    def add(open_it: Callable[..., list[Part]]) -> Callable[..., list[Part]]:
        if name in SOURCES:
            raise ValueError(f"a data source named {name!r} is already registered")
        SOURCES[name] = open_it
        return open_it

    return add


def _open_records(tasks: set[str] | None, *, path: str) -> list[Part]:
    return record_parts(shards.RecordSource(path), tasks)


def _open_shapes(tasks: set[str] | None, **options: Any) -> list[Part]:
    from unifusion_jax.data.shapes.source import ShapesSource  # imports this package's records

    opened = (ShapesSource(task=task, **options) for task in sorted(tasks or {"text_to_image"}))
    return [part for source in opened for part in parts_of(source)]


def _open_doodles(tasks: set[str] | None, **options: Any) -> list[Part]:
    from unifusion_jax.data.synthetic import DoodleSource  # likewise

    return parts_of(DoodleSource(**options))


def _open_emoji_names(tasks: set[str] | None, **options: Any) -> list[Part]:
    from unifusion_jax.data.synthetic import EmojiNameSource

    return parts_of(EmojiNameSource(**options))


def _check_weights(name: Any, weight: Any, tasks: Mapping[str, Any] | None, derive: Mapping[str, Any]) -> None:
    named = {"weight": weight}
    named |= {f"tasks.{task}": value for task, value in (tasks or {}).items()}
    named |= {f"derive.{task}": value for task, value in derive.items()}
    for key, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"data source {name!r}: {key} must be a positive number, got {value!r}; leave out what is not wanted"
            )


SOURCES: dict[str, Callable[..., list[Part]]] = {
    "records": _open_records,
    "shapes": _open_shapes,
    "doodles": _open_doodles,
    "emoji_names": _open_emoji_names,
}
