import numpy as np
import PIL.Image
import pytest

from unifusion_jax import images


def test_float_range_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    floats = np.asarray(images.to_float(pixels))
    assert floats.dtype == np.float32
    assert (floats.min(), floats.max()) == (-1.0, 1.0)
    np.testing.assert_array_equal(np.asarray(images.to_pil(floats)[0]), pixels[0])


def test_pixels_out_of_range_are_clipped():
    assert np.asarray(images.to_pil(np.full((1, 2, 2, 3), 3.0))[0]).max() == 255
    assert np.asarray(images.to_pil(np.full((1, 2, 2, 3), -3.0))[0]).min() == 0


def test_grid_places_pictures_row_by_row():
    red, green, blue = (PIL.Image.new("RGB", (10, 10), colour) for colour in ("red", "green", "blue"))
    sheet = images.grid([red, green, blue], columns=2, gap_px=2)
    assert sheet.size == (26, 26)
    assert sheet.getpixel((5, 5)) == (255, 0, 0)
    assert sheet.getpixel((5, 17)) == (0, 0, 255)
    assert sheet.getpixel((17, 17)) == (255, 255, 255)
    with pytest.raises(ValueError, match="at least one picture"):
        images.grid([], columns=2)


def test_save_and_load(tmp_path):
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8))
    images.save(picture, tmp_path / "deep/a.png")
    assert images.load(tmp_path / "deep/a.png").tobytes() == picture.tobytes()
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_settings_are_stored_in_the_picture(tmp_path, name):
    settings = {"prompt": "ein Würfel", "seed": 3, "size": [64, 32], "target": None}
    images.save(PIL.Image.new("RGB", (4, 4)), tmp_path / name, settings=settings)
    assert images.read_settings(tmp_path / name) == settings
    images.save(PIL.Image.new("RGB", (4, 4)), tmp_path / name)
    with pytest.raises(ValueError, match="holds no settings"):
        images.read_settings(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no image file"):
        images.read_settings(tmp_path / "missing.png")


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="cannot write mode"):
        images.save(PIL.Image.new("RGBA", (4, 4)), tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_transparency_is_seen_on_white(tmp_path):
    PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert images.load(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"text.png cannot be used: not an image"):
        images.load(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match="no image file"):
        images.load(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=r"must end in .png, .jpg or .webp, got 'a.pdff'"):
        images.check_output("a.pdff")
