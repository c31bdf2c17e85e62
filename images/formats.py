"""Which files are images by their name, and what a file that cannot be decoded is by its first bytes."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif", ".jp2",
)  # fmt: skip
HEIF_EXTENSIONS = (".heic", ".heif")  # what phones write; Pillow needs the package pillow-heif to read them
HEAD_BYTES = 1024  # of a file that are looked at
# signatures of files that are found where images are expected: (at, bytes, what it is)
SIGNATURES = (
    (0, b"version https://git-lfs", "a Git LFS pointer; fetch the images with `git lfs pull`"),
    (0, b"/annex/objects/", "a git-annex pointer; fetch the images with `git annex get`"),
    (0, b"%PDF", "a PDF document"),
    (0, b"%!PS", "a PostScript document"),
    (0, b"PK\x03\x04", "a ZIP archive or an Office document"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!", "a RAR archive"),
    (0, b"\xd0\xcf\x11\xe0", "an Office document or Thumbs.db"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (8, b"AVI ", "an AVI video"),
    (128, b"DICM", "a DICOM file; convert it to PNG"),
    (0, b"8BPS", "a Photoshop document; export it as PNG"),
    (0, b"\xff\x0a", "a JPEG XL image; convert it to PNG"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image; convert it to PNG"),
    (0, b"\0\x05\x16\x07", "an AppleDouble file of macOS, which has no pixels"),
    (0, b"\x4c\0\0\0\x01\x14\x02\0", "a Windows shortcut"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\xff\xd8\xff", "a damaged JPEG image"),
    (0, b"\x89PNG\r\n\x1a\n", "a damaged PNG image"),
    (8, b"WEBP", "a damaged WebP image"),
    (0, b"GIF8", "a damaged GIF image"),
    (0, b"II*\0", "a damaged TIFF image, or a camera's raw file"),
    (0, b"MM\0*", "a damaged TIFF image, or a camera's raw file"),
)
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")


def can_read_heif() -> bool:
    return find_spec("pillow_heif") is not None


def image_extensions() -> tuple[str, ...]:
    """-> the extensions of the files that are read, in lower case."""
    return IMAGE_EXTENSIONS + HEIF_EXTENSIONS if can_read_heif() else IMAGE_EXTENSIONS


def describe_file(path: str | Path) -> str | None:
    """What a file is that cannot be decoded, by its first bytes: "an HTML page". None if that is unknown."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return None
    return describe_content(head, size)


def describe_content(head: bytes, size: int) -> str | None:
    """As `describe_file`. head: the first bytes, at most HEAD_BYTES; size: of the file, in bytes."""
    if not head.strip(b"\0"):
        return f"{size} bytes that are all zero" if size <= len(head) else "a file that begins with zero bytes"
    if head[4:8] == b"ftyp":
        return _describe_brand(head[8:12])
    for start, signature, kind in SIGNATURES:
        if head.startswith(signature, start):
            return kind
    return _describe_text(head)


def _describe_brand(brand):
    if brand in HEIF_BRANDS:
        return "a damaged HEIC photograph" if can_read_heif() else "a HEIC photograph; install pillow-heif to read it"
    if brand in AVIF_BRANDS:
        return "an AVIF image that is damaged, or that this build of Pillow cannot read"
    return "a raw photograph; convert it to PNG" if brand == b"crx " else "a video"


def _describe_text(head):
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = head.decode("utf-16", "replace")
    else:
        if re.search(rb"[\0-\x08\x0e-\x1f]", head):
            return None
        text = head.decode("utf-8-sig", "replace")
    text = text.lstrip().lower()
    if text.startswith("<") and re.search(r"<(!doctype html|html|head|body|script|!--)", text):
        return "an HTML page, probably of a download that failed"
    if "<svg" in text:
        return "an SVG drawing; convert it to PNG"
    if text.startswith("<"):
        return "an XML document"
    return "a text file"
