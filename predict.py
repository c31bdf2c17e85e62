#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Predict the classes of photographs with trained models, and say for which of them the model is uncertain."""

import operator
import os
import sys
from argparse import Namespace
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_flags import add_label_flags, add_subgroup_flag
from run.cli import Parser, PathsAction, UserError, end_process, number, progress_bar, run_command
from run.signals import Signals, Stopped

if TYPE_CHECKING:
    from images.folders import Paths
    from inference import Grader, Prediction

DESCRIPTION = """Predict the classes of photographs with trained models.

python predict.py runs/x --images photos/            the best model of a run
python predict.py runs/cv --images a.jpg b.jpg       the mean of all folds of a cross-validation
python predict.py runs/x --images photos/ --labels metadata.csv   also the metrics
"""
MAX_LISTED = 20  # classes, in a line


def build_parser() -> Parser:
    parser = Parser("predict.py", DESCRIPTION)
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        action=PathsAction,
        metavar="MODEL",
        help="run folder, checkpoint, or folder of a cross-validation",
    )
    add(
        "--images",
        nargs="+",
        action=PathsAction,
        required=True,
        metavar="PATH",
        help="photographs, and folders of photographs [required]",
    )
    add("--output", default="predictions.csv", metavar="FILE", help="predictions are saved here [predictions.csv]")
    add_label_flags(parser)
    add("--drop", nargs="+", metavar="CLASS", help="rows of --labels to pass over; '': those without a label [none]")
    add_subgroup_flag(parser)
    add("--heatmaps", metavar="DIR", help="save a heat map of each photograph to this folder [none]")
    add(
        "--overwrite",
        action="store_true",
        help="replace the file of --output, and files in the folder of --heatmaps [off]",
    )
    add("--tta", action="store_true", help="predict from the mean of each photograph and its mirror image [off]")
    add(
        "--coverage",
        type=number(float, above=0, below=1),
        default=0.9,
        metavar="SHARE",
        help="share of the cases of each class in which prediction_set contains the true class [0.9]",
    )
    add("--adjusted", action="store_true", help="apply the tau and temperature that were fitted after training [off]")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps ... [auto]")
    add(
        "--max_megapixels",
        type=number(float, above=0),
        metavar="M",
        help="refuse photographs of more than M megapixels [as in the training]",
    )
    return parser


def run(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    from images.photographs import find_photographs

    refuse_existing(Path(args.output), args.overwrite)
    if args.labels is None:
        for name in ("image_column", "label_column", "subject_column", "drop", "subgroup_columns"):
            if getattr(args, name):
                raise UserError(f"--{name}: name the table with --labels FILE")
    if args.subgroup_columns and subgroups_file(args.output).exists() and not args.overwrite:
        raise UserError(f"--subgroup_columns: {subgroups_file(args.output)} already exists; add --overwrite")
    if args.heatmaps:
        refuse_folder(Path(args.heatmaps), args.images, args.overwrite)
    with Signals() as signals:
        paths = find_photographs(args.images, "--images")
        with signals.deferred():  # torch aborts the process if a signal raises while it is imported
            import torch

            from inference import find_checkpoints, load
            from run.cores import num_cores
            from run.files import refuse_input
            from run.machine import keep_freed_memory
        if __name__ == "__main__":
            keep_freed_memory()
        # both as in the training, for the same digits
        torch.set_num_threads(min(torch.get_num_threads(), num_cores()))
        torch.backends.cudnn.deterministic = True
        checkpoints = find_checkpoints(args.models)
        refuse_input(args.output, [*checkpoints, *paths, *(args.labels or [])], "--output")
        if args.subgroup_columns:
            refuse_input(subgroups_file(args.output), [*paths, *args.labels], "--subgroup_columns")
        grader = load(checkpoints, args.device, tta=args.tta, coverage=args.coverage, adjusted=args.adjusted)
        return predict(grader, paths, args, signals)


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Raise UserError if the output, or what an interrupted prediction left of it, exists, unless `overwrite`."""
    from run.files import part_of, refuse_output

    refuse_output(output, "--output", overwrite)
    if part_of(output).exists() and not overwrite:
        raise UserError(
            f"--output: {part_of(output)} has the rows of an interrupted prediction; name another file, or add "
            "--overwrite to replace it"
        )


def subgroups_file(output: str) -> Path:
    """-> the file of `--subgroup_columns` beside the predictions."""
    return Path(output).with_name(f"{Path(output).stem}_subgroups.csv")


def refuse_folder(folder: Path, images: Sequence[str], overwrite: bool) -> None:
    """Raise UserError if heat maps cannot be saved to `folder`, or would be photographs of the next prediction."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--heatmaps: {folder} is not a folder")
    if not folder.absolute().parent.is_dir():
        raise UserError(f"--heatmaps: the folder {folder.parent} does not exist; create it")
    for name in images:
        if Path(name).is_dir() and folder.resolve().is_relative_to(Path(name).resolve()):
            raise UserError(f"--heatmaps: {folder} is in {name}, a folder of --images; name a folder outside of it")
    if folder.exists() and not overwrite and any(folder.iterdir()):
        raise UserError(f"--heatmaps: {folder} is not empty; name another folder, or add --overwrite")


