"""A run killed at random moments against one left alone: are the final parameters the same, bit for bit?

    python benchmarks/kills.py --config=configs/demo.py --kills=20
    python benchmarks/kills.py --config=configs/demo.py --kills=2 -- --config.total_steps=8 --config.checkpoint.every_steps=2

Trains a config undisturbed, then again in another folder with a SIGKILL at each of so many random moments, the last attempt
to its end. What follows -- goes to both trainings. Prints one JSON object on one
line:

    identical      whether every exported tensor has the same bytes
    same_metrics   whether both logged the same numbers, times aside
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import processes
from processes import machine

_TIMES = ("images_per_s", "step_time_s", "data_wait_s", "mfu")


def command(config: str, workdir: Path, more: list[str]) -> list[str]:
    """Returns the command of a training."""
    return [sys.executable, "-m", "unifusion_jax.train", f"--config={config}", f"--workdir={workdir}", *more]


def start(words: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """Starts a training."""
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    """Waits for a training's end. Raises RuntimeError with the end of its output where it fails."""
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the training failed with status {process.returncode}:\n{said[-4000:]}")


def kill(process: subprocess.Popen[str], workdir: Path, lines: int, after_s: float) -> None:
    """Kills a training some time after it has logged so many lines."""
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < lines:
        if process.poll() is not None:
            finish(process)
            raise RuntimeError("the run was done before it was killed; take a longer one")
        time.sleep(0.01)
    time.sleep(after_s)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def logged(workdir: Path) -> list[dict[str, Any]]:
    """Returns the logged numbers without times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in _TIMES} for line in lines]


def main() -> None:
    """Parses the command line and prints the result."""
    parser = processes.option_parser(__doc__)
    parser.add_argument("--config", default="configs/demo.py", help="config file (default configs/demo.py)")
    parser.add_argument("--kills", type=int, default=20, help="kills of the second run (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("more", nargs="*", help="arguments for both trainings, after --")
    options = parser.parse_args()
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    folder = Path(tempfile.mkdtemp(prefix="unifusion-kills-"))
    alone, killed = folder / "alone", folder / "killed"
    try:
        started = time.perf_counter()
        finish(start(command(options.config, alone, options.more), environment))
        whole_s = time.perf_counter() - started
        expected = logged(alone)
        steps = [line for line in expected if "loss" in line]
        moments = random.Random(options.seed)
        words = command(options.config, killed, options.more)
        for lines in sorted(moments.randrange(len(steps)) for _ in range(options.kills)):
            kill(start(words, environment), killed, lines, moments.uniform(0, whole_s / len(steps)))
        finish(start(words, environment))
        file = Path("export") / "model.safetensors"
        found = {
            "benchmark": "kills",
            "config": options.config,
            "kills": options.kills,
            "identical": (alone / file).read_bytes() == (killed / file).read_bytes(),
            "same_metrics": logged(killed) == expected,
            "undisturbed_s": round(whole_s, 1),
            "machine": machine(),
        }
    finally:
        shutil.rmtree(folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
