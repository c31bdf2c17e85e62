"""Fixtures, and the environment of the tests."""

import gc
import os
import shutil
import signal
import tempfile

import pytest
import torch
from helpers import THIN_MAIN, TINY_FLAGS, run_main, write_class_folders
from thin_main import thin_resnet50
from wandb_server import WandbServer

import resnet_custom
import study.process
from run.cores import num_cores

os.environ["WANDB_MODE"] = "disabled"
# tests run side by side, and the threads of two computations would compete for the same cores
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
gc.freeze()  # what the imports made stays: looking through it takes a third of a second each time
CACHE_HOME = tempfile.TemporaryDirectory()  # deleted when the tests end
os.environ["XDG_CACHE_HOME"] = CACHE_HOME.name
# a background job ignores Ctrl-C, and so would the processes that the tests start and stop with it
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config):
    """One more worker than cores: tests of W&B and sweeps wait for other processes most of the time."""
    return num_cores() + 1


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("data"))


@pytest.fixture
def thin_network(monkeypatch):
    monkeypatch.setattr(resnet_custom, "resnet50", thin_resnet50)


@pytest.fixture
def thin_trials(monkeypatch):
    monkeypatch.setattr(study.process, "MAIN", THIN_MAIN)


@pytest.fixture
def server():
    with WandbServer() as server:
        yield server


@pytest.fixture(scope="session")
def finished_run(data_dir, tmp_path_factory):
    """Folder of a two-epoch training of the thin network: augmentation, Class-Balanced loss, float32."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--use_augmentation", "--amp", "off", "--run_dir", run_dir]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet_custom, "resnet50", thin_resnet50)
        assert run_main(*flags) == 0
    return run_dir


@pytest.fixture
def copied_run(finished_run, tmp_path):
    """A copy of the finished run's folder, with links to its files (checkpoints are large)."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for file in finished_run.iterdir():
        if file.name == "log.txt":  # to which a resumed run appends
            shutil.copy(file, folder)
        elif file.is_file():
            os.link(file, folder / file.name)
    return folder
