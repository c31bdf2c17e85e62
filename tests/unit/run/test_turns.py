"""Trainings on the same cores take turns, and nobody starves or waits forever."""

import threading

import filelock
import pytest
from helpers import wait_for

import run.turns
from run.turns import Turns, turns_of


@pytest.fixture
def name(tmp_path):
    return tmp_path / "cores"


def test_a_training_with_at_most_half_of_the_cores_takes_no_turns(monkeypatch, tmp_path):
    monkeypatch.setattr(run.turns.tempfile, "gettempdir", lambda: str(tmp_path))
    turns_of.cache_clear()
    assert turns_of(1, 2) is None and turns_of(4, 8) is None
    assert turns_of(2, 2) is not None and turns_of(3, 4) is not None
    turns_of.cache_clear()


def is_held(path):
    lock = filelock.FileLock(path, blocking=False, preserve_lock_file=True)
    try:
        lock.acquire()
    except filelock.Timeout:
        return True
    lock.release()
    return False


def test_only_one_computes_at_a_time_and_who_has_waited_goes_first(name):
    first, second, order = Turns(name), Turns(name), []

    def compute():
        second.take()
        order.append("second")
        second.give_back()

    first.take()
    waiting = threading.Thread(target=compute)
    waiting.start()
    wait_for(lambda: is_held(f"{name}.next"))
    assert order == []
    first.give_back()
    first.take()  # again at once, although the other one may be asleep
    order.append("first")
    waiting.join()
    first.give_back()
    assert order == ["second", "first"]


def test_a_training_that_keeps_its_turn_is_not_waited_for_forever(name, monkeypatch, capsys):
    monkeypatch.setattr(run.turns, "LONGEST_WAIT", 0.05)
    suspended, other = Turns(name), Turns(name)
    suspended.take()
    other.take()
    other.give_back()
    assert "not waiting for it any more" in capsys.readouterr().out
    assert not other.is_working and suspended.is_working
    suspended.give_back()


def test_a_folder_without_locks_means_no_turns(tmp_path):
    (tmp_path / "file").touch()
    turns = Turns(tmp_path / "file" / "cores")
    turns.take()
    turns.give_back()
    assert not turns.is_working
