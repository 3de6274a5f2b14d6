"""Qwen2.5-VL's and Gemma 3's ways with images against transformers' PIL processors, on real photographs; odd images."""

import io

import numpy as np
import PIL.Image
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from unifusion_jax.encoders.native import NativeConfig, pack_windows
from unifusion_jax.encoders.pan_scan import PanScanConfig
from unifusion_jax.encoders.tiling import TilingConfig

PHOTOS = {
    name: PIL.Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "coffee", "rocket", "chelsea")
}


def qwen_patches(image: PIL.Image.Image, **options) -> tuple[np.ndarray, tuple[int, int]]:
    """The reference's tiles, row by row, [rows * columns, side, side, 3], and (columns, rows) of tiles."""
    out = Qwen2VLImageProcessorPil(**options)(image, return_tensors="np")
    _, height, width = out["image_grid_thw"][0]
    patch_px = options.get("patch_size", 14)
    flat = out["pixel_values"].reshape(-1, 2, 2, 3, 2, patch_px, patch_px)
    np.testing.assert_array_equal(flat[..., 0, :, :], flat[..., 1, :, :])  # two equal frames
    tiles = flat[:, :, :, :, 0].transpose(0, 1, 4, 2, 5, 3).reshape(-1, 2 * patch_px, 2 * patch_px, 3)
    return tiles, (int(width) // 2, int(height) // 2)


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize(
    ("patch_px", "min_area", "max_area"), [(14, 56 * 56, 28 * 28 * 1280), (14, 784, 64 * 784), (4, 8000, 20000)]
)
def test_native_tiles_are_bit_equal_to_the_pil_processor(name, patch_px, min_area, max_area):
    config = NativeConfig(tile_px=2 * patch_px, window_tiles=3, min_area_px=min_area, max_area_px=max_area)
    cut = config.cut(PHOTOS[name])
    tiles, grid = qwen_patches(
        PHOTOS[name], patch_size=patch_px, size={"shortest_edge": min_area, "longest_edge": max_area}
    )
    assert config.grid(*PHOTOS[name].size) == grid and cut.spans == (len(tiles),) and cut.pixels.dtype == np.float32
    exists = cut.grid[:, 0] >= 0
    order = np.lexsort((cut.grid[exists, 1], cut.grid[exists, 0]))
    np.testing.assert_array_equal(cut.pixels[exists][order], tiles)
    assert not cut.pixels[~exists].any()


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([(3136, 1280 * 784), (784, 64 * 784), (90, 9000)]))
def test_native_size_equals_the_published_rule(width, height, bounds):
    config = NativeConfig(min_area_px=bounds[0], max_area_px=bounds[1])
    if max(width, height) / min(width, height) > 200:
        with pytest.raises(ValueError, match=r"has an aspect ratio of \d+, this model takes at most 200. Crop it"):
            config.grid(width, height)
        return
    rows, columns = (side // 28 for side in smart_resize(height, width, 28, *bounds))
    ours = config.grid(width, height)
    assert 1 <= ours[0] * ours[1] <= config.max_tiles
    if rows * columns <= config.max_tiles:
        assert ours == (columns, rows)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5))
