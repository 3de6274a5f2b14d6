"""Finding the largest batch a chip holds, and the cheapest recomputation at that batch."""

import dataclasses
import logging
from collections.abc import Callable

from unifusion_jax.parallel.remat import RematName
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.planning import Plan

log = logging.getLogger(__name__)

# From the most memory and no work done twice to the least memory.
_BY_WORK: tuple[RematName, ...] = ("none", "dots", "full", "offload")
_LARGEST_BATCH_A_CHIP = 256


def cheapest_remat(config: TrainConfig, chips: int, attempt: Callable[[TrainConfig], Plan]) -> Plan:
    """Returns the plan of the largest batch that fits and of the least recomputation at that batch.

    Batches are powers of two samples a chip; each attempt is one compilation. The least memory is tried first: what does not
    fit even so has no plan that does, and that attempt is returned.
    """

    def tried(batch_a_chip: int, remat: RematName) -> Plan:
        changed = dataclasses.replace(config, batch_size=batch_a_chip * chips, remat=remat, accumulate_steps=1)
        found = attempt(changed)
        log.info("Batch %d a chip, remat %s: %s", batch_a_chip, remat, "fits" if found.fits else "does not fit")
        return found

    least = "full"  # offload is left to the last, it costs transfers
    best = tried(1, least)
    if not best.fits:
        return tried(1, "offload")
    batch = 1
    while batch < _LARGEST_BATCH_A_CHIP:
        larger = tried(2 * batch, least)
        if not larger.fits:
            break
        best, batch = larger, 2 * batch
    for remat in _BY_WORK[: _BY_WORK.index(least)]:
        cheaper = tried(batch, remat)
        if cheaper.fits:
            return cheaper
    return best
