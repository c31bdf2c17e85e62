"""The check of heat maps: what it takes for a map of the wrinkles, and that it reads the patches it draws."""

import numpy as np
import pytest
from heat_map_check import draw_patches, find_patches, ideal_maps, is_on_own_wrinkles, read_patches

from images.demo import write_demo_data
from run.cli import UserError

ARGS = {"image_size": 224}


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    return draw_patches(str(tmp_path_factory.mktemp("patches")), 3, 8)


def test_maps_of_the_own_wrinkles_pass_and_those_of_others_fail(patches):
    images, masks = read_patches(patches, 3, ARGS)
    assert images.shape == (8, 3, 224, 224) and masks.shape == (8, 224, 224)
    ideal = ideal_maps(masks)
    assert ideal.shape == masks.shape and ideal.max() == 1
    assert is_on_own_wrinkles(ideal, masks).all()
    assert is_on_own_wrinkles(np.roll(ideal, 1, axis=0), masks).mean() < 0.5
    assert not is_on_own_wrinkles(np.zeros_like(ideal), masks).any()


def test_masks_lie_on_the_dark_lines_of_the_images_as_the_model_sees_them(patches):
    images, masks = read_patches(patches[:2], 3, ARGS)
    for image, mask in zip(images.float().mean(dim=1).numpy(), masks, strict=True):
        assert image[mask > 0.5].mean() < 0.8 * image[mask == 0].mean()


def test_patches_of_the_training_are_not_used_and_those_of_another_seed_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("images.demo.IMAGES_PER_GRADE", (1, 1, 3))
    write_demo_data(tmp_path, seed=42)
    files = [str(tmp_path / "2" / f"patch_{number:03d}.jpg") for number in range(3)]
    checkpoint = {"splits": {"train": files[:1], "val": files[1:2], "test": files[2:]}}
    found = find_patches(checkpoint, str(tmp_path), 2, 42)
    assert [path.name for path, _ in found] == ["patch_001.jpg", "patch_002.jpg"]
    assert len(read_patches(found, 2, ARGS)[0]) == 2
    with pytest.raises(UserError, match="--seed 43"):
        read_patches(find_patches(checkpoint, str(tmp_path), 2, 43), 2, ARGS)
