"""Static shapes: every batch is of one bucket, so that each compiled step is reused.

A bucket fixes the image size and, through its task's token budget, the condition's size. Image sizes share one area
budget: the same cost per step whatever the aspect ratio.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

from unifusion_jax.data import records


@dataclasses.dataclass(frozen=True)
class Budget:
    """The most of each that a task's rows may hold; rows are padded up to it.

    Attributes:
      max_tokens: chat tokens of the encoder's input, image tokens included.
      max_tiles: image tiles of all reference images together (0: the task has no images).
      max_kept_tokens: condition tokens that reach the DiT.
    """

    max_tokens: int
    max_tiles: int
    max_kept_tokens: int

    def __post_init__(self):
        if self.max_tokens < 1 or self.max_tiles < 0:
            raise ValueError(f"a budget needs max_tokens >= 1 and max_tiles >= 0, got {self}")
        if not 1 <= self.max_kept_tokens <= self.max_tokens:
            raise ValueError(f"a budget needs 1 <= max_kept_tokens <= max_tokens, got {self}")


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """The static shapes of a batch: task, image size and token budget."""

    task: str
    height_px: int
    width_px: int
    max_tokens: int
    max_tiles: int
    max_kept_tokens: int


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The set of buckets of a run.

    Attributes:
      budgets: for each task that the run may use, its token budget.
      area_px: the most pixels an image may have (96 * 96 for the demo, 1024 * 1024 for the final model).
      multiple_of_px: sides are multiples of this: the autoencoder's downsampling times the DiT's patch.
      max_aspect: the longest side over the shortest; 1.0 gives one square bucket.
    """

    budgets: Mapping[str, Budget]
    area_px: int
    multiple_of_px: int = 16
    max_aspect: float = 2.0

    def __post_init__(self):
        unknown = sorted(set(self.budgets) - set(records.TASKS))
        if unknown or not self.budgets:
            raise ValueError(f"budgets name the tasks {unknown}; expected some of {', '.join(records.TASKS)}")
        if self.multiple_of_px < 1 or self.area_px < self.multiple_of_px**2:
            raise ValueError(
                f"area_px={self.area_px} holds no image whose sides are multiples of {self.multiple_of_px} px; "
                f"expected at least {self.multiple_of_px**2}"
            )
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect is longest side / shortest side, so at least 1; got {self.max_aspect}")

    @functools.cached_property
    def sizes_px(self) -> tuple[tuple[int, int], ...]:
        """The (height, width) of every aspect ratio, narrowest first: for each height the widest within the area."""
        unit = self.multiple_of_px
        cells = self.area_px // unit**2
        side = math.isqrt(cells)
        # Upright sizes: each width up to the square's side with the greatest height; turned, the landscape ones.
        upright = {(cells // width, width) for width in range(1, side + 1)}
        upright = {(height, width) for height, width in upright if height / width <= self.max_aspect}
        upright.add((side, side))
        sizes = upright | {(width, height) for height, width in upright}
        return tuple(sorted(((height * unit, width * unit) for height, width in sizes), key=_aspect))

    def assign(self, task: str, height_px: int, width_px: int) -> Bucket:
        """The bucket of an image of this size: the nearest aspect ratio, on a logarithmic scale.

        Raises:
          ValueError: the run has no budget for the task.
        """
        if task not in self.budgets:
            raise ValueError(
                f"there is no token budget for the task {task!r}; got budgets for {', '.join(sorted(self.budgets))}. "
                "Add one to the data configuration, or leave the task out of the source's tasks"
            )
        aspect = math.log(width_px / height_px)
        nearest = min(self.sizes_px, key=lambda size: (abs(math.log(_aspect(size)) - aspect), size))
        return Bucket(task, *nearest, **dataclasses.asdict(self.budgets[task]))


def _aspect(size_px: tuple[int, int]) -> float:
    return size_px[1] / size_px[0]
