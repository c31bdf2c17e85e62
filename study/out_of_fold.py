"""The test images of the folds of a cross-validation together: each is predicted by a model not trained on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from images.leakage import subject_ids, subject_names
from metrics import RANKINGS, full_metrics
from run.files import read_column, read_json, read_predictions


@dataclass
class OutOfFold:
    """N images with their labels and the probabilities of the models of their folds."""

    classes: list[str]
    paths: np.ndarray  # (N,) of str objects
    targets: np.ndarray  # (N,) int
    probabilities: np.ndarray  # (N, C)
    subjects: list[str] | None = None  # N names, by the table of labels


def read_folds(run_dirs: Sequence[Path]) -> OutOfFold:
    """run_dirs: folders of finished folds. Raises UserError, naming a damaged file."""
    results = read_json(run_dirs[0] / "results.json")
    files = [run_dir / "test_predictions.csv" for run_dir in run_dirs]
    folds = [read_predictions(file, results["classes"]) for file in files]
    images = OutOfFold(results["classes"], *map(np.concatenate, zip(*folds, strict=True)))
    if results.get("subject_column"):
        names = [name for file in files for name in read_column(file, results["subject_column"])]
        images.subjects = named_subjects(names, images.paths)
    return images


def named_subjects(names: Sequence[str], paths: Sequence[str]) -> list[str]:
    """-> N names of subjects. names: N cells of a table; an image without a subject is one of its own."""
    return [name or path for name, path in zip(names, paths, strict=True)]


def tested_subjects(run_dir: Path, results: dict, group_regex: str | None, paths: np.ndarray) -> list[str]:
    """-> N names of the subjects of the test images of a run, or none.

    results: of results.json; group_regex: flag of the run; paths: (N,), in the order of `test_predictions.csv`. Raises
    UserError.
    """
    if column := results.get("subject_column"):
        return named_subjects(read_column(run_dir / "test_predictions.csv", column), paths)
    return subject_names(paths, group_regex) if group_regex else []


def pooled_metrics(images: OutOfFold, samples_per_cls: Sequence[int], group_regex: str | None, ordinal: bool) -> dict:
    """Metrics of the test images of all folds together; group_regex, ordinal: flags of the folds.

    Without metrics that rank images, as the probabilities come from several models.
    """
    if images.subjects is None:
        subjects = subject_ids(images.paths.tolist(), group_regex)
    else:
        subjects = np.unique(images.subjects, return_inverse=True)[1]
    pooled = full_metrics(images.targets, images.probabilities, images.classes, samples_per_cls, ordinal, subjects)
    for class_metrics in pooled["per_class"].values():
        for name in RANKINGS:
            del class_metrics[name], class_metrics[f"{name}_ci"]
    return pooled
