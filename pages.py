"""HTML pages: the templates, and `report.html` and `MODEL_CARD.md` of a run."""

import functools
import os
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from advice import find_advice
from charts import Curve, confusion_chart, count_bar, grade_chart, interval_bar, line_chart, reliability_chart
from flag_queries import is_ordinal, text_of
from flags import SPLITS, build_parser
from gallery import augmented_sheet, drawn_epochs, duplicate_pairs, explain_photos, heat_scale, photographs
from images.folders import ImageIndex
from images.leakage import DUPLICATES_FILE, has_subjects
from metrics import ECE_BINS, confusion_metrics, format_with_interval
from model import Model
from run.cli import attempt, printable
from run.environment import ENVIRONMENT_FILE
from run.files import atomic_write, read_json, read_predictions, read_rows, shortened
from run.saver import BEST
from subgroups import METRICS as SUBGROUP_METRICS
from subgroups import TOO_FEW
from tracking import precision_recall_points

TEMPLATES = Path(__file__).resolve().parent / "templates"
REPORT_FILE, CARD_FILE = "report.html", "MODEL_CARD.md"
SUMMARY_COLUMNS = {
    "balanced_acc": "balanced accuracy", "macro_f1": "macro F1", "acc": "accuracy", "mae": "mean absolute error",
    "within_1": "within one grade", "quadratic_kappa": "quadratic kappa", "ece": "calibration error",
    "nll": "negative log-likelihood", "loss": "loss",
}  # fmt: skip
# {key of results.json: what it is, in words}
VARIANTS = {
    "tta": "with test-time augmentation",
    "posthoc": "with logit adjustment",
    "posthoc_macro_f1": "with logit adjustment for macro F1",
    "posthoc_exact": "with the double correction undone",
}
CLASS_COLUMNS = {
    "recall": "recall", "precision": "precision", "f1": "F1", "auroc": "AUROC",
    "average_precision": "average precision",
}  # fmt: skip
BAR_COLUMNS = ("recall", "f1")
NUM_CONFUSIONS = 5
LONGEST_NAME = 60  # letters of a class in a table
FEW_TRAINING, FEW_TEST = 20, 10  # images of a class: the model card names classes with fewer
ENVIRONMENT_KEYS = ("command", "commit", "device", "cpu", "cores", "hours_trained")
VERSIONS = ("python", "torch", "torchvision", "numpy")


# --------------------------------------------------------------------------------------------------------- templates


def render(template: str, **values: Any) -> str:
    """Fill a file of `templates/`. Text is escaped, also in Markdown; only `Markup` is taken as it is."""
    return _environment().get_template(template).render(values)


@functools.cache
def _environment():
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # a text may hold what is not valid UTF-8, and control characters
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {"short": shortened, "md": _markdown, "raw": _raw, "base": os.path.basename}
    return environment


def _markdown(text):
    """A text in a line of Markdown: nothing in it is markup, and a row of a table stays one."""
    text = str(escape(printable(str(text))))
    return Markup("".join(f"\\{letter}" if letter in "\\`*[]|~" else letter for letter in text))


def _raw(text):
    """A text in an indented block of Markdown, which is shown as it is."""
    return Markup(printable(text))


def write_page(path: str | Path, template: str, **values: Any) -> None:
    """Write `render(template, **values)` to a file."""
    page = render(template, **values)
    with atomic_write(path) as file:
        file.write(page)


# ------------------------------------------------------------------------------------------------------------ report


def write_report(
    run_dir: str | Path,
    splits: Mapping[str, ImageIndex] | None = None,
    probabilities: Mapping[str, np.ndarray] | None = None,
    model: Model | None = None,
) -> bool:
    """Write `report.html` and `MODEL_CARD.md`, self-contained, from the files of a run. What fails is one printed line.

    splits: {split: N images}, for the augmented images and, of a run that is not finished, the images per class;
    probabilities: {split: (N, C)}, otherwise read from `test_predictions.csv`; model: the evaluated one, for heat maps.
    A run without `results.json` gets a report of what there is, and no model card. -> whether there is a report
    """
    run_dir = Path(run_dir)

    def write():
        values = _run_values(run_dir, splits)
        if values["results"]:
            attempt(
                lambda: write_page(run_dir / CARD_FILE, "model_card.md", **values, **_card_values(run_dir, values)),
                f"{CARD_FILE}: not written",
            )
        sections = _sections(run_dir, values, splits, probabilities, model)
        write_page(run_dir / REPORT_FILE, "report.html", **values, **sections)
        return True

    return bool(attempt(write, f"{REPORT_FILE}: not written"))


