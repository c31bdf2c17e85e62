"""Loader workers at the end of the process that started them."""

import subprocess
import sys
import time

from helpers import ROOT

SCRIPT = """
import functools
from torch.utils.data import DataLoader
from run.workers import begin_worker

loader = DataLoader(
    range(100), num_workers=2, persistent_workers=True, worker_init_fn=functools.partial(begin_worker, int)
)
next(iter(loader))
print("done", flush=True)
"""


def test_workers_that_are_still_there_end_with_the_process_at_once_and_silently():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "done\n"
        started = time.monotonic()
        _, error = process.communicate(timeout=60)
    # torch alone would wait 5 s for each worker
    assert (process.returncode, error) == (0, "") and time.monotonic() - started < 5
