"""How one of several processes waits for the first one, and what it says when nobody answers; with a real store."""

import threading
import time

import pytest
from torch.distributed import TCPStore

import run.rank_group
from run.cli import UserError
from run.rank_group import RankGroup


@pytest.fixture
def store():
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def group(store, monkeypatch):
    """The second of two processes that torchrun has started."""
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**variables, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run.rank_group, "BEAT_SECONDS", 0.1)
    group = RankGroup()
    group.store = TCPStore("localhost", store.port, is_master=False)
    return group


def seconds_of(action):
    started = time.monotonic()
    action()
    return time.monotonic() - started


def test_a_stopped_process_does_not_wait_for_a_first_one_that_was_killed(group):
    group._stops_after_step = True
    assert seconds_of(group.wait_for_first) < run.rank_group.GRACE_SECONDS / 3


@pytest.mark.parametrize("saves", [True, False])
def test_a_stopped_process_waits_for_the_first_one_as_long_as_it_may_save(group, store, monkeypatch, saves):
    monkeypatch.setattr(run.rank_group, "GRACE_SECONDS", 1.2)
    monkeypatch.setattr(run.rank_group, "LINGER_SECONDS", 0.3)
    has_ended = threading.Event()

    def give_signs_of_life():
        beat = 0
        while not has_ended.wait(0.02):
            beat += 1
            store.set("alive/0", f"{beat}|0|trains")

    first = threading.Thread(target=give_signs_of_life)
    first.start()
    group._stops_after_step = saves
    seconds = seconds_of(group.wait_for_first)
    has_ended.set()
    first.join()
    assert (seconds >= 1.2) == saves


@pytest.mark.parametrize(
    ("machine", "is_apart", "speaks"), [([0, 1], True, False), ([1], True, True), ([0, 1], False, True)]
)
def test_one_process_of_each_machine_says_that_the_store_is_gone(group, monkeypatch, capsys, machine, is_apart, speaks):
    monkeypatch.setattr(run.rank_group, "LINGER_SECONDS", 0)
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    group.store = TCPStore("localhost", server.port, is_master=False)
    group.machine, group._store_is_apart = machine, is_apart
    del server  # it ends
    with pytest.raises(run.rank_group.OtherEnded) as ended:
        group._raise_if_ended()
    assert group.end_after(ended.value) == 2
    assert capsys.readouterr().err.count("error: torchrun") == speaks


def test_a_process_that_does_not_answer_is_named_in_whatever_words_gloo_says_so(group):
    group.store.set("host/0", "nowhere")
    group.store.set("alive/0", "3|7|validates")
    with pytest.raises(UserError, match=r"lost to rank 0 on nowhere \(validates, step 7\)"):
        group.end_after(RuntimeError("Application timeout caused pair closure"))
