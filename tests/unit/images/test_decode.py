"""Decoding photographs."""

import struct

import numpy as np
import pytest
from PIL import Image

from images.decode import ONE_COLOR, decode, load_image, read_header, read_image


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


def half_and_half(size):
    """Left red, right blue."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2, 0, *size))
    return image


@pytest.mark.parametrize("kind", ["RGBA.png", "LA.png", "RGBA.tif", "RGBA.webp", "RGBA.bmp", "RGBA.gif"])
def test_an_alpha_channel_of_zeros_is_not_transparency(tmp_path, kind):
    mode, suffix = kind.split(".")
    image = Image.new(mode, (32, 32), (150, 100, 90, 0) if mode == "RGBA" else (120, 0))
    image.paste((90, 60, 50, 0) if mode == "RGBA" else (60, 0), (0, 0, 32, 16))
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    if suffix == "gif":
        image = image.convert("RGB").quantize(4)
        image = image.point(lambda index: 0)  # a single color, which is declared transparent
        options = {"transparency": 0}
    image.save(tmp_path / f"i.{suffix}", **options)
    pixels = np.asarray(load_image(tmp_path / f"i.{suffix}"))
    assert pixels.max() < 160
    assert suffix == "gif" or np.ptp(pixels[:, 0, 0]) > 50


@pytest.mark.parametrize("extra_samples", [None, 0, 1, 2])
def test_a_fourth_channel_of_zeros_in_a_tiff_is_not_transparency(tmp_path, extra_samples):
    """Whatever the file says about it; 1: the colors are multiplied by it."""
    pixels = np.full((16, 16, 4), (150, 100, 90, 0), np.uint8)
    pixels[:8] //= 2
    tags = {256: (4, 16), 257: (4, 16), 258: (3, 0), 259: (3, 1), 262: (3, 2), 273: (4, 0), 277: (3, 4)}
    tags |= {278: (4, 16), 279: (4, pixels.nbytes)} | ({} if extra_samples is None else {338: (3, extra_samples)})
    start = 8 + 2 + 12 * len(tags) + 4
    tags |= {258: (3, start), 273: (4, start + 8)}
    content = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    for tag, (kind, value) in sorted(tags.items()):
        content += struct.pack("<HHLL", tag, kind, 4 if tag == 258 else 1, value)
    content += bytes(4) + struct.pack("<4H", 8, 8, 8, 8) + pixels.tobytes()
    (tmp_path / "i.tif").write_bytes(content)
    assert np.array_equal(load_image(tmp_path / "i.tif"), pixels[..., :3])


def test_images_of_one_color_are_noted(tmp_path):
    def notes(image, suffix=".png"):
        image.save(tmp_path / f"i{suffix}")
        return decode(tmp_path / f"i{suffix}", 32)[1][1]

    assert notes(Image.new("RGB", (50, 40), "white")) & ONE_COLOR
    assert notes(Image.new("RGB", (50, 40), (120, 90, 77)), ".jpg") & ONE_COLOR
    assert notes(Image.new("RGBA", (50, 40), (10, 20, 30, 1))) & ONE_COLOR
    spot = Image.new("RGB", (64, 64), "white")
    spot.paste("black", (3, 5, 6, 8))
    assert not notes(spot) & ONE_COLOR


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (640, 320), (97, 33)])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_crop_keeps_the_middle_and_pad_keeps_everything_without_distortion(tmp_path, size, suffix):
    (width, height), side = size, min(size) // 2
    image = Image.new("RGB", size, "blue")
    image.paste("red", ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2))
    image.save(tmp_path / f"i{suffix}", **({"quality": 95, "subsampling": 0} if suffix == ".jpg" else {}))

    def red_box(resize):
        pixels = decode(tmp_path / f"i{suffix}", 32, resize)[0].astype(int)
        return (pixels[..., 0] - pixels[..., 2] > 0), pixels

    for resize, scale in (("crop", 32 / min(size)), ("pad", 32 / max(size))):
        red, pixels = red_box(resize)
        rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
        assert abs(len(rows) - side * scale) <= 1.5 and abs(len(columns) - side * scale) <= 1.5
        assert abs(rows.mean() - 15.5) <= 1 and abs(columns.mean() - 15.5) <= 1
    black = (pixels.max(axis=2) < 20).mean()
    assert abs(black - (1 - min(size) / max(size))) < 0.05
    red, _ = red_box("stretch")
    assert abs(red.any(axis=1).sum() - 32 * side / height) <= 1.5
    assert abs(red.any(axis=0).sum() - 32 * side / width) <= 1.5


@pytest.mark.parametrize("size", [(48, 48), (32, 32), (400, 400)])
def test_a_square_is_the_same_whatever_resize_says(tmp_path, size):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "i.jpg")
    stretched, facts = decode(tmp_path / "i.jpg", 32)
    for resize in ("crop", "pad"):
        assert np.array_equal(decode(tmp_path / "i.jpg", 32, resize)[0], stretched)
    assert facts == (1, 0)


def test_the_aspect_ratio_is_that_of_the_upright_photograph(tmp_path):
    half_and_half((90, 30)).save(tmp_path / "i.jpg")
    assert decode(tmp_path / "i.jpg", 32)[1] == (3, 0)


def test_the_header_is_read_without_the_pixels(tmp_path):
    Image.new("RGB", (600, 400)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    header = read_header(tmp_path / "cut.png")
    assert (header.width, header.height, header.format, header.mode, header.profile) == (600, 400, "PNG", "RGB", None)
    with pytest.raises(OSError, match=r"(?i)truncated"):
        load_image(tmp_path / "cut.png")
