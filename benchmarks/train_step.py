"""Time of a training step of a config, without data loading: prints one JSON line.

python benchmarks/train_step.py --config=configs/demo.py
python benchmarks/train_step.py --config=configs/demo.py --memory=default     (what glibc does by itself, CPU only)
"""

import argparse
import json
import resource
import runpy
import time

import jax

from unifusion_jax.config import from_mapping
from unifusion_jax.parallel.host_memory import keep_freed_blocks
from unifusion_jax.parallel.mesh import make_mesh
from unifusion_jax.parallel.sharding import global_batch
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.optimizer import make_optimizer
from unifusion_jax.training.rng import stream_key
from unifusion_jax.training.state import create_state, state_shardings
from unifusion_jax.training.step import compiled_train_step
from unifusion_jax.training.tasks import make_task


def main() -> None:
    """Compiles the step for the first batch of the data, then runs it again and again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.py", help="config file, with :argument where it takes one")
    parser.add_argument("--steps", type=int, default=20, help="measured steps (default 20)")
    parser.add_argument(
        "--memory", choices=("keep", "default"), default="keep", help="keep freed blocks, as train does"
    )
    options = parser.parse_args()
    if options.memory == "keep":
        keep_freed_blocks()
    file, _, argument = options.config.partition(":")
    config = from_mapping(TrainConfig, runpy.run_path(file)["get_config"](*([argument] if argument else [])))
    mesh = make_mesh(config.mesh)
    task = make_task(config, mesh)
    tx = make_optimizer(config.optimizer, config.total_steps)
    names = ["loss", "grad_norm", *task.metric_names]

    def init(key):
        return create_state(task.init(key), tx, config.ema_decay > 0, names)

    key = stream_key(config.seed, "init")
    shardings = state_shardings(jax.eval_shape(init, key), task.param_shardings, mesh)
    state = jax.jit(init, out_shardings=shardings)(key)
    step = compiled_train_step(task, tx, config, shardings)
    with task.batches() as batches:
        batch = next(batches)
    arguments = (task.frozen, global_batch(batch.data, mesh), task.static(batch.bucket))
    times_s = []
    for _ in range(options.steps + 3):
        started = time.perf_counter()
        state = jax.block_until_ready(step(state, *arguments))
        times_s.append(time.perf_counter() - started)
    measured = sorted(times_s[3:])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "config": options.config,
                "bucket": batch.bucket.task,
                "memory": options.memory,
                "compile_and_first_step_s": times_s[0],
                "median_step_s": measured[len(measured) // 2],
                "best_step_s": measured[0],
                "images_per_s": config.batch_size / measured[len(measured) // 2],
                "peak_rss_gib": usage.ru_maxrss / 2**20,
                "system_share_of_cpu_time": usage.ru_stime / (usage.ru_stime + usage.ru_utime),
                "device": str(jax.devices()[0]),
            }
        )
    )


if __name__ == "__main__":
    main()
