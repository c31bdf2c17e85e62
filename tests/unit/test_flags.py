"""The flags of main.py: names, defaults, and how W&B writes them."""

import pytest

from flags import build_parser, check_split_shares, flag_of, parse_flags
from run.cli import UserError


def test_a_sweeps_way_of_writing_flags_is_understood():
    parse = build_parser().parse_args
    assert parse(["--use_augmentation=True"]).use_augmentation is True
    assert parse(["--use_augmentation=false", "--pretrained=False"]).use_augmentation is False
    assert parse(["--no-pretrained"]).pretrained is False and parse([]).pretrained is True
    assert parse(["--use_augmentation", "--lr=0.001"]).learning_rate == 1e-3


# the contract: every flag with its default; what is listed here is neither removed nor changed
FLAGS = {
    "--data_dirs": None, "--val_dirs": None, "--test_dirs": None, "--split": [0.6, 0.2, 0.2], "--group_regex": None,
    "--folds": None, "--fold": None, "--image_size": 224, "--skip_broken": False, "--cache_dir": None,
    "--no_cache": False, "--max_megapixels": 200, "--demo": False, "--train_loss": "cb", "--beta": 0.999,
    "--gamma": 2.0, "--cb_form": "softmax", "--alpha": None, "--smoothing": 0.1, "--tau": 1.0, "--max_margin": 0.5,
    "--ordinal": False, "--ordinal_decay": 2.0, "--drw_epoch": 0, "--use_augmentation": False,
    "--target_samples_per_class": None,
    "--augmentation_methods": ["horizontal_flip", "rotation", "scale", "shear", "shift", "color_jitter"],
    "--augment_all": False, "--sampling": "instance", "--crt_epochs": 0, "--mixup": 0, "--cutmix": 0,
    "--pretrained": True, "--weights": None, "--dropout_prob": 0.3, "--epochs": 100, "--batch_size": 32,
    "--learning_rate": 0.0001, "--lr": 0.0001, "--weight_decay": 0.01, "--warmup_epochs": 1.0, "--clip_grad": 1.0,
    "--grad_accum": 1, "--ema": 0, "--progressive": False, "--best_metric": "val_balanced_acc", "--amp": "auto",
    "--compile": False, "--device": "auto", "--num_workers": None, "--seed": 42, "--output_dir": "checkpoints",
    "--run_dir": None, "--resume": None, "--auto_resume": False, "--save_every": 0, "--save_minutes": 10,
    "--tta": False, "--eval_only": False, "--wandb_id": None, "--wandb_resume": "allow", "--wandb_dir": None,
    "--wandb_images": 0, "--wandb_artifact": False,
}  # fmt: skip
SWITCHES = (
    "skip_broken",
    "ordinal",
    "use_augmentation",
    "augment_all",
    "pretrained",
    "progressive",
    "compile",
    "auto_resume",
    "tta",
    "eval_only",
    "wandb_artifact",
)


def test_every_flag_keeps_its_names_and_its_default():
    options = {option: action for action in build_parser()._actions for option in action.option_strings}
    assert {name: options[name].default for name in FLAGS} == FLAGS
    for name in SWITCHES:
        assert vars(build_parser().parse_args([f"--{name}"]))[name] is True
        assert vars(build_parser().parse_args([f"--no-{name}"]))[name] is False


def test_contradictions_are_found_before_the_checkpoint_is_read():
    for flags, message in {
        "--use_augmentation --sampling sqrt": "both oversample",
        "--folds 3 --fold 3": "from 0 to K - 1",
        "--drw_epoch 2 --crt_epochs 1 --epochs 3": "leave none of the 3 epochs",
        "--gamma -1": "argument --gamma: -1 is not at least 0",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_flags(["--resume", "nowhere.pth", *flags.split()])


def test_flags_that_contradict_a_default_only_are_checked_with_those_of_the_checkpoint():
    command = ["--resume", "nowhere.pth", "--drw_epoch", "1", "--train_loss", "ce"]
    parse_flags(command)
    assert parse_flags(command, {"use_augmentation": True, "epochs": 5}).drw_epoch == 1
    with pytest.raises(UserError, match="nothing to defer"):
        parse_flags(command, {"use_augmentation": False, "epochs": 5})


def test_flags_given_on_the_command_line_win_over_inherited_ones():
    args = parse_flags(["--resume", "x.pth", "--gamma", "1"], {"gamma": 3.0, "beta": 0.9, "data_dirs": ["data"]})
    assert (args.gamma, args.beta) == (1.0, 0.9)


def test_folders_become_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = parse_flags(["--data_dirs", "a", "b", "--test_dirs", "c", "--cache_dir", "cache"])
    assert args.data_dirs == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert (args.test_dirs, args.cache_dir) == ([str(tmp_path / "c")], str(tmp_path / "cache"))


def test_a_trial_of_a_sweep_resumes_in_a_folder_of_its_own(monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "2x3y4z5w")
    args = parse_flags(["--data_dirs", "data"])
    assert args.auto_resume and args.run_dir == "checkpoints_2x3y4z5w"
    assert not parse_flags(["--data_dirs", "data", "--run_dir", "mine"]).auto_resume


def test_every_spelling_of_a_flag_is_recognised():
    assert {flag_of(word) for word in ("--lr", "--lr=0.1", "--learning_rate", "lr")} == {"learning_rate"}
    assert flag_of("--no-pretrained") == "pretrained" and flag_of("--unknown") == "--unknown"


def test_an_unknown_wandb_mode_of_the_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="WANDB_MODE: sometimes is not one of online, offline, disabled"):
        build_parser()


@pytest.mark.parametrize("shares", [[0.6, 0.2, 0.1], [0.5, 0.6, -0.1], [0.8, 0.2, 0.0]])
def test_shares_that_do_not_make_a_split_are_rejected(shares):
    args = build_parser().parse_args([])
    args.split = shares
    with pytest.raises(UserError, match="--split"):
        check_split_shares(args)
    args.split, args.test_dirs = [0.8, 0.2, 0.0], ["elsewhere"]
    check_split_shares(args)
