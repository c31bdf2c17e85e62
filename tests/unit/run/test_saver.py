"""A run is saved while it goes on: what is copied, in which order it is written, and what waits for the disk."""

import functools
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from helpers import ROOT, index_of

import resume
from engine import Engine, RunningMetrics
from flags import build_parser
from model import Model
from run.cli import UserError
from run.files import HISTORY_COLUMNS, read_rows
from run.progress import Progress
from run.saver import BEST, LAST, PREVIOUS, Saver
from run.signals import Call, Signals, Stopped
from schedule import lr_lambda


@pytest.fixture
def signals():
    with Signals() as signals:
        yield signals


@pytest.fixture
def numbered(signals, tmp_path):
    """A saver whose n-th checkpoint file is the text "n", of n + 1 epochs. -> (saver, list of the snapshots taken)"""
    taken = []

    def snapshot(epoch_state):
        taken.append(epoch_state)
        number = len(taken) - 1
        rows = [{**dict.fromkeys(HISTORY_COLUMNS, 0.5), "epoch": epoch} for epoch in range(number + 1)]
        return rows, lambda: str(number).encode()

    with Saver(tmp_path, snapshot, signals) as saver:
        yield saver, taken


def texts(folder):
    """-> {name: content} of the checkpoints in a folder"""
    return {path.name: path.read_text() for path in folder.glob("*_model.pth") if path.is_file()}


@pytest.fixture
def training(thin_network):
    """A few steps of the thin network with everything a checkpoint has. -> (engine, progress, flags)"""
    torch.manual_seed(0)
    engine = Engine(Model(3), torch.nn.CrossEntropyLoss(), torch.device("cpu"), ema=0.9)
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    engine.optimizer = torch.optim.AdamW(engine.model.parameters(), lr=1e-3)
    engine.scheduler = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, lr_lambda([(1, 10)]))
    images, metrics = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), RunningMetrics(0, "cpu")
    for _ in range(2):
        engine._step([((images, torch.tensor([0, 1, 2, 0])), None)], metrics, None)
    progress = Progress()
    progress.add_epoch(
        {**dict.fromkeys(HISTORY_COLUMNS, 0.5), "epoch": 0, "val_recall": {"0": 0.25}}, "val_balanced_acc"
    )
    return engine, progress, build_parser().parse_args(["--data_dirs", "a", "b"])


def tensors_in(state):
    if isinstance(state, torch.Tensor):
        return [state]
    children = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else []
    return [tensor for child in children for tensor in tensors_in(child)]


@pytest.mark.parametrize("in_validation", [False, True])
def test_a_checkpoint_has_the_state_at_its_save_whatever_the_training_does_before_it_is_written(
    training, signals, tmp_path, monkeypatch, in_validation
):
    """Compared with the bytes of a file that is made of the state itself, at once."""
    engine, progress, args = training
    splits = {split: index_of([2, 1, 1]) for split in ("train", "val", "test")}
    snapshot = functools.partial(resume.snapshot, engine, progress, args, splits, np.array([2, 1, 1]), "id")
    with monkeypatch.context() as patch:
        patch.setattr(resume, "copied_to_cpu", lambda state: state)
        expected = bytes(snapshot(None)[1]())
    may_write = threading.Event()

    def blocked_snapshot(epoch_state):
        history, checkpoint_file = snapshot(epoch_state)
        return history, lambda: may_write.wait(60) and checkpoint_file()

    with Saver(tmp_path, blocked_snapshot, signals) as saver:
        with torch.inference_mode(in_validation):
            saver.after_epoch(is_best=True)
        with torch.no_grad():
            states = [engine.model.state_dict(), engine.average.model.state_dict(), engine.optimizer.state_dict()]
            changed = tensors_in(states)
            for tensor in changed:
                tensor.add_(1)
        assert len(changed) > 5 * len(list(engine.model.parameters()))  # twice the weights, and three of the optimizer
        engine.scheduler.step()
        engine.scheduler.base_lrs[0] = 0.25
        engine.scaler.update(4.0)
        engine.average.steps += 1
        torch.rand(1)
        progress.history[0]["val_recall"]["0"] = 0.75
        progress.add_epoch({**progress.history[0], "epoch": 1, "val_balanced_acc": 0.75}, "val_balanced_acc")
        args.data_dirs.append("c")
        args.learning_rate = 0.5
        assert not list(tmp_path.iterdir())
        may_write.set()
        saver.finish()
    assert (tmp_path / LAST).read_bytes() == (tmp_path / BEST).read_bytes() == expected
    assert bytes(snapshot(None)[1]()) != expected
    assert [row["epoch"] for row in read_rows(tmp_path / "history.csv")] == ["0"]


