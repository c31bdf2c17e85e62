"""`environment.json` in the folder of a run: with which command, versions and machine it was trained, and how long."""

import functools
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

from run.cores import num_cores
from run.files import write_json

ENVIRONMENT_FILE = "environment.json"
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "pillow", "wandb")


def write_environment(run_dir: str | Path, device: torch.device, hours_trained: float) -> None:
    """Write `environment.json`. hours_trained: of all finished epochs, also before the run was resumed."""
    environment = {
        "command": shlex.join(sys.orig_argv),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_name(),
        "cores": num_cores(),
        "hours_trained": round(hours_trained, 4),
    }
    with suppress(OSError):  # it is only informative
        write_json(Path(run_dir, ENVIRONMENT_FILE), environment)


def version_of(package: str) -> str | None:
    """-> its version; None if it is not installed, as wandb need not be."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def commit() -> str | None:
    """The commit of this project, with `-dirty` after it if tracked files have changed; None if it is not in git."""
    if not (ROOT / ".git").exists():  # a folder further up may be another project
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def cpu_name() -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
