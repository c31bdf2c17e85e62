"""`comparison.html`: the metrics, differing flags, paired differences and curves of several runs."""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from charts import Curve, line_chart
from flag_queries import text_of
from images.leakage import has_subjects
from metrics import format_with_interval
from pages import write_page
from run.cli import UserError
from run.files import shortened
from study.run_comparison import PairedComparison, compare_groups
from study.run_records import RunGroup, RunRecord, group_records

GENERATOR = '<meta name="generator" content="report.py">'  # by which the command knows its own pages
HEAD_LENGTH = 2**16  # letters of a page in which it is found
NAMES = {"balanced_acc": "balanced accuracy", "macro_f1": "macro F1", "acc": "accuracy"}
CURVES = {
    "val_balanced_acc": "validation balanced accuracy", "val_loss": "validation loss", "train_loss": "training loss",
}  # fmt: skip
NUM_NAMED = 7  # groups with a color and a name in the charts; the color of all others is the muted one
MUTED = 8
LONGEST_NAME = 9  # letters of a folder in a chart
MAX_ROWS = 200  # of a table


def check_own_page(path: str | Path) -> None:
    """Raise UserError if there is something at `path` that this module has not written."""
    path = Path(path)
    if not path.exists():
        return
    is_own = False
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            is_own = GENERATOR in file.read(HEAD_LENGTH)
    if not is_own:
        raise UserError(f"--output: {path} exists and was not written by report.py; name another file")


def write_comparison_page(path: str | Path, records: Sequence[RunRecord]) -> None:
    """Write the comparison of several runs, finished or not, in one self-contained file."""
    groups = group_records(records)
    folders = short_names([record.folder for record in records])
    runs, lines = [], []
    for number, group in enumerate(groups, start=1):
        name = _end_of(folders[group.runs[0].folder]) if len(group.runs) == 1 else group.count()
        lines.append((f"{number}: {name}", group.runs))
        runs += [(f"{number}: {shortened(folders[run.folder], 60)}", run) for run in group.runs]
    write_page(
        path,
        "comparison.html",
        generator=Markup(GENERATOR),
        title=f"Comparison of {len(records)} runs",
        has_other_classes=len({run.classes() for run in records if run.classes()}) > 1,
        groups=_group_table(groups),
        runs=run_table(runs),
        flags=_flag_table(groups),
        paired=_difference_table(groups, compare_groups(groups)),
        curves=overlaid_curves(lines),
        num_named=NUM_NAMED,
        num_groups=len(groups),
    )


def _end_of(name):
    """For the room in a chart; names of runs often begin alike and end in a time or a number."""
    return name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"


def overlaid_curves(lines: Sequence[tuple[str, Sequence[RunRecord]]]) -> list[Markup]:
    """One chart per metric of CURVES with a curve per run, dashed if the run is not finished.

    lines: (name, runs of the same color). The first NUM_NAMED have a color and a name; all others are gray.
    """
    charts = []
    for column, title in CURVES.items():
        curves = []
        for number, (name, runs) in enumerate(lines, start=1):
            rows_of = [(run, [row for row in run.history if column in row]) for run in runs]
            for run, rows in rows_of:
                if not rows:
                    continue
                xs, ys = [row["epoch"] for row in rows], [row[column] for row in rows]
                is_named = number <= NUM_NAMED
                curve_name = name if is_named else ""
                curves.append(
                    Curve(curve_name, xs, ys, number if is_named else MUTED, dashed=not run.results, faint=not is_named)
                )
                name = ""  # of the first curve of this color only
        if curves:
            is_loss = column.endswith("loss")
            curves.reverse()  # the first are drawn last, above the others
            charts.append(
                line_chart(title, curves, "epoch", y_label=title, y_range=None if is_loss else (0, 1), log=is_loss)
            )
    return charts


def _group_table(groups):
    """Mean and standard deviation; None if no group has several finished runs."""
    finished = [[run for run in group.runs if run.results] for group in groups]
    if max(map(len, finished), default=0) < 2:
        return None
    heads = ["", "runs", "validation balanced accuracy", *(f"test {name}" for name in NAMES.values())]
    rows = []
    for number, (group, runs) in enumerate(zip(groups, finished, strict=True), start=1):
        cells = [_mean(run.val_balanced_acc() for run in runs)]
        cells += [_mean(run.test_metrics().get(name) for run in runs) for name in NAMES]
        rows.append([_title(number, group), len(runs), *cells])
    return _bounded({"heads": heads, "rows": rows})


def _title(number, group):
    return f"{number}: {group.title}"


def _mean(values):
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def run_table(runs: Sequence[tuple[str, RunRecord]]) -> dict:
    """runs: (name, run) -> {"heads", "rows": one per run, "left_out": number of further ones}"""
    heads = ["", "seed", "epochs", "best epoch", "validation balanced accuracy"]
    heads += [f"test {name}" for name in NAMES.values()]
    rows = []
    for name, run in runs:
        value = run.val_balanced_acc()
        best_epoch = (run.results or {}).get("best_epoch", "-")
        cells = [_cell(run.test_metrics(), metric) for metric in NAMES]
        about = [name, run.args.get("seed", "-"), run.epochs_done(), best_epoch]
        rows.append([*about, "-" if value is None else f"{value:.3f}", *cells])
    return _bounded({"heads": heads, "rows": rows})


def _cell(metrics, name):
    if metrics.get(name) is None:
        return "-"
    return format_with_interval(metrics[name], metrics.get(f"{name}_ci"))


def _bounded(table):
    left_out = max(0, len(table["rows"]) - MAX_ROWS)
    return {**table, "rows": table["rows"][:MAX_ROWS], "left_out": left_out}


def short_names(folders: Sequence[Path]) -> dict[Path, str]:
    """-> {folder: its path below the deepest folder that all of them share, or its whole path if there is none}"""
    try:
        root = os.path.commonpath([folder.parent for folder in folders])
    except ValueError:  # on several drives of Windows
        return {folder: str(folder) for folder in folders}
    return {folder: os.path.relpath(folder, root) for folder in folders}


def _flag_table(groups):
    """One row per flag that differs between the groups, one column per group."""
    names = list(groups[0].flags)
    if not names:
        return None
    shown = groups[:MAX_ROWS]
    rows = [
        [number, *("-" if (value := group.flags[name]) is None else text_of(value) for name in names)]
        for number, group in enumerate(shown, start=1)
    ]
    return {"heads": ["", *(f"--{name}" for name in names)], "rows": rows, "left_out": len(groups) - len(shown)}


def _difference_table(groups: Sequence[RunGroup], paired: PairedComparison):
    """Paired differences from the baseline, and which groups have none."""
    if paired.baseline is None:
        return None
    titles = {id(group): _title(number, group) for number, group in enumerate(groups, start=1)}
    heads = ["", "pairs of runs"]
    for name in ("balanced accuracy", "macro F1"):
        heads += [f"difference in {name}", "p"]
    rows = []
    for difference in paired.differences:
        row, values = [titles[id(difference.group)], difference.num_pairs], difference.statistics
        for name in ("balanced_acc", "macro_f1"):
            interval = values[f"{name}_difference_ci"]
            row += [
                format_with_interval(values[f"{name}_difference"], interval, sign="+"),
                f"{values[f'{name}_p']:.3f}",
            ]
        rows.append(row)
    return {
        **_bounded({"heads": heads, "rows": rows}),
        "baseline": titles[id(paired.baseline)],
        "other_images": [titles[id(group)] for group in paired.left_out[:MAX_ROWS]],
        "has_subjects": any(has_subjects(run.args, run.results) for run in paired.baseline.runs),
    }
