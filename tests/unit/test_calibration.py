"""Post-hoc logit adjustment, temperature scaling, prediction sets."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import expit, softmax

from calibration import PredictionSets, ValOutputs, adjust, correct_prior, fit_posthoc
from metrics import full_metrics, summary_metrics
from utils import FocalLoss

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
    fitted = fit_posthoc(targets, probabilities, COUNTS, ["balanced_acc"])[0]
    assert fitted["tau"] == pytest.approx(tau, abs=0.2)
    targets, probabilities = biased_predictions(tau, seed=1)
    adjusted = adjust(probabilities, COUNTS, **fitted)
    before, after = (full_metrics(targets, p, "abc", COUNTS, resamples=5) for p in (probabilities, adjusted))
    assert after["balanced_acc"] > before["balanced_acc"] + 0.03


def test_the_temperature_reduces_the_calibration_error():
    targets, probabilities = biased_predictions(0, seed=0)
    fitted = fit_posthoc(targets, probabilities, COUNTS, ["balanced_acc"])[0]
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
    fitted = fit_posthoc(targets, probabilities, COUNTS, ["balanced_acc"])[0]
    assert fitted["temperature"] == pytest.approx(1, abs=0.1) and fitted["tau"] == pytest.approx(1, abs=0.3)


def test_tau_is_zero_if_an_adjustment_gains_nothing():
    targets = np.array([0, 0, 1, 2])
    assert fit_posthoc(targets, np.eye(3)[targets] * 0.97 + 0.01, COUNTS, ["macro_f1"])[0]["tau"] == 0


# ------------------------------------------------------------------------------------------- correction of the prior


def two_gaussians(shares):
    """-> posterior (17, 2) at x = -2, -1.75 ... 2 of the classes N(-1, 1) and N(1, 1), which have these shares"""
    x = np.linspace(-2, 2, 17)
    joint = np.exp(-((x[:, None] - [-1, 1]) ** 2) / 2) * shares
    return joint / joint.sum(axis=1, keepdims=True)


def minimizer(posterior, weights, gamma):
    """What a model of unlimited capacity comes to: the minimum of the project's loss at each point. -> (N, 2)"""
    loss = FocalLoss(torch.tensor(weights), gamma)

    def probability_of_first(eta):
        def risk(logit):
            logits = torch.tensor([[logit, 0.0]] * 2, dtype=torch.float64)
            each = [loss(logits[[k]], torch.tensor([k])).item() for k in (0, 1)]
            return eta[0] * each[0] + eta[1] * each[1]

        return expit(minimize_scalar(risk, bounds=(-30, 30), method="bounded", options={"xatol": 1e-6}).x)

    first = np.array([probability_of_first(eta) for eta in posterior])
    return np.stack([first, 1 - first], axis=1)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.9, 0.1]])
def test_the_correction_gives_back_the_posterior_of_equally_common_classes(shares, gamma):
    balanced, shares, weights = two_gaussians([0.5, 0.5]), np.array(shares), np.array([0.1, 1.9])
    trained = minimizer(two_gaussians(shares), weights, gamma)
    assert np.abs(trained - balanced).max() > 0.15
    assert correct_prior(trained, shares * weights, gamma) == pytest.approx(balanced, abs=5e-3)
    if gamma == 2 and shares[0] == 0.5:  # without undoing the focal loss, the correction goes too far
        assert balanced[8, 0] == 0.5 and correct_prior(trained, weights)[8, 0] > 0.6


def test_zero_probabilities_stay_finite():
    for gamma in (0, 0.5, 2, 30):
        corrected = correct_prior(np.array([[1.0, 0.0, 0.0]]), np.array([0.1, 1, 10]), gamma)
        assert np.isfinite(corrected).all() and corrected.argmax() == 0
    adjusted = adjust(np.array([[1.0, 0.0, 0.0]]), COUNTS, 1.0)
    assert (adjusted > 0).all() and summary_metrics(np.array([0]), adjusted)["acc"] == 1


# ---------------------------------------------------------------------------------------------------- prediction sets


def outputs_of(targets, probabilities, images=None):
    targets, probabilities = np.asarray(targets), np.asarray(probabilities, dtype=np.float32)
    return ValOutputs(range(len(targets)) if images is None else images, targets, probabilities)


