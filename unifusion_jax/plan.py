"""Tells whether a training run fits on chips that need not be here: `python -m unifusion_jax.plan --config=configs/final.py
--topology=v5p-256`.

The real step (frozen networks, conditioning, DiT, optimizer, average) is compiled for the topology; nothing is run and no weights
are read. Any key of the config can be set on the command line. Exit status 1 when the step does not fit.
"""

import dataclasses
import json
import logging
import sys

from absl import app, flags
from ml_collections import config_flags

from unifusion_jax.config import from_mapping
from unifusion_jax.parallel.chips import described_devices, memory_gib
from unifusion_jax.training.abstract import sharding_table
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.planning import DoesNotCompileError, Plan, plan, table
from unifusion_jax.training.search import cheapest_remat

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="File with a get_config function, e.g. configs/final.py."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "local",
    "'local', or a TPU slice: v5p-256, v5e-256, v6e-256; 2xv6e-256 for two slices (with mesh.slice=2).",
)
_TASK = flags.DEFINE_string(
    "task", "", "Task whose batches are planned; the one that takes the most memory by default."
)
_CAPACITY = flags.DEFINE_float("hbm_gib", 0.0, "Memory of a chip in GiB, in place of the table's.", lower_bound=0.0)
_SEARCH = flags.DEFINE_bool("search", False, "Find the largest batch, then the cheapest remat, that fit.")
_SHARDINGS = flags.DEFINE_bool("shardings", False, "Only print how each parameter lies on the config's mesh.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object in place of the table.")


def main(argv: list[str]) -> None:
    """Reads the flags and plans; a user's mistake ends in one line and exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True)
    if len(argv) > 1:
        sys.exit(f"Unexpected argument {argv[1]!r}. Config keys are set by --config.key=value.")
    try:
        config = from_mapping(TrainConfig, _CONFIG.value)
        if _SHARDINGS.value:
            print(sharding_table(config))
            return
        devices = described_devices(_TOPOLOGY.value)
        capacity = _CAPACITY.value or memory_gib(devices[0])

        def attempt(config: TrainConfig) -> Plan:
            return plan(config, devices, capacity_gib=capacity, task=_TASK.value)

        found = cheapest_remat(config, len(devices), attempt) if _SEARCH.value else attempt(config)
    except (ValueError, TypeError, FileNotFoundError, RuntimeError, DoesNotCompileError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(json.dumps(dataclasses.asdict(found)) if _JSON.value else table(found))
    if found.fits is False:
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
