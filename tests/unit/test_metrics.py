"""The definitions of scikit-learn are the reference; intervals are compared with those of a plain bootstrap."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn import metrics as sk

from metrics import INTERVAL, NORMAL_QUANTILE, Bootstrap, format_with_interval, full_metrics, recalls, summary_metrics


def one_hot(predictions, num_classes):
    return np.eye(num_classes, dtype=np.float32)[predictions]


def random_answers(rng):
    """Imbalanced targets and predictions, often without some of the classes. -> (targets, predictions, C)"""
    num_classes, num_images = rng.integers(2, 50), rng.integers(1, 400)
    shares = rng.dirichlet(np.full(num_classes, rng.choice([0.05, 0.3, 1, 10])))
    targets = rng.choice(num_classes, num_images, p=shares)
    guesses = rng.choice(num_classes, num_images, p=rng.dirichlet(np.full(num_classes, 0.5)))
    return targets, np.where(rng.random(num_images) < rng.random(), targets, guesses), num_classes


@pytest.fixture
def answers():
    rng = np.random.default_rng(0)
    targets = rng.choice(4, 300, p=[0.7, 0.2, 0.07, 0.03])
    predictions = np.where(rng.random(300) < 0.6, targets, rng.integers(0, 4, 300))
    return targets, predictions


def test_summary_and_recalls_equal_scikit_learn_to_the_last_bit():
    """A rounding error must not decide which epoch is the best one."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        targets, predictions, num_classes = random_answers(rng)
        probabilities, present = one_hot(predictions, num_classes), np.unique(targets)
        assert summary_metrics(targets, probabilities) == {
            "acc": sk.accuracy_score(targets, predictions),
            "balanced_acc": sk.recall_score(targets, predictions, labels=present, average="macro", zero_division=0),
            "macro_f1": sk.f1_score(targets, predictions, average="macro", zero_division=0),
        }
        expected = sk.recall_score(targets, predictions, labels=present, average=None, zero_division=0)
        names = [f"grade {c}" for c in range(num_classes)]
        found = recalls(targets, probabilities, names)
        assert list(found) == [names[c] for c in present] and list(found.values()) == expected.tolist()


def test_balanced_accuracy_is_scikit_learns(answers):
    targets, predictions = answers
    expected = sk.balanced_accuracy_score(targets, predictions)
    assert summary_metrics(targets, one_hot(predictions, 4))["balanced_acc"] == pytest.approx(expected)


def test_always_predicting_the_largest_class_is_accurate_and_at_chance_when_balanced():
    targets = np.repeat([0, 1, 2, 3], [970, 10, 10, 10])
    metrics = summary_metrics(targets, one_hot(np.zeros(1000, dtype=int), 4))
    assert metrics["acc"] == 0.97
    assert metrics["balanced_acc"] == 0.25


@pytest.mark.filterwarnings("error")
def test_a_class_without_test_images_does_not_count_in_balanced_accuracy():
    metrics = summary_metrics(np.array([0, 0, 1]), one_hot([0, 2, 1], 3))
    assert metrics["balanced_acc"] == pytest.approx(0.75)


def test_values_are_printed_with_their_intervals():
    assert format_with_interval(0.1234, [0.1, 0.15]) == "0.123 [0.100, 0.150]"
    assert format_with_interval(0.1234) == format_with_interval(0.1234, None) == "0.123"


def test_per_class_metrics_and_confusion_matrix(answers):
    targets, predictions = answers
    metrics = full_metrics(targets, one_hot(predictions, 4), ["0", "1", "2", "3"], [9, 9, 9, 9])
    matrix = np.array(metrics["confusion_matrix"])
    np.testing.assert_array_equal(matrix, sk.confusion_matrix(targets, predictions))
    for c in range(4):
        row = metrics["per_class"][str(c)]
        assert row["support"] == (targets == c).sum() == matrix[c].sum()
        assert row["recall"] == pytest.approx(matrix[c, c] / matrix[c].sum())
        assert row["precision"] == pytest.approx(matrix[c, c] / matrix[:, c].sum())
        assert "subjects" not in row


def test_recall_is_of_the_classes_that_occur():
    probabilities = np.eye(3)[[0, 0, 2, 2]]
    assert recalls(np.array([0, 2, 2, 2]), probabilities, ["a", "b", "c"]) == {"a": 1.0, "c": pytest.approx(2 / 3)}


