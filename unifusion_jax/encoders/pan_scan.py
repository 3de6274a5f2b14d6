"""Gemma 3's way with images: the whole image stretched to one square tile and, if asked for, crops of long images.

Pan and scan cuts an image that is clearly longer than wide into crops along its long side, each its own tile. It is off
unless the folder's processor settings turn it on. Source: transformers' Gemma 3 processor.
"""

import dataclasses
import math

import numpy as np
import PIL.Image

from unifusion_jax.encoders.tiling import Cut, check_levels, normalise, to_rgb

_RESAMPLING = PIL.Image.Resampling.BILINEAR


@dataclasses.dataclass(frozen=True)
class PanScanConfig:
    """How images are stretched and cut.

    Attributes:
      tile_px: side of a tile.
      enabled: whether long images are also cut into crops.
      min_crop_px: crops with a shorter side are not made.
      max_crops: most crops of an image.
      min_aspect: least ratio of the long to the short side for crops.
      mean: per channel, of values in [0, 1].
      std: per channel.
    """

    tile_px: int = 896
    enabled: bool = False
    min_crop_px: int = 256
    max_crops: int = 4
    min_aspect: float = 1.2
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    has_grid = False

    def __post_init__(self):
        if self.tile_px < 1:
            raise ValueError(f"tile_px must be positive, got {self.tile_px}.")
        if not 0 <= self.max_crops <= self.min_crop_px:
            raise ValueError(f"Expected 0 <= max_crops <= min_crop_px, got {self.max_crops} and {self.min_crop_px}.")
        check_levels(self.mean, self.std)

    def with_max_tiles(self, max_tiles: int | None) -> "PanScanConfig":
        """Returns this configuration with another bound on the crops of an image, the whole image not counted."""
        if max_tiles is None:
            return self
        if max_tiles < 1:
            raise ValueError(f"Expected max_tiles >= 1, got {max_tiles}.")
        return dataclasses.replace(self, max_crops=max_tiles)

    def crops(self, width_px: int, height_px: int) -> list[tuple[int, int, int, int]]:
        """Returns the crops of an image of this size, (left, upper, right, lower), from its beginning to its end."""
        long, short = max(width_px, height_px), min(width_px, height_px)
        if not self.enabled or long / short < self.min_aspect:
            return []
        count = min(math.floor(long / self.min_crop_px), math.floor(long / short + 0.5))
        count = min(self.max_crops, max(2, count))
        if count < 2:
            return []
        step = math.ceil(long / count)
        if min(step, short) < self.min_crop_px:
            return []
        spans = [(start, min(start + step, long)) for start in range(0, count * step, step)]
        if width_px >= height_px:
            return [(start, 0, end, height_px) for start, end in spans]
        return [(0, start, width_px, end) for start, end in spans]

    def cut(self, image: PIL.Image.Image) -> Cut:
        """Returns the whole image and its crops, each a run of its own; bit-equal to the published PIL pipeline."""
        image = to_rgb(image)
        parts = [image, *(image.crop(box) for box in self.crops(*image.size))]
        size = (self.tile_px, self.tile_px)
        stretched = np.stack([np.asarray(part.resize(size, _RESAMPLING)) for part in parts])
        return Cut(normalise(stretched, self.mean, self.std), (1,) * len(parts))
