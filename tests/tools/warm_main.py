"""thin_main.py in processes that need not import torch: one process has, and is forked for each run."""

import gc
import multiprocessing
import os
import secrets
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


class WarmMain:
    """main.py with the thin network as a process in `folder`, without a terminal, as by `start_main`."""

    def __init__(self, flags: Sequence[str], folder: Path, environment: Mapping[str, str]):
        start_server()
        name = secrets.token_hex(4)
        self.flags, self._streams = list(flags), [folder / f".{name}.{stream}" for stream in ("stdout", "stderr")]
        arguments = self.flags, str(folder), dict(environment), self._streams
        self._process = CONTEXT.Process(target=_run, args=arguments)
        self._process.start()

    def end(self, seconds: float) -> subprocess.CompletedProcess:
        """Wait for the end of the process. Raises TimeoutError."""
        self._process.join(seconds)
        outputs = [stream.read_text() for stream in self._streams]
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"main.py did not end within {seconds} s: {outputs}")
        return subprocess.CompletedProcess(self.flags, self._process.exitcode, *outputs)


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
