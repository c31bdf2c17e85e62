"""torchvision's ResNet-50 with stride 1 in its last stage, and its ImageNet weights."""

import os
import pickle
import socket
import tempfile
import urllib.error

import torch
import torchvision

from run.cli import UserError
from run.surroundings import is_writable

IMAGENET_WEIGHTS = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
DOWNLOAD_TIMEOUT_S = 15


def resnet50(last_stride: int = 1, zero_init: bool = False) -> torchvision.models.ResNet:
    """torchvision's ResNet-50 (He et al. 2016) whose last stage keeps the resolution of the stage before it.

    With `last_stride=1`, an image of 224 x 224 px gives features of 14 x 14 x 2048 instead of 7 x 7 x 2048: four times
    as many positions to see a fine wrinkle at, with the same parameters under the same names (known as "last stride 1",
    Luo et al. 2019). `last_stride=2` is torchvision's network, bit for bit.
    zero_init: the last batch norm of each block starts with weights of 0, so that the block passes its input on, and
    the network trains as a shallow one first (Goyal et al. 2017, section 5.1).
    """
    network = torchvision.models.resnet50(weights=None, zero_init_residual=zero_init)
    first_block = network.layer4[0]
    first_block.conv2.stride = first_block.downsample[0].stride = (last_stride, last_stride)
    return network


def imagenet_state_dict() -> dict[str, torch.Tensor]:
    """torchvision's ImageNet weights, from its cache or else downloaded; for this run only if the cache is read-only.

    Raises UserError, within seconds, if there is neither the file nor a network.
    """
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    cached = os.path.join(folder, os.path.basename(IMAGENET_WEIGHTS.url))
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torch.hub sets none: behind a silent firewall it waits for minutes
    try:
        with tempfile.TemporaryDirectory() as temporary:
            if not os.path.exists(cached) and not is_writable(folder):
                print(f"{folder} is not writable; the ImageNet weights are downloaded for this run only")
                folder = temporary
            return IMAGENET_WEIGHTS.get_state_dict(progress=True, check_hash=True, weights_only=True, model_dir=folder)
    except (urllib.error.URLError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"--pretrained: the ImageNet weights are not at {cached} and cannot be downloaded ({error}); download "
            f"{IMAGENET_WEIGHTS.url} on another machine and pass it with --weights FILE, or use --no-pretrained"
        ) from error
    finally:
        socket.setdefaulttimeout(previous_timeout)
