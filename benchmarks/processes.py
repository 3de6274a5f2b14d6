"""What the benchmarks share: fresh processes that measure one thing each, and the words for the machine.

The measuring process must be small: on Linux a child's ru_maxrss starts at the memory of the process it was forked from. So
nothing but the standard library is imported here.
"""

import ctypes
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
