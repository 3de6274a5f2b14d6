"""Qwen2-VL's way with images: nearly their own size, in tiles of one token each.

An image is resized to a multiple of the tile on both sides, within bounds of its area (`smart_resize` of
QwenLM/Qwen2-VL). Its tiles come grouped in the windows that the vision tower attends in: every `window_tiles` ** 2 places
of the result hold whole windows only, so that the tower cuts them apart by a reshape. Windows at the right and lower edge
are smaller; several share a group, and places that stay empty are marked.
"""

import dataclasses
import functools
import math

import numpy as np
import PIL.Image
from jaxtyping import Int

from unifusion_jax.encoders.tiling import Cut, check_levels, normalise, to_rgb

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_ASPECT = 200  # of the published rule


@dataclasses.dataclass(frozen=True)
class NativeConfig:
    """How images are sized and cut.

    Attributes:
      tile_px: side of the square that becomes one token.
      window_tiles: side of the vision tower's windows.
      min_area_px: smaller images are enlarged to about this many pixels.
      max_area_px: larger ones are reduced to at most this many.
      mean: per channel, of values in [0, 1].
      std: per channel.
    """

    tile_px: int = 28
    window_tiles: int = 4
    min_area_px: int = 56 * 56
    max_area_px: int = 28 * 28 * 1280
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    has_grid = True

    def __post_init__(self):
        if self.tile_px < 1 or self.window_tiles < 1:
            raise ValueError(f"tile_px and window_tiles must be positive, got {self.tile_px} and {self.window_tiles}.")
        if not 1 <= self.min_area_px <= self.max_area_px or self.max_area_px < self.tile_px**2:
            raise ValueError(
                "Expected 1 <= min_area_px <= max_area_px and room for one tile, got "
                f"{self.min_area_px} and {self.max_area_px} with tile_px={self.tile_px}."
            )
        check_levels(self.mean, self.std)

    @property
    def max_tiles(self) -> int:
        """Most tiles of one image."""
        return self.max_area_px // self.tile_px**2

    def with_max_tiles(self, max_tiles: int | None) -> "NativeConfig":
        """Returns this configuration with another bound on the tiles of an image; None changes nothing."""
        if max_tiles is None:
            return self
        if max_tiles < 1:
            raise ValueError(f"Expected max_tiles >= 1, got {max_tiles}.")
        area = max_tiles * self.tile_px**2
        return dataclasses.replace(self, max_area_px=area, min_area_px=min(self.min_area_px, area))

    def grid(self, width_px: int, height_px: int) -> tuple[int, int]:
        """Returns the (columns, rows) of tiles that an image of this size becomes.

        Equals the published rule where that keeps its own bound; else (thin strips, bounds that nearly meet) the image is
        made smaller.

        Raises:
          ValueError: one side is more than 200 times the other.
        """
        aspect = max(width_px, height_px) / min(width_px, height_px)
        if aspect > _MAX_ASPECT:
            raise ValueError(
                f"An image of {width_px} x {height_px} px has an aspect ratio of {aspect:.0f}, this model takes at most "
                f"{_MAX_ASPECT}. Crop it."
            )
        sides, tile = (width_px, height_px), self.tile_px
        columns, rows = (round(side / tile) for side in sides)
        if columns * rows * tile**2 < self.min_area_px:
            grow = math.sqrt(self.min_area_px / (width_px * height_px))
            columns, rows = (math.ceil(side * grow / tile) for side in sides)
        if columns * rows * tile**2 > self.max_area_px:
            shrink = math.sqrt(width_px * height_px / self.max_area_px)
            # No side falls below one tile, which leaves the other side of a thin strip too long.
            columns, rows = (min(max(1, math.floor(side / shrink / tile)), self.max_tiles) for side in sides)
        return columns, rows

    def cut(self, image: PIL.Image.Image) -> Cut:
        """Sizes and cuts an image; the tiles that exist are bit-equal to the published PIL pipeline's."""
        image = to_rgb(image)
        tile = self.tile_px
        columns, rows = self.grid(*image.size)
        resized = np.asarray(image.resize((columns * tile, rows * tile), PIL.Image.Resampling.BICUBIC))
        cells = resized.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
        places = pack_windows(columns, rows, self.window_tiles)
        exists = places[:, 0] >= 0
        pixels = np.zeros((len(places), tile, tile, 3), np.float32)
        pixels[exists] = normalise(cells[places[exists, 0], places[exists, 1]], self.mean, self.std)
        return Cut(pixels, (columns * rows,), places)


@functools.lru_cache(maxsize=256)
def pack_windows(columns: int, rows: int, window_tiles: int) -> Int[np.ndarray, "places 2"]:
    """Lays the tiles of an image out in groups of `window_tiles` ** 2 places that hold whole windows only.

    Returns:
      Row and column of the tile in each place, -1 in empty ones. Windows are packed largest first, each into the first
      group with room, which leaves few places empty.
    """
    size = window_tiles**2
    windows = [
        [(row, column) for row in range(top, min(top + window_tiles, rows)) for column in range(left, right)]
        for top in range(0, rows, window_tiles)
        for left in range(0, columns, window_tiles)
        for right in [min(left + window_tiles, columns)]
    ]
    groups = [window for window in windows if len(window) == size]
    open_groups: list[list[tuple[int, int]]] = []
    for window in sorted((window for window in windows if len(window) < size), key=len, reverse=True):
        group = next((group for group in open_groups if len(group) + len(window) <= size), None)
        if group is None:
            open_groups.append(list(window))
        else:
            group.extend(window)
    places = np.full((len(groups) + len(open_groups), size, 2), -1, np.int32)
    for place, group in zip(places, groups + open_groups, strict=True):
        place[: len(group)] = group
    return places.reshape(-1, 2)
