"""Where numbers go: `metrics.jsonl` (one object per logged step), TensorBoard events and the log."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image
from clu import metrics as clu_metrics

from unifusion_jax.parallel.chips import peak_flops
from unifusion_jax.training.state import Metrics

METRICS_FILE = "metrics.jsonl"


def averages(sums: Metrics) -> dict[str, float | None]:
    """Turns running [sum, weight] pairs into means; None where nothing was counted."""
    means = {}
    for name, pair in jax.device_get(sums).items():
        mean = clu_metrics.Average(total=pair[0], count=pair[1])  # pyright: ignore[reportCallIssue] (a flax dataclass)
        means[name] = float(mean.compute()) if pair[1] else None
    return means


class MetricWriter:
    """Writes metrics of the first process; the other processes write nothing."""

    def __init__(self, workdir: Path, *, start_step: int):
        self._file = None
        self._events = None
        if jax.process_index() == 0:
            from tensorboardX import SummaryWriter

            workdir.mkdir(parents=True, exist_ok=True)
            path = workdir / METRICS_FILE
            _drop_after(path, start_step)
            self._file = path.open("a")
            # Events after `start_step` are of the interrupted attempt; TensorBoard hides them.
            self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: dict[str, float | None]) -> None:
        """Writes one line of numbers; NaN and infinity become null, which JSON can hold."""
        if self._file is None or self._events is None:
            return
        clean = {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()
        for name, value in clean.items():
            if value is not None:
                self._events.add_scalar(name, value, step)

    def write_image(self, step: int, name: str, image: PIL.Image.Image) -> None:
        """Adds a picture to the TensorBoard events."""
        if self._events is not None:
            self._events.add_image(name, np.asarray(image), step, dataformats="HWC")

    def sync(self) -> None:
        """Has the lines written where they outlive this machine: a mounted bucket gets them when it is told to."""
        if self._file is not None and self._events is not None:
            os.fsync(self._file.fileno())
            self._events.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None and self._events is not None:
            self._file.close()
            self._events.close()


def _drop_after(path: Path, step: int) -> None:
    """Cuts lines that an interrupted attempt logged after the checkpoint it is resumed from.

    A step's first line is written before its checkpoint, a second one (final scores) after it.
    """
    if not path.exists():
        return
    kept, last = [], -1
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break  # the process was killed while writing this line
        if entry["step"] > step or entry["step"] == last == step:
            break
        kept.append(line + "\n")
        last = entry["step"]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


class Stopwatch:
    """Time of the training itself: pauses for previews and saves are taken out.

    Attributes:
      since: `time.perf_counter()` when the interval began.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Starts a new interval."""
        self.since = time.perf_counter()
        self._paused_s = 0.0
        self._data_wait_s = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        since = time.perf_counter()
        yield
        self._data_wait_s += time.perf_counter() - since

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Takes the time inside out of the interval."""
        since = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - since

    def rates(self, steps: int, batch_size: int, flops_per_sample: float | None) -> dict[str, Any]:
        """Returns step time, data wait (seconds per step), images per second and model FLOPs utilisation."""
        step_time_s = (time.perf_counter() - self.since - self._paused_s) / steps
        peak = peak_flops(jax.devices()[0])
        mfu = None
        if peak and flops_per_sample:
            mfu = flops_per_sample * batch_size / step_time_s / (peak * jax.device_count())
        return {
            "images_per_s": batch_size / step_time_s,
            "step_time_s": step_time_s,
            "data_wait_s": self._data_wait_s / steps,
            "mfu": mfu,
        }
