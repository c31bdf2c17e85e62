"""Loader workers: as many as there is shared memory for, no batch lost, and none left at the end."""

import functools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import PATIENCE, ROOT
from torch.utils.data import DataLoader, Dataset

import run.workers
from run.cli import UserError
from run.workers import affordable_workers, begin_worker, end_workers, free_shared_memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="the shared memory of Linux")
MB = 2**20
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


@pytest.fixture(autouse=True)
def no_workers_left():
    yield
    end_workers()  # as main.py does: an iterator that is left to Python's garbage collector ends them after 10 s each


class Batches(Dataset):
    """Batches of 1 MB."""

    def __len__(self):
        return 8

    def __getitems__(self, positions):
        return torch.zeros(MB, dtype=torch.uint8)


def loader(prepare):
    begin = functools.partial(begin_worker, prepare)
    return DataLoader(Batches(), 1, num_workers=2, collate_fn=lambda batch: batch, worker_init_fn=begin)


def fewer_workers(monkeypatch, free, *arguments):
    monkeypatch.setattr(run.workers, "free_shared_memory", lambda: free)
    affordable_workers.cache_clear()
    try:
        return affordable_workers(*arguments)
    finally:
        affordable_workers.cache_clear()


def test_workers_that_are_still_there_end_with_the_process_at_once_and_silently():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "done\n"
        started = time.monotonic()
        _, error = process.communicate(timeout=PATIENCE)
    # torch alone would wait 5 s for each worker
    assert (process.returncode, error) == (0, "") and time.monotonic() - started < 5


def test_the_batches_of_all_workers_fit_into_the_shared_memory(monkeypatch, capsys):
    """Docker's 64 MB, 8 workers, 224 px: training batches of 4.8 MB, evaluation batches of 9.6 MB."""
    image = 3 * 224**2 + 44
    workers = fewer_workers(monkeypatch, 64 * MB, 8, image, 32, 1)
    assert workers == (5, 2)
    assert (2 * workers[0] + 2) * 32 * image < 64 * MB and (2 * workers[1] + 2) * 64 * image < 64 * MB
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "/dev/shm has 67.1 MB free" in lines[0] and "using 5 for training and 2" in lines[0]
    assert fewer_workers(monkeypatch, 64 * MB, 8, image, 32, 16) == (0, 2)  # all batches of a step are kept
    assert fewer_workers(monkeypatch, 0, 8, image, 32, 1) == (0, 0)
    capsys.readouterr()
    assert fewer_workers(monkeypatch, 2**30, 8, image, 32, 1) == (8, 8)
    assert fewer_workers(monkeypatch, float("inf"), 64, image, 512, 1) == (64, 64)
    assert fewer_workers(monkeypatch, 0, 0, image, 32, 1) == (0, 0)
    assert not capsys.readouterr().out


@linux
def test_the_free_shared_memory_is_that_of_its_file_system(tmp_path, monkeypatch):
    monkeypatch.setattr(run.workers, "SHARED_MEMORY", str(tmp_path))
    status = os.statvfs(tmp_path)
    assert free_shared_memory() == pytest.approx(status.f_bavail * status.f_frsize, rel=0.1)
    monkeypatch.setattr(run.workers, "SHARED_MEMORY", str(tmp_path / "absent"))
    assert free_shared_memory() == 0


@linux
@pytest.mark.parametrize("limit", [(resource.RLIMIT_FSIZE, 4096), (resource.RLIMIT_NOFILE, 12)])
def test_a_batch_that_a_worker_cannot_send_is_an_error_and_no_endless_wait(limit):
    """Too little shared memory, or too few open files, of which each batch takes one."""
    kind, value = limit
    with pytest.raises(UserError, match="--num_workers: a loader worker cannot send its batch"):
        list(loader(functools.partial(resource.setrlimit, kind, (value, value))))


def test_workers_are_killed_where_their_work_is_done_even_if_they_are_stopped(capfd):
    iterator = iter(loader(int))
    next(iterator)
    workers = multiprocessing.active_children()
    os.kill(workers[0].pid, signal.SIGSTOP)  # as one that waits for a disk that does not answer
    started = time.monotonic()
    end_workers()
    del iterator
    assert time.monotonic() - started < 4 and not any(worker.is_alive() for worker in workers)
    assert capfd.readouterr().err == ""
    assert len(list(loader(int))) == 8  # of the next run in the same process


def test_a_worker_does_not_finalize_what_the_main_process_left(capfd):
    """The iterator of an earlier loader, for example: torch would print a traceback."""
    script = """
import functools, gc
from torch.utils.data import DataLoader
from run.workers import begin_worker

def loader():
    return DataLoader(range(9), num_workers=1, worker_init_fn=functools.partial(begin_worker, gc.collect))

gc.disable()
cycle = [iter(loader())]
cycle.append(cycle)
del cycle
list(loader())
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (process.returncode, process.stderr) == (0, "")