# ------------------------------------------------------------------------------------------------- a whole evaluation


@pytest.fixture
def graded():
    """Probabilities with ties, of 300 images in 4 classes. -> (targets, probabilities)"""
    rng = np.random.default_rng(1)
    targets = rng.choice(4, 300, p=[0.7, 0.2, 0.07, 0.03])
    logits = rng.normal(size=(300, 4)).round(1)
    logits[np.arange(300), targets] += 1.5
    return targets, (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)


def test_every_metric_agrees_with_scikit_learn(graded):
    targets, probabilities = graded
    predictions = probabilities.argmax(axis=1)
    metrics = full_metrics(targets, probabilities, "abcd", [500, 100, 20, 19], ordinal=True, resamples=10)
    assert metrics["quadratic_kappa"] == pytest.approx(sk.cohen_kappa_score(targets, predictions, weights="quadratic"))
    assert metrics["correlation"] == pytest.approx(np.corrcoef(targets, predictions)[0, 1])
    assert metrics["mae"] == pytest.approx(sk.mean_absolute_error(targets, predictions))
    off = np.abs(targets - predictions)
    expected = {"exact": off == 0, "within_1": off <= 1, "within_2": off <= 2}
    assert {name: metrics[name] for name in expected} == pytest.approx({k: v.mean() for k, v in expected.items()})
    expected = summary_metrics(targets, probabilities)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    recall = sk.recall_score(targets, predictions, average=None)
    assert metrics["many_shot_acc"] == pytest.approx(recall[0])
    assert metrics["medium_shot_acc"] == pytest.approx(recall[1:3].mean())
    assert metrics["few_shot_acc"] == pytest.approx(recall[3])
    for c, row in enumerate(metrics["per_class"].values()):
        scores, is_class = probabilities[:, c], targets == c
        assert row["auroc"] == pytest.approx(sk.roc_auc_score(is_class, scores))
        assert row["average_precision"] == pytest.approx(sk.average_precision_score(is_class, scores))
        assert row["f1"] == pytest.approx(sk.f1_score(is_class, predictions == c))


def test_calibration_error_by_hand():
    # two images in the bin of 0.6, one of them correct: off by 0.1; one with 1.0, correct
    probabilities = np.array([[0.6, 0.4], [0.4, 0.6], [1.0, 0.0]], np.float32)
    metrics = full_metrics(np.array([0, 0, 0]), probabilities, "ab", [5, 5], resamples=2)
    assert metrics["ece"] == pytest.approx(2 / 3 * 0.1, abs=1e-6)


def test_intervals_are_those_of_a_bootstrap_stratified_by_class(graded):
    """Compared with scikit-learn on one resample after another."""
    targets, probabilities = graded
    metrics = full_metrics(targets, probabilities, "abcd", [9, 9, 9, 9], resamples=2000)
    rng, drawn = np.random.default_rng(5), []
    members = [np.flatnonzero(targets == c) for c in range(4)]
    for _ in range(1000):
        chosen = np.concatenate([rng.choice(images, len(images)) for images in members])
        auroc = sk.roc_auc_score(targets[chosen] == 3, probabilities[chosen, 3])
        drawn.append([*summary_metrics(targets[chosen], probabilities[chosen]).values(), auroc])
    expected = np.percentile(drawn, [2.5, 97.5], axis=0).T
    ours = [metrics[f"{name}_ci"] for name in ("acc", "balanced_acc", "macro_f1")]
    np.testing.assert_allclose([*ours, metrics["per_class"]["d"]["auroc_ci"]], expected, atol=0.015)


def test_subjects_are_drawn_with_all_their_images(graded):
    """Four copies of the photograph of a subject are no more evidence than one."""
    targets, probabilities = graded
    once = full_metrics(targets, probabilities, "abcd", [9, 9, 9, 9])
    targets, probabilities, subjects = (np.repeat(array, 4, axis=0) for array in (*graded, np.arange(300)))
    by_subject = full_metrics(targets, probabilities, "abcd", [9, 9, 9, 9], subjects=subjects)
    for row in by_subject["per_class"].values():
        assert row["support"] == 4 * row["subjects"] > 0
    by_image = full_metrics(targets, probabilities, "abcd", [9, 9, 9, 9])
    for name in ("acc", "balanced_acc", "nll"):
        width, subject_width, image_width = (np.ptp(metrics[f"{name}_ci"]) for metrics in (once, by_subject, by_image))
        assert subject_width == pytest.approx(width, rel=0.15)
        assert image_width == pytest.approx(width / 2, rel=0.15)


