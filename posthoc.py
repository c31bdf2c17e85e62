"""Free gains after training, fitted on the validation images only: logit adjustment and temperature scaling."""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from metrics import summary_metrics
from utils import class_shares

TAUS = np.arange(-40, 61) / 20
TEMPERATURES = (0.25, 20.0)  # of a validation that is all right, the best would be none
TINY = np.finfo(np.float32).tiny  # what float32 rounds to 0 is still the least likely, not impossible


def adjust(probabilities, samples_per_cls, tau, temperature=1.0):
    """Temperature, then post-hoc logit adjustment: softmax(z / temperature - tau log pi), z = log of `probabilities`.

    Guo et al. 2017, eq. 9; Menon et al. 2021, eq. 9 (pi: the classes' shares of the original training images; tau = 1
    takes them out, a negative tau pulls back a model that was corrected twice). probabilities: (N, C);
    samples_per_cls: (C,) -> (N, C) float32, none of them 0.
    """
    adjusted = softmax(_adjusted(probabilities, samples_per_cls, tau, temperature), axis=1)
    return np.maximum(adjusted, TINY).astype(np.float32)


def _adjusted(probabilities, samples_per_cls, tau, temperature):
    logits = np.log(np.maximum(probabilities, TINY), dtype=np.float64) / temperature
    return logits - tau * np.log(class_shares(samples_per_cls).numpy(), dtype=np.float64)


def fit(targets, probabilities, samples_per_cls, metric):
    """-> {"tau", "temperature"} for the validation images: targets (N,), probabilities (N, C).

    temperature minimises the mean negative log likelihood without tau, which would make the classes other than they
    are. tau then maximises `metric` ("balanced_acc" or "macro_f1"): 0 if that does, else the middle of the widest run
    that does.
    """

    def negative_log_likelihood(log_temperature):
        logits = _adjusted(probabilities, samples_per_cls, 0, np.exp(log_temperature))
        return -log_softmax(logits, axis=1)[np.arange(len(targets)), targets].mean()

    found = minimize_scalar(negative_log_likelihood, bounds=np.log(TEMPERATURES), method="bounded")
    temperature = float(np.exp(found.x))
    adjusted = (_adjusted(probabilities, samples_per_cls, tau, temperature) for tau in TAUS)
    values = [summary_metrics(targets, logits)[metric] for logits in adjusted]
    best = np.flatnonzero(np.isclose(values, max(values)))
    runs = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)
    widest = max(runs, key=len)
    tau = 0.0 if 0 in TAUS[best] else float(TAUS[widest[len(widest) // 2]])
    return {"tau": tau, "temperature": temperature}
