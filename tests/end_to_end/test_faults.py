"""Nothing is lost: stopped runs, full disks, damaged or malicious files, moved data, two processes at once."""

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
from pathlib import Path

import pytest
import torch
from helpers import (
    PATIENCE,
    ROOT,
    TINY_COUNTS,
    TINY_FLAGS,
    differences,
    run_main,
    same,
    start_main,
    wait_for,
    write_checkpoint,
    write_class_folders,
    write_images,
)
from PIL import Image

import dataset_double
import images.demo
import run.folder
import run.saver
import study.folds
from images.decode import limit_image_size, read_image
from model import load_checkpoint
from run.cli import UserError
from run.folder import locked
from run.saver import BEST, DAMAGED, LAST, PREVIOUS, Saver
from run.signals import Stopped

pytestmark = pytest.mark.usefixtures("thin_network")
LONG_EPOCHS = ["--epochs", "500", "--target_samples_per_class", "2000", "--use_augmentation"]


@pytest.fixture
def signal_after_step(monkeypatch):
    """Send a signal after some steps. -> function of (signal number, steps counted over all runs of the test)"""
    num_calls, real_after_step = [0], Saver.after_step

    def set_signal(number, steps):
        def after_step(saver, running_metrics):
            num_calls[0] += 1
            if num_calls[0] in steps:
                signal.raise_signal(number)
            real_after_step(saver, running_metrics)

        monkeypatch.setattr(Saver, "after_step", after_step)

    return set_signal


# ---------------------------------------------------------------------------------------------------- exact resume

KINDS_OF_RUN = {
    "float32": "",
    "bfloat16, augmented, accumulated, workers": "--amp bf16 --use_augmentation --grad_accum 2 --num_workers 2",
    "float16": "--amp fp16 --grad_accum 2 --epochs 1",  # slow on most CPUs
    "deferred, mixed, averaged, cosine head": "--epochs 3 --drw_epoch 1 --crt_epochs 1 --train_loss ldam "
    "--sampling progressive --mixup 0.4 --cutmix 1 --ema 0.9 --augment_all",
    "float32, augmented, progressive": "--use_augmentation --progressive --train_loss focal",
}


@pytest.mark.parametrize("kind", KINDS_OF_RUN)
def test_a_run_stopped_after_every_step_equals_an_uninterrupted_run(kind, data_dir, tmp_path, monkeypatch):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--amp", "off", *KINDS_OF_RUN[kind].split(), "--run_dir"]
    assert run_main(*flags, tmp_path / "uninterrupted") == 0
    real_after_step = Saver.after_step

    def stop_after_step(saver, running_metrics):  # after every step, and once after every batch of validation
        position = running_metrics.epoch, running_metrics.images, running_metrics.steps
        if position not in stopped_at or running_metrics.steps:
            signal.raise_signal(signal.SIGTERM)
        stopped_at.add(position)
        real_after_step(saver, running_metrics)

    stopped_at, num_stops = set(), 0
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "after_step", stop_after_step)
        command = [*flags, tmp_path / "stopped"]
        while (status := run_main(*command)) == 143:
            num_stops += 1
            command = ["--resume", tmp_path / "stopped" / LAST]
    assert status == 0
    epochs = 1 if kind == "float16" else 2
    assert num_stops >= epochs * (2 if "grad_accum" in KINDS_OF_RUN[kind] else 3) + epochs
    assert differences(tmp_path / "uninterrupted", tmp_path / "stopped") == []


def test_resuming_within_an_epoch_does_not_reload_images(data_dir, tmp_path, signal_after_step, monkeypatch):
    loaded, real_read = [], dataset_double.DoubleSkinDataset.read

    def read(dataset, i):
        loaded.append(dataset.index.paths[i])
        return real_read(dataset, i)

    monkeypatch.setattr(dataset_double.DoubleSkinDataset, "read", read)
    signal_after_step(signal.SIGINT, [2])
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--run_dir", tmp_path / "run"]
    assert run_main(*flags) == 130
    before_stop, position = list(loaded), load_checkpoint(tmp_path / "run" / LAST)["position"]
    assert position["images"] == len(before_stop) == 16
    loaded.clear()
    assert run_main("--resume", tmp_path / "run" / LAST) == 0
    train = json.loads((tmp_path / "run" / "splits.json").read_text())["train"]
    assert sorted(before_stop + loaded[: len(train) - len(before_stop)]) == sorted(train)


