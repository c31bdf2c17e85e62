"""Parsing a command line of main.py: contradictions, inherited flags, folders."""

import json
import os
from types import SimpleNamespace

import pytest

from flag_checks import check_inherited, parse_flags, with_config
from flags import FROM_SCRATCH, RECIPES
from run import ranks
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
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="each fold is a W&B run of its own"):
            patch.setenv(name, "2x3y4z5w")
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


@pytest.mark.parametrize("flags", ["--eval_only", "--epochs 5"])
def test_a_resumed_run_keeps_the_batch_size_that_it_found(flags, checkpoint):
    command = ["--resume", checkpoint, "--batch_size", "auto", *flags.split()]
    inherited = {"batch_size": 128, "learning_rate": 2e-4}
    args = parse_flags(command, inherited, checkpoint_is_known=True)
    assert (args.batch_size, args.learning_rate) == (128, 2e-4)
    args = parse_flags([*command, "--lr", "1e-3"], inherited, checkpoint_is_known=True)  # that of 32 images
    assert (args.batch_size, args.learning_rate) == (128, 2e-3)
    with pytest.raises(UserError, match=r"last_model.pth has been altered: its --batch_size is 'auto'"):
        check_inherited({"batch_size": "auto"}, checkpoint)
    with pytest.raises(UserError, match="--batch_size: invalid int or auto value: 'AUTO'"):
        parse_flags(["--batch_size", "AUTO"])


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


def test_an_existing_output_dir_holds_the_runs_but_the_default_does_not(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    common = ["--data_dirs", data]
    assert parse_flags(common).output_dir == "checkpoints"
    assert parse_flags([*common, "--output_dir", "checkpoints"]).output_dir == "checkpoints/"
    assert parse_flags([*common, "--output_dir", "runs"]).output_dir == "runs"
    assert parse_flags([*common, "--output_dir", "runs/"]).output_dir == "runs/"
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "2x3y4z5w")
    assert parse_flags([*common, "--output_dir", "runs/"]).run_dir == "runs/2x3y4z5w"


# ------------------------------------------------------------------------------------------------------- --config


@pytest.fixture
def write_config(tmp_path):
    def write(text, name="base.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return ["--config", str(path)]

    return write


def test_the_command_line_wins_over_the_config_and_that_over_the_checkpoint(data, checkpoint, write_config):
    config = write_config(f"data_dirs: [{data}]\nimage-size: 64\nlr: 1e-3\npretrained: false\namp: off\nalpha: 2\n")
    args = parse_flags(["--gamma", "1", *config, "--lr=0.1", "--no-cache"])
    assert (args.data_dirs, args.image_size, args.learning_rate, args.gamma) == ([data], 64, 0.1, 1.0)
    assert (args.pretrained, args.amp, args.alpha, args.no_cache) == (False, "off", [2.0], True)
    inherited = {"image_size": 32, "beta": 0.9}
    args = parse_flags(["--resume", checkpoint, *config], inherited, checkpoint_is_known=True)
    assert (args.image_size, args.beta) == (64, 0.9)


def test_args_json_of_a_run_is_a_config_but_for_what_concerns_only_that_run(data, tmp_path, write_config):
    (tmp_path / "checkpoints").mkdir()
    trained = vars(parse_flags(["--data_dirs", data, "--gamma", "1", "--augmentation_methods", "rotation", "shift"]))
    own = {"run_dir": "old", "resume": "old/last_model.pth", "auto_resume": True, "demo": True, "wandb_id": "2x3y4z5w"}
    config = write_config(json.dumps({**trained, **own}), "args.json")
    assert vars(parse_flags(config)) == trained
    assert parse_flags([*config, "--output_dir", "runs/"]).output_dir == "runs/"


def test_splits_beside_the_data_of_a_config_give_way_to_other_data(tmp_path, write_config):
    for name in ("a/train", "a/val", "a/test", "b/train", "b/val", "b/test", "c"):
        (tmp_path / name / "0").mkdir(parents=True)
    trained = vars(parse_flags(["--data_dirs", str(tmp_path / "a")]))
    assert trained["val_dirs"] == [str(tmp_path / "a" / "val")]
    config = write_config(json.dumps(trained), "args.json")
    assert parse_flags(config).val_dirs == trained["val_dirs"]
    args = parse_flags([*config, "--data_dirs", str(tmp_path / "b")])
    assert (args.val_dirs, args.test_dirs) == ([str(tmp_path / "b" / "val")], [str(tmp_path / "b" / "test")])
    args = parse_flags([*config, "--data_dirs", str(tmp_path / "c")])
    assert (args.val_dirs, args.test_dirs) == (None, None)
    args = parse_flags([*config, "--data_dirs", str(tmp_path / "a" / "train")])
    assert args.val_dirs == trained["val_dirs"]
    own = [str(tmp_path / "a" / "clinic")]  # beside the data, but no split of them
    os.mkdir(own[0])
    config = write_config(json.dumps({**trained, "test_dirs": own}), "args.json")
    args = parse_flags([*config, "--data_dirs", str(tmp_path / "b" / "train")])
    assert (args.val_dirs, args.test_dirs) == (None, own)


@pytest.mark.parametrize(
    "text, message",
    {
        "gama: 1": "gama: main.py has no such flag",
        "help: true": "help: main.py has no such flag",
        "gamma: -1": "argument --gamma: must be at least 0, not -1",
        "gamma: [1, 2]": "unrecognized arguments: 2",
        "data_dirs: {a: b}": "data_dirs: expected a value or a list of values, not {'a': 'b'}",
        "- gamma": "expected a mapping of flags to values",
        "gamma: 1\ngamma: 2": "gamma is listed twice",
        "": "expected a mapping",
    }.items(),
)
def test_a_mistake_in_a_config_is_named_with_the_file(text, message, write_config):
    flag, path = write_config(text)
    with pytest.raises(UserError, match="--config: ") as error:
        parse_flags([flag, path])
    assert path in str(error.value) and message in str(error.value)


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=f"--config: {tmp_path}/gone.yaml cannot be read"):
        parse_flags(["--config", f"{tmp_path}/gone.yaml"])
    with pytest.raises(UserError, match="argument --config: expected one argument"):
        parse_flags(["--config"])


