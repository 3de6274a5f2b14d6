"""What every analysis takes and gives: options in; a table and a way to draw it out, written as CSV and PNG."""

import csv
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float

from unifusion_jax.data.shapes.source import ShapesSource, evaluation_prompts
from unifusion_jax.prompt import DEFAULT_GUIDANCE

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What analyses look at and how they draw; each reads what it needs.

    Attributes:
      prompts: prompts to analyse; empty takes held-out ones of the built-in world.
      images: pictures to reconstruct; empty takes held-out ones of the built-in world.
      count: prompts or pictures taken of the built-in world, and scored prompts.
      seed: of noise and of the built-in world.
      steps: solver steps.
      guidance: guidance scale.
    """

    prompts: tuple[str, ...] = ()
    images: tuple[PIL.Image.Image, ...] = ()
    count: int = 4
    seed: int = 0
    steps: int = 20
    guidance: float = DEFAULT_GUIDANCE

    def __post_init__(self):
        if self.count < 1 or self.steps < 1:
            raise ValueError(f"count and steps must be 1 or more, got {self.count} and {self.steps}.")

    def chosen_prompts(self) -> list[str]:
        """Returns the prompts, or held-out ones."""
        return list(self.prompts) or [words for words, _, _ in evaluation_prompts(self.count, seed=self.seed)]

    def chosen_images(self, size_px: int) -> list[PIL.Image.Image]:
        """Returns the pictures at a square size, or held-out ones."""
        if self.images:
            return [image.convert("RGB").resize((size_px, size_px)) for image in self.images]
        source = ShapesSource("reconstruction", split="held_out", seed=self.seed, size_px=size_px)
        return [PIL.Image.fromarray(np.asarray(source[index].image)) for index in range(self.count)]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A table, and what draws it.

    Attributes:
      rows: the table, one mapping a line, all with the same keys.
      draw: draws on a matplotlib `Axes`; None where `image` is the picture.
      image: a picture that needs no axes, such as a grid of generated ones.
      size_inches: width and height of the drawing.
    """

    rows: Sequence[Row]
    draw: Callable[[Any], None] | None = None
    image: PIL.Image.Image | None = None
    size_inches: tuple[float, float] = (7.0, 4.5)

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Writes `name`.png and `name`.csv and returns both. Raises ImportError where matplotlib is needed and missing."""
        folder.mkdir(parents=True, exist_ok=True)
        picture, table = folder / f"{name}.png", folder / f"{name}.csv"
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        if self.image is not None:
            self.image.save(picture)
        elif self.draw is not None:
            check_drawing()
            import matplotlib.figure

            sheet = matplotlib.figure.Figure(figsize=self.size_inches, layout="constrained")
            self.draw(sheet.add_subplot())
            sheet.savefig(picture, dpi=130)
        return picture, table


def check_drawing() -> None:
    """Raises ImportError, saying what to install, when figures cannot be drawn; call it before long work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("Figures are drawn by matplotlib: pip install 'unifusion_jax[analysis]'.") from error


def heatmap(
    axes: Any,
    values: Float[np.ndarray, "rows columns"],
    *,
    row_labels: Sequence[Any],
    column_labels: Sequence[Any],
    x: str,
    y: str,
    title: str,
) -> None:
    """Draws a matrix with its scale; the first row is at the top."""
    shown = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.figure.colorbar(shown, ax=axes)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.set_xticks(range(len(column_labels)), [str(label) for label in column_labels], rotation=90, fontsize=7)
    axes.set_yticks(range(len(row_labels)), [str(label) for label in row_labels], fontsize=7)


def bars(
    axes: Any, labels: Sequence[str], values: Sequence[float], errors: Sequence[float], *, y: str, title: str
) -> None:
    """Draws bars with error bars of one standard error."""
    axes.bar(range(len(labels)), values, yerr=errors, capsize=4)
    axes.set_xticks(range(len(labels)), labels, rotation=20)
    axes.set(ylabel=y, title=title)


def share_error(share: float, count: int) -> float:
    """Returns the standard error of a share of `count` independent trials."""
    return float(np.sqrt(max(share * (1 - share), 0.0) / count))
