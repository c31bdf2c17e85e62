"""Losses for imbalanced classes, and the class-balance mathematics behind them.

Every loss takes `logits: (N, C)` of any float type and `targets: (N,) int64` and returns a scalar: the mean over the
images, computed in float32. Losses know no devices: class weights are buffers, which move with the module.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flags import CB_FORMS

LDAM_SCALE = 30.0  # s of Cao et al. 2019


def effective_number(samples_per_cls: Sequence[int], beta: float) -> np.ndarray:
    """Effective number of samples, E_n = (1 - beta^n) / (1 - beta) (Cui et al. 2019, eq. 2).

    samples_per_cls: (C,) counts of the original training images, each >= 1; 0 <= beta < 1. -> (C,) float64 array.
    beta = 0 gives 1 for every class; beta -> 1 gives n. Raises ValueError for arguments outside these bounds.
    """
    counts = np.asarray(samples_per_cls, dtype=np.float64)
    if counts.ndim != 1 or counts.size < 2 or not (counts >= 1).all():
        raise ValueError(f"samples_per_cls must count two or more classes of one or more images, not {samples_per_cls}")
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and below 1, not {beta}")
    if beta == 0:
        return np.ones_like(counts)
    # expm1 and log1p: 1 - beta^n loses all its digits as beta nears 1
    return -np.expm1(counts * np.log1p(beta - 1)) / (1 - beta)


def class_shares(samples_per_cls: Sequence[int]) -> Tensor:
    """Share of each class in the images. -> (C,) float32 tensor that sums to 1."""
    counts = torch.as_tensor(samples_per_cls, dtype=torch.float64)
    return (counts / counts.sum()).float()


def class_balanced_weights(samples_per_cls: Sequence[int], beta: float) -> Tensor:
    """Weight of each class, 1 / E_n, normalized to sum to the number of classes. -> (C,) float32 tensor."""
    weights = 1 / effective_number(samples_per_cls, beta)
    return torch.tensor(weights * len(weights) / weights.sum(), dtype=torch.float32)


class CrossEntropy(nn.Module):
    """-log p_t, p = softmax(logits)."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets)


class LabelSmoothingCrossEntropy(nn.Module):
    """Cross entropy against (1 - smoothing) * one_hot + smoothing / C (Szegedy et al. 2016, sec. 7)."""

    def __init__(self, smoothing: float = 0.1):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, label_smoothing=self.smoothing)


class FocalLoss(nn.Module):
    """-alpha_t (1 - p_t)^gamma log p_t, p = softmax(logits) (Lin et al. 2017, eq. 5, for C classes).

    alpha: None (1), one weight for all classes, or (C,) weights, used as they are. gamma >= 0.
    """

    def __init__(self, alpha: float | Sequence[float] | Tensor | None = None, gamma: float = 2.0):
        super().__init__()
        if gamma < 0:
            raise ValueError(f"gamma must be at least 0, not {gamma}")
        self.gamma = gamma
        self.register_buffer("alpha", torch.as_tensor(1.0 if alpha is None else alpha, dtype=torch.float32))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        log_p = F.log_softmax(logits.float(), dim=1)
        log_pt = log_p.gather(1, targets[:, None]).squeeze(1)
        # log(1 - p_t) from the other classes: 1 - exp(log p_t) can round to 0, where gamma < 1 has an infinite gradient
        others = log_p.scatter(1, targets[:, None], float("-inf"))
        log_not_pt = torch.logsumexp(others, dim=1)
        alpha_t = self.alpha[targets] if self.alpha.ndim else self.alpha
        return (-alpha_t * torch.exp(self.gamma * log_not_pt) * log_pt).mean()


class CBLoss(FocalLoss):
    """Class-Balanced Focal loss: the focal loss weighted by 1 / E_n of the image's class (Cui et al. 2019, eq. 5).

    samples_per_cls: (C,) counts of the *original* training images, before any augmentation.
    form: "softmax", the focal loss of the softmax probability of the true class (beta = 0 is `FocalLoss`, and with
    gamma = 0 cross entropy); "sigmoid", the paper's: every class is a binary problem,
    -w_y sum_c (1 - p_c)^gamma log p_c with p_c = sigmoid(z_c), z_c = logit_c for the true class, -logit_c for others.
    """

    def __init__(self, samples_per_cls: Sequence[int], beta: float = 0.999, gamma: float = 2.0, form: str = "softmax"):
        super().__init__(class_balanced_weights(samples_per_cls, beta), gamma)
        if form not in CB_FORMS:
            raise ValueError(f"form must be {' or '.join(CB_FORMS)}, not {form}")
        self.form = form

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.form == "softmax":
            return super().forward(logits, targets)
        logits = logits.float()
        z = torch.where(F.one_hot(targets, logits.shape[1]).bool(), logits, -logits)
        focal = -torch.exp(self.gamma * F.logsigmoid(-z)) * F.logsigmoid(z)
        return (self.alpha[targets] * focal.sum(dim=1)).mean()