def test_programs_that_start_runs_pass_over_more(write_config):
    config = write_config("gamma: 1\nfolds: 3\nrun_dir: old\n")
    assert with_config(["--beta", "0.9", *config], ignored={"folds"}) == ["--gamma=1", "--beta", "0.9"]


def test_a_batch_that_cannot_be_divided_among_processes_is_refused(data_dir, monkeypatch):
    monkeypatch.setattr(ranks, "_group", SimpleNamespace(rank=0, size=3))
    assert parse_flags(["--data_dirs", str(data_dir), "--batch_size", "33"]).batch_size == 33
    with pytest.raises(UserError, match="--batch_size: 32 images cannot be divided among 3 processes"):
        parse_flags(["--data_dirs", str(data_dir)])


def test_a_check_of_the_data_is_the_work_of_one_process(monkeypatch, data):
    assert parse_flags(["--data_dirs", data, "--check_data", "--folds", "3"]).check_data
    monkeypatch.setattr(ranks, "_group", SimpleNamespace(rank=0, size=2))
    with pytest.raises(UserError, match="--check_data: is the work of one process"):
        parse_flags(["--data_dirs", data, "--check_data"])


# --------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_set_of_defaults(name, data):
    plain, args = (vars(parse_flags(["--data_dirs", data, *flags])) for flags in ([], ["--recipe", name]))
    assert {flag: args[flag] for flag in RECIPES[name]} == RECIPES[name] and args["recipe"] == name
    assert {flag for flag in args if args[flag] != plain[flag]} <= {"recipe", *RECIPES[name]}
    for flags, from_scratch in ((["--no-pretrained"], True), (["--no-pretrained", "--weights", "w.pth"], False)):
        args = parse_flags(["--data_dirs", data, "--recipe", name, *flags])
        assert args.learning_rate == (FROM_SCRATCH[name] if from_scratch else {}).get("learning_rate", 1e-4)


def test_flags_win_over_a_recipe_and_drop_those_that_they_exclude(data, tmp_path):
    (tmp_path / "flags.yaml").write_text("recipe: strong\nema: 0.5\n")
    args = parse_flags(["--config", str(tmp_path / "flags.yaml"), "--data_dirs", data, "--use_augmentation"])
    assert (args.ema, args.use_augmentation, args.sampling, args.augment_all) == (0.5, True, "instance", True)
    assert (args.train_loss, args.tau) == ("ce", 1.0)  # not the other half of the correction
    args = parse_flags(["--recipe", "strong", "--train_loss", "cb", "--data_dirs", data])
    assert (args.train_loss, args.sampling, args.rotation) == ("cb", "instance", RECIPES["strong"]["rotation"])
    args = parse_flags(["--recipe", "strong", "--train_loss", "ordinal", "--data_dirs", data])
    assert args.sampling == "balanced"  # that loss corrects nothing
    args = parse_flags(["--recipe", "strong", "--tau", "0.25", "--data_dirs", data])
    assert (args.train_loss, args.tau, args.sampling) == ("logit_adjustment", 0.25, "sqrt")
    for same in ("--use_augmentation=False", "--sampling=sqrt", "--train_loss=logit_adjustment"):
        args = parse_flags(["--recipe", "strong", same, "--data_dirs", data])
        assert (args.train_loss, args.tau, args.sampling) == ("logit_adjustment", 0.5, "sqrt")
    args = parse_flags(["--recipe", "two_level", "--sampling", "sqrt", "--data_dirs", data])
    assert (args.sampling, args.use_augmentation, args.train_loss) == ("sqrt", False, "cb")
    with pytest.raises(UserError, match="both oversample"):  # a mistake of the user's own
        parse_flags(["--recipe", "strong", "--sampling", "sqrt", "--use_augmentation", "--data_dirs", data])


