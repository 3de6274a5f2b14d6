"""What trainings logged: their losses over the steps, one line each."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unifusion_jax.analysis.figure import Figure


def losses(workdirs: Sequence[Path], quantity: str = "loss") -> Figure:
    """Draws a logged quantity (of `metrics.jsonl`) of one or more trainings.

    Raises ValueError for a folder that holds no training, or a training that never logged the quantity.
    """
    rows = [row for workdir in workdirs for row in _logged(workdir, quantity)]

    def draw(axes: Any) -> None:
        for run in dict.fromkeys(row["run"] for row in rows):
            mine = [row for row in rows if row["run"] == run]
            axes.plot([row["step"] for row in mine], [row["value"] for row in mine], label=run)
        axes.set(xlabel="step", ylabel=quantity, title=quantity.replace("_", " "))
        axes.set_yscale("log" if all(row["value"] > 0 for row in rows) else "linear")
        axes.grid(alpha=0.3, which="both")
        axes.legend()

    return Figure(rows, draw)


def _logged(workdir: Path, quantity: str) -> list[dict[str, Any]]:
    """Returns the rows of one training."""
    file = workdir / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{workdir} holds no training: there is no {file.name} in it.")
    logged = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [
        {"run": workdir.name, "step": entry["step"], "value": entry[quantity]}
        for entry in logged
        if entry.get(quantity) is not None
    ]
    if not rows:
        names = sorted({name for entry in logged for name in entry} - {"step"})
        raise ValueError(f"{file} never logged {quantity!r}; it has {', '.join(names) or 'nothing yet'}.")
    return rows
