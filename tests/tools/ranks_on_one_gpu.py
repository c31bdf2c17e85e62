"""main.py as one of several processes of torchrun that share a GPU. gloo connects them: NCCL needs a GPU for each.

torchrun --nproc_per_node=2 ranks_on_one_gpu.py [thin] FLAGS    thin: with the network of thin_main.py
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from thin_main import thin_resnet50
from torch import distributed

import main
import resnet_custom
import run.machine
from run.cli import end_process

if __name__ == "__main__":
    flags = sys.argv[1:]
    if flags[0] == "thin":
        resnet_custom.resnet50 = thin_resnet50
        flags = flags[1:]
    distributed.is_nccl_available = lambda: False
    run.machine._device_of_rank = lambda name: "cuda:0" if name == "cuda" else name
    end_process(main.main(flags))
