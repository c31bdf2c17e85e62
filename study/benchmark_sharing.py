"""Two trainings at once on one machine, and one alone: a measurement of `bench.py`."""

import time
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

import torch

from engine import RunningMetrics
from run.machine import keep_freed_memory
from study import benchmark_common as common
from study.benchmark_reference import reference_process

SIDE, BATCH = 64, 32
SECONDS = 8.0  # of each measurement


def measure_sharing(device: torch.device) -> dict[str, float]:
    """Images per second of the training step at 64 px, in processes like those of main.py.

    -> {"alone": of one process, "together": the sum of two at once}
    """
    with training_processes() as processes:
        arguments = device, SIDE, BATCH, SECONDS

        def rate_of(number):
            futures = [process.submit(training_rate, *arguments) for process in processes[:number]]
            return sum(future.result() for future in futures)

        rate_of(2)
        return common.median_rates({"alone": lambda: rate_of(1), "together": lambda: rate_of(2)})


@contextmanager
def training_processes() -> Iterator[tuple[Executor, Executor]]:
    """Two fresh processes."""
    with reference_process() as first, reference_process() as second:
        yield first, second


def training_rate(device: torch.device, side: int, batch_size: int, seconds: float) -> float:
    """Images per second of training steps on random images, for about `seconds`, after one that is not timed."""
    keep_freed_memory()  # as main.py does
    engine = common.training_engine(device, batch_size)
    images = torch.randint(0, 256, (batch_size, 3, side, side), dtype=torch.uint8, device=device)
    batch = images, torch.arange(batch_size, device=device) % common.NUM_CLASSES
    engine.train_one_epoch([batch], RunningMetrics(0, device))
    num_images, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds or not num_images:
        engine.train_one_epoch([batch], RunningMetrics(0, device))
        num_images += batch_size
    return num_images / passed
