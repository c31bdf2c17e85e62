"""Post-hoc logit adjustment and temperature scaling."""

import numpy as np
import pytest
from scipy.special import softmax

from calibration import adjust, fit_posthoc
from metrics import full_metrics, summary_metrics

COUNTS = [900, 90, 9]


def biased_predictions(tau, seed):
    """Predictions of a model whose logits include tau times the log shares of COUNTS and are twice too large.

    -> (targets (N,), probabilities (N, 3))
    """
    rng = np.random.default_rng(seed)
    targets = np.repeat(np.arange(3), [3000, 300, 300])
    logits = rng.normal(size=(len(targets), 3))
    logits[np.arange(len(targets)), targets] += 2
    logits += tau * np.log(np.array(COUNTS) / sum(COUNTS))
    return targets, softmax(4 * logits, axis=1)


def test_adjustment_is_the_formula_of_the_paper():
    probabilities = np.array([[0.7, 0.2, 0.1]])
    shares = np.array(COUNTS) / sum(COUNTS)
    unnormalized = probabilities ** (1 / 3) / shares**0.5
    adjusted = adjust(probabilities, COUNTS, tau=0.5, temperature=3)
    assert adjusted == pytest.approx(unnormalized / unnormalized.sum(), rel=1e-5)
    assert adjust(probabilities, COUNTS, 0) == pytest.approx(probabilities)


@pytest.mark.parametrize("tau", [0.5, -0.25])
def test_an_adjustment_fitted_on_one_set_improves_another(tau):
    """tau is negative if the model favors the rare classes."""
    targets, probabilities = biased_predictions(tau, seed=0)
    fitted = fit_posthoc(targets, probabilities, COUNTS, "balanced_acc")
    assert fitted["tau"] == pytest.approx(tau, abs=0.2)
    targets, probabilities = biased_predictions(tau, seed=1)
    adjusted = adjust(probabilities, COUNTS, **fitted)
    before, after = (full_metrics(targets, p, "abc", COUNTS, resamples=5) for p in (probabilities, adjusted))
    assert after["balanced_acc"] > before["balanced_acc"] + 0.03


def test_the_temperature_reduces_the_calibration_error():
    targets, probabilities = biased_predictions(0, seed=0)
    fitted = fit_posthoc(targets, probabilities, COUNTS, "balanced_acc")
    adjusted = adjust(probabilities, COUNTS, **fitted)
    ece_before, ece_after = (
        full_metrics(targets, p, "abc", COUNTS, resamples=5)["ece"] for p in (probabilities, adjusted)
    )
    assert ece_after < ece_before / 2


def test_a_calibrated_model_keeps_a_temperature_of_one():
    rng = np.random.default_rng(0)
    targets = np.repeat(np.arange(3), [9000, 900, 90])
    scores = rng.normal(size=(len(targets), 3)) + 2 * np.eye(3)[targets]
    probabilities = softmax(2 * scores + np.log([0.90090, 0.09009, 0.00901]), axis=1)  # Bayes' rule
    fitted = fit_posthoc(targets, probabilities, COUNTS, "balanced_acc")
    assert fitted["temperature"] == pytest.approx(1, abs=0.1) and fitted["tau"] == pytest.approx(1, abs=0.3)


def test_tau_is_zero_if_an_adjustment_gains_nothing():
    targets = np.array([0, 0, 1, 2])
    assert fit_posthoc(targets, np.eye(3)[targets] * 0.97 + 0.01, COUNTS, "macro_f1")["tau"] == 0


def test_zero_probabilities_stay_finite():
    adjusted = adjust(np.array([[1.0, 0.0, 0.0]]), COUNTS, 1.0)
    assert (adjusted > 0).all() and summary_metrics(np.array([0]), adjusted)["acc"] == 1
