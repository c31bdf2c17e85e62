"""A small synthetic dataset for `main.py --demo`: close-ups of skin with wrinkles of grades 0 to 4.

The grade determines the number, depth and length of the wrinkles. Skin color, light, pores and the path of each wrinkle
are random, so that only the wrinkles reveal the grade.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

IMAGES_PER_GRADE = (400, 200, 100, 50, 25)  # as imbalanced as real grades
PATCH_SIZE = 128


def use_demo_data(args: argparse.Namespace) -> None:
    """`--demo`: draw the images into the run folder and use them, with a cache beside them."""
    run_dir = Path(args.run_dir)
    args.data_dirs = [write_demo_data(run_dir / "demo_data", args.seed)]
    args.cache_dir = args.cache_dir or str(run_dir / "demo_cache")


def write_demo_data(folder: str | Path, seed: int) -> str:
    """Write one JPEG per patch to `folder/GRADE/`. -> `folder` as a string."""
    for grade, count in enumerate(IMAGES_PER_GRADE):
        grade_folder = Path(folder, str(grade))
        grade_folder.mkdir(parents=True, exist_ok=True)  # a run that was killed early may be started again
        for number in range(count):
            patch = draw_patch(grade, np.random.default_rng((seed, grade, number)))
            encoded = cv2.imencode(".jpg", cv2.cvtColor(patch, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
            (grade_folder / f"patch_{number:03d}.jpg").write_bytes(encoded)
    return str(folder)


def draw_patch(grade: int, rng: np.random.Generator, size: int = PATCH_SIZE) -> np.ndarray:
    """Draw one patch of skin of `grade`, 0 to 4 -> (size, size, 3) uint8, RGB."""
    relief = _pores(rng, size) + _wrinkles(grade, rng, size)
    tone = np.array([226, 178, 150]) * rng.uniform(0.5, 1.08) + rng.normal(0, 2.5, 3)
    # melanin and blood color the skin in soft patches; light falls from one side
    mottle = _smooth_noise(rng, size, size / 8)[..., None] * [2, 3, 3]
    slope = rng.normal(0, 0.08, 2)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    light = (1 + slope[0] * x + slope[1] * y)[..., None]
    # shadows on skin are reddish: green and blue lose more light than red
    shading = np.exp(relief[..., None] * [0.8, 1.0, 1.1])
    image = (tone + mottle) * light * shading + rng.normal(0, 2, (size, size, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def wrinkle_mask(grade: int, rng: np.random.Generator, size: int = PATCH_SIZE) -> np.ndarray:
    """Where the wrinkles of a patch are, to check heat maps with -> (size, size) bool.

    grade, rng, size: those of `draw_patch`, with the generator as it was before the patch was drawn.
    """
    _pores(rng, size)  # drawn before the wrinkles
    return _furrows(grade, rng, size)[0] > 0


def _smooth_noise(rng, size, sigma):
    """Noise of unit variance with a correlation length of about `sigma` pixels. -> (size, size)."""
    noise = cv2.GaussianBlur(rng.normal(size=(size, size)), (0, 0), sigma)
    return (noise - noise.mean()) / noise.std()


def _pores(rng, size):
    """Small dark dots in the fine network of lines found on all skin. -> (size, size), log brightness."""
    dots = np.zeros((size, size))
    count = int(rng.uniform(0.008, 0.016) * size * size)
    dots[tuple(rng.integers(0, size, (2, count)))] = rng.uniform(0.3, 1, count)
    dots = cv2.GaussianBlur(dots, (0, 0), rng.uniform(0.8, 1.2))
    return -0.6 * dots + 0.025 * _smooth_noise(rng, size, 1.2) + 0.02 * _smooth_noise(rng, size, 3)


def _wrinkles(grade, rng, size):
    """Roughly parallel furrows that fade at their ends, each with a lit edge. -> (size, size), log brightness."""
    furrows, depth = _furrows(grade, rng, size)
    groove = cv2.GaussianBlur(furrows, (0, 0), 1.0 + 0.2 * grade)
    wide = cv2.GaussianBlur(furrows, (0, 0), 4)
    lit_edge = np.vstack([wide[:3], wide[:-3]])
    return depth * (1.3 * lit_edge - 0.6 * wide - 2.3 * groove)


def _furrows(grade, rng, size):
    """-> (their lines (size, size), about 1 in the middle of each and 0 beside it, and their depth)"""
    furrows = np.zeros((size, size))
    number = 2 * grade + int(rng.integers(-1, 2)) if grade else 0
    # neighboring grades overlap slightly, as they do in human ratings
    depth = (0.16 + 0.08 * grade) * rng.uniform(0.8, 1.2)
    length = (0.45 + 0.12 * grade) * rng.uniform(0.9, 1.1)
    heights = (np.arange(number) + rng.uniform(0.2, 0.8, number)) / max(1, number) * size
    tilt, bend = rng.normal(0, 0.12), rng.normal(0, 0.10)
    for height in heights:
        extent = size * length * rng.uniform(0.85, 1.15)
        start = rng.uniform(-0.1 * size, max(0, size - extent))
        x = np.linspace(start, start + extent, 40)
        along = x / size - 0.5
        wave = 1.5 * np.sin(rng.uniform(4, 9) * along + rng.uniform(0, 6.3))
        y = height + size * (tilt * along + bend * along**2) + wave
        furrows = np.maximum(furrows, rng.uniform(0.8, 1.2) * _tapered_line(x, y, size))
    return furrows, depth


def _tapered_line(x, y, size):
    """A line through the points (x, y) with strength 1 in the middle, fading towards its ends. -> (size, size)."""
    line = np.zeros((size, size))
    strengths = np.sin(np.linspace(0.15, np.pi - 0.15, len(x) - 1)) ** 0.7
    corners = (np.stack([x, y], axis=1) * 16).round().astype(int)
    for start, end, strength in zip(corners[:-1], corners[1:], strengths, strict=True):
        cv2.line(line, start.tolist(), end.tolist(), float(strength), thickness=2, lineType=cv2.LINE_AA, shift=4)
    return line
