"""The metrics that select and describe a model, with 95 % bootstrap confidence intervals."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from run.cores import num_cores

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles
NORMAL_QUANTILE = 1.959963984540054  # of the standard normal distribution, at INTERVAL[1]
CHUNK = 4  # resamples per task of a thread: with 100,000 images they fit into its cache
ECE_BINS = 15
RANKINGS = ("auroc", "average_precision")  # of one class against the rest
# classes by number of training images, as in Liu et al. 2019 (Large-Scale Long-Tailed Recognition), sec. 5
SHOTS = {"many_shot": (101, np.inf), "medium_shot": (20, 100), "few_shot": (1, 19)}


def format_with_interval(value: float, interval: Sequence[float] | None = None, sign: str = "") -> str:
    """0.1234, (0.1, 0.15) -> "0.123 [0.100, 0.150]"; without an interval "0.123"; sign="+": of a difference."""
    spec = f"{sign}.3f"
    return format(value, spec) + (f" [{interval[0]:{spec}}, {interval[1]:{spec}}]" if interval is not None else "")


def confusion_matrix(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """targets: (N,) int; probabilities: (N, C) -> (C, C) int64 counts; row: true class, column: most probable class."""
    num_classes = probabilities.shape[1]
    cells = targets * num_classes + np.argmax(probabilities, axis=1)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def summary_metrics(targets: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """targets: (N,) int; probabilities: (N, C) -> {"acc", "balanced_acc", "macro_f1"}, each in 0..1.

    balanced_acc is the mean recall of the classes that occur in `targets`; macro_f1 is the mean F1 of the classes that
    occur in `targets` or among the predictions.
    """
    matrix = confusion_matrix(targets, probabilities)
    metrics = confusion_metrics(matrix[None])
    is_present, is_predicted = matrix.any(axis=1), matrix.any(axis=0)
    # means without the zeros of other classes round as in scikit-learn, to the last bit
    return {
        "acc": float(metrics["acc"][0]),
        "balanced_acc": float(metrics["recall"][0, is_present].mean()),
        "macro_f1": float(metrics["f1"][0, is_present | is_predicted].mean()),
    }


def recalls(targets: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Recall, 0..1, of each class that occurs in `targets`. -> {class: recall}; arguments as in `summary_metrics`."""
    recall = confusion_metrics(confusion_matrix(targets, probabilities)[None])["recall"][0]
    return {classes[c]: float(recall[c]) for c in np.unique(targets)}


def full_metrics(
    targets: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], samples_per_cls: Sequence[int],
    ordinal: bool = False, subjects: np.ndarray | None = None, resamples: int = RESAMPLES,
) -> dict:  # fmt: skip
    """All metrics of an evaluation. Next to each `<metric>` is `<metric>_ci: [low, high]`, its interval by `Bootstrap`.

    targets: (N,) int; probabilities: (N, C); samples_per_cls: (C,) original training counts; subjects: (N,) int, the
    subject of each image, or None. -> {acc, balanced_acc, macro_f1, nll (mean negative log-likelihood), ece (expected
    calibration error, Guo et al. 2017), many_shot_acc, medium_shot_acc, few_shot_acc (mean recall of the classes with
    more than 100, 20 to 100, and fewer than 20 training images, if there are any), per_class {class: {precision,
    recall, f1, auroc, average_precision, support (images), and with `subjects` their number}}, confusion_matrix (rows:
    true classes)}; with `ordinal`, for classes in the order of their grades, also the metrics of `_ordinal_metrics`.
    The metrics of a class that does not occur are None, and so are the rankings of the only class that occurs.
    """
    weighted = WeightedMetrics(targets, probabilities, samples_per_cls, ordinal)
    estimate = weighted.compute(np.ones((1, len(targets)), np.int32))
    subjects = None if subjects is None else subjects[weighted.order]
    resampled = _resampled(weighted, Bootstrap(weighted.targets, subjects), resamples)
    # a resample looks worse calibrated than its sample, just as the sample looks worse than the truth
    resampled["ece"] = np.maximum(0, resampled["ece"] - resampled["ece"].mean() + estimate["ece"])
    intervals = {name: np.percentile(values, INTERVAL, axis=0).T for name, values in resampled.items()}
    num_independent = weighted.support
    if subjects is not None:
        num_independent = [len(np.unique(subjects[weighted.targets == c])) for c in range(len(classes))]
    intervals["recall"] = _widened(intervals["recall"], estimate["recall"][0], num_independent)
    results, per_class = {}, {str(name): {} for name in classes}
    for name, (values,) in estimate.items():
        if values.ndim == 0:
            results[name], results[f"{name}_ci"] = float(values), intervals[name].tolist()
            continue
        for c, row in enumerate(per_class.values()):
            is_defined = 0 < weighted.support[c] < (len(targets) if name in RANKINGS else np.inf)
            row[name] = float(values[c]) if is_defined else None
            row[f"{name}_ci"] = intervals[name][c].tolist() if is_defined else None
    for row, support, independent in zip(per_class.values(), weighted.support.tolist(), num_independent, strict=True):
        row["support"] = support
        if subjects is not None:
            row["subjects"] = independent
    return {**results, "per_class": per_class, "confusion_matrix": confusion_matrix(targets, probabilities).tolist()}


