"""Color profiles."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from icc_profiles import PRIMARIES, cmyk_profile, gray_profile, rgb_profile
from PIL import Image, ImageCms

from images.color import MAX_PROFILE_BYTES, MAX_TRANSFORMS, _transform, describe_profile, to_srgb
from images.decode import load_image

SKIN = (200, 150, 130)


def expected(name):
    """`SKIN` in the color space `name`, as sRGB by the definitions of both."""
    levels = np.array(SKIN) / 255
    linear = levels**2.2 if name == "adobe" else ((levels + 0.055) / 1.055) ** 2.4
    xyz = linear @ np.array(PRIMARIES[name])
    srgb = xyz @ np.linalg.inv(np.array(PRIMARIES["srgb"]))
    return 255 * (1.055 * srgb ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("name", ["p3", "adobe"])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".avif"])
def test_display_p3_and_adobe_rgb_become_srgb(tmp_path, name, suffix):
    Image.new("RGB", (16, 16), SKIN).save(tmp_path / f"i{suffix}", icc_profile=rgb_profile(name))
    pixels = np.asarray(load_image(tmp_path / f"i{suffix}")).reshape(-1, 3)
    assert np.abs(pixels - expected(name)).max() < 4  # lossy formats differ by 2 to 3
    assert pixels[:, 0].min() > SKIN[0] + 5


@pytest.mark.parametrize(
    "profile", [rgb_profile("srgb"), b"", b"garbage" * 30, rgb_profile("p3")[:300], gray_profile(1.8)]
)
def test_no_bit_changes_with_srgb_or_with_a_profile_that_does_not_fit_or_is_broken(tmp_path, profile):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "i.png", icc_profile=profile)
    assert np.array_equal(load_image(tmp_path / "i.png"), noise)


def test_an_srgb_profile_of_another_program_changes_nothing():
    assert _transform(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), "RGB") is None


def test_gray_and_transparent_and_palette_images_are_converted(tmp_path):
    Image.new("L", (8, 8), 128).save(tmp_path / "l.png", icc_profile=gray_profile(1.8))
    assert abs(np.asarray(load_image(tmp_path / "l.png")).astype(int) - 146).max() <= 1
    gray = Image.merge("LA", [Image.new("L", (8, 8), 128), Image.linear_gradient("L").resize((8, 8))])
    gray.save(tmp_path / "la.png", icc_profile=gray_profile(1.8))
    with_profile = np.asarray(load_image(tmp_path / "la.png")).astype(int)
    assert with_profile[0].min() > 235 and abs(with_profile[-1] - 146).max() < 10
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(tmp_path / "16.png", icc_profile=gray_profile(1.8))
    assert abs(np.asarray(load_image(tmp_path / "16.png")).astype(int) - 146).max() <= 1
    for image in (Image.new("RGBA", (8, 8), SKIN), Image.new("RGB", (8, 8), SKIN).quantize()):
        image.save(tmp_path / "i.png", icc_profile=rgb_profile("p3"))
        assert np.abs(np.asarray(load_image(tmp_path / "i.png")) - expected("p3")).max() < 2, image.mode


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_is_converted_by_its_profile(tmp_path, suffix):
    """The profile makes cyan a gray, which the usual formula does not."""
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / f"i{suffix}", icc_profile=cmyk_profile())
    pixels = np.asarray(load_image(tmp_path / f"i{suffix}")).astype(int)
    assert np.ptp(pixels, axis=2).max() <= 3 and abs(pixels - 162).max() <= 3


def test_lab_is_converted(tmp_path):
    lab = Image.merge("LAB", [Image.new("L", (4, 4), value) for value in (180, 150, 160)])
    lab.save(tmp_path / "lab.tif")
    red, green, blue = np.asarray(load_image(tmp_path / "lab.tif"))[0, 0].tolist()
    assert red > green + 40 > blue + 60


def test_threads_share_a_transform():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    alone = to_srgb(noise, rgb_profile("adobe")).tobytes()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: to_srgb(noise, rgb_profile("adobe")).tobytes(), range(64))) == {alone}


def test_the_memory_of_transforms_is_bounded():
    for number in range(2 * MAX_TRANSFORMS):
        to_srgb(Image.new("L", (1, 1)), gray_profile(1 + number / 100))
    assert _transform.cache_info().currsize <= MAX_TRANSFORMS


def test_a_profile_is_described_with_what_becomes_of_the_colors():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert describe_profile(None, "RGB") == "none" and describe_profile(srgb, "RGB") == "sRGB built-in"
    for mode in ("RGB", "RGBA", "P"):
        assert describe_profile(rgb_profile("p3"), mode).endswith(", converted to sRGB")
    assert describe_profile(cmyk_profile(), "CMYK").endswith(", converted to sRGB")
    assert describe_profile(cmyk_profile(), "RGB").endswith("not used: it is of other colors than the image")
    for broken in (b"garbage", srgb[:16] + b"\xd2GB " + srgb[20:]):  # the name of a color space is ASCII
        assert describe_profile(broken, "RGB") == "cannot be read, not used"
    assert describe_profile(bytes(MAX_PROFILE_BYTES + 1), "RGB") == "too large, not used"
