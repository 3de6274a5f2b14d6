"""Dynamic tiling against transformers' PIL processor and the original rule, on real photographs."""

import io

import numpy as np
import PIL.Image
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from unifusion_jax.encoders.tiling import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TilingConfig,
    choose_grid,
    count_tiles,
    tile_image,
    to_rgb,
)

PHOTOS = {
    name: PIL.Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "coffee", "rocket", "chelsea")
}


def reference_tiles(image: PIL.Image.Image, tile_px: int, max_tiles: int) -> np.ndarray:
    processor = GotOcr2ImageProcessorPil(
        crop_to_patches=True,
        max_patches=max_tiles,
        size={"height": tile_px, "width": tile_px},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )
    return np.stack(processor(image, return_tensors="np")["pixel_values"]).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize(("tile_px", "max_tiles"), [(448, 12), (224, 6), (32, 4), (448, 1)])
def test_tiles_are_bit_equal_to_the_pil_processor(name, tile_px, max_tiles):
    config = TilingConfig(tile_px=tile_px, max_tiles=max_tiles)
    ours = tile_image(PHOTOS[name], config)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, reference_tiles(PHOTOS[name], tile_px, max_tiles))
    assert len(ours) == count_tiles(*PHOTOS[name].size, config)


def original_grid(width: int, height: int, max_tiles: int, tile_px: int) -> tuple[int, int]:
    """The rule as first published: candidates in the order of a Python set, sorted by area only."""
    candidates = {
        (i, j)
        for n in range(1, max_tiles + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if 1 <= i * j <= max_tiles
    }
    best, best_gap = (1, 1), float("inf")
    for columns, rows in sorted(candidates, key=lambda grid: grid[0] * grid[1]):
        gap = abs(width / height - columns / rows)
        if gap < best_gap or (gap == best_gap and width * height > 0.5 * tile_px * tile_px * columns * rows):
            best, best_gap = (columns, rows), gap
    return best


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 12), st.sampled_from([32, 448]))
def test_grid_equals_both_published_rules(width, height, max_tiles, tile_px):
    ours = choose_grid(width, height, TilingConfig(tile_px=tile_px, max_tiles=max_tiles))
    assert ours == original_grid(width, height, max_tiles, tile_px)
    assert ours == get_optimal_tiled_canvas((height, width), (tile_px, tile_px), 1, max_tiles)


@pytest.mark.parametrize(
    ("size", "twelve", "six"),
    [
        ((512, 512), (1, 1), (1, 1)),
        ((1024, 1024), (3, 3), (2, 2)),
        ((1280, 720), (4, 2), (2, 1)),
        ((768, 1024), (3, 4), (2, 3)),
    ],
)
def test_known_grids(size, twelve, six):
    assert choose_grid(*size, TilingConfig()) == twelve
    assert choose_grid(*size, TilingConfig(max_tiles=6)) == six


@pytest.mark.parametrize(("max_tiles", "tiles"), [(12, 10), (4, 5), (1, 1)])
def test_demo_images_give_one_five_and_ten_tiles(max_tiles, tiles):
    image = PHOTOS["astronaut"].resize((96, 96))
    cut = tile_image(image, TilingConfig(tile_px=32, max_tiles=max_tiles))
    assert cut.shape == (tiles, 32, 32, 3)
    if tiles == 10:
        # Row by row: the second tile is the one to the right of the first; the last is the whole image, small.
        level = np.asarray(image)[:32, 32:64] / 255.0
        np.testing.assert_allclose(cut[1], (level - IMAGENET_MEAN) / IMAGENET_STD, atol=1e-5)
        small = np.asarray(image.resize((32, 32), PIL.Image.Resampling.BICUBIC)) / 255.0
        np.testing.assert_allclose(cut[9], (small - IMAGENET_MEAN) / IMAGENET_STD, atol=1e-5)


def test_transparency_is_laid_over_white():
    image = PHOTOS["chelsea"].copy()
    image.putalpha(PIL.Image.linear_gradient("L").resize(image.size))
    config = TilingConfig(tile_px=64)
    np.testing.assert_array_equal(tile_image(image, config), reference_tiles(image, 64, 12))
    assert to_rgb(image).getpixel((5, 0)) == (255, 255, 255)
    palette = PIL.Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30])
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_other_modes_become_upright_rgb():
    photo = PHOTOS["coffee"]
    for mode in ("L", "LA", "1", "CMYK", "YCbCr", "HSV", "P", "F"):
        assert to_rgb(photo.convert("L").convert("F") if mode == "F" else photo.convert(mode)).mode == "RGB"
    deep = PIL.Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert [to_rgb(deep).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    file = io.BytesIO()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to show
    photo.save(file, "JPEG", exif=exif, quality=95)
    turned = to_rgb(PIL.Image.open(file))
    assert turned.size == (photo.height, photo.width)
    expected = np.asarray(photo.transpose(PIL.Image.Transpose.ROTATE_270), np.float32)
    assert np.abs(np.asarray(turned, np.float32) - expected).mean() < 5


def test_bad_settings():
    with pytest.raises(ValueError, match="Expected 1 <= min_tiles <= max_tiles, got 1 and 0"):
        TilingConfig().with_max_tiles(0)
    with pytest.raises(ValueError, match="tile_px must be positive, got 0"):
        TilingConfig(tile_px=0)
    with pytest.raises(ValueError, match="three values, std positive"):
        TilingConfig(std=(1.0, 0.0, 1.0))
    assert TilingConfig(min_tiles=3).with_max_tiles(2).min_tiles == 2
    assert TilingConfig().with_max_tiles(None) == TilingConfig()
