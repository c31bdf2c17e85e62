"""Paired differences between groups of runs that were tested on the same images."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from run.cli import UserError
from run.files import read_predictions
from study.ablation import MethodRun
from study.comparison import EvaluatedRun, compare_predictions, correct_p_values
from study.out_of_fold import tested_subjects
from study.run_records import RunGroup, RunRecord


@dataclass
class PairedDifference:
    """A group compared with the baseline. statistics: a row of `compare_predictions`."""

    group: RunGroup
    num_pairs: int
    statistics: dict


@dataclass
class PairedComparison:
    """baseline: the group that the others are compared with, None if no run has predictions; left_out: other groups."""

    baseline: RunGroup | None
    differences: list[PairedDifference]
    left_out: list[RunGroup]


def compare_groups(groups: Sequence[RunGroup]) -> PairedComparison:
    """Compare each group with the first one whose predictions can be read, run by run on the same test images.

    Runs are paired by their test images, those of the same seed and fold first. A group without a run that was tested
    on the images of a run of the baseline is left out.
    """
    known_images = []
    evaluated = [_read_group(group, known_images) for group in groups]
    baseline = next((i for i, runs in enumerate(evaluated) if runs), None)
    if baseline is None:
        return PairedComparison(None, [], list(groups))
    buckets, left_out = {}, []  # groups that share their pairs share the resamples
    for number, runs in enumerate(evaluated):
        if number == baseline:
            continue
        pairs = _pair(evaluated[baseline], runs)
        if pairs:
            buckets.setdefault(tuple(left for left, _ in pairs), {})[number] = [runs[right] for _, right in pairs]
        else:
            left_out.append(groups[number])
    rows = {}
    for lefts, members in buckets.items():
        base_runs = [evaluated[baseline][left] for left in lefts]
        for row in _compare_bucket(base_runs, members):
            rows[row["method"]] = PairedDifference(groups[row["method"]], len(lefts), row)
    differences = [rows[number] for number in sorted(rows)]
    correct_p_values([difference.statistics for difference in differences])
    return PairedComparison(groups[baseline], differences, left_out)


def _read_group(group, known_images):
    """-> the runs of the group whose predictions can be read"""
    runs = []
    for run in group.runs:
        if not run.classes() or not (run.folder / "test_predictions.csv").exists():
            continue
        try:
            runs.append(read_evaluated(run, known_images))
        except (UserError, OSError) as error:
            print(f"warning: {run.folder} is not compared image by image ({error})")
    return runs


def read_evaluated(run: RunRecord, known_images: list[tuple[list[str], np.ndarray]]) -> EvaluatedRun:
    """The predictions of a run, sorted by path.

    known_images: (paths, targets) of other runs, to which its own are added. Runs of the same images share them: 50
    lists of a million paths would not fit into memory.
    """
    paths, targets, probabilities = read_predictions(run.folder / "test_predictions.csv", run.classes())
    order = np.argsort(paths, kind="stable")
    subjects = np.array(tested_subjects(run.folder, run.results, run.args.get("group_regex"), paths), object)
    subjects = subjects[order].tolist() if len(subjects) else []
    paths, targets, predictions = paths[order].tolist(), targets[order], probabilities.argmax(axis=1)[order]
    same = next((known for known in known_images if known[0] == paths and np.array_equal(known[1], targets)), None)
    if same is None:
        same = paths, targets
        known_images.append(same)
    trained = MethodRun("", run.args.get("seed"), [], run.folder)
    return EvaluatedRun(trained, {**run.results, "fold": run.args.get("fold")}, *same, {"raw": predictions}, subjects)


def _pair(left, right):
    """-> [(position in left, position in right)] of runs with the same test images, each in one pair"""
    if not left or not right or left[0].results["classes"] != right[0].results["classes"]:
        return []

    def key(run):
        return run.trained.seed, run.results["fold"]

    candidates = [
        (key(a) != key(b), i, k) for i, a in enumerate(left) for k, b in enumerate(right) if a.paths is b.paths
    ]
    pairs, used_left, used_right = [], set(), set()
    for _, i, k in sorted(candidates):
        if i not in used_left and k not in used_right:
            pairs.append((i, k))
            used_left.add(i)
            used_right.add(k)
    return sorted(pairs)


def _compare_bucket(base_runs, members):
    """members: {number of a group: its runs, paired with `base_runs`} -> rows of `compare_predictions`, by number"""
    pairs = zip(base_runs, *members.values(), strict=True)
    subjects = [next((run.subjects for run in same_images if run.subjects), []) for same_images in pairs]
    if not all(subjects):  # only some of the runs name them
        subjects = [[] for _ in base_runs]
    base_runs = [dataclasses.replace(run, subjects=names) for run, names in zip(base_runs, subjects, strict=True)]
    predictions_of = {number: [run.predictions["raw"] for run in runs] for number, runs in members.items()}
    predictions_of[None] = [run.predictions["raw"] for run in base_runs]
    rows = compare_predictions(predictions_of, base_runs, None)
    return [row for row in rows if row["method"] is not None]
