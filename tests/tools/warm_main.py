"""thin_main.py in processes that need not import torch: one process has, and is forked for each run."""

import gc
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

# what a training imports, which takes five seconds
import sklearn.model_selection  # noqa: F401
import wandb  # noqa: F401
from thin_main import thin_resnet50

import evaluation  # noqa: F401
import main
import pages  # noqa: F401
import plots  # noqa: F401
import resnet_custom
from run.cli import end_process

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
gc.freeze()  # no run looks through what was imported, whose memory stays shared


def run_warm_main(
    flags: Sequence[str], folder: Path, environment: Mapping[str, str], seconds: float
) -> subprocess.CompletedProcess:
    """main.py with the thin network in `folder`, without a terminal, as by `start_main`."""
    start_server()
    streams = [folder / f".{name}_of_a_run" for name in ("stdout", "stderr")]
    process = CONTEXT.Process(target=_run, args=(list(flags), str(folder), dict(environment), streams))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"main.py did not end within {seconds} s: {streams[0].read_text()}")
    return subprocess.CompletedProcess(list(flags), process.exitcode, *(stream.read_text() for stream in streams))


def start_server() -> None:
    """Start the process that is forked, if it does not run."""
    CONTEXT.set_forkserver_preload(["warm_main"])
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "tools")))
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if path is not None:
            os.environ["PYTHONPATH"] = path


def _run(flags, folder, environment, streams):
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["main.py", *flags]
    resnet_custom.resnet50 = thin_resnet50
    end_process(main.main())
