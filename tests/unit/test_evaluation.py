"""What the loss and the sampling together make of the class shares."""

import numpy as np
import pytest

from evaluation import training_prior
from flag_checks import parse_flags
from utils import class_balanced_weights

COUNTS = [90, 30, 10]
CB = class_balanced_weights(COUNTS, 0.999).numpy()
INVERSE = 3 / np.array(COUNTS) / (1 / np.array(COUNTS)).sum()


@pytest.mark.parametrize(
    "flags, prior, gamma",
    [
        ("--use_augmentation", CB, 2.0),
        ("--use_augmentation --target_samples_per_class 20 --gamma 0", CB * [9, 3, 2], 0.0),
        ("--sampling sqrt --train_loss weighted_ce", INVERSE * np.sqrt(COUNTS), None),
        ("--sampling balanced --train_loss balanced_softmax", INVERSE, None),
        ("--sampling balanced --train_loss logit_adjustment --tau 0.5", np.sqrt(INVERSE), None),
        ("--sampling sqrt --train_loss logit_adjustment --tau 0.75", INVERSE**0.25, None),
    ],
)
def test_the_prior_is_class_shares_times_class_weights(flags, prior, gamma, tmp_path):
    known = training_prior(parse_flags(["--data_dirs", str(tmp_path), *flags.split()]), COUNTS)
    assert known["prior"] / known["prior"].sum() == pytest.approx(prior / np.sum(prior), rel=1e-5)
    assert known.get("gamma") == gamma


@pytest.mark.parametrize(
    "flags",
    [
        "--train_loss cb", "--train_loss ce --use_augmentation",  # corrected once
        "--train_loss logit_adjustment --tau 0.5 --sampling sqrt",  # half and half
        "--use_augmentation --cb_form sigmoid", "--train_loss ldam --drw_epoch 2 --sampling sqrt",
        "--use_augmentation --drw_epoch 2", "--use_augmentation --crt_epochs 2", "--sampling progressive",
    ],
)  # fmt: skip
def test_there_is_none_if_it_is_not_corrected_twice_or_not_known(flags, tmp_path):
    assert training_prior(parse_flags(["--data_dirs", str(tmp_path), *flags.split()]), COUNTS) is None
