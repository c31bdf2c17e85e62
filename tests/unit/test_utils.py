"""The losses by hand and by the formulas of their papers, their limits, their gradients and their precision."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flags import TRAIN_LOSSES, WEIGHTED_LOSSES
from utils import (
    BalancedSoftmaxLoss,
    CBLoss,
    CrossEntropy,
    FocalLoss,
    LabelSmoothingCrossEntropy,
    LDAMLoss,
    LogitAdjustedLoss,
    OrdinalLoss,
    WeightedCrossEntropy,
    build_loss,
    class_balanced_weights,
    effective_number,
)

COUNTS = [900, 120, 30, 1]
LOSSES = {
    "ce": CrossEntropy(),
    "label_smoothing": LabelSmoothingCrossEntropy(0.1),
    "focal": FocalLoss(gamma=2),
    "focal_half": FocalLoss(alpha=[0.1, 0.2, 0.3, 0.4], gamma=0.5),
    "cb": CBLoss(COUNTS),
    "cb_half": CBLoss(COUNTS, gamma=0.5),
    "cb_sigmoid": CBLoss(COUNTS, form="sigmoid"),
    "cb_sigmoid_half": CBLoss(COUNTS, gamma=0.5, form="sigmoid"),
    "weighted_ce": WeightedCrossEntropy(COUNTS),
    "balanced_softmax": BalancedSoftmaxLoss(COUNTS),
    "logit_adjustment": LogitAdjustedLoss(COUNTS, tau=1.5),
    "ldam": LDAMLoss(COUNTS, beta=0.99),
    "ordinal": OrdinalLoss(4),
}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 4, generator=generator) * 2, torch.arange(16) % 4


def test_effective_number_by_hand():
    # (1 - 0.9^1) / 0.1 = 1; (1 - 0.9^2) / 0.1 = 1.9; (1 - 0.9^3) / 0.1 = 2.71
    assert effective_number([1, 2, 3], 0.9) == pytest.approx([1, 1.9, 2.71])


def test_effective_number_is_one_for_beta_zero_and_the_count_for_beta_near_one():
    assert effective_number(COUNTS, 0).tolist() == [1, 1, 1, 1]
    assert effective_number(COUNTS, 1 - 1e-12) == pytest.approx(COUNTS, rel=1e-8)


def test_weights_sum_to_the_number_of_classes_and_approach_inverse_frequency():
    inverse = 1 / np.array(COUNTS)
    weights = class_balanced_weights(COUNTS, 1 - 1e-12).numpy()
    assert weights == pytest.approx(inverse * 4 / inverse.sum(), rel=1e-6)
    assert class_balanced_weights(COUNTS, 0.99).sum().item() == pytest.approx(4)


def test_cb_loss_by_hand():
    # counts 1 and 3 at beta 0.9: E = 1, 2.71; 1/E = 1, 0.36900369; normalized to sum 2: 1.46091644, 0.53908356
    # logits (0, log 3) -> p = 0.25, 0.75. Image of class 0: 0.75^2 * -log 0.25; of class 1: 0.25^2 * -log 0.75
    logits, targets = torch.tensor([[0.0, math.log(3)]] * 2), torch.tensor([0, 1])
    by_hand = (1.46091644 * 0.5625 * 1.38629436 + 0.53908356 * 0.0625 * 0.28768207) / 2
    assert CBLoss([1, 3], beta=0.9, gamma=2)(logits, targets).item() == pytest.approx(by_hand, rel=1e-6)


def test_sigmoid_form_is_the_papers_sum_over_classes(batch):
    logits, targets = batch
    probability = torch.sigmoid(logits)
    weights = class_balanced_weights(COUNTS, 0.999)
    expected = 0.0
    for i, target in enumerate(targets.tolist()):
        for c in range(4):
            p = probability[i, c] if c == target else 1 - probability[i, c]
            expected += weights[target] * (1 - p) ** 2 * -torch.log(p) / len(targets)
    torch.testing.assert_close(CBLoss(COUNTS, 0.999, 2, "sigmoid")(logits, targets), expected)


def test_sigmoid_form_with_beta_and_gamma_zero_is_binary_cross_entropy(batch):
    logits, targets = batch
    one_hot = F.one_hot(targets, 4).float()
    expected = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="sum") / len(targets)
    torch.testing.assert_close(CBLoss(COUNTS, beta=0, gamma=0, form="sigmoid")(logits, targets), expected)


def test_beta_zero_is_focal_loss(batch):
    torch.testing.assert_close(CBLoss(COUNTS, beta=0, gamma=2)(*batch), FocalLoss(gamma=2)(*batch))


def test_beta_zero_and_gamma_zero_is_cross_entropy(batch):
    torch.testing.assert_close(CBLoss(COUNTS, beta=0, gamma=0)(*batch), F.cross_entropy(*batch))
    torch.testing.assert_close(CrossEntropy()(*batch), F.cross_entropy(*batch))


def test_gamma_zero_is_weighted_cross_entropy(batch):
    logits, targets = batch
    weighted = class_balanced_weights(COUNTS, 0.99)[targets] * F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(CBLoss(COUNTS, beta=0.99, gamma=0)(logits, targets), weighted.mean())


def test_focal_loss_multiplies_cross_entropy_by_the_papers_factor(batch):
    logits, targets = batch
    p_t = logits.softmax(1).gather(1, targets[:, None]).squeeze(1)
    alpha = torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = (-alpha[targets] * (1 - p_t) ** 3 * p_t.log()).mean()
    torch.testing.assert_close(FocalLoss(alpha.tolist(), 3)(logits, targets), expected)
    torch.testing.assert_close(FocalLoss(0.25, 3)(logits, targets), FocalLoss(None, 3)(logits, targets) * 0.25)


def test_weighted_cross_entropy_is_the_class_balanced_loss_for_beta_near_one_and_gamma_zero(batch):
    expected = CBLoss(COUNTS, beta=1 - 1e-12, gamma=0)(*batch)
    torch.testing.assert_close(WeightedCrossEntropy(COUNTS)(*batch), expected)


def test_balanced_softmax_is_the_papers_softmax_over_counts(batch):
    logits, targets = batch
    scaled = torch.tensor(COUNTS) * logits.exp()
    expected = -(scaled.gather(1, targets[:, None])[:, 0] / scaled.sum(1)).log().mean()
    torch.testing.assert_close(BalancedSoftmaxLoss(COUNTS)(logits, targets), expected)


def test_logit_adjustment_is_the_papers_sum_of_margins(batch):
    # Menon et al. 2021, eq. 10: log(1 + sum_{j != y} (pi_j / pi_y)^tau exp(z_j - z_y))
    logits, targets = batch
    priors, tau = torch.tensor(COUNTS) / sum(COUNTS), 0.7
    expected = 0.0
    for z, y in zip(logits, targets.tolist(), strict=True):
        others = sum((priors[j] / priors[y]) ** tau * (z[j] - z[y]).exp() for j in range(4) if j != y)
        expected += torch.log1p(others) / len(targets)
    torch.testing.assert_close(LogitAdjustedLoss(COUNTS, tau)(logits, targets), expected)
    torch.testing.assert_close(LogitAdjustedLoss(COUNTS, 0)(logits, targets), F.cross_entropy(logits, targets))
    torch.testing.assert_close(LogitAdjustedLoss(COUNTS, 1)(logits, targets), BalancedSoftmaxLoss(COUNTS)(*batch))


def test_ldam_lowers_the_true_cosine_by_the_papers_margin():
    # counts 16 and 1: margins C / n^(1/4) = C / 2 and C, with C = 0.5 the widest. s = 30, cosines 0.2 and 0.6
    cosines = torch.tensor([[0.2, 0.6], [0.2, 0.6]])
    first = -math.log(math.exp(30 * (0.2 - 0.25)) / (math.exp(30 * (0.2 - 0.25)) + math.exp(30 * 0.6)))
    second = -math.log(math.exp(30 * (0.6 - 0.5)) / (math.exp(30 * (0.6 - 0.5)) + math.exp(30 * 0.2)))
    loss = LDAMLoss([16, 1])(30 * cosines, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)
    weights = class_balanced_weights([16, 1], 0.9).tolist()
    deferred = LDAMLoss([16, 1], beta=0.9)(30 * cosines, torch.tensor([0, 1]))
    assert deferred.item() == pytest.approx((weights[0] * first + weights[1] * second) / 2, rel=1e-6)


def test_ordinal_targets_decrease_with_the_distance_between_grades(batch):
    loss = OrdinalLoss(4, decay=1.0)
    by_hand = [math.exp(-abs(j - 1)) for j in range(4)]
    assert loss.soft_targets[1].tolist() == pytest.approx([value / sum(by_hand) for value in by_hand])
    confident = [torch.tensor([[9.0 * (j == guess) for j in range(4)]]) for guess in range(4)]
    near_to_far = [loss(logits, torch.tensor([0])).item() for logits in confident]
    assert near_to_far == sorted(near_to_far)
    torch.testing.assert_close(OrdinalLoss(4, decay=100)(*batch), F.cross_entropy(*batch))


def test_losses_without_their_deferred_weights_are_the_plain_losses(batch):
    for name, plain in {"cb": FocalLoss(gamma=2), "weighted_ce": CrossEntropy(), "ldam": LDAMLoss(COUNTS)}.items():
        assert name in WEIGHTED_LOSSES
        torch.testing.assert_close(build_loss(name, COUNTS, weighted=False)(*batch), plain(*batch))
        assert build_loss(name, COUNTS)(*batch) != plain(*batch)


def test_label_smoothing_is_cross_entropy_against_soft_targets(batch):
    logits, targets = batch
    soft = 0.8 * F.one_hot(targets, 4) + 0.2 / 4
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(LabelSmoothingCrossEntropy(0.2)(logits, targets), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_finite_differences(name, batch):
    logits, targets = batch[0][:5].double(), batch[1][:5]
    loss = LOSSES[name]
    # the losses compute in float32 by design: larger steps and looser bounds than those of gradcheck
    logits.requires_grad_()
    loss(logits, targets).backward()
    for index in np.ndindex(*logits.shape):
        step = torch.zeros_like(logits)
        step[index] = 1e-2
        with torch.no_grad():
            numeric = (loss(logits + step, targets) - loss(logits - step, targets)) / 2e-2
        assert logits.grad[index].item() == pytest.approx(numeric.item(), rel=2e-2, abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0, 1e4, -1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_logits_of_any_size_give_finite_loss_and_gradient(name, size, dtype):
    logits = torch.zeros(4, 4, dtype=dtype)
    logits[:, 0] = size
    logits.requires_grad_()
    loss = LOSSES[name](logits, torch.arange(4))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_losses_compute_in_float32_under_mixed_precision(batch):
    logits, targets = batch
    logits = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = CBLoss(COUNTS)(logits, targets)
    assert torch.equal(mixed, CBLoss(COUNTS)(logits.float(), targets))


def test_class_weights_are_buffers_that_move_with_the_module():
    loss = CBLoss(COUNTS)
    assert dict(loss.named_buffers())["alpha"].shape == (4,)
    assert not list(loss.parameters())
    assert loss.to("meta").alpha.device.type == "meta"


def test_every_name_of_train_loss_builds_the_loss_it_names():
    built = {name: type(build_loss(name, COUNTS)) for name in TRAIN_LOSSES}
    assert built == {
        "cross_entropy": CrossEntropy,
        "ce": CrossEntropy,
        "focal": FocalLoss,
        "cb": CBLoss,
        "label_smoothing": LabelSmoothingCrossEntropy,
        "weighted_ce": WeightedCrossEntropy,
        "balanced_softmax": BalancedSoftmaxLoss,
        "logit_adjustment": LogitAdjustedLoss,
        "ldam": LDAMLoss,
        "ordinal": OrdinalLoss,
    }


@pytest.mark.parametrize("counts, beta", [([3, 0], 0.9), ([3], 0.9), ([3, 4], 1.0), ([3, 4], -0.1)])
def test_counts_and_beta_outside_the_formula_are_refused(counts, beta):
    with pytest.raises(ValueError):
        effective_number(counts, beta)
