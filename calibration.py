"""What is fitted on the validation images: temperature, logit adjustment, and prediction sets."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from metrics import summary_metrics
from utils import class_shares

TAUS = np.arange(-40, 61) / 20
TEMPERATURES = (0.25, 20.0)  # a validation without mistakes would have no best temperature
ROUNDING = 1e-6  # of sums of weights such as 1 / 3
TINY = np.finfo(np.float32).tiny  # what float32 rounds to 0 is the least likely class, not an impossible one


def adjust(
    probabilities: np.ndarray, samples_per_cls: Sequence[int], tau: float, temperature: float = 1.0
) -> np.ndarray:
    """Temperature, then post-hoc logit adjustment: softmax(z / temperature - tau log pi), z = log of `probabilities`.

    Guo et al. 2017, eq. 9; Menon et al. 2021, eq. 9 (pi: class shares of the original training images; tau = 1 removes
    them, a negative tau moves back a model that was corrected twice). probabilities: (N, C); samples_per_cls: (C,)
    -> (N, C) float32, none of them 0
    """
    return _probabilities(_adjusted_logits(probabilities, samples_per_cls, tau, temperature))


def _probabilities(logits):
    from scipy.special import softmax

    return np.maximum(softmax(logits, axis=1), TINY).astype(np.float32)


def _adjusted_logits(probabilities, samples_per_cls, tau, temperature):
    logits = np.log(np.maximum(probabilities, TINY), dtype=np.float64) / temperature
    return logits - tau * np.log(class_shares(samples_per_cls).numpy(), dtype=np.float64)


def correct_prior(probabilities: np.ndarray, prior: np.ndarray, gamma: float = 0.0) -> np.ndarray:
    """Undo what the loss and the sampling did to the class shares: nothing is fitted. See docs/methods.md.

    A model that is trained on images whose classes have the shares s, with cross entropy and class weights w, comes to
    p(y | x) proportional to p(x | y) s_y w_y: dividing by the prior s_y w_y leaves classes that are equally common
    (King & Zeng 2001; Saerens et al. 2002). The minimum of the focal loss is at other probabilities, mostly less
    extreme ones, which is undone first: p is proportional to q / [(1 - q)^gamma - gamma (1 - q)^(gamma - 1) q log q]
    for its minimizer q (Charoenphakdee et al. 2021).

    probabilities: (N, C); prior: (C,), above 0, of any sum -> (N, C) float32
    """
    q = np.clip(probabilities.astype(np.float64), TINY, 1 - 1e-12)
    # as logarithms: a power of a small 1 - q would be 0
    log_posterior = np.log(q) - gamma * np.log1p(-q) - np.log1p(-gamma * q * np.log(q) / (1 - q))
    return _probabilities(log_posterior - np.log(prior))


def fit_posthoc(
    targets: np.ndarray, probabilities: np.ndarray, samples_per_cls: Sequence[int], metrics: Sequence[str]
) -> list[dict[str, float]]:
    """-> {"tau", "temperature"} for each metric, fitted on the validation images. targets: (N,); probabilities: (N, C).

    temperature minimizes the mean negative log likelihood, without tau, which changes the class shares. tau then
    maximizes the metric ("balanced_acc" or "macro_f1"): 0 if that is among the best, else the middle of the widest run
    of best values.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def negative_log_likelihood(log_temperature):
        logits = _adjusted_logits(probabilities, samples_per_cls, 0, np.exp(log_temperature))
        return -log_softmax(logits, axis=1)[np.arange(len(targets)), targets].mean()

    optimum = minimize_scalar(negative_log_likelihood, bounds=np.log(TEMPERATURES), method="bounded")
    temperature = float(np.exp(optimum.x))
    adjusted = (_adjusted_logits(probabilities, samples_per_cls, tau, temperature) for tau in TAUS)
    values = [summary_metrics(targets, logits) for logits in adjusted]
    taus = [_best_tau([at_tau[metric] for at_tau in values]) for metric in metrics]
    return [{"tau": tau, "temperature": temperature} for tau in taus]


