"""Which files are images, and what the others are."""

import io
import sys

import pytest
from PIL import Image

import images.formats
from images.decode import load_image, read_image
from images.formats import IMAGE_EXTENSIONS, image_extensions
from run.cli import UserError

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
OTHER_FILES = {
    HEIC: "HEIC photograph",
    b"<!DOCTYPE html><html><body>404 Not Found</body></html>": "HTML page",
    b"\xef\xbb\xbf\n <HTML lang=ko>": "HTML page",
    b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>': "SVG drawing",
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>': "XML document",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n": "Git LFS pointer",
    b"/annex/objects/SHA256E-s1--1.jpg\n": "git-annex pointer",
    b"path,label\na.jpg,1\n": "text file",
    "사진".encode("utf-16"): "text file",
    b"\0\0\0\x20ftypisom" + bytes(100): "video",
    b"\0\0\0\x14ftypqt  " + bytes(100): "video",
    b"RIFF\0\0\0\0AVI LIST" + bytes(100): "AVI video",
    b"\x1aE\xdf\xa3" + bytes(100): "Matroska or WebM video",
    b"%PDF-1.7\n%\xe2\xe3": "PDF document",
    b"PK\x03\x04" + bytes(100): "ZIP archive",
    bytes(128) + b"DICM" + bytes(100): "DICOM file",
    bytes(5000): "zero bytes",
    b"\xff\xd8\xff\xd9": "damaged JPEG",
    b"\x89PNG\r\n\x1a\n\0\0\0": "damaged PNG",
}


@pytest.mark.parametrize("content", OTHER_FILES, ids=range(len(OTHER_FILES)))
def test_a_file_that_is_no_image_is_described_by_what_it_is(tmp_path, content, monkeypatch):
    monkeypatch.setattr(images.formats, "find_spec", lambda name: None)
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(UserError, match=f"photo.jpg cannot be read: .*{OTHER_FILES[content]}"):
        read_image(tmp_path / "photo.jpg", 32)


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UserError, match="empty file"):
        read_image(tmp_path / "photo.jpg", 32)


@pytest.mark.parametrize("extension", IMAGE_EXTENSIONS)
def test_all_extensions_are_read(tmp_path, extension):
    Image.new("RGB", (64, 48), (200, 150, 130)).save(tmp_path / f"photo{extension}")
    image = load_image(tmp_path / f"photo{extension}")
    assert image.size == (64, 48)
    assert all(abs(a - b) < 5 for a, b in zip(image.getpixel((20, 20)), (200, 150, 130), strict=True))


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".webp", ".png"])
def test_of_several_pages_or_frames_the_first_is_read(tmp_path, suffix):
    first, second = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue")
    first.save(tmp_path / f"pages{suffix}", save_all=True, append_images=[second])
    red, _, blue = load_image(tmp_path / f"pages{suffix}").getpixel((10, 10))
    assert red > 200 and blue < 50


def test_heic_is_an_image_only_with_the_package(monkeypatch):
    for found in (None, object()):
        monkeypatch.setattr(images.formats, "find_spec", lambda name, found=found: found)
        assert (".heic" in image_extensions()) == (".heif" in image_extensions()) == bool(found)


def test_heic_is_read_with_the_package_whatever_its_name(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    content = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 150, 130))).save(content, quality=95)
    for name in ("photo.heic", "photo.jpg"):
        (tmp_path / name).write_bytes(content.getvalue())
        image = load_image(tmp_path / name)
        assert image.size == (64, 48) and abs(image.getpixel((20, 20))[0] - 200) < 5
    assert "pillow_heif" in sys.modules
