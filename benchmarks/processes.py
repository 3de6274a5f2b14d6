"""What the benchmarks share: fresh processes that measure one thing each, and the words for the machine.

The measuring process must be small: on Linux a child's ru_maxrss starts at the memory of the process it was forked from. So
nothing but the standard library is imported here.
"""

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any


def measure(script: str, task: str, settings: dict[str, Any], *, platform_name: str | None = None) -> dict[str, Any]:
    """Runs `script --task=... --settings=...` in a fresh process and returns the JSON object of its last line.

    Raises RuntimeError with the end of its error output when it fails.
    """
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    if platform_name is not None:
        environment["JAX_PLATFORMS"] = platform_name
    done = subprocess.run(
        [sys.executable, script, f"--task={task}", f"--settings={json.dumps(settings)}"],
        env=environment, stdout=subprocess.PIPE, stderr=None if settings.get("verbose") else subprocess.PIPE, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{task} failed with status {done.returncode}:\n{(done.stderr or '')[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


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
