"""The statistics of an ablation: intervals, paired differences, p values."""

import json

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from run.cli import UserError
from run.files import read_rows, write_predictions
from study.ablation import MethodRun
from study.comparison import RESAMPLES, compare_methods, holm, markdown, read_run, read_runs, resampled_metrics


def test_resampled_metrics_are_those_of_scikit_learn(tmp_path):
    rng = np.random.default_rng(0)
    targets, predictions = rng.integers(3, size=(2, 300))
    run = read_run(finished_run(tmp_path / "a", "a", 0, targets, np.eye(3)[predictions]))
    metrics = resampled_metrics({"a": [run.predictions["raw"]]}, [run])["a"]
    assert metrics["balanced_acc"][0] == pytest.approx(balanced_accuracy_score(targets, predictions))
    assert metrics["macro_f1"][0] == pytest.approx(f1_score(targets, predictions, average="macro"))
    # stratified: the recall of n images with probability p has variance p (1 - p) / n
    recalls = [np.mean(predictions[targets == c] == c) for c in range(3)]
    variance = sum(p * (1 - p) / (targets == c).sum() for c, p in enumerate(recalls)) / 9
    assert metrics["balanced_acc"][1:].std() == pytest.approx(variance**0.5, rel=0.05)
    assert metrics["balanced_acc"].shape == (1 + RESAMPLES, 1)


@pytest.mark.parametrize("path, group_regex", [("{number}.png", None), ("{seed}/{number}_{seed}.png", r"^(\d+)_")])
def test_more_seeds_on_the_same_images_or_subjects_do_not_narrow_the_interval(tmp_path, path, group_regex):
    targets = np.repeat([0, 1, 2], [40, 20, 15])
    probabilities = probabilities_of(np.random.default_rng(0), targets, 1.0)
    about = {"path": path, "group_regex": group_regex}
    runs = [finished_run(tmp_path / f"{seed}", "a", seed, targets, probabilities, **about) for seed in range(6)]
    widths = [np.ptp(compare_methods(read_runs(chosen), "a")[0]["balanced_acc_ci"]) for chosen in (runs[:1], runs)]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)


def test_seeds_that_differ_widen_the_interval_as_in_a_z_test_of_their_mean(tmp_path):
    """With very many images, the standard error is that of the mean over the seeds."""
    targets, runs, rng = np.repeat([0, 1, 2], 4000), [], np.random.default_rng(0)
    accuracies = (0.5, 0.6, 0.9, 0.7)
    for seed, accuracy in enumerate(accuracies):
        right = rng.random(len(targets)) < accuracy
        probabilities = np.eye(3)[np.where(right, targets, (targets + 1) % 3)] * 0.9 + 0.03
        runs.append(finished_run(tmp_path / f"{seed}", "a", seed, targets, probabilities))
    (row, *_) = compare_methods(read_runs(runs), "a")
    standard_error = np.std(accuracies, ddof=1) / 2
    assert np.ptp(row["balanced_acc_ci"]) == pytest.approx(2 * 1.96 * standard_error, rel=0.08)


def test_holm_corrects_for_the_number_of_tests():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])


def finished_run(folder, method, seed, targets, probabilities, tau=0.0, path="{seed}/{number}.png", group_regex=None):
    """A folder with the files that `read_run` reads. -> MethodRun"""
    folder.mkdir(parents=True)
    classes = ["a", "b", "c"]
    is_correct = probabilities.argmax(axis=1) == targets
    recall = {name: {"recall": float(is_correct[targets == c].mean())} for c, name in enumerate(classes)}
    results = {
        "classes": classes,
        "samples_per_cls": [400, 150, 50],
        "posthoc": {"tau": tau, "temperature": 1.0, "test": {"balanced_acc": 0.5}},
        "test": {"per_class": recall},
        "val": {"balanced_acc": 0.5},
    }
    (folder / "args.json").write_text(json.dumps({"group_regex": group_regex}))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "history.csv").write_text("epoch,seconds\n0,30\n1,90\n")
    paths = [path.format(seed=seed, number=number) for number in range(len(targets))]
    write_predictions(folder / "test_predictions.csv", paths, targets, probabilities, classes)
    return MethodRun(method, seed, [], folder)


def probabilities_of(rng, targets, strength):
    scores = rng.normal(size=(len(targets), 3)) + strength * np.eye(3)[targets]
    return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)


def test_differences_are_paired_and_tested_against_the_baseline(tmp_path):
    rng = np.random.default_rng(0)
    runs = []
    for seed in (0, 1):
        targets = np.repeat([0, 1, 2], [400, 150, 50])
        weak = probabilities_of(rng, targets, 1.0)
        chosen = {"weak": weak, "the same": weak, "as good": probabilities_of(rng, targets, 1.0)}
        chosen["strong"] = probabilities_of(rng, targets, 2.0)
        for name, probabilities in chosen.items():
            runs.append(finished_run(tmp_path / f"{name}{seed}", name, seed, targets, probabilities, tau=1.0))
    table = {row["method"]: row for row in compare_methods(read_runs(runs), "weak")}
    assert list(table) == ["weak", "weak, post-hoc logit adjustment", "the same", "as good", "strong"]
    assert table["the same"]["balanced_acc_difference"] == 0 and table["the same"]["balanced_acc_p"] == 1
    low, high = table["as good"]["balanced_acc_difference_ci"]
    assert low < 0 < high and table["as good"]["balanced_acc_p"] > 0.05
    strong = table["strong"]
    assert strong["balanced_acc_difference_ci"][0] > 0.05 and strong["balanced_acc_p"] <= 8 / RESAMPLES
    means = [balanced_accuracy_score(*read_targets_and_predictions(run)) for run in runs if run.method == "strong"]
    assert strong["balanced_acc"] == pytest.approx(np.mean(means))
    assert strong["balanced_acc_agreeing"] == 2
    assert strong["balanced_acc_std"] == pytest.approx(np.std(means, ddof=1))
    assert strong["minutes"] == 2.0 and list(strong["recalls"]) == ["c", "b", "a"]
    # tau = 1 removes the class shares from scores that do not contain them: rare classes are predicted too often
    assert table["weak, post-hoc logit adjustment"]["balanced_acc"] != table["weak"]["balanced_acc"]
    text = markdown(list(table.values()), "weak", [0, 1])
    assert "a bootstrap over images (stratified" in text
    assert "over subjects, each with all its images (s" in markdown(list(table.values()), "weak", [0, 1], True)
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    for row in table.values():
        row["recalls"] = row["recalls"] and {"a|b": 0.5, "c\nd": 0.5}
    lines = [line for line in markdown(list(table.values()), "weak", [0, 1]).splitlines() if line.startswith("|")]
    assert len(lines) == 7 and len({line.replace("\\|", "").count("|") for line in lines}) == 1


def read_targets_and_predictions(run):
    rows = read_rows(run.folder / "test_predictions.csv")
    return [row["label"] for row in rows], [row["prediction"] for row in rows]


def test_runs_on_other_images_are_not_compared(tmp_path):
    targets = np.repeat([0, 1, 2], 10)
    probabilities = probabilities_of(np.random.default_rng(0), targets, 1.0)
    left = finished_run(tmp_path / "left", "left", 0, targets, probabilities)
    right = finished_run(tmp_path / "right", "right", 1, targets, probabilities)
    right.seed = 0
    with pytest.raises(UserError, match="not tested on the same images"):
        read_runs([left, right])
