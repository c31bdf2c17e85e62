#!/usr/bin/env python3
"""Pictures of a run, and the page that shows them with the figures; as a command, runs compared.

python report.py checkpoints_*         # mean and spread over the seeds and folds of runs with the same flags
"""

import base64
import html
import json
import statistics
import sys
import warnings
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from files import UserError, atomic_write, read_json
from flags import Parser, is_neutral
from resuming import exit_status

# matplotlib's own font has no Hangul; these, where installed, draw class names that need it
HANGUL_FONTS = ("Noto Sans CJK KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo", "AppleGothic")


def plot_curves(path, history, best_epoch, changes=()):
    """Loss and the metrics over the epochs. history: rows of `history.csv`; changes: the epochs with which another loss
    or other sampling begins."""
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
        for number, epoch in enumerate(changes):
            label = None if number else "another loss or sampling from here"
            axes.axvline(epoch - 0.5, color="tab:red", linewidth=1, linestyle=":", label=label)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    loss_axes.set_title("loss")
    loss_axes.set_yscale("log")  # the first epochs of a new network are off by orders of magnitude
    loss_axes.legend()
    metric_axes.set_title("metrics")
    metric_axes.legend(loc="lower right")
    metric_axes.set_ylim(0, 1)
    save_figure(figure, path)


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
    fonts = {"fontfamily": ["DejaVu Sans", *_installed(HANGUL_FONTS)], "parse_math": False}
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor", **fonts)
    axes.set_yticks(range(len(classes)), classes, **fonts)
    axes.set_xlabel("prediction")
    axes.set_ylabel("true class")
    axes.set_title(title)
    if len(classes) <= 25:
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, f"{shares[row, column]:.0%}\n{count}", ha="center", va="center", color=color, size=8)
    save_figure(figure, path)


def _installed(fonts):
    names = {font.name for font in font_manager.fontManager.ttflist}
    return [font for font in fonts if font in names]


def save_figure(figure, path):
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
SUMMARY_COLUMNS = {
    "balanced_acc": "balanced accuracy", "macro_f1": "macro F1", "acc": "accuracy", "mae": "mean absolute error",
    "within_1": "within one grade", "quadratic_kappa": "quadratic kappa", "ece": "calibration error",
    "nll": "negative log likelihood", "loss": "loss",
}  # fmt: skip
CLASS_COLUMNS = {
    "recall": "recall", "precision": "precision", "f1": "F1", "auroc": "AUROC",
    "average_precision": "average precision",
}  # fmt: skip


def write_report(run_dir, args, results):
    """Write `report.html`, one file that needs no other: the figures, the run's pictures, the flags.

    args: {flag: value}; results: as in `results.json`.
    """
    run_dir = Path(run_dir)
    parts = [part for part in ("val", "test") if part in results]
    evaluated = {part: results[part] for part in parts}
    if "tta" in results:
        evaluated["test, with the mirror image"] = results["tta"]["test"]
    if "posthoc" in results:
        fitted = results["posthoc"]
        title = f"test, logit adjustment (tau {fitted['tau']:g}), temperature {fitted['temperature']:.2f}"
        evaluated[title] = results["posthoc"]["test"]
    columns = [name for name in SUMMARY_COLUMNS if name in results["test"]]
    summary = [[title, *(_with_interval(figures, name) for name in columns)] for title, figures in evaluated.items()]
    counts = dict(zip(results["classes"], results["samples_per_cls"], strict=True))
    per_class = [
        [name, counts[name], row["support"], *(_with_interval(row, key) for key in CLASS_COLUMNS)]
        for name, row in results["test"]["per_class"].items()
    ]
    pictures = [_picture(path) for path in (run_dir / "confusion_matrix.png", run_dir / "curves.png") if path.exists()]
    title = html.escape(run_dir.name)
    page = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>',
        f"<h1>{title}</h1><p>Model of epoch {results['evaluated_epoch']}</p>",
        _table(["", *(SUMMARY_COLUMNS[name] for name in columns)], summary),
        "<h2>Test, class by class</h2>",
        _table(["class", "training images", "test images", *CLASS_COLUMNS.values()], per_class),
        "<p>In brackets: 95 % intervals of a bootstrap stratified by class.</p>",
        *pictures,
        "<details><summary>Flags of the run</summary>",
        _table(["flag", "value"], [[f"--{name}", value] for name, value in args.items() if value is not None]),
        "</details></html>",
    ]
    with atomic_write(run_dir / "report.html") as file:
        file.write("\n".join(page))


