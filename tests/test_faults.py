"""Nothing is lost: runs stopped anywhere, full disks, damaged files, moved data, hostile files, two at once."""

import errno
import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    TINY_COUNTS,
    TINY_FLAGS,
    history_but_times,
    run_main,
    same,
    start_main,
    wait_for,
    write_checkpoint,
    write_class_folders,
    write_images,
)
from PIL import Image
from test_engine import make_engine

import dataset_double
import files
import main
import resuming
from engine import RunningFigures
from files import Damaged, UserError, locked
from image_cache import limit_image_size, read_image
from model import load_checkpoint
from resuming import BEST, DAMAGED, LAST, PREVIOUS, Keeper

pytestmark = pytest.mark.usefixtures("thin_network")
LONG_EPOCHS = ["--epochs", "500", "--target_samples_per_class", "2000", "--use_augmentation"]


def differences(one, other):
    """Names of what two run folders do not have in common, bit for bit, but for times and the flags of the start."""
    different = []
    for name in (LAST, BEST):
        first, second = load_checkpoint(one / name), load_checkpoint(other / name)
        untimed = {"args": None, "history": None}
        different += [
            f"{name}: {key}" for key in first if not same({**first, **untimed}[key], {**second, **untimed}[key])
        ]
    if history_but_times(one) != history_but_times(other):
        different.append("history.csv")
    names = ("results.json", "val_predictions.csv", "test_predictions.csv", "splits.json")
    return different + [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]


@pytest.fixture
def signal_at_visit(monkeypatch):
    """Have a signal arrive during steps. -> set it with (number, the steps), counted over all runs of the test."""
    visits, real_visit = [0], Keeper.visit

    def set_signal(number, steps):
        def visit(keeper, figures):
            visits[0] += 1
            if visits[0] in steps:
                signal.raise_signal(number)
            real_visit(keeper, figures)

        monkeypatch.setattr(Keeper, "visit", visit)

    return set_signal


# ---------------------------------------------------------------------------------------------------- exact resume

KINDS_OF_RUN = {
    "float32": "",
    "bfloat16, augmented, accumulated, workers": "--amp bf16 --use_augmentation --grad_accum 2 --num_workers 2",
    "float16": "--amp fp16 --grad_accum 2 --epochs 1",  # slow on most CPUs
    "deferred, mixed, averaged, with a head of its own": "--epochs 3 --drw_epoch 1 --crt_epochs 1 --train_loss ldam "
    "--sampling progressive --mixup 0.4 --cutmix 1 --ema 0.9 --augment_all",
    "float32, augmented, progressive": "--use_augmentation --progressive --train_loss focal",
}


@pytest.mark.parametrize("kind", KINDS_OF_RUN)
def test_a_run_stopped_after_every_step_ends_bit_for_bit_as_one_never_stopped(kind, data_dir, tmp_path, monkeypatch):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--amp", "off", *KINDS_OF_RUN[kind].split(), "--run_dir"]
    assert run_main(*flags, tmp_path / "whole") == 0
    real_visit = Keeper.visit

    def stopped_visit(keeper, figures):  # after each step, and after each batch of validation but those seen before
        if (figures.epoch, figures.images, figures.steps) not in seen or figures.steps:
            signal.raise_signal(signal.SIGTERM)
        seen.add((figures.epoch, figures.images, figures.steps))
        real_visit(keeper, figures)

    seen, stops = set(), 0
    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "visit", stopped_visit)
        command = [*flags, tmp_path / "stopped"]
        while (status := run_main(*command)) == 143:
            stops += 1
            command = ["--resume", tmp_path / "stopped" / LAST]
    assert status == 0
    epochs = 1 if kind == "float16" else 2
    assert stops >= epochs * (2 if "grad_accum" in KINDS_OF_RUN[kind] else 3) + epochs
    assert differences(tmp_path / "whole", tmp_path / "stopped") == []


