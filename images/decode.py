"""A file becomes pixels: an upright 8-bit sRGB image, resized to a square."""

import functools
import io
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from images.color import MAX_PROFILE_BYTES, to_srgb
from images.depth import Depth, color_to_8_bit, gray_to_8_bit
from images.formats import can_read_heif, describe_file
from images.metadata import copies_without_metadata, is_turned, turn_upright
from run.cli import UserError

# increase it when a photograph becomes other pixels, and FORMAT_VERSION in images/cache.py with it
DECODER_VERSION = 3
# what is known of an image besides its pixels: the longer side divided by the shorter; ONE_COLOR and TOO_DARK
FACTS = np.dtype([("aspect", np.float32), ("notes", np.uint8)])
ONE_COLOR, TOO_DARK = 1, 2  # all pixels are the same; it is probably of fewer bits than its file claims
SAME_COLOR = 2  # levels of 255: compression makes one color slightly uneven
PADDING = "black"

# the largest color profile of a PNG that is read; other metadata of that size are ignored by themselves
PngImagePlugin.MAX_TEXT_CHUNK = MAX_PROFILE_BYTES


def limit_image_size(megapixels: float) -> None:
    """Refuse larger images before they are decoded: a file of a few kB can claim gigabytes of pixels."""
    Image.MAX_IMAGE_PIXELS = round(megapixels * 1e6)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # about metadata
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # by itself, Pillow raises only from twice as many


def image_size_limit() -> float:
    """-> megapixels."""
    return Image.MAX_IMAGE_PIXELS / 1e6


def load_image(path: str | Path | bytes, size: int | None = None) -> Image.Image:
    """Decode a file -> 8-bit sRGB image, upright according to its EXIF orientation.

    Images of more than 8 bits are scaled, not clipped; transparent pixels are put on white. path: of the file, or its
    content; size: the side needed in the end; a JPEG is decoded directly at 1/2, 1/4 or 1/8 of its size where that is
    not smaller.
    Raises whatever the decoder raises for a file whose pixels are broken or truncated, or that is not an image.
    """
    return _load(path, size)[0]


@dataclass
class Header:
    """What a file states before its pixels. width, height: upright, in pixels; profile: the ICC profile or None."""

    width: int
    height: int
    format: str
    mode: str
    profile: bytes | None


def read_header(path: str | Path) -> Header:
    """Read what a file states before its pixels, which are not decoded. Raises as `load_image` does."""
    return _despite_metadata(path, _read_header_from)


def _read_header_from(source):
    with _open(source) as image:
        width, height = image.size[::-1] if is_turned(image) else image.size
        return Header(width, height, image.format or "", image.mode, image.info.get("icc_profile"))


def _load(path, size):
    """-> (the image, whether it is too dark)"""
    return _despite_metadata(path, lambda source: _load_from(source, size))


def _despite_metadata(path, read: Callable[[Any], Any]):
    """-> `read(path)`, or of a copy without the metadata that prevent it."""
    if not isinstance(path, bytes) and not os.path.isfile(path) and os.path.exists(path):
        raise OSError("not a regular file")  # opening a named pipe would wait forever
    try:
        return read(path)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the file cannot be opened
            raise
        for copy in copies_without_metadata(path):
            with suppress(Exception):
                return read(copy)
        raise  # it is the pixels that cannot be read


def _load_from(source, size):
    image, rawmode, depth = _read(source, size)
    if rawmode.startswith("RGBa") and image.getextrema()[3] == (0, 0):  # divided by an alpha of zero, all is black
        image, _, _ = _read(source, size, "RGBA" + rawmode[4:])
    profile, is_dark = image.info.get("icc_profile"), False
    upright = turn_upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        upright, is_dark = gray_to_8_bit(upright, depth)
    elif depth:
        upright, is_dark = color_to_8_bit(
            upright, depth, rawmode, lambda other: turn_upright(_read(source, size, other)[0])
        )
    return _to_rgb(upright, profile), is_dark


def _read(source, size, rawmode=None):
    """-> (image as the decoder returns it, rawmode: the layout of its values in the file, its `Depth` or None)

    rawmode: a layout to assume instead of the one that the file states.
    """
    with _open(source) as image:
        if size:
            image.draft(None, (size, size))
        stated_rawmode = _rawmode(image.tile[0].args) if image.tile else ""
        is_deep = image.mode.startswith("I") or image.mode == "F" or ";16" in stated_rawmode
        depth = Depth(image) if is_deep else None
        if rawmode:
            image.tile = [tile._replace(args=_with_rawmode(tile.args, rawmode)) for tile in image.tile]
        image.load()
    return image, stated_rawmode, depth