def _run_values(run_dir, splits):
    """What both pages say of a run: what was run, on which data, with which results."""
    stored, results = read_json(run_dir / "args.json"), _read(run_dir / "results.json")
    environment = dict.fromkeys(ENVIRONMENT_KEYS) | (_read_optional(run_dir / ENVIRONMENT_FILE) or {})
    flags = {name: value for name, value in stored.items() if value is not None}
    defaults = vars(build_parser().parse_args([]))
    args = defaults | stored  # an older run lacks newer flags
    history = read_rows(run_dir / "history.csv") if (run_dir / "history.csv").exists() else []
    values = {
        "title": run_dir.resolve().name,
        "args": args,
        "results": results,
        "ordinal": is_ordinal(Namespace(**args)),
        "has_subjects": has_subjects(args, results or {}),
        "environment": environment,
        "versions": (versions := [f"{name} {environment[name]}" for name in VERSIONS if environment.get(name)]),
        "machine": _machine(environment, versions),
        "flags": [[f"--{name}", text_of(value)] for name, value in flags.items()],
        "changed_flags": [
            [f"--{name}", text_of(value), "not set" if defaults.get(name) is None else text_of(defaults[name])]
            for name, value in flags.items() if value != defaults.get(name)
        ],
        "history": history,
        "format": format_with_interval,
        "metric_names": SUMMARY_COLUMNS,
    }  # fmt: skip
    if results:
        adjusted = results.get("posthoc", {}).get("test")
        values |= {"trivial": trivial_metrics(results), "data": _data_table(results), "adjusted": adjusted}
        values["advice"] = attempt(lambda: find_advice(run_dir), f"{REPORT_FILE}: without advice") or []
    else:
        best_row = max(history, key=lambda row: float(row[args["best_metric"]]), default=None)
        values |= {"best_row": best_row, "data": _data_table_so_far(run_dir, splits)}
    return values


def _machine(environment, versions):
    """One line: device, hours, versions, commit"""
    device, hours, commit = (environment[key] for key in ("device", "hours_trained", "commit"))
    pieces = [f"{environment['cpu']}, {environment['cores']} cores" if device == "cpu" else device]
    pieces += [_duration(hours) + " of training" if hours is not None else "", *versions]
    pieces.append(f"commit {commit[:12]}{'-dirty' * commit.endswith('-dirty')}" if commit else "")
    return ", ".join(piece for piece in pieces if piece)


def _duration(hours):
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def _read(path):
    return read_json(path) if path.exists() else None


def _read_optional(path):
    """What a part of the page is made of: if it is damaged, the rest is made without it."""
    return attempt(lambda: _read(path), f"{path.name} is missing in the report")


def trivial_metrics(results: Mapping[str, Any]) -> dict[str, Any]:
    """The test metrics of a classifier that always answers with the largest class of the training.

    results: as in `results.json` -> {"class", "acc", "balanced_acc", "macro_f1"}
    """
    largest = int(np.argmax(results["samples_per_cls"]))
    matrix = np.zeros_like(results["test"]["confusion_matrix"])
    matrix[:, largest] = np.sum(results["test"]["confusion_matrix"], axis=1)
    metrics = confusion_metrics(matrix[None])
    names = ("acc", "balanced_acc", "macro_f1")
    return {"class": results["classes"][largest], **{name: float(metrics[name][0]) for name in names}}


def _data_table(results):
    """One row per class: images per split; the last row is of all classes."""
    columns = [results["samples_per_cls"]]
    evaluated = [split for split in SPLITS if split in results]
    columns += [[row["support"] for row in results[split]["per_class"].values()] for split in evaluated]
    names = [shortened(name, LONGEST_NAME) for name in results["classes"]]
    rows = [[name, *counts] for name, *counts in zip(names, *columns, strict=True)]
    return {"heads": ["class", "train", *evaluated], "rows": [*rows, ["all", *map(sum, columns)]]}


def _data_table_so_far(run_dir, splits):
    """`_data_table` of a run without results; without `splits` only its last row. None if there is no splits.json."""
    paths = _read_optional(run_dir / "splits.json")
    if not paths:
        return None
    rows = []
    if splits:
        names = [shortened(name, LONGEST_NAME) for name in splits["train"].classes]
        rows = [list(row) for row in zip(names, *(splits[split].counts() for split in SPLITS), strict=True)]
    return {"heads": ["class", *SPLITS], "rows": [*rows, ["all", *(len(paths[split]) for split in SPLITS)]]}


def _card_values(run_dir, values):
    """What only the model card has."""
    args, results = values["args"], values["results"]
    per_class = results["test"]["per_class"]
    return {
        # without the folders above it, which are nobody's business where the card is published
        "checkpoint": shlex.quote(str(args["resume"]) if args.get("eval_only") else f"{run_dir.resolve().name}/{BEST}"),
        "trained_for": _duration(hours) if (hours := values["environment"]["hours_trained"]) is not None else None,
        "evaluations": _evaluations(results) | {f"always {values['trivial']['class']}": values["trivial"]},
        "metric_columns": {name: SUMMARY_COLUMNS[name] for name in SUMMARY_COLUMNS if name in results["test"]},
        "few_training": [
            name for name, n in zip(results["classes"], results["samples_per_cls"], strict=True) if n < FEW_TRAINING
        ],
        "few_test": [name for name, metrics in per_class.items() if metrics["support"] < FEW_TEST],
    }


