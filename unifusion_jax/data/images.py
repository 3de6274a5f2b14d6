"""Decoding and fitting of images that other people made.

Everything the data pipeline knows about pixels is here: `decode` turns encoded bytes of any common format into one
agreed form (upright 8-bit RGB on white), or says why it cannot; `fit` brings that to the static size of a bucket.
"""

import io
import struct
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

# Only raster formats that PIL decodes itself: formats that start an external program (EPS) are refused.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_LATE_PLUGINS = (TiffImagePlugin, WebPImagePlugin)  # `Image.open(formats=...)` loads the others itself
# Kept byte for byte in records; the others are re-encoded as PNG. MPO is what PIL calls a JPEG with further pictures
# appended, as phones write them.
STORED_FORMATS = ("PNG", "JPEG", "WEBP", "MPO")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
MAX_PIXELS = 89_478_485  # PIL's own limit: a quarter of a GiB of RGB

# What PIL's decoders raise on malformed files. MemoryError stays out: it says nothing about the file.
_DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    ZeroDivisionError,
    NotImplementedError,
)


class ImageError(ValueError):
    """An image cannot be used.

    Attributes:
      reason: one of "empty", "not_an_image", "too_many_pixels", "corrupt", "too_small", the key the reports count by.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image file to upright 8-bit RGB.

    EXIF rotation is applied, transparency is composited on white, palettes, grey, 16-bit and CMYK are converted, and of
    an animation the first frame is taken.

    Args:
      data: the whole file.
      max_pixels: refuse an image whose header announces more (a decompression bomb costs nothing to announce).

    Returns:
      Pixels [h, w, 3], uint8.

    Raises:
      ImageError: the file is empty, of no accepted format, too large, truncated or otherwise corrupt.
    """
    image = _open(data, max_pixels)
    try:
        image.load()
        pixels = np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except _DECODER_ERRORS as error:
        raise ImageError("corrupt", f"{image.format} image is truncated or corrupt: {error}") from error
    return pixels


def to_pixels(image: Any) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels of an image as records hold it: an array as it is, encoded bytes decoded."""
    return decode(image) if isinstance(image, bytes) else np.asarray(image)


def inspect(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[str, int, int]:
    """Reads only the header: (format, height_px, width_px), the size as it is after EXIF rotation.

    Raises:
      ImageError: as `decode`, as far as the header tells.
    """
    image = _open(data, max_pixels)
    width_px, height_px = image.size
    try:
        if image.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # EXIF Orientation: the quarter turns
            width_px, height_px = height_px, width_px
    except _DECODER_ERRORS as error:
        raise ImageError("corrupt", f"{image.format} image has corrupt EXIF data: {error}") from error
    return str(image.format), height_px, width_px


def normalise(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[bytes, int, int]:
    """Checks that a file decodes to the end, and brings it to a form that records store.

    Returns:
      (file, height_px, width_px): the same bytes if they are a still PNG, JPEG or WebP, else a PNG of the first frame.

    Raises:
      ImageError: as `decode`.
    """
    pixels = decode(data, max_pixels=max_pixels)
    image = _open(data, max_pixels)
    try:
        # An MPO's further pictures are depth or other exposures, no animation.
        still = image.format == "MPO" or not getattr(image, "is_animated", False)
    except _DECODER_ERRORS:
        still = False  # later frames are broken; the first, which is all that counts, was decoded above
    stored = data if image.format in STORED_FORMATS and still else encode_png(pixels)
    return stored, *pixels.shape[:2]


def encode_png(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encodes pixels without loss."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def fit(pixels: UInt8[np.ndarray, "h w 3"], height_px: int, width_px: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Resizes so that the image just covers (height_px, width_px), keeping its aspect ratio, and cuts the centre out.

    Lanczos both ways; small images are enlarged. An image of the right size is returned unchanged.
    """
    if pixels.shape[:2] == (height_px, width_px):
        return pixels
    size = (width_px, height_px)  # PIL counts width first
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), size, Image.Resampling.LANCZOS, centering=(0.5, 0.5)))


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise ImageError("empty", "the file is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the latter under `-W error`
        raise ImageError("too_many_pixels", f"decompression bomb: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError("not_an_image", f"not an image of a known format ({', '.join(FORMATS)})") from error
    except _DECODER_ERRORS as error:
        raise ImageError("corrupt", f"the image's header is truncated or corrupt: {error}") from error
    width_px, height_px = image.size
    if width_px < 1 or height_px < 1:
        raise ImageError("corrupt", f"the image has no pixels ({width_px}x{height_px})")
    if width_px * height_px > max_pixels:
        raise ImageError("too_many_pixels", f"{width_px}x{height_px} px is above the limit of {max_pixels} pixels")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey: convert("RGB") would clip at 255 instead of scaling
        grey = np.clip(np.asarray(image, np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
