"""What decides which model is kept: scikit-learn's metrics over a whole set, each image once."""

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_curve,
    precision_recall_fscore_support,
    recall_score,
)


def summary_metrics(targets, probabilities):
    """targets: (N,) int; probabilities: (N, C). -> {"acc", "balanced_acc", "macro_f1"}, each in 0..1.

    balanced_acc is the mean recall of the classes that occur in `targets`; macro_f1 the mean F1 of the classes that
    occur in `targets` or among the predictions.
    """
    predictions = np.argmax(probabilities, axis=1)
    # macro recall over the present classes is balanced_accuracy_score, without its warning for the other classes
    present = np.unique(targets)
    return {
        "acc": float(accuracy_score(targets, predictions)),
        "balanced_acc": float(recall_score(targets, predictions, labels=present, average="macro", zero_division=0)),
        "macro_f1": float(f1_score(targets, predictions, average="macro", zero_division=0)),
    }


def full_metrics(targets, probabilities, classes):
    """`summary_metrics` with `per_class` figures and `confusion_matrix` (rows: true class, columns: prediction)."""
    predictions = np.argmax(probabilities, axis=1)
    labels = np.arange(len(classes))
    per_class = precision_recall_fscore_support(targets, predictions, labels=labels, zero_division=0)
    names = ("precision", "recall", "f1", "support")
    return {
        **summary_metrics(targets, probabilities),
        "per_class": {
            str(c): {key: (int if key == "support" else float)(v[i]) for key, v in zip(names, per_class, strict=True)}
            for i, c in enumerate(classes)
        },
        "confusion_matrix": confusion_matrix(targets, predictions, labels=labels).tolist(),
    }


def recalls(targets, probabilities, classes):
    """-> {class: its recall, 0..1} of the classes that occur in `targets`."""
    present = np.unique(targets)
    values = recall_score(targets, np.argmax(probabilities, axis=1), labels=present, average=None, zero_division=0)
    return {classes[i]: float(value) for i, value in zip(present, values, strict=True)}


def precision_recall_points(targets, probabilities, classes, points=51):
    """One-against-all curves of the classes that occur. -> [(class, recall, precision)], `points` of each.

    Precision at a recall is the best one at this recall or more.
    """
    at = np.linspace(0, 1, points)
    rows = []
    for i in np.unique(targets):
        precision, recall, _ = precision_recall_curve(targets == i, probabilities[:, i])
        best = np.maximum.accumulate(precision)[np.searchsorted(-recall, -at, side="right") - 1]
        rows += [(classes[i], float(x), float(y)) for x, y in zip(at, best, strict=True)]
    return rows