def test_save_every_saves_within_the_epoch_and_keeps_the_previous_checkpoint(data_dir, tmp_path, monkeypatch):
    saved, real_save = [], run.saver.write_bytes

    def save(path, *rest, **options):
        saved.append(path.name)
        real_save(path, *rest, **options)

    monkeypatch.setattr(run.saver, "write_bytes", save)
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--save_every", 2, "--run_dir", tmp_path / "run"]
    assert run_main(*flags) == 0
    assert saved == [LAST, LAST, BEST]  # after step 2 of 3, and at the end of the epoch
    previous, last = load_checkpoint(tmp_path / "run" / PREVIOUS), load_checkpoint(tmp_path / "run" / LAST)
    assert (previous["epoch"], previous["position"]["images"]) == (-1, 16)
    assert (last["epoch"], last["position"]) == (0, None)
    saved.clear()
    flags[-1] = tmp_path / "by_time"
    assert run_main(*flags, "--save_every", 0, "--save_minutes", 1e-6) == 0
    assert saved[:4] == [LAST] * 4  # after each step, and after a batch of validation


def test_an_epoch_starts_over_if_its_order_changes(data_dir, tmp_path, signal_after_step, capsys):
    signal_after_step(signal.SIGTERM, [2])
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--run_dir", tmp_path / "run"]
    assert run_main(*flags) == 143
    assert run_main("--resume", tmp_path / "run" / LAST, "--seed", 7) == 0
    assert "epoch 0 restarts from its first image" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run" / LAST)["scheduler_state_dict"]["last_epoch"] == 3


# --------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_process_group_saves_and_prints_how_to_resume(tmp_path, data_dir, number, status):
    """Loader workers receive it too, as from a terminal or a job queue. SIGUSR1 only saves.

    Standard output is closed before the signal, as when `| tee` ends at the same Ctrl-C.
    """
    last = tmp_path / "a run" / LAST
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, *LONG_EPOCHS, "--num_workers", 2, "--run_dir", last.parent]
    process = start_main(*flags, "--save_minutes", 0, start_new_session=True)
    wait_for(lambda: "training on" in process.stdout.readline())
    os.killpg(process.pid, signal.SIGUSR1)
    wait_for(last.exists)
    saved_images = load_checkpoint(last)["position"]["images"]
    process.stdout.close()
    os.killpg(process.pid, number)
    err = process.stderr.read()
    process.wait(timeout=PATIENCE)
    assert process.returncode == status
    assert err.strip() == f"stopped; resume with: python main.py --resume '{last}'"
    checkpoint = load_checkpoint(last)
    assert checkpoint["epoch"] == -1 and 0 < saved_images < checkpoint["position"]["images"]
    assert load_checkpoint(last.with_name(PREVIOUS))["position"]["images"] == saved_images


def test_a_log_that_cannot_be_written_does_not_stop_the_run(data_dir, tmp_path, monkeypatch):
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", full)
        assert run_main("--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--run_dir", tmp_path / "run") == 0
        monkeypatch.undo()
        with pytest.raises(OSError):  # the stream still buffers the output
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert (tmp_path / "run" / "results.json").exists()


# ----------------------------------------------------------------------------------------------------- auto_resume


