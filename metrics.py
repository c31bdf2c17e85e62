"""What decides which model is kept, and what is reported of it: figures with their 95 % bootstrap intervals."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from joblib import cpu_count
from scipy.stats import norm
from sklearn.metrics import accuracy_score, f1_score, precision_recall_curve, recall_score

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles
CHUNK = 4  # resamples that one thread works on at a time: with 100,000 images they stay in its cache
ECE_BINS = 15
RANKINGS = ("auroc", "average_precision")  # of one class against the others
# classes by their number of training images, as in Liu et al. 2019 (Large-Scale Long-Tailed Recognition), sec. 5
SHOTS = {"many_shot": (101, np.inf), "medium_shot": (20, 100), "few_shot": (1, 19)}


# ------------------------------------------------------------------------------------------------- while training


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


# ------------------------------------------------------------------------------------------- of a whole evaluation


def full_metrics(targets, probabilities, classes, samples_per_cls, ordinal=False, groups=None, resamples=RESAMPLES):
    """Every figure, beside each `<figure>_ci: [low, high]`, its 95 % interval by `Bootstrap`.

    targets: (N,) int; probabilities: (N, C); samples_per_cls: (C,) original training counts; groups: (N,) int, the
    person of each image, or None. -> {acc, balanced_acc, macro_f1, nll (mean negative log likelihood), ece (expected
    calibration error, Guo et al. 2017), many_shot_acc, medium_shot_acc, few_shot_acc (mean recall of the classes with
    more than 100, 20 to 100, fewer than 20 training images, where there are any), per_class {class: precision, recall,
    f1, auroc, average_precision, support}, confusion_matrix (rows: true class)}; `ordinal` adds those of `_ordinal`,
    for classes in the order of their grades. A figure of a class that does not occur is None, and a ranking where
    there is no other class.
    """
    whole = Weighted(targets, probabilities, samples_per_cls, ordinal)
    estimate = whole.figures(np.ones((1, len(targets)), np.int32))
    groups = groups if groups is None else groups[whole.order]
    resampled = _resampled(whole, Bootstrap(whole.targets, groups), resamples)
    # what is drawn from a sample is worse calibrated than the sample, as that is than the truth
    resampled["ece"] = np.maximum(0, resampled["ece"] - resampled["ece"].mean() + estimate["ece"])
    intervals = {name: np.percentile(values, INTERVAL, axis=0).T for name, values in resampled.items()}
    witnesses = whole.support
    if groups is not None:
        witnesses = [len(np.unique(groups[whole.targets == c])) for c in range(len(classes))]
    intervals["recall"] = _widened(intervals["recall"], estimate["recall"][0], witnesses)
    results, per_class = {}, {str(name): {} for name in classes}
    for name, (values,) in estimate.items():
        if values.ndim == 0:
            results[name], results[f"{name}_ci"] = float(values), intervals[name].tolist()
            continue
        for i, row in enumerate(per_class.values()):
            there_is = 0 < whole.support[i] < (len(targets) if name in RANKINGS else np.inf)
            row[name] = float(values[i]) if there_is else None
            row[f"{name}_ci"] = intervals[name][i].tolist() if there_is else None
    for row, support in zip(per_class.values(), whole.support, strict=True):
        row["support"] = int(support)
    return {**results, "per_class": per_class, "confusion_matrix": whole.confusion_matrix().tolist()}


def _widened(intervals, recall, witnesses):
    """Intervals of recall (C, 2), made to hold Wilson's (1927): a bootstrap of 0 right ones of 8 would be sure of 0.

    witnesses: (C,) images, or persons, of each class.
    """
    n = np.maximum(witnesses, 1)
    z = norm.ppf(INTERVAL[1] / 100)
    middle = (recall + z**2 / (2 * n)) / (1 + z**2 / n)
    side = z / (1 + z**2 / n) * np.sqrt(recall * (1 - recall) / n + z**2 / (4 * n**2))
    low, high = np.maximum(0, middle - side), np.minimum(1, middle + side)
    return np.stack([np.minimum(intervals[:, 0], low), np.maximum(intervals[:, 1], high)], axis=1)


def _resampled(whole, bootstrap, resamples):
    """-> {name: (resamples, ...)} of `Weighted.figures`. The same numbers whatever the number of threads."""

    def chunk(start):
        rng = np.random.default_rng(start)
        return whole.figures(bootstrap.draw(min(CHUNK, resamples - start), rng))

    with ThreadPoolExecutor(cpu_count()) as pool:
        parts = list(pool.map(chunk, range(0, resamples, CHUNK)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Bootstrap:
    """How often each image is drawn in a resample, in which as many are drawn of each class as there are.

    targets: (N,) int. groups: (N,) int or None; where they tell persons, it is persons that are drawn, with all their
    images, as images of one are no independent witnesses. A person is of the rarest class that he has an image of.
    """

    def __init__(self, targets, groups=None):
        self.units = None
        class_of_unit = targets
        if groups is not None:
            self.units = np.unique(groups, return_inverse=True)[1]
            class_of_unit = np.empty(self.units.max() + 1, int)
            rarest_last = np.argsort(-np.bincount(targets)[targets], kind="stable")
            class_of_unit[self.units[rarest_last]] = targets[rarest_last]
        self.num_units = len(class_of_unit)
        self.strata = [np.flatnonzero(class_of_unit == c) for c in np.unique(class_of_unit)]

    def draw(self, resamples, rng):
        """-> (resamples, N) int32"""
        drawn = np.empty((resamples, self.num_units), np.int32)
        for row in drawn:
            for members in self.strata:
                row[members] = np.bincount(rng.integers(0, len(members), len(members)), minlength=len(members))
        return drawn if self.units is None else drawn[:, self.units]


class Weighted:
    """The figures of an evaluation in which each image counts as often as its weight says.

    Of weights that are all one it is the evaluation itself; of how often each image was drawn, a bootstrap resample.
    The images are sorted by class and prediction, so that what belongs together lies side by side: weights are in this
    `order`.
    """

    def __init__(self, targets, probabilities, samples_per_cls, ordinal=False):
        self.num_classes = probabilities.shape[1]
        predictions = np.argmax(probabilities, axis=1)
        self.order = np.lexsort((predictions, targets))
        self.targets, predictions, probabilities = (of[self.order] for of in (targets, predictions, probabilities))
        self.support = np.bincount(self.targets, minlength=self.num_classes)
        self.cells, self.cell_starts = np.unique(self.targets * self.num_classes + predictions, return_index=True)
        self.present = np.flatnonzero(self.support)
        self.ordinal, self.samples_per_cls = ordinal, np.asarray(samples_per_cls)
        confidence, images = probabilities.max(axis=1), np.arange(len(predictions))
        bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
        # a column a bin of confidence, and one of the negative log likelihood
        self.sums = np.zeros((len(predictions), ECE_BINS + 1), np.float32)
        self.sums[images, bins] = confidence - (predictions == self.targets)
        self.sums[:, -1] = -np.log(np.maximum(probabilities[images, self.targets], np.finfo(np.float32).tiny))
        self.rankings = [_Ranking(probabilities[:, c], self.targets == c) for c in range(self.num_classes)]

    def confusion_matrices(self, weights):
        """(B, N) -> (B, C, C), rows true classes."""
        matrices = np.zeros((len(weights), self.num_classes**2))
        matrices[:, self.cells] = np.add.reduceat(weights, self.cell_starts, axis=1)
        return matrices.reshape(-1, self.num_classes, self.num_classes)

    def confusion_matrix(self):
        return self.confusion_matrices(np.ones((1, len(self.targets)), np.int32))[0].astype(int)

    def figures(self, weights):
        """weights: (B, N) int32 -> {name: (B,), or (B, C) for those a class}."""
        matrices = self.confusion_matrices(weights)
        figures = confusion_figures(matrices)
        recall = figures["recall"]
        sums = weights.astype(np.float32) @ self.sums / weights.sum(axis=1, keepdims=True)
        figures |= {"ece": np.abs(sums[:, :-1]).sum(axis=1), "nll": sums[:, -1]}
        for name, (low, high) in SHOTS.items():
            group = [c for c in self.present if low <= self.samples_per_cls[c] <= high]
            if group:
                figures[f"{name}_acc"] = recall[:, group].mean(axis=1)
        if self.ordinal:
            figures |= _ordinal(matrices)
        ranked = zip(*(ranking.figures(weights) for ranking in self.rankings), strict=True)
        return figures | {name: np.stack(values, axis=1) for name, values in zip(RANKINGS, ranked, strict=True)}


def confusion_figures(matrices):
    """(B, C, C) confusion matrices, rows true classes -> {"acc", "balanced_acc", "macro_f1": (B,); "precision",
    "recall", "f1": (B, C)}. Classes that do not occur in a matrix do not count in its means."""
    hits, of_class, predicted = np.einsum("bii->bi", matrices), matrices.sum(2), matrices.sum(1)
    recall, f1 = _share(hits, of_class), _share(2 * hits, of_class + predicted)
    return {
        "acc": _share(hits.sum(axis=1), of_class.sum(axis=1)),
        "balanced_acc": _share(recall.sum(axis=1), (of_class > 0).sum(axis=1)),
        "macro_f1": _share(f1.sum(axis=1), (of_class + predicted > 0).sum(axis=1)),
        "precision": _share(hits, predicted),
        "recall": recall,
        "f1": f1,
    }


def _share(part, whole):
    """part / whole, 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


