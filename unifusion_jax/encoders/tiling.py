"""How images become square tiles; and InternVL's way, dynamic tiling: tiles of one size, and a thumbnail.

The rule is InternVL's (section "dynamic resolution" of arXiv 2404.16821): pick the grid of tiles whose aspect ratio is
nearest to the image's, stretch the image over it, cut it row by row, and append the whole image as a last tile.
"""

import dataclasses
import functools

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import Float, Int, UInt8

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Cut:
    """One image as tiles.

    Attributes:
      pixels: normalised tiles; those that `grid` marks with -1 are zero and stand for nothing.
      spans: tiles of each run of image tokens that the prompt shows, in order. They add up to the tiles that exist.
      grid: row and column of each tile in its image, where the network needs them. Its tokens then follow row by row,
        whatever the order of the tiles here.
    """

    pixels: Float[np.ndarray, "t h w 3"]
    spans: tuple[int, ...]
    grid: Int[np.ndarray, "t 2"] | None = None


@dataclasses.dataclass(frozen=True)
class TilingConfig:
    """How images are cut.

    Attributes:
      tile_px: side of a tile.
      min_tiles: fewest tiles of a grid.
      max_tiles: most tiles of a grid; the thumbnail is not counted.
      thumbnail: whether the whole image follows as a last tile when the grid has more than one.
      mean: per channel, of values in [0, 1].
      std: per channel.
    """

    tile_px: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    has_grid = False

    def __post_init__(self):
        if self.tile_px < 1:
            raise ValueError(f"tile_px must be positive, got {self.tile_px}.")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(f"Expected 1 <= min_tiles <= max_tiles, got {self.min_tiles} and {self.max_tiles}.")
        check_levels(self.mean, self.std)

    def with_max_tiles(self, max_tiles: int | None) -> "TilingConfig":
        """Returns this configuration with another `max_tiles`; None changes nothing."""
        if max_tiles is None or max_tiles == self.max_tiles:
            return self
        return dataclasses.replace(self, max_tiles=max_tiles, min_tiles=min(self.min_tiles, max(max_tiles, 1)))

    def cut(self, image: PIL.Image.Image) -> Cut:
        """Cuts an image; its tiles are one run."""
        pixels = tile_image(image, self)
        return Cut(pixels, (len(pixels),))


@functools.lru_cache(maxsize=64)
def grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Returns all (columns, rows) with min_tiles <= columns * rows <= max_tiles, smallest area first."""
    sides = range(1, max_tiles + 1)
    found = [(columns, rows) for columns in sides for rows in sides if min_tiles <= columns * rows <= max_tiles]
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def choose_grid(width_px: int, height_px: int, config: TilingConfig) -> tuple[int, int]:
    """Returns the (columns, rows) nearest in aspect ratio to an image.

    Of equally near grids the larger one wins as long as the image has more than half of its pixels.
    """
    aspect = width_px / height_px
    best, best_distance = (1, 1), float("inf")
    for columns, rows in grids(config.min_tiles, config.max_tiles):
        distance = abs(aspect - columns / rows)
        if distance < best_distance:
            best, best_distance = (columns, rows), distance
        elif distance == best_distance and width_px * height_px > 0.5 * config.tile_px**2 * columns * rows:
            best = (columns, rows)
    return best


def count_tiles(width_px: int, height_px: int, config: TilingConfig) -> int:
    """Returns how many tiles `tile_image` makes of an image of this size, thumbnail included."""
    columns, rows = choose_grid(width_px, height_px, config)
    cut = columns * rows
    return cut + 1 if config.thumbnail and cut > 1 else cut


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Returns an upright RGB image: EXIF rotation applied, transparency laid over white, other modes converted."""
    image = PIL.ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I"):  # 16 and 32 bit greys: PIL would clip them to white instead of scaling
        levels = np.asarray(image, np.float64) / 65535.0
        image = PIL.Image.fromarray((np.clip(levels, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8))
    return image.convert("RGB")


def tile_image(image: PIL.Image.Image, config: TilingConfig) -> Float[np.ndarray, "T h w 3"]:
    """Cuts an image into normalised tiles, row by row, the thumbnail last. Bit-equal to the published PIL pipeline."""
    image = to_rgb(image)
    side = config.tile_px
    columns, rows = choose_grid(*image.size, config)
    resized = np.asarray(image.resize((side * columns, side * rows), PIL.Image.Resampling.BICUBIC))
    cut = resized.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)
    if config.thumbnail and len(cut) > 1:
        whole = np.asarray(image.resize((side, side), PIL.Image.Resampling.BICUBIC))
        cut = np.concatenate([cut, whole[None]])
    return normalise(cut, config.mean, config.std)


def check_levels(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Raises ValueError unless both have a value for each of three channels."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std need three values, std positive, got mean={mean}, std={std}.")


def normalise(
    pixels: UInt8[np.ndarray, "*batch 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[np.ndarray, "*batch 3"]:
    """Returns (pixels / 255 - mean) / std, bit-equal to the published PIL pipelines."""
    table = _levels(mean, std)
    return np.stack([table[channel][pixels[..., channel]] for channel in range(3)], axis=-1)


@functools.lru_cache(maxsize=8)
def _levels(mean: tuple[float, ...], std: tuple[float, ...]) -> Float[np.ndarray, "3 256"]:
    """The normalised value of each of the 256 levels: scaled in float64, normalised in float32, like the reference."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return np.stack([(scaled - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)])
