"""Which checkpoint a run resumes from."""

import pytest
import torch
from helpers import write_checkpoint

import resume
from engine import RunningMetrics
from flag_checks import parse_flags
from images.decode import DECODER_VERSION
from model import load_checkpoint
from run.cli import Damaged, UserError
from run.saver import BEST, LAST, PREVIOUS


@pytest.mark.parametrize("position", [None, RunningMetrics(1, "cpu").epoch_state()])
def test_a_best_model_newer_than_the_checkpoint_is_kept_until_its_epoch_is_repeated(copied_run, position):
    """As after falling back to the previous checkpoint, saved at the end of an epoch or within it."""
    last, best = load_checkpoint(copied_run / LAST), load_checkpoint(copied_run / BEST)
    first_epoch = {"epoch": 0, "best_epoch": 0, "best_metric": best["best_metric"] / 2, "history": last["history"][:1]}
    previous = {**last, **first_epoch, "position": position}
    newer_best = {**best, "epoch": 1, "best_epoch": 1, "history": last["history"]}
    write_checkpoint(copied_run / BEST, newer_best)
    expected = best["best_metric"], 1
    assert resume.reconcile_best_model(previous, copied_run / PREVIOUS, copied_run) == expected
    # the repeated epoch is slightly worse: the stored model is still the best and is not overwritten
    repeated = {**last, "epoch": 1, "best_epoch": 1, "best_metric": best["best_metric"], "position": None}
    assert resume.reconcile_best_model(repeated, copied_run / LAST, copied_run) == expected
    assert load_checkpoint(copied_run / BEST)["history"] == newer_best["history"]
    write_checkpoint(copied_run / BEST, {**newer_best, "history": [{**last["history"][0], "train_loss": 7.0}]})
    if position:
        with pytest.raises(UserError, match="is not the best model of"):
            resume.reconcile_best_model(previous, copied_run / PREVIOUS, copied_run)
    else:  # the checkpoint itself is the best model
        assert resume.reconcile_best_model(previous, copied_run / PREVIOUS, copied_run) == (best["best_metric"] / 2, 0)


def test_running_out_of_memory_is_not_reported_as_damage(copied_run, monkeypatch):
    def out_of_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch, "load", out_of_memory)
    with pytest.raises(UserError, match="too little memory") as caught:
        resume.find_checkpoint(copied_run)
    assert not isinstance(caught.value, Damaged)


def test_resuming_reads_the_checkpoint_once(copied_run, monkeypatch):
    loaded = []

    def counted_load(path, *rest):
        loaded.append(path)
        return load_checkpoint(path, *rest)

    monkeypatch.setattr(resume, "load_checkpoint", counted_load)
    command = ["--resume", str(copied_run / LAST), "--epochs", "3"]
    with resume.open_run(parse_flags(command), command) as (args, checkpoint):
        assert (args.epochs, args.use_augmentation, checkpoint["epoch"]) == (3, True, 1)
    assert loaded == [str(copied_run / LAST)]


def test_a_checkpoint_that_changed_before_its_folder_was_locked_is_reread(copied_run, monkeypatch):
    last = load_checkpoint(copied_run / LAST)

    def load_before_another_save(path, *rest):
        checkpoint = load_checkpoint(path, *rest)
        if checkpoint["epoch"] == 1:  # another process saves before this one holds the lock
            write_checkpoint(copied_run / LAST, {**last, "epoch": 2})
        return checkpoint

    monkeypatch.setattr(resume, "load_checkpoint", load_before_another_save)
    command = ["--resume", str(copied_run / LAST), "--epochs", "4"]
    with resume.open_run(parse_flags(command), command) as (_, checkpoint):
        assert checkpoint["epoch"] == 2


@pytest.mark.parametrize("eval_only", [False, True])
def test_another_version_of_the_decoder_is_a_warning(copied_run, capsys, eval_only):
    last = load_checkpoint(copied_run / LAST)
    assert last["decoder_version"] == DECODER_VERSION
    command = ["--resume", str(copied_run / LAST), "--epochs", "3", *["--eval_only"] * eval_only]
    older = {name: value for name, value in last.items() if name != "decoder_version"}  # as before there was a version
    for checkpoint, version in ((last, None), ({**last, "decoder_version": 99}, 99), (older, 1)):
        (copied_run / LAST).unlink()
        torch.save(checkpoint, copied_run / LAST)
        with resume.open_run(parse_flags(command), command):
            warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
        assert len(warnings) == (version is not None)
        assert all(f"decoded by version {version}" in line and str(copied_run / LAST) in line for line in warnings)


def test_resize_is_inherited_and_that_of_older_checkpoints_is_stretch(copied_run):
    last, command = load_checkpoint(copied_run / LAST), ["--resume", str(copied_run / LAST), "--epochs", "3"]
    flags = {name: value for name, value in last["args"].items() if name != "resize"}
    for trained, expected in (({**flags, "resize": "pad"}, "pad"), (flags, "stretch")):
        (copied_run / LAST).unlink()
        write_checkpoint(copied_run / LAST, {**last, "args": trained})
        with resume.open_run(parse_flags(command), command) as (args, _):
            assert args.resize == expected


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("changed", [["--optimizer", "muon"], ["--zero_init"], ["--weights", "resnet50.pth"]])
def test_what_a_training_started_with_cannot_change_when_it_is_resumed(copied_run, changed, known):
    """Also if the checkpoint is from before there was a choice."""
    checkpoint, name = load_checkpoint(copied_run / LAST), changed[0].removeprefix("--")
    usual = checkpoint["args"][name]
    if not known:
        del checkpoint["args"][name]
    write_checkpoint(copied_run / LAST, checkpoint)
    command = ["--resume", str(copied_run / LAST)]
    with (
        pytest.raises(UserError, match=f"{changed[0]}: cannot change"),
        resume.open_run(parse_flags([*command, *changed]), [*command, *changed]),
    ):
        pass
    with resume.open_run(parse_flags(command), command) as (args, _):
        assert getattr(args, name) == usual
