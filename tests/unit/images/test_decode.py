"""Decoding photographs."""

import numpy as np
import pytest
from PIL import Image

from images.decode import load_image, read_image


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees: the left side of the file is the top of the picture
    image.save(tmp_path / "rotated.jpg", exif=exif, quality=95)
    upright = load_image(tmp_path / "rotated.jpg")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[0] > 200 and upright.getpixel((10, 35))[2] > 200


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grayscale_is_scaled_not_clipped(tmp_path, suffix):
    gray = np.array([[0, 256 * 100], [256 * 200, 65535]], dtype=np.uint16)
    Image.fromarray(gray).save(tmp_path / f"gray{suffix}")
    assert np.asarray(load_image(tmp_path / f"gray{suffix}"))[..., 0].tolist() == [[0, 100], [200, 255]]


def test_float_grayscale_is_scaled(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)).save(tmp_path / "f.tif")
    assert np.asarray(load_image(tmp_path / "f.tif"))[0, :, 1].tolist() == [0, 127, 255]


def test_32_bit_grayscale_is_scaled_by_its_range(tmp_path):
    for values, expected in [([0, 100, 200], [0, 100, 200]), ([0, 25600, 51200], [0, 100, 200])]:
        Image.fromarray(np.array([values], dtype=np.int32)).save(tmp_path / "i.tif")
        assert np.asarray(load_image(tmp_path / "i.tif"))[0, :, 0].tolist() == expected


def test_cmyk_palette_grayscale_and_bilevel_become_rgb(tmp_path):
    skin = Image.new("RGB", (8, 8), (220, 170, 140))
    for mode, name, tolerance in [
        ("CMYK", "c.jpg", 8), ("CMYK", "c.tif", 2), ("P", "p.png", 30), ("L", "l.png", 60), ("1", "b.png", 120)
    ]:  # fmt: skip
        skin.convert(mode).save(tmp_path / name)
        image = load_image(tmp_path / name)
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - np.asarray(skin)).mean() < tolerance, (mode, name)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (10, 10, 10, 255))
    image = image.convert(mode)
    image.save(tmp_path / "t.png")
    pixels = np.asarray(load_image(tmp_path / "t.png"))
    assert pixels[3, 3].tolist() == [255, 255, 255]
    assert pixels[0, 0].max() < 20


def test_resizing_is_antialiased(tmp_path):
    checker = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checker).save(tmp_path / "checker.png")
    assert np.abs(read_image(tmp_path / "checker.png", 8).astype(int) - 127).max() < 10


def test_a_large_jpeg_is_decoded_at_a_smaller_size_and_looks_the_same(tmp_path):
    y, x = np.mgrid[:1000, :800] / 100
    waves = 128 + 60 * np.sin(3 * x + y) + 50 * np.sin(0.5 * x * y)
    Image.fromarray(np.stack([waves, waves * 0.8, 255 - waves], -1).clip(0, 255).astype(np.uint8)).save(
        tmp_path / "l.jpg", quality=95
    )
    assert load_image(tmp_path / "l.jpg", 200).size == (200, 250)
    assert load_image(tmp_path / "l.jpg", 201).size == (400, 500)
    whole = load_image(tmp_path / "l.jpg").resize((200, 200), Image.Resampling.BILINEAR)
    assert np.abs(read_image(tmp_path / "l.jpg", 200).astype(int) - np.asarray(whole)).mean() < 2