def test_resuming_in_mid_epoch_does_not_load_what_was_seen(data_dir, tmp_path, signal_at_visit, monkeypatch):
    loaded, real_read = [], dataset_double.DoubleSkinDataset.read

    def read(dataset, i):
        loaded.append(dataset.index.paths[i])
        return real_read(dataset, i)

    monkeypatch.setattr(dataset_double.DoubleSkinDataset, "read", read)
    signal_at_visit(signal.SIGINT, [2])
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--run_dir", tmp_path / "run"]
    assert run_main(*flags) == 130
    first, position = list(loaded), load_checkpoint(tmp_path / "run" / LAST)["position"]
    assert position["images"] == len(first) == 16
    loaded.clear()
    assert run_main("--resume", tmp_path / "run" / LAST) == 0
    train = json.loads((tmp_path / "run" / "splits.json").read_text())["train"]
    assert sorted(first + loaded[: len(train) - len(first)]) == sorted(train)


def test_save_every_saves_within_the_epoch_and_keeps_the_one_before(data_dir, tmp_path, monkeypatch):
    saved, real_save = [], resuming.save_checkpoint

    def save(path, *rest, **options):
        saved.append(path.name)
        real_save(path, *rest, **options)

    monkeypatch.setattr(resuming, "save_checkpoint", save)
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--save_every", 2, "--run_dir", tmp_path / "run"]
    assert run_main(*flags) == 0
    assert saved == [LAST, LAST, BEST]  # after step 2 of 3; at the end of the epoch
    former, last = load_checkpoint(tmp_path / "run" / PREVIOUS), load_checkpoint(tmp_path / "run" / LAST)
    assert (former["epoch"], former["position"]["images"]) == (-1, 16)
    assert (last["epoch"], last["position"]) == (0, None)
    saved.clear()
    flags[-1] = tmp_path / "by_time"
    assert run_main(*flags, "--save_every", 0, "--save_minutes", 1e-6) == 0
    assert saved[:4] == [LAST] * 4  # after each step, and a batch of validation


def test_another_order_begins_the_epoch_again(data_dir, tmp_path, signal_at_visit, capsys):
    signal_at_visit(signal.SIGTERM, [2])
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--run_dir", tmp_path / "run"]
    assert run_main(*flags) == 143
    assert run_main("--resume", tmp_path / "run" / LAST, "--seed", 7) == 0
    assert "epoch 0 begins again" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run" / LAST)["scheduler_state_dict"]["last_epoch"] == 3


# --------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_whole_group_saves_and_says_how_to_go_on(tmp_path, data_dir, number, status):
    """Loader workers get it too, as a terminal or a queue sends it. SIGUSR1 before it saves and goes on.

    Nobody reads what is printed any more, as where `| tee` ends of the same Ctrl-C.
    """
    last = tmp_path / "a run" / LAST
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, *LONG_EPOCHS, "--num_workers", 2, "--run_dir", last.parent]
    process = start_main(*flags, "--save_minutes", 0, start_new_session=True)
    wait_for(lambda: "training on" in process.stdout.readline())
    os.killpg(process.pid, signal.SIGUSR1)
    wait_for(last.exists)
    seen = load_checkpoint(last)["position"]["images"]
    process.stdout.close()
    os.killpg(process.pid, number)
    err = process.stderr.read()
    process.wait(timeout=60)
    assert process.returncode == status
    assert err.strip() == f"stopped; go on with: python main.py --resume '{last}'"
    checkpoint = load_checkpoint(last)
    assert checkpoint["epoch"] == -1 and 0 < seen < checkpoint["position"]["images"]
    assert load_checkpoint(last.with_name(PREVIOUS))["position"]["images"] == seen


