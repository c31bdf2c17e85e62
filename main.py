#!/usr/bin/env python3
"""Train a ResNet-50 to grade skin conditions from very unequal class folders: the experiment from top to bottom.

python main.py --help tells the flags, which are in flags.py.
"""

import argparse
import functools
import json
import math
import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from joblib import cpu_count

import demo
import posthoc
import report
import tracking
from dataset_double import (
    PARTS,
    AugmentedSkinDataset,
    ClassSampler,
    DoubleSkinDataset,
    EpochSampler,
    check_doubles,
    check_every_class_in_every_part,
    check_every_folder_is_used,
    fold_splits,
    index_folders,
    make_loader,
    read_all,
    restore_split,
    stratified_split,
)
from engine import Engine, Mixer, RunningFigures, keep_freed_memory, lr_lambda, progressive_size, resolve_amp
from files import (
    UserError,
    locked,
    new_folder,
    own_folder,
    read_json,
    read_predictions,
    timestamped,
    write_history,
    write_json,
    write_predictions,
)
from flags import ORDER_FLAGS, WRITTEN_TO, first_look, is_inside, is_neutral, parse_args, parts_given_anew
from image_cache import ImageCache, default_cache_dir, limit_image_size
from leaks import check_groups, groups_of, warn_of_grouped_names, warn_of_near_duplicates
from metrics import RANKINGS, full_metrics, recalls, summary_metrics
from model import Model, backbone_state_dict, checkpoint_bytes, load_checkpoint, read_weights, save_checkpoint
from resnet_custom import imagenet_state_dict
from resuming import (
    BEST,
    LAST,
    PREVIOUS,
    Keeper,
    Signals,
    Stopped,
    exit_status,
    set_damaged_aside,
    settle_best_model,
)
from utils import CrossEntropy, build_loss, class_balanced_weights, effective_number

FOLDS_BEGUN = "folds_begun.json"  # the flags and images of a cross-validation, in its folder


def choose_device(name):
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without CUDA
        raise UserError(f"--device: {name} is not to be had here: {str(error).splitlines()[0]}") from error
    return device


def run_folder(first):
    """-> context of the folder to write to, held by its lock: the checkpoint's own when resuming, else a new one."""
    if first.auto_resume:
        return own_folder(first.run_dir, "--run_dir")
    beside = Path(first.resume or "").absolute().parent
    if first.eval_only:
        if first.run_dir:
            return new_folder(first.run_dir, "--run_dir")
        return new_folder(timestamped(beside / "eval"), "--run_dir", numbered=True)
    if first.resume:
        load_checkpoint(first.resume)  # what is none is refused before a lock is left beside it
        if first.run_dir and Path(first.run_dir).absolute() != beside:
            raise UserError(f"--run_dir: a resumed run goes on in the checkpoint's own folder, {beside}")
        return locked(beside)
    if first.run_dir:
        return new_folder(first.run_dir, "--run_dir")
    return new_folder(timestamped(first.output_dir), "--output_dir", numbered=True)


# ------------------------------------------------------------------------------------------------------------- data


def split_data(args):
    """Index the class folders, check every image, split. -> {part: ImageIndex} for train, val, test."""
    index = index_folders(args.data_dirs)
    separate = {
        part: index_folders(getattr(args, f"{part}_dirs"), index.classes, f"--{part}_dirs")
        for part in ("val", "test")
        if getattr(args, f"{part}_dirs")
    }
    every_path = [path for one in (index, *separate.values()) for path in one.paths]
    check_doubles(every_path, "--data_dirs / --val_dirs / --test_dirs")
    whole = read_all({"data": index, **separate}, image_cache(args), args.skip_broken)
    index = whole.pop("data")
    groups = groups_of(index.paths, args.group_regex)
    if args.folds:
        splits = fold_splits(index, args.folds, args.split, args.seed, groups)
        for parts in splits:  # all, so that the last is not refused after days
            check_every_class_in_every_part(parts, args.split, args.folds)
        parts = splits[args.fold]
    else:
        parts = stratified_split(index, args.split, args.seed, separate, groups)
    parts = {part: {**parts, **whole}[part] for part in PARTS}
    check_every_class_in_every_part(parts, args.split)
    if args.group_regex:
        check_groups(parts, args.group_regex)
    else:
        warn_of_grouped_names(index.paths)
    warn_of_near_duplicates(parts)
    return parts


def image_cache(args):
    folder = args.cache_dir or default_cache_dir()  # not in the checkpoint: another user's is another
    return ImageCache(None if args.no_cache else folder, args.image_size)