def predict(grader: "Grader", paths: "Paths", args: Namespace, signals: Signals) -> int:
    """Predict all photographs, write them to the output, and print a summary. -> exit status"""
    from images.decode import limit_image_size
    from images.leakage import num_trained_on
    from run.files import RowFile

    heat_maps = None
    if args.heatmaps:
        from heatmaps import HeatMapFolder

        models = [loaded.model for loaded in grader.models]
        heat_maps = HeatMapFolder(args.heatmaps, models, grader.classes, grader.is_ordinal)
    if args.max_megapixels:
        limit_image_size(args.max_megapixels)
    if num_trained := num_trained_on(paths, [loaded.checkpoint for loaded in grader.models]):
        print(
            f"warning: {num_trained} of the {len(paths)} photographs have the name and size of images that the model "
            "was trained on: the predictions for them are too good"
        )
    truth = Truth(args, grader, paths) if args.labels else None
    summary = Summary(grader)
    with RowFile(args.output, grader.columns + (truth.columns if truth else []), "--output") as rows:
        try:
            with signals.deferred(), progress_bar(None, "photographs", "photo", len(paths)) as bar:
                for batch in grader.batches(paths):
                    cells = map(grader.row, batch.predictions)
                    if truth:
                        cells = map(operator.add, cells, map(truth.cells, batch.predictions))
                    rows.write(cells)
                    summary.add(batch.predictions)
                    if heat_maps:
                        heat_maps.add(batch.images, batch.predictions)
                    bar.update(len(batch.predictions))
                    signals.raise_if_stopped()
                rows.finish()
        except Stopped as stop:
            print(f"stopped{rows.kept}", file=sys.stderr)
            return stop.status
        except UserError as error:
            raise UserError(f"{error}{rows.kept}") from error
    status = summary.print(args.output)
    if truth:
        truth.print()
    return max(status, heat_maps.print()) if heat_maps else status