def test_auto_resume_starts_resumes_falls_back_and_finishes_with_one_command(
    data_dir, tmp_path, signal_after_step, capsys
):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--use_augmentation", "--save_every", 1]
    assert run_main(*flags, "--run_dir", tmp_path / "uninterrupted") == 0
    command = [*flags, "--auto_resume", "--run_dir", tmp_path / "run"]
    signal_after_step(signal.SIGTERM, [3, 6, 10])
    assert run_main(*command) == 143
    assert "resume with the same command" in capsys.readouterr().err
    assert run_main(*command) == 143
    (tmp_path / "run" / LAST).write_bytes((tmp_path / "run" / LAST).read_bytes()[:-50])  # truncated
    assert run_main(*command) == 143
    err = capsys.readouterr().err
    assert "last_model.pth is damaged" in err and "resuming from previous_model.pth" in err
    assert (tmp_path / "run" / DAMAGED).exists()
    os.unlink(tmp_path / "run" / "history.csv")  # rewritten from the checkpoint
    assert run_main(*command) == 0
    assert differences(tmp_path / "uninterrupted", tmp_path / "run") == []
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("[!.]*")}
    assert run_main(*command) == 0
    assert "already finished: 2 epochs" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("[!.]*")} == before
    os.unlink(tmp_path / "run" / "results.json")  # as if killed during the final test
    assert run_main(*command) == 0
    assert differences(tmp_path / "uninterrupted", tmp_path / "run") == []


def test_auto_resume_never_starts_over_in_a_folder_it_cannot_read(data_dir, tmp_path, copied_run, capsys):
    command = ["--data_dirs", data_dir, *TINY_FLAGS, "--auto_resume", "--run_dir"]
    for name in (LAST, PREVIOUS):
        os.unlink(copied_run / name)  # they are hard links to files that other tests use
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


def test_auto_resume_with_the_demo_creates_its_data_once(tmp_path, monkeypatch, signal_after_step):
    monkeypatch.setattr(images.demo, "IMAGES_PER_GRADE", (8, 6, 5, 5, 5))
    signal_after_step(signal.SIGTERM, [1])
    command = ["--demo", "--epochs", 1, "--image_size", 32, "--auto_resume", "--run_dir", tmp_path / "demo"]
    assert run_main(*command) == 143
    modified = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo" / "demo_data").rglob("*.jpg")}
    assert len(modified) == 29
    assert run_main(*command) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "demo" / "demo_data").rglob("*.jpg")} == modified


def test_auto_resume_requires_run_dir_and_excludes_resume(data_dir, capsys):
    assert run_main("--data_dirs", data_dir, "--auto_resume") == 2
    assert "--auto_resume: name the run folder with --run_dir" in capsys.readouterr().err
    assert run_main("--auto_resume", "--run_dir", "x", "--resume", "y") == 2
    assert "omit --resume" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- damaged best model


def test_a_damaged_best_model_is_named_and_can_be_deleted(copied_run, capsys):
    write_checkpoint(copied_run / LAST, {**load_checkpoint(copied_run / LAST), "best_epoch": 0, "best_metric": 0.1})
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
    """A disk that refuses files above 1 MB while full, by a limit of the system. -> dict whose "full" can be set"""
    disk, real_write = {"full": False}, Saver._write
    previous_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def write(saver, *args, **options):
        if disk["full"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, previous_limit[1]))
        try:
            return real_write(saver, *args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, previous_limit)

    monkeypatch.setattr(Saver, "_write", write)
    monkeypatch.setattr(run.saver, "RETRY_SECONDS", 0)
    return disk


