"""Heat maps: which regions of a photograph speak for a class, by Grad-CAM on the last features of the network."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from model import Model

CHUNK_PIXELS = 16 * 224 * 224  # per forward pass; its activations take about 1 GB
STRIDE = 16  # pixels between two cells of the features
OPACITY = 0.5  # of the colors over the photograph, where the map is 1
COLORS = cv2.COLORMAP_TURBO


def grad_cam(model: Model, images: torch.Tensor, targets: Sequence[int]) -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017, eq. 1 and 2) on the output of the last stage, at the resolution of the images.

    model: left as it is; images: (N, 3, S, S) uint8 on its device; targets: the class to explain, for each of the N
    -> (N, S, S) float32, 0 to 1 = the largest value of each map. All zeros: no region speaks for the class.
    Computed in float32 and in chunks, whose memory does not depend on N.
    """
    size = images.shape[-1]
    per_chunk = max(1, CHUNK_PIXELS // size**2)
    maps = np.zeros((len(images), size, size), np.float32)
    with _for_explanation(model):
        for start in range(0, len(images), per_chunk):
            chunk = slice(start, start + per_chunk)
            maps[chunk] = _upsampled(_coarse_maps(model, images[chunk], targets[chunk]), size).cpu().numpy()
    return maps


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


def _coarse_maps(model, images, targets):
    """-> (n, 1, h, w), h and w of the features"""
    from captum.attr import LayerGradCam  # takes a second

    # not `model` itself, which may be compiled
    method = LayerGradCam(model.forward, model.backbone.layer4)
    targets = torch.as_tensor(targets, dtype=torch.int64, device=images.device)
    return method.attribute(images, targets, relu_attributions=True).detach()


def _upsampled(maps, size):
    """(n, 1, h, w) -> (n, size, size), each divided by its maximum, unless that is 0.

    Cell i of the features is centered at pixel STRIDE * i of the image, as every convolution with a stride is padded
    evenly: at 224 px, stretching 14 cells over the whole side would shift the map by up to half a cell.
    """
    sides = [STRIDE * (cells - 1) + 1 for cells in maps.shape[2:]]
    inside = F.interpolate(maps, sides, mode="bilinear", align_corners=True)
    maps = F.pad(inside, (0, size - sides[1], 0, size - sides[0]), mode="replicate").squeeze(1)
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def overlay(photo: np.ndarray, heat_map: np.ndarray) -> np.ndarray:
    """Lay a heat map over the photograph that the model saw: the square of `--resize`.

    photo: (H, W, 3) uint8, RGB; heat_map: (h, w) float, 0 to 1 -> (H, W, 3) uint8. Regions with a map of 0 keep their
    colors.
    """
    heat = cv2.resize(np.asarray(heat_map, np.float32), photo.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    heat = heat.clip(0, 1)[..., None]
    opacity = OPACITY * np.sqrt(heat)
    return np.round((1 - opacity) * photo + opacity * _colors(heat[..., 0])).astype(np.uint8)


def _colors(heat):
    """(h, w) float, 0 to 1 -> (h, w, 3) uint8, RGB"""
    return cv2.cvtColor(cv2.applyColorMap(np.round(255 * heat).astype(np.uint8), COLORS), cv2.COLOR_BGR2RGB)
