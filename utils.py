"""Losses for imbalanced classes, and the class-balance mathematics behind them.

Every loss takes `logits: (N, C)` in any float type and `targets: (N,) int64`, and gives a scalar, the mean over the
images, computed in float32. None knows of devices: class weights are buffers and move with the module.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

LDAM_SCALE = 30.0  # s of Cao et al. 2019


def effective_number(samples_per_cls, beta):
    """Effective number of samples, E_n = (1 - beta^n) / (1 - beta) (Cui et al. 2019, eq. 2).

    samples_per_cls: (C,) counts of the original training images, each >= 1; 0 <= beta < 1. -> (C,) float64 array.
    beta = 0 gives 1 for every class, beta -> 1 gives n.
    """
    counts = np.asarray(samples_per_cls, dtype=np.float64)
    if counts.ndim != 1 or counts.size < 2 or not (counts >= 1).all():
        raise ValueError(f"samples_per_cls needs two classes or more, each with an image, not {samples_per_cls}")
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and below 1, not {beta}")
    if beta == 0:
        return np.ones_like(counts)
    # expm1 and log1p: 1 - beta^n loses all its digits as beta nears 1
    return -np.expm1(counts * np.log1p(beta - 1)) / (1 - beta)


def class_shares(samples_per_cls):
    """-> (C,) float32 tensor: the share of each class among the images, summing to 1."""
    counts = torch.as_tensor(samples_per_cls, dtype=torch.float64)
    return (counts / counts.sum()).float()


def class_balanced_weights(samples_per_cls, beta):
    """Weight of each class, 1 / E_n, normalised to sum to the number of classes. -> (C,) float32 tensor."""
    weights = 1 / effective_number(samples_per_cls, beta)
    return torch.tensor(weights * len(weights) / weights.sum(), dtype=torch.float32)


class CrossEntropy(nn.Module):
    """-log p_t, p = softmax(logits)."""

    def forward(self, logits, targets):
        return F.cross_entropy(logits.float(), targets)


class LabelSmoothingCrossEntropy(nn.Module):
    """Cross entropy against (1 - smoothing) * one_hot + smoothing / C (Szegedy et al. 2016, sec. 7)."""

    def __init__(self, smoothing=0.1):
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, not {smoothing}")
        self.smoothing = smoothing

    def forward(self, logits, targets):
        return F.cross_entropy(logits.float(), targets, label_smoothing=self.smoothing)


class FocalLoss(nn.Module):
    """-alpha_t (1 - p_t)^gamma log p_t, p = softmax(logits) (Lin et al. 2017, eq. 5, for C classes).

    alpha: None, one figure for all classes, or (C,) figures, used as they are given. gamma >= 0.
    """

    def __init__(self, alpha=None, gamma=2.0):
        super().__init__()
        if gamma < 0:
            raise ValueError(f"gamma must be at least 0, not {gamma}")
        self.gamma = gamma
        alpha = torch.as_tensor(1.0 if alpha is None else alpha, dtype=torch.float32)
        self.register_buffer("alpha", alpha)

    def forward(self, logits, targets):
        log_p = F.log_softmax(logits.float(), dim=1)
        log_pt = log_p.gather(1, targets[:, None]).squeeze(1)
        # log(1 - p_t) from the other classes: 1 - exp(log p_t) would be 0 for a sure model, and its power have
        # an infinite gradient for gamma < 1
        others = log_p.scatter(1, targets[:, None], float("-inf"))
        log_not_pt = torch.logsumexp(others, dim=1)
        alpha_t = self.alpha[targets] if self.alpha.ndim else self.alpha
        return (-alpha_t * torch.exp(self.gamma * log_not_pt) * log_pt).mean()


class CBLoss(FocalLoss):
    """Class-Balanced Focal loss: the focal loss weighted by 1 / E_n of the image's class (Cui et al. 2019, eq. 5).

    samples_per_cls: (C,) counts of the *original* training images, before any augmentation.
    form: "softmax", the focal loss of the softmax probability of the true class (beta = 0 is `FocalLoss`, and with
    gamma = 0 cross entropy); "sigmoid", the paper's: every class is a yes-or-no question,
    -w_y sum_c (1 - p_c)^gamma log p_c with p_c = sigmoid(z_c), z_c = logit_c for the true class, -logit_c for others.
    """

    def __init__(self, samples_per_cls, beta=0.999, gamma=2.0, form="softmax"):
        super().__init__(class_balanced_weights(samples_per_cls, beta), gamma)
        if form not in ("softmax", "sigmoid"):
            raise ValueError(f"form must be softmax or sigmoid, not {form}")
        self.form = form

    def forward(self, logits, targets):
        if self.form == "softmax":
            return super().forward(logits, targets)
        logits = logits.float()
        z = torch.where(F.one_hot(targets, logits.shape[1]).bool(), logits, -logits)
        focal = -torch.exp(self.gamma * F.logsigmoid(-z)) * F.logsigmoid(z)
        return (self.alpha[targets] * focal.sum(dim=1)).mean()


class WeightedCrossEntropy(nn.Module):
    """-w_y log p_y, w_j = 1 / n_j, normalised to sum to the number of classes (King & Zeng 2001).

    samples_per_cls: (C,) counts of the original training images. The limit of `CBLoss` for beta -> 1, gamma = 0.
    """

    def __init__(self, samples_per_cls):
        super().__init__()
        weights = 1 / class_shares(samples_per_cls)
        self.register_buffer("weights", weights * len(weights) / weights.sum())

    def forward(self, logits, targets):
        return (self.weights[targets] * F.cross_entropy(logits.float(), targets, reduction="none")).mean()


class LogitAdjustedLoss(nn.Module):
    """-log softmax(z + tau log pi)_y, pi the classes' shares of the training images (Menon et al. 2021, eq. 10).

    samples_per_cls: (C,) counts of the original training images. The larger the class, the easier it is made in
    training; without the shift, in evaluation, the logits z are those of classes that are equally common. tau = 0 is
    cross entropy.
    """

    def __init__(self, samples_per_cls, tau=1.0):
        super().__init__()
        self.register_buffer("shift", tau * class_shares(samples_per_cls).log())

    def forward(self, logits, targets):
        return F.cross_entropy(logits.float() + self.shift, targets)


class BalancedSoftmaxLoss(LogitAdjustedLoss):
    """-log(n_y exp z_y / sum_j n_j exp z_j) (Ren et al. 2020, theorem 1): the logit-adjusted loss with tau = 1."""

    def __init__(self, samples_per_cls):
        super().__init__(samples_per_cls, tau=1.0)


class LDAMLoss(nn.Module):
    """Label-distribution-aware margins (Cao et al. 2019, eq. 12 and 13): -w_y log softmax(z - s Delta_y onehot_y)_y.

    Delta_j = max_margin (n_min / n_j)^(1/4): the rarer, the wider. logits z: those of a `CosineHead`, s times
    its cosines. samples_per_cls: (C,) counts of the original training images. beta: of `class_balanced_weights`, 0 for
    none.
    """

    def __init__(self, samples_per_cls, max_margin=0.5, scale=LDAM_SCALE, beta=0.0):
        super().__init__()
        shares = class_shares(samples_per_cls)
        self.register_buffer("margins", scale * max_margin * (shares.min() / shares) ** 0.25)
        self.register_buffer("weights", class_balanced_weights(samples_per_cls, beta))

    def forward(self, logits, targets):
        lowered = logits.float() - self.margins[targets, None] * F.one_hot(targets, logits.shape[1])
        return (self.weights[targets] * F.cross_entropy(lowered, targets, reduction="none")).mean()


class OrdinalLoss(nn.Module):
    """Cross entropy against soft targets, q_j = exp(-decay |j - y|) / sum_k exp(-decay |k - y|): for ordered grades.

    Díaz & Marathe 2019, sec. 3, with the distance of the grades as metric: a neighbour is a lesser mistake than a far
    grade. decay -> infinity is cross entropy.
    """

    def __init__(self, num_classes, decay=2.0):
        super().__init__()
        grades = torch.arange(num_classes, dtype=torch.float32)
        self.register_buffer("soft_targets", torch.softmax(-decay * (grades - grades[:, None]).abs(), dim=1))

    def forward(self, logits, targets):
        return F.cross_entropy(logits.float(), self.soft_targets[targets])


TRAIN_LOSSES = (
    "cross_entropy", "ce", "focal", "cb", "label_smoothing",
    "weighted_ce", "balanced_softmax", "logit_adjustment", "ldam", "ordinal",
)  # fmt: skip
WEIGHTED_LOSSES = ("cb", "weighted_ce", "ldam")  # whose class weights `--drw_epoch` defers


def build_loss(
    name, samples_per_cls, *, weighted=True, beta=0.999, gamma=2.0, alpha=None, smoothing=0.1, cb_form="softmax",
    tau=1.0, max_margin=0.5, ordinal_decay=2.0,
):  # fmt: skip
    """The loss of `--train_loss name`; samples_per_cls: counts of the original training images.

    weighted: False has a loss of WEIGHTED_LOSSES weigh all classes alike.
    """
    beta = beta if weighted else 0.0
    match name:
        case "cross_entropy" | "ce":
            return CrossEntropy()
        case "label_smoothing":
            return LabelSmoothingCrossEntropy(smoothing)
        case "focal":
            return FocalLoss(alpha, gamma)
        case "cb":
            return CBLoss(samples_per_cls, beta, gamma, cb_form)
        case "weighted_ce":
            return WeightedCrossEntropy(samples_per_cls) if weighted else CrossEntropy()
        case "balanced_softmax":
            return BalancedSoftmaxLoss(samples_per_cls)
        case "logit_adjustment":
            return LogitAdjustedLoss(samples_per_cls, tau)
        case "ldam":
            return LDAMLoss(samples_per_cls, max_margin, beta=beta)
        case "ordinal":
            return OrdinalLoss(len(samples_per_cls), ordinal_decay)
    raise ValueError(f"unknown loss {name}")
