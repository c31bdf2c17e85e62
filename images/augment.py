"""Augmentation: random flips, rotations, scales, shears, shifts and colors, on a single image or on a whole batch."""

import functools
import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from flags import MAX_ROTATION

MAX_SCALE = 1.1
MAX_SHEAR = math.tan(math.radians(5))
MAX_SHIFT = 0.05  # of the side
MAX_COLOR_CHANGE = 0.2
GRAY = np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601, as in Pillow and torchvision
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0)
cv2.setNumThreads(0)  # each loader worker handles its own image: threads inside OpenCV would compete with each other


def draw_parameters(
    methods: Sequence[str], rng: np.random.Generator, max_rotation: float = MAX_ROTATION
) -> tuple[float, ...]:
    """Draw the parameters of one augmented image -> (a, b, x, c, d, y, brightness, contrast, saturation).

    methods: names of `flags.AUGMENTATIONS`; leaving one out does not change the draws of the others. max_rotation: in
    degrees, to either side. A point p of the result, measured from its center in units of half its side, shows the
    original at [[a, b], [c, d]] p + (x, y).
    """
    flip, angle, zoom, shear, x, y, brightness, contrast, saturation = rng.uniform(-1, 1, 9).tolist()
    flip = -1.0 if "horizontal_flip" in methods and flip < 0 else 1.0
    angle = math.radians(max_rotation) * angle if "rotation" in methods else 0.0
    zoom = MAX_SCALE**zoom if "scale" in methods else 1.0
    shear = MAX_SHEAR * shear if "shear" in methods else 0.0
    x, y = (2 * MAX_SHIFT * x, 2 * MAX_SHIFT * y) if "shift" in methods else (0.0, 0.0)
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    # flipped, then sheared, then rotated and scaled
    affine = (flip * cos, shear * cos + sin, x, -flip * sin, cos - shear * sin, y)
    if "color_jitter" not in methods:
        return (*affine, 1.0, 1.0, 1.0)
    return (*affine, *(1 + MAX_COLOR_CHANGE * change for change in (brightness, contrast, saturation)))


def augment(image: np.ndarray, parameters: Sequence[float], out: np.ndarray) -> None:
    """Augment one image on the CPU.

    image, out: (S, S, 3) uint8, RGB; parameters: 9 floats, see `draw_parameters`.
    """
    affine, color = parameters[:6], parameters[6:]
    if affine == IDENTITY[:6]:
        out[:] = image
    else:
        a, b, x, c, d, y = affine
        center = (len(image) - 1) / 2
        x, y = (center * (1 - a - b) + x * len(image) / 2, center * (1 - c - d) + y * len(image) / 2)
        # black corners or a blur would tell the model which images are copies: reflected at the border, and cubic
        flags = {"flags": cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, "borderMode": cv2.BORDER_REFLECT}
        cv2.warpAffine(image, np.array([[a, b, x], [c, d, y]]), image.shape[:2], dst=out, **flags)
    if color != IDENTITY[6:]:
        brightness, contrast, saturation = color
        mean_gray = np.dot(GRAY, cv2.mean(out)[:3])
        linear = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * GRAY)
        cv2.transform(out, np.column_stack([linear, np.full(3, brightness * (1 - contrast) * mean_gray)]), dst=out)


@functools.cache  # copied to the device only once, as each copy waits for the GPU
def _gray_on(device):
    return torch.tensor(GRAY, dtype=torch.float32, device=device)


def augment_batch(images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """`augment` for a whole batch on its device. images: (N, 3, S, S) uint8; parameters: (N, 9) float -> as `images`,
    channels last.

    Color: brightness; contrast around the image's mean gray; saturation around the gray of each pixel.
    """
    grid = F.affine_grid(parameters[:, :6].reshape(-1, 2, 3), images.shape, align_corners=False)
    how = {"mode": "bicubic", "padding_mode": "reflection", "align_corners": False}
    warped = F.grid_sample(images.float(), grid, **how).clamp_(0, 255).flatten(2)
    brightness, contrast, saturation = parameters[:, 6:, None, None].unbind(1)
    gray = _gray_on(images.device)
    mean_gray = (warped.mean(dim=2) @ gray)[:, None, None]
    linear = brightness * contrast * (saturation * torch.eye(3, device=images.device) + (1 - saturation) * gray)
    colored = torch.baddbmm(brightness * (1 - contrast) * mean_gray, linear, warped)
    colored = colored.round_().clamp_(0, 255).reshape(images.shape)
    return colored.to(torch.uint8, memory_format=torch.channels_last)  # as the network takes them


def views(images: torch.Tensor, at_any_angle: bool) -> list[torch.Tensor]:
    """Test-time augmentation: the images and their mirror images.

    at_any_angle: both turned by 0, 90, 180 and 270 degrees. images: (N, 3, S, S) -> 2 or 8 tensors of this shape,
    channels last.
    """
    turned = [images.rot90(quarters, (2, 3)) for quarters in range(4 if at_any_angle else 1)]
    mirrored = [image.flip(3) for image in turned]
    return [image.contiguous(memory_format=torch.channels_last) for image in (*turned, *mirrored)]


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, size, size) uint8, antialiased."""
    if images.shape[-1] == size:
        return images
    resized = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.round_().to(torch.uint8)
