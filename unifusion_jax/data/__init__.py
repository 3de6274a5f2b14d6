"""Data: records of every task, their sources and mixture, and the batches of a training run.

Names are imported when first used, so that tools which only read or write records do not wait for JAX and Grain.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unifusion_jax.data.buckets import Bucket, Buckets, Budget
    from unifusion_jax.data.mixture import Mixture, Stream, make_mixture
    from unifusion_jax.data.pipeline import Batch, BatchIterator, DataError, make_batches
    from unifusion_jax.data.records import TASKS, Record
    from unifusion_jax.data.shards import RecordSource, ShardWriter, write_records
    from unifusion_jax.data.sources import SourceConfig, register

__all__ = [
    "TASKS",
    "Batch",
    "BatchIterator",
    "Bucket",
    "Buckets",
    "Budget",
    "DataError",
    "Mixture",
    "Record",
    "RecordSource",
    "ShardWriter",
    "SourceConfig",
    "Stream",
    "make_batches",
    "make_mixture",
    "register",
    "write_records",
]

_MODULES = {
    "buckets": ("Bucket", "Buckets", "Budget"),
    "mixture": ("Mixture", "Stream", "make_mixture"),
    "pipeline": ("Batch", "BatchIterator", "DataError", "make_batches"),
    "records": ("TASKS", "Record"),
    "shards": ("RecordSource", "ShardWriter", "write_records"),
    "sources": ("SourceConfig", "register"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
