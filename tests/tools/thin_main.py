"""main.py with a thin network, for tests of everything around it: a fortieth of the work, checkpoints of 5 MB."""

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":
    gc.disable()  # collecting the garbage of the imports takes a sixth of their time

from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

import main
import resnet_custom
from run.cli import end_process


def thin_resnet50(zero_init=False):
    """A ResNet with one thin block per stage, and the last stride of ours. Most weights of a block would be in its
    shortcut, which is therefore a grouped convolution: small checkpoints are written quickly."""
    network = ResNet(Bottleneck, [1, 1, 1, 1], zero_init_residual=zero_init, width_per_group=8)
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        full = stage[0].downsample[0]
        stride = (1, 1) if stage is network.layer4 else full.stride
        stage[0].downsample[0] = nn.Conv2d(full.in_channels, full.out_channels, 1, stride, groups=32, bias=False)
    network.layer4[0].conv2.stride = (1, 1)
    return network


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    resnet_custom.resnet50 = thin_resnet50
    end_process(main.main())
