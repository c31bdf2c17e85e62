"""The best model tested: metrics, predictions, test-time augmentation."""

import argparse
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advice import print_advice
from calibration import adjust, correct_prior, fit_posthoc
from dataset_double import eval_loader
from engine import Engine, Outputs, build_engine
from flag_queries import corrects_twice, is_ordinal, replaced_splits, shown_at_any_angle
from flags import SPLITS
from images.augment import views
from images.cache import open_cache, read_all
from images.classes import ClassNames
from images.folders import ImageIndex, check_duplicates, index_folders
from images.labels import check_columns, index_table
from images.leakage import num_trained_on, subjects_of, warn_of_nameless_subjects
from images.splits import find_images, on_all_ranks, paths_by_split
from metrics import format_with_interval, full_metrics
from model import load_checkpoint, save_checkpoint, weights_do_not_fit
from pages import VARIANTS, write_report
from plots import plot_confusion_matrix
from run.cli import UserError, attempt, printable
from run.environment import write_environment
from run.files import write_json, write_predictions
from run.log import start_log
from run.machine import name_hardware_errors
from run.progress import Progress
from run.ranks import from_first, is_first
from run.saver import BEST
from schedule import build_loss_from_flags
from subgroups import SUBGROUPS_FILE, all_subgroups, print_subgroups, write_subgroups

# logit adjustments fitted on the validation images, for --best_metric and for macro F1, under their names in
# results.json and in the checkpoint
POSTHOC_NAMES = ("posthoc", "posthoc_macro_f1")

# ---------------------------------------------------------------------------------------------------- the best model


