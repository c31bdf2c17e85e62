import numpy as np
import pytest
from sklearn import metrics as sk

from metrics import full_metrics, summary_metrics


def one_hot(predictions, classes):
    return np.eye(classes, dtype=np.float32)[predictions]


@pytest.fixture
def answers():
    rng = np.random.default_rng(0)
    targets = rng.choice(4, 300, p=[0.7, 0.2, 0.07, 0.03])
    predictions = np.where(rng.random(300) < 0.6, targets, rng.integers(0, 4, 300))
    return targets, predictions


def test_summary_follows_scikit_learns_definitions(answers):
    targets, predictions = answers
    ours = summary_metrics(targets, one_hot(predictions, 4))
    assert ours == pytest.approx(
        {
            "acc": sk.accuracy_score(targets, predictions),
            "balanced_acc": sk.balanced_accuracy_score(targets, predictions),
            "macro_f1": sk.f1_score(targets, predictions, average="macro"),
        }
    )


def test_always_the_largest_class_looks_accurate_and_is_at_chance_when_balanced():
    targets = np.repeat([0, 1, 2, 3], [970, 10, 10, 10])
    figures = summary_metrics(targets, one_hot(np.zeros(1000, dtype=int), 4))
    assert figures["acc"] == 0.97
    assert figures["balanced_acc"] == 0.25


@pytest.mark.filterwarnings("error")
def test_a_class_that_a_test_set_lacks_does_not_count_in_balanced_accuracy():
    figures = summary_metrics(np.array([0, 0, 1]), one_hot([0, 2, 1], 3))
    assert figures["balanced_acc"] == pytest.approx(0.75)


def test_per_class_figures_and_confusion_matrix(answers):
    targets, predictions = answers
    figures = full_metrics(targets, one_hot(predictions, 4), ["0", "1", "2", "3"])
    matrix = np.array(figures["confusion_matrix"])
    assert matrix.sum() == 300
    for c in range(4):
        row = figures["per_class"][str(c)]
        assert row["support"] == (targets == c).sum() == matrix[c].sum()
        assert row["recall"] == pytest.approx(matrix[c, c] / matrix[c].sum())
        assert row["precision"] == pytest.approx(matrix[c, c] / matrix[:, c].sum())