class _Ranking:
    """One class against all others: images ranked by its score."""

    def __init__(self, scores, is_positive):
        positives, negatives = np.flatnonzero(is_positive), np.flatnonzero(~is_positive)
        self.positives = positives[np.argsort(scores[positives], kind="stable")]
        self.negatives = negatives[np.argsort(scores[negatives], kind="stable")]
        of_positives, of_negatives = scores[self.positives], scores[self.negatives]
        # for each positive: how many negatives are below it, and not above it; how many positives are below it
        self.below, self.not_above = (np.searchsorted(of_negatives, of_positives, side) for side in ("left", "right"))
        self.positives_below = np.searchsorted(of_positives, of_positives, "left")

    def figures(self, weights):
        """(B, N) -> (area under the ROC curve (B,), average precision (B,)); ties count half, as in scikit-learn."""
        positives, found = _running_sums(weights, self.positives)
        _, passed = _running_sums(weights, self.negatives)
        all_positives, all_negatives = found[:, -1].astype(float), passed[:, -1].astype(float)
        below = _columns(passed, self.below).astype(float)
        wins = np.einsum("bn,bn->b", positives, below + _columns(passed, self.not_above)) / 2
        true = all_positives[:, None] - _columns(found, self.positives_below)
        precision = _share(true, true + all_negatives[:, None] - below)
        average_precision = _share(np.einsum("bn,bn->b", positives, precision), all_positives)
        return _share(wins, all_positives * all_negatives), average_precision


