"""What tests share: tiny class folders, commands in this process and in others, comparisons bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import main
from images.folders import ImageIndex
from metrics import full_metrics
from model import load_checkpoint, save_checkpoint
from run.files import HISTORY_COLUMNS, read_rows, write_history, write_json, write_predictions
from run.saver import BEST, LAST

ROOT = Path(main.__file__).parent
THIN_MAIN = ROOT / "tests" / "tools" / "thin_main.py"
PATIENCE = 300  # seconds for whatever ends by itself: only what hangs takes longer, also on a machine with much to do
TINY_COUNTS = {"0": 20, "2": 10, "10": 5}
TINY_FLAGS = ["--no-pretrained", "--image_size", "32", "--batch_size", "8", "--epochs", "2", "--lr", "1e-3"]


def write_images(folder, count, color=(128, 128, 128), seed=0, suffix=".png", size=(36, 30)):
    """`count` noisy images around one color. -> their paths"""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((seed, *color))
    paths = []
    for number in range(count):
        noise = rng.normal(color, 25, (size[1], size[0], 3))
        paths.append(folder / f"{number:03d}{suffix}")
        Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).save(paths[-1])
    return paths


def write_class_folders(folder, counts=None, seed=0):
    """Three classes of different color. -> folder"""
    counts = TINY_COUNTS if counts is None else counts
    colors = [(200, 80, 80), (80, 200, 80), (80, 80, 200), (150, 150, 60), (60, 150, 150)]
    for (name, count), color in zip(counts.items(), colors, strict=False):
        write_images(folder / name, count, color, seed)
    return folder


def index_of(counts):
    """An index of images that do not exist. counts: images per class"""
    targets = np.repeat(np.arange(len(counts)), counts)
    paths = [f"/nowhere/{target}/{i}.jpg" for i, target in enumerate(targets)]
    return ImageIndex(paths, targets, [str(c) for c in range(len(counts))])


def run_main(*flags):
    """main.py in this process. -> exit status"""
    return main.main([str(flag) for flag in flags])


def start_main(*flags, program=ROOT / "main.py", **options):
    """main.py as a process without a terminal, with the whole ResNet-50 or as tests/tools/thin_main.py. -> Popen"""
    command = [sys.executable, str(program), *map(str, flags)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **options)


def start_with_thin_trials(program, *flags):
    """search.py or ablate.py as a process whose child processes are tests/tools/thin_main.py. -> Popen"""
    script = (
        f"import pathlib, sys, study.process, {program}\n"
        f"study.process.MAIN = pathlib.Path({str(THIN_MAIN)!r})\n"
        f"sys.exit({program}.main())"
    )
    command = [sys.executable, "-c", script, *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


def write_run_folder(folder, targets, probabilities, classes=("a", "b", "c"), paths=None, epochs=3, **flags):
    """The files of a finished run that report.py reads, without a training. -> folder"""
    folder.mkdir(parents=True)
    paths = [f"/nowhere/{i:04d}.png" for i in range(len(targets))] if paths is None else paths
    metrics = full_metrics(targets, probabilities, list(classes), [50] * len(classes), resamples=20)
    results = {"evaluated_epoch": 1, "best_epoch": 1, "epochs": epochs, "test": metrics, "val": metrics}
    write_json(folder / "results.json", {**results, "classes": list(classes), "samples_per_cls": [50] * len(classes)})
    write_json(
        folder / "args.json", {"seed": 0, "epochs": epochs, "run_dir": str(folder), "resize": "stretch", **flags}
    )
    row = dict.fromkeys(HISTORY_COLUMNS, 0.5)
    write_history(folder / "history.csv", [{**row, "epoch": epoch} for epoch in range(epochs)])
    write_predictions(folder / "test_predictions.csv", paths, targets, probabilities, list(classes))
    return folder


def wait_for(condition, seconds=PATIENCE):
    """-> what `condition` returns as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def stop_while_training(process, history, number):
    """Send a signal to a search or ablation as soon as its trial has an epoch in `history`, and check how it ends."""
    wait_for(lambda: history.exists() and len(history.read_text().splitlines()) > 2)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or "resume with the same command" in err


def history_but_times(run_dir):
    times = ("seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in read_rows(run_dir / "history.csv")]


def same(left, right):
    """Whether two state dicts or checkpoints are equal, bit for bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def write_checkpoint(path, checkpoint):
    save_checkpoint(path, checkpoint)


def changed_checkpoint(run_dir, path, **changes):
    """The best model of a run with other content, written to `path`. -> path"""
    write_checkpoint(path, {**load_checkpoint(run_dir / BEST), **changes})
    return path


def differences(left, right):
    """What differs between two run folders, bit for bit, apart from times and flags. -> names"""
    different = []
    for name in (LAST, BEST):
        first, second = load_checkpoint(left / name), load_checkpoint(right / name)
        untimed = {"args": None, "history": None}
        different += [
            f"{name}: {key}" for key in first if not same({**first, **untimed}[key], {**second, **untimed}[key])
        ]
    if history_but_times(left) != history_but_times(right):
        different.append("history.csv")
    names = ("results.json", "val_predictions.csv", "test_predictions.csv", "splits.json")
    return different + [name for name in names if (left / name).read_bytes() != (right / name).read_bytes()]
