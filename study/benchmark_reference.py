"""What `bench.py` compares the project with: the usual way to read images, train a step and bootstrap metrics."""

import functools
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn import metrics as sk_metrics
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor, v2

from model import IMAGENET_MEAN, IMAGENET_STD
from resnet_custom import resnet50
from utils import CBLoss


@contextmanager
def reference_process() -> Iterator[Executor]:
    """A fresh process: nothing that the project sets in its own process helps or hinders the reference there."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        # a process starts with the blocked signals of its parent: Ctrl-C, which reaches both, is left to the parent
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            executor.submit(int)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            yield executor
        except BaseException:  # do not wait for the current measurement
            for process in multiprocessing.active_children():
                process.kill()
            raise


def wait_for_device(device: torch.device) -> None:
    """Wait until a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_on(device: torch.device, compute: Callable[[], Any]) -> float:
    """How long the device takes for what `compute` has it do: on a GPU by its own clock, between two events."""
    if device.type != "cuda":
        started = time.perf_counter()
        compute()
        wait_for_device(device)
        return time.perf_counter() - started
    stream = torch.cuda.current_stream(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wait_for_device(device)
    begin.record(stream)
    compute()
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def reference_input_rate(folder: Path, device: torch.device, batch_size: int, image_size: int) -> float:
    """Images per second of one core, from class folders to normalized batches on the device.

    torchvision's ImageFolder: open, decode, augment at full size, resize, convert to a tensor, normalize.
    """
    torch.set_num_threads(1)
    transform = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(15, translate=(0.05, 0.05), scale=(1 / 1.1, 1.1)),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
            v2.Resize((image_size, image_size)),
            ToTensor(),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    photos = ImageFolder(folder, transform)
    started = time.perf_counter()
    for images, _ in DataLoader(photos, batch_size, shuffle=True):
        images.to(device)
    wait_for_device(device)
    return len(photos) / (time.perf_counter() - started)


def reference_step_rate(
    device: torch.device, samples_per_cls: Sequence[int], batch_size: int, image_size: int, steps: int
) -> float:
    """Images per second of `steps` training steps of a plain script, after one step that is not timed.

    The script trains the same ResNet-50 with last stride 1 and the same loss, in float32, with Adam, torch's default
    threads and memory format, and reads the loss in every step. Its images are on the device and normalized already. A
    first step is slower: the system has to provide the memory for the activations. A training has thousands of others.
    """
    step = _plain_training(device, tuple(samples_per_cls), batch_size, image_size)

    def train():
        for _ in range(steps):
            step()

    step()
    return steps * batch_size / seconds_on(device, train)


@functools.cache
def _plain_training(device, samples_per_cls, batch_size, image_size):
    model = resnet50()
    model.fc = torch.nn.Linear(model.fc.in_features, len(samples_per_cls))
    model.to(device)
    criterion = CBLoss(samples_per_cls).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    targets = torch.arange(batch_size, device=device) % len(samples_per_cls)

    def step():
        optimizer.zero_grad()
        loss = criterion(model(images), targets)
        loss.backward()
        optimizer.step()
        return loss.item()  # waits for a GPU

    return step


def reference_resample(targets: np.ndarray, probabilities: np.ndarray, rng: np.random.Generator) -> None:
    """Draw one stratified bootstrap resample and compute its metrics with scikit-learn.

    targets: (N,) int; probabilities: (N, C).
    """
    classes = range(probabilities.shape[1])
    members = [np.flatnonzero(targets == c) for c in classes]
    drawn = np.concatenate([rng.choice(positions, len(positions)) for positions in members])
    targets, probabilities = targets[drawn], probabilities[drawn]
    sk_metrics.precision_recall_fscore_support(targets, probabilities.argmax(axis=1), zero_division=0)
    for c in classes:
        sk_metrics.roc_auc_score(targets == c, probabilities[:, c])
        sk_metrics.average_precision_score(targets == c, probabilities[:, c])