def test_on_a_full_disk_training_continues_and_saving_is_retried(data_dir, tmp_path, full_disk, monkeypatch, capsys):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--save_every", 1, "--epochs", 3, "--run_dir"]
    assert run_main(*flags, tmp_path / "uninterrupted") == 0
    real_after_step, positions = Saver.after_step, []

    def after_step(saver, running_metrics):
        positions.append((running_metrics.epoch, running_metrics.images))
        full_disk["full"] = 3 <= len(positions) < 8  # the best epoch ends in this time
        real_after_step(saver, running_metrics)
        saver.wait()
        if full_disk["full"]:
            assert load_checkpoint(tmp_path / "run" / LAST)["position"]["images"] == 16
            assert load_checkpoint(tmp_path / "run" / PREVIOUS)["position"]["images"] == 8
            assert not list((tmp_path / "run").glob(".*.tmp"))

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "after_step", after_step)
        capsys.readouterr()
        assert run_main(*flags, tmp_path / "run") == 0
    warning, recovery = capsys.readouterr().err.strip().splitlines()
    assert warning.startswith("warning: cannot save") and "File too large" in warning and LAST in warning
    assert recovery == f"saved again: {tmp_path / 'run' / LAST}"
    assert differences(tmp_path / "uninterrupted", tmp_path / "run") == []


def test_a_plot_that_cannot_be_written_costs_no_results(data_dir, tmp_path, capsys):
    run = tmp_path / "run"
    for name in ("curves.png", "confusion_matrix.png"):
        (run / name).mkdir(parents=True)
    (run / "args.json").touch()
    assert run_main("--data_dirs", data_dir, *TINY_FLAGS, "--run_dir", run, "--auto_resume") == 0
    out = capsys.readouterr().out
    assert "warning: no curves.png (" in out and "warning: no confusion_matrix.png (" in out
    assert (run / "results.json").exists() and (run / "report.html").exists()


def test_a_disk_that_stays_full_is_an_error_and_the_run_can_be_resumed(
    data_dir, tmp_path, full_disk, monkeypatch, capsys
):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--save_every", 1, "--auto_resume", "--run_dir"]
    assert run_main(*flags, tmp_path / "uninterrupted") == 0
    real_after_step, epochs = Saver.after_step, []

    def after_step(saver, running_metrics):
        epochs.append(running_metrics.epoch)
        full_disk["full"] = len(epochs) > 2
        real_after_step(saver, running_metrics)
        saver.wait()

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "after_step", after_step)
        capsys.readouterr()
        assert run_main(*flags, tmp_path / "run") == 2
    _, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ") and "File too large" in error
    full_disk["full"] = False
    assert run_main(*flags, tmp_path / "run") == 0
    assert differences(tmp_path / "uninterrupted", tmp_path / "run") == []


# ------------------------------------------------------------------------------------- damaged and malicious files


def test_any_flipped_bit_is_detected_or_harmless(tmp_path, finished_run):
    small = load_checkpoint(finished_run / LAST)
    small["model_state_dict"] = {"head.weight": small["model_state_dict"]["head.weight"]}
    small["optimizer_state_dict"] = {}
    write_checkpoint(tmp_path / "intact.pth", small)
    intact = (tmp_path / "intact.pth").read_bytes()
    generator, num_detected = random.Random(0), 0
    for number in range(300):
        position = generator.randrange(len(intact)) if number < 200 else len(intact) - 1 - number % 100  # ZIP index
        changed = bytearray(intact)
        changed[position] ^= 1 << generator.randrange(8)
        (tmp_path / "changed.pth").write_bytes(changed)
        try:
            assert same(load_checkpoint(tmp_path / "changed.pth"), small), position
        except UserError as error:
            assert "changed.pth is damaged" in str(error) or "is not a checkpoint" in str(error)
            num_detected += 1
    assert num_detected > 100


