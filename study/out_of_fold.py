"""The test images of the folds of a cross-validation together: each is predicted by a model not trained on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from images.leakage import subject_ids
from metrics import RANKINGS, full_metrics
from run.files import read_json, read_predictions


@dataclass
class OutOfFold:
    """N images with their labels and the probabilities of the models of their folds."""

    classes: list[str]
    paths: np.ndarray  # (N,) of str objects
    targets: np.ndarray  # (N,) int
    probabilities: np.ndarray  # (N, C)


def read_folds(run_dirs: Sequence[Path]) -> OutOfFold:
    """run_dirs: folders of finished folds. Raises UserError, naming a damaged file."""
    classes = read_json(run_dirs[0] / "results.json")["classes"]
    folds = [read_predictions(run_dir / "test_predictions.csv", classes) for run_dir in run_dirs]
    return OutOfFold(classes, *map(np.concatenate, zip(*folds, strict=True)))


def pooled_metrics(images: OutOfFold, samples_per_cls: Sequence[int], group_regex: str | None, ordinal: bool) -> dict:
    """Metrics of the test images of all folds together; group_regex, ordinal: flags of the folds.

    Without metrics that rank images, as the probabilities come from several models.
    """
    subjects = subject_ids(images.paths.tolist(), group_regex)
    pooled = full_metrics(images.targets, images.probabilities, images.classes, samples_per_cls, ordinal, subjects)
    for class_metrics in pooled["per_class"].values():
        for name in RANKINGS:
            del class_metrics[name], class_metrics[f"{name}_ci"]
    return pooled