SPREAD = ("balanced_acc", "macro_f1", "acc")


def spread_over(run_dirs):
    """-> {figure: {"mean", "std", "values"}} over runs, of `results.json`: test_..., test_posthoc_... and val_....

    std: the sample standard deviation, None for one run.
    """
    values = {}
    for run_dir in run_dirs:
        results = read_json(run_dir / "results.json")
        parts = {"test": results["test"], "test_posthoc": results.get("posthoc", {}).get("test")}
        for part, figures in {**parts, "val": results.get("val")}.items():
            for name in SPREAD if figures else ():
                values.setdefault(f"{part}_{name}", []).append(figures[name])
    spread = {}
    for name, of_runs in values.items():
        std = statistics.stdev(of_runs) if len(of_runs) > 1 else None
        spread[name] = {"mean": statistics.mean(of_runs), "std": std, "values": of_runs}
    return spread


def print_spread(title, spread):
    print(f"{title}:")
    for name, of in spread.items():
        std = "" if of["std"] is None else f" +- {of['std']:.3f}"
        print(f"{name:>26} {of['mean']:.3f}{std}  ({', '.join(f'{value:.3f}' for value in of['values'])})")


def compare(run_dirs):
    """Mean and spread over the seeds and folds of runs with the same flags, the best on validation images first.

    Those that were not evaluated on validation images come last.
    """
    groups = {}
    for run_dir in dict.fromkeys(Path(run_dir).resolve() for run_dir in run_dirs):
        if not (run_dir / "results.json").exists():
            print(f"passed over: {run_dir} is not a finished run")
            continue
        args = read_json(run_dir / "args.json")
        flags = {name: value for name, value in args.items() if not is_neutral(name) and name not in ("seed", "fold")}
        groups.setdefault(json.dumps(flags, sort_keys=True), []).append(run_dir)
    if not groups:
        raise UserError(f"{run_dirs[0]}: is not a finished run, nor is any other")
    chosen = [json.loads(key) for key in groups]
    names = dict.fromkeys(name for flags in chosen for name in flags)
    differing = [name for name in names if len({json.dumps(flags.get(name)) for flags in chosen}) > 1]
    spreads = []
    for flags, members in zip(chosen, groups.values(), strict=True):
        title = " ".join(f"--{name} {flags.get(name)}" for name in differing)
        spreads.append((f"{title or members[0]} ({len(members)} runs)", spread_over(members)))
    for title, spread in sorted(spreads, key=lambda one: -one[1].get("val_balanced_acc", {"mean": 0})["mean"]):
        print_spread(title, spread)


def _with_interval(figures, name):
    if figures[name] is None:  # of a class that does not occur
        return "-"
    if f"{name}_ci" not in figures:
        return f"{figures[name]:.3f}"
    low, high = figures[f"{name}_ci"]
    return f"{figures[name]:.3f} [{low:.3f}, {high:.3f}]"


def _table(heads, rows):
    cells = [[f"<td>{html.escape(str(cell))}</td>" for cell in row] for row in rows]
    head = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{''.join(row)}</tr>" for row in cells) + "</table>"


def _picture(path):
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{path.stem}" src="data:image/png;base64,{data}">'


def run(argv):
    parser = Parser(description=compare.__doc__, allow_abbrev=False, prog="report.py")
    parser.add_argument("run_dirs", nargs="+", metavar="RUN", help="folder of a finished run of main.py")
    compare(parser.parse_args(argv).run_dirs)


def main_report(argv=None):
    """-> exit status, as main.py's."""
    return exit_status(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main_report())
