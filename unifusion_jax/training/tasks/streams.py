"""From `config.data` to this host's batches; shared by all tasks."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from unifusion_jax.config import from_mapping
from unifusion_jax.data.buckets import Buckets, Budget
from unifusion_jax.data.mixture import Mixture, make_mixture
from unifusion_jax.data.pipeline import BatchIterator, BuildRow, Collate, make_batches
from unifusion_jax.parallel.sharding import host_rows
from unifusion_jax.training.config import TrainConfig


def open_mixture(config: TrainConfig, *, multiple_of_px: int, budgets: Mapping[str, Any] | None = None) -> Mixture:
    """Opens the sources of a run. `budgets` replaces the config's, for tasks that read no prompts."""
    given = config.data.budgets if budgets is None else budgets
    parsed = {
        task: budget if isinstance(budget, Budget) else from_mapping(Budget, budget, f"config.data.budgets.{task}")
        for task, budget in given.items()
    }
    if not parsed:
        raise ValueError("config.data.budgets is empty: give max_tokens, max_tiles and max_kept_tokens for each task.")
    size = config.data.size_px
    if size % multiple_of_px:
        raise ValueError(f"config.data.size_px must be a multiple of {multiple_of_px} px (one DiT token), got {size}.")
    buckets = Buckets(parsed, area_px=size * size, multiple_of_px=multiple_of_px, max_aspect=config.data.max_aspect)
    return make_mixture(config.data.sources, buckets, min_records=config.batch_size)


def open_batches(
    config: TrainConfig, mixture: Mixture, build_row: BuildRow, collate: Collate, mesh: Mesh | None = None
) -> BatchIterator:
    """Opens this host's share of the endless training stream; without a mesh, whole batches, the same on every host."""
    return make_batches(
        mixture,
        batch_size=config.batch_size,
        seed=config.seed,
        build_row=build_row,
        collate=collate,
        rows=None if mesh is None else host_rows(mesh, config.batch_size),
        num_workers=config.data.num_workers,
    )
