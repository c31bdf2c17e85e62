"""The learning rate at each step and the image size at each epoch."""

import pytest
import torch
from helpers import index_of

import utils
from flag_checks import parse_flags
from flags import TRAIN_LOSSES
from schedule import (
    LOSS_WORDS,
    build_loss_from_flags,
    last_stage_start,
    loss_in_words,
    lr_lambda,
    plan_stages,
    print_stages,
    progressive_size,
)


def test_progressive_sizes_grow_in_thirds_to_the_full_size():
    assert [progressive_size(epoch, 12, 224) for epoch in range(12)] == [112] * 4 + [176] * 4 + [224] * 4
    assert [progressive_size(epoch, 3, 64) for epoch in range(3)] == [32, 48, 64]
    assert progressive_size(0, 1, 224) == 224 and progressive_size(0, 3, 32) == 32
    assert all(progressive_size(epochs - 1, epochs, 100) == 100 for epochs in range(1, 40))


def test_learning_rate_has_linear_warmup_and_cosine_decay():
    factor = lr_lambda([(10, 110)])
    assert [factor(0), factor(4), factor(9), factor(10)] == pytest.approx([0.1, 0.5, 1, 1])
    assert [factor(60), factor(110), factor(999)] == pytest.approx([0.5, 0, 0])
    assert lr_lambda([(0, 10)])(0) == 1


def test_learning_rate_cycles_run_one_after_another():
    factor = lr_lambda([(2, 10), (0, 4)])
    assert [factor(step) for step in (0, 1, 2)] == [0.5, 1, 1]
    assert factor(9) < 0.1 and factor(10) == 1 and factor(12) == pytest.approx(0.5) and factor(14) == 0


def printed_stages(capsys, folder, *flags):
    """-> what is said about imbalance for 12 : 6 : 3 training images"""
    args = parse_flags(["--data_dirs", str(folder), "--epochs", "10", *flags])
    index = index_of([12, 6, 3])
    stages = plan_stages(args, index, build_loss_from_flags(args, index.counts()), torch.device("cpu"))
    assert last_stage_start(args) == stages[-1].start
    print_stages(stages, len(index), args)
    return capsys.readouterr().out.splitlines()


def test_one_line_says_in_words_what_is_done_about_imbalance(tmp_path, capsys):
    (plain,) = printed_stages(capsys, tmp_path, "--train_loss", "ce")
    assert plain == "imbalance: cross entropy, equal class weights; not oversampled; originals not augmented"
    recipe, both = printed_stages(capsys, tmp_path, "--recipe", "two_level")
    assert recipe == "recipe two_level: --train_loss=cb --use_augmentation=True --sampling=instance"
    assert both == (
        "imbalance: Class-Balanced Focal loss, class weights from 0.430 to 1.712; "
        "oversampled from 21 to 36 images per epoch by augmented copies; originals not augmented"
    )
    (drawn,) = printed_stages(capsys, tmp_path, "--sampling", "sqrt", "--augment_all", "--train_loss", "focal")
    assert "focal loss, equal class weights; sqrt sampling" in drawn and drawn.endswith("every image augmented")
    (alpha,) = printed_stages(capsys, tmp_path, "--train_loss", "focal", "--alpha", "1", "2", "3")
    assert "focal loss, class weights from 1.000 to 3.000" in alpha


def test_each_stage_has_its_line(tmp_path, capsys):
    flags = ["--train_loss", "ldam", "--drw_epoch", "8", "--crt_epochs", "1"]
    first, main_stage, head = printed_stages(capsys, tmp_path, *flags)
    assert first.startswith("imbalance, epochs 0 to 7: LDAM loss") and "equal class weights" in first
    assert main_stage.startswith("imbalance, epochs 8 to 8: LDAM loss") and "class weights from" in main_stage
    assert head.startswith("imbalance, epochs 9 to 9: cross entropy") and "a new head on the frozen backbone" in head
    assert "balanced sampling" in head


def test_every_loss_has_words():
    losses = [utils.build_loss(name, [4, 2, 1]) for name in TRAIN_LOSSES]
    assert {type(loss).__name__ for loss in losses} == LOSS_WORDS.keys()
    assert all(loss_in_words(loss) for loss in losses)
