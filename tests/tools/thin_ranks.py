"""Several command lines of main.py with a thin network, one after the other, for tests of several processes.

torchrun --nproc_per_node=2 thin_ranks.py COMMANDS.json    a list of lists of flags
"""

import gc
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":
    gc.disable()  # as thin_main.py does

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from thin_main import thin_resnet50

import main
import resnet_custom
import run.rank_group

if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    resnet_custom.resnet50 = thin_resnet50
    run.rank_group.SILENT_SECONDS = run.rank_group.COLLECTIVE_SECONDS = int(os.environ.get("WAIT_SECONDS", 300))
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        if status := main.main(flags):
            sys.exit(status)
