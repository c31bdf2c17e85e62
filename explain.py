"""Heat maps: which regions of a photograph support a class, by Grad-CAM on the last features of the network."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from model import Model

CHUNK_PIXELS = 16 * 224 * 224  # per forward pass; its activations take a few hundred MB
STRIDE = 16  # pixels between two cells of the features
OPACITY = 0.5  # of the colors over the photograph, where the map is at least 0.5
COLORS = cv2.COLORMAP_TURBO


# ------------------------------------------------------------------------------------------------------------- maps


def grad_cam(
    model: Model, images: torch.Tensor, targets: Sequence[int], rivals: Sequence[int] | None = None
) -> np.ndarray:
    """Which regions support a class rather than another, at the resolution of the images.

    Grad-CAM (Selvaraju et al. 2017, eq. 1 and 2) on the output of the last stage. Explained is the logit of the target
    minus that of its rival (contrastive explanations, Prabhushankar et al. 2020), without rivals minus the mean of all
    logits: a region can raise all logits alike, which changes no prediction. For grades, see `rival_grades`.

    model: left as it is; images: (N, 3, S, S) uint8 on its device; targets, rivals: N classes
    -> (N, S, S) float32, 0 to 1 = the largest value of each map. All zeros: no region supports the class.
    Computed in float32 and in chunks, whose memory does not depend on N.
    """
    size = images.shape[-1]
    per_chunk = max(1, CHUNK_PIXELS // size**2)
    maps = np.zeros((len(images), size, size), np.float32)
    with _for_explanation(model):
        for start in range(0, len(images), per_chunk):
            chunk = slice(start, start + per_chunk)
            coarse = _coarse_maps(model, images[chunk], targets[chunk], None if rivals is None else rivals[chunk])
            maps[chunk] = upsample(coarse, size).cpu().numpy()
    return maps


def rival_grades(grades: Sequence[int], num_classes: int) -> list[int]:
    """The rivals that show what a grade is given for: the grade below, or above the lowest one.

    Against the grade above, smooth skin supports grade 3; against the grade below, its wrinkles do.
    """
    return [grade - 1 if grade else min(1, num_classes - 1) for grade in grades]


def neighbor_grade(probabilities: np.ndarray, grade: int) -> int | None:
    """The more probable of the grades beside `grade`. probabilities: (C,). None if it is the only grade."""
    beside = [other for other in (grade - 1, grade + 1) if 0 <= other < len(probabilities)]
    return max(beside, key=lambda other: probabilities[other], default=None)


class Explanation(NamedTuple):
    """heat_map: (S, S) float32, 0 to 1: what supports the class `target`, for grades rather than `rival`."""

    target: int
    rival: int | None
    heat_map: np.ndarray


def explain_predictions(
    models: Sequence[Model], images: torch.Tensor, probabilities: np.ndarray, is_ordinal: bool
) -> list[list[Explanation]]:
    """What supports the prediction of each image; for grades also for the more probable of the neighboring grades.

    models: each map is the mean of theirs; images: (N, 3, S, S) uint8 on their device; probabilities: (N, C) -> N lists
    """
    if not len(images):
        return []
    predictions = probabilities.argmax(axis=1).tolist()
    rivals = rival_grades(predictions, probabilities.shape[1]) if is_ordinal else None
    asked = [(predictions, rivals or [None] * len(images), _mean_maps(models, images, predictions, rivals))]
    neighbors = [neighbor_grade(row, c) for row, c in zip(probabilities, predictions, strict=True)]
    if is_ordinal and None not in neighbors:
        asked.append((neighbors, predictions, _mean_maps(models, images, neighbors, predictions)))
    return [[Explanation(*(of_all[i] for of_all in question)) for question in asked] for i in range(len(images))]


def _mean_maps(models, images, targets, rivals):
    maps = np.mean([grad_cam(model, images, targets, rivals) for model in models], axis=0)
    return maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), np.finfo(np.float32).tiny)


@contextmanager
def _for_explanation(model: Model) -> Iterator[None]:
    """The model in evaluation mode, in float32, without gradients of its weights, which take most of the memory."""
    was_training = {module: module.training for module in model.modules()}
    needs_gradient = {parameter: parameter.requires_grad for parameter in model.parameters()}
    device = next(model.parameters()).device.type
    try:
        model.eval().requires_grad_(False)
        with torch.inference_mode(False), torch.autocast(device, enabled=False):
            yield
    finally:
        for module, mode in was_training.items():
            module.training = mode
        for parameter, needed in needs_gradient.items():
            parameter.requires_grad_(needed)


def _coarse_maps(model, images, targets, rivals):
    """-> (n, 1, h, w), h and w of the features"""
    from captum.attr import LayerGradCam  # takes a second

    def contrast(images):
        logits = model.forward(images)  # not by calling `model`, which may be compiled
        rows = torch.arange(len(images), device=logits.device)
        against = logits.mean(dim=1) if rivals is None else logits[rows, rivals]
        return logits[rows, targets] - against

    return LayerGradCam(contrast, model.backbone.layer4).attribute(images, relu_attributions=True).detach()


def upsample(maps: torch.Tensor, size: int) -> torch.Tensor:
    """Lay maps of the features over images. maps: (n, 1, h, w) -> (n, size, size), each divided by its maximum.

    A map of zeros stays one.
    Cell i of the features is centered at pixel STRIDE * i of the image, as every convolution with a stride is padded
    evenly. Stretching 14 cells over all 224 px would shift the map by up to half a cell.
    """
    sides = [STRIDE * (cells - 1) + 1 for cells in maps.shape[2:]]
    inside = F.interpolate(maps, sides, mode="bilinear", align_corners=True)
    maps = F.pad(inside, (0, size - sides[1], 0, size - sides[0]), mode="replicate").squeeze(1)
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


# --------------------------------------------------------------------------------------------------------- pictures


def overlay(photo: np.ndarray, heat_map: np.ndarray) -> np.ndarray:
    """Lay a heat map over the photograph that the model saw: the square of `--resize`.

    photo: (H, W, 3) uint8, RGB; heat_map: (h, w) float, 0 to 1 -> (H, W, 3) uint8. Regions with a map of 0 keep their
    colors.
    """
    heat = cv2.resize(np.asarray(heat_map, np.float32), photo.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    heat = heat.clip(0, 1)[..., None]
    opacity = OPACITY * np.minimum(1, 2 * heat)
    return np.round((1 - opacity) * photo + opacity * _colors(heat[..., 0])).astype(np.uint8)


def _colors(heat):
    """(h, w) float, 0 to 1 -> (h, w, 3) uint8, RGB"""
    return cv2.cvtColor(cv2.applyColorMap(np.round(255 * heat).astype(np.uint8), COLORS), cv2.COLOR_BGR2RGB)
