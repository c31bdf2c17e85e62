"""Metrics of groups of test images, such as those of one skin tone, by a column of the table of labels."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metrics import CHUNK, INTERVAL, RESAMPLES, Bootstrap, confusion_metrics, format_with_interval
from run.cli import UserError, printable
from run.files import write_csv

SUBGROUPS_FILE = "subgroups.csv"
METRICS = {"balanced_acc": "balanced accuracy", "macro_f1": "macro F1", "acc": "accuracy"}
METRIC_COLUMNS = [f"{name}{end}" for name in METRICS for end in ("", "_low", "_high")]
COLUMNS = ("column", "value", "images", *METRIC_COLUMNS, "note", "classes")
MIN_IMAGES = 10  # of a group with metrics
MAX_NUMBERS = 20  # different numbers of a column; more are cut into quartiles
MAX_GROUPS = 50  # with metrics, of a column
MAX_VALUES = 1000  # of a column, those of small groups too
NOT_STATED, TOO_FEW = "(empty)", "too few"


def groups_of(cells: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """-> (group of each of N images (N,) int64, names of the groups), in the order of the values.

    More than MAX_NUMBERS different numbers become quartiles. Images with an empty cell are a group, the last one.
    """
    cells = list(cells)
    values = sorted(set(cells) - {""})
    numbers = _numbers(values)
    if numbers and len(set(numbers.values())) > MAX_NUMBERS:
        return _quartiles(np.array([numbers.get(cell, np.inf) for cell in cells]))
    values = sorted(values, key=numbers.get) if numbers else values
    values += [""] if "" in set(cells) else []
    position = {value: i for i, value in enumerate(values)}
    return np.array([position[cell] for cell in cells], np.int64), [value or NOT_STATED for value in values]


def _numbers(values):
    """-> {text: its number}; empty if one of them is not a number"""
    try:
        numbers = {value: float(value) for value in values}
    except ValueError:
        return {}
    return numbers if all(map(math.isfinite, numbers.values())) else {}


def _quartiles(numbers):
    """numbers: (N,), infinity where there is none -> see `groups_of`"""
    edges = np.quantile(numbers[np.isfinite(numbers)], (0.25, 0.5, 0.75))
    kept, group = np.unique(np.where(np.isfinite(numbers), np.searchsorted(edges, numbers), 4), return_inverse=True)
    names = []
    for i, quartile in enumerate(kept.tolist()):
        members = numbers[group == i]
        names.append(NOT_STATED if quartile == 4 else f"{members.min():g} to {members.max():g}")
    return group, names


def subgroup_metrics(
    cells: Sequence[str],
    targets: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    subjects: np.ndarray | None = None,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Metrics of the groups of N images that a column makes, with 95 % intervals by `Bootstrap`.

    cells: N; targets: (N,) int; probabilities: (N, C); subjects: (N,) int or None. The bootstrap is stratified by class
    and group. -> {"groups": [{"value", "images", and unless there are fewer than MIN_IMAGES: "classes", how many occur,
    and balanced_acc, macro_f1, acc, each with `_ci`}], "gap": None, or {"high", "low": the groups, "value": balanced
    accuracy of the first minus that of the second, over the classes that both have, "ci", "classes"}}. Raises UserError
    for too many values.
    """
    group_of, names = groups_of(cells)
    if len(names) > MAX_VALUES:
        raise UserError(f"{len(names)} different values, more than {MAX_VALUES}")
    counts = np.bincount(group_of, minlength=len(names))
    groups = [{"value": name, "images": int(count)} for name, count in zip(names, counts, strict=True)]
    large = np.flatnonzero(counts >= MIN_IMAGES)
    if len(large) > MAX_GROUPS:
        raise UserError(f"{len(large)} different values of at least {MIN_IMAGES} images, more than {MAX_GROUPS}")
    if not len(large):
        return {"groups": groups, "gap": None}
    chosen = np.isin(group_of, large)
    group_of = np.searchsorted(large, group_of[chosen])
    targets, predictions = targets[chosen], probabilities[chosen].argmax(axis=1)
    subjects = None if subjects is None else subjects[chosen]
    strata = group_of * len(classes) + targets
    matrices = _Matrices(strata, predictions, len(large), len(classes))
    estimate = matrices.compute(np.ones((1, len(targets)), np.int32))
    bootstrap, rng = Bootstrap(strata, subjects), np.random.default_rng(0)
    drawn = [
        matrices.compute(bootstrap.draw(min(CHUNK, resamples - start), rng)) for start in range(0, resamples, CHUNK)
    ]
    resampled = {name: np.concatenate([values[name] for values in drawn]) for name in estimate}
    for name in METRICS:
        intervals = np.percentile(resampled[name], INTERVAL, axis=0).T.tolist()
        for g, value, interval in zip(large, estimate[name][0].tolist(), intervals, strict=True):
            groups[g] |= {name: value, f"{name}_ci": interval}
    support = np.bincount(strata, minlength=len(large) * len(classes)).reshape(len(large), -1)
    for g, present in zip(large, (support > 0).sum(axis=1).tolist(), strict=True):
        groups[g]["classes"] = present
    gap = _largest_gap(estimate["recall"][0], resampled["recall"], support > 0)
    if gap:
        gap["high"], gap["low"] = (names[large[g]] for g in (gap["high"], gap["low"]))
        gap["classes"] = [classes[c] for c in gap["classes"]]
    return {"groups": groups, "gap": gap}