def restore_data(args, checkpoint):
    """The checkpoint's own split, as it was. -> {part: ImageIndex}."""
    parts, others = find_split(checkpoint, PARTS, vars(args))
    check_every_folder_is_used(parts, every_folder(vars(args)))
    if others:
        print(f"left out {others} images that are in no part of the checkpoint's split")
    return read_all(parts, image_cache(args), skip_broken=False)  # without one of its images it would be another split


def find_split(checkpoint, names, flags):
    """The images of the checkpoint's parts `names` in the folders of `flags`. -> ({part: ImageIndex}, other images)."""
    folders = every_folder(flags)
    index = index_folders(folders, checkpoint["classes"], "--data_dirs / --val_dirs / --test_dirs")
    split, sizes = ({part: checkpoint[key][part] for part in names} for key in ("splits", "file_sizes"))
    parts = restore_split(index, split, sizes, folders, every_folder(checkpoint["args"]))
    return parts, len(index) - sum(map(len, parts.values()))


def every_folder(flags):
    return [folder for name in ("data_dirs", "val_dirs", "test_dirs") for folder in flags[name] or []]


def data_to_evaluate(args, checkpoint):
    """-> {part: ImageIndex} for val and test: from folders given anew, else those of the checkpoint's split.

    Where the test images come from elsewhere and the checkpoint's own data are not here, it is only those.
    """
    former, given = checkpoint["args"], parts_given_anew(args, checkpoint["args"])
    parts = {
        part: index_folders(getattr(args, f"{part}_dirs"), checkpoint["classes"], f"--{part}_dirs", allow_missing=True)
        for part in given
    }
    check_doubles([path for index in parts.values() for path in index.paths], "--val_dirs / --test_dirs")
    own = [part for part in ("val", "test") if part not in given]
    here = args.data_dirs != former["data_dirs"] or all(map(os.path.exists, checkpoint["splits"]["val"]))
    if own == ["val"] and not here:
        print("the checkpoint's own validation images are not here: only --test_dirs is evaluated")
    elif own:
        parts |= find_split(checkpoint, own, {**former, "data_dirs": args.data_dirs})[0]
    parts = read_all({part: parts[part] for part in PARTS if part in parts}, image_cache(args), args.skip_broken)
    warn_of_trained_images({part: parts[part] for part in given}, checkpoint)
    return parts


def warn_of_trained_images(parts, checkpoint):
    """A line if images of {part: ImageIndex} have name and size of those that the checkpoint was trained on."""
    names, sizes = (checkpoint[key]["train"] for key in ("splits", "file_sizes"))
    trained = set(zip(map(os.path.basename, names), sizes.tolist(), strict=True))
    for part, index in parts.items():
        found = sum(one in trained for one in zip(map(os.path.basename, index.paths), index.sizes, strict=True))
        if found:
            print(
                f"warning: {found} of the {len(index)} images of --{part}_dirs have name and size of images that the "
                "model was trained on: the figures flatter it"
            )


def paths_of(parts):
    return {part: list(index.paths) for part, index in parts.items()}


def print_class_table(parts, beta, group_regex):
    """One line a class: its images a part, its share, its effective number and its weight in a Class-Balanced loss."""
    counts = {part: index.counts() for part, index in parts.items()}
    train = counts["train"]
    shares, effective, weights = train / train.sum(), effective_number(train, beta), class_balanced_weights(train, beta)
    print(f"{'class':>16} {'train':>7} {'val':>7} {'test':>7} {'share':>7} {'effective':>10} {'weight':>7}")
    for i, name in enumerate(parts["train"].classes):
        images = " ".join(f"{counts[part][i]:7d}" for part in PARTS)
        print(f"{name:>16} {images} {shares[i]:7.1%} {effective[i]:10.1f} {weights[i]:7.3f}")
    totals = " ".join(f"{counts[part].sum():7d}" for part in PARTS)
    print(f"{'all':>16} {totals} (effective number and Class-Balanced weight at beta {beta:g})")
    if group_regex:
        groups = (len(np.unique(groups_of(parts[part].paths, group_regex))) for part in PARTS)
        print(f"{'groups':>16} {' '.join(f'{number:7d}' for number in groups)}")


# --------------------------------------------------------------------------------------------------------- training


def initial_weights(args):
    """The weights to start from, read before the data are looked at. -> (state dict, its classes or None), or None."""
    if args.weights:
        return read_weights(args.weights)
    if args.pretrained:
        return backbone_state_dict(imagenet_state_dict()), None
    return None