def test_a_checkpoint_cannot_make_a_run_write_outside_its_folder(copied_run, tmp_path, capsys):
    last = load_checkpoint(copied_run / LAST)
    outside = {"cache_dir": str(tmp_path / "cache"), "wandb_dir": str(copied_run / ".." / "wandb"), "run_dir": "/etc"}
    malicious = {**last, "args": {**last["args"], **outside, "output_dir": "/etc/run", "wandb_mode": "offline"}}
    malicious["wandb_id"] = "../../escaped"
    write_checkpoint(copied_run / LAST, malicious)
    before = sorted(tmp_path.iterdir())
    assert run_main("--resume", copied_run / LAST, "--epochs", 3, "--wandb_mode", "disabled") == 0
    out = capsys.readouterr().out
    assert "of the checkpoint is not used" in out and "--cache_dir: " in out and "--wandb_dir: " in out
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
    "args without a newer flag": (lambda c: c["args"].pop("max_megapixels"), None),
    "a flag of the wrong type": (lambda c: c["args"].update(cache_dir=[]), "--cache_dir"),
    "a flag out of range": (lambda c: c["args"].update(batch_size=0), "--batch_size"),
    "an unknown choice": (lambda c: c["args"].update(train_loss="hinge"), "--train_loss"),
    "class names that are not strings": (lambda c: c.update(classes=[1, 2, 3]), "'classes'"),
    "a missing split": (lambda c: c["splits"].pop("val"), "'splits'"),
    "too few file sizes": (lambda c: c["file_sizes"].update(val=torch.zeros(1)), "'splits'"),
    "a missing random state": (lambda c: c["rng_state"].clear(), "'rng_state'"),
    "weights of another network": (lambda c: c["model_state_dict"].pop("head.bias"), "does not fit"),
    "an optimizer of another network": (lambda c: c["optimizer_state_dict"].clear(), "does not fit"),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_an_altered_checkpoint_is_one_error_line_and_an_older_one_resumes(name, copied_run, capsys):
    alter, expected = ALTERATIONS[name]
    checkpoint = load_checkpoint(copied_run / LAST)
    alter(checkpoint)
    write_checkpoint(copied_run / LAST, checkpoint)
    assert run_main("--resume", copied_run / LAST) == (2 if expected else 0)
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == (1 if expected else 0) and all(expected in error for error in errors)


@pytest.fixture
def pixel_limit():
    previous = Image.MAX_IMAGE_PIXELS
    yield
    Image.MAX_IMAGE_PIXELS = previous


def test_images_with_too_many_pixels_are_refused_before_decoding(tmp_path, capsys, pixel_limit, monkeypatch):
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
    assert "bomb.png cannot be read: larger than 60 megapixels" in err and "--max_megapixels" in err
    monkeypatch.undo()
    limit_image_size(100)
    assert read_image(data / "0" / "bomb.png", 32).shape == (32, 32, 3)


def test_circular_links_and_pipes_are_refused_without_hanging(tmp_path, capsys):
    data = write_class_folders(tmp_path / "data")
    (data / "0" / "loop").symlink_to(data / "0")
    (data / "0" / "a.png").symlink_to(data / "0" / "b.png")
    (data / "0" / "b.png").symlink_to(data / "0" / "a.png")
    os.mkfifo(data / "0" / "pipe.png")
    flags = ["--data_dirs", data, *TINY_FLAGS, "--epochs", 1, "--run_dir", tmp_path / "run"]
    assert run_main(*flags) == 2
    out = capsys.readouterr().out
    assert "pipe.png: not a regular file" in out and "b.png: " in out
    assert run_main(*flags, "--skip_broken") == 0


# ------------------------------------------------------------------------------------------------ moved data, locks


