"""Trains a model: `python -m unifusion_jax.train --config=configs/demo.py --workdir=runs/demo`.

Any key of the config can be set on the command line, e.g. `--config.batch_size=64 --config.optimizer.learning_rate=3e-4`.
Restarting with the same --workdir resumes from its newest checkpoint. With many hosts, every one runs the same command on a
workdir that all of them see; docs/launch.md says how.

Exit status: 0 done; 1 failed; 2 wrong command line; 75 told to end (SIGTERM) and saved; 76 another host was lost or failed.
"""

import json
import logging
import sys
import time
from pathlib import Path

import jax
from absl import app, flags
from clu import parameter_overview
from ml_collections import config_flags

from unifusion_jax.config import from_mapping, parse_flags, to_json
from unifusion_jax.parallel.host_memory import cpu_expected, keep_freed_blocks
from unifusion_jax.parallel.hosts import HostWatch, connect, to_host
from unifusion_jax.parallel.mesh import make_mesh
from unifusion_jax.training.checkpoints import check_config, latest_step, write_config
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.health import NonFiniteError
from unifusion_jax.training.loop import fit
from unifusion_jax.training.metrics import MetricWriter
from unifusion_jax.training.phases import phases
from unifusion_jax.training.preemption import Preempted
from unifusion_jax.training.state import TrainState
from unifusion_jax.training.task import Task
from unifusion_jax.training.tasks import make_task, parameter_shapes

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="File with a get_config function, e.g. configs/demo.py."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics, samples and the exported model.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; clusters tell it by themselves.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run; 1 joins no others.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)
_LOST_AFTER = flags.DEFINE_integer("lost_host_after_s", 100, "Silence after which a host is lost.", lower_bound=2)

log = logging.getLogger("unifusion_jax")


def run(config: TrainConfig, workdir: Path) -> dict[str, float]:
    """Trains, scores and exports; returns the final scores, which are also written to `workdir/result.json`."""
    started = time.perf_counter()
    check_config(workdir, to_json(config))
    task, state, writer = _train(config, workdir)
    trained_s = time.perf_counter() - started
    params = state.inference_params
    whole = to_host(params)
    if jax.process_index() == 0:
        task.export(whole, workdir / "export")
    del whole  # as large as the model
    scores = task.evaluate(params)
    if scores:
        writer.write(config.total_steps, {f"evaluation/{name}": value for name, value in scores.items()})
    writer.close()
    result = {"wall_s": time.perf_counter() - started, "training_wall_s": trained_s, **scores}
    if jax.process_index() == 0:
        (workdir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        log.info("Model written to %s. %s", workdir / "export", json.dumps(result))
    return result


def _train(config: TrainConfig, workdir: Path) -> tuple[Task, TrainState, MetricWriter]:
    """Goes through the phases of a run that are still to be done; returns the last one's task, state and open writer."""
    mesh = make_mesh(config.mesh)
    plan = phases(config)
    # Every phase is looked at before the first begins: the second may come days later.
    shapes = [parameter_shapes(phase.config, mesh) for phase in plan] if len(plan) > 1 else []
    done = latest_step(workdir)
    number = sum(done >= phase.until for phase in plan[:-1])
    while True:
        phase = plan[number]
        task = make_task(phase.config, mesh)
        # Recorded only now: a config that cannot run leaves nothing behind that the mended one would have to be equal to.
        write_config(workdir, to_json(config))
        count = parameter_overview.count_parameters(jax.eval_shape(task.init, jax.random.key(0)))
        log.info("Trained parameters: %s", f"{count:,}")
        before = shapes[number - 1] if number else None
        state, writer = fit(task, phase.config, workdir, mesh, phase=phase, before=before)
        number += 1
        if number == len(plan):
            return task, state, writer
        writer.close()
        del task, state  # before the next encoder is loaded


def main(argv: list[str]) -> None:
    """Reads the flags and runs; a user's mistake ends in one line and exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True)
    for noisy in ("absl", "jax", "orbax", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if len(argv) > 1:
        sys.exit(f"Unexpected argument {argv[1]!r}. Config keys are set by --config.key=value.")
    if _WORKDIR.value is None:
        sys.exit("--workdir=DIR is missing: the folder for checkpoints, metrics and samples.")
    if "://" in _WORKDIR.value:
        bucket, _, rest = _WORKDIR.value.partition("://")[2].partition("/")
        sys.exit(
            f"--workdir is a folder that every host sees, got {_WORKDIR.value}. Mount the bucket (gcsfuse --implicit-dirs "
            f"{bucket} /gcs/{bucket}; launch/tpu_pod_slice.sh --bucket={bucket} does) and give --workdir=/gcs/{bucket}/{rest}."
        )
    if cpu_expected():
        keep_freed_blocks()
    try:
        config = from_mapping(TrainConfig, _CONFIG.value)
        connect(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, timeout_s=_LOST_AFTER.value)
        with HostWatch(_LOST_AFTER.value):
            run(config, Path(_WORKDIR.value).expanduser())
    except Preempted as told:
        log.warning("%s", told.message)
        raise
    except (ValueError, TypeError, OSError, NonFiniteError) as error:
        log.debug("Failed.", exc_info=True)
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
