"""Paired differences between runs that were tested on the same images."""

import tracemalloc

import numpy as np
import pytest
from helpers import write_run_folder
from sklearn.metrics import balanced_accuracy_score

import study.comparison
from run.files import read_json, write_json, write_predictions
from study.comparison import EvaluatedRun, resampled_metrics
from study.run_comparison import compare_groups, read_evaluated
from study.run_records import group_records, read_record, read_records

TARGETS = np.repeat([0, 1, 2], [60, 30, 20])


def probabilities_of(seed, strength):
    scores = np.random.default_rng(seed).normal(size=(len(TARGETS), 3)) + strength * np.eye(3)[TARGETS]
    return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)


def compare(*folders):
    return compare_groups(group_records(read_records(folders)))


def test_the_difference_is_paired_image_by_image_from_the_best_on_validation(tmp_path):
    strong, weak = probabilities_of(0, 2.0), probabilities_of(1, 1.0)
    runs = [write_run_folder(tmp_path / "weak", TARGETS, weak, gamma=1.0)]
    # the same images, listed in another order
    order = np.random.default_rng(2).permutation(len(TARGETS))
    paths = [f"/nowhere/{i:04d}.png" for i in order]
    runs.append(write_run_folder(tmp_path / "strong", TARGETS[order], strong[order], paths=paths, gamma=2.0))
    paired = compare(*runs)
    assert paired.baseline.runs[0].folder.name == "strong" and not paired.left_out
    (difference,) = paired.differences
    scores = [balanced_accuracy_score(TARGETS, p.argmax(axis=1)) for p in (weak, strong)]
    assert difference.statistics["balanced_acc_difference"] == pytest.approx(scores[0] - scores[1])
    low, high = difference.statistics["balanced_acc_difference_ci"]
    assert low < scores[0] - scores[1] < high < 0 and difference.statistics["balanced_acc_p"] < 0.05


def test_runs_with_the_same_predictions_differ_by_nothing(tmp_path):
    same = probabilities_of(0, 1.0)
    paired = compare(*(write_run_folder(tmp_path / f"{g}", TARGETS, same, gamma=g) for g in (1.0, 2.0)))
    values = paired.differences[0].statistics
    assert values["balanced_acc_difference_ci"].tolist() == [0, 0] and values["balanced_acc_p"] == 1


def test_runs_are_paired_by_seed_and_images_and_the_rest_is_left_out(tmp_path):
    folders = []
    for seed in (0, 1, 2):
        paths = [f"/split_{seed}/{i}.png" for i in range(len(TARGETS))]  # each seed has its own split
        about = {"paths": paths, "seed": seed}
        folders.append(
            write_run_folder(tmp_path / f"a{seed}", TARGETS, probabilities_of(seed, 3.0), gamma=1.0, **about)
        )
        if seed != 1:
            probabilities = probabilities_of(seed + 10, 1.0)
            folders.append(write_run_folder(tmp_path / f"b{seed}", TARGETS, probabilities, gamma=2.0, **about))
    folders.append(write_run_folder(tmp_path / "c", TARGETS, probabilities_of(5, 1.0), gamma=3.0))  # other images
    paired = compare(*folders)
    (difference,) = paired.differences
    assert difference.num_pairs == 2 and difference.group.flags["gamma"] == 2.0
    assert [group.flags["gamma"] for group in paired.left_out] == [3.0]


def test_other_labels_of_the_same_images_and_other_classes_are_not_compared(tmp_path):
    probabilities = probabilities_of(0, 1.0)
    relabeled = TARGETS.copy()
    relabeled[0] = 2
    folders = [
        write_run_folder(tmp_path / "a", TARGETS, probabilities, gamma=1.0),
        write_run_folder(tmp_path / "relabeled", relabeled, probabilities, gamma=2.0),
        write_run_folder(tmp_path / "classes", TARGETS, probabilities, classes=("x", "y", "z"), gamma=3.0),
    ]
    paired = compare(*folders)
    assert not paired.differences and len(paired.left_out) == 2


def test_images_of_a_subject_are_drawn_together(tmp_path):
    """Five copies of each image under the name of its subject say no more than one."""
    few = np.repeat([0, 1, 2], [12, 9, 9])
    rng = np.random.default_rng(0)
    answers = [np.where(rng.random(len(few)) < share, few, (few + 1) % 3) for share in (0.9, 0.5)]
    widths = {}
    for copies, pattern in ((1, None), (5, r"^(\d+)_"), (5, None)):
        paths = [f"/x/{i:03d}_{k}.png" for i in range(len(few)) for k in range(copies)]
        folders = [
            write_run_folder(
                tmp_path / f"{copies}_{bool(pattern)}_{number}",
                np.repeat(few, copies),
                np.repeat(np.eye(3)[answer], copies, axis=0),
                paths=paths,
                group_regex=pattern,
                gamma=float(number),
            )
            for number, answer in enumerate(answers)
        ]
        interval = compare(*folders).differences[0].statistics["balanced_acc_difference_ci"]
        widths[copies, bool(pattern)] = np.ptp(interval)
    assert widths[5, True] == pytest.approx(widths[1, False], rel=0.1)
    assert widths[5, False] < 0.6 * widths[1, False]


def test_subjects_of_a_table_are_read_from_the_predictions(tmp_path):
    targets, paths = np.array([0, 1, 2, 0]), ["/x/d.png", "/x/b.png", "/x/c.png", "/x/a.png"]
    folder = write_run_folder(tmp_path / "run", targets, np.eye(3)[targets], paths=paths)
    columns = {"person_id": ["p1", "p2", "", "p1"]}
    write_predictions(folder / "test_predictions.csv", paths, targets, np.eye(3)[targets], list("abc"), columns)
    write_json(folder / "results.json", read_json(folder / "results.json") | {"subject_column": "person_id"})
    run = read_evaluated(read_record(folder), [])
    assert dict(zip(run.paths, run.subjects, strict=True)) == dict(
        zip(paths, ["p1", "p2", "/x/c.png", "p1"], strict=True)
    )


def test_damaged_predictions_cost_the_comparison_of_that_run_only(tmp_path, capsys):
    folders = [
        write_run_folder(tmp_path / f"{g}", TARGETS, probabilities_of(int(g), 1.0), gamma=g) for g in (1.0, 2.0, 3.0)
    ]
    (folders[0] / "test_predictions.csv").write_text("path,label\nx,y\n")
    paired = compare(*folders)
    assert len(paired.differences) == 1 and [group.flags["gamma"] for group in paired.left_out] == [1.0]
    assert "test_predictions.csv is damaged" in capsys.readouterr().out


def test_many_classes_need_little_memory(monkeypatch):
    """With 100 classes, a matrix of images x cells of the confusion matrix would take gigabytes."""
    monkeypatch.setattr(study.comparison, "RESAMPLES", 20)
    rng = np.random.default_rng(0)
    targets, predictions = rng.integers(100, size=(2, 5000))
    run = EvaluatedRun(None, {"classes": list(map(str, range(100)))}, list(map(str, range(5000))), targets, {}, [])
    tracemalloc.start()
    resampled_metrics({"a": [predictions]}, [run])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # the matrix alone would have 200 MB
