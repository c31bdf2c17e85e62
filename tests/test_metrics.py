import numpy as np
import pytest
from sklearn import metrics as sk

from metrics import Bootstrap, full_metrics, precision_recall_points, recalls, summary_metrics


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
    figures = full_metrics(targets, one_hot(predictions, 4), ["0", "1", "2", "3"], [9, 9, 9, 9])
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


# ------------------------------------------------------------------------------------------- of a whole evaluation


@pytest.fixture
def graded():
    """Graded probabilities with ties, of 300 images in 4 classes. -> (targets, probabilities)"""
    rng = np.random.default_rng(1)
    targets = rng.choice(4, 300, p=[0.7, 0.2, 0.07, 0.03])
    logits = rng.normal(size=(300, 4)).round(1)
    logits[np.arange(300), targets] += 1.5
    return targets, (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)


def test_every_figure_is_scikit_learns(graded):
    targets, probabilities = graded
    predictions = probabilities.argmax(axis=1)
    figures = full_metrics(targets, probabilities, "abcd", [500, 100, 20, 19], ordinal=True, resamples=10)
    assert figures["quadratic_kappa"] == pytest.approx(sk.cohen_kappa_score(targets, predictions, weights="quadratic"))
    assert figures["correlation"] == pytest.approx(np.corrcoef(targets, predictions)[0, 1])
    assert figures["mae"] == pytest.approx(sk.mean_absolute_error(targets, predictions))
    off = np.abs(targets - predictions)
    expected = {"exact": off == 0, "within_1": off <= 1, "within_2": off <= 2}
    assert {name: figures[name] for name in expected} == pytest.approx({k: v.mean() for k, v in expected.items()})
    expected = summary_metrics(targets, probabilities)
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    recall = sk.recall_score(targets, predictions, average=None)
    assert figures["many_shot_acc"] == pytest.approx(recall[0])
    assert figures["medium_shot_acc"] == pytest.approx(recall[1:3].mean())
    assert figures["few_shot_acc"] == pytest.approx(recall[3])
    for c, row in enumerate(figures["per_class"].values()):
        scores, is_class = probabilities[:, c], targets == c
        assert row["auroc"] == pytest.approx(sk.roc_auc_score(is_class, scores))
        assert row["average_precision"] == pytest.approx(sk.average_precision_score(is_class, scores))
        assert row["f1"] == pytest.approx(sk.f1_score(is_class, predictions == c))


def test_calibration_error_by_hand():
    # two images in the bin of 0.6, one of them right: off by 0.1; one sure and right
    probabilities = np.array([[0.6, 0.4], [0.4, 0.6], [1.0, 0.0]], np.float32)
    figures = full_metrics(np.array([0, 0, 0]), probabilities, "ab", [5, 5], resamples=2)
    assert figures["ece"] == pytest.approx(2 / 3 * 0.1, abs=1e-6)


def test_intervals_are_those_of_a_bootstrap_stratified_by_class(graded):
    """Against resampling by scikit-learn, one draw after the other."""
    targets, probabilities = graded
    figures = full_metrics(targets, probabilities, "abcd", [9, 9, 9, 9], resamples=2000)
    rng, drawn = np.random.default_rng(5), []
    members = [np.flatnonzero(targets == c) for c in range(4)]
    for _ in range(1000):
        chosen = np.concatenate([rng.choice(of_class, len(of_class)) for of_class in members])
        auroc = sk.roc_auc_score(targets[chosen] == 3, probabilities[chosen, 3])
        drawn.append([*summary_metrics(targets[chosen], probabilities[chosen]).values(), auroc])
    expected = np.percentile(drawn, [2.5, 97.5], axis=0).T
    ours = [figures[f"{name}_ci"] for name in ("acc", "balanced_acc", "macro_f1")]
    np.testing.assert_allclose([*ours, figures["per_class"]["d"]["auroc_ci"]], expected, atol=0.015)


