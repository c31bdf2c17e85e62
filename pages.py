"""HTML pages: the templates, and `report.html` of a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from images.folders import ImageIndex
from metrics import format_with_interval
from model import Model
from run.cli import first_line
from run.files import atomic_write, printable, read_json

TEMPLATES = Path(__file__).resolve().parent / "templates"
REPORT_FILE = "report.html"
NO_BREAK_SPACE = "\u00a0"
SUMMARY_COLUMNS = {
    "balanced_acc": "balanced accuracy", "macro_f1": "macro F1", "acc": "accuracy", "mae": "mean absolute error",
    "within_1": "within one grade", "quadratic_kappa": "quadratic kappa", "ece": "calibration error",
    "nll": "negative log-likelihood", "loss": "loss",
}  # fmt: skip
CLASS_COLUMNS = {
    "recall": "recall", "precision": "precision", "f1": "F1", "auroc": "AUROC",
    "average_precision": "average precision",
}  # fmt: skip


def render(template: str, **values: Any) -> str:
    """Fill a file of `templates/`. Text is escaped; only `markupsafe.Markup` is taken as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    return environment.get_template(template).render(values)


def _finalize(value):
    """Texts of other systems may hold what is not valid UTF-8 and control characters."""
    return printable(value) if type(value) is str else value


def write_page(path: str | Path, template: str, **values: Any) -> None:
    """Write `render(template, **values)` to a file."""
    page = render(template, **values)
    with atomic_write(path) as file:
        file.write(page)


def write_report(
    run_dir: str | Path,
    splits: Mapping[str, ImageIndex] | None = None,
    probabilities: Mapping[str, np.ndarray] | None = None,
    model: Model | None = None,
) -> None:
    """Write `report.html`, one self-contained file, from the files of a run. What fails is one printed line.

    splits: {split: N images}, where they are at hand; probabilities: {split: (N, C)}, otherwise read from
    `test_predictions.csv`; model: the evaluated one, for heat maps.
    """
    try:
        _write_report(Path(run_dir))
    except Exception as error:  # it is only informative
        print(f"warning: {REPORT_FILE} was not written ({first_line(error) or type(error).__name__})")


def _write_report(run_dir):
    args, results = read_json(run_dir / "args.json"), read_json(run_dir / "results.json")
    flags = [[f"--{name}", _text_of(value)] for name, value in args.items() if value is not None]
    write_page(
        run_dir / REPORT_FILE,
        "report.html",
        title=run_dir.resolve().name,
        results=results,
        summary=_summary_table(results),
        per_class=_class_table(results),
        flags=flags,
    )


def _text_of(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
    return {"heads": ["", *(SUMMARY_COLUMNS[name] for name in columns)], "rows": rows}


def _class_table(results):
    counts = dict(zip(results["classes"], results["samples_per_cls"], strict=True))
    rows = [
        [name, counts[name], metrics["support"], *(_cell(metrics, column) for column in CLASS_COLUMNS)]
        for name, metrics in results["test"]["per_class"].items()
    ]
    return {"heads": ["class", "training images", "test images", *CLASS_COLUMNS.values()], "rows": rows}


def _cell(metrics, name):
    if metrics[name] is None:  # of a class that does not occur
        return "-"
    return format_with_interval(metrics[name], metrics.get(f"{name}_ci")).replace(", ", f",{NO_BREAK_SPACE}")
