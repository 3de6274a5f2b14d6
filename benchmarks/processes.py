"""What the benchmarks share: a command line, fresh processes that measure one thing each, the words for the machine.

The measuring process must be small: on Linux a child's ru_maxrss starts at the memory of the process it was forked from. So
nothing but the standard library is imported here.
"""

import argparse
import ctypes
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Tasks = Mapping[str, Callable[..., dict[str, Any]]]


def option_parser(documentation: str | None) -> argparse.ArgumentParser:
    """Returns a parser whose --help shows a benchmark's documentation as it stands."""
    return argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)


def main(
    parser: argparse.ArgumentParser,
    tasks: Tasks,
    compare: Callable[[argparse.Namespace], dict[str, Any]],
    *,
    repeats: int,
    rounds: int | None = 2,
) -> None:
    """Runs a benchmark's command line: prints one JSON object on one line.

    Args:
      parser: of the benchmark's own options; those of the measurement are added here.
      tasks: what a measuring process does, by name; the keyword arguments are those of `measure`.
      compare: starts the measuring processes as the options say, and returns what is printed.
      repeats: default of --repeats.
      rounds: default of --rounds; None for a benchmark whose processes measure once each, which --repeats counts.
    """
    if rounds is None:
        counted = "processes of each kind, in turn; the fastest counts"
    else:
        counted = "measured runs a process, after one to warm up"
        help = f"processes a side, in turn; the best one counts (default {rounds})"
        parser.add_argument("--rounds", type=int, default=rounds, help=help)
    parser.add_argument("--repeats", type=int, default=repeats, help=f"{counted} (default {repeats})")
    parser.add_argument("--task", choices=sorted(tasks), help="internal: what a measuring process does")
    parser.add_argument("--settings", default="{}", help="internal: its arguments as JSON")
    arguments = parser.parse_args()
    found = tasks[arguments.task](**json.loads(arguments.settings)) if arguments.task else compare(arguments)
    print(json.dumps(found))


def measure(
    script: str, task: str, settings: dict[str, Any], *, platform_name: str | None = None, verbose: bool = False
) -> dict[str, Any]:
    """Runs `script --task=... --settings=...` in a fresh process and returns the JSON object of its last line.

    Raises RuntimeError with the end of its error output when it fails; with `verbose` that output is shown as it comes.
    """
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    if platform_name is not None:
        environment["JAX_PLATFORMS"] = platform_name
    done = subprocess.run(
        [sys.executable, script, f"--task={task}", f"--settings={json.dumps(settings)}"],
        env=environment, stdout=subprocess.PIPE, stderr=None if verbose else subprocess.PIPE, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{task} failed with status {done.returncode}:\n{(done.stderr or '')[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_turn(
    script: str,
    settings: Mapping[str, dict[str, Any]],
    rounds: int,
    *,
    platforms: Mapping[str, str | None] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Measures tasks in turn, so that a busy spell of the machine meets them all.

    Args:
      script: the benchmark.
      settings: by task.
      rounds: how often each is measured.
      platforms: JAX_PLATFORMS by task.

    Returns:
      For each task what its processes found.
    """
    runs: dict[str, list[dict[str, Any]]] = {task: [] for task in settings}
    for _ in range(rounds):
        for task, found in runs.items():
            found.append(measure(script, task, settings[task], platform_name=(platforms or {}).get(task)))
    return runs


def jax_platforms(device: str) -> dict[str, str | None]:
    """Returns `platforms` of `in_turn` for our side, on "cpu" or "gpu"; torch is told by its own means."""
    return {"ours": "cuda" if device == "gpu" else "cpu"}


def peak_bytes() -> int:
    """Returns the most memory this process has held (resident set)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine() -> dict[str, Any]:
    """Describes the machine, for the line that a benchmark prints."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)}


class HostMemory:
    """Resident memory of this process (Linux): between steps, at the peak of the measured ones, and of all."""

    def __init__(self) -> None:
        self.idle = self.running = self.whole = 0

    def restart(self) -> None:
        """Forgets the peak so far, that of loading and compiling."""
        self.whole = peak_bytes()
        ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps of freed memory is not held by either side
        self.idle = self._field("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

    def stop(self) -> None:
        """Notes the peak since `restart`."""
        self.running = self._field("VmHWM")

    def report(self) -> dict[str, int]:
        """Returns bytes held between steps, at the peak of the measured ones, and of the whole process."""
        whole = max(self.whole, self.running)
        return {"idle_bytes": self.idle, "running_bytes": self.running, "peak_bytes": whole}

    @staticmethod
    def _field(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