def test_a_second_signal_ends_the_process_at_once_but_not_the_same_one_come_twice():
    script = (
        "import os, signal, time, resuming\n"
        "with resuming.Signals() as signals, signals.deferred():\n"
        "    for pause in (0, 0.01, 1.5):\n"
        "        time.sleep(pause)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print('goes on', flush=True)\n"
        "    time.sleep(60)\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 143 and done.stdout.count("goes on") == 2
    assert time.monotonic() - started < 50


def test_what_was_ignored_stays_ignored():
    """A run in the background of a shell, or under nohup, is not stopped by the Ctrl-C that is meant for another."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with resuming.Signals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert not signals.stopped
    finally:
        signal.signal(signal.SIGINT, former)


class SignallingDataset(torch.utils.data.Dataset):
    """Its first batch sends the worker a signal."""

    def __init__(self, number):
        self.number = number

    def __getitems__(self, positions):
        if positions[0] == 0:
            os.kill(os.getpid(), self.number)
        return torch.zeros(1, 3, 9, 9, dtype=torch.uint8), torch.tensor(positions)

    def __len__(self):
        return 4


def test_a_loader_worker_that_is_told_to_end_still_gives_its_batches():
    loader = dataset_double.make_loader(SignallingDataset(signal.SIGTERM), 1, num_workers=1)
    assert [targets.item() for _, targets in loader] == [0, 1, 2, 3]


def test_a_loader_worker_that_dies_is_said_in_one_line():
    loader = dataset_double.make_loader(SignallingDataset(signal.SIGKILL), 1, num_workers=1)
    with pytest.raises(UserError, match=r"--num_workers: a loader worker has died") as caught:
        make_engine().train_one_epoch(loader, RunningFigures(0, torch.device("cpu")))
    assert "\n" not in str(caught.value)


def test_a_log_that_takes_no_more_stops_nothing(data_dir, tmp_path, monkeypatch):
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", full)
        assert run_main("--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--run_dir", tmp_path / "run") == 0
        monkeypatch.undo()
        with pytest.raises(OSError):  # the stream has kept it
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert (tmp_path / "run" / "results.json").exists()


# ----------------------------------------------------------------------------------------------------- auto_resume


def test_the_same_command_starts_goes_on_falls_back_and_ends(data_dir, tmp_path, signal_at_visit, capsys):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--use_augmentation", "--save_every", 1]
    assert run_main(*flags, "--run_dir", tmp_path / "whole") == 0
    command = [*flags, "--auto_resume", "--run_dir", tmp_path / "run"]
    signal_at_visit(signal.SIGTERM, [3, 6, 10])
    assert run_main(*command) == 143
    assert "go on with the same command" in capsys.readouterr().err
    assert run_main(*command) == 143
    (tmp_path / "run" / LAST).write_bytes((tmp_path / "run" / LAST).read_bytes()[:-50])  # cut short
    assert run_main(*command) == 143
    err = capsys.readouterr().err
    assert "last_model.pth is damaged" in err and "going on with previous_model.pth" in err
    assert (tmp_path / "run" / DAMAGED).exists()
    os.unlink(tmp_path / "run" / "history.csv")  # written anew from the checkpoint
    assert run_main(*command) == 0
    assert differences(tmp_path / "whole", tmp_path / "run") == []
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("[!.]*")}
    assert run_main(*command) == 0
    assert "finished before: 2 epochs" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("[!.]*")} == before
    os.unlink(tmp_path / "run" / "results.json")  # killed in the test
    assert run_main(*command) == 0
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def test_auto_resume_never_starts_over_what_it_cannot_read(data_dir, tmp_path, copied_run, capsys):
    command = ["--data_dirs", data_dir, *TINY_FLAGS, "--auto_resume", "--run_dir"]
    for name in (LAST, PREVIOUS):
        os.unlink(copied_run / name)  # they are links to files of other tests
        (copied_run / name).write_bytes(b"noise")
    before = sorted(copied_run.iterdir())
    assert run_main(*command, copied_run) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ") and LAST in error and PREVIOUS in error
    assert sorted([*copied_run.iterdir()]) == before
    for name in (LAST, PREVIOUS):
        os.unlink(copied_run / name)
    assert run_main(*command, copied_run) == 2
    assert f"--resume {copied_run / BEST}" in capsys.readouterr().err
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").touch()
    assert run_main(*command, tmp_path / "home") == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert os.listdir(tmp_path / "home") == ["thesis.txt"]


def test_auto_resume_with_the_demo_draws_its_data_once(tmp_path, monkeypatch, signal_at_visit):
    monkeypatch.setattr(main.demo, "IMAGES_PER_GRADE", (8, 6, 5, 5, 5))
    signal_at_visit(signal.SIGTERM, [1])
    command = ["--demo", "--epochs", 1, "--image_size", 32, "--auto_resume", "--run_dir", tmp_path / "demo"]
    assert run_main(*command) == 143
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo" / "demo_data").rglob("*.jpg")}
    assert len(drawn) == 29
    assert run_main(*command) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "demo" / "demo_data").rglob("*.jpg")} == drawn


def test_auto_resume_wants_a_folder_and_no_checkpoint(data_dir, capsys):
    assert run_main("--data_dirs", data_dir, "--auto_resume") == 2
    assert "--auto_resume: name the run's folder with --run_dir" in capsys.readouterr().err
    assert run_main("--auto_resume", "--run_dir", "x", "--resume", "y") == 2
    assert "leave out --resume" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- best models and crashes


@pytest.mark.parametrize("position", [None, RunningFigures(1, "cpu").position()])
def test_a_best_model_ahead_of_the_checkpoint_stays_until_its_epoch_comes_again(copied_run, position):
    """As after a fall back to the checkpoint before, of the end of an epoch or its middle."""
    last, best = load_checkpoint(copied_run / LAST), load_checkpoint(copied_run / BEST)
    first_epoch = {"epoch": 0, "best_epoch": 0, "best_metric": best["best_metric"] / 2, "history": last["history"][:1]}
    former = {**last, **first_epoch, "position": position}
    ahead = {**best, "epoch": 1, "best_epoch": 1, "history": last["history"]}
    write_checkpoint(copied_run / BEST, ahead)
    expected = best["best_metric"], 1
    assert resuming.settle_best_model(former, copied_run / PREVIOUS, copied_run) == expected
    # its epoch comes again, a little worse: what it has kept is still the best, and is not written over
    again = {**last, "epoch": 1, "best_epoch": 1, "best_metric": best["best_metric"], "position": None}
    assert resuming.settle_best_model(again, copied_run / LAST, copied_run) == expected
    assert load_checkpoint(copied_run / BEST)["history"] == ahead["history"]
    write_checkpoint(copied_run / BEST, {**ahead, "history": [{**last["history"][0], "train_loss": 7.0}]})
    if position:
        with pytest.raises(UserError, match="is not the best model of"):
            resuming.settle_best_model(former, copied_run / PREVIOUS, copied_run)
    else:  # the checkpoint is its best model itself
        assert resuming.settle_best_model(former, copied_run / PREVIOUS, copied_run) == (best["best_metric"] / 2, 0)


def test_a_damaged_best_model_is_named_and_may_be_taken_away(copied_run, capsys):
    last = load_checkpoint(copied_run / LAST)
    assert last["best_epoch"] == 0
    os.unlink(copied_run / BEST)
    (copied_run / BEST).write_bytes(b"noise")
    command = ["--resume", copied_run / LAST, "--epochs", 3]
    assert run_main(*command) == 2
    assert f"{copied_run / BEST} is damaged" in capsys.readouterr().err
    os.unlink(copied_run / BEST)
    assert run_main(*command) == 0
    assert "the best of the epochs to come is kept" in capsys.readouterr().err
    assert json.loads((copied_run / "results.json").read_text())["best_epoch"] == 2


# ------------------------------------------------------------------------------------------------------- full disk


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that takes no file above 1 MB while it is full: the system's own refusal. -> a dict to set "full" in."""
    disk, real_write = {"full": False}, Keeper._write
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def write(keeper, is_best):
        if disk["full"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, former[1]))
        try:
            return real_write(keeper, is_best)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)

    monkeypatch.setattr(Keeper, "_write", write)
    monkeypatch.setattr(resuming, "RETRY_SECONDS", 0)
    return disk


