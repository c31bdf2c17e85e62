"""Plots of a run, and the HTML page that shows them with its metrics."""

import base64
import html
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metrics import format_with_interval
from run.files import atomic_write, printable

# matplotlib's default font has no Hangul; class names that need it are drawn in one of these, if installed
HANGUL_FONTS = ("Noto Sans CJK KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic")
NO_BREAK_SPACE = "\u00a0"
LONGEST_LABEL = 40  # letters
COUNTS_UP_TO = 25  # classes; the cells of larger confusion matrices are too small for text
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 } th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd }
th, td { text-align: right; font-variant-numeric: tabular-nums } td:first-child, th:first-child { text-align: left }
img { max-width: 100%; margin: .5rem 0 } summary { cursor: pointer }
"""
SUMMARY_COLUMNS = {
    "balanced_acc": "balanced accuracy", "macro_f1": "macro F1", "acc": "accuracy", "mae": "mean absolute error",
    "within_1": "within one grade", "quadratic_kappa": "quadratic kappa", "ece": "calibration error",
    "nll": "negative log-likelihood", "loss": "loss",
}  # fmt: skip
CLASS_COLUMNS = {
    "recall": "recall", "precision": "precision", "f1": "F1", "auroc": "AUROC",
    "average_precision": "average precision",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ plots


def plot_curves(path: str | Path, history: Sequence[Mapping], best_epoch: int, changes: Sequence[int] = ()) -> None:
    """Plot losses and metrics over the epochs.

    history: rows of `history.csv`; changes: the epochs at which another loss or another sampling starts.
    """
    epochs = [int(row["epoch"]) for row in history]
    figure = Figure(figsize=(11, 4), layout="constrained")
    loss_axes, metric_axes = figure.subplots(1, 2)
    panels = {
        loss_axes: {"train_loss": "training", "val_loss": "validation"},
        metric_axes: {
            "val_balanced_acc": "validation balanced accuracy",
            "val_macro_f1": "validation macro F1",
            "val_acc": "validation accuracy",
            "train_acc": "training accuracy",
        },
    }
    for axes, curves in panels.items():
        for column, label in curves.items():
            style = "--" if column in ("train_acc", "val_acc") else "-"
            axes.plot(epochs, [float(row[column]) for row in history], style, marker="o", markersize=3, label=label)
        axes.axvline(best_epoch, color="0.6", linewidth=1, linestyle=":", label="best epoch")
        for number, epoch in enumerate(changes):
            label = None if number else "loss or sampling changes"
            axes.axvline(epoch - 0.5, color="tab:red", linewidth=1, linestyle=":", label=label)
        axes.set_xlabel("Epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    loss_axes.set_title("Loss")
    loss_axes.set_yscale("log")  # the first epochs of a new network are off by orders of magnitude
    loss_axes.legend()
    metric_axes.set_title("Metrics")
    metric_axes.legend(loc="lower right")
    metric_axes.set_ylim(0, 1)
    save_figure(figure, path)


def plot_confusion_matrix(path: str | Path, matrix: np.ndarray, classes: Sequence[str], title: str) -> None:
    """Plot the share of each true class (row) with each prediction (column), and the counts.

    matrix: (C, C) int, rows: true classes, columns: predictions.
    """
    matrix, classes = np.asarray(matrix), [_label(name) for name in classes]
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    side = min(20, 3 + 0.7 * len(classes))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="Share of the true class", shrink=0.8)
    fonts = {"fontfamily": ["DejaVu Sans", *_installed(HANGUL_FONTS)], "parse_math": False}
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor", **fonts)
    axes.set_yticks(range(len(classes)), classes, **fonts)
    axes.set_xlabel("Predicted class")
    axes.set_ylabel("True class")
    axes.set_title(title)
    if len(classes) <= COUNTS_UP_TO:
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, f"{shares[row, column]:.0%}\n{count}", ha="center", va="center", color=color, size=8)
    save_figure(figure, path)


def _label(name):
    """A class name that matplotlib can draw, and that leaves room for the matrix."""
    name = printable(name)
    return name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…"


def _installed(fonts):
    names = {font.name for font in font_manager.fontManager.ttflist}
    return [font for font in fonts if font in names]


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG. Prints a line if no font has the letters of its text."""
    FigureCanvasAgg(figure)
    with atomic_write(path, "wb") as file, warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "Glyph")
        figure.savefig(file, format="png", dpi=120)
    if any("Glyph" in str(warning.message) for warning in caught):
        print(f"{path}: no installed font has all letters of the class names (for Hangul, install Noto Sans CJK)")


# ------------------------------------------------------------------------------------------------------------- page


def write_report(run_dir: str | Path, args: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Write `report.html`, a single self-contained file with the metrics, the plots and the flags of a run.

    args: {flag: value}; results: as in `results.json`.
    """
    run_dir = Path(run_dir)
    title = html.escape(run_dir.name)
    plots = [_image(path) for path in (run_dir / "confusion_matrix.png", run_dir / "curves.png") if path.exists()]
    page = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>',
        f"<h1>{title}</h1><p>Model of epoch {results['evaluated_epoch']}. "
        "Brackets: 95 % confidence intervals from a bootstrap stratified by class.</p>",
        _summary_table(results),
        "<h2>Test metrics per class</h2>",
        _class_table(results),
        *plots,
        "<details><summary>Flags of the run</summary>",
        _table(["flag", "value"], [[f"--{name}", value] for name, value in args.items() if value is not None]),
        "</details></html>",
    ]
    with atomic_write(run_dir / "report.html") as file:
        file.write("\n".join(page))


def _summary_table(results):
    """One row per evaluation: validation, test, and the variants of test."""
    names = {"val": "validation", "test": "test"}
    evaluations = {name: results[split] for split, name in names.items() if split in results}
    if "tta" in results:
        evaluations["test with the mirror image"] = results["tta"]["test"]
    if "posthoc" in results:
        fitted = results["posthoc"]
        fit = f"tau {fitted['tau']:g}, temperature {fitted['temperature']:.2f}"
        evaluations[f"test with logit adjustment ({fit})"] = fitted["test"]
    columns = [name for name in SUMMARY_COLUMNS if name in results["test"]]
    rows = [[title, *(_cell(metrics, name) for name in columns)] for title, metrics in evaluations.items()]
    return _table(["", *(SUMMARY_COLUMNS[name] for name in columns)], rows)


def _class_table(results):
    counts = dict(zip(results["classes"], results["samples_per_cls"], strict=True))
    rows = [
        [name, counts[name], metrics["support"], *(_cell(metrics, column) for column in CLASS_COLUMNS)]
        for name, metrics in results["test"]["per_class"].items()
    ]
    return _table(["class", "training images", "test images", *CLASS_COLUMNS.values()], rows)


def _cell(metrics, name):
    if metrics[name] is None:  # of a class that does not occur
        return "-"
    return format_with_interval(metrics[name], metrics.get(f"{name}_ci")).replace(", ", f",{NO_BREAK_SPACE}")


def _table(heads, rows):
    cells = [[f"<td>{html.escape(str(cell))}</td>" for cell in row] for row in rows]
    head = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{''.join(row)}</tr>" for row in cells) + "</table>"


def _image(path):
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{path.stem}" src="data:image/png;base64,{data}">'
