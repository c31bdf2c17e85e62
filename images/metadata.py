"""Metadata never decide whether an image is read: EXIF orientation if it is legible, and copies without metadata."""

import io
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

MAX_COPY_BYTES = 2**30  # a larger file is not copied into memory
# EXIF orientation -> what turns the image upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXCHANGE_SIDES = [UPRIGHT[orientation] for orientation in (5, 6, 7, 8)]
ORIENTATION, ICC_PROFILE, PRIVATE_TAG = 274, 34675, 65000  # TIFF tags
# TIFF tags without which the pixels cannot be read, or would be others
PIXEL_TAGS = {
    256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 280, 281, 284, 292, 293, 317, 320, 322, 323,
    324, 325, 332, 338, 339, 340, 341, 347, 512, 513, 514, 515, 519, 520, 521, 529, 530, 531, 532,
}  # fmt: skip


def turn_upright(image: Image.Image) -> Image.Image:
    """Turn a loaded image by its EXIF orientation, which counts as 1 (upright) where it cannot be read."""
    method = _method(image)
    return image if method is None else image.transpose(method)


def is_turned(image: Image.Image) -> bool:
    """Whether the sides of an image that is opened, but not loaded, are exchanged when it is turned upright."""
    if image.format == "TIFF":  # the sides that Pillow states are those of the upright image
        return False
    if image.format == "PNG" and "exif" not in image.info:  # Pillow would decode the pixels to look behind them
        return False
    return _method(image) in EXCHANGE_SIDES


def _method(image):
    """-> what turns the image upright, None if nothing does."""
    try:
        orientation = image.getexif().get(ORIENTATION)
        if orientation is None and "exif" in image.info:
            orientation = _orientation_in(image.info["exif"])
        return UPRIGHT.get(orientation)
    except Exception:  # on malformed EXIF or XMP, Pillow raises nearly anything
        return None


def _orientation_in(exif):
    """The orientation in EXIF of which Pillow stops reading at a malformed entry before it."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = "<" if exif[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}L", exif, 4)
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    for place in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, length, value = struct.unpack_from(f"{order}HHLH", exif, place)
        if (tag, kind, length) == (ORIENTATION, 3, 1):
            return value
    return None


def copies_without_metadata(path: str | Path | bytes) -> Iterator[io.BytesIO]:
    """Yield copies of an image file: one with only its orientation and color profile, and one without any metadata.

    path: of the file, or its content. Copies that are the same as the file are left out, and so are formats whose
    metadata never prevent decoding.
    """
    if (len(path) if isinstance(path, bytes) else os.path.getsize(path)) > MAX_COPY_BYTES:
        return
    content = path if isinstance(path, bytes) else Path(path).read_bytes()
    strip = next((strip for signature, strip in STRIPPERS.items() if re.match(signature, content, re.S)), None)
    copies = {content}
    for keep_useful in (True, False) if strip else ():
        try:
            copy = strip(content, keep_useful)
        except (struct.error, IndexError):
            continue
        if copy not in copies:
            copies.add(copy)
            yield io.BytesIO(copy)


def _strip_jpeg(content, keep_useful):
    kept, start = [content[:2]], 2
    while content[start] == 0xFF and content[start + 1] != 0xDA:  # up to the compressed pixels
        marker = content[start + 1]
        if marker == 0xFF:  # a fill byte
            start += 1
            continue
        end = start + 2 + struct.unpack_from(">H", content, start + 2)[0]
        segment = content[start:end]
        is_color_transform = segment.startswith(b"Adobe", 4) and len(segment) >= 16
        is_metadata = (0xE0 <= marker <= 0xEF or marker == 0xFE) and not is_color_transform
        is_useful = segment.startswith((b"Exif\0", b"ICC_PROFILE\0"), 4)
        if not is_metadata or (keep_useful and is_useful):
            kept.append(segment)
        start = end
    return b"".join(kept) + content[start:]


def _strip_png(content, keep_useful):
    names = {b"IHDR", b"PLTE", b"tRNS", b"sBIT", b"IDAT", b"IEND"} | ({b"eXIf", b"iCCP"} if keep_useful else set())
    kept, start = [content[:8]], 8
    while start + 8 <= len(content):
        length, name = struct.unpack_from(">L4s", content, start)
        if name in names:
            kept.append(content[start : start + 12 + length])
        start += 12 + length
    return b"".join(kept)


def _strip_tiff(content, keep_useful):
    """Turn the entries of the first page that say nothing about the pixels into private tags that nobody reads."""
    order = "<" if content[:2] == b"II" else ">"
    copy = bytearray(content)
    (first_page,) = struct.unpack_from(f"{order}L", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, first_page)
    places = range(first_page + 2, first_page + 2 + 12 * count, 12)
    entries = {struct.unpack_from(f"{order}H", content, place)[0]: place for place in places}
    names = PIXEL_TAGS | ({ORIENTATION, ICC_PROFILE} if keep_useful else set())
    for tag, place in entries.items():
        if tag not in names:
            struct.pack_into(f"{order}HHLL", copy, place, PRIVATE_TAG, 1, 1, 0)
    return bytes(copy)


def _strip_heif(content, keep_useful):
    """Rename the item of type Exif, so that all offsets stay."""
    if keep_useful:
        return content
    return re.sub(rb"(infe(?:\x02...|\x03.....)....)Exif", rb"\1free", content, count=8, flags=re.S)


STRIPPERS = {
    rb"\xff\xd8\xff": _strip_jpeg,
    rb"\x89PNG\r\n\x1a\n": _strip_png,
    rb"II\*\0|MM\0\*": _strip_tiff,
    rb"....ftyp": _strip_heif,
}
