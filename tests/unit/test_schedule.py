"""The learning rate at each step and the image size at each epoch."""

import pytest

from schedule import lr_lambda, progressive_size


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
