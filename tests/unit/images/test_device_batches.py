"""Batches on the device: in order, and how long they are waited for."""

import contextlib
import os
import signal
import threading

import pytest
import torch

import images.device_batches
from images.device_batches import AHEAD, DeviceBatches, read_ahead
from run.cli import UserError
from run.signals import Signals, Stopped
from run.turns import Turns

CPU = torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_copied_ahead_arrive_intact_and_in_order():
    images = torch.randint(0, 256, (96, 3, 9, 9), dtype=torch.uint8)
    expected = list(zip(images.split(8), torch.arange(96).split(8), strict=True))
    device_batches = DeviceBatches([tuple(t.pin_memory() for t in batch) for batch in expected], torch.device("cuda"))
    received = [(images.cpu(), targets.cpu()) for images, targets in device_batches]
    for (images, targets), (expected_images, expected_targets) in zip(received, expected, strict=True):
        assert torch.equal(images, expected_images) and torch.equal(targets, expected_targets)
    assert device_batches.seconds_waited() >= 0


def test_batches_that_a_thread_reads_are_the_same_and_at_most_a_few_ahead():
    read, main_thread = [], threading.get_ident()

    def batches():
        for number in range(9):
            read.append((number, threading.get_ident()))
            yield number

    for number, batch in enumerate(read_ahead(batches())):
        assert batch == number and len(read) <= number + 1 + AHEAD
    assert [number for number, _ in read] == list(range(9)) and main_thread not in {thread for _, thread in read}


def test_an_error_while_reading_ahead_arrives_after_the_batches_before_it():
    def batches():
        yield 0
        raise UserError("a.jpg cannot be read")

    iterator = read_ahead(batches())
    assert next(iterator) == 0
    with pytest.raises(UserError, match=r"a\.jpg"):
        next(iterator)


def test_what_is_not_needed_is_not_read():
    read = []
    iterator = read_ahead(number for number in range(100) if read.append(number) is None)
    next(iterator)
    iterator.close()
    assert len(read) <= 1 + AHEAD


def test_a_device_has_one_copy_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    first, second = (images.device_batches._copy_stream(torch.device("cuda", i)) for i in (6, 7))
    assert images.device_batches._copy_stream(torch.device("cuda", 6)) is first is not second


class RecordedTurns:
    def __init__(self):
        self.events = []

    def take(self):
        self.events.append("take")

    def give_back(self):
        self.events.append("give back")


def test_on_a_cpu_each_batch_is_computed_in_a_turn_that_is_given_back(monkeypatch):
    turns = RecordedTurns()
    monkeypatch.setattr(images.device_batches, "turns_of", lambda *_: turns)
    batch = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    for _ in DeviceBatches([batch, batch], CPU):
        turns.events.append("compute")
    assert turns.events == ["take", "compute", "give back"] * 2
    with pytest.raises(ZeroDivisionError), contextlib.closing(iter(DeviceBatches([batch], CPU))) as iterator:
        next(iterator)
        raise ZeroDivisionError
    assert turns.events[-2:] == ["take", "give back"]


def test_a_signal_ends_the_wait_for_a_turn(monkeypatch, tmp_path):
    others, ours, saved = Turns(tmp_path / "cores"), Turns(tmp_path / "cores"), []
    monkeypatch.setattr(images.device_batches, "turns_of", lambda *_: ours)
    batch = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    others.take()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Stopped), Signals() as signals, signals.deferred():
        next(iter(DeviceBatches([batch], CPU, lambda: saved.append(True))))
    others.give_back()
    assert saved == [True]
