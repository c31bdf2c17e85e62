"""Metadata never decide whether an image is read."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from images.decode import load_image, read_header

PIXELS = np.full((40, 60, 3), (200, 160, 140), np.uint8)
PIXELS[10:20] -= 80
PIXELS[:, :10] = (250, 30, 30)
UPRIGHT, TURNED = PIXELS, np.rot90(PIXELS, -1)


def encode(kind, **options):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, kind, **({} if kind in ("PNG", "TIFF") else {"quality": 95}), **options)
    return file.getvalue()


def check(path, content, expected=UPRIGHT):
    path.write_bytes(content)
    pixels = np.asarray(load_image(path))
    header = read_header(path)
    assert (header.height, header.width) == expected.shape[:2]
    assert pixels.shape == expected.shape and np.abs(pixels.astype(int) - expected).mean() < 3


def exif(*entries):
    """EXIF of (tag, type, count, 4 bytes), and orientation 6."""
    entries = sorted([(0x112, 3, 1, b"\6\0\0\0"), *entries])
    packed = b"".join(struct.pack("<HHL", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4) + b"<x:xmpmeta>abcdefgh\0"


ODD_ENTRIES = {
    "width as text": (0x100, 2, 4, b"4000"),
    "text outside": (0x100, 2, 5, b"\xff\xff\xff\x7f"),
    "XMP as text": (0x2BC, 2, 20, struct.pack("<L", 38)),
    "signed resolution": (0x11A, 10, 1, struct.pack("<L", 38)),
    "unknown type": (0x10E, 99, 1, b"abcd"),
    "value outside": (0x10E, 2, 100, b"\xff\xff\xff\x7f"),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("entry", ODD_ENTRIES.values(), ids=ODD_ENTRIES)
def test_an_image_is_turned_although_other_entries_of_its_exif_are_malformed(tmp_path, kind, entry):
    check(tmp_path / "image", encode(kind, exif=exif(entry)), TURNED)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "garbage", [b"garbage garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_an_image_whose_exif_is_not_legible_is_read_as_upright(tmp_path, kind, garbage):
    check(tmp_path / "image", encode(kind, exif=garbage))


@pytest.mark.parametrize("orientation", [(2, 2, b"6\0"), (3, 1, b"\0\0"), (3, 1, b"\xff\xff"), (7, 4, b"abcd")])
def test_an_orientation_that_does_not_exist_is_upright(tmp_path, orientation):
    block = (
        b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHL", 0x112, *orientation[:2]) + orientation[2].ljust(8, b"\0")
    )
    check(tmp_path / "image.jpg", encode("JPEG", exif=block))


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("damage", ["bomb", "checksum", "text without an end"])
def test_text_in_a_png_does_not_matter(tmp_path, position, damage):
    name, data = b"tEXt", b"title\0text"
    if damage == "bomb":
        name, data = b"zTXt", b"title\0\0" + zlib.compress(bytes(10**8))
    elif damage == "text without an end":
        name, data = b"iTXt", b"title\0\1"
    checksum = zlib.crc32(name + data) ^ (damage == "checksum")
    chunk = struct.pack(">L", len(data)) + name + data + struct.pack(">L", checksum)
    content = encode("PNG", exif=exif())
    at = 33 if position == "before" else len(content) - 12
    check(tmp_path / "image.png", content[:at] + chunk + content[at:], TURNED)


@pytest.mark.parametrize(
    "segment",
    [b"\xe0JFIF\0", b"\xe1http://ns.adobe.com/xap/1.0/\0" + b"\xff" * 20, b"\xe2MPF\0" + b"\xff" * 30, b"\xeeAdobe\0",
     b"\xe2ICC_PROFILE\0\1\2abc", b"\xedPhotoshop 3.0\08BIM\x03\xed\0\0\0\0\0\x02ab"],
)  # fmt: skip
def test_malformed_segments_of_a_jpeg_do_not_matter(tmp_path, segment):
    content = encode("JPEG", exif=exif())
    inserted = b"\xff" + segment[:1] + struct.pack(">H", len(segment) + 1) + segment[1:]
    check(tmp_path / "image.jpg", content[:2] + inserted + content[2:], TURNED)


@pytest.mark.parametrize(
    "entry",
    [(282, 2, 4, b"abc"), (700, 2, 4, b"AAAA"), (34675, 2, 4, b"AAAA"), (34665, 4, 1, b"\xff\xff\xff\x7f"),
     (34665, 2, 4, b"AAAA"), (305, 2, 100, b"\xff\xff\xff\x7f"), (50000, 99, 1, b"")],
)  # fmt: skip
def test_malformed_tags_of_a_tiff_do_not_matter(tmp_path, entry):
    """Appended as a new directory with the entry and an orientation."""
    content = encode("TIFF")
    (start,) = struct.unpack_from("<L", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    entries = [content[start + 2 + 12 * i :][:12] for i in range(count)]
    entries = [old for old in entries if struct.unpack_from("<H", old)[0] not in (entry[0], 274)]
    entries += [struct.pack("<HHL", *entry[:3]) + entry[3].ljust(4, b"\0"), struct.pack("<HHLL", 274, 3, 1, 6)]
    directory = struct.pack("<H", len(entries)) + b"".join(sorted(entries, key=lambda e: e[1] * 256 + e[0])) + bytes(4)
    content = content[:4] + struct.pack("<L", len(content)) + content[8:] + directory
    check(tmp_path / "image.tif", content, TURNED)


@pytest.mark.parametrize("damage", [(0, b"garb"), (4, b"\xff" * 4), (10, b"\xff" * 20)])
def test_an_avif_with_malformed_exif_is_read(tmp_path, damage):
    orientation = Image.Exif()
    orientation[0x112] = 6  # AVIF keeps it also outside EXIF
    orientation[0x10E] = "MARKER" * 3
    content = encode("AVIF", exif=orientation)
    at = max(content.rfind(b"II*\0", 0, content.index(b"MARKER")), content.rfind(b"MM\0*", 0, content.index(b"MARKER")))
    content = content[: at + damage[0]] + damage[1] + content[at + damage[0] + len(damage[1]) :]
    check(tmp_path / "image.avif", content, TURNED)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_pixels_that_are_cut_off_are_never_read(tmp_path, kind):
    content = encode(kind, **({} if kind in ("TIFF", "AVIF") else {"exif": exif(ODD_ENTRIES["width as text"])}))
    (tmp_path / "image").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(Exception, match=r"truncated|Truncated|cannot identify|decoder"):
        load_image(tmp_path / "image")
