"""What the numbers of a finished run say to do next: sentences with the number that each comes from, and a command.

A rule speaks only where its numbers leave no doubt; docs/report.md says when and why.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flag_queries import corrects_by_loss, corrects_by_sampling, corrects_twice, scaled_learning_rate
from flags import FROM_SCRATCH, complete_flags
from metrics import wilson_interval
from run.cli import attempt, printable
from run.files import read_json, read_rows
from run.saver import BEST
from run.surroundings import command_line, start_of_command

MAX_ADVICE = 3
NEGATIVE_TAU, POSITIVE_TAU = -0.25, 0.5
SMALL_TEST_CLASS = 10  # images
FOLDS = 5
USUAL_RATES = {True: 1e-4, False: FROM_SCRATCH["strong"]["learning_rate"]}  # of weights that are given; random ones
USUAL_FACTOR = 3  # a learning rate that is so many times higher or lower is usual too
NEAR_CONSTANT = 1.5  # times the balanced accuracy of a constant answer
GAP = 0.25  # of the accuracy between training and validation
LOSS_RISE = 1.1  # of the lowest validation loss
STILL_LEARNING = 0.02  # of the selected metric, gained in the last quarter of the epochs


class Run(NamedTuple):
    """A finished training: its flags, the content of `results.json`, the rows of `history.csv` as numbers."""

    folder: Path
    args: argparse.Namespace
    results: Mapping[str, Any]
    history: list[dict[str, float]]


class Advice(NamedTuple):
    text: str
    command: str


# ----------------------------------------------------------------------------------------------------------- rules


def learned_nothing(run: Run) -> Advice | None:
    """The test cannot tell the model from a constant answer, whose balanced accuracy is 1/C with C classes, even after
    post-hoc adjustment."""
    num_classes = sum(metrics["support"] > 0 for metrics in run.results["test"]["per_class"].values())
    tests = [results["test"] for results in (run.results, run.results.get("posthoc")) if results]
    limit = NEAR_CONSTANT / num_classes  # with a wide interval, the model can be anything
    if num_classes < 2 or not all(
        low <= 1 / num_classes + 1e-9 and high <= limit for low, high in (test["balanced_acc_ci"] for test in tests)
    ):
        return None
    (low, high), rate = tests[0]["balanced_acc_ci"], run.args.learning_rate
    default = USUAL_RATES[bool(run.args.pretrained or run.args.weights)]
    usual = scaled_learning_rate(default, run.args.batch_size)
    highest = scaled_learning_rate(default, run.args.batch_size * run.args.grad_accum)
    text = (
        f"no better than a constant answer: balanced accuracy {tests[0]['balanced_acc']:.3f} [{low:.3f}, {high:.3f}] "
        f"in the test of {num_classes} classes; "
    )
    # nor is it the learning rate if the training images were learned
    if min(default, usual) / USUAL_FACTOR <= rate <= max(default, highest) * USUAL_FACTOR or overfits(run):
        return Advice(text + "check the photographs and their classes", again(run, check_data=True))
    return Advice(
        text + f"the learning rate of {rate:g} is far from the usual one", again(run, learning_rate=f"{usual:.3g}")
    )


def splits_differ(run: Run) -> Advice | None:
    """The intervals of validation and test have no value in common: stricter than a test at 5 % (Schenker & Gentleman
    2001). Nor have those from Wilson's intervals of the recalls: the bootstrap of a class with one image has no width.
    """
    if "val" not in run.results:
        return None
    val, test = (run.results[split]["balanced_acc"] for split in ("val", "test"))
    bootstrap, wilson = (
        [interval(run.results[split]) for split in ("val", "test")]
        for interval in (lambda metrics: metrics["balanced_acc_ci"], _wilson_interval_of_mean)
    )
    if any(low <= test_high and test_low <= high for (low, high), (test_low, test_high) in (bootstrap, wilson)):
        return None
    text = f"validation and test differ by more than their intervals: balanced accuracy {val:.3f} and {test:.3f}; "
    if not _can_be_folded(run):
        return Advice(text + "compare their photographs and classes", again(run, check_data=True))
    return Advice(text + "test every photograph once", again(run, folds=FOLDS))


def _wilson_interval_of_mean(metrics):
    """Interval of the mean recall from those of the recalls (Zou & Donner 2008, "Construction of confidence limits
    about effect measures")."""
    rows = [row for row in metrics["per_class"].values() if row["support"]]
    bounds = [wilson_interval(row["recall"], row.get("subjects", row["support"])) for row in rows]
    below = math.hypot(*(row["recall"] - low for row, (low, _) in zip(rows, bounds, strict=True)))
    above = math.hypot(*(high - row["recall"] for row, (_, high) in zip(rows, bounds, strict=True)))
    mean = sum(row["recall"] for row in rows) / len(rows)
    return mean - below / len(rows), mean + above / len(rows)


def corrected_twice(run: Run) -> Advice | None:
    """With what both corrections shifted undone, the test has a macro F1 that is higher by more than the intervals, and
    no lower balanced accuracy. A new head has had no loss that corrects, and a constant answer nothing to undo."""
    if run.args.crt_epochs or not corrects_twice(run.args) or learned_nothing(run):
        return None
    tests, exact, fitted = {}, run.results.get("posthoc_exact"), run.results.get("posthoc")
    if exact:
        tests["the shift of both undone"] = exact["test"]
    if fitted and fitted["tau"] <= NEGATIVE_TAU:
        tests[f"part of it undone (tau {fitted['tau']:g})"] = fitted["test"]
    test = run.results["test"]
    for how, undone in tests.items():
        if _costs_macro_f1(test, undone):
            f1, balanced = (
                f"{undone[metric]:.3f} instead of {test[metric]:.3f}" for metric in ("macro_f1", "balanced_acc")
            )
            return Advice(
                f"corrected twice: --train_loss {run.args.train_loss} and the sampling both favor the small classes; "
                f"with {how}, the test has a macro F1 of {f1}, a balanced accuracy of {balanced}; leave the correction "
                "to the sampling",
                again(run, train_loss="ce"),
            )
    return None


def _costs_macro_f1(twice, undone):
    """Whether the second correction has cost macro F1 for no balanced accuracy. twice, undone: metrics of a test."""
    return undone["macro_f1_ci"][0] > twice["macro_f1_ci"][1] and undone["balanced_acc"] >= twice["balanced_acc"]


def not_corrected(run: Run) -> Advice | None:
    """Nothing in the flags corrects the imbalance, tau is clearly positive, and the recall of the smallest class is
    below that of the largest one by more than their intervals."""
    tau = run.results.get("posthoc", {}).get("tau", 0)
    if corrects_by_loss(run.args) or corrects_by_sampling(run.args) or run.args.crt_epochs or tau < POSITIVE_TAU:
        return None
    counts = dict(zip(run.results["classes"], run.results["samples_per_cls"], strict=True))
    smallest, largest = min(counts, key=counts.get), max(counts, key=counts.get)
    few, many = (run.results["test"]["per_class"][name] for name in (smallest, largest))
    if few["recall"] is None or many["recall"] is None or few["recall_ci"][1] >= many["recall_ci"][0]:
        return None
    return Advice(
        f"the model favors the large classes: tau is {tau:g}, and the recall of {printable(smallest)} is "
        f"{few['recall']:.2f}, that of {printable(largest)} {many['recall']:.2f}; oversample the small ones",
        again(run, use_augmentation=True),
    )


def overfits(run: Run) -> Advice | None:
    """Far better on the training images than on those of the validation, whose loss has risen again."""
    if run.args.mixup or run.args.cutmix or run.args.crt_epochs:  # of mixed images; of a new head alone
        return None
    history = [row for row in run.history if row["epoch"] >= run.args.drw_epoch]  # with the same loss
    if not history:
        return None
    last, lowest = history[-1], min(row["val_loss"] for row in history)
    name = max(_comparable_metrics(run.args), key=last.get)
    train, val, kind = last["train_acc"], last[name], "balanced accuracy " if name == "val_balanced_acc" else ""
    if not (train - val >= GAP and last["val_loss"] >= LOSS_RISE * lowest):  # nor if a loss is not finite
        return None
    text = (
        f"overfits: accuracy {train:.2f} in training, {kind}{val:.2f} in validation, whose loss has risen from "
        f"{lowest:.3f} to {last['val_loss']:.3f}; "
    )
    if not run.args.augment_all:
        return Advice(text + "augment every image", again(run, augment_all=True))
    epochs = run.results["best_epoch"] + 1
    if not run.args.drw_epoch < epochs < run.args.epochs:
        return None
    return Advice(text + "train for fewer epochs", again(run, epochs=epochs))


def _comparable_metrics(args):
    """The metrics of the validation of which `train_acc` is one on the training images, whatever the shares of their
    classes; it is between both if they are neither as they occur nor equal."""
    if not corrects_by_sampling(args):
        return ["val_acc"]
    is_balanced = args.sampling in ("balanced", "progressive") or not (
        args.sampling == "sqrt" or args.target_samples_per_class
    )
    return ["val_balanced_acc"] if is_balanced else ["val_acc", "val_balanced_acc"]


def not_finished(run: Run) -> Advice | None:
    """The last epoch is the best one, and the last quarter of the epochs has still gained."""
    name, history = run.args.best_metric, [row for row in run.history if row["epoch"] >= run.args.drw_epoch]
    if len(history) < 4 or run.results["best_epoch"] != history[-1]["epoch"] or run.args.crt_epochs:
        return None
    before = max(row[name] for row in history[: math.ceil(len(history) * 3 / 4)])
    last = history[-1][name]
    if last < before + STILL_LEARNING:
        return None
    text = (
        f"not finished: {name} has risen from {before:.3f} to {last:.3f} in the last quarter of the epochs, and the "
        "last one is the best; "
    )
    if run.args.folds:  # the folds of a cross-validation are trained alike
        return Advice(text + "train for more epochs", again(run, epochs=2 * run.args.epochs))
    resume = ["--resume", str(run.folder / BEST), "--epochs", str(2 * run.args.epochs)]
    return Advice(text + "train on", command_line([*start_of_command(), *resume]))


def small_test_class(run: Run) -> Advice | None:
    """The interval of a recall of one half is wide, whatever the model (Wilson 1927)."""
    supports = {name: metrics["support"] for name, metrics in run.results["test"]["per_class"].items()}
    smallest = min((name for name in supports if supports[name]), key=supports.get, default=None)
    if smallest is None or supports[smallest] >= SMALL_TEST_CLASS or not _can_be_folded(run):
        return None
    count, images = supports[smallest], "image" if supports[smallest] == 1 else "images"
    low, high = wilson_interval(0.5, count)
    return Advice(
        f"only {count} test {images} of {printable(smallest)}: a recall of one half has the interval "
        f"{low:.2f} to {high:.2f}, whatever the model; test every photograph once",
        again(run, folds=FOLDS),
    )


def _can_be_folded(run):
    """Whether `--folds` can replace the splits: none is given, and each split of each fold gets all classes.

    With subjects, whose number in the training is not known, those of validation and test alone must be enough.
    """
    args, results = run.args, run.results
    if args.test_dirs or args.val_dirs or args.split_column or args.folds:
        return False
    has_subjects = args.group_regex or "subject_column" in results
    unit, trained = ("subjects", []) if has_subjects else ("support", [results["samples_per_cls"]])
    found = [results[split]["per_class"].values() for split in ("val", "test") if split in results]
    evaluated = [[row.get(unit, 0) for row in rows] for rows in found]
    units = min(map(sum, zip(*trained, *evaluated, strict=True)))
    train_share, val_share, _ = args.split
    rest = units - math.ceil(units / FOLDS)  # at least, for training and validation
    return units >= FOLDS and rest * min(train_share, val_share) >= (1 - 1e-9) * (train_share + val_share)


RULES = (
    learned_nothing, splits_differ, corrected_twice, not_corrected, overfits, not_finished, small_test_class,
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- advice


def find_advice(run_dir: str | Path) -> list[Advice]:
    """-> at most MAX_ADVICE pieces of advice from the files of a finished training, the most important first.

    None after `--eval_only`, whose flags are not those of a training.
    """
    run_dir = Path(run_dir)
    args = complete_flags(read_json(run_dir / "args.json"))
    if args["eval_only"]:
        return []
    rows = [{name: float(value) for name, value in row.items() if value} for row in read_rows(run_dir / "history.csv")]
    run = Run(run_dir, argparse.Namespace(**args), read_json(run_dir / "results.json"), rows)
    return [advice for rule in RULES if (advice := rule(run))][:MAX_ADVICE]


def print_advice(run_dir: str | Path) -> None:
    """Print what `find_advice` finds. What fails is one printed line."""
    for number, (text, command) in enumerate(attempt(lambda: find_advice(run_dir), "no advice") or [], start=1):
        print(f"advice {number}: {text}\n    {command}")


def again(run: Run, **changes: Any) -> str:
    """-> the command of a new run with the flags of this one, but for `changes`."""
    words = ["--config", str(run.folder / "args.json")]
    for name, value in changes.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    start = ["python", "main.py"] if "check_data" in changes else start_of_command()  # the work of one process
    return command_line([*start, *words])
