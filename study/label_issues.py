"""Label doubts of a cross-validation: images that the models of the other folds assign to another class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from run.files import atomic_write, csv_writer, decimal
from study.out_of_fold import OutOfFold

LABEL_ISSUES_FILE = "label_issues.csv"
COLUMNS = ("path", "label", "label_probability", "prediction", "probability", "rank")


def find_label_issues(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """-> positions of the images with doubtful labels, the least probable label first.

    targets: (N,) int, the labels; probabilities: (N, C), out of fold. An image is doubtful if its most probable class
    j is not its label and p_j >= t_j, the mean of p_j over the images labeled j: the threshold of confident learning
    (Northcutt et al. 2021, eq. 2). A class that the models favor thus needs a larger probability than one they rarely
    predict. A class without images has no threshold and gives no doubts.
    """
    images = np.arange(len(targets))
    num_classes = probabilities.shape[1]
    label_probabilities = probabilities[images, targets].astype(np.float64)
    counts = np.bincount(targets, minlength=num_classes)
    sums = np.bincount(targets, label_probabilities, minlength=num_classes)
    thresholds = np.divide(sums, counts, out=np.full(num_classes, np.inf), where=counts > 0)
    predictions = probabilities.argmax(axis=1)
    is_confident = probabilities[images, predictions] >= thresholds[predictions]
    doubtful = np.flatnonzero((predictions != targets) & is_confident)
    return doubtful[np.argsort(label_probabilities[doubtful], kind="stable")]


def write_label_issues(path: str | Path, images: OutOfFold, doubtful: Sequence[int] | np.ndarray) -> None:
    """Write a CSV file with one row per image at the positions `doubtful`, in this order: rank 1 comes first."""
    with atomic_write(path) as file:
        writer = csv_writer(file)
        writer.writerow(COLUMNS)
        for rank, i in enumerate(doubtful, start=1):
            label, probabilities = images.targets[i], images.probabilities[i]
            prediction = probabilities.argmax()
            names = images.classes[label], images.classes[prediction]
            values = decimal(probabilities[label]), decimal(probabilities[prediction])
            writer.writerow([images.paths[i], names[0], values[0], names[1], values[1], rank])