def test_windows_are_packed_whole_and_tightly(columns, rows, side):
    places = pack_windows(columns, rows, side)
    groups = places.reshape(-1, side**2, 2)
    exists = places[:, 0] >= 0
    assert sorted(map(tuple, places[exists])) == [(row, column) for row in range(rows) for column in range(columns)]
    homes = {}
    for index, group in enumerate(groups):
        for row, column in group[group[:, 0] >= 0]:
            assert homes.setdefault((row // side, column // side), index) == index
    # All groups but one are more than half full, or they would share.
    assert (len(groups) - 1) * side**2 < 2 * columns * rows
    if min(columns, rows) >= 4 * side:
        assert len(places) < 1.15 * columns * rows + side**2
    if columns % side == rows % side == 0:
        assert exists.all()


def gemma_reference(image: PIL.Image.Image, tile_px: int, **options) -> tuple[np.ndarray, int]:
    processor = Gemma3ImageProcessorPil(size={"height": tile_px, "width": tile_px}, **options)
    out = processor(image, return_tensors="np")
    return np.stack(out["pixel_values"]).transpose(0, 2, 3, 1), int(np.ravel(out["num_crops"])[0])


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("tile_px", [896, 70])
def test_stretched_image_is_bit_equal_to_the_pil_processor(name, tile_px):
    cut = PanScanConfig(tile_px=tile_px).cut(PHOTOS[name])
    np.testing.assert_array_equal(cut.pixels, gemma_reference(PHOTOS[name], tile_px)[0])
    assert cut.spans == (1,) and cut.grid is None and cut.pixels.dtype == np.float32


@pytest.mark.parametrize("size", [(512, 512), (640, 427), (427, 640), (900, 300), (300, 1500), (2000, 260), (800, 250)])
@pytest.mark.parametrize("max_crops", [2, 4])
def test_pan_and_scan_is_bit_equal_to_the_pil_processor(size, max_crops):
    image = PHOTOS["coffee"].resize(size)
    cut = PanScanConfig(tile_px=64, enabled=True).with_max_tiles(max_crops).cut(image)
    theirs, crops = gemma_reference(
        image,
        64,
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=256,
        pan_and_scan_max_num_crops=max_crops,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    assert cut.spans == (1,) * (1 + crops)
    np.testing.assert_array_equal(cut.pixels, theirs)


CONFIGS = {
    "tiled": TilingConfig(tile_px=32, max_tiles=4),
    "native": NativeConfig(max_area_px=64 * 784),
    "pan and scan": PanScanConfig(tile_px=56, enabled=True, min_crop_px=20),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "L", "P", "turned", "animated"])
def test_odd_images_become_upright_rgb_on_white(config, mode):
    image = PHOTOS["coffee"].resize((150, 100))
    expected = image
    if mode == "RGBA":
        given_image = image.copy()
        given_image.putalpha(0)
        expected = PIL.Image.new("RGB", image.size, "white")
    elif mode in ("turned", "animated"):
        file = io.BytesIO()
        if mode == "turned":
            exif = PIL.Image.Exif()
            exif[0x0112] = 6
            image.transpose(PIL.Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
        else:
            image.save(file, "PNG", save_all=True, append_images=[PIL.Image.new("RGB", image.size)])
        given_image = PIL.Image.open(file)
        assert mode == "turned" or given_image.n_frames == 2
    else:
        given_image = image.convert(mode)
        expected = given_image.convert("RGB")
    np.testing.assert_array_equal(config.cut(given_image).pixels, config.cut(expected).pixels)


def test_extreme_sizes():
    dot, strip = PIL.Image.new("RGB", (1, 1), "red"), PIL.Image.new("RGB", (20000, 3))
    assert len(CONFIGS["tiled"].cut(dot).pixels) == 1 and len(CONFIGS["tiled"].cut(strip).pixels) == 5
    assert CONFIGS["native"].cut(dot).spans == (4,)
    with pytest.raises(ValueError, match="20000 x 3 px has an aspect ratio of 6667, this model takes at most 200"):
        CONFIGS["native"].cut(strip)
    assert CONFIGS["native"].with_max_tiles(16).grid(5600, 28) == (16, 1)
    for image in (dot, strip):
        assert CONFIGS["pan and scan"].cut(image).spans == (1,)


def test_bad_settings():
    with pytest.raises(ValueError, match="room for one tile, got 3136 and 100 with tile_px=28"):
        NativeConfig(max_area_px=100)
    with pytest.raises(ValueError, match="must be positive, got 28 and 0"):
        NativeConfig(window_tiles=0)
    with pytest.raises(ValueError, match="Expected 0 <= max_crops <= min_crop_px, got 4 and 3"):
        PanScanConfig(min_crop_px=3)
    with pytest.raises(ValueError, match="tile_px must be positive, got 0"):
        PanScanConfig(tile_px=0)
    with pytest.raises(ValueError, match="three values, std positive"):
        PanScanConfig(std=(1.0, 0.0, 1.0))
    for config in (NativeConfig(), PanScanConfig()):
        with pytest.raises(ValueError, match="Expected max_tiles >= 1, got 0"):
            config.with_max_tiles(0)
        assert config.with_max_tiles(None) is config
