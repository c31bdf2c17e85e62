"""Augmentation on the CPU, and of a batch on its device."""

import math

import cv2
import numpy as np
import torch
from PIL import Image

from flags import AUGMENTATIONS
from images.augment import augment, augment_batch, draw_parameters, resize


def augmented(image, method, seed):
    out = np.empty_like(image)
    augment(image, draw_parameters([method], np.random.default_rng(seed)), out)
    return out


def skin(size=64):
    """Smooth like a photograph, with an edge."""
    y, x = np.mgrid[:size, :size] / size
    gray = 120 + 60 * np.sin(7 * x + 3 * y) + 30 * np.cos(11 * y) + 20 * (x + y > 1)
    return np.stack([gray + 20, 0.8 * gray, 0.7 * gray + 15 * x], axis=-1).clip(0, 255).astype(np.uint8)


def test_horizontal_flip_mirrors_half_of_the_images_exactly():
    image = np.random.default_rng(0).integers(0, 256, (31, 31, 3), dtype=np.uint8)
    results = [augmented(image, "horizontal_flip", seed) for seed in range(200)]
    flipped = sum(np.array_equal(result, image[:, ::-1]) for result in results)
    assert flipped + sum(np.array_equal(result, image) for result in results) == 200
    assert 70 < flipped < 130


def test_rotation_is_around_the_center_and_leaves_no_black_corners():
    image = np.full((65, 65, 3), 200, dtype=np.uint8)
    image[28:37, 28:37] = 90
    rotated = augmented(image, "rotation", 1)
    assert rotated[32, 32].tolist() == [90] * 3 and rotated[[0, 0, -1, -1], [0, -1, 0, -1]].min() == 200
    assert not np.array_equal(rotated, image)


def test_rotation_goes_up_to_its_limit_to_either_side():
    for limit in (15, 180):
        drawn = [draw_parameters(["rotation"], np.random.default_rng(seed), limit) for seed in range(200)]
        degrees = [math.degrees(math.atan2(b, a)) for a, b, *_ in drawn]
        assert -limit <= min(degrees) < -0.95 * limit and 0.95 * limit < max(degrees) <= limit


def test_scale_changes_the_size_of_a_spot_by_at_most_a_tenth():
    image = np.full((101, 101, 3), 250, dtype=np.uint8)
    image[31:70, 31:70] = 0
    sides = [np.sqrt((augmented(image, "scale", seed)[..., 0] < 125).sum()) for seed in range(60)]
    assert 39 / 1.1 - 1 < min(sides) < 37 and 41 < max(sides) < 39 * 1.1 + 1


def test_shift_moves_a_spot_by_at_most_a_twentieth_of_the_side():
    image = np.zeros((101, 101, 3), dtype=np.uint8)
    image[46:55, 46:55] = 255
    centers = []
    for seed in range(60):
        spot = augmented(image, "shift", seed)[..., 0].astype(float)
        centers.append([(np.indices(spot.shape) * spot).sum((1, 2)) / spot.sum()])
    offsets = np.concatenate(centers) - 50
    assert np.abs(offsets).max() < 5.06 + 0.1 and offsets.max() > 3 and offsets.min() < -3


def test_shear_slants_vertical_lines_and_keeps_horizontal_lines():
    vertical, horizontal = (np.zeros((65, 65, 3), dtype=np.uint8) for _ in range(2))
    vertical[:, 32], horizontal[32] = 255, 255
    offsets = []
    for seed in range(40):
        assert np.array_equal(augmented(horizontal, "shear", seed)[28:37], horizontal[28:37])
        columns = augmented(vertical, "shear", seed)[..., 0].argmax(axis=1)
        assert columns[32] == 32 and columns[0] - 32 == 32 - columns[-1]
        offsets.append(columns[0] - 32)
    assert min(offsets) in (-3, -2) and max(offsets) in (2, 3)  # 32 rows at up to 5 degrees are 2.8 columns


