"""Pictures between PIL, uint8 and the float [-1, 1] NHWC that networks read."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.PngImagePlugin
from jaxtyping import Array, Float

from unifusion_jax.data.images import MAX_PIXELS, ImageError, decode
from unifusion_jax.parallel.hosts import to_host

_SETTINGS = "unifusion_jax"
_EXIF_DESCRIPTION = 0x010E


def to_float(images: Any) -> Float[Array, "*batch h w 3"]:
    """Returns uint8 images as float32 in [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def to_pil(images: Any) -> list[PIL.Image.Image]:
    """Returns a batch [B, h, w, 3], uint8 or float in [-1, 1] (clipped), as PIL images."""
    array = to_host(images)
    if array.dtype != np.uint8:
        array = np.clip(np.round((array.astype(np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)
    return [PIL.Image.fromarray(image) for image in array]


def grid(images: Sequence[PIL.Image.Image], *, columns: int, gap_px: int = 4) -> PIL.Image.Image:
    """Lays pictures out row by row on white, each in a cell of the largest one's size."""
    if not images:
        raise ValueError("A grid needs at least one picture.")
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    rows = -(-len(images) // columns)
    sheet = PIL.Image.new(
        "RGB", (columns * (width + gap_px) + gap_px, rows * (height + gap_px) + gap_px), (255, 255, 255)
    )
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (gap_px + column * (width + gap_px), gap_px + row * (height + gap_px)))
    return sheet


def load(file: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """Reads a picture upright, as RGB on white. Raises FileNotFoundError, or ValueError saying what is wrong with it."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no image file {str(file)!r}.")
    try:
        return PIL.Image.fromarray(decode(path.read_bytes(), max_pixels=max_pixels))
    except ImageError as error:
        raise ValueError(f"{file} cannot be used: {error}") from error


def check_output(file: str | os.PathLike[str]) -> str:
    """Returns the image format that a file's ending stands for; raises ValueError for an ending that is none."""
    path = Path(file)
    form = PIL.Image.registered_extensions().get(path.suffix.lower())
    if form not in PIL.Image.SAVE:
        raise ValueError(f"The output file must end in .png, .jpg or .webp, got {path.name!r}.")
    return str(form)


def save(image: PIL.Image.Image, file: str | os.PathLike[str], *, settings: Mapping[str, Any] | None = None) -> None:
    """Writes a picture under a temporary name and renames it, so that no half file is ever left.

    Args:
      image: any picture.
      file: its ending says the format.
      settings: how the picture was made, of JSON's types; stored in it (PNG: a text chunk "unifusion_jax"; other formats: the
        Exif description) and read back by `read_settings`.
    """
    form = check_output(file)
    path = Path(file).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    options: dict[str, Any] = {}
    if settings is not None:
        text = json.dumps(settings)
        if form == "PNG":
            options["pnginfo"] = PIL.PngImagePlugin.PngInfo()
            options["pnginfo"].add_text(_SETTINGS, text, zip=False)
        else:
            options["exif"] = PIL.Image.Exif()
            options["exif"][_EXIF_DESCRIPTION] = text
    try:
        image.save(temporary, format=form, **options)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_settings(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the settings that `save` stored. Raises FileNotFoundError, or ValueError where a picture has none."""
    if not Path(file).expanduser().is_file():
        raise FileNotFoundError(f"There is no image file {str(file)!r}.")
    try:
        with PIL.Image.open(Path(file).expanduser()) as image:
            text = image.info.get(_SETTINGS) or image.getexif().get(_EXIF_DESCRIPTION)
        settings = json.loads(text or "null")
    except (PIL.UnidentifiedImageError, ValueError) as error:
        raise ValueError(f"{file} holds no settings of this program: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings of this program.")
    return settings
