"""What is asked about the flags."""

import pytest

from flag_queries import flag_of, is_neutral, scaled_learning_rate


def test_every_spelling_of_a_flag_is_recognised():
    words = ("--lr", "--lr=0.1", "--learning_rate", "lr", "--learning-rate", "--learning-rate=0.1", "learning-rate")
    assert {flag_of(word) for word in words} == {"learning_rate"}
    assert flag_of("--no-pretrained") == "pretrained" and flag_of("--unknown") == "--unknown"


def test_where_a_run_computes_is_neutral_and_what_it_computes_is_not():
    assert is_neutral("device") and is_neutral("wandb_name")
    assert not (is_neutral("sync_bn") or is_neutral("batch_size") or is_neutral("amp"))


def test_four_times_as_many_images_double_the_learning_rate():
    assert scaled_learning_rate(1e-4, 128) == pytest.approx(2e-4) and scaled_learning_rate(0.3, 32) == 0.3
