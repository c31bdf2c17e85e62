"""`label_issues.csv` and `report.html` of a cross-validation."""

from argparse import Namespace
from pathlib import Path

import numpy as np

from charts import confusion_chart, interval_bar
from flag_queries import is_ordinal
from gallery import data_uris
from images.decode import limit_image_size
from images.leakage import has_subjects
from metrics import format_with_interval
from pages import REPORT_FILE, write_page
from run.cli import attempt
from run.files import read_json
from run.folder import FOLDS_RESULTS
from study.comparison_page import NAMES, overlaid_curves, run_table
from study.label_issues import LABEL_ISSUES_FILE, find_label_issues, write_label_issues
from study.out_of_fold import OutOfFold, pooled_metrics, read_folds
from study.run_records import fold_folders, read_record

NUM_THUMBNAILS = 60


def write_cross_validation(folder: Path) -> bool:
    """Write `label_issues.csv` and `report.html` from the files of the finished folds. A failure is a line.

    -> whether both were written, or no fold is finished"""
    no_issues, no_page = (f"{name}: not written" for name in (LABEL_ISSUES_FILE, REPORT_FILE))
    records = attempt(lambda: [r for path in fold_folders(folder) if (r := read_record(path))], no_issues)
    finished = [record for record in records or [] if record.results]
    if not finished:
        return records is not None
    images = attempt(lambda: read_folds([record.folder for record in finished]), no_issues)
    doubtful = attempt(lambda: _write_issues(folder / LABEL_ISSUES_FILE, images), no_issues) if images else None
    has_page = attempt(lambda: _write_page(folder, records, finished, images, doubtful), no_page)
    return bool(has_page) and doubtful is not None


def _write_issues(path, images):
    doubtful = find_label_issues(images.targets, images.probabilities)
    write_label_issues(path, images, doubtful)
    print(f"{len(doubtful)} of {len(images.targets)} labels are doubtful: {path}")
    return doubtful


def _write_page(folder, records, finished, images, doubtful):
    args = finished[0].args
    limit_image_size(finished[0].max_megapixels())
    pooled = _pooled(folder, finished, images)
    named = [(f"fold {record.folder.name.removeprefix('fold_')}", record) for record in records]
    write_page(
        folder / REPORT_FILE,
        "cross_validation.html",
        title=folder.resolve().name,
        num_folds=args.get("folds") or len(records),
        num_finished=len(finished),
        has_subjects=has_subjects(args, finished[0].results),
        names=NAMES,
        pooled=pooled,
        format=format_with_interval,
        classes=_class_rows(finished, pooled) if pooled else None,
        confusion=pooled
        and confusion_chart("Confusion matrix", pooled["confusion_matrix"], finished[0].results["classes"]),
        runs=run_table(named),
        curves=overlaid_curves([(name, [record]) for name, record in named]),
        issues_file=LABEL_ISSUES_FILE,
        num_images=len(images.targets) if images else 0,
        num_issues=None if doubtful is None else len(doubtful),
        issues=[] if doubtful is None else thumbnails(images, doubtful, args.get("resize", "stretch")),
    )
    print(f"report saved to {folder / REPORT_FILE}")
    return True


def _pooled(folder, finished, images):
    """The metrics of all test images together: those of `folds.json`, or of the folds that are finished."""
    path = folder / FOLDS_RESULTS
    if path.exists():
        return read_json(path).get("test_pooled")
    if images is None:
        return None
    args, results = finished[0].args, finished[0].results
    ordinal = is_ordinal(Namespace(**{"ordinal": False, "train_loss": None, **args}))
    return pooled_metrics(images, results["samples_per_cls"], args.get("group_regex"), ordinal)


def _class_rows(finished, pooled):
    """-> one row per class: name, images, and recall and F1 as bars with their intervals"""
    rows = []
    for name, metrics in pooled["per_class"].items():
        row = [name, metrics["support"]]
        for metric in ("recall", "f1"):
            value, interval = metrics[metric], metrics[f"{metric}_ci"]
            row += (
                ["-", "-"] if value is None else [interval_bar(value, interval), format_with_interval(value, interval)]
            )
        rows.append(row)
    return rows


def thumbnails(images: OutOfFold, doubtful: np.ndarray, resize: str) -> list[dict]:
    """-> the first NUM_THUMBNAILS doubtful images: rank, path, label, prediction, both probabilities, data URI or None

    doubtful: positions, by `find_label_issues`; resize: flag of the folds.
    """
    shown = [int(i) for i in doubtful[:NUM_THUMBNAILS]]
    uris = data_uris([images.paths[i] for i in shown], resize)
    result = []
    for rank, (i, uri) in enumerate(zip(shown, uris, strict=True), start=1):
        label, probabilities = int(images.targets[i]), images.probabilities[i]
        prediction = int(probabilities.argmax())
        result.append(
            {
                "rank": rank,
                "path": images.paths[i],
                "label": images.classes[label],
                "label_probability": float(probabilities[label]),
                "prediction": images.classes[prediction],
                "probability": float(probabilities[prediction]),
                "image": uri,
            }
        )
    return result