def _columns(values, positions):
    return np.take(values, positions, axis=1, mode="clip")  # clip: twice as fast as with a check of each position


def _running_sums(weights, positions):
    """(B, N) -> (the weights at n positions (B, n), their running sums from 0 on (B, n + 1)), int32."""
    chosen = _columns(weights, positions)
    sums = np.zeros((len(chosen), len(positions) + 1), np.int32)
    np.cumsum(chosen, axis=1, dtype=np.int32, out=sums[:, 1:])
    return chosen, sums


def _ordinal(matrices):
    """What is reported of ordered grades, from confusion matrices (B, C, C) whose classes are in order.

    mae: mean absolute error in grades; exact, within_1, within_2: share no more than this number of grades off;
    correlation: Pearson's, of grade and prediction; quadratic_kappa: Cohen's, with quadratic weights (Cohen 1968). Both
    0 where all images are of one grade, or all predictions.
    """
    grades = np.arange(matrices.shape[1])
    off = np.abs(grades[:, None] - grades)
    joint = matrices / matrices.sum(axis=(1, 2), keepdims=True)
    true, predicted = joint.sum(2), joint.sum(1)
    figures = {"mae": (joint * off).sum(axis=(1, 2)), "exact": joint[:, off == 0].sum(axis=1)}
    figures |= {f"within_{most}": joint[:, off <= most].sum(axis=1) for most in (1, 2)}
    mean_true, mean_predicted = true @ grades, predicted @ grades
    covariance = np.einsum("bij,i,j->b", joint, grades, grades) - mean_true * mean_predicted
    variances = [share @ grades**2 - mean**2 for share, mean in ((true, mean_true), (predicted, mean_predicted))]
    figures["correlation"] = _share(covariance, np.sqrt(np.maximum(variances[0] * variances[1], 0)))
    by_chance = np.einsum("bi,bj,ij->b", true, predicted, off**2)
    figures["quadratic_kappa"] = np.where(by_chance > 0, 1 - _share((joint * off**2).sum(axis=(1, 2)), by_chance), 0.0)
    return figures
