"""predict.py with the thin network, for tests of how the command ends."""

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":
    gc.disable()  # as thin_main.py does

from thin_main import thin_resnet50

import predict
import resnet_custom
from run.cli import end_process

if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    resnet_custom.resnet50 = thin_resnet50
    end_process(predict.main())