@pytest.mark.parametrize("coverage", ["0.07", "0.5", "0.7", "0.9", "0.95", "0.99"])
@pytest.mark.parametrize("count", [9, 10, 19, 29, 99, 100, 199])
def test_a_set_of_one_model_is_that_of_the_quantile(coverage, count):
    """Class c is in the set if its score is at most the ceil((n + 1) coverage)-th smallest of its n images."""
    rng = np.random.default_rng(count)
    probabilities = rng.integers(1, 40, size=(2 * count, 2)) / 40  # many are equal
    targets = np.repeat([0, 1], count)
    sets = PredictionSets([outputs_of(targets, probabilities)], float(coverage))
    rank = math.ceil((count + 1) * Fraction(coverage))
    if rank > count:
        assert sets.small == [0, 1]
        return
    candidates = np.float32(np.column_stack([np.arange(1, 41), np.arange(1, 41)]) / 40)
    for c in (0, 1):
        scores = np.sort(1 - np.float32(probabilities[targets == c, c]))
        assert (sets(candidates[None])[:, c] == (1 - candidates[:, c] <= scores[rank - 1])).all()


def test_sets_contain_the_truth_in_the_promised_share_of_each_class():
    """Images of the same distribution; counts that differ by a factor of 50."""
    coverage, per_class, rounds = 0.8, [1000, 100, 20], 60
    hits = np.zeros(3)
    for seed in range(rounds):
        rng = np.random.default_rng(seed)

        def draw(counts, rng=rng):
            targets = np.repeat(np.arange(3), counts)
            logits = rng.normal(size=(len(targets), 3)) + 1.5 * np.eye(3)[targets] + [3, 1, 0]  # favors class 0
            return targets, softmax(logits, axis=1).astype(np.float32)

        sets = PredictionSets([outputs_of(*draw(per_class))], coverage)
        targets, probabilities = draw([300, 300, 300])
        found = sets(probabilities[None])[np.arange(900), targets]
        hits += found.reshape(3, 300).mean(axis=1) / rounds
    assert hits[:2] == pytest.approx(coverage, abs=0.02)
    # the smallest possible share above 0.8 with 20 images is 17/21
    assert coverage - 0.02 < hits[2] < 17 / 21 + 0.03


def test_a_class_with_too_few_images_uses_the_scores_of_all_classes():
    rng = np.random.default_rng(0)
    targets = np.repeat([0, 1, 2], [60, 9, 8])
    probabilities = softmax(rng.normal(size=(77, 3)) + np.eye(3)[targets], axis=1).astype(np.float32)
    sets = PredictionSets([outputs_of(targets, probabilities)], 0.9)
    assert sets.small == [2] and sets.min_images == 9 and sets.counts == [60, 9, 8]
    scores = np.sort(probabilities[np.arange(77), targets])[::-1]
    new = softmax(rng.normal(size=(500, 3)), axis=1).astype(np.float32)
    quantile = scores[math.ceil(78 * Fraction("0.9")) - 1]
    assert (sets(new[None])[:, 2] == (new[:, 2] >= quantile)).all()
    # 9 images of class 1: the quantile is the largest of their scores
    assert (sets(new[None])[:, 1] == (new[:, 1] >= probabilities[targets == 1, 1].min())).all()


def test_without_enough_images_at_all_every_class_is_in_the_set():
    sets = PredictionSets([outputs_of([0, 1], np.eye(2))], 0.9)
    assert sets(np.array([[[1.0, 0.0]]], dtype=np.float32)).all()


def test_images_that_several_seeds_have_in_common_count_once():
    """Two models with the same outputs for the same images make the sets of one of them."""
    rng = np.random.default_rng(0)
    targets = np.repeat([0, 1], 15)
    one = outputs_of(targets, softmax(rng.normal(size=(30, 2)), axis=1))
    new = softmax(rng.normal(size=(400, 2)), axis=1).astype(np.float32)
    for coverage in (0.8, 0.9, 0.95):
        alone, twice = PredictionSets([one], coverage), PredictionSets([one, one, one], coverage)
        assert twice.counts == [15, 15]
        assert twice.small == alone.small == ([0, 1] if coverage == 0.95 else [])
        assert (alone(new[None]) == twice(np.stack([new] * 3))).all()


def test_sets_of_several_models_follow_the_formula():
    rng = np.random.default_rng(1)
    images = [list(range(40)), list(range(20, 60)), list(range(40, 80))]
    target_of = rng.integers(2, size=80)
    outputs = [outputs_of(target_of[i], softmax(rng.normal(size=(40, 2)), axis=1), i) for i in images]
    new = softmax(rng.normal(size=(3, 100, 2)), axis=2).astype(np.float32)
    sets = PredictionSets(outputs, 0.8)(new)
    for c in (0, 1):
        members = {i for i in range(80) if target_of[i] == c}
        for x in range(100):
            total = Fraction(0)
            for k, output in enumerate(outputs):
                for i, target, row in zip(*output, strict=True):
                    if target == c and 1 - row[c] >= 1 - new[k, x, c]:
                        total += Fraction(1, sum(i in model_images for model_images in images))
            assert sets[x, c] == ((total + 1) / (len(members) + 1) > Fraction("0.2"))
