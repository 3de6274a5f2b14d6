"""The mixture: sources, tasks and buckets become weighted streams, each of one static shape."""

import collections
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unifusion_jax.data import sources
from unifusion_jax.data.buckets import Bucket, Buckets


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Records that may share a batch: of one source, one task, one bucket.

    Attributes:
      name: unique in the mixture, and stable: `SOURCE-NUMBER:SOURCE/TASK/HEIGHTxWIDTH`; it seeds the stream's shuffle.
      source: where to read.
      bucket: static shapes of its batches; `bucket.task` is the task the records are used for.
      indices: records of the source.
      weight: share of the batches, over all streams adding up to 1.
    """

    name: str
    source: sources.Source
    bucket: Bucket
    indices: Sequence[int] | np.ndarray
    weight: float


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """All streams of a run, in a fixed order."""

    streams: tuple[Stream, ...]

    def __post_init__(self):
        if not self.streams:
            raise ValueError("a mixture needs at least one stream; data.sources is empty")
        names = [stream.name for stream in self.streams]
        if len(set(names)) != len(names):
            raise ValueError(f"streams need different names, got {names}")

    @property
    def fingerprint(self) -> str:
        """Changes when the order of examples would: other streams, lengths, shapes or weights."""
        facts = [
            [stream.name, len(stream.indices), dataclasses.astuple(stream.bucket), round(stream.weight, 9)]
            for stream in self.streams
        ]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The distinct buckets: what a train step will be compiled for."""
        return tuple(sorted({stream.bucket for stream in self.streams}))

    def table(self) -> str:
        """A plain-text table of streams, records and shares, for the log at the start of a run."""
        width = max(len(stream.name) for stream in self.streams)
        lines = [f"{'stream':<{width}}  {'records':>10}  {'share':>7}"]
        lines += [f"{s.name:<{width}}  {len(s.indices):>10,}  {s.weight:>7.2%}" for s in self.streams]
        return "\n".join(lines)


def make_mixture(
    entries: Sequence[Mapping[str, Any] | sources.SourceConfig], buckets: Buckets, *, min_records: int = 1
) -> Mixture:
    """Opens the sources and sorts their records into weighted streams.

    Args:
      entries: `data.sources`, as plain mappings or parsed.
      buckets: image sizes and token budgets of the run.
      min_records: a bucket with fewer records (say, than a batch has rows) is joined to the nearest aspect ratio of the
        same source and task that has enough, so that no batch repeats a handful of images.

    Raises:
      ValueError: a wrong entry, a source that cannot be opened, or a task without a token budget.
    """
    configs = [
        entry if isinstance(entry, sources.SourceConfig) else sources.SourceConfig.from_mapping(entry)
        for entry in entries
    ]
    total = sum(config.weight for config in configs)
    streams: list[Stream] = []
    for number, config in enumerate(configs):
        parts = config.open()
        for task, share in _task_shares(config, parts).items():
            origin = "text_to_image" if task in config.derive else task
            grouped = _group([part for part in parts if part.task == origin], task, buckets, min_records)
            count = sum(len(indices) for _, _, indices in grouped)
            for bucket, source, indices in grouped:
                size = f"{bucket.height_px}x{bucket.width_px}"
                weight = config.weight / total * share * len(indices) / count
                streams.append(Stream(f"{number}:{config.name}/{task}/{size}", source, bucket, indices, weight))
    return Mixture(tuple(streams))


def _task_shares(config: sources.SourceConfig, parts: Sequence[sources.Part]) -> dict[str, float]:
    """Share of the source's batches for each task, adding up to 1."""
    if config.tasks:
        weights = dict(config.tasks)
    else:
        weights = collections.Counter()
        for part in parts:
            weights[part.task] += len(part.indices)
    both = sorted(set(weights) & set(config.derive))
    if both:
        raise ValueError(
            f"data source {config.name!r}: {both} would be both read and derived; leave it out of tasks or of derive"
        )
    stored = 1.0 - sum(config.derive.values())
    total = sum(weights.values())
    return {**{task: stored * weight / total for task, weight in sorted(weights.items())}, **config.derive}


def _group(
    parts: Sequence[sources.Part], task: str, buckets: Buckets, min_records: int
) -> list[tuple[Bucket, sources.Source, Sequence[int] | np.ndarray]]:
    """The parts of one source and task by bucket, buckets below `min_records` joined to their nearest."""
    groups: dict[Bucket, list[sources.Part]] = collections.defaultdict(list)
    for part in parts:
        groups[buckets.assign(task, *part.size_px)].append(part)
    counts = {bucket: sum(len(part.indices) for part in group) for bucket, group in groups.items()}
    kept = [bucket for bucket, count in counts.items() if count >= min_records] or [
        max(counts, key=lambda b: (counts[b], b))
    ]
    merged: dict[Bucket, list[sources.Part]] = collections.defaultdict(list)
    for bucket in sorted(groups):
        nearest = min(kept, key=lambda other: (abs(_log_aspect(other) - _log_aspect(bucket)), other))
        merged[nearest].extend(groups[bucket])
    result = []
    for bucket in sorted(merged):
        if len({id(part.source) for part in merged[bucket]}) > 1:
            raise ValueError(f"the parts of {task} with one image size must come from one source object, got several")
        indices = merged[bucket][0].indices
        if len(merged[bucket]) > 1:
            indices = np.sort(np.concatenate([np.asarray(part.indices) for part in merged[bucket]]))
        result.append((bucket, merged[bucket][0].source, indices))
    return result


def _log_aspect(bucket: Bucket) -> float:
    return math.log(bucket.width_px / bucket.height_px)
