import numpy as np
import pytest
from scipy.special import softmax

import posthoc
from metrics import full_metrics, summary_metrics

COUNTS = [900, 90, 9]


def biased(tau, seed):
    """Of a model with tau times the log shares of COUNTS in its logits, which are twice as large as they should be."""
    rng = np.random.default_rng(seed)
    targets = np.repeat(np.arange(3), [3000, 300, 300])
    logits = rng.normal(size=(len(targets), 3))
    logits[np.arange(len(targets)), targets] += 2
    logits += tau * np.log(np.array(COUNTS) / sum(COUNTS))
    return targets, softmax(4 * logits, axis=1)


def test_adjusting_is_the_papers_formula():
    probabilities = np.array([[0.7, 0.2, 0.1]])
    shares = np.array(COUNTS) / sum(COUNTS)
    by_hand = probabilities ** (1 / 3) / shares**0.5
    adjusted = posthoc.adjust(probabilities, COUNTS, tau=0.5, temperature=3)
    assert adjusted == pytest.approx(by_hand / by_hand.sum(), rel=1e-5)
    assert posthoc.adjust(probabilities, COUNTS, 0) == pytest.approx(probabilities)


@pytest.mark.parametrize("tau", [0.5, -0.25])
def test_what_is_fitted_on_one_set_helps_on_another(tau):
    """Also where the model favours the small classes: tau is negative then."""
    targets, probabilities = biased(tau, seed=0)
    fitted = posthoc.fit(targets, probabilities, COUNTS, "balanced_acc")
    assert fitted["tau"] == pytest.approx(tau, abs=0.2)
    targets, probabilities = biased(tau, seed=1)
    adjusted = posthoc.adjust(probabilities, COUNTS, **fitted)
    raw, after = (full_metrics(targets, p, "abc", COUNTS, resamples=5) for p in (probabilities, adjusted))
    assert after["balanced_acc"] > raw["balanced_acc"] + 0.03


def test_the_temperature_calibrates():
    targets, probabilities = biased(0, seed=0)
    tau_and_temperature = posthoc.fit(targets, probabilities, COUNTS, "balanced_acc")
    adjusted = posthoc.adjust(probabilities, COUNTS, **tau_and_temperature)
    raw, after = (full_metrics(targets, p, "abc", COUNTS, resamples=5)["ece"] for p in (probabilities, adjusted))
    assert after < raw / 2


def test_a_calibrated_model_is_left_as_sure_as_it_is_whatever_tau():
    rng = np.random.default_rng(0)
    targets = np.repeat(np.arange(3), [9000, 900, 90])
    scores = rng.normal(size=(len(targets), 3)) + 2 * np.eye(3)[targets]
    probabilities = softmax(2 * scores + np.log([0.90090, 0.09009, 0.00901]), axis=1)  # by Bayes
    fitted = posthoc.fit(targets, probabilities, COUNTS, "balanced_acc")
    assert fitted["temperature"] == pytest.approx(1, abs=0.1) and fitted["tau"] == pytest.approx(1, abs=0.3)


def test_where_nothing_is_gained_nothing_is_adjusted():
    targets = np.array([0, 0, 1, 2])
    assert posthoc.fit(targets, np.eye(3)[targets] * 0.97 + 0.01, COUNTS, "macro_f1")["tau"] == 0


def test_impossible_probabilities_stay_finite():
    adjusted = posthoc.adjust(np.array([[1.0, 0.0, 0.0]]), COUNTS, 1.0)
    assert (adjusted > 0).all() and summary_metrics(np.array([0]), adjusted)["acc"] == 1
