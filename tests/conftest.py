"""Tiny class folders and one tiny finished training, shared by the tests."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from thin_main import thin_resnet50
from wandb_server import WandbServer

import main
import resnet_custom
from files import read_rows
from model import checkpoint_bytes, save_checkpoint

os.environ["WANDB_MODE"] = "disabled"
# the tests run side by side, and threads of two computations on the same cores fight each other
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
CACHE_HOME = tempfile.TemporaryDirectory()  # taken away when the tests end
os.environ["XDG_CACHE_HOME"] = CACHE_HOME.name
# a background job ignores Ctrl-C, and so would the processes that the tests start and stop by it
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(main.__file__).parent
THIN_MAIN = str(ROOT / "tests" / "thin_main.py")
TINY_COUNTS = {"0": 20, "2": 10, "10": 5}
TINY_FLAGS = ["--no-pretrained", "--image_size", "32", "--batch_size", "8", "--epochs", "2", "--lr", "1e-3"]


def write_images(folder, count, color=(128, 128, 128), seed=0, suffix=".png", size=(36, 30)):
    """`count` noisy images about one colour. -> their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((seed, *color))
    paths = []
    for number in range(count):
        noise = rng.normal(color, 25, (size[1], size[0], 3))
        paths.append(folder / f"{number:03d}{suffix}")
        Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).save(paths[-1])
    return paths


def write_class_folders(folder, counts=None, seed=0):
    """Three classes of different colour. -> folder."""
    counts = TINY_COUNTS if counts is None else counts
    colors = [(200, 80, 80), (80, 200, 80), (80, 80, 200), (150, 150, 60), (60, 150, 150)]
    for (name, count), color in zip(counts.items(), colors, strict=False):
        write_images(folder / name, count, color, seed)
    return folder


def run_main(*flags):
    """main.py in this process. -> exit status."""
    return main.main([str(flag) for flag in flags])


def start_main(*flags, program=ROOT / "main.py", **options):
    """main.py as a process without a terminal, with the whole ResNet-50 or as tests/thin_main.py. -> Popen."""
    command = [sys.executable, str(program), *map(str, flags)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **options)


def start_with_thin_trials(program, *flags):
    """search or ablate as a process whose trials are tests/thin_main.py. -> Popen."""
    script = f"import sys, main, {program}; main.__file__ = {THIN_MAIN!r}; sys.exit({program}.main_{program}())"
    command = [sys.executable, "-c", script, *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


def wait_for(condition, seconds=150):
    """-> what `condition` gives as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def stop_while_training(process, history, number):
    """Send a signal to a search or ablate as soon as its trial has an epoch in `history`, and see how it ends."""
    wait_for(lambda: history.exists() and len(history.read_text().splitlines()) > 2)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or "go on with the same command" in err


def history_but_times(run_dir):
    times = ("seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in read_rows(run_dir / "history.csv")]


def same(one, other):
    """Whether two state dicts or checkpoints are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def write_checkpoint(path, checkpoint):
    save_checkpoint(path, checkpoint_bytes(checkpoint))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("data"))


@pytest.fixture
def thin_network(monkeypatch):
    monkeypatch.setattr(resnet_custom, "resnet50", thin_resnet50)


@pytest.fixture
def thin_trials(monkeypatch):
    monkeypatch.setattr(main, "__file__", THIN_MAIN)


@pytest.fixture
def server():
    with WandbServer() as server:
        yield server


@pytest.fixture(scope="session")
def finished_run(data_dir, tmp_path_factory):
    """The folder of a two-epoch training of the thin network: augmentation, Class-Balanced loss, float32."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--use_augmentation", "--amp", "off", "--run_dir", run_dir]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet_custom, "resnet50", thin_resnet50)
        assert run_main(*flags) == 0
    return run_dir


@pytest.fixture
def copied_run(finished_run, tmp_path):
    """A run folder of one's own, with links to the finished run's files (checkpoints are large)."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for file in finished_run.iterdir():
        if file.is_file():
            os.link(file, folder / file.name)
    return folder
