"""What is asked about the flags: which flag a word names, whether one is neutral, and what several of them mean."""

import argparse
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

from data_flags import FOLDER_FLAGS
from flags import BATCH_SIZE, NEUTRAL_FLAGS, build_parser


@functools.cache
def flag_of(word: str) -> str:
    """--lr, --lr=0.1, --learning-rate, lr -> learning_rate: the flag that a word of the command line names."""
    parser, option = build_parser(), f"--{word.removeprefix('--').partition('=')[0]}"
    return getattr(parser._option_string_actions.get(parser.canonical(option)), "dest", option)


def is_neutral(name: str) -> bool:
    """Whether a flag does not change what a run learns."""
    return name in NEUTRAL_FLAGS or name.startswith("wandb_")


def is_ordinal(args: argparse.Namespace) -> bool:
    """Whether the classes are ordered grades."""
    return args.ordinal or args.train_loss == "ordinal"


def text_of(value: Any) -> str:
    """The value of a flag, as it is shown."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def corrects_by_loss(args: argparse.Namespace) -> bool:
    """Whether the loss favors small classes."""
    return (
        (args.train_loss == "cb" and args.beta > 0)
        or args.train_loss in ("weighted_ce", "balanced_softmax")
        or (args.train_loss == "logit_adjustment" and args.tau > 0)
        or (args.train_loss == "focal" and len(set(args.alpha or [])) > 1)
        or (args.train_loss == "ldam" and args.drw_epoch > 0 and args.beta > 0)
    )


def corrects_by_sampling(args: argparse.Namespace) -> bool:
    """Whether small classes are shown more often than they occur."""
    return args.use_augmentation or args.sampling != "instance"


def corrects_twice(args: argparse.Namespace) -> bool:
    """Whether the loss favors small classes on top of a sampling that does, beyond equal shares of all classes."""
    is_shared = args.sampling == "sqrt" and args.train_loss == "logit_adjustment" and args.tau <= 0.5
    return corrects_by_loss(args) and corrects_by_sampling(args) and not is_shared


def shown_at_any_angle(args: argparse.Namespace) -> bool:
    """Whether the training shows every image at every angle."""
    return args.augment_all and "rotation" in args.augmentation_methods and args.rotation == 180


def data_folders(flags: Mapping[str, Any]) -> list[str]:
    """-> the folders of --data_dirs, --val_dirs and --test_dirs. flags: {flag: value}."""
    return [folder for name in FOLDER_FLAGS for folder in flags[name] or []]


def replaced_splits(args: argparse.Namespace, trained_flags: Mapping[str, Any]) -> list[str]:
    """-> which of val and test come from other folders than in the training. trained_flags: {flag: value} of that."""
    return [split for split in ("val", "test") if getattr(args, f"{split}_dirs") != trained_flags[f"{split}_dirs"]]


def scaled_learning_rate(learning_rate: float, batch_size: int) -> float:
    """-> learning_rate * sqrt(batch_size / BATCH_SIZE): the square-root rule, for `--batch_size auto`.

    learning_rate: that of batches of BATCH_SIZE images. The gradient of a batch k times as large has 1/k of the
    variance, and Adam divides by the size of the gradient (Krizhevsky 2014, section 5; Malladi et al. 2022, "On the
    SDEs and Scaling Rules for Adaptive Gradient Algorithms", who also scale Adam's betas and epsilon; they stay here).
    """
    return learning_rate * math.sqrt(batch_size / BATCH_SIZE)