def build_engine(args, device, criterion, num_classes):
    return Engine(
        Model(num_classes, args.dropout_prob, cosine_head=args.train_loss == "ldam"),
        criterion,
        device,
        resolve_amp(args.amp, device),
        clip_grad=args.clip_grad,
        grad_accum=args.grad_accum,
        compile=args.compile,
        mixer=Mixer(args.mixup, args.cutmix) if args.mixup or args.cutmix else None,
        ema=0 if args.eval_only else args.ema,
    )


@dataclass
class Stage:
    """Epochs from `start` to before `end` that are trained alike."""

    start: int
    end: int
    loader: torch.utils.data.DataLoader
    criterion: torch.nn.Module
    head_only: bool = False

    def steps(self, grad_accum):
        """Steps of the optimizer in an epoch."""
        return math.ceil(len(self.loader) / grad_accum)


def plan_stages(args, index, criterion, device):
    """The stages of a training, in their order: what `--drw_epoch` defers, all of it, and the head of `--crt_epochs`.

    index: the original training images; criterion: the loss of `--train_loss`.
    """
    stages, end = [], args.epochs - args.crt_epochs
    if args.drw_epoch:
        plain = argparse.Namespace(**{**vars(args), "use_augmentation": False, "sampling": "instance"})
        before = make_loss(args, index.counts(), weighted=False)
        stages.append(Stage(0, args.drw_epoch, train_loader_for(plain, index, device), before))
    stages.append(Stage(args.drw_epoch, end, train_loader_for(args, index, device), criterion))
    if args.crt_epochs:
        balanced = argparse.Namespace(**{**vars(args), "use_augmentation": False, "sampling": "balanced"})
        loader = train_loader_for(balanced, index, device)
        stages.append(Stage(end, args.epochs, loader, CrossEntropy(), head_only=True))
    for stage in stages:
        stage.criterion.to(device)
    return stages


def train_loader_for(args, index, device):
    """Batches of the training images, oversampled as the flags say."""
    train_set, sampling = DoubleSkinDataset(index, args.image_size), args.sampling
    if args.use_augmentation or args.augment_all or sampling != "instance":
        target = args.target_samples_per_class if args.use_augmentation else 1  # 1: no copies
        about = {"seed": args.seed, "on_device": device.type == "cuda", "augment_all": args.augment_all}
        train_set = AugmentedSkinDataset(train_set, target, args.augmentation_methods, **about)
    if sampling == "instance":
        sampler = EpochSampler(train_set, args.seed)
    else:
        sampler = ClassSampler(train_set, sampling, args.epochs - args.crt_epochs, args.seed)
    return loader_for(train_set, args, device, args.batch_size, sampler)


def val_loader_for(index, args, device):
    """Every image in the order of the index, in larger batches, as evaluation needs no memory for gradients."""
    return loader_for(DoubleSkinDataset(index, args.image_size), args, device, 2 * args.batch_size)


def loader_for(dataset, args, device, batch_size, sampler=None):
    workers = args.num_workers
    if workers is None:
        workers = min(8, cpu_count()) if device.type == "cuda" else 0
    options = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    return make_loader(dataset, batch_size, sampler=sampler, seed=args.seed, **options)