def test_a_full_disk_keeps_what_is_there_trains_on_and_tries_again(data_dir, tmp_path, full_disk, monkeypatch, capsys):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--save_every", 1, "--epochs", 3, "--run_dir"]
    assert run_main(*flags, tmp_path / "whole") == 0
    real_visit, visits = Keeper.visit, []

    def visit(keeper, figures):
        visits.append((figures.epoch, figures.images))
        full_disk["full"] = 3 <= len(visits) < 8  # the best epoch ends within
        real_visit(keeper, figures)
        if full_disk["full"]:
            assert load_checkpoint(tmp_path / "run" / LAST)["position"]["images"] == 16
            assert load_checkpoint(tmp_path / "run" / PREVIOUS)["position"]["images"] == 8
            assert not list((tmp_path / "run").glob(".*.tmp"))

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "visit", visit)
        capsys.readouterr()
        assert run_main(*flags, tmp_path / "run") == 0
    warning, again = capsys.readouterr().err.strip().splitlines()
    assert warning.startswith("warning: cannot save") and "File too large" in warning and LAST in warning
    assert again == f"saved again: {tmp_path / 'run' / LAST}"
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def test_a_disk_that_is_full_to_the_end_is_an_error_and_the_run_can_go_on(
    data_dir, tmp_path, full_disk, monkeypatch, capsys
):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--save_every", 1, "--auto_resume", "--run_dir"]
    assert run_main(*flags, tmp_path / "whole") == 0
    real_visit, visits = Keeper.visit, []

    def visit(keeper, figures):
        visits.append(figures.epoch)
        full_disk["full"] = len(visits) > 2
        real_visit(keeper, figures)

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "visit", visit)
        capsys.readouterr()
        assert run_main(*flags, tmp_path / "run") == 2
    _, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ") and "File too large" in error
    full_disk["full"] = False
    assert run_main(*flags, tmp_path / "run") == 0
    assert differences(tmp_path / "whole", tmp_path / "run") == []


