"""A file becomes pixels: an upright 8-bit RGB image, resized to a square."""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from run.cli import UserError


def limit_image_size(megapixels: float) -> None:
    """Refuse larger images before they are decoded: a file of a few kB can claim gigabytes of pixels."""
    Image.MAX_IMAGE_PIXELS = round(megapixels * 1e6)
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # by itself, Pillow raises only from twice as many


def image_size_limit() -> float:
    """-> megapixels."""
    return Image.MAX_IMAGE_PIXELS / 1e6


def load_image(path: str | Path, size: int | None = None) -> Image.Image:
    """Decode a file -> 8-bit RGB image, upright according to its EXIF orientation.

    16-bit and float grayscale is scaled, not clipped; transparent pixels are put on white. size: the side needed in
    the end; a JPEG is decoded directly at 1/2, 1/4 or 1/8 of its size where that is not smaller.
    Raises whatever the decoder raises for a file that is broken, truncated or not an image.
    """
    if not os.path.isfile(path) and os.path.exists(path):
        raise OSError("not a regular file")  # opening a named pipe would wait forever
    with Image.open(path) as image:
        if size:
            image.draft(None, (size, size))
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_gray_to_8_bit(np.nan_to_num(np.asarray(image)), image.mode))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _gray_to_8_bit(gray, mode):
    """16-bit values by their mode; 32-bit integers and floats by their maximum, as such files do not define white."""
    if mode == "F" and gray.max() <= 1:
        gray = gray * 255
    elif mode.startswith("I;16") or gray.max() > 255:
        gray = np.clip(gray, 0, 65535) // 256
    return np.clip(gray, 0, 255).astype(np.uint8)


def decode(path: str | Path, size: int) -> np.ndarray:
    """Decode a file and resize it to a square, antialiased -> (size, size, 3) uint8. Raises as `load_image` does."""
    return np.asarray(load_image(path, size).resize((size, size), Image.Resampling.BILINEAR))


def read_image(path: str | Path, size: int) -> np.ndarray:
    """`decode`, but raises UserError, naming the file, if it cannot be read."""
    try:
        return decode(path, size)
    except Exception as error:  # decoders raise nearly anything on a broken file; the user needs to know which file
        raise UserError(f"{path} cannot be read: {failure_reason(error, path)}") from error


def failure_reason(error: Exception, path: str | Path) -> str:
    """What the decoder raised, in words for the user."""
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"larger than {image_size_limit():g} megapixels; if that is correct, raise --max_megapixels"
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "empty file"
    return str(error).replace(repr(path), "").rstrip(": ") or repr(error)