class WeightedCrossEntropy(nn.Module):
    """-w_y log p_y, w_j = 1 / n_j, normalized to sum to the number of classes (King & Zeng 2001).

    samples_per_cls: (C,) counts of the original training images. The limit of `CBLoss` for beta -> 1, gamma = 0.
    """

    def __init__(self, samples_per_cls: Sequence[int]):
        super().__init__()
        weights = 1 / class_shares(samples_per_cls)
        self.register_buffer("weights", weights * len(weights) / weights.sum())

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (self.weights[targets] * F.cross_entropy(logits.float(), targets, reduction="none")).mean()


class LogitAdjustedLoss(nn.Module):
    """-log softmax(z + tau log pi)_y, pi: share of each class in the training images (Menon et al. 2021, eq. 10).

    samples_per_cls: (C,) counts of the original training images. In training, a larger class gets a larger head start;
    in evaluation the logits z are used without it, as if all classes were equally common. tau = 0 is cross entropy.
    """

    def __init__(self, samples_per_cls: Sequence[int], tau: float = 1.0):
        super().__init__()
        self.register_buffer("shift", tau * class_shares(samples_per_cls).log())

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float() + self.shift, targets)


class BalancedSoftmaxLoss(LogitAdjustedLoss):
    """-log(n_y exp z_y / sum_j n_j exp z_j) (Ren et al. 2020, theorem 1): the logit-adjusted loss with tau = 1."""

    def __init__(self, samples_per_cls: Sequence[int]):
        super().__init__(samples_per_cls, tau=1.0)


class LDAMLoss(nn.Module):
    """Label-distribution-aware margins (Cao et al. 2019, eq. 12 and 13): -w_y log softmax(z - s Delta_y onehot_y)_y.

    Delta_j = max_margin (n_min / n_j)^(1/4): the rarer the class, the wider its margin. Logits z are those of a
    `CosineHead`, s times its cosines. samples_per_cls: (C,) counts of the original training images. beta: as in
    `class_balanced_weights`; 0 means no weights.
    """

    def __init__(self, samples_per_cls: Sequence[int], max_margin: float = 0.5, beta: float = 0.0):
        super().__init__()
        shares = class_shares(samples_per_cls)
        self.register_buffer("margins", LDAM_SCALE * max_margin * (shares.min() / shares) ** 0.25)
        self.register_buffer("weights", class_balanced_weights(samples_per_cls, beta))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        lowered = logits.float() - self.margins[targets, None] * F.one_hot(targets, logits.shape[1])
        return (self.weights[targets] * F.cross_entropy(lowered, targets, reduction="none")).mean()


class OrdinalLoss(nn.Module):
    """Cross entropy against soft targets q_j = exp(-decay |j - y|) / sum_k exp(-decay |k - y|), for ordered grades.

    Díaz & Marathe 2019, sec. 3, with the distance in grades as metric: confusing neighboring grades costs less than
    confusing distant ones. decay -> infinity is cross entropy.
    """

    def __init__(self, num_classes: int, decay: float = 2.0):
        super().__init__()
        grades = torch.arange(num_classes, dtype=torch.float32)
        self.register_buffer("soft_targets", torch.softmax(-decay * (grades - grades[:, None]).abs(), dim=1))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), self.soft_targets[targets])


def build_loss(
    name: str, samples_per_cls: Sequence[int], *, weighted: bool = True, beta: float = 0.999, gamma: float = 2.0,
    alpha: float | Sequence[float] | None = None, smoothing: float = 0.1, cb_form: str = "softmax", tau: float = 1.0,
    max_margin: float = 0.5, ordinal_decay: float = 2.0,
) -> nn.Module:  # fmt: skip
    """The loss of `--train_loss name`. samples_per_cls: (C,) counts of the original training images.

    weighted: with False, the losses of WEIGHTED_LOSSES weight all classes alike.
    """
    beta = beta if weighted else 0.0
    losses = {
        "cross_entropy": CrossEntropy,
        "ce": CrossEntropy,
        "label_smoothing": lambda: LabelSmoothingCrossEntropy(smoothing),
        "focal": lambda: FocalLoss(alpha, gamma),
        "cb": lambda: CBLoss(samples_per_cls, beta, gamma, cb_form),
        "weighted_ce": lambda: WeightedCrossEntropy(samples_per_cls) if weighted else CrossEntropy(),
        "balanced_softmax": lambda: BalancedSoftmaxLoss(samples_per_cls),
        "logit_adjustment": lambda: LogitAdjustedLoss(samples_per_cls, tau),
        "ldam": lambda: LDAMLoss(samples_per_cls, max_margin, beta=beta),
        "ordinal": lambda: OrdinalLoss(len(samples_per_cls), ordinal_decay),
    }
    return losses[name]()