def test_a_subject_with_several_classes_is_drawn_with_the_rarest():
    targets = np.array([0, 0, 0, 0, 0, 1, 0, 1])
    bootstrap = Bootstrap(targets, np.array([7, 7, 8, 8, 9, 9, 5, 6]))
    drawn = bootstrap.draw(200, np.random.default_rng(0))
    assert (drawn[:, [0, 2, 4]] == drawn[:, [1, 3, 5]]).all()
    assert (drawn[:, [5, 7]].sum(axis=1) == 2).all() and (drawn[:, [0, 2, 6]].sum(axis=1) == 3).all()


def test_a_recall_of_zero_has_an_interval_of_positive_width():
    """Wilson 1927: after 0 correct of 8, up to z^2 / (n + z^2)."""
    targets = np.repeat([0, 1], [50, 8])
    metrics = full_metrics(targets, one_hot([0] * 58, 2), "ab", [9, 9], resamples=50)
    assert metrics["per_class"]["b"]["recall_ci"] == [0, pytest.approx(1.96**2 / (8 + 1.96**2), abs=1e-3)]
    assert metrics["per_class"]["a"]["recall_ci"][0] == pytest.approx(50 / (50 + 1.96**2), abs=1e-3)


def test_the_quantile_of_wilsons_interval_is_that_of_the_normal_distribution():
    assert norm.ppf(INTERVAL[1] / 100) == NORMAL_QUANTILE


def test_two_subjects_give_an_interval_of_recall_as_wide_as_two_images():
    targets, subjects = np.repeat([0, 1], [50, 40]), np.r_[np.arange(50), 50 + np.arange(40) // 20]
    metrics = full_metrics(targets, one_hot([0] * 90, 2), "ab", [9, 9], subjects=subjects, resamples=50)
    assert metrics["per_class"]["b"]["recall_ci"] == [0, pytest.approx(1.96**2 / (2 + 1.96**2), abs=1e-3)]


def test_the_calibration_error_lies_in_its_interval():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 800)
    targets = (rng.random((800, 1)) > probabilities.cumsum(axis=1)).sum(axis=1)
    metrics = full_metrics(targets, probabilities, "abc", [9, 9, 9], resamples=200)
    low, high = metrics["ece_ci"]
    assert 0 <= low < metrics["ece"] < high
    assert (low + high) / 2 == pytest.approx(metrics["ece"], abs=(high - low) / 10)
    assert metrics["nll"] == pytest.approx(sk.log_loss(targets, probabilities))


def test_intervals_do_not_depend_on_the_number_of_threads(graded, monkeypatch):
    several = full_metrics(*graded, "abcd", [9, 9, 9, 9], resamples=50)
    monkeypatch.setattr("metrics.num_cores", lambda: 1)
    assert full_metrics(*graded, "abcd", [9, 9, 9, 9], resamples=50) == several


@pytest.mark.filterwarnings("error")
def test_a_class_that_does_not_occur_has_no_metrics():
    metrics = full_metrics(np.array([0, 0, 1]), one_hot([0, 2, 1], 3), "abc", [9, 9, 9], ordinal=True, resamples=5)
    assert metrics["per_class"]["c"]["recall"] is None and metrics["per_class"]["c"]["auroc_ci"] is None
    assert metrics["balanced_acc"] == pytest.approx(0.75)


@pytest.mark.filterwarnings("error")
def test_a_single_class_cannot_be_ranked():
    metrics = full_metrics(np.array([1, 1, 1]), one_hot([1, 0, 1], 2), "ab", [9, 9], resamples=5)
    assert metrics["per_class"]["b"]["auroc"] is metrics["per_class"]["b"]["average_precision_ci"] is None
    assert metrics["per_class"]["b"]["recall"] == metrics["balanced_acc"] == pytest.approx(2 / 3)


@pytest.mark.filterwarnings("error")
def test_agreement_is_zero_if_all_images_are_of_one_grade():
    metrics = full_metrics(np.array([1, 1]), one_hot([1, 1], 3), "abc", [9, 9, 9], ordinal=True, resamples=5)
    assert metrics["quadratic_kappa"] == metrics["correlation"] == 0 and metrics["acc"] == 1
