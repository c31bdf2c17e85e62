"""Images of more than 8 bits: how bright white is, as the file states it, and their values as 8 bits."""

import math
import struct
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin

BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE, SAMPLE_FORMAT, S_MAX_SAMPLE_VALUE = 258, 262, 281, 339, 341  # TIFF
SIGNED, FLOAT = 2, 3  # sample formats
FULL_SCALE = 65535
MAX_CHUNKS = 1000  # of a PNG, looked at before its pixels
DARK_SHARE = 4  # an image is dark if white is more than this many times its brightest value
OTHER_BYTE_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}

# Pillow knows some layouts of gray TIFF images only with black as 0; `Depth` tells which are inverted
for _layout, _modes in list(TiffImagePlugin.OPEN_INFO.items()):
    if _layout[1] == 1 and len(_layout[4]) == 1 and _layout[4][0] > 8:
        TiffImagePlugin.OPEN_INFO.setdefault((_layout[0], 0, *_layout[2:]), _modes)


class Depth:
    """What an image of more than 8 bits states about its values. image: opened, but not loaded.

    white: the value of white, None if it is not stated; inverted: whether `white` is black, and 0 is white.
    """

    def __init__(self, image: Image.Image):
        self.white, self.inverted, self._may_be_scaled, self._full_scale = FULL_SCALE, False, False, FULL_SCALE
        self._is_unsigned_32 = False
        if image.format == "TIFF":
            self._read_tags(image.tag_v2, is_gray=len(image.getbands()) == 1)
        elif image.format == "PNG":
            bits = max(_significant_bits(image.fp), default=None)
            self.white, self._may_be_scaled = bits and 2**bits - 1, bits is not None and bits < 16
        elif image.mode == "F":
            self.white = None

    def _read_tags(self, tags, is_gray):
        bits, kind = _first(tags, BITS_PER_SAMPLE), _first(tags, SAMPLE_FORMAT)
        stated = _first(tags, MAX_SAMPLE_VALUE) or _first(tags, S_MAX_SAMPLE_VALUE)
        self.inverted = is_gray and _first(tags, PHOTOMETRIC) == 0
        self._is_unsigned_32 = bits == 32 and kind not in (SIGNED, FLOAT)
        self._full_scale = 32767 if (kind, bits) == (SIGNED, 16) else FULL_SCALE
        self.white = None
        if isinstance(bits, int) and 8 < bits < 16:
            self.white = 2**bits - 1
        elif isinstance(stated, (int, float)) and math.isfinite(stated) and stated > 0:
            # often the largest value that occurs: white is the largest value of as many bits
            self.white = stated if kind == FLOAT else 2 ** int(stated).bit_length() - 1

    def values_of(self, image: Image.Image) -> np.ndarray:
        """-> the values of a gray image, finite."""
        values = np.asarray(image)
        if self._is_unsigned_32:  # Pillow reads them as signed
            values = values.view(np.uint32)
        return np.nan_to_num(values, nan=0, posinf=0, neginf=0)

    def white_of(self, values: np.ndarray) -> tuple[float, bool]:
        """-> (the value of white, whether the file states it). values: of the image, int or float."""
        brightest = values.max()
        if self._may_be_scaled:
            # PNG: the values are scaled to 16 bits, but some programs do not. The bits below the original ones repeat
            # the highest, so they are 0 in a dark image, or 1 if it was rounded
            low_bits = FULL_SCALE // (self.white + 1)
            is_scaled = brightest > self.white or (values & low_bits).max() <= 1
            return (FULL_SCALE if is_scaled else self.white), True
        if self.white is not None and brightest <= self.white:
            return self.white, True
        if values.dtype.kind == "f" and brightest <= 2:  # white is 1; resampling adds somewhat brighter values
            return 1, False
        if values.dtype.kind != "f" and brightest > FULL_SCALE:
            return np.iinfo(values.dtype).max, False
        is_16_bit = values.dtype.itemsize == 2
        return (255 if brightest <= 255 and not is_16_bit else self._full_scale), False


def _first(tags, tag):
    """-> the value of a TIFF tag, or the first of its values; None if it has none that can be read."""
    try:
        value = tags.get(tag)
        return value[0] if isinstance(value, tuple) else value
    except Exception:  # on a malformed tag, Pillow raises nearly anything
        return None


def _significant_bits(file: BinaryIO) -> tuple[int, ...]:
    """-> the chunk sBIT of a PNG, the number of original bits of each channel; empty if it has none."""
    position = file.tell()
    try:
        file.seek(8)
        for _ in range(MAX_CHUNKS):
            length, name = struct.unpack(">L4s", file.read(8))
            if name == b"sBIT":
                return tuple(bits for bits in file.read(min(length, 4)) if 0 < bits <= 16)
            if name in (b"IDAT", b"IEND"):
                break
            file.seek(length + 4, 1)
    except struct.error:
        pass
    finally:
        file.seek(position)
    return ()


def gray_to_8_bit(image: Image.Image, depth: Depth) -> tuple[Image.Image, bool]:
    """16-bit, 32-bit or float gray -> (mode L, whether it is suspiciously dark: see `looks_dark`)."""
    values = depth.values_of(image)
    white, is_stated = depth.white_of(values)
    scaled = _scale(values, white)
    return Image.fromarray(255 - scaled if depth.inverted else scaled), looks_dark(values.max(), white, is_stated)


def color_to_8_bit(
    image: Image.Image, depth: Depth, rawmode: str, reload: Callable[[str], Image.Image]
) -> tuple[Image.Image, bool]:
    """An image of 16 bits per channel, of which Pillow read the high bytes -> as `gray_to_8_bit`, in the same mode.

    reload: reads the image again in another `rawmode`; in the other byte order, it is the low bytes that are read.
    """
    if depth.white is None:
        return image, looks_dark(max(high for _, high in image.getextrema()[:3]), 255, False)
    if depth.white < FULL_SCALE and rawmode.startswith(("RGB;16", "RGBA;16")):
        low_bytes = reload(rawmode[:-1] + OTHER_BYTE_ORDER[rawmode[-1]])
        values = np.asarray(image).astype(np.uint16) * 256 + np.asarray(low_bytes)
        white, is_stated = depth.white_of(values)
        return Image.fromarray(_scale(values, white)), looks_dark(values[..., :3].max(), white, is_stated)
    return image, False


def looks_dark(brightest: float, white: float, is_stated: bool) -> bool:
    """Whether an image that does not state white is so dark that its values probably have fewer bits."""
    return bool(not is_stated and 0 < brightest < white / DARK_SHARE)


def _scale(values: Any, white: float) -> np.ndarray:
    """0 ... white -> 0 ... 255, rounded down."""
    values = np.clip(values, 0, white)
    steps = (white + 1) / 256
    if steps >= 1 and steps == int(steps):
        return (values // int(steps)).astype(np.uint8)
    return (values.astype(np.float64) * 255 / white).astype(np.uint8)