def wilson_interval(share: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> lower and upper bounds of a share that was observed in n cases (Wilson 1927). share, n: (C,), or numbers."""
    n, z = np.maximum(n, 1), NORMAL_QUANTILE
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    margin = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.maximum(0, center - margin), np.minimum(1, center + margin)


def _widened(intervals, recall, num_independent):
    """Intervals of recall (C, 2), widened to contain Wilson's: after 0 correct of 8, a bootstrap is sure of 0.

    num_independent: (C,) images, or subjects, of each class.
    """
    low, high = wilson_interval(recall, num_independent)
    return np.stack([np.minimum(intervals[:, 0], low), np.maximum(intervals[:, 1], high)], axis=1)


def _resampled(weighted, bootstrap, resamples):
    """-> {name: (resamples, ...)} of `WeightedMetrics.compute`. The number of threads does not change the values."""

    def compute_chunk(start):
        rng = np.random.default_rng(start)
        return weighted.compute(bootstrap.draw(min(CHUNK, resamples - start), rng))

    with ThreadPoolExecutor(num_cores()) as pool:
        chunks = list(pool.map(compute_chunk, range(0, resamples, CHUNK)))
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


class Bootstrap:
    """Draws resamples stratified by class: as many images of each class as there are, with replacement.

    targets: (N,) int. subjects: (N,) int or None. Images of one subject are not independent: with `subjects`, whole
    subjects are drawn, each with all its images. A subject belongs to the rarest class among its images.
    """

    def __init__(self, targets: np.ndarray, subjects: np.ndarray | None = None):
        self.units = None  # of each image
        class_of_unit = targets
        if subjects is not None:
            self.units = np.unique(subjects, return_inverse=True)[1]
            class_of_unit = np.empty(self.units.max() + 1, int)
            rarest_last = np.argsort(-np.bincount(targets)[targets], kind="stable")
            class_of_unit[self.units[rarest_last]] = targets[rarest_last]
        self.num_units = len(class_of_unit)
        self.strata = [np.flatnonzero(class_of_unit == c) for c in np.unique(class_of_unit)]

    def draw(self, resamples: int, rng: np.random.Generator) -> np.ndarray:
        """-> (resamples, N) int32, how often each image is drawn."""
        drawn = np.empty((resamples, self.num_units), np.int32)
        for row in drawn:
            for members in self.strata:
                row[members] = np.bincount(rng.integers(0, len(members), len(members)), minlength=len(members))
        return drawn if self.units is None else drawn[:, self.units]


class WeightedMetrics:
    """The metrics of an evaluation in which each image counts as often as its weight says.

    With weights of 1 these are the metrics themselves; with the counts of `Bootstrap.draw`, those of a resample.
    Images are sorted by class and prediction, so that each cell of the confusion matrix is one contiguous range; the
    weights follow this `order`.
    """

    def __init__(self, targets, probabilities, samples_per_cls, ordinal=False):
        self.num_classes = probabilities.shape[1]
        predictions = np.argmax(probabilities, axis=1)
        self.order = np.lexsort((predictions, targets))
        targets, predictions, probabilities = (x[self.order] for x in (targets, predictions, probabilities))
        self.targets, self.support = targets, np.bincount(targets, minlength=self.num_classes)
        self.cells, self.cell_starts = np.unique(targets * self.num_classes + predictions, return_index=True)
        self.ordinal, self.samples_per_cls = ordinal, np.asarray(samples_per_cls)
        confidence, images = probabilities.max(axis=1), np.arange(len(predictions))
        bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
        # one column per bin of confidence, and one for the negative log-likelihood
        self.sums = np.zeros((len(predictions), ECE_BINS + 1), np.float32)
        self.sums[images, bins] = confidence - (predictions == targets)
        self.sums[:, -1] = -np.log(np.maximum(probabilities[images, targets], np.finfo(np.float32).tiny))
        self.rankings = [_Ranking(probabilities[:, c], targets == c) for c in range(self.num_classes)]

    def compute(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """weights: (B, N) int32 -> {name: (B,), or (B, C) for a metric of each class}."""
        matrices = np.zeros((len(weights), self.num_classes**2))
        matrices[:, self.cells] = np.add.reduceat(weights, self.cell_starts, axis=1)
        matrices = matrices.reshape(-1, self.num_classes, self.num_classes)
        metrics = confusion_metrics(matrices)
        sums = weights.astype(np.float32) @ self.sums / weights.sum(axis=1, keepdims=True)
        metrics |= {"ece": np.abs(sums[:, :-1]).sum(axis=1), "nll": sums[:, -1]}
        for name, (low, high) in SHOTS.items():
            members = [c for c in np.flatnonzero(self.support) if low <= self.samples_per_cls[c] <= high]
            if members:
                metrics[f"{name}_acc"] = metrics["recall"][:, members].mean(axis=1)
        if self.ordinal:
            metrics |= _ordinal_metrics(matrices)
        ranked = zip(*(ranking.compute(weights) for ranking in self.rankings), strict=True)
        return metrics | {name: np.stack(values, axis=1) for name, values in zip(RANKINGS, ranked, strict=True)}


def confusion_metrics(matrices: np.ndarray) -> dict[str, np.ndarray]:
    """(B, C, C) confusion matrices, rows true classes -> {"acc", "balanced_acc", "macro_f1": (B,); "precision",
    "recall", "f1": (B, C)}. Means leave out the classes that do not occur in a matrix."""
    hits, actual, predicted = np.einsum("bii->bi", matrices), matrices.sum(2), matrices.sum(1)
    recall, f1 = _divide(hits, actual), _divide(2 * hits, actual + predicted)
    return {
        "acc": _divide(hits.sum(axis=1), actual.sum(axis=1)),
        "balanced_acc": _divide(recall.sum(axis=1), (actual > 0).sum(axis=1)),
        "macro_f1": _divide(f1.sum(axis=1), (actual + predicted > 0).sum(axis=1)),
        "precision": _divide(hits, predicted),
        "recall": recall,
        "f1": f1,
    }


def _divide(numerator, denominator):
    """0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator > 0)