def test_a_run_resumes_after_its_data_moved(tmp_path, signal_after_step, capsys):
    flags = ["--use_augmentation", *TINY_FLAGS]
    folders = [write_class_folders(tmp_path / name, TINY_COUNTS, seed) for seed, name in enumerate(["face", "hand"])]
    assert run_main("--data_dirs", *folders, *flags, "--run_dir", tmp_path / "uninterrupted") == 0
    signal_after_step(signal.SIGTERM, [3])
    assert run_main("--data_dirs", *folders, *flags, "--run_dir", tmp_path / "run") == 143
    (tmp_path / "other disk").mkdir()
    moved = [shutil.move(folder, tmp_path / "other disk") for folder in folders]
    assert run_main("--resume", tmp_path / "run" / LAST) == 2
    assert "--data_dirs" in capsys.readouterr().err
    write_images(Path(moved[0]) / "0" / "more", 2)
    assert run_main("--resume", tmp_path / "run" / LAST, "--data_dirs", *moved) == 0
    assert "left out 2 images that are in no split" in capsys.readouterr().out
    assert {re.sub(":.*", "", name) for name in differences(tmp_path / "uninterrupted", tmp_path / "run")} <= {
        LAST,
        BEST,
        "splits.json",
        "val_predictions.csv",
        "test_predictions.csv",
    }  # fmt: skip: these contain the new paths
    left, right = load_checkpoint(tmp_path / "uninterrupted" / LAST), load_checkpoint(tmp_path / "run" / LAST)
    assert same(left["model_state_dict"], right["model_state_dict"])
    assert run_main("--resume", tmp_path / "run" / LAST, "--eval_only") == 0
    old_best = tmp_path / "uninterrupted" / BEST  # contains the old paths only
    assert run_main("--resume", old_best, "--eval_only", "--data_dirs", *moved, "--run_dir", tmp_path / "eval") == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert {**results, "epochs": 2} == json.loads((tmp_path / "uninterrupted" / "results.json").read_text())


def test_a_second_process_in_a_run_folder_is_refused_and_the_first_is_named(copied_run, data_dir, tmp_path, capsys):
    holder = f"in use by process {os.getpid()} on {socket.gethostname()}"
    with locked(copied_run):
        assert run_main("--resume", copied_run / LAST, "--epochs", 3) == 2
        assert holder in capsys.readouterr().err
        assert run_main("--data_dirs", data_dir, *TINY_FLAGS, "--auto_resume", "--run_dir", copied_run) == 2
        assert holder in capsys.readouterr().err
        assert run_main("--eval_only", "--resume", copied_run / BEST) == 0  # only reads the folder
    assert load_checkpoint(copied_run / LAST)["epoch"] == 1


# ------------------------------------------------------------------------------------------------- refused commands


def test_a_cross_validation_does_not_start_in_the_folder_of_a_run(copied_run, data_dir, capsys):
    before = sorted(copied_run.iterdir())
    assert run_main("--data_dirs", data_dir, *TINY_FLAGS, "--folds", 2, "--auto_resume", "--run_dir", copied_run) == 2
    assert f"--folds: {copied_run} is the folder of a single run" in capsys.readouterr().err
    assert sorted(copied_run.iterdir()) == before


def test_a_stop_in_the_summary_of_a_cross_validation_prints_the_command_that_resumes_it(
    data_dir, tmp_path, monkeypatch, capsys
):
    def stopped(*_):
        raise Stopped(signal.SIGTERM)

    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--folds", 2, "--split", 0.8, 0.2, 0]
    with monkeypatch.context() as patch:
        patch.setattr(study.folds, "pooled_metrics", stopped)
        assert run_main(*flags, "--output_dir", tmp_path / "cv") == 143
    (folder,) = tmp_path.glob("cv_*")
    assert f"--run_dir {folder} --auto_resume" in capsys.readouterr().err
    assert run_main(*flags, "--run_dir", folder, "--auto_resume") == 0 and (folder / "folds.json").exists()


def test_a_refused_command_leaves_no_lock_file(tmp_path, data_dir, capsys):
    (tmp_path / "empty").mkdir()
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--train_loss", "focal", "--alpha", 1, 2]
    assert run_main(*flags, "--auto_resume", "--run_dir", tmp_path / "empty") == 2
    assert "--alpha" in capsys.readouterr().err and not list((tmp_path / "empty").iterdir())


def test_a_signal_while_torch_is_imported_is_a_normal_stop(data_dir, tmp_path):
    script = (
        "import os, signal, sys\n"
        "class SignalAtImport:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch._C':\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, SignalAtImport())\n"
        "import main\n"
        "sys.exit(main.main())"
    )
    flags = ["--data_dirs", str(data_dir), *TINY_FLAGS, "--run_dir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", script, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 143 and done.stderr.strip() == "stopped" and not (tmp_path / "run").exists()
