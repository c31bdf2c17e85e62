"""Two trainings at once on one machine, and one alone: a measurement of `bench.py`."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager

import torch

from engine import Engine, RunningMetrics
from model import Model
from run.cores import num_cores
from run.machine import keep_freed_memory, resolve_amp
from study.benchmark_reference import reference_process
from utils import CBLoss

SIDE, BATCH = 64, 32
SECONDS = 8.0  # of each measurement


def measure_sharing(
    device: torch.device,
    samples_per_cls: Sequence[int],
    median_rates: Callable[[dict[str, Callable[[], float]]], dict[str, float]],
) -> dict[str, float]:
    """Images per second of the training step at 64 px, in processes like those of main.py.

    median_rates: that of study/benchmark.py. -> {"alone": of one process, "together": the sum of two at once}
    """
    with training_processes() as processes:
        arguments = device, samples_per_cls, SIDE, BATCH, SECONDS

        def rate_of(number):
            futures = [process.submit(training_rate, *arguments) for process in processes[:number]]
            return sum(future.result() for future in futures)

        rate_of(2)
        return median_rates({"alone": lambda: rate_of(1), "together": lambda: rate_of(2)})


@contextmanager
def training_processes() -> Iterator[tuple[Executor, Executor]]:
    """Two fresh processes."""
    with reference_process() as first, reference_process() as second:
        yield first, second


def training_rate(
    device: torch.device, samples_per_cls: Sequence[int], side: int, batch_size: int, seconds: float
) -> float:
    """Images per second of training steps on random images, for about `seconds`, after one that is not timed."""
    keep_freed_memory()
    torch.set_num_threads(min(torch.get_num_threads(), num_cores()))  # both as main.py does
    num_classes = len(samples_per_cls)
    engine = Engine(Model(num_classes), CBLoss(samples_per_cls), device, resolve_amp("auto", device), clip_grad=1.0)
    engine.optimizer = torch.optim.AdamW(engine.model.parameters(), lr=1e-4, fused=True)
    engine.scheduler = torch.optim.lr_scheduler.ConstantLR(engine.optimizer)
    images = torch.randint(0, 256, (batch_size, 3, side, side), dtype=torch.uint8, device=device)
    batch = images, torch.arange(batch_size, device=device) % num_classes
    engine.train_one_epoch([batch], RunningMetrics(0, device))
    num_images, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds or not num_images:
        engine.train_one_epoch([batch], RunningMetrics(0, device))
        num_images += batch_size
    return num_images / passed
