"""What is measured of photographs: sides, light, sharpness, formats and profiles."""

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from images.decode import read_image
from images.statistics import MAX_NAMES, OTHERS, measure


def pattern(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 1)


def measured(paths, size=32, resize="stretch"):
    return measure([str(path) for path in paths], lambda i: read_image(paths[i], size, resize), resize)


def test_dark_plain_and_blurred_photographs_are_told_apart(tmp_path):
    sharp = pattern(32, 32)
    images = {
        "sharp": sharp, "blurred": cv2.GaussianBlur(sharp, (0, 0), 3), "gray": np.full((32, 32, 3), 90, np.uint8),
        "black": np.zeros((32, 32, 3), np.uint8), "dark": sharp // 20,
    }  # fmt: skip
    for name, pixels in images.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    values = dict(zip(images, measured([tmp_path / f"{name}.png" for name in images]).values, strict=True))
    assert [name for name, row in values.items() if row["near_black"]] == ["black", "dark"]
    assert [name for name, row in values.items() if row["one_color"]] == ["gray", "black"]
    assert values["gray"]["brightness"] == 90 and values["gray"]["sharpness"] == 0
    gray = cv2.cvtColor(sharp, cv2.COLOR_RGB2GRAY)
    assert values["sharp"]["sharpness"] == pytest.approx(cv2.Laplacian(gray, cv2.CV_64F).var(), rel=1e-4)
    assert values["sharp"]["sharpness"] > 20 * values["blurred"]["sharpness"] > 0


def test_padding_is_no_part_of_a_photograph(tmp_path):
    pixels = pattern(64, 16) // 2 + 100
    paths = [tmp_path / "wide.png", tmp_path / "high.png"]
    for path, image in zip(paths, (pixels, pixels.transpose(1, 0, 2)), strict=True):
        Image.fromarray(image).save(path)
    padded = measured(paths, 64, "pad")
    assert padded.values["brightness"] == pytest.approx([pixels @ [0.299, 0.587, 0.114]][0].mean(), abs=1)
    assert (padded.thumbnails > 50).all()
    # one row of pixels is left of this one
    Image.fromarray(pattern(3000, 4)).save(tmp_path / "line.png")
    assert measured([tmp_path / "line.png"], 32, "pad").values["height"] == 4


def test_sides_are_those_of_the_upright_file(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pattern(60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(pattern(60, 40)).save(tmp_path / "plain.jpg")
    found = measured([tmp_path / "turned.jpg", tmp_path / "plain.jpg"])
    assert found.values[["width", "height"]].tolist() == [(40, 60), (60, 40)]
    assert found.shorter_sides().tolist() == [40, 40] and found.aspects() == pytest.approx([2 / 3, 1.5])


def test_a_file_that_is_gone_lacks_only_what_it_states(tmp_path):
    found = measure(["/nowhere/a.jpg"], lambda i: pattern(32, 32), "pad")
    assert found.kinds == found.profiles == ["unknown"] and found.values["brightness"] > 0
    assert found.shorter_sides().tolist() == [0] and np.isnan(found.aspects()).all()


def test_formats_and_profiles_are_counted_and_their_number_is_bounded(tmp_path, monkeypatch):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pattern(20, 20)).save(tmp_path / "0.jpg", icc_profile=srgb)
    Image.fromarray(pattern(20, 20)).convert("L").save(tmp_path / "1.png")
    found = measured([tmp_path / "0.jpg", tmp_path / "1.png", tmp_path / "0.jpg"])
    assert [found.kinds[n] for n in found.values["kind"]] == ["JPEG RGB", "PNG L", "JPEG RGB"]
    assert [found.profiles[n] for n in found.values["profile"]] == ["sRGB built-in", "none", "sRGB built-in"]
    numbers = iter(range(100))
    monkeypatch.setattr("images.statistics._header", lambda path: (1, 1, f"kind {next(numbers)}", "none"))
    many = measure(["a"] * 100, lambda i: pattern(8, 8), "stretch")
    assert len(many.kinds) == MAX_NAMES + 1 and many.kinds[-1] == OTHERS
    assert (many.values["kind"] == MAX_NAMES).sum() == 100 - MAX_NAMES
