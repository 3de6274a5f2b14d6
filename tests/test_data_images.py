"""Decoding of images as they come from the world."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unifusion_jax.data import images

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(height_px=20, width_px=30, mode="RGB", seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats(kind):
    decoded = images.decode(encoded(picture(), kind))
    assert decoded.shape == (20, 30, 3)
    assert decoded.dtype == np.uint8


@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "JPEG"])
def test_formats_in_a_fresh_process(kind, tmp_path):
    # PIL loads its plugins when first needed; a test that has already written such a file would not notice one missing.
    file = tmp_path / "image"
    file.write_bytes(encoded(picture(), kind))
    code = f"from unifusion_jax.data import images; print(images.decode(open({str(file)!r}, 'rb').read()).shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "(20, 30, 3)", done.stderr


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGBA", "LA"])
def test_modes_become_rgb(mode):
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    # Pillow 12 cannot read the YCbCr pictures that it writes without compression.
    options = {"compression": "tiff_lzw"} if mode == "YCbCr" else {}
    decoded = images.decode(encoded(picture(mode="RGB").convert(mode), kind, **options))
    assert decoded.shape == (20, 30, 3)
    expected = np.asarray(picture().convert(mode).convert("RGB"))
    np.testing.assert_allclose(decoded.astype(int), expected, atol=1)


def test_cmyk_jpeg():
    decoded = images.decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(decoded.astype(int) - RED).max() < 8


def test_transparency_is_composited_on_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    assert images.decode(encoded(image)).tolist() == [[[255] * 3, [127] * 3]]


def test_palette_transparency_is_composited_on_white():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert images.decode(encoded(image, transparency=1)).tolist() == [[list(RED), [255] * 3]]


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.array([[0, 256, 32768, 65535]], np.uint16)
    assert images.decode(encoded(Image.fromarray(grey)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert images.decode(data)[0, 0].tolist() == list(RED)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(20, 30), exif=exif.tobytes())
    expected = (30, 20) if orientation >= 5 else (20, 30)
    assert images.decode(data).shape[:2] == expected
    assert images.inspect(data) == ("PNG", *expected)


def test_exif_rotation_turns_the_pixels():
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise
    assert images.decode(encoded(image, exif=exif.tobytes())).tolist() == [[list(RED)], [list(BLUE)]]


def bomb(width_px, height_px):
    """A PNG of a few bytes that announces any size."""
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        (b"", "empty", r"0 bytes"),
        (b"hello, I am text", "not_an_image", "not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image", "known format .PNG, JPEG"),
        (encoded(picture(64, 64))[:500], "corrupt", "truncated or corrupt"),
        (encoded(picture(64, 64), "JPEG")[:500], "corrupt", "truncated or corrupt"),
        (bomb(50_000, 50_000), "too_many_pixels", "decompression bomb"),
        (bomb(12_000, 12_000), "too_many_pixels", "12000x12000 px is above the limit"),
    ],
)
def test_bad_files(data, reason, message):
    with pytest.raises(images.ImageError, match=message) as caught:
        images.decode(data)
    assert caught.value.reason == reason


def test_pixel_limit_can_be_lowered():
    with pytest.raises(images.ImageError, match="30x20 px is above the limit of 599 pixels"):
        images.decode(encoded(picture()), max_pixels=599)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_gives_pixels_or_an_image_error(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    blob = bytearray(encoded(picture(8, 8), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert images.normalise(bytes(blob), max_pixels=10_000)[1] >= 1
    except images.ImageError as error:
        assert error.reason in ("not_an_image", "corrupt", "too_many_pixels")


def test_normalise_keeps_still_files_and_reencodes_the_rest():
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encoded(picture(), kind)
        assert images.normalise(data) == (data, 20, 30)
    for data in (encoded(picture(), "BMP"), encoded(picture(), "GIF")):
        stored, height_px, width_px = images.normalise(data)
        assert images.inspect(stored) == ("PNG", 20, 30) == ("PNG", height_px, width_px)
        np.testing.assert_array_equal(images.decode(stored), images.decode(data))
    moving = encoded(picture(), "WEBP", save_all=True, append_images=[picture(seed=1)])
    assert images.inspect(images.normalise(moving)[0])[0] == "PNG"


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), to_height=st.integers(1, 64), to_width=st.integers(1, 64))
def test_fit_gives_the_asked_size(height, width, to_height, to_width):
    flat = np.full((height, width, 3), 77, np.uint8)
    fitted = images.fit(flat, to_height, to_width)
    assert fitted.shape == (to_height, to_width, 3)
    assert (fitted == 77).all()


def test_fit_cuts_the_centre_and_keeps_the_aspect():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert (images.fit(wide, 10, 10) == 255).all()
    exact = np.asarray(picture(10, 10))
    assert images.fit(exact, 10, 10) is exact
