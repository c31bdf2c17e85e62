"""ResNet-50 with stride 1 in its last stage, built on torchvision's own, and its ImageNet weights."""

import os
import pickle
import socket
import urllib.error

import torch
import torchvision

from files import UserError

IMAGENET_WEIGHTS = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
DOWNLOAD_TIMEOUT_S = 15


def resnet50(last_stride=1):
    """torchvision's ResNet-50 (He et al. 2016) whose last stage keeps the resolution of the one before.

    At `last_stride=1` an image of 224 x 224 px gives features of 14 x 14 x 2048 instead of 7 x 7 x 2048: four times
    as many places at which a fine wrinkle can be seen, with the same parameters under the same names. (The same
    change is known as "last stride 1" from Luo et al. 2019.) `last_stride=2` is torchvision's network, bit for bit.
    """
    network = torchvision.models.resnet50(weights=None)
    first_block = network.layer4[0]
    first_block.conv2.stride = first_block.downsample[0].stride = (last_stride, last_stride)
    return network


def imagenet_state_dict():
    """torchvision's ImageNet weights: from its cache where they lie there, else downloaded.

    Raises UserError, within seconds, where there is neither file nor network.
    """
    file_name = os.path.basename(IMAGENET_WEIGHTS.url)
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", file_name)
    former_timeout = socket.getdefaulttimeout()
    # torch.hub opens the address without a timeout: behind a silent firewall it would wait for minutes
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        return IMAGENET_WEIGHTS.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (urllib.error.URLError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"--pretrained: the ImageNet weights are neither at {cached} nor to be downloaded ({error}); "
            f"fetch {IMAGENET_WEIGHTS.url} on another machine and give it with --weights FILE, or use --no-pretrained"
        ) from error
    finally:
        socket.setdefaulttimeout(former_timeout)