def evaluate_best(
    engine: Engine,
    splits: dict[str, ImageIndex],
    args: argparse.Namespace,
    outputs: Mapping[str, Outputs] | None = None,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Evaluate the best model of a finished training and store what is fitted after training in its checkpoint.

    outputs: {split: `Engine.evaluate` of the best model}, for splits where it is known.
    -> see `evaluate_splits`
    """
    run_dir = Path(args.run_dir)
    best = from_first(lambda: load_checkpoint(run_dir / BEST), "reads the best model")
    engine.evaluated.load_state_dict(best["model_state_dict"])
    evaluated = {split: splits[split] for split in ("val", "test")}
    results, probabilities = evaluate_splits(engine, evaluated, args, best, outputs or {})
    if not is_first():
        return results, probabilities
    for name in POSTHOC_NAMES:
        best[name] = {value: results[name][value] for value in ("tau", "temperature")}
    targets, val_probabilities = splits["val"].targets, probabilities["val"]
    best["val_outputs"] = {
        "probabilities": torch.from_numpy(val_probabilities), "targets": torch.from_numpy(targets)
    }  # fmt: skip
    save_checkpoint(run_dir / BEST, best)
    return results, probabilities


def evaluate_only(args: argparse.Namespace, checkpoint: dict, device: torch.device) -> None:
    """`--eval_only`: evaluate the model of a checkpoint and write everything to the run folder."""
    run_dir = Path(args.run_dir)
    splits = on_all_ranks(lambda: splits_to_evaluate(args, checkpoint), args)
    criterion = build_loss_from_flags(args, checkpoint["samples_per_cls"])
    engine = build_engine(args, device, criterion, len(checkpoint["classes"]))
    try:
        with name_hardware_errors():
            engine.model.load_state_dict(checkpoint["model_state_dict"])
    except RuntimeError as error:
        raise weights_do_not_fit(args.resume, error) from error
    if is_first():
        start_log(run_dir)
        write_environment(run_dir, device, Progress(history=checkpoint["history"]).hours_trained())
        write_json(run_dir / "args.json", vars(args))
        write_json(run_dir / "splits.json", paths_by_split(splits))
    results, probabilities = evaluate_splits(engine, splits, args, checkpoint, {})
    if not is_first():
        return
    write_json(run_dir / "results.json", results)
    print_results(results, run_dir)
    write_report(run_dir, splits, probabilities, engine.evaluated)


def evaluate_splits(
    engine: Engine,
    splits: dict[str, ImageIndex],
    args: argparse.Namespace,
    checkpoint: dict,
    outputs: Mapping[str, Outputs],
) -> tuple[dict, dict[str, np.ndarray]]:
    """Evaluate the model of `checkpoint`, which `engine` has, on each split; write predictions and confusion matrix.

    What is fitted after training is taken from the checkpoint, or fitted on the validation images. outputs: see
    `evaluate_best`. -> (content of results.json, {split: probabilities (N, C)}), both empty on all ranks but the first
    """
    run_dir, classes, samples_per_cls = Path(args.run_dir), splits["test"].classes, checkpoint["samples_per_cls"]
    subjects, ordinal = subjects_by_split(splits, args, checkpoint["args"]), is_ordinal(args)

    def split_metrics(split, loss, probs):
        targets = splits[split].targets
        metrics = full_metrics(targets, probs, classes, samples_per_cls, ordinal, subjects[split])
        return {"loss": loss, **metrics}

    outputs, of_views = dict(outputs), {}
    tta_views = functools.partial(views, at_any_angle=shown_at_any_angle(args))
    for split, index in splits.items():  # what all ranks compute together
        loader = eval_loader(index, args, engine.device)
        outputs[split] = outputs.get(split) or engine.evaluate(loader, split)
        if args.tta:
            of_views[split] = engine.evaluate(loader, f"{split}, views", views=tta_views)
    if not is_first():
        return {}, {}

    results, probabilities = {"evaluated_epoch": checkpoint["epoch"], "best_epoch": checkpoint["best_epoch"]}, {}
    for split, index in splits.items():
        loss, probabilities[split], targets = outputs[split]
        results[split] = split_metrics(split, loss, probabilities[split])
        file = run_dir / f"{split}_predictions.csv"
        write_predictions(file, index.paths, targets, probabilities[split], classes, index.columns)
        if args.tta:
            loss, probs, _ = of_views[split]
            results.setdefault("tta", {})[split] = split_metrics(split, loss, probs)
    adjustments = {
        name: (fitted, functools.partial(adjust, samples_per_cls=samples_per_cls, **fitted))
        for name, fitted in _fitted(checkpoint, splits, probabilities).items()
    }
    if known := training_prior(argparse.Namespace(**vars(args) | checkpoint["args"]), samples_per_cls):
        adjustments["posthoc_exact"] = ({}, functools.partial(correct_prior, **known))
    for name, (fitted, adjustment) in adjustments.items():
        results[name] = dict(fitted)
        for split, index in splits.items():
            adjusted = adjustment(probabilities[split])
            loss = engine.loss_of(torch.from_numpy(adjusted).log(), torch.from_numpy(index.targets))
            results[name][split] = split_metrics(split, loss, adjusted)
    results |= {"classes": classes, "samples_per_cls": samples_per_cls}
    if splits["test"].subject_column:
        results["subject_column"] = splits["test"].subject_column
    if args.subgroup_columns:
        outcome = splits["test"].targets, probabilities["test"], classes, subjects["test"]
        results["subgroups"] = all_subgroups(args.subgroup_columns, splits["test"].columns, *outcome)
        write_subgroups(run_dir / SUBGROUPS_FILE, results["subgroups"])
    title = f"test: balanced accuracy {results['test']['balanced_acc']:.3f}"
    matrix, file = results["test"]["confusion_matrix"], run_dir / "confusion_matrix.png"
    attempt(lambda: plot_confusion_matrix(file, matrix, classes, title), f"no {file.name}")
    return results, probabilities


def training_prior(args: argparse.Namespace, samples_per_cls: Sequence[int]) -> dict[str, Any] | None:
    """-> prior and gamma for `correct_prior`: what the loss and the sampling together have made of the class shares.

    None if they do not correct twice, if they changed during the training, and for losses whose minimum has no such
    form. args: flags of the training.
    """
    changes = args.drw_epoch or args.crt_epochs or args.sampling == "progressive"
    if changes or not corrects_twice(args):
        return None
    criterion, counts = build_loss_from_flags(args, samples_per_cls), np.asarray(samples_per_cls, dtype=np.float64)
    oversampled = np.maximum(counts, args.target_samples_per_class or counts.max())
    shares = {"instance": oversampled, "balanced": np.ones_like(counts), "sqrt": np.sqrt(counts)}[args.sampling]
    if args.train_loss == "cb" and args.cb_form == "softmax":
        return {"prior": shares * criterion.alpha.numpy(), "gamma": args.gamma}
    if args.train_loss == "weighted_ce":
        return {"prior": shares * criterion.weights.numpy()}
    if args.train_loss in ("balanced_softmax", "logit_adjustment"):
        return {"prior": shares * (-criterion.shift).exp().numpy()}
    return None


def _fitted(checkpoint, splits, probabilities):
    """-> {name in results.json: {"tau", "temperature"}}, of the checkpoint or else fitted on the validation images."""
    known = {name: checkpoint[name] for name in POSTHOC_NAMES if checkpoint[name]}
    if len(known) == len(POSTHOC_NAMES) or "val" not in splits:
        return known
    metrics = [checkpoint["best_metric_name"].removeprefix("val_"), "macro_f1"]
    val = splits["val"].targets, probabilities["val"]
    return dict(zip(POSTHOC_NAMES, fit_posthoc(*val, checkpoint["samples_per_cls"], metrics), strict=True)) | known


# --------------------------------------------------------------------------------------------------------- the images


def splits_to_evaluate(args: argparse.Namespace, checkpoint: dict) -> dict[str, ImageIndex]:
    """-> val and test, from other folders where they are given, else those of the checkpoint.

    Only test if it comes from elsewhere and the data of the checkpoint are not on this machine.
    """
    trained_flags, replaced = checkpoint["args"], replaced_splits(args, checkpoint["args"])
    if args.labels and replaced != ["test"]:
        raise UserError("--labels: name the folder of its images with --test_dirs; omit other folders")
    splits = {split: _index_to_test(args, split, checkpoint["classes"]) for split in replaced}
    check_duplicates([path for index in splits.values() for path in index.paths], "--val_dirs / --test_dirs")
    kept = [split for split in ("val", "test") if split not in replaced]
    has_moved = args.data_dirs != trained_flags["data_dirs"]
    if kept == ["val"] and not has_moved and not all(map(os.path.exists, checkpoint["splits"]["val"])):
        print("the validation images of the checkpoint do not exist on this machine: only --test_dirs is evaluated")
    elif kept:
        gone = {f"{split}_dirs": None for split in replaced}  # need not exist on this machine
        splits |= find_images(checkpoint, kept, {**trained_flags, "data_dirs": args.data_dirs, **gone})[0]
    splits = {split: splits[split] for split in SPLITS if split in splits}
    splits = read_all(splits, open_cache(args), args.skip_broken)
    warn_of_trained_images({split: splits[split] for split in replaced}, checkpoint)
    check_columns(args.subgroup_columns, splits["test"])
    for split in replaced:
        warn_of_nameless_subjects(splits[split])
    return splits


def _index_to_test(args, split, classes):
    """The images of --val_dirs or --test_dirs, with the labels of --labels or of their folders."""
    folders, flag = getattr(args, f"{split}_dirs"), f"--{split}_dirs"
    if not args.labels:
        names = ClassNames(args.merge, args.drop)
        return index_folders(folders, classes, flag, allow_missing=True, names=names)
    return index_table(args, folders, flag, classes, only=split)[0]


def warn_of_trained_images(splits: dict[str, ImageIndex], checkpoint: dict) -> None:
    """Print a line if images have name and size of images that the checkpoint was trained on."""
    for split, index in splits.items():
        if num_trained := num_trained_on(index.paths, [checkpoint]):
            print(
                f"warning: {num_trained} of the {len(index)} images of --{split}_dirs have the name and size of images "
                "that the model was trained on: the metrics will be too optimistic"
            )


def subjects_by_split(
    splits: dict[str, ImageIndex], args: argparse.Namespace, trained_flags: Mapping[str, Any]
) -> dict[str, np.ndarray | None]:
    """-> {split: subject of each image (N,) int, or None} by their table, or by `--group_regex`: that of the
    training for its own images.

    trained_flags: {flag: value} of the training.
    """
    replaced = replaced_splits(args, trained_flags)
    patterns = {split: args.group_regex if split in replaced else trained_flags.get("group_regex") for split in splits}
    return {split: subjects_of(index, patterns[split]) for split, index in splits.items()}


# ---------------------------------------------------------------------------------------------------------- printing


def print_results(results: dict, run_dir: str | Path) -> None:
    print(f"model of epoch {results['evaluated_epoch']} (95 % intervals in brackets):")
    for split in ("val", "test"):
        if split in results:
            print_metrics(split, results[split])
    for name, about in VARIANTS.items():
        if name in results:
            tau = f", tau {results[name]['tau']:g}" if "tau" in results[name] else ""
            print_metrics(f"test {about}{tau}", results[name]["test"])
    print_recalls(results["test"], "test recall per class")
    print_subgroups(results.get("subgroups", {}))
    print_advice(run_dir)
    print(f"results saved to {run_dir}")


def print_recalls(metrics: dict, title: str) -> None:
    recalls = {name: values["recall"] for name, values in metrics["per_class"].items() if values["support"]}
    print(f"{title}: {', '.join(f'{printable(name)} {recall:.2f}' for name, recall in recalls.items())}")


def print_metrics(title: str, metrics: dict) -> None:
    names = {"balanced_acc": "balanced accuracy", "macro_f1": "macro F1", "acc": "accuracy"}
    words = [f"{word} {format_with_interval(metrics[name], metrics[f'{name}_ci'])}" for name, word in names.items()]
    loss = f", loss {metrics['loss']:.4f}" if "loss" in metrics else ""
    print(f"{title:>4}: {', '.join(words)}{loss}")
