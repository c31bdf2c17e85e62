"""The batches of a loader, copied to the device and augmented there ahead of the computation."""

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader

from images.augment import augment_batch
from run.cores import num_cores
from run.ranks import num_ranks
from run.signals import Stopped, interruptible
from run.turns import turns_of

AHEAD = 2  # batches that a thread has ready for a GPU


class DeviceBatches:
    """The batches of a loader on `device`: (images (N, 3, H, W) uint8, targets (N,) int64).

    Batches that come with augmentation parameters are augmented there. On a GPU each batch is copied and augmented on
    a separate stream while the previous one is computed; a `DataLoader` without workers is read by a thread.
    """

    def __init__(self, loader: Iterable, device: torch.device, before_stop: Callable[[], None] | None = None):
        """before_stop: called if a signal ends the wait for a batch, which may never come."""
        self.loader, self.device, self._before_stop = loader, device, before_stop
        self._waited, self._gaps = 0.0, []

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        if self.device.type == "cuda":
            yield from self._copied_ahead()
            return
        takes_turns = self.device.type == "cpu" and num_ranks() == 1  # ranks compute each step together
        turns = turns_of(torch.get_num_threads(), num_cores()) if takes_turns else None
        started = time.perf_counter()
        for batch in self._batches():
            self._waited += time.perf_counter() - started
            if turns is None:
                yield self._to_device(batch)
            else:
                self._wait_for(turns.take)
                try:
                    yield self._to_device(batch)
                finally:
                    turns.give_back()
            started = time.perf_counter()

    def _batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
        is_idle = isinstance(self.loader, DataLoader) and not self.loader.num_workers  # while the device computes
        reads_itself = self.device.type == "cuda" and is_idle
        iterator = self._wait_for(lambda: iter(read_ahead(self.loader) if reads_itself else self.loader))
        while (batch := self._wait_for(lambda: next(iterator, None))) is not None:
            yield batch
            del batch  # so that its shared memory is free when the next one arrives

    def _wait_for(self, get: Callable[[], Any]) -> Any:
        if num_ranks() > 1:  # which stop after the same step
            return get()
        try:
            with interruptible():
                return get()
        except Stopped:
            if self._before_stop:
                self._before_stop()
            raise

    def seconds_waited(self) -> float:
        """How long the device had no batch to compute. Waits until a GPU has finished."""
        if self._gaps:
            torch.cuda.synchronize(self.device)
            self._waited += sum(end.elapsed_time(begin) for end, begin in self._gaps) / 1e3
            self._gaps = []
        return self._waited

    def _to_device(self, batch):
        on_gpu = self.device.type == "cuda"  # MPS may read a batch after its memory has been used again
        images, targets, *parameters = (tensor.to(self.device, non_blocking=on_gpu) for tensor in batch)
        return augment_batch(images, *parameters) if parameters and len(images) else images, targets

    def _copied_ahead(self):
        stream, current = _copy_stream(self.device), torch.cuda.current_stream(self.device)
        end_of_step = _time_on(current)
        copied = None
        for batch in itertools.chain(self._batches(), [None]):
            previous = copied
            if batch is not None:
                with torch.cuda.stream(stream):
                    copied = self._to_device(batch), stream.record_event()
            if previous is not None:
                tensors, arrived = previous
                current.wait_event(arrived)
                for tensor in tensors:  # else the allocator could reuse its memory during the computation
                    tensor.record_stream(current)
                self._gaps.append((end_of_step, _time_on(current)))
                yield tensors
                end_of_step = _time_on(current)


def read_ahead(batches: Iterable) -> Iterator:
    """The same batches, read by a thread: where they only have to be copied from the cache, that is faster than worker
    processes, and needs no shared memory.
    """
    iterator = iter(batches)
    pool = ThreadPoolExecutor(1)
    try:
        pending = deque(pool.submit(next, iterator, None) for _ in range(AHEAD))
        while (batch := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, iterator, None))
            yield batch
            del batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@functools.cache  # the allocator keeps the memory of each stream apart: with a new one per epoch, reserved memory grows
def _copy_stream(device):
    return torch.cuda.Stream(device)


def _time_on(stream):
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event