def test_persons_are_drawn_with_all_their_images(graded):
    """Four times the same photograph of a person tell no more than one."""
    targets, probabilities = graded
    once = full_metrics(targets, probabilities, "abcd", [9, 9, 9, 9])
    targets, probabilities, persons = (np.repeat(of, 4, axis=0) for of in (*graded, np.arange(300)))
    as_persons = full_metrics(targets, probabilities, "abcd", [9, 9, 9, 9], groups=persons)
    as_images = full_metrics(targets, probabilities, "abcd", [9, 9, 9, 9])
    for name in ("acc", "balanced_acc", "nll"):
        width, of_persons, of_images = (np.ptp(of[f"{name}_ci"]) for of in (once, as_persons, as_images))
        assert of_persons == pytest.approx(width, rel=0.15) and of_images == pytest.approx(width / 2, rel=0.15)


def test_a_person_of_several_classes_is_drawn_with_the_rarest():
    targets = np.array([0, 0, 0, 0, 0, 1, 0, 1])
    bootstrap = Bootstrap(targets, np.array([7, 7, 8, 8, 9, 9, 5, 6]))
    drawn = bootstrap.draw(200, np.random.default_rng(0))
    assert (drawn[:, [0, 2, 4]] == drawn[:, [1, 3, 5]]).all()
    assert (drawn[:, [5, 7]].sum(axis=1) == 2).all() and (drawn[:, [0, 2, 6]].sum(axis=1) == 3).all()


def test_no_interval_is_sure_of_a_recall_of_nothing():
    """Wilson 1927: of 0 right ones of 8, up to z^2 / (n + z^2)."""
    targets = np.repeat([0, 1], [50, 8])
    figures = full_metrics(targets, one_hot([0] * 58, 2), "ab", [9, 9], resamples=50)
    assert figures["per_class"]["b"]["recall_ci"] == [0, pytest.approx(1.96**2 / (8 + 1.96**2), abs=1e-3)]
    assert figures["per_class"]["a"]["recall_ci"][0] == pytest.approx(50 / (50 + 1.96**2), abs=1e-3)


def test_of_persons_an_interval_of_recall_is_as_wide_as_of_so_many_images():
    targets, groups = np.repeat([0, 1], [50, 40]), np.r_[np.arange(50), 50 + np.arange(40) // 20]
    figures = full_metrics(targets, one_hot([0] * 90, 2), "ab", [9, 9], groups=groups, resamples=50)
    assert figures["per_class"]["b"]["recall_ci"] == [0, pytest.approx(1.96**2 / (2 + 1.96**2), abs=1e-3)]


def test_the_calibration_error_lies_in_its_interval():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 800)
    targets = (rng.random((800, 1)) > probabilities.cumsum(axis=1)).sum(axis=1)
    figures = full_metrics(targets, probabilities, "abc", [9, 9, 9], resamples=200)
    low, high = figures["ece_ci"]
    assert 0 <= low < figures["ece"] < high
    assert figures["nll"] == pytest.approx(sk.log_loss(targets, probabilities))


def test_intervals_do_not_depend_on_the_number_of_threads(graded, monkeypatch):
    several = full_metrics(*graded, "abcd", [9, 9, 9, 9], resamples=50)
    monkeypatch.setattr("metrics.cpu_count", lambda: 1)
    assert full_metrics(*graded, "abcd", [9, 9, 9, 9], resamples=50) == several


@pytest.mark.filterwarnings("error")
def test_a_class_that_does_not_occur_has_no_figures():
    figures = full_metrics(np.array([0, 0, 1]), one_hot([0, 2, 1], 3), "abc", [9, 9, 9], ordinal=True, resamples=5)
    assert figures["per_class"]["c"]["recall"] is None and figures["per_class"]["c"]["auroc_ci"] is None
    assert figures["balanced_acc"] == pytest.approx(0.75)


@pytest.mark.filterwarnings("error")
def test_of_one_class_alone_nothing_can_be_ranked():
    figures = full_metrics(np.array([1, 1, 1]), one_hot([1, 0, 1], 2), "ab", [9, 9], resamples=5)
    assert figures["per_class"]["b"]["auroc"] is figures["per_class"]["b"]["average_precision_ci"] is None
    assert figures["per_class"]["b"]["recall"] == figures["balanced_acc"] == pytest.approx(2 / 3)


@pytest.mark.filterwarnings("error")
def test_where_all_is_of_one_grade_agreement_is_nothing():
    figures = full_metrics(np.array([1, 1]), one_hot([1, 1], 3), "abc", [9, 9, 9], ordinal=True, resamples=5)
    assert figures["quadratic_kappa"] == figures["correlation"] == 0 and figures["acc"] == 1
