"""The synthetic dataset of `--demo`."""

import numpy as np
import pytest
from PIL import Image

from images import demo
from images.folders import index_folders


def test_demo_data_are_imbalanced_readable_and_determined_by_the_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "IMAGES_PER_GRADE", (8, 4, 2, 1, 1))
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        demo.write_demo_data(tmp_path / name, seed)
    assert index_folders([tmp_path / "a"]).counts().tolist() == [8, 4, 2, 1, 1]
    first = [(tmp_path / name / "3" / "patch_000.jpg").read_bytes() for name in "abc"]
    assert first[0] == first[1] != first[2]
    with Image.open(tmp_path / "a" / "4" / "patch_000.jpg") as image:
        assert image.size == (demo.PATCH_SIZE, demo.PATCH_SIZE) and image.mode == "RGB"


@pytest.mark.parametrize(
    ("grade", "total", "draw"), [(0, 7954900, 864702400877), (2, 5605070, 1032875478435), (4, 6231563, 962114358345)]
)
def test_patches_stay_what_they_were(grade, total, draw):
    """Results on the demo's data are compared across versions."""
    rng = np.random.default_rng((42, grade, 0))
    patch = demo.draw_patch(grade, rng)
    assert rng.integers(2**40) == draw  # the same draws, in the same order
    assert patch.sum(dtype=int) == pytest.approx(total, abs=100)  # versions of OpenCV may round differently


def test_the_mask_of_the_wrinkles_is_where_they_are_dark():
    assert not demo.wrinkle_mask(0, np.random.default_rng(0)).any()
    for number in range(5):
        patch = demo.draw_patch(3, np.random.default_rng(number)).mean(axis=2)
        mask = demo.wrinkle_mask(3, np.random.default_rng(number))
        assert mask.shape == patch.shape and mask.dtype == bool and 0.02 < mask.mean() < 0.2
        beside = np.roll(mask, 10, axis=0) & ~mask
        assert patch[mask].mean() < 0.8 * patch[beside].mean()


def test_wrinkles_increase_with_the_grade_and_brightness_does_not_reveal_it():
    strength, brightness = [], []
    for grade in range(5):
        patches = [demo.draw_patch(grade, np.random.default_rng((7, grade, i))).mean(2) for i in range(20)]
        edges = [np.abs(np.diff(patch, axis=0)).mean() / patch.mean() for patch in patches]
        strength.append(np.mean(edges))
        brightness.append([patch.mean() for patch in patches])
    assert strength == sorted(strength)
    assert np.std([np.mean(grade) for grade in brightness]) < np.std(brightness[0])
