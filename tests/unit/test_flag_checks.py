"""Parsing a command line of main.py: contradictions, inherited flags, folders."""

import pytest

from flag_checks import parse_flags
from run.cli import UserError


@pytest.fixture
def checkpoint(tmp_path):
    """A file that stands for a checkpoint. It is not read before the flags are checked."""
    (tmp_path / "last_model.pth").touch()
    return str(tmp_path / "last_model.pth")


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return str(tmp_path / "data")


@pytest.mark.parametrize(
    "flags, message",
    {
        "--use_augmentation --sampling sqrt": "both oversample",
        "--folds 3 --fold 3": "from 0 to K - 1",
        "--drw_epoch 2 --crt_epochs 1 --epochs 3": "use up all 3 epochs",
        "--gamma -1": "argument --gamma: must be at least 0, not -1",
        "--split 0.5 0.5 0.5": r"--split: .* does not sum to 1",
        "--split 1.2 -0.1 -0.1": "at least 0 and at most 1",
        "--demo": "--demo: a run is resumed with its own images",
        "--run_dir elsewhere": "--run_dir: a run is resumed in the folder of its checkpoint",
    }.items(),
)
def test_contradictions_are_found_before_the_checkpoint_is_read(flags, message, checkpoint):
    with pytest.raises(UserError, match=message):
        parse_flags(["--resume", checkpoint, *flags.split()])


def test_a_missing_checkpoint_is_found_before_anything_is_imported(tmp_path):
    for path in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(UserError, match=f"--resume: {path} is not a file"):
            parse_flags(["--resume", str(path)])


def test_missing_folders_are_found_before_weights_are_downloaded(tmp_path, data):
    (tmp_path / "file").touch()
    for flags, message in {
        (): "name the folder that holds the class folders",
        ("--data_dirs", str(tmp_path / "nowhere")): "--data_dirs: .*nowhere does not exist",
        ("--data_dirs", data, "--test_dirs", str(tmp_path / "file")): "--test_dirs: .*file is not a folder",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_flags(flags)


def test_folds_in_one_wandb_run_are_rejected(data, monkeypatch):
    folds = ["--data_dirs", data, "--folds", "3"]
    with pytest.raises(UserError, match="each fold is a W&B run of its own"):
        parse_flags([*folds, "--wandb_id", "2x3y4z5w"])
    parse_flags([*folds, "--wandb_id", "2x3y4z5w", "--fold", "0"])
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    with pytest.raises(UserError, match="each fold is a W&B run of its own"):
        parse_flags(folds)


def test_flags_that_contradict_a_default_only_are_checked_with_those_of_the_checkpoint(checkpoint):
    command = ["--resume", checkpoint, "--drw_epoch", "1", "--train_loss", "ce"]
    parse_flags(command)
    inherited = {"use_augmentation": True, "epochs": 5}
    assert parse_flags(command, inherited, checkpoint_is_known=True).drw_epoch == 1
    with pytest.raises(UserError, match="nothing to defer"):
        parse_flags(command, {"use_augmentation": False, "epochs": 5}, checkpoint_is_known=True)


def test_explicit_flags_win_over_inherited_ones(checkpoint):
    inherited = {"gamma": 3.0, "beta": 0.9, "data_dirs": ["data"]}
    args = parse_flags(["--resume", checkpoint, "--gamma", "1"], inherited, checkpoint_is_known=True)
    assert (args.gamma, args.beta) == (1.0, 0.9)


def test_folders_become_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        (tmp_path / name).mkdir()
    args = parse_flags(["--data_dirs", "a", "b", "--test_dirs", "c", "--cache_dir", "cache"])
    assert args.data_dirs == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert (args.test_dirs, args.cache_dir) == ([str(tmp_path / "c")], str(tmp_path / "cache"))


def test_a_trial_of_a_sweep_resumes_in_a_folder_of_its_own(data, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "2x3y4z5w")
    args = parse_flags(["--data_dirs", data])
    assert args.auto_resume and args.run_dir == "checkpoints_2x3y4z5w"
    assert not parse_flags(["--data_dirs", data, "--run_dir", "mine"]).auto_resume


@pytest.mark.parametrize("shares", ["0.6 0.2 0.1", "0.5 0.6 -0.1", "0.8 0.2 0.0"])
def test_shares_that_do_not_make_a_split_are_rejected(shares, data):
    with pytest.raises(UserError, match="--split"):
        parse_flags(["--data_dirs", data, "--split", *shares.split()])
    parse_flags(["--data_dirs", data, "--split", "0.8", "0.2", "0.0", "--test_dirs", data])


def test_an_existing_run_folder_is_refused_at_once(data, tmp_path):
    with pytest.raises(UserError, match=f"--run_dir: {tmp_path} already exists"):
        parse_flags(["--data_dirs", data, "--run_dir", str(tmp_path)])
    parse_flags(["--data_dirs", data, "--run_dir", str(tmp_path), "--auto_resume"])
    parse_flags(["--data_dirs", data, "--run_dir", str(tmp_path / "new")])