def _open(source):
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    try:
        return Image.open(source)
    except UnidentifiedImageError:
        if not can_read_heif():
            raise
        _register_heif()
        if not isinstance(source, (str, Path)):
            source.seek(0)
        return Image.open(source)


@functools.cache
def _register_heif():
    """Once in each process that meets a HEIC photograph, as loader workers do."""
    import pillow_heif

    pillow_heif.register_heif_opener()


def _rawmode(args: Any) -> str:
    """args: of a tile of Pillow, which are the rawmode or begin with it."""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _with_rawmode(args, rawmode):
    return (rawmode, *args[1:]) if isinstance(args, tuple) else rawmode


def _to_rgb(image, profile):
    """8-bit image of any mode -> sRGB, transparent pixels on white. An alpha channel of nothing but zeros is unused."""
    alpha = None
    if image.has_transparency_data:
        rgba = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        alpha = rgba.getchannel("A")
        image = rgba.getchannel("R") if image.mode in ("1", "L", "LA", "La") else rgba.convert("RGB")
    if image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    image = to_srgb(image, profile)
    if alpha and alpha.getextrema()[1] > 0:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


def decode(path: str | Path, size: int, resize: str = "stretch") -> tuple[np.ndarray, tuple[float, int]]:
    """Decode a file and resize it to a square, antialiased -> ((size, size, 3) uint8, its FACTS).

    resize: "stretch" both sides, "crop" the square in the middle, or "pad" the shorter side with black. Raises as
    `load_image` does.
    """
    image, is_dark = _load(path, size)
    aspect = max(image.size) / min(image.size)
    image = to_square(image, size, resize)  # frees the full image, while its memory is still in the processor's cache
    pixels = np.asarray(image)
    return pixels, (aspect, ONE_COLOR * is_one_color(pixels) | TOO_DARK * is_dark)


def to_square(image: Image.Image, size: int, resize: str) -> Image.Image:
    """8-bit RGB image of any sides -> (size, size), antialiased. resize: as for `decode`."""
    width, height = image.size
    if resize == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    if resize == "pad" and width != height:
        scale = size / max(width, height)
        sides = tuple(max(1, round(side * scale)) for side in image.size)
        square = Image.new("RGB", (size, size), PADDING)
        square.paste(image.resize(sides, Image.Resampling.BILINEAR), tuple((size - side) // 2 for side in sides))
        return square
    return image.resize((size, size), Image.Resampling.BILINEAR)


def is_one_color(pixels: np.ndarray) -> bool:
    """Whether all pixels are the same, but for SAME_COLOR. pixels: (H, W, 3) uint8."""
    corner, middle = pixels[0, 0].tolist(), pixels[pixels.shape[0] // 2, pixels.shape[1] // 2].tolist()
    if any(abs(a - b) > SAME_COLOR for a, b in zip(corner, middle, strict=True)):  # nearly always
        return False
    return bool(np.ptp(pixels.reshape(-1, 3), axis=0).max() <= SAME_COLOR)


def warn_of_other_decoder(path: str | Path, version: int, flag: str = "--resume") -> None:
    """Warn if the images of the checkpoint at `path` were decoded by another version of this project.

    flag: the flag that names the file.
    """
    if version != DECODER_VERSION:
        print(
            f"warning: {flag}: {path} was trained on images decoded by version {version}, this is version "
            f"{DECODER_VERSION}; images with a color profile, an unused alpha channel or more than 8 bits per channel "
            "may have other colors now",
            file=sys.stderr,
        )


def read_image(path: str | Path, size: int, resize: str = "stretch") -> np.ndarray:
    """The pixels of `decode`, but raises UserError, naming the file, if it cannot be read."""
    try:
        return decode(path, size, resize)[0]
    except Exception as error:  # decoders raise nearly anything on a broken file; the user needs to know which file
        raise UserError(f"{path} cannot be read: {failure_reason(error, path)}") from error


def failure_reason(error: Exception, path: str | Path) -> str:
    """What the decoder raised, in words for the user, and what the file is instead of an image."""
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"larger than {image_size_limit():g} megapixels; if that is correct, raise --max_megapixels"
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "empty file"
    reason = getattr(error, "strerror", None) or str(error).replace(repr(path), "").rstrip(": ") or repr(error)
    kind = describe_file(path) if isinstance(error, UnidentifiedImageError) else None
    return f"{reason}: it is {kind}" if kind else reason
