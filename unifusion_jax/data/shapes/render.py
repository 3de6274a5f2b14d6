"""Drawing a scene: antialiased shapes from cached coverage masks.

A picture costs a fill and one small paste an object, so that training can draw its examples on the fly.
"""

import functools
import math

import numpy as np
from jaxtyping import Float, UInt8

from unifusion_jax.data.shapes.scene import GRID_CELLS, REFERENCE_SIZE_PX, Scene

COLOUR_RGB = {
    "red": (222, 36, 36),
    "orange": (255, 138, 0),
    "yellow": (252, 222, 36),
    "green": (36, 172, 60),
    "cyan": (40, 205, 225),
    "blue": (36, 84, 235),
    "purple": (134, 48, 196),
    "pink": (255, 128, 196),
}
BACKGROUND_RGB = {
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
    "beige": (226, 206, 168),
    "navy": (16, 26, 84),
}
# The second tone of a texture is the colour mixed with black; the two colours whose dark shade would vanish on navy are
# mixed with white instead.
SECOND_TONE_RGB = {
    name: tuple(round(0.42 * v + (0.58 * 255 if name in ("blue", "purple") else 0.0)) for v in rgb)
    for name, rgb in COLOUR_RGB.items()
}
OBJECT_SIZE_PX = {"small": 18.0, "large": 30.0}
"""Diameter of an object in a 96 px picture; it scales with the picture."""

_SUBSAMPLES, _SUBSAMPLES_LARGE = 8, 4  # along each side of a pixel, for objects up to, and above, this diameter
_LARGE_PX = 64.0
_STAR_INNER_RADIUS = 0.5
_RING_INNER_RADIUS = 0.5
_CROSS_HALF_ARM = 0.36
_SQUARE_HALF_SIDE = 0.9
_BANDS = 5  # across the diameter; the second and the fourth take the second tone
_DOT_PITCH, _DOT_RADIUS = 0.66, 0.24


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie in a shape of radius 1 around the origin; y grows downwards."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius <= 1.0
    if shape == "ring":
        return (radius <= 1.0) & (radius >= _RING_INNER_RADIUS)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= _SQUARE_HALF_SIDE
    if shape == "cross":
        return (np.minimum(np.abs(x), np.abs(y)) <= _CROSS_HALF_ARM) & (np.maximum(np.abs(x), np.abs(y)) <= 1.0)
    if shape == "triangle":
        return (y <= 0.85) & (np.abs(x) <= (y + 0.95) / 1.8)
    if shape == "star":
        # Fold the plane onto half a point of the star: angle from the axis of the nearest tip, 0 to 36 degrees.
        sector = 2 * np.pi / 5
        angle = np.abs(np.mod(np.arctan2(x, -y) + sector / 2, sector) - sector / 2)
        along, across = radius * np.cos(angle), radius * np.sin(angle)
        inner_along = _STAR_INNER_RADIUS * math.cos(sector / 2)
        inner_across = _STAR_INNER_RADIUS * math.sin(sector / 2)
        return along * inner_across + across * (1.0 - inner_along) <= inner_across
    raise ValueError(f"shape is {shape!r}, but must be one of circle, square, triangle, star, cross, ring")


def _second_tone(texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points take the second tone of a texture, in the coordinates of `_inside`."""
    if texture == "striped":
        return np.floor((y + 1.0) * _BANDS / 2).astype(int) % 2 == 1
    if texture == "dotted":
        nearest = [v - _DOT_PITCH * np.round(v / _DOT_PITCH) for v in (x, y)]
        return np.hypot(*nearest) <= _DOT_RADIUS
    return np.zeros(x.shape, bool)


@functools.lru_cache(maxsize=4096)
def object_masks(
    shape: str, texture: str, diameter_px: float
) -> tuple[Float[np.ndarray, "P P"], Float[np.ndarray, "P P"]]:
    """The antialiased masks of an object centred on a pixel corner.

    Args:
        shape: a word of `SHAPES`.
        texture: a word of `TEXTURES`.
        diameter_px: diameter of the object.

    Returns:
        (first, second): the share of each pixel covered by the first and by the second tone, float32 in [0, 1], on a
        square of even side P just large enough. Read-only: the arrays are cached.
    """
    half_px = math.ceil(diameter_px / 2)
    subsamples = _SUBSAMPLES if diameter_px <= _LARGE_PX else _SUBSAMPLES_LARGE
    fine = (np.arange(2 * half_px * subsamples) + 0.5) / subsamples - half_px
    x, y = np.meshgrid(fine / (diameter_px / 2), fine / (diameter_px / 2))
    inside, second = _inside(shape, x, y), _second_tone(texture, x, y)

    def shrink(mask: np.ndarray) -> np.ndarray:
        blocks = mask.reshape(2 * half_px, subsamples, 2 * half_px, subsamples)
        coverage = blocks.mean((1, 3), dtype=np.float32)
        coverage.flags.writeable = False
        return coverage

    return shrink(inside & ~second), shrink(inside & second)


@functools.lru_cache(maxsize=16384)
def _patch(shape: str, texture: str, colour: str, background: str, diameter_px: float) -> tuple[np.ndarray, np.ndarray]:
    """An object drawn on a background, uint8 [P, P, 3], and where it covers anything at all, bool [P, P, 1]."""
    first, second = (mask[..., None] for mask in object_masks(shape, texture, diameter_px))
    tones = np.asarray([COLOUR_RGB[colour], SECOND_TONE_RGB[colour], BACKGROUND_RGB[background]], np.float32)
    patch = first * tones[0] + second * tones[1] + (1.0 - first - second) * tones[2]
    return np.rint(patch).astype(np.uint8), first + second > 0


def render(scene: Scene, size_px: int | tuple[int, int] = REFERENCE_SIZE_PX) -> UInt8[np.ndarray, "height width 3"]:
    """Draw a scene.

    Objects keep their aspect ratio and are sized by the shorter side of a cell; their centres lie on whole pixels.

    Args:
        scene: what to draw.
        size_px: side of the picture, or its (width, height).

    Returns:
        uint8 RGB picture.

    Raises:
        ValueError: a side is shorter than 12 px.
    """
    width_px, height_px = (size_px, size_px) if isinstance(size_px, int) else size_px
    if min(width_px, height_px) < 4 * GRID_CELLS:
        raise ValueError(f"size_px is {size_px}, but the 3x3 grid needs sides of at least {4 * GRID_CELLS} px")
    image = np.empty((height_px, width_px, 3), np.uint8)
    image[:] = BACKGROUND_RGB[scene.background]
    scale = min(width_px, height_px) / REFERENCE_SIZE_PX
    for item, (right, down) in zip(scene.objects, scene.jitter, strict=True):
        diameter_px = OBJECT_SIZE_PX[item.size] * scale
        draw = _patch if diameter_px <= _LARGE_PX else _patch.__wrapped__  # a cache of large ones would fill the memory
        patch, covered = draw(item.shape, item.texture, item.colour, scene.background, diameter_px)
        half_px = patch.shape[0] // 2
        left = round((item.column + 0.5) * width_px / GRID_CELLS + right * scale) - half_px
        top = round((item.row + 0.5) * height_px / GRID_CELLS + down * scale) - half_px
        # At the smallest sizes rounding can push a patch over the border by a pixel.
        x0, y0 = max(-left, 0), max(-top, 0)
        x1, y1 = min(width_px - left, 2 * half_px), min(height_px - top, 2 * half_px)
        target = image[top + y0 : top + y1, left + x0 : left + x1]
        np.copyto(target, patch[y0:y1, x0:x1], where=covered[y0:y1, x0:x1])
    return image
