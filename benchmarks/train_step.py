"""Time of a training step of a config, without data loading: prints one JSON line.

`median_host_s` is what a step costs the host: handing the batch to the devices and the step to XLA, until Python goes on. It is
hidden behind the device's work as long as that takes longer.

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
from unifusion_jax.training.program import make_program
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
    program = make_program(task, config, mesh)
    state = program.first_state(config.seed)
    with task.batches() as batches:
        batch = next(batches)
    times_s, host_s = [], []
    for _ in range(options.steps + 3):
        started = time.perf_counter()
        state, _ = program.step(state, task.frozen, global_batch(batch.data, mesh), task.static(batch.bucket))
        host_s.append(time.perf_counter() - started)
        jax.block_until_ready(state)
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
                "median_host_s": sorted(host_s[3:])[options.steps // 2],
                "images_per_s": config.batch_size / measured[len(measured) // 2],
                "peak_rss_gib": usage.ru_maxrss / 2**20,
                "system_share_of_cpu_time": usage.ru_stime / (usage.ru_stime + usage.ru_utime),
                "device": str(jax.devices()[0]),
            }
        )
    )


if __name__ == "__main__":
    main()
