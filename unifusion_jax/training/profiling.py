"""A profiler trace of some steps, for XProf or Perfetto."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Which steps to trace.

    Attributes:
      first_step: the first traced step; not before the third of a process, the first two compile.
      steps: number of steps; 0 traces none.
    """

    first_step: int = 10
    steps: int = 0

    def __post_init__(self):
        if self.first_step < 1 or self.steps < 0:
            raise ValueError(
                f"profile.first_step must be at least 1 and profile.steps 0 or more, got {self.first_step} and {self.steps}."
            )


class Profiler:
    """Writes `workdir/profile/`, one trace per host. A context manager: a run that ends early ends its trace."""

    def __init__(self, config: ProfileConfig, workdir: Path):
        self._steps = range(config.first_step, config.first_step + config.steps)
        self._folder = workdir / "profile"
        self._running = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def step(self, step: int, state: Any) -> jax.profiler.StepTraceAnnotation:
        """Starts or ends the trace before this step, and returns what marks the step in it.

        `state` is what the step before returned: the trace waits for it, so that it holds the named steps and no others.
        """
        if (step in self._steps) != self._running:
            jax.block_until_ready(state)
            if self._running:
                self._stop()
            else:
                jax.profiler.start_trace(str(self._folder))
                self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            log.info("Trace of steps %d to %d: %s", self._steps[0], self._steps[-1], self._folder)