def _sections(run_dir, values, splits, probabilities, model):
    """What only the report has: charts and photographs."""
    args, results, history = values["args"], values["results"], values["history"]
    settings = Namespace(**args)
    curves = []
    if history:
        best_epoch = results["best_epoch"] if results else int(values["best_row"]["epoch"])
        curves = curve_charts(history, best_epoch, stage_changes(args))
    sections = {"curves": curves, "duplicates": None, "sheet": []}
    if found := _read_optional(run_dir / DUPLICATES_FILE):
        sections["duplicates"] = found | {"shown": duplicate_pairs(found, args["resize"])}
    if splits and "train" in splits:
        drawn = drawn_epochs(splits["train"], settings)[0]
        sections |= {"sheet": augmented_sheet(drawn), "sheet_epoch": drawn.epoch}
    if not results:
        return sections
    classes, counts = results["classes"], results["samples_per_cls"]
    sections |= {
        "summary": _summary_table(results, values["trivial"]),
        "per_class": _class_table(results),
        "matrix": confusion_chart("confusion matrix of the test", results["test"]["confusion_matrix"], classes),
        "confusions": most_confused(results["test"]["confusion_matrix"], classes),
        "subgroups": [_subgroup_table(name, found) for name, found in results.get("subgroups", {}).items()],
        "photos": None,
    }
    if splits and probabilities:
        predictions = splits["test"].paths, splits["test"].targets, probabilities["test"]
    else:
        path = run_dir / "test_predictions.csv"
        predictions = attempt(lambda: read_predictions(path, classes), "the report has no photographs and calibration")
    if predictions is None:
        return sections
    paths, targets, probabilities = predictions
    photos = photographs(paths, targets, probabilities, classes, counts, args["resize"])
    note = explain_photos(photos, model, probabilities, classes, settings)
    return sections | {
        "reliability": reliability_chart("reliability diagram", reliability_bins(targets, probabilities)),
        "precision_recall": precision_recall_charts(targets, probabilities, results),
        "grades": _grades(targets, probabilities, classes) if values["ordinal"] else None,
        "photos": photos,
        "heat_scale": heat_scale() if any(photo.heat_maps for group in photos.values() for photo in group) else None,
        "counts": dict(zip(classes, counts, strict=True)),
        "heat_map_note": note,
    }


# ------------------------------------------------------------------------------------------------- tables and charts


def _evaluations(results):
    """-> {title: metrics}: validation, test, and the variants of test"""
    names = {"val": "validation", "test": "test"}
    evaluations = {name: results[split] for split, name in names.items() if split in results}
    for name, about in VARIANTS.items():
        if variant := results.get(name):
            fit = " (nothing is fitted)" if name == "posthoc_exact" else ""
            if "tau" in variant:
                fit = f" (tau {variant['tau']:g}, temperature {variant['temperature']:.2f})"
            evaluations[f"test {about}{fit}"] = variant["test"]
    return evaluations


def _summary_table(results, trivial):
    """One row per evaluation, and one of the trivial classifier."""
    evaluations, columns = _evaluations(results), [name for name in SUMMARY_COLUMNS if name in results["test"]]
    rows = [[title, *(_cell(metrics, name) for name in columns)] for title, metrics in evaluations.items()]
    rows.append([f"always “{shortened(trivial['class'])}”", *(_cell(trivial, name) for name in columns)])
    heads, main = ["", *(SUMMARY_COLUMNS[name] for name in columns)], [list(evaluations).index("test")]
    return {"heads": heads, "rows": rows, "main": main}


def _class_table(results):
    counts = dict(zip(results["classes"], results["samples_per_cls"], strict=True))
    largest, rows = max(counts.values()), []
    for name, metrics in results["test"]["per_class"].items():
        training = Markup('<span class="bar">{} {}</span>').format(count_bar(counts[name], largest), counts[name])
        cells = [_cell(metrics, column, bar=column in BAR_COLUMNS) for column in CLASS_COLUMNS]
        rows.append([shortened(name, LONGEST_NAME), training, metrics["support"], *cells])
    return {"heads": ["class", "training images", "test images", *CLASS_COLUMNS.values()], "rows": rows}


