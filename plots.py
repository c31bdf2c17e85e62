"""Plots of a run as PNG files: curves and confusion matrix."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from run.files import atomic_write, shortened

# matplotlib's default font has no Hangul; class names that need it are drawn in one of these, if installed
HANGUL_FONTS = ("Noto Sans CJK KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic")
COUNTS_UP_TO = 25  # classes; the cells of larger confusion matrices are too small for text


def plot_curves(path: str | Path, history: Sequence[Mapping], best_epoch: int, changes: Sequence[int] = ()) -> None:
    """Plot losses and metrics over the epochs.

    history: rows of `history.csv`; changes: the epochs at which another loss or another sampling starts.
    """
    epochs = [int(row["epoch"]) for row in history]
    figure = Figure(figsize=(11, 4.8), layout="constrained")
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
    metric_axes.set_title("Metrics")
    for axes in panels:  # below the axes: a curve may run anywhere inside
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    metric_axes.set_ylim(0, 1)
    save_figure(figure, path)


def plot_confusion_matrix(path: str | Path, matrix: np.ndarray, classes: Sequence[str], title: str) -> None:
    """Plot the share of each true class (row) with each prediction (column), and the counts.

    matrix: (C, C) int, rows: true classes, columns: predictions.
    """
    matrix, classes = np.asarray(matrix), [shortened(name) for name in classes]
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
