"""The flags of main.py: names, defaults, and how W&B writes them."""

import pytest

from flags import build_parser
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
    "--labels": None, "--image_column": None, "--label_column": None, "--subject_column": None, "--split_column": None,
    "--merge": None, "--drop": None, "--subgroup_columns": None,
    "--folds": None, "--fold": None, "--image_size": 224, "--resize": "stretch", "--skip_broken": False,
    "--cache_dir": None, "--no_cache": False, "--max_megapixels": 200, "--demo": False, "--train_loss": "cb",
    "--beta": 0.999,
    "--gamma": 2.0, "--cb_form": "softmax", "--alpha": None, "--smoothing": 0.1, "--tau": 1.0, "--max_margin": 0.5,
    "--ordinal": False, "--ordinal_decay": 2.0, "--drw_epoch": 0, "--use_augmentation": False,
    "--target_samples_per_class": None,
    "--rotation": 15.0,
    "--augmentation_methods": ["horizontal_flip", "rotation", "scale", "shear", "shift", "color_jitter"],
    "--augment_all": False, "--sampling": "instance", "--crt_epochs": 0, "--mixup": 0, "--cutmix": 0,
    "--pretrained": True, "--weights": None, "--zero_init": False, "--dropout_prob": 0.3,
    "--epochs": 100, "--batch_size": 32,
    "--learning_rate": 0.0001, "--lr": 0.0001, "--weight_decay": 0.01, "--warmup_epochs": 1.0, "--clip_grad": 1.0,
    "--grad_accum": 1, "--optimizer": "adamw", "--ema": 0, "--progressive": False,
    "--best_metric": "val_balanced_acc", "--amp": "auto",
    "--compile": False, "--sync_bn": True,
    "--device": "auto", "--num_workers": None, "--seed": 42, "--output_dir": "checkpoints",
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
    "zero_init",
    "progressive",
    "compile",
    "sync_bn",
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


def test_dashes_and_underscores_are_the_same_in_the_name_of_a_flag_but_not_in_its_value():
    parse = build_parser().parse_args
    args = parse(["--image-size", "64", "--wandb-name=exp-1_b", "--no-use-augmentation", "--no_pretrained"])
    assert (args.image_size, args.wandb_name, args.use_augmentation, args.pretrained) == (64, "exp-1_b", False, False)
    assert parse(["--wandb_name", "image-size", "--no-cache"]).wandb_name == "image-size"
    assert parse(["--no-cache"]).no_cache is True
    with pytest.raises(UserError, match="unrecognized arguments: --image-sizes=3"):
        parse(["--image-sizes=3"])


def test_an_unknown_wandb_mode_of_the_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="WANDB_MODE: sometimes is not one of online, offline, disabled"):
        build_parser()


def test_flags_and_file_names_are_not_broken_at_hyphens_in_the_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert "~/.cache/skin-grading]" in build_parser().format_help()
