"""NaN and infinity in loss, gradient or update: found without waiting for any step, told with the step and its records."""

import json
import logging
import math
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from unifusion_jax.data.pipeline import Batch

log = logging.getLogger(__name__)

BAD_FOLDER = "bad_batches"
# What `make_train_step` returns of a step beside the state.
MEASURES = ("loss", "grad_norm", "update_norm")
_MOST_IN_A_ROW = 10

Policy = Literal["stop", "skip"]


class NonFiniteError(RuntimeError):
    """The loss, the gradient or the update became NaN or infinite."""


class Health:
    """Watches the measures of every step.

    They stay on the device until `check`, which is called where the host waits for the device anyway. Until then a bad step has
    done no harm: the train step leaves out updates that are not finite.

    Args:
      workdir: record ids of bad batches go to its `bad_batches/`.
      policy: "stop" raises at the first bad step; "skip" goes on without it, unless ten come in a row.
    """

    def __init__(self, workdir: Path, policy: Policy):
        self._folder = workdir / BAD_FOLDER
        self._policy: Policy = policy
        self._noted: list[tuple[int, Batch, jax.Array]] = []
        self._skipped = self._in_a_row = 0

    def note(self, step: int, batch: Batch, measures: jax.Array) -> None:
        """Keeps a step's measures (a device array that may not be computed yet) and where its records came from."""
        self._noted.append((step, batch._replace(data=None), measures))

    def check(self) -> None:
        """Looks at the steps noted since the last check.

        Raises:
          NonFiniteError: names the steps among which it happened, the first bad one, and the file with its record ids.
        """
        noted, self._noted = self._noted, []
        values = jax.device_get([measures for _, _, measures in noted])
        for (step, batch, _), measured in zip(noted, values, strict=True):
            if np.isfinite(measured).all():
                self._in_a_row = 0
                continue
            self._skipped += 1
            self._in_a_row += 1
            file = self._write(step, batch, dict(zip(MEASURES, map(float, measured), strict=True)))
            name, value = next((n, v) for n, v in zip(MEASURES, measured, strict=True) if not math.isfinite(v))
            told = f"{name} became {value} somewhere within steps [{noted[0][0]}, {noted[-1][0]}], first at step {step}"
            if self._policy == "stop" or self._in_a_row >= _MOST_IN_A_ROW:
                raise NonFiniteError(
                    f"{told}, {self._in_a_row} in a row. The records of that batch are listed in {file}; the last checkpoint is "
                    "untouched. Lower optimizer.learning_rate or optimizer.clip_norm, mend the records, or set "
                    "on_nonfinite=skip to go on without such batches, and restart."
                )
            log.warning("%s; skipped. Its records: %s", told, file)

    def counts(self) -> dict[str, float | None]:
        """Returns what is logged: how many steps were skipped since the last call, where they may be."""
        skipped, self._skipped = self._skipped, 0
        return {"skipped_steps": skipped} if self._policy == "skip" else {}

    def _write(self, step: int, batch: Batch, measured: dict[str, float]) -> Path:
        """Writes this host's records of the batch; NaN and infinity as words, which JSON can hold."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"step_{step:08d}_process_{jax.process_index()}.json"
        words = {name: value if math.isfinite(value) else str(value) for name, value in measured.items()}
        content: dict[str, Any] = {"step": step, **words, "stream": batch.stream, "records": list(batch.ids)}
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return file