def _best_tau(values):
    best = np.flatnonzero(np.isclose(values, max(values)))
    runs = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)
    widest = max(runs, key=len)
    return 0.0 if 0 in TAUS[best] else float(TAUS[widest[len(widest) // 2]])


class ValOutputs(NamedTuple):
    """Of a model on its validation images: images (N keys that tell them apart), targets (N,), probabilities (N, C)."""

    images: Sequence[Hashable]
    targets: np.ndarray
    probabilities: np.ndarray


class PredictionSets:
    """Conformal sets: the true class is in the set for at least `coverage` of the images of each class.

    Cross-conformal prediction (Vovk 2015) for the models of several seeds or of a cross-validation; with one model, it
    is split-conformal prediction with a quantile per class (Vovk et al. 2005, sec. 4.5). The nonconformity score of
    image i for class c is s_k(i, c) = 1 - the probability that model k gives c. Class c is in the set of image x if

        p_c = (1 + sum over models k and validation images i of class c: w_i [s_k(i, c) >= s_k(x, c)]) / (n_c + 1)

    is above 1 - coverage. n_c: different validation images of class c; w_i: 1 / the number of models that have image i
    among their validation images, so that an image counts once. A class with less than coverage / (1 - coverage)
    validation images has no quantile; the scores of all classes together then decide.
    """

    def __init__(self, outputs: Sequence[ValOutputs], coverage: float):
        """outputs: of each model; coverage: 0 < coverage < 1."""
        share = Fraction(str(coverage))  # exact: (n + 1) * 0.07 in binary numbers is not a whole number for n = 99
        self.min_images = math.ceil(share / (1 - share))
        self.counts, weights = _count_images(outputs)
        self.small = [c for c, count in enumerate(self.counts) if count < self.min_images]
        members = {c: [o.targets == c for o in outputs] for c in range(len(self.counts)) if c not in self.small}
        tables = {c: _score_tables(outputs, weights, chosen) for c, chosen in members.items()}
        pooled = _score_tables(outputs, weights, [np.full(len(o.targets), True) for o in outputs])
        self._tables = [tables.get(c, pooled) for c in range(len(self.counts))]
        sizes = [self.counts[c] if c in tables else sum(self.counts) for c in range(len(self.counts))]
        self._limits = [float(size - (size + 1) * share) + ROUNDING for size in sizes]

    def __call__(self, probabilities: np.ndarray) -> np.ndarray:
        """probabilities: (K, N, C), of each model -> (N, C) bool, the sets. The cost does not depend on n_c."""
        sets = np.empty(probabilities.shape[1:], dtype=bool)
        for c, (tables, limit) in enumerate(zip(self._tables, self._limits, strict=True)):
            # scores that are at least as high are those of probabilities that are at most as high
            higher = sum(
                weight_sums[np.searchsorted(scores, probabilities[k, :, c], side="right")]
                for k, (scores, weight_sums) in enumerate(tables)
            )
            sets[:, c] = higher > limit
        return sets


def _count_images(outputs):
    """-> (different images per class, [weight w_i (N,) of the images of each model])."""
    num_classes = outputs[0].probabilities.shape[1]
    if len(outputs) == 1:
        targets = outputs[0].targets
        return np.bincount(targets, minlength=num_classes).tolist(), [np.ones(len(targets))]
    keys = [list(zip(o.images, o.targets.tolist(), strict=True)) for o in outputs]
    num_models = Counter(key for model_keys in keys for key in model_keys)
    counts = np.bincount([target for _, target in num_models], minlength=num_classes).tolist()
    return counts, [np.array([1 / num_models[key] for key in model_keys]) for model_keys in keys]


def _score_tables(outputs, weights, chosen):
    """-> [(probabilities of the true class, ascending; sum of the weights of the first 0, 1, 2 ...)] of each model."""
    tables = []
    for output, weight, mask in zip(outputs, weights, chosen, strict=True):
        true_class = output.probabilities[np.arange(len(mask)), output.targets][mask]
        order = np.argsort(true_class)
        tables.append((true_class[order], np.concatenate([[0.0], np.cumsum(weight[mask][order])])))
    return tables