# --------------------------------------------------------------------------------------- damaged and hostile files


def test_any_changed_byte_is_noticed_or_does_no_harm(tmp_path, finished_run):
    small = load_checkpoint(finished_run / LAST)
    small["model_state_dict"] = {"head.weight": small["model_state_dict"]["head.weight"]}
    small["optimizer_state_dict"] = {}
    write_checkpoint(tmp_path / "whole.pth", small)
    whole = (tmp_path / "whole.pth").read_bytes()
    generator, noticed = random.Random(0), 0
    for number in range(300):
        position = generator.randrange(len(whole)) if number < 200 else len(whole) - 1 - number % 100  # the directory
        changed = bytearray(whole)
        changed[position] ^= 1 << generator.randrange(8)
        (tmp_path / "changed.pth").write_bytes(changed)
        try:
            assert same(load_checkpoint(tmp_path / "changed.pth"), small), position
        except UserError as error:
            assert "changed.pth is damaged" in str(error) or "is not a checkpoint" in str(error)
            noticed += 1
    assert noticed > 100


def test_a_checkpoint_cannot_choose_a_place_outside_its_folder_to_write_to(copied_run, tmp_path, capsys):
    last = load_checkpoint(copied_run / LAST)
    elsewhere = {"cache_dir": str(tmp_path / "cache"), "wandb_dir": str(copied_run / ".." / "wandb"), "run_dir": "/etc"}
    hostile = {**last, "args": {**last["args"], **elsewhere, "output_dir": "/etc/run", "wandb_mode": "offline"}}
    hostile["wandb_id"] = "../../escaped"
    write_checkpoint(copied_run / LAST, hostile)
    before = sorted(tmp_path.iterdir())
    assert run_main("--resume", copied_run / LAST, "--epochs", 3, "--wandb_mode", "disabled") == 0
    out = capsys.readouterr().out
    assert "--cache_dir: not" in out and "--wandb_dir: not" in out
    assert sorted(tmp_path.iterdir()) == before
    assert run_main("--resume", copied_run / LAST, "--epochs", 4, "--wandb_mode", "offline") == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: --wandb_id")
    assert sorted(tmp_path.iterdir()) == before
    inside = load_checkpoint(copied_run / LAST)
    inside["args"]["cache_dir"] = str(copied_run / "cache")
    write_checkpoint(copied_run / LAST, inside)
    assert run_main("--resume", copied_run / LAST, "--wandb_mode", "disabled") == 0
    assert (copied_run / "cache").is_dir()


