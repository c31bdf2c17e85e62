import numpy as np
import pytest
from sklearn import metrics as sk

from metrics import full_metrics, precision_recall_points, recalls, summary_metrics


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


def test_precision_at_a_recall_is_the_best_at_this_recall_or_more():
    targets = np.array([1, 0, 1, 0, 1, 0])
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.1])  # precision 1 at recall 1/3, 2/3 at 2/3, 3/5 at 1
    rows = precision_recall_points(targets, np.column_stack([1 - scores, scores]), ["low", "high"], points=4)
    curve = [(recall, precision) for name, recall, precision in rows if name == "high"]
    assert curve == [pytest.approx(p) for p in [(0, 1), (1 / 3, 1), (2 / 3, 2 / 3), (1, 3 / 5)]]
    assert len(rows) == 8


def test_recall_a_class_is_of_those_that_occur():
    probabilities = np.eye(3)[[0, 0, 2, 2]]
    assert recalls(np.array([0, 2, 2, 2]), probabilities, ["a", "b", "c"]) == {"a": 1.0, "c": pytest.approx(2 / 3)}
