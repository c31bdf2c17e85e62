"""Colors as the file states them: embedded ICC profiles are converted to sRGB."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4 * 2**20  # of an embedded profile; CMYK profiles have up to 3 MB
MAX_TRANSFORMS = 16  # kept, of as many profiles: the photographs of a camera have the same one
SAME_COLOR = 2  # levels of 255: profiles of sRGB by different programs differ by rounding
# modes of files -> the mode that the profile is applied to
OTHER_MODES = {"P": "RGB", "PA": "RGB", "RGBA": "RGB", "RGBX": "RGB", "LA": "L", "1": "L", "I;16": "L", "I": "L"}
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # color space of a profile -> mode of its images


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image of mode RGB, L, CMYK or LAB to RGB by its ICC profile.

    No profile, a broken one, one of another color space than the image, and one of sRGB change no value.
    """
    if image.mode == "LAB":
        return ImageCms.applyTransform(image, _lab_transform())
    if isinstance(profile, bytes) and 0 < len(profile) <= MAX_PROFILE_BYTES:
        transform = _transform(profile, image.mode)
        if transform:
            return ImageCms.applyTransform(image, transform)
    return image if image.mode == "RGB" else image.convert("RGB")


def describe_profile(profile: bytes | None, mode: str) -> str:
    """What an image of a mode of Pillow has as its color profile, and what becomes of its colors."""
    if not profile:
        return "none"
    if not isinstance(profile, bytes) or len(profile) > MAX_PROFILE_BYTES:
        return "too large, not used"
    return _description(profile, OTHER_MODES.get(mode, mode))


@functools.lru_cache(MAX_TRANSFORMS)
def _description(profile, mode):
    try:
        parsed = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(parsed).strip() or "without a name"
        is_of_mode = MODES.get(parsed.profile.xcolor_space.strip()) == mode
    except Exception:  # as in `_transform`
        return "cannot be read, not used"
    if not is_of_mode:
        return f"{name}, not used: it is of other colors than the image"
    return f"{name}, converted to sRGB" if _transform(profile, mode) else name


@functools.lru_cache(MAX_TRANSFORMS)
def _transform(profile, mode):
    """-> the transform to sRGB, which threads may share; None if there is none, or if it would change nothing."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if MODES.get(source.profile.xcolor_space.strip()) != mode:
            return None
        intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
        transform = ImageCms.buildTransform(source, _srgb(), mode, "RGB", intent, flags)
        colors = _color_samples(mode)
        converted = np.asarray(ImageCms.applyTransform(colors, transform), dtype=int)
    except Exception:  # a broken profile says nothing about the colors, and fails in many ways
        return None
    is_srgb = mode != "CMYK" and np.abs(converted - np.asarray(colors.convert("RGB"))).max() <= SAME_COLOR
    return None if is_srgb else transform


@functools.cache
def _srgb():
    return ImageCms.createProfile("sRGB")


@functools.cache
def _lab_transform():
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), _srgb(), "LAB", "RGB")


def _color_samples(mode):
    """An image of colors from the whole range."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    channels = np.meshgrid(*[levels] * len(mode), indexing="ij")
    samples = np.stack(channels, axis=-1).reshape(1, -1, len(mode))
    return Image.frombytes(mode, (samples.shape[1], 1), samples.tobytes())