class _Matrices:
    """The confusion matrices of G groups for weights of the images."""

    def __init__(self, strata, predictions, num_groups, num_classes):
        cells = strata * num_classes + predictions
        self.order = np.argsort(cells, kind="stable")
        self.cells, self.starts = np.unique(cells[self.order], return_index=True)
        self.shape = num_groups, num_classes, num_classes

    def compute(self, weights):
        """weights: (B, N) int32 -> {name: (B, G), or (B, G, C) for recall}"""
        matrices = np.zeros((len(weights), int(np.prod(self.shape))))
        matrices[:, self.cells] = np.add.reduceat(weights[:, self.order], self.starts, axis=1)
        metrics = confusion_metrics(matrices.reshape(-1, *self.shape[1:]))
        return {name: metrics[name].reshape(len(weights), self.shape[0], -1).squeeze(-1) for name in METRICS} | {
            "recall": metrics["recall"].reshape(len(weights), *self.shape[:2])
        }


def _largest_gap(recall, resampled, is_present):
    """recall: (G, C); resampled: (B, G, C); is_present: (G, C) bool -> the pair of groups that differ most, or None."""
    best = None
    for high in range(len(recall)):
        for low in range(len(recall)):
            shared = np.flatnonzero(is_present[high] & is_present[low])
            if high == low or not shared.size:
                continue
            value = float(recall[high, shared].mean() - recall[low, shared].mean())
            if best is None or value > best["value"]:
                best = {"high": high, "low": low, "value": value, "classes": shared.tolist()}
    if best:
        differences = (resampled[:, best["high"]] - resampled[:, best["low"]])[:, best["classes"]].mean(axis=1)
        best["ci"] = np.percentile(differences, INTERVAL).tolist()
    return best


def all_subgroups(
    names: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    targets: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    subjects: np.ndarray | None = None,
) -> dict[str, dict]:
    """-> {column: `subgroup_metrics`} of the columns `names`; one with too many values is left out, with a line."""
    found = {}
    for name in names:
        try:
            found[name] = subgroup_metrics(columns[name], targets, probabilities, classes, subjects)
        except UserError as error:
            print(f"warning: no metrics of the subgroups of {printable(name)} ({error})")
    return found


def write_subgroups(path: str | Path, found: Mapping[str, Mapping]) -> None:
    """One row per group, and one for the largest gap of each column. found: of `all_subgroups`."""
    rows = []
    for column, result in found.items():
        for group in result["groups"]:
            row = {"column": column, "value": group["value"], "images": group["images"], "note": TOO_FEW}
            if "acc" in group:
                row |= {"note": "", "classes": group["classes"]}
                for name in METRICS:
                    row |= {name: group[name], f"{name}_low": group[f"{name}_ci"][0]}
                    row[f"{name}_high"] = group[f"{name}_ci"][1]
            rows.append(row)
        if gap := result["gap"]:
            row = {"column": column, "value": f"{gap['high']} minus {gap['low']}", "note": "largest gap"}
            row |= {"balanced_acc": gap["value"], "balanced_acc_low": gap["ci"][0], "balanced_acc_high": gap["ci"][1]}
            row["classes"] = len(gap["classes"])
            rows.append(row)
    write_csv(path, COLUMNS, rows)


def print_subgroups(found: Mapping[str, Mapping]) -> None:
    """One line per column: the balanced accuracy of its groups, and the largest gap."""
    for column, result in found.items():
        words = [
            f"{printable(group['value'])} {format_with_interval(group['balanced_acc'], group['balanced_acc_ci'])}"
            for group in result["groups"]
            if "acc" in group
        ]
        few = sum("acc" not in group for group in result["groups"])
        words += [f"{few} with fewer than {MIN_IMAGES} images"] if few else []
        gap = result["gap"]
        largest = f"; largest gap {format_with_interval(gap['value'], gap['ci'])}" if gap else ""
        print(f"balanced accuracy by {printable(column)}: {', '.join(words)}{largest}")