def _subgroup_table(column, found):
    """One row per group of a column, and the largest gap."""
    rows = []
    for group in found["groups"]:
        cells = ["", TOO_FEW, "", ""]
        if "acc" in group:
            cells = [group["classes"]]
            cells += [_cell(group, name, bar=name == "balanced_acc") for name in SUBGROUP_METRICS]
        rows.append([shortened(group["value"], LONGEST_NAME), group["images"], *cells])
    heads = ["value", "test images", "classes", *SUBGROUP_METRICS.values()]
    return {"column": column, "heads": heads, "rows": rows, "gap": found["gap"]}


def _cell(metrics, name, bar=False):
    """A value with its interval; "-" for a class that does not occur, and for what a classifier does not have."""
    value, interval = metrics.get(name), metrics.get(f"{name}_ci")
    if value is None:
        return "-"
    text = Markup(f"{value:.3f}")
    if interval is not None:
        text += Markup(f' <span class="unit">[{interval[0]:.3f}, {interval[1]:.3f}]</span>')
    if bar:
        text = Markup('<span class="bar">{} <span>{}</span></span>').format(interval_bar(value, interval), text)
    return text


def stage_changes(args: Mapping[str, Any]) -> list[int]:
    """The epochs at which another loss or another sampling starts. args: {flag: value}, as in `args.json`"""
    starts = [args.get("drw_epoch"), args["crt_epochs"] and args["epochs"] - args["crt_epochs"]]
    return [start for start in starts if start]


def curve_charts(history: Sequence[Mapping], best_epoch: int, changes: Sequence[int] = ()) -> list[Markup]:
    """Losses and metrics over the epochs. history: at least one row of `history.csv`; changes: of `stage_changes`."""
    marks = [*((epoch - 0.5, "") for epoch in changes), (best_epoch, f"best epoch {best_epoch}")]
    epochs = [int(row["epoch"]) for row in history]

    def curves(columns):
        return [
            Curve(name, epochs, [float(row[column]) for row in history], color, dashed)
            for column, (name, color, dashed) in columns.items()
        ]

    losses = {"train_loss": ("training", 2, True), "val_loss": ("validation", 1, False)}
    metrics = {
        "val_balanced_acc": ("balanced accuracy", 1, False), "val_macro_f1": ("macro F1", 3, False),
        "val_acc": ("accuracy", 4, True), "train_acc": ("training accuracy", 2, True),
    }  # fmt: skip
    rates = {"learning_rate": ("learning rate", 8, False)}
    return [
        line_chart("Loss", curves(losses), "epoch", y_label="loss", log=True, marks=marks),
        line_chart(
            "Metrics of the validation", curves(metrics), "epoch", y_label="validation", y_range=(0, 1), marks=marks
        ),
        line_chart("Learning rate", curves(rates), "epoch", y_label="learning rate", marks=marks),
    ]


def most_confused(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> list[list]:
    """-> [class, its prediction, images, share of the class], the largest shares of a class first."""
    matrix = np.array(matrix)
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    np.fill_diagonal(shares, 0)
    order = np.argsort(-shares, axis=None, kind="stable")[:NUM_CONFUSIONS]
    cells = [divmod(int(cell), len(classes)) for cell in order if shares.flat[cell]]
    names = [shortened(name) for name in classes]
    return [[names[r], names[c], int(matrix[r, c]), f"{shares[r, c]:.0%}"] for r, c in cells]


def reliability_bins(targets: np.ndarray, probabilities: np.ndarray) -> list[tuple[float, float, int]]:
    """The bins of the expected calibration error (Guo et al. 2017) that are not empty.

    targets: (N,) int; probabilities: (N, C) -> [(mean confidence, share of right predictions, images)]
    """
    confidence, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    members = [bins == b for b in np.unique(bins)]
    return [(float(confidence[of].mean()), float(is_right[of].mean()), int(of.sum())) for of in members]


def precision_recall_charts(
    targets: np.ndarray, probabilities: np.ndarray, results: Mapping[str, Any]
) -> list[tuple[str, float, float, Markup]]:
    """-> [(class, average precision, share of the class among the images, chart)]"""
    curves, charts = {}, []
    for name, recall, precision in precision_recall_points(targets, probabilities, results["classes"]):
        curves.setdefault(name, ([], []))[0].append(recall)
        curves[name][1].append(precision)
    for name, (recall, precision) in curves.items():
        metrics = results["test"]["per_class"][name]
        share = metrics["support"] / len(targets)
        pieces = [Curve("", recall, precision), Curve("", [0, 1], [share, share], 8, dashed=True)]
        title = f"precision against recall of {shortened(name)}"
        chart = line_chart(title, pieces, "recall", y_label="precision", y_range=(0, 1), width=190, height=170)
        charts.append((name, metrics["average_precision"], share, chart))
    return charts


def _grades(targets, probabilities, classes):
    expected = probabilities @ np.arange(len(classes))
    return grade_chart("grade of the expert against expected grade of the model", targets, expected, classes)
