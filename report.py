"""Pictures of a run, and the page that shows them with the figures."""

import base64
import html
import warnings
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from files import atomic_write

# matplotlib's own font has no Hangul; these, where installed, draw class names that need it
HANGUL_FONTS = ("Noto Sans CJK KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic")


def plot_curves(path, history, best_epoch):
    """Loss and the metrics over the epochs. history: rows of `history.csv`."""
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
            dashed = "--" if column in ("train_acc", "val_acc") else "-"
            axes.plot(epochs, [float(row[column]) for row in history], dashed, marker="o", markersize=3, label=label)
        axes.axvline(best_epoch, color="0.6", linewidth=1, linestyle=":", label="best epoch")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    loss_axes.set_title("loss")
    loss_axes.set_yscale("log")  # the first epochs of a new network are off by orders of magnitude
    loss_axes.legend()
    metric_axes.set_title("metrics")
    metric_axes.legend(loc="lower right")
    metric_axes.set_ylim(0, 1)
    _save(figure, path)


def plot_confusion_matrix(path, matrix, classes, title):
    """Share of each true class (row) that was given each prediction (column), with the counts.

    matrix: (C, C) int, rows true, columns predicted.
    """
    matrix = np.asarray(matrix)
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    side = min(20, 3 + 0.7 * len(classes))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    fonts = {"fontfamily": ["DejaVu Sans", *_installed(HANGUL_FONTS)]}
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor", **fonts)
    axes.set_yticks(range(len(classes)), classes, **fonts)
    axes.set_xlabel("prediction")
    axes.set_ylabel("true class")
    axes.set_title(title)
    if len(classes) <= 25:
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, f"{shares[row, column]:.0%}\n{count}", ha="center", va="center", color=color, size=8)
    _save(figure, path)


def _installed(fonts):
    names = {font.name for font in font_manager.fontManager.ttflist}
    return [font for font in fonts if font in names]


def _save(figure, path):
    FigureCanvasAgg(figure)
    with atomic_write(path, "wb") as file, warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "Glyph")
        figure.savefig(file, format="png", dpi=120)
    if any("Glyph" in str(warning.message) for warning in caught):
        print(f"{path}: no installed font has all letters of the class names (for Hangul, install Noto Sans CJK)")


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 } th, td { padding: .2rem .8rem; border-bottom: 1px solid #ddd }
td { text-align: right; font-variant-numeric: tabular-nums } td:first-child, th:first-child { text-align: left }
img { max-width: 100%; margin: .5rem 0 } summary { cursor: pointer }
"""
SUMMARY_COLUMNS = ("balanced_acc", "macro_f1", "acc", "loss")


def write_report(run_dir, args, results):
    """Write `report.html`, one file that needs no other: the figures, the run's pictures, the flags.

    args: {flag: value}; results: as in `results.json`.
    """
    run_dir = Path(run_dir)
    parts = [part for part in ("val", "test") if part in results]
    summary = [[part, *(f"{results[part][name]:.3f}" for name in SUMMARY_COLUMNS)] for part in parts]
    counts = dict(zip(results["classes"], results["samples_per_cls"], strict=True))
    per_class = [
        [name, counts[name], row["support"], *(f"{row[key]:.3f}" for key in ("recall", "precision", "f1"))]
        for name, row in results["test"]["per_class"].items()
    ]
    pictures = [_picture(path) for path in (run_dir / "confusion_matrix.png", run_dir / "curves.png") if path.exists()]
    title = html.escape(run_dir.name)
    page = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>',
        f"<h1>{title}</h1><p>Best epoch: {results['best_epoch']}</p>",
        _table(["", "balanced accuracy", "macro F1", "accuracy", "loss"], summary),
        "<h2>Test, class by class</h2>",
        _table(["class", "training images", "test images", "recall", "precision", "F1"], per_class),
        *pictures,
        "<details><summary>Flags of the run</summary>",
        _table(["flag", "value"], [[f"--{name}", value] for name, value in args.items() if value is not None]),
        "</details></html>",
    ]
    with atomic_write(run_dir / "report.html") as file:
        file.write("\n".join(page))


def _table(heads, rows):
    cells = [[f"<td>{html.escape(str(cell))}</td>" for cell in row] for row in rows]
    head = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{''.join(row)}</tr>" for row in cells) + "</table>"


def _picture(path):
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{path.stem}" src="data:image/png;base64,{data}">'