@pytest.mark.parametrize(
    ("flags", "expected"),
    {
        "--sampling instance": ("logit_adjustment", 1.0, "instance", False),
        "--sampling instance --tau 0.7": ("logit_adjustment", 0.7, "instance", False),
        "--sampling balanced": ("ce", 1.0, "balanced", False),
        "--train_loss cb --beta 0": ("cb", 1.0, "balanced", False),
        "--train_loss focal --alpha 0.1 2": ("focal", 1.0, "instance", False),
        "--train_loss ce --crt_epochs 5": ("ce", 1.0, "instance", False),  # a new head corrects
        "--train_loss ce --sampling instance": ("ce", 1.0, "instance", False),  # asked for
    }.items(),
)
def test_a_half_that_is_replaced_leaves_a_whole_correction(flags, expected, data):
    args = parse_flags(["--recipe", "strong", *flags.split(), "--data_dirs", data])
    assert (args.train_loss, args.tau, args.sampling, args.use_augmentation) == expected


@pytest.mark.parametrize(
    ("in_file", "flags", "expected"),
    [
        ("--recipe two_level", "--recipe strong --train_loss weighted_ce", ("weighted_ce", "instance", False)),
        ("--recipe strong", "--recipe strong --train_loss cb", ("cb", "instance", False)),
        ("--recipe two_level", "--recipe strong --sampling balanced", ("ce", "balanced", False)),
        ("--recipe strong", "--recipe strong --use_augmentation", ("ce", "instance", True)),
        ("--train_loss cb --beta 0", "--recipe strong --train_loss cb", ("cb", "balanced", False)),
        ("--recipe strong --no-pretrained", "--recipe strong --pretrained", ("logit_adjustment", "sqrt", False)),
        ("--recipe strong --no-pretrained", "--recipe two_level --pretrained", ("cb", "instance", True)),
    ],
)
def test_a_recipe_takes_the_place_of_the_correction_in_the_config(in_file, flags, expected, data, write_config):
    trained = vars(parse_flags(["--data_dirs", data, *in_file.split()]))
    args = parse_flags([*write_config(json.dumps(trained), "args.json"), *flags.split()])
    assert (args.train_loss, args.sampling, args.use_augmentation) == expected
    assert (args.zero_init, args.learning_rate) == (False, 1e-4)


def test_a_recipe_wins_over_the_defaults_of_the_demo():
    assert parse_flags(["--recipe", "two_level", "--demo"]).epochs == 8
    args = parse_flags(["--recipe", "strong", "--demo"])
    assert args.zero_init and (args.sampling, args.use_augmentation, args.epochs) == ("sqrt", False, 8)
    assert not parse_flags(["--demo", "--sampling", "sqrt"]).use_augmentation
    assert not parse_flags(["--recipe", "strong", "--demo", "--train_loss", "cb"]).use_augmentation  # corrected once


def test_weights_that_are_given_are_not_zeroed(data):
    with pytest.raises(UserError, match="--zero_init: for random weights only"):
        parse_flags(["--zero_init", "--data_dirs", data])


def test_a_recipe_of_the_command_line_wins_over_the_config(data, write_config):
    trained = vars(parse_flags(["--data_dirs", data, "--recipe", "two_level", "--lr", "0.1"]))
    config = write_config(json.dumps(trained), "args.json")
    args = parse_flags([*config, "--recipe=strong", "--ema", "0.5"])
    assert {name: vars(args)[name] for name in RECIPES["strong"]} == {**RECIPES["strong"], "ema": 0.5}
    assert (args.recipe, args.use_augmentation, args.learning_rate) == ("strong", False, 0.1)
    assert parse_flags([*config, "--train_loss", "ce"]).train_loss == "ce"
    config = write_config(json.dumps(trained | {"pretrained": False}), "from_scratch.json")
    args = parse_flags([*config, "--recipe=strong"])
    assert {name: vars(args)[name] for name in FROM_SCRATCH["strong"]} == FROM_SCRATCH["strong"]


def test_a_resumed_run_keeps_the_flags_of_its_checkpoint_whatever_its_recipe(data, checkpoint):
    trained = vars(parse_flags(["--recipe", "strong", "--ema", "0.5", "--data_dirs", data]))
    argv = ["--resume", checkpoint, "--recipe", "strong"]
    assert parse_flags(argv, trained, checkpoint_is_known=True).ema == 0.5