class _Ranking:
    """One class against the rest: images ranked by their score for it."""

    def __init__(self, scores, is_positive):
        positives, negatives = np.flatnonzero(is_positive), np.flatnonzero(~is_positive)
        self.positives = positives[np.argsort(scores[positives], kind="stable")]
        self.negatives = negatives[np.argsort(scores[negatives], kind="stable")]
        of_positives, of_negatives = scores[self.positives], scores[self.negatives]
        # for each positive: the number of negatives below it, of negatives not above it, of positives below it
        self.below, self.not_above = (np.searchsorted(of_negatives, of_positives, side) for side in ("left", "right"))
        self.positives_below = np.searchsorted(of_positives, of_positives, "left")

    def compute(self, weights):
        """(B, N) -> (area under the ROC curve (B,), average precision (B,)); ties count half, as in scikit-learn."""
        positives, found = _running_sums(weights, self.positives)
        _, passed = _running_sums(weights, self.negatives)
        all_positives, all_negatives = found[:, -1].astype(float), passed[:, -1].astype(float)
        below = passed.take(self.below, axis=1, mode="clip").astype(float)
        wins = np.einsum("bn,bn->b", positives, below + passed.take(self.not_above, axis=1, mode="clip")) / 2
        true = all_positives[:, None] - found.take(self.positives_below, axis=1, mode="clip")
        precision = _divide(true, true + all_negatives[:, None] - below)
        average_precision = _divide(np.einsum("bn,bn->b", positives, precision), all_positives)
        return _divide(wins, all_positives * all_negatives), average_precision


def _running_sums(weights, positions):
    """(B, N) -> (the weights at n positions (B, n), their running sums, from 0 on (B, n + 1)), int32."""
    chosen = weights.take(positions, axis=1, mode="clip")  # "clip" is twice as fast as checking each position
    sums = np.zeros((len(chosen), len(positions) + 1), np.int32)
    np.cumsum(chosen, axis=1, dtype=np.int32, out=sums[:, 1:])
    return chosen, sums


def _ordinal_metrics(matrices):
    """Metrics of ordered grades, from confusion matrices (B, C, C) whose classes are in order.

    mae: mean absolute error in grades; exact, within_1, within_2: share of images at most this many grades off;
    correlation: Pearson's, between grade and prediction; quadratic_kappa: Cohen's, with quadratic weights (Cohen 1968).
    The last two are 0 if all images, or all predictions, are of one grade.
    """
    grades = np.arange(matrices.shape[1])
    off = np.abs(grades[:, None] - grades)
    joint = matrices / matrices.sum(axis=(1, 2), keepdims=True)
    true, predicted = joint.sum(2), joint.sum(1)
    metrics = {"mae": (joint * off).sum(axis=(1, 2)), "exact": joint[:, off == 0].sum(axis=1)}
    metrics |= {f"within_{most}": joint[:, off <= most].sum(axis=1) for most in (1, 2)}
    mean_true, mean_predicted = true @ grades, predicted @ grades
    covariance = np.einsum("bij,i,j->b", joint, grades, grades) - mean_true * mean_predicted
    variances = [share @ grades**2 - mean**2 for share, mean in ((true, mean_true), (predicted, mean_predicted))]
    metrics["correlation"] = _divide(covariance, np.sqrt(np.maximum(variances[0] * variances[1], 0)))
    by_chance = np.einsum("bi,bj,ij->b", true, predicted, off**2)
    metrics["quadratic_kappa"] = np.where(by_chance > 0, 1 - _divide((joint * off**2).sum(axis=(1, 2)), by_chance), 0.0)
    return metrics