def test_the_next_save_waits_for_the_previous_one(numbered, tmp_path, monkeypatch):
    saver, taken = numbered
    may_write, real_wait, events = threading.Event(), Call.wait, []

    def wait(call, *rest):
        events.append(f"waits, {len(taken)} taken")
        may_write.set()
        real_wait(call, *rest)
        events.append(f"{texts(tmp_path)}, {len(taken)} taken")

    saver._snapshot = blocking(saver._snapshot, may_write)
    monkeypatch.setattr(Call, "wait", wait)
    saver.after_epoch(is_best=False)
    assert not events and not texts(tmp_path)
    saver.after_epoch(is_best=False)
    assert events == ["waits, 1 taken", f"{ {LAST: '0'} }, 1 taken"] and len(taken) == 2
    saver.finish()
    assert texts(tmp_path) == {LAST: "1", PREVIOUS: "0"}


def blocking(snapshot, may_write):
    """`snapshot`, whose files are made once `may_write` is set."""

    def blocked(epoch_state):
        history, checkpoint_file = snapshot(epoch_state)
        return history, lambda: may_write.wait(20) and checkpoint_file()

    return blocked


def test_an_epoch_counts_as_saved_once_it_is_on_disk(numbered, tmp_path):
    """What is logged to W&B must not come again after a crash."""
    saver, _ = numbered
    may_write, logged, written = threading.Event(), [], []
    saver._snapshot = blocking(saver._snapshot, may_write)

    def note(calls):
        calls.append((threading.current_thread(), texts(tmp_path)))

    saver.after_epoch(True, functools.partial(note, written), functools.partial(note, logged))
    saver.after_step(RunningMetrics(1, "cpu"))
    assert not logged and not written
    may_write.set()
    saver._writing.wait()
    assert not logged
    saver.after_step(RunningMetrics(1, "cpu"))
    files = {LAST: "0", BEST: "0"}
    assert logged == [(threading.main_thread(), files)]
    ((thread, found),) = written
    assert thread is not threading.main_thread() and found == files


def test_an_error_of_the_training_does_not_cost_the_epoch_before_it(numbered, tmp_path):
    saver, _ = numbered
    may_write, logged = threading.Event(), []
    saver._snapshot = blocking(saver._snapshot, may_write)
    with pytest.raises(UserError), saver:
        saver.after_epoch(True, None, lambda: logged.append(0))
        threading.Timer(0.1, may_write.set).start()
        raise UserError("the loss is nan")
    assert texts(tmp_path) == {LAST: "0", BEST: "0"} and logged == [0]


def test_a_signal_ends_the_run_once_it_is_saved(numbered, signals, tmp_path):
    saver, taken = numbered
    may_write = threading.Event()
    saver._snapshot = blocking(saver._snapshot, may_write)
    with pytest.raises(Stopped), signals.deferred():
        saver.after_epoch(is_best=False)
        signal.raise_signal(signal.SIGTERM)
        assert not signals.saved
        threading.Timer(0.1, may_write.set).start()
        saver.after_step(RunningMetrics(1, "cpu"))
    assert texts(tmp_path) == {LAST: "1", PREVIOUS: "0"} and taken[1]["images"] == 0 and signals.saved


def test_a_second_signal_ends_the_wait_for_a_disk_that_never_answers(tmp_path):
    script = """
import os, sys, run.saver, run.signals
run.signals.SECOND_SIGNAL_S = 0
with run.signals.Signals() as signals, signals.deferred():
    with run.saver.Saver(sys.argv[1], lambda state: ([], lambda: b"file"), signals) as saver:
        os.mkfifo(f"{sys.argv[1]}/.history.csv.{os.getpid()}.tmp")  # opening it waits for a reader
        saver.after_epoch(is_best=True)
        print("training", flush=True)
        saver.after_epoch(is_best=True)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "training\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline().startswith("stopping after this step; a second signal")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143


def test_a_best_model_that_the_disk_refuses_is_written_before_the_checkpoint_that_follows(
    numbered, signals, tmp_path, monkeypatch, capsys
):
    saver, logged, replaced, real_replace = numbered[0], [], [], os.replace

    def replace(source, target):
        real_replace(source, target)
        replaced.append(os.path.basename(target))

    (tmp_path / BEST / "in the way").mkdir(parents=True)
    saver.after_epoch(True, None, lambda: logged.append(0))
    saver.wait()
    assert texts(tmp_path) == {LAST: "0"} and signals.saved and not logged
    assert capsys.readouterr().err.startswith(f"warning: cannot save {tmp_path / BEST}")
    saver.after_epoch(False, None, lambda: logged.append(1))
    saver.wait()  # refused again: then the older checkpoint, which can restore the best model, must stay
    assert texts(tmp_path) == {LAST: "0"} and not logged and not capsys.readouterr().err
    with pytest.raises(OSError):
        saver.finish()
    (tmp_path / BEST / "in the way").rmdir()
    (tmp_path / BEST).rmdir()
    monkeypatch.setattr(os, "replace", replace)
    saver.finish()
    assert replaced == ["history.csv", BEST, PREVIOUS, LAST] and logged == [0, 1]
    assert texts(tmp_path) == {BEST: "0", LAST: "1", PREVIOUS: "0"}
    assert capsys.readouterr().err == f"saved again: {tmp_path / LAST}\n"