def add_optimizer(engine, args, stages):
    """AdamW and the schedule of its learning rate, step by step; that of `--crt_epochs` is one of its own."""
    engine.optimizer = torch.optim.AdamW(
        engine.model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    steps = [(stage.end - stage.start) * stage.steps(args.grad_accum) for stage in stages]
    joint, separate = (steps[:-1], steps[-1:]) if args.crt_epochs else (steps, [])
    warmup_steps = min(round(args.warmup_epochs * stages[0].steps(args.grad_accum)), sum(joint) // 2)
    factor = lr_lambda([(warmup_steps, sum(joint)), *((0, steps) for steps in separate)])
    engine.scheduler = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, factor)


def steps_before(epoch, stages, grad_accum):
    """Steps of the optimizer in all epochs before one."""
    return sum(
        (min(epoch, stage.end) - stage.start) * stage.steps(grad_accum) for stage in stages if stage.start < epoch
    )


@dataclass
class Progress:
    """Where a training stands: the last finished epoch, the best one, and the rows of `history.csv`."""

    epoch: int = -1
    best_metric: float = -math.inf
    best_epoch: int = -1
    history: list = field(default_factory=list)

    def add_epoch(self, row, best_metric_name):
        """-> whether this epoch is the best so far."""
        self.epoch = row["epoch"]
        self.history.append(row)
        improved = row[best_metric_name] > self.best_metric
        if improved:
            self.best_metric, self.best_epoch = row[best_metric_name], self.epoch
        return improved

    def best_row(self):
        """The row of the best epoch; None where a resumed run has not come to it again."""
        return next((row for row in self.history if row["epoch"] == self.best_epoch), None)


def make_checkpoint(engine, progress, args, parts, samples_per_cls, wandb_id, position):
    """position: in the epoch after `progress.epoch`, of `RunningFigures.position`; None between two epochs.

    Raises UserError if the training has diverged: the checkpoint before is better.
    """
    engine.check_weights()
    return {
        "epoch": progress.epoch,
        "position": position,
        "model_state_dict": engine.evaluated.state_dict(),
        "raw_state_dict": engine.model.state_dict() if engine.average else {},
        "averaged_steps": int(engine.average.n_averaged) if engine.average else 0,
        "optimizer_state_dict": engine.optimizer.state_dict(),
        "scheduler_state_dict": engine.scheduler.state_dict(),
        "scaler_state_dict": engine.scaler.state_dict(),
        "posthoc": None,
        "best_metric": progress.best_metric,
        "best_metric_name": args.best_metric,
        "best_epoch": progress.best_epoch,
        "history": list(progress.history),
        "classes": parts["train"].classes,
        "samples_per_cls": samples_per_cls.tolist(),
        "args": vars(args),
        "wandb_id": wandb_id,
        "splits": paths_of(parts),
        "file_sizes": {part: torch.from_numpy(index.sizes) for part, index in parts.items()},
        "rng_state": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
    }


def restore(engine, checkpoint, args, stages, run_dir):
    """Put model, optimizer, schedule, scaler and random state back. -> (Progress, the position in the epoch after it).

    Flags given anew win.
    """
    position, former = checkpoint["position"], checkpoint["args"]
    names = (*ORDER_FLAGS, "epochs") if args.sampling == "progressive" or args.crt_epochs else ORDER_FLAGS
    if position and any(getattr(args, name) != former.get(name, getattr(args, name)) for name in names):
        print(f"epoch {checkpoint['epoch'] + 1} begins again: its images come in another order now")
        position = None
    try:
        engine.evaluated.load_state_dict(checkpoint["model_state_dict"])
        if engine.average:
            engine.model.load_state_dict(checkpoint["raw_state_dict"] or checkpoint["model_state_dict"])
            # at least one: a run without --ema, resumed with it, begins with the weights that it has
            engine.average.n_averaged.fill_(max(1, checkpoint["averaged_steps"]))
        engine.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        engine.scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
        if checkpoint["scaler_state_dict"]:  # empty unless it was trained in float16
            engine.scaler.load_state_dict(checkpoint["scaler_state_dict"])
        torch.set_rng_state(checkpoint["rng_state"]["cpu"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise does_not_fit(args.resume, error) from error
    where = f", after {position['images']} of its images" if position else ""
    print(f"going on with epoch {checkpoint['epoch'] + 1}{where}")
    steps = math.ceil(position["images"] / (args.batch_size * args.grad_accum)) if position else 0
    # in steps, as it is stepped
    engine.scheduler.last_epoch = steps_before(checkpoint["epoch"] + 1, stages, args.grad_accum) + steps
    engine.scheduler.base_lrs = [args.learning_rate] * len(engine.scheduler.base_lrs)
    for group, factor in zip(engine.optimizer.param_groups, engine.scheduler.lr_lambdas, strict=True):
        group["weight_decay"] = args.weight_decay
        group["lr"] = args.learning_rate * factor(engine.scheduler.last_epoch)
    if len(checkpoint["rng_state"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(checkpoint["rng_state"]["cuda"])
    best_metric, best_epoch = settle_best_model(checkpoint, args.resume, run_dir)
    return Progress(checkpoint["epoch"], best_metric, best_epoch, checkpoint["history"]), position


def does_not_fit(path, error):
    """-> UserError. error: of `load_state_dict`, whose first line says nothing of what does not fit."""
    reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
    return UserError(f"--resume: {path} does not fit this network: {reason[:300]}")


def train_and_validate(engine, stage, val_loader, figures, args, keeper):
    """One epoch, or what is left of it. figures: its `RunningFigures`. -> its row of `history.csv`."""
    stage.loader.sampler.set_epoch(figures.epoch, skipped=figures.images)
    if isinstance(stage.loader.dataset, AugmentedSkinDataset):
        stage.loader.dataset.set_epoch(figures.epoch)
    engine.criterion = stage.criterion
    if stage.head_only:
        engine.retrain_head(anew=figures.epoch == stage.start and not figures.images)
    image_size = progressive_size(figures.epoch, args.epochs, args.image_size) if args.progressive else None
    visit = functools.partial(keeper.visit, figures)
    row = engine.train_one_epoch(stage.loader, figures, image_size, after_step=visit)
    started = time.perf_counter()
    name = f"validation (epoch {figures.epoch})"
    val_loss, probabilities, targets = engine.evaluate(val_loader, name, after_batch=visit)
    val = {f"val_{name}": value for name, value in summary_metrics(targets, probabilities).items()}
    val["val_recall"] = recalls(targets, probabilities, val_loader.dataset.index.classes)
    seconds = figures.seconds + time.perf_counter() - started
    return {"epoch": figures.epoch, **row, "val_loss": val_loss, **val, "seconds": seconds}


def print_stages(stages, num_originals):
    for stage in stages:
        dataset, sampler = stage.loader.dataset, stage.loader.sampler
        what = [type(stage.criterion).__name__]
        if len(dataset) > num_originals:
            what.append(f"oversampled by augmentation: {num_originals} -> {len(dataset)} images an epoch")
        if isinstance(sampler, ClassSampler):
            what.append(f"{sampler.sampling} sampling")
        if stage.head_only:
            what.append("a new head on the frozen backbone")
        print(f"epochs {stage.start} to {stage.end - 1}: {', '.join(what)}")


def print_epoch(row, epochs, improved):
    print(
        f"epoch {row['epoch']:3d} ({row['epoch'] + 1}/{epochs})"
        f" | train loss {row['train_loss']:.4f} acc {row['train_acc']:.3f}"
        f" | val loss {row['val_loss']:.4f} acc {row['val_acc']:.3f}"
        f" balanced_acc {row['val_balanced_acc']:.3f} macro_f1 {row['val_macro_f1']:.3f}"
        f" | {row['images_per_second']:.0f} images/s, {row['seconds']:.0f} s, waiting for input {row['input_wait']:.1%}"
        f"{' | best so far' if improved else ''}"
    )


# ------------------------------------------------------------------------------------------------------- evaluating


def evaluate_parts(engine, parts, args, run_dir, checkpoint):
    """Evaluate the checkpoint's model, which `engine` has, on each part; write predictions and the confusion matrix.

    What is fitted after training is the checkpoint's, or fitted on the validation images where it has none.
    -> (results, {part: probabilities (N, C)}).
    """
    classes, samples_per_cls = parts["test"].classes, checkpoint["samples_per_cls"]
    persons, ordinal = persons_of(parts, args, checkpoint["args"]), is_ordinal(args)

    def figures(part, loss, given):
        of = full_metrics(parts[part].targets, given, classes, samples_per_cls, ordinal, persons[part])
        return {"loss": loss, **of}

    results, probabilities = {"evaluated_epoch": checkpoint["epoch"], "best_epoch": checkpoint["best_epoch"]}, {}
    for part, index in parts.items():
        loader = val_loader_for(index, args, engine.device)
        loss, probabilities[part], targets = engine.evaluate(loader, part)
        results[part] = figures(part, loss, probabilities[part])
        write_predictions(run_dir / f"{part}_predictions.csv", index.paths, targets, probabilities[part], classes)
        if args.tta:
            loss, mirrored, _ = engine.evaluate(loader, f"{part}, mirrored", mirrored=True)
            results.setdefault("tta", {})[part] = figures(part, loss, mirrored)
    fitted = checkpoint["posthoc"]
    if not fitted and "val" in parts:
        metric = checkpoint["best_metric_name"].removeprefix("val_")
        fitted = posthoc.fit(parts["val"].targets, probabilities["val"], samples_per_cls, metric)
    if fitted:
        results["posthoc"] = dict(fitted)
        for part, index in parts.items():
            adjusted = posthoc.adjust(probabilities[part], samples_per_cls, **fitted)
            loss = engine.loss_of(torch.from_numpy(adjusted).log(), torch.from_numpy(index.targets))
            results["posthoc"][part] = figures(part, loss, adjusted)
    results |= {"classes": classes, "samples_per_cls": samples_per_cls}
    title = f"test: balanced accuracy {results['test']['balanced_acc']:.3f}"
    report.plot_confusion_matrix(run_dir / "confusion_matrix.png", results["test"]["confusion_matrix"], classes, title)
    return results, probabilities


def evaluate_best(engine, parts, args, run_dir):
    """The best model of a finished training, which then keeps what is fitted after it. -> as `evaluate_parts`."""
    best = load_checkpoint(run_dir / BEST)
    engine.evaluated.load_state_dict(best["model_state_dict"])
    evaluated = {part: parts[part] for part in ("val", "test")}
    results, probabilities = evaluate_parts(engine, evaluated, args, run_dir, best)
    best["posthoc"] = {name: results["posthoc"][name] for name in ("tau", "temperature")}
    save_checkpoint(run_dir / BEST, checkpoint_bytes(best))
    return results, probabilities


def persons_of(parts, args, former):
    """-> {part: numbers of the persons (N,), or None}, by `--group_regex`: that of the training for its own images.

    former: the flags of the training.
    """
    anew = parts_given_anew(args, former)
    pattern_of = {part: args.group_regex if part in anew else former.get("group_regex") for part in parts}
    return {part: groups_of(index.paths, pattern_of[part]) for part, index in parts.items()}


def is_ordinal(args):
    return args.ordinal or args.train_loss == "ordinal"


def print_results(results, run_dir):
    print(f"model of epoch {results['evaluated_epoch']} (in brackets: 95 % intervals):")
    for part in ("val", "test"):
        if part in results:
            print_figures(part, results[part])
    for name, about in (("tta", "with the mirror image"), ("posthoc", "with logit adjustment")):
        if name in results:
            tau = f", tau {results[name]['tau']:g}" if "tau" in results[name] else ""
            print_figures(f"test {about}{tau}", results[name]["test"])
    occurring = {name: row["recall"] for name, row in results["test"]["per_class"].items() if row["support"]}
    recalls = ", ".join(f"{name} {recall:.2f}" for name, recall in occurring.items())
    print(f"test recall a class: {recalls}")
    print(f"results lie in {run_dir}")


def warn_of_early_best(best_epoch, stages):
    """A line if the model that is kept is one from before the last of the stages."""
    if best_epoch < stages[-1].start:
        print(
            f"warning: the best epoch, {best_epoch}, is one before --drw_epoch / --crt_epochs take effect, in epoch "
            f"{stages[-1].start}: the model that is kept and tested has not seen them"
        )


def print_figures(title, figures):
    words = []
    for name, word in (("balanced_acc", "balanced accuracy"), ("macro_f1", "macro F1"), ("acc", "accuracy")):
        low, high = figures[f"{name}_ci"]
        words.append(f"{word} {figures[name]:.3f} [{low:.3f}, {high:.3f}]")
    loss = f", loss {figures['loss']:.4f}" if "loss" in figures else ""
    print(f"{title:>4}: {', '.join(words)}{loss}")


# -------------------------------------------------------------------------------------------------- the experiment


def train(args, checkpoint, device, run_dir, signals):
    """The experiment, in the order that matters: the classes are counted and the loss built before any oversampling."""
    state_dict = None if checkpoint else initial_weights(args)
    if args.demo:
        args.data_dirs = [demo.write_demo_data(run_dir / "demo_data", args.seed)]
        args.cache_dir = args.cache_dir or str(run_dir / "demo_cache")
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True

    parts = restore_data(args, checkpoint) if checkpoint else split_data(args)
    classes = parts["train"].classes
    samples_per_cls = parts["train"].counts()
    print_class_table(parts, args.beta, args.group_regex)
    if is_ordinal(args):
        print(f"grades in their order: {' < '.join(classes)}")
    criterion = make_loss(args, samples_per_cls)

    stages = plan_stages(args, parts["train"], criterion, device)
    print_stages(stages, len(parts["train"]))
    val_loader = val_loader_for(parts["val"], args, device)
    engine = build_engine(args, device, criterion, len(classes))
    add_optimizer(engine, args, stages)
    progress, position = Progress(), None
    if args.auto_resume and checkpoint and Path(args.resume).name == PREVIOUS:
        set_damaged_aside(run_dir)
    if checkpoint:
        progress, position = restore(engine, checkpoint, args, stages, run_dir)
    elif state_dict:
        engine.load_initial_weights(*state_dict, classes)
    write_json(run_dir / "args.json", vars(args))
    write_json(run_dir / "splits.json", paths_of(parts))
    write_history(run_dir / "history.csv", progress.history)
    precision = str(engine.amp_dtype or torch.float32).removeprefix("torch.")
    print(f"training on {engine.device} in {precision}, run folder {run_dir}")

    with tracking.Run(args, run_dir, checkpoint, dict(zip(classes, samples_per_cls.tolist(), strict=True))) as run:
        state = functools.partial(make_checkpoint, engine, progress, args, parts, samples_per_cls, run.id)
        keeper = Keeper(run_dir, state, signals, args.save_every, args.save_minutes)
        run.catch_up(progress)
        with signals.deferred():
            for epoch in range(progress.epoch + 1, args.epochs):
                figures = RunningFigures(epoch, engine.device, position)
                position = None
                stage = next(stage for stage in stages if epoch < stage.end)
                row = train_and_validate(engine, stage, val_loader, figures, args, keeper)
                improved = progress.add_epoch(row, args.best_metric)
                print_epoch(row, args.epochs, improved)
                keeper.end_epoch(improved)
                run.log_epoch(row, progress)  # what is logged is saved: no epoch has to be logged twice
            keeper.finish()

        engine.criterion = criterion
        results, probabilities = evaluate_best(engine, parts, args, run_dir)
        changes = [stage.start for stage in stages[1:]]
        report.plot_curves(run_dir / "curves.png", progress.history, results["best_epoch"], changes)
        report.write_report(run_dir, vars(args), results)
        run.log_results(progress, results, parts["test"], probabilities["test"], run_dir / BEST)
    # the last file: the run is finished
    write_json(run_dir / "results.json", {**results, "epochs": progress.epoch + 1})
    warn_of_early_best(results["best_epoch"], stages)
    print_results(results, run_dir)


def is_finished(args, checkpoint, run_dir):
    """Whether a run has been trained for all its epochs, and tested after them."""
    try:
        results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(results, dict) and results.get("epochs") == checkpoint["epoch"] + 1 >= args.epochs


def make_loss(args, samples_per_cls, weighted=True):
    """weighted: see `build_loss`; LDAM's weights are none without `--drw_epoch`, as in its paper."""
    alpha = args.alpha[0] if args.alpha and len(args.alpha) == 1 else args.alpha
    if isinstance(alpha, list) and len(alpha) != len(samples_per_cls):
        raise UserError(f"--alpha: {len(alpha)} figures for {len(samples_per_cls)} classes; give one, or one a class")
    return build_loss(
        args.train_loss,
        samples_per_cls,
        weighted=weighted and (args.train_loss != "ldam" or args.drw_epoch > 0),
        beta=args.beta,
        gamma=args.gamma,
        alpha=alpha,
        smoothing=args.smoothing,
        cb_form=args.cb_form,
        tau=args.tau,
        max_margin=args.max_margin,
        ordinal_decay=args.ordinal_decay,
    )


def evaluate_only(args, checkpoint, device, run_dir):
    parts = data_to_evaluate(args, checkpoint)
    engine = build_engine(args, device, make_loss(args, checkpoint["samples_per_cls"]), len(checkpoint["classes"]))
    try:
        engine.model.load_state_dict(checkpoint["model_state_dict"])
    except RuntimeError as error:
        raise does_not_fit(args.resume, error) from error
    write_json(run_dir / "args.json", vars(args))
    write_json(run_dir / "splits.json", paths_of(parts))
    results, _ = evaluate_parts(engine, parts, args, run_dir, checkpoint)
    report.write_report(run_dir, vars(args), results)
    write_json(run_dir / "results.json", results)
    print_results(results, run_dir)


def how_to_go_on(args, argv, signals):
    """What to say behind "stopped". args: None if they were not parsed yet."""
    if args is None or args.eval_only:
        return ""
    if args.auto_resume:
        return "; go on with the same command"
    if not signals.saved:
        again = shlex.join(["python", "main.py", *(sys.argv[1:] if argv is None else argv)])
        return f"; go on with: {again}" if args.resume else "; nothing was saved yet"
    outside = [name for name in WRITTEN_TO if getattr(args, name) and not is_inside(getattr(args, name), args.run_dir)]
    flags = [word for name in outside for word in (f"--{name}", getattr(args, name))]
    return f"; go on with: {shlex.join(['python', 'main.py', '--resume', str(Path(args.run_dir, LAST)), *flags])}"


def run_folds(argv, first, signals):
    """Every fold as a run of its own in one folder, then mean and spread over them. -> exit status."""
    if first.wandb_id or "WANDB_SWEEP_ID" in os.environ:
        raise UserError(
            "--folds: each fold is a W&B run of its own; leave out --wandb_id, and name one --fold in a sweep"
        )
    with run_folder(first) as folder:
        args, _ = parse_args([*argv, "--fold", "0"], folder)
        again = shlex.join(["python", "main.py", *argv, "--run_dir", str(folder), "--auto_resume"])
        go_on = "; go on with the same command" if first.auto_resume else f"; go on with: {again}"
        run_dirs = [folder / f"fold_{fold}" for fold in range(first.folds)]
        check_same_folds(folder / FOLDS_BEGUN, args)
        for fold, run_dir in enumerate(run_dirs):
            print(f"fold {fold} of {first.folds}")
            name = f"{first.wandb_name or folder.name}_fold_{fold}"
            own = ["--fold", str(fold), "--run_dir", str(run_dir), "--wandb_name", name, "--auto_resume"]
            if status := run([*argv, *own], signals, go_on):
                return status
        spread, pooled = report.spread_over(run_dirs), pooled_figures(run_dirs, args)
        write_json(folder / "folds.json", {**spread, "test_pooled": pooled})
        report.print_spread(f"mean and standard deviation of {first.folds} folds", spread)
        print_figures("test images of all folds together", pooled)
        print(f"results lie in {folder}")
    return 0


def check_same_folds(path, args):
    """Raise UserError if the folds were begun with other flags or images, which `path` keeps from the first time on."""
    index = None if args.demo else index_folders(args.data_dirs)
    now = {"flags": vars(args), "images": index and dict(zip(index.classes, index.counts().tolist(), strict=True))}
    former = read_json(path) if path.exists() else now
    for name, value in now["flags"].items():
        was = former["flags"].get(name, value)
        if not is_neutral(name) and was != value:
            raise UserError(f"--{name}: the folds in {path.parent} were begun with {was}; name another --run_dir")
    if former["images"] != now["images"]:
        raise UserError(f"--data_dirs: the folds in {path.parent} were begun with other images; name another --run_dir")
    write_json(path, former)


def pooled_figures(run_dirs, args):
    """The figures of the test images of all folds together, each tested in one; none that rank images by the
    probabilities of several models."""
    results = read_json(run_dirs[0] / "results.json")
    classes = results["classes"]
    folds = [read_predictions(run_dir / "test_predictions.csv", classes) for run_dir in run_dirs]
    paths, targets, probabilities = map(np.concatenate, zip(*folds, strict=True))
    persons = groups_of(paths.tolist(), args.group_regex)
    pooled = full_metrics(targets, probabilities, classes, results["samples_per_cls"], is_ordinal(args), persons)
    for row in pooled["per_class"].values():
        for name in RANKINGS:
            del row[name], row[f"{name}_ci"]
    return pooled


def run(argv, signals, go_on=None):
    """What the command line asks for. -> exit status; raises UserError and OSError.

    go_on: what to say behind "stopped", instead of `how_to_go_on`.
    """
    args = None
    try:
        first = first_look(argv)
        if first.folds and first.fold is None and not first.resume:
            return run_folds(sys.argv[1:] if argv is None else argv, first, signals)
        if first.run_dir and Path(first.run_dir, FOLDS_BEGUN).exists():
            raise UserError(f"--run_dir: {first.run_dir} is the folder of a cross-validation; go on with its --folds")
        with run_folder(first) as run_dir:
            args, checkpoint = parse_args(argv, run_dir)
            limit_image_size(args.max_megapixels)
            device = choose_device(args.device)
            if args.eval_only:
                evaluate_only(args, checkpoint, device, run_dir)
            elif args.auto_resume and checkpoint and is_finished(args, checkpoint, run_dir):
                print(f"finished before: {args.epochs} epochs, results lie in {run_dir}")
            else:
                train(args, checkpoint, device, run_dir, signals)
    except Stopped as stop:
        print(f"stopped{go_on or how_to_go_on(args, argv, signals)}", file=sys.stderr)
        if "WANDB_SWEEP_ID" in os.environ:
            # wandb agent takes an exit status for a failure, and gives up after some; death by a signal it does not
            signal.signal(stop.number, signal.SIG_DFL)
            signal.raise_signal(stop.number)
        return stop.status
    return 0


def main(argv=None):
    """-> exit status: 0 done, 2 a mistake of the user's, 130 / 143 stopped by Ctrl-C / SIGTERM."""
    for stream in (sys.stdout, sys.stderr):  # a line is seen when it is printed, also in a log; any file name prints
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    torch.set_num_threads(min(torch.get_num_threads(), cpu_count()))  # a container may have fewer than the machine
    with Signals() as signals:
        return exit_status(functools.partial(run, signals=signals), argv)


if __name__ == "__main__":
    keep_freed_memory()
    status = main()
    for late in (signal.SIGINT, signal.SIGTERM):  # all is saved and said: what comes now must not change the status
        signal.signal(late, signal.SIG_IGN)
    with suppress(OSError):  # what no log takes any more is no error of the run's
        sys.stdout.flush()
    sys.exit(status)
