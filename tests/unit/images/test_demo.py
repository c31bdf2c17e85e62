"""The synthetic dataset of `--demo`."""

import numpy as np
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


def test_wrinkles_increase_with_the_grade_and_brightness_does_not_reveal_it():
    strength, brightness = [], []
    for grade in range(5):
        patches = [demo.draw_patch(grade, np.random.default_rng((7, grade, i))).mean(2) for i in range(20)]
        edges = [np.abs(np.diff(patch, axis=0)).mean() / patch.mean() for patch in patches]
        strength.append(np.mean(edges))
        brightness.append([patch.mean() for patch in patches])
    assert strength == sorted(strength)
    assert np.std([np.mean(grade) for grade in brightness]) < np.std(brightness[0])