class Truth:
    """What the tables of `--labels` say of the photographs, and how the predictions compare with it."""

    def __init__(self, args: Namespace, grader: "Grader", paths: "Paths"):
        from images.labels import check_columns, index_table

        self.args, self.grader = args, grader
        trained = grader.models[0].args
        flags = Namespace(
            **vars(args)
            | {"merge": trained.merge, "drop": args.drop or trained.drop, "split_column": "", "group_regex": None}
            | {"folds": None, "eval_only": True, "skip_broken": True}  # a table may have more images than are predicted
        )
        folders = dict.fromkeys(path if os.path.isdir(path) else os.path.dirname(path) or "." for path in args.images)
        self.index, _ = index_table(flags, list(folders), "--images", grader.classes, paths)
        check_columns(args.subgroup_columns, self.index)
        self._position = {path: i for i, path in enumerate(self.index.paths)}
        self._found, self._probabilities = [], array("f")  # probabilities one after another: 4 bytes each
        self.columns = ["label", "correct"]
        self.columns += [f"table_{name}" if name in grader.columns else name for name in self.index.columns]

    def cells(self, prediction: "Prediction") -> list[str | int]:
        """-> the cells of a photograph in `columns`, empty ones if no row names it. What is predicted is counted."""
        i = self._position.get(prediction.path)
        if i is None:
            return [""] * len(self.columns)
        label = self.grader.classes[self.index.targets[i]]
        if prediction.error is None:
            self._found.append(i)
            self._probabilities.frombytes(prediction.probabilities.astype("float32", copy=False).tobytes())
        correct = "" if prediction.error is not None else int(prediction.prediction == label)
        return [label, correct, *(cells[i] for cells in self.index.columns.values())]

    def print(self) -> None:
        """Print the metrics, and write those of the subgroups."""
        import numpy as np

        from evaluation import print_metrics, print_recalls
        from images.leakage import subjects_of, warn_of_nameless_subjects
        from metrics import full_metrics
        from subgroups import all_subgroups, print_subgroups, write_subgroups

        if not self._found:
            print("no photograph with a label was predicted")
            return
        index = self.index.subset(self._found)
        probabilities = np.frombuffer(self._probabilities, np.float32).reshape(len(index), -1)
        warn_of_nameless_subjects(index)
        outcome = index.targets, probabilities, self.grader.classes
        subjects = subjects_of(index, None)
        counts = self.grader.models[0].checkpoint["samples_per_cls"]
        metrics = full_metrics(*outcome, counts, self.grader.is_ordinal, subjects)
        print_metrics(f"{len(index)} photographs with a label", metrics)
        print_recalls(metrics, "recall per class")
        if self.args.subgroup_columns:
            found = all_subgroups(self.args.subgroup_columns, index.columns, *outcome, subjects)
            print_subgroups(found)
            write_subgroups(subgroups_file(self.args.output), found)
            print(f"metrics of the subgroups saved to {subgroups_file(self.args.output)}")


class Summary:
    """What the last lines of the command say."""

    def __init__(self, grader: "Grader"):
        self.sets = grader.prediction_sets  # says what is missing for them
        self.grader, self.counts, self.uncertain = grader, Counter(), 0
        self.first_unreadable, self.unreadable = None, 0

    def add(self, predictions: Sequence["Prediction"]) -> None:
        for prediction in predictions:
            if prediction.error is None:
                self.counts[prediction.prediction] += 1
                self.uncertain += bool(prediction.uncertain)
            else:
                self.first_unreadable = self.first_unreadable or prediction
                self.unreadable += 1

    def print(self, output: str) -> int:
        """-> exit status: 1 if photographs cannot be read."""
        from run.cli import printable

        if self.counts:
            shown = sorted(self.counts, key=self.grader.classes.index)[:MAX_LISTED]
            listed = ", ".join(f"{printable(name)}: {self.counts[name]}" for name in shown)
            more = f", and {len(self.counts) - MAX_LISTED} more classes" if len(self.counts) > MAX_LISTED else ""
            sure = f"; uncertain: {self.uncertain}" if self.sets else ""
            print(f"{self.counts.total()} photographs predicted ({listed}{more}){sure}")
        print(f"predictions saved to {printable(output)}")
        if not self.unreadable:
            return 0
        first = self.first_unreadable
        print(
            f"{self.unreadable} of {self.unreadable + self.counts.total()} photographs cannot be read; the first is "
            f"{printable(first.path)}: {first.error} (all reasons are in the column error)",
            file=sys.stderr,
        )
        return 1


def __getattr__(name: str) -> Any:
    """`from predict import load`, without importing torch for --help."""
    if name == "load":
        from inference import load

        return load
    raise AttributeError(f"module 'predict' has no attribute {name!r}")


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0 done, 1 some photographs cannot be read, 2 a mistake of the user, 128 + N after signal N"""
    return run_command(run, argv)


if __name__ == "__main__":
    end_process(main())