def test_color_jitter_does_not_move_pixels():
    image = np.full((16, 16, 3), (180, 130, 110), dtype=np.uint8)
    image[:8] = (90, 65, 55)
    changed = augmented(image, "color_jitter", 2).astype(int)
    assert not np.array_equal(changed, image)
    assert (changed[:8] == changed[0, 0]).all() and (changed[8:] == changed[8, 0]).all()
    assert np.abs(changed - image).max() < 90


def test_leaving_out_a_method_does_not_change_the_others():
    every = draw_parameters(AUGMENTATIONS, np.random.default_rng(5))
    without = draw_parameters([name for name in AUGMENTATIONS if name != "shift"], np.random.default_rng(5))
    assert every[2] != 0 and without[2] == without[5] == 0
    assert [every[k] for k in (0, 1, 3, 4, 6, 7, 8)] == [without[k] for k in (0, 1, 3, 4, 6, 7, 8)]


def test_no_methods_leave_the_image_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    out = np.empty_like(image)
    augment(image, draw_parameters([], np.random.default_rng(0)), out)
    assert np.array_equal(out, image)


def test_a_batch_on_the_device_is_augmented_like_single_images():
    """`augment_batch`, here on the CPU, against OpenCV in the loader workers."""
    image = skin()
    parameters = [draw_parameters(AUGMENTATIONS, np.random.default_rng(seed)) for seed in range(100)]
    expected = np.stack([np.empty_like(image)] * 100)
    for out, image_parameters in zip(expected, parameters, strict=True):
        augment(image, image_parameters, out)
    images = torch.from_numpy(np.stack([image] * 100)).permute(0, 3, 1, 2)
    batch = augment_batch(images, torch.tensor(parameters))
    assert batch.is_contiguous(memory_format=torch.channels_last)
    actual = batch.permute(0, 2, 3, 1).numpy()
    difference = np.abs(actual.astype(int) - expected)
    assert difference.mean() < 0.5 and difference.max() <= 4
    assert np.abs(expected.astype(int) - image).mean() > 5


def test_an_augmented_image_keeps_most_of_its_fine_texture():
    """Bilinear interpolation would keep a third of it: a blur by which copies can be told from originals."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(noise).resize((64, 64), Image.Resampling.BILINEAR))  # as photographs are decoded
    copy = np.empty_like(image)
    parameters = draw_parameters(["rotation", "shift"], np.random.default_rng(0), 180)
    augment(image, parameters, copy)
    images = torch.from_numpy(image.copy())[None].permute(0, 3, 1, 2)
    on_device = augment_batch(images, torch.tensor([parameters]))[0].permute(1, 2, 0).contiguous().numpy()
    original, *augmented = (cv2.Laplacian(each, cv2.CV_32F)[8:-8, 8:-8].var() for each in (image, copy, on_device))
    assert min(augmented) > 0.5 * original


def test_what_overshoots_at_an_edge_is_cut_off_before_colors_change():
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[:, 16:] = 255
    turned = draw_parameters(["rotation"], np.random.default_rng(0))[:6]
    parameters = (*turned, 0.8, 0.8, 1.0)
    copy = np.empty_like(image)
    augment(image, parameters, copy)
    images = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    on_device = augment_batch(images, torch.tensor([parameters]))[0].permute(1, 2, 0).numpy()
    for augmented in (copy, on_device):
        assert augmented.max() == augmented[16, 28].max() > augmented.min() == augmented[16, 3].min()


def test_resizing_on_the_device_is_antialiased_and_keeps_uint8():
    checkerboard = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).mul(255)
    checkerboard = checkerboard.to(torch.uint8).expand(2, 3, 64, 64)
    resized = resize(checkerboard, 16)
    assert resized.shape == (2, 3, 16, 16) and resized.dtype == torch.uint8
    assert (resized.float() - 127.5).abs().max() < 10
    assert resize(checkerboard, 64) is checkerboard