ALTERATIONS = {
    "args without flags that came later": (lambda c: c["args"].pop("max_megapixels"), None),
    "a flag of another kind": (lambda c: c["args"].update(cache_dir=[]), "--cache_dir"),
    "a flag out of its bounds": (lambda c: c["args"].update(batch_size=0), "--batch_size"),
    "a choice that there is not": (lambda c: c["args"].update(train_loss="hinge"), "--train_loss"),
    "classes that are no names": (lambda c: c.update(classes=[1, 2, 3]), "'classes'"),
    "a part that is missing": (lambda c: c["splits"].pop("val"), "'splits'"),
    "sizes that are too few": (lambda c: c["file_sizes"].update(val=torch.zeros(1)), "'splits'"),
    "random state that is missing": (lambda c: c["rng_state"].clear(), "'rng_state'"),
    "weights of another network": (lambda c: c["model_state_dict"].pop("head.bias"), "does not fit"),
    "an optimizer of another network": (lambda c: c["optimizer_state_dict"].clear(), "does not fit"),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_a_checkpoint_that_was_altered_is_refused_in_one_line(name, copied_run, capsys):
    alter, wanted = ALTERATIONS[name]
    checkpoint = load_checkpoint(copied_run / LAST)
    alter(checkpoint)
    write_checkpoint(copied_run / LAST, checkpoint)
    assert run_main("--resume", copied_run / LAST) == (2 if wanted else 0)
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == (1 if wanted else 0) and all(wanted in error for error in errors)


def test_too_little_memory_is_no_damage(copied_run, monkeypatch):
    def starved(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "load", starved)
    with pytest.raises(UserError, match="too little memory") as caught:
        resuming.checkpoint_to_go_on_with(copied_run)
    assert not isinstance(caught.value, Damaged)


@pytest.fixture
def pixel_limit():
    former = Image.MAX_IMAGE_PIXELS
    yield
    Image.MAX_IMAGE_PIXELS = former


def test_images_that_claim_too_many_pixels_are_refused_by_path_before_they_are_decoded(
    tmp_path, capsys, pixel_limit, monkeypatch
):
    data = write_class_folders(tmp_path / "data")
    Image.new("1", (9000, 9000)).save(data / "0" / "bomb.png", optimize=True)
    assert (data / "0" / "bomb.png").stat().st_size < 20_000
    flags = ["--data_dirs", data, *TINY_FLAGS, "--max_megapixels", 60, "--run_dir", tmp_path / "run"]
    real_load = Image.Image.load

    def load(image):
        assert image.width < 9000, "decoded"
        return real_load(image)

    monkeypatch.setattr(Image.Image, "load", load)
    assert run_main(*flags) == 2
    err = capsys.readouterr().err
    assert "bomb.png cannot be read: it claims more than 60 million pixels" in err and "--max_megapixels" in err
    monkeypatch.undo()
    limit_image_size(100)
    assert read_image(data / "0" / "bomb.png", 32).shape == (32, 32, 3)


def test_links_that_lead_in_circles_and_pipes_end(tmp_path, capsys):
    data = write_class_folders(tmp_path / "data")
    (data / "0" / "loop").symlink_to(data / "0")
    (data / "0" / "a.png").symlink_to(data / "0" / "b.png")
    (data / "0" / "b.png").symlink_to(data / "0" / "a.png")
    os.mkfifo(data / "0" / "pipe.png")
    flags = ["--data_dirs", data, *TINY_FLAGS, "--epochs", 1, "--run_dir", tmp_path / "run"]
    assert run_main(*flags) == 2
    out = capsys.readouterr().out
    assert "pipe.png: it is no regular file" in out and "b.png: " in out
    assert run_main(*flags, "--skip_broken") == 0


# ------------------------------------------------------------------------------------------------ moved data, locks


def test_a_run_goes_on_where_its_data_lie_now(tmp_path, signal_at_visit, capsys):
    flags = ["--use_augmentation", *TINY_FLAGS]
    folders = [write_class_folders(tmp_path / name, TINY_COUNTS, seed) for seed, name in enumerate(["face", "hand"])]
    assert run_main("--data_dirs", *folders, *flags, "--run_dir", tmp_path / "whole") == 0
    signal_at_visit(signal.SIGTERM, [3])
    assert run_main("--data_dirs", *folders, *flags, "--run_dir", tmp_path / "run") == 143
    (tmp_path / "other disk").mkdir()
    moved = [shutil.move(folder, tmp_path / "other disk") for folder in folders]
    assert run_main("--resume", tmp_path / "run" / LAST) == 2
    assert "--data_dirs" in capsys.readouterr().err
    write_images(Path(moved[0]) / "0" / "more", 2)
    assert run_main("--resume", tmp_path / "run" / LAST, "--data_dirs", *moved) == 0
    assert "left out 2 images that are in no part" in capsys.readouterr().out
    assert {re.sub(":.*", "", name) for name in differences(tmp_path / "whole", tmp_path / "run")} <= {
        LAST,
        BEST,
        "splits.json",
        "val_predictions.csv",
        "test_predictions.csv",
    }  # fmt: skip: they name the new paths
    one, other = load_checkpoint(tmp_path / "whole" / LAST), load_checkpoint(tmp_path / "run" / LAST)
    assert same(one["model_state_dict"], other["model_state_dict"])
    assert run_main("--resume", tmp_path / "run" / LAST, "--eval_only") == 0
    old_best = tmp_path / "whole" / BEST  # knows the old places only
    assert run_main("--resume", old_best, "--eval_only", "--data_dirs", *moved, "--run_dir", tmp_path / "eval") == 0
    found = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert {**found, "epochs": 2} == json.loads((tmp_path / "whole" / "results.json").read_text())


def test_a_second_process_in_a_run_folder_is_told_who_the_first_is(copied_run, data_dir, tmp_path, capsys):
    holder = f"in use by process {os.getpid()} on {socket.gethostname()}"
    with locked(copied_run):
        assert run_main("--resume", copied_run / LAST, "--epochs", 3) == 2
        assert holder in capsys.readouterr().err
        assert run_main("--data_dirs", data_dir, *TINY_FLAGS, "--auto_resume", "--run_dir", copied_run) == 2
        assert holder in capsys.readouterr().err
        assert run_main("--eval_only", "--resume", copied_run / BEST) == 0  # only reads there
    assert load_checkpoint(copied_run / LAST)["epoch"] == 1


def test_a_file_system_without_locks_is_said_and_does_for_one_process(copied_run, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for _ in range(2):
        with locked(copied_run):
            assert "cannot be locked (Function not implemented)" in capsys.readouterr().err


def test_a_process_that_comes_second_to_a_new_folder_leaves_it_to_the_first(tmp_path, monkeypatch):
    @contextmanager
    def taken(folder):
        (folder / "args.json").touch()
        raise UserError("in use")
        yield

    monkeypatch.setattr(files, "locked", taken)
    with pytest.raises(UserError, match="in use"), files.new_folder(tmp_path / "run", "--run_dir"):
        pass
    assert (tmp_path / "run" / "args.json").exists()


def test_a_killed_process_leaves_no_lock_and_its_half_written_files_go(copied_run):
    script = (
        "import files, sys, time\nwith files.locked(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    command = [sys.executable, "-c", script, copied_run]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {process.pid} on"), locked(copied_run):
        pass
    process.kill()
    process.wait()
    for name in (".last_model.pth.123.tmp", ".of_another_program.tmp"):
        (copied_run / name).write_bytes(b"half")
    with locked(copied_run):
        assert [path.name for path in copied_run.glob(".*.tmp")] == [".of_another_program.tmp"]
