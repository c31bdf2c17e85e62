"""What is fitted on the validation images when a training has ended: temperature and logit adjustment."""

from collections.abc import Sequence

import numpy as np

from metrics import summary_metrics
from utils import class_shares

TAUS = np.arange(-40, 61) / 20
TEMPERATURES = (0.25, 20.0)  # a validation without mistakes would have no best temperature
TINY = np.finfo(np.float32).tiny  # what float32 rounds to 0 is the least likely class, not an impossible one


def adjust(
    probabilities: np.ndarray, samples_per_cls: Sequence[int], tau: float, temperature: float = 1.0
) -> np.ndarray:
    """Temperature, then post-hoc logit adjustment: softmax(z / temperature - tau log pi), z = log of `probabilities`.

    Guo et al. 2017, eq. 9; Menon et al. 2021, eq. 9 (pi: class shares of the original training images; tau = 1 removes
    them, a negative tau moves back a model that was corrected twice). probabilities: (N, C); samples_per_cls: (C,)
    -> (N, C) float32, none of them 0
    """
    from scipy.special import softmax

    adjusted = softmax(_adjusted_logits(probabilities, samples_per_cls, tau, temperature), axis=1)
    return np.maximum(adjusted, TINY).astype(np.float32)


def _adjusted_logits(probabilities, samples_per_cls, tau, temperature):
    logits = np.log(np.maximum(probabilities, TINY), dtype=np.float64) / temperature
    return logits - tau * np.log(class_shares(samples_per_cls).numpy(), dtype=np.float64)


def fit_posthoc(
    targets: np.ndarray, probabilities: np.ndarray, samples_per_cls: Sequence[int], metric: str
) -> dict[str, float]:
    """-> {"tau", "temperature"} fitted on the validation images. targets: (N,); probabilities: (N, C).

    temperature minimizes the mean negative log likelihood, without tau, which changes the class shares. tau then
    maximizes `metric` ("balanced_acc" or "macro_f1"): 0 if that is among the best, else the middle of the widest run
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
    values = [summary_metrics(targets, logits)[metric] for logits in adjusted]
    best = np.flatnonzero(np.isclose(values, max(values)))
    runs = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)
    widest = max(runs, key=len)
    tau = 0.0 if 0 in TAUS[best] else float(TAUS[widest[len(widest) // 2]])
    return {"tau": tau, "temperature": temperature}
