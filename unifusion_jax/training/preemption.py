"""Ending early on SIGTERM, which is how preemptible TPUs, Kubernetes, Slurm and Docker announce the end of a machine."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from orbax.checkpoint import multihost

from unifusion_jax.parallel.hosts import EXIT_PREEMPTED


class Preempted(SystemExit):
    """The run was told to end, and its state is saved. Ends the program with EXIT_PREEMPTED."""

    def __init__(self, step: int, workdir: Path):
        super().__init__(EXIT_PREEMPTED)
        self.message = f"Told to end: saved step {step} in {workdir}. The same command goes on from there."


class Preemption:
    """Whether the run has been told to end. A context manager, since one process catches the signal only inside of it.

    With many hosts, JAX's preemption service spreads the notice of any of them and makes them agree on a step.
    """

    def __init__(self) -> None:
        self._told = False
        self._before: Any = None
        alone = not multihost.is_jax_distributed_client_initialized()
        self._catches = alone and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Preemption":
        if self._catches:
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        if self._catches:
            signal.signal(signal.SIGTERM, self._before)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def reached(self, step: int) -> bool:
        """Whether to save after this step and end. Ask after every step, on every host."""
        return self._told or (jax.process_count() > 1 and multihost.reached_preemption(step))
