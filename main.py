#!/usr/bin/env python3
"""Train a ResNet-50 to grade skin conditions from very unequal class folders.

python main.py --demo
python main.py --data_dirs data/forehead_wrinkles --train_loss cb --use_augmentation
python main.py --resume checkpoints_20260101_120000/last_model.pth
python main.py --eval_only --resume checkpoints_20260101_120000/best_model.pth --test_dirs other/forehead_wrinkles
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
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from joblib import cpu_count

import demo
import report
import tracking
from dataset_double import (
    AUGMENTATIONS,
    PARTS,
    AugmentedSkinDataset,
    DoubleSkinDataset,
    check_doubles,
    check_every_class_in_every_part,
    check_every_folder_is_used,
    check_fractions,
    index_folders,
    make_loader,
    read_all,
    restore_split,
    stratified_split,
)
from engine import Engine, RunningFigures, keep_freed_memory, lr_lambda, progressive_size, resolve_amp
from files import (
    LossyStream,
    UserError,
    locked,
    new_folder,
    own_folder,
    timestamped,
    write_history,
    write_json,
    write_predictions,
)
from image_cache import ImageCache, default_cache_dir, limit_image_size
from metrics import full_metrics, recalls, summary_metrics
from model import Model, backbone_state_dict, load_checkpoint, read_weights
from resnet_custom import imagenet_state_dict
from resuming import (
    BEST,
    LAST,
    PREVIOUS,
    Keeper,
    Signals,
    Stopped,
    checkpoint_to_go_on_with,
    set_damaged_aside,
    settle_best_model,
)
from utils import TRAIN_LOSSES, build_loss, class_balanced_weights, effective_number

# ------------------------------------------------------------------------------------------------------------ flags

DEMO_DEFAULTS = {
    "image_size": 64,
    "epochs": 8,
    "learning_rate": 1e-3,
    "use_augmentation": True,
    "pretrained": False,
    "wandb_mode": "disabled",
}
# flags of the checkpoint's run that say nothing about the run that resumes it
NOT_INHERITED = ("resume", "auto_resume", "eval_only", "run_dir", "demo", "wandb_id", "wandb_resume")
# flags that name a place to write to: a checkpoint from elsewhere must not choose one
WRITTEN_TO = ("cache_dir", "wandb_dir")
# flags whose work is done: the split is made, the training has begun, the best model so far was chosen
FIXED_ON_RESUME = ("split", "pretrained", "weights")
FIXED_IN_TRAINING = ("best_metric",)
BEST_METRICS = ("val_balanced_acc", "val_macro_f1")  # by which the best epoch can be chosen
# flags that set which image of an epoch comes when
ORDER_FLAGS = ("seed", "use_augmentation", "target_samples_per_class")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see python {self.prog} --help)")


def number(cast, low=-math.inf, high=math.inf, below=math.inf, above=-math.inf):
    """An argparse type: a finite number, low <= n <= high, above < n < below."""

    def parse(text):
        value = cast(text)
        if not (math.isfinite(value) and low <= value <= high and above < value < below):
            bounds = {"at least": low, "at most": high, "below": below, "above": above}
            wanted = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
            raise argparse.ArgumentTypeError(f"{text} is not {wanted or 'a finite number'}")
        return value

    parse.__name__ = cast.__name__
    return parse


def truth(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def add_switch(group, name, default, help):
    """`--name`, `--no-name`, and `--name=true` / `--name=false` as W&B sweeps write them."""
    group.add_argument(f"--{name}", nargs="?", const=True, default=default, type=truth, metavar="BOOL", help=help)
    group.add_argument(f"--no-{name}", dest=name, action="store_false", default=argparse.SUPPRESS, help="the contrary")


def build_parser():
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, prog="main.py"
    )
    add_data_flags(parser.add_argument_group("data"))
    add_imbalance_flags(parser.add_argument_group("imbalance: loss and augmentation"))
    add_training_flags(parser.add_argument_group("model and training"))
    add_run_flags(parser.add_argument_group("run"))
    add_wandb_flags(parser.add_argument_group("Weights & Biases"))
    return parser


def add_data_flags(group):
    add = group.add_argument
    add("--data_dirs", nargs="+", metavar="DIR", help="folders of class folders, merged class by class")
    add("--val_dirs", nargs="+", metavar="DIR", help="validation images, instead of a share of --data_dirs")
    add("--test_dirs", nargs="+", metavar="DIR", help="test images, instead of a share of --data_dirs")
    shares = {"type": number(float), "nargs": 3, "metavar": ("TRAIN", "VAL", "TEST"), "default": [0.6, 0.2, 0.2]}
    add("--split", **shares, help="shares of the images, stratified by class [0.6 0.2 0.2]")
    add("--image_size", type=number(int, low=32), default=224, help="side in pixels [224]")
    add_switch(group, "skip_broken", False, "leave out images that cannot be read, instead of stopping")
    add("--cache_dir", metavar="DIR", help=f"decoded images are kept here [{default_cache_dir()}]")
    switch = {"nargs": "?", "const": True, "type": truth, "metavar": "BOOL"}
    add("--no_cache", **switch, default=False, help="keep none: decode each image whenever it is used")
    add("--max_megapixels", type=number(float, above=0), default=200, help="larger images are refused [200]")
    add("--demo", action="store_true", help="draw a small synthetic data set and train on it")


def add_imbalance_flags(group):
    add = group.add_argument
    add("--train_loss", choices=TRAIN_LOSSES, default="cb", help="[cb]: Class-Balanced Focal loss")
    cb_forms = ("softmax", "sigmoid")
    add("--beta", type=number(float, low=0, below=1), default=0.999, help="cb: 0 no weights, near 1 1/n [0.999]")
    add("--gamma", type=number(float, low=0), default=2.0, help="cb, focal: focus on hard images [2.0]")
    add("--cb_form", choices=cb_forms, default="softmax", help="cb: sigmoid is the paper's form [softmax]")
    add("--alpha", type=number(float, above=0), nargs="+", help="focal: weight, one or one a class [1]")
    add("--smoothing", type=number(float, low=0, below=1), default=0.1, help="label_smoothing [0.1]")
    add_switch(group, "use_augmentation", False, "oversample by augmented copies until classes are equal")
    add("--target_samples_per_class", type=number(int, low=1), metavar="N", help="oversample to N [largest class]")
    names = list(AUGMENTATIONS)
    add(
        "--augmentation_methods", nargs="+", choices=names, default=names, metavar="METHOD", help=f"[{' '.join(names)}]"
    )


def add_training_flags(group):
    add = group.add_argument
    add_switch(group, "pretrained", True, "start from torchvision's ImageNet weights [true]")
    add("--weights", metavar="FILE", help="start from this file: torchvision's, or a checkpoint of ours")
    add("--dropout_prob", type=number(float, low=0, below=1), default=0.3, help="before the head [0.3]")
    add("--epochs", type=number(int, low=1), default=100, help="[100]")
    add("--batch_size", type=number(int, low=1), default=32, help="[32]")
    add("--learning_rate", "--lr", type=number(float, above=0), default=1e-4, help="AdamW [1e-4]")
    add("--weight_decay", type=number(float, low=0), default=0.01, help="AdamW [0.01]")
    add("--warmup_epochs", type=number(float, low=0), default=1.0, help="warm-up, then half a cosine to zero [1]")
    add("--clip_grad", type=number(float, low=0), default=1.0, help="norm of the gradient; 0: off [1.0]")
    add("--grad_accum", type=number(int, low=1), default=1, help="batches a step of the optimizer [1]")
    add_switch(group, "progressive", False, "train on small images first, on the whole size in the last third")
    add(
        "--best_metric",
        choices=BEST_METRICS,
        default=BEST_METRICS[0],
        help="decides which epoch is kept [val_balanced_acc]",
    )
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision [auto]")
    add_switch(group, "compile", False, "torch.compile: minutes at the start, a faster step")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... [auto]")
    add("--num_workers", type=number(int, low=0), help="loader processes [0 on a CPU, up to 8 on a GPU]")
    add("--seed", type=number(int, low=0, below=2**32), default=42, help="[42]")


def add_run_flags(group):
    add = group.add_argument
    add("--output_dir", default="checkpoints", help="the run's folder is OUTPUT_DIR_YYYYMMDD_HHMMSS [checkpoints]")
    add("--run_dir", metavar="DIR", help="the run's folder, by its exact name; must be new")
    add("--resume", metavar="FILE", help="go on with a checkpoint; its flags are the defaults")
    add_switch(group, "auto_resume", False, "go on with the run in --run_dir; start it if it has not begun")
    add("--save_every", type=number(int, low=0), default=0, metavar="N", help="save every N steps too; 0: no [0]")
    minutes = {"type": number(float, low=0), "metavar": "M", "default": 10}
    add("--save_minutes", **minutes, help="save when an epoch takes longer; 0: no [10]")
    add_switch(group, "eval_only", False, "test the checkpoint of --resume, train nothing")


def add_wandb_flags(group):
    add = group.add_argument
    project = os.environ.get("WANDB_PROJECT", "skin-grading")
    add("--wandb_project", default=project, help="[WANDB_PROJECT, else skin-grading]")
    add("--wandb_name", default=os.environ.get("WANDB_NAME"), help="[WANDB_NAME, else the name of the run's folder]")
    add("--wandb_id", help="go on with this W&B run [that of the checkpoint]")
    add("--wandb_resume", choices=("never", "allow", "must"), default="allow", help="[allow]")
    add(
        "--wandb_mode",
        choices=tracking.MODES,
        default=tracking.default_mode(),
        help="[online; goes on offline by itself]",
    )
    add("--wandb_dir", metavar="DIR", help="where W&B keeps its files [WANDB_DIR, else the run's folder]")
    images = {"type": number(int, low=0), "default": 0, "metavar": "N"}
    add("--wandb_images", **images, help="upload the N worst mistakes of the test, with their photographs [0]")
    add_switch(group, "wandb_artifact", False, "upload the best checkpoint")


def first_look(argv):
    """-> the flags as they are given, without those of a checkpoint: enough to know the run's folder."""
    first, _ = build_parser().parse_known_args(argv)
    if first.eval_only and not first.resume:
        raise UserError("--eval_only: name the checkpoint to test with --resume FILE")
    if first.auto_resume and not first.run_dir:
        raise UserError("--auto_resume: name the run's folder with --run_dir DIR")
    if {"WANDB_SWEEP_ID", "WANDB_RUN_ID"} <= os.environ.keys() and not (first.run_dir or first.resume):
        # a sweep's trial: a folder of its own, in which it goes on when it is handed out again after preemption
        first.run_dir, first.auto_resume = f"{first.output_dir}_{os.environ['WANDB_RUN_ID']}", True
    if first.auto_resume and first.resume:
        raise UserError("--auto_resume: finds the checkpoint in --run_dir by itself; leave out --resume")
    return first


def parse_args(argv, run_dir):
    """-> (args, the checkpoint to go on with or None). The checkpoint's flags are the defaults of those not given."""
    parser, first = build_parser(), first_look(argv)
    checkpoint = load_checkpoint(first.resume) if first.resume else None
    if first.auto_resume:
        first.resume, checkpoint = checkpoint_to_go_on_with(run_dir) or (None, None)
    if checkpoint:
        known = vars(first).keys() - set(NOT_INHERITED)
        if "WANDB_MODE" in os.environ:
            known.discard("wandb_mode")
        inherited = {name: value for name, value in checkpoint["args"].items() if name in known}
        check_inherited(parser, inherited, first.resume)
        for name in WRITTEN_TO:
            if inherited.get(name) and not is_inside(inherited[name], run_dir):
                outside = inherited.pop(name)
                if not getattr(first, name):
                    print(f"--{name}: not {outside} as in the checkpoint, to use it again give it again")
        parser.set_defaults(**inherited)
    elif first.demo:
        parser.set_defaults(**DEMO_DEFAULTS)
    args = parser.parse_args(argv)
    args.resume, args.run_dir = first.resume and str(first.resume), str(run_dir)
    args.auto_resume = first.auto_resume
    for name in ("data_dirs", "val_dirs", "test_dirs"):  # absolute, so that a run can be resumed from anywhere
        if getattr(args, name):
            setattr(args, name, [os.path.abspath(folder) for folder in getattr(args, name)])
    args.cache_dir = args.cache_dir and os.path.abspath(args.cache_dir)
    if checkpoint:
        check_resume_flags(args, checkpoint)
    elif not (args.data_dirs or args.demo):
        raise UserError("--data_dirs: name the folder that holds the class folders (or try --demo)")
    elif args.data_dirs and args.demo:
        raise UserError("--demo: makes its own data; leave out --data_dirs")
    check_fractions(args.split, [part for part in ("val", "test") if getattr(args, f"{part}_dirs")])
    return args, checkpoint


def check_inherited(parser, inherited, path):
    """Raise UserError if a flag of a checkpoint is none that the command line could have given."""
    for action in parser._actions:
        if action.dest not in inherited or isinstance(action, argparse._StoreFalseAction):
            continue
        value = inherited[action.dest]
        try:
            values = value if action.nargs in ("+", 3) and value is not None else [value]
            fine = value in (None, action.default) or all(
                one == (action.type or str)(str(one)) and (not action.choices or one in action.choices)
                for one in values
            )
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            fine = False
        if not fine:
            raise UserError(f"--resume: {path} has been altered: its --{action.dest} is {value!r}")


def is_inside(path, folder):
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def check_resume_flags(args, checkpoint):
    if args.demo and not args.auto_resume:
        raise UserError("--demo: a run is resumed with its own data; leave out --demo")
    args.demo = False  # the data are drawn
    for name in FIXED_ON_RESUME if args.eval_only else FIXED_ON_RESUME + FIXED_IN_TRAINING:
        if getattr(args, name) != checkpoint["args"].get(name, getattr(args, name)):
            raise UserError(f"--{name}: stays what it was in a resumed run; leave this flag out, or start a new run")


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
    parts = stratified_split(whole.pop("data"), args.split, args.seed, separate)
    parts = {part: {**parts, **whole}[part] for part in PARTS}
    check_every_class_in_every_part(parts, args.split)
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
    former = checkpoint["args"]
    given = [part for part in ("val", "test") if getattr(args, f"{part}_dirs") != former[f"{part}_dirs"]]
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
    return read_all({part: parts[part] for part in PARTS if part in parts}, image_cache(args), args.skip_broken)


def paths_of(parts):
    return {part: list(index.paths) for part, index in parts.items()}


def print_class_table(parts, beta):
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
        Model(num_classes, args.dropout_prob),
        criterion,
        device,
        resolve_amp(args.amp, device),
        clip_grad=args.clip_grad,
        grad_accum=args.grad_accum,
        compile=args.compile,
    )


def add_optimizer(engine, args, steps_per_epoch):
    """AdamW and the schedule of its learning rate, step by step."""
    engine.optimizer = torch.optim.AdamW(
        engine.model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = min(round(args.warmup_epochs * steps_per_epoch), total_steps // 2)
    engine.scheduler = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, lr_lambda(warmup_steps, total_steps))


def make_train_set(args, index, device):
    train_set = DoubleSkinDataset(index, args.image_size)
    if not args.use_augmentation:
        return train_set
    wanted = args.target_samples_per_class, args.augmentation_methods
    oversampled = AugmentedSkinDataset(train_set, *wanted, args.seed, on_device=device.type == "cuda")
    print(f"oversampled by augmentation: {len(train_set)} -> {len(oversampled)} images an epoch")
    return oversampled


def loader_for(index_or_dataset, args, device, training=False):
    """Evaluation keeps the order of the index and takes larger batches, as it needs no memory for gradients."""
    workers = args.num_workers
    if workers is None:
        workers = min(8, cpu_count()) if device.type == "cuda" else 0
    return make_loader(
        index_or_dataset if training else DoubleSkinDataset(index_or_dataset, args.image_size),
        args.batch_size if training else 2 * args.batch_size,
        shuffle=training,
        seed=args.seed,
        num_workers=workers,
        pin_memory=device.type == "cuda",
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
        "model_state_dict": engine.model.state_dict(),
        "optimizer_state_dict": engine.optimizer.state_dict(),
        "scheduler_state_dict": engine.scheduler.state_dict(),
        "scaler_state_dict": engine.scaler.state_dict(),
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


def restore(engine, checkpoint, args, steps_per_epoch, run_dir):
    """Put model, optimizer, schedule, scaler and random state back. -> (Progress, the position in the epoch after it).

    Flags given anew win.
    """
    position = checkpoint["position"]
    if position and any(getattr(args, name) != checkpoint["args"].get(name) for name in ORDER_FLAGS):
        print(f"epoch {checkpoint['epoch'] + 1} begins again: its images come in another order now")
        position = None
    try:
        engine.model.load_state_dict(checkpoint["model_state_dict"])
        engine.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        engine.scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
        if checkpoint["scaler_state_dict"]:  # empty unless it was trained in float16
            engine.scaler.load_state_dict(checkpoint["scaler_state_dict"])
        torch.set_rng_state(checkpoint["rng_state"]["cpu"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--resume: {args.resume} does not fit this network: {str(error).splitlines()[0]}") from error
    where = f", after {position['images']} of its images" if position else ""
    print(f"going on with epoch {checkpoint['epoch'] + 1}{where}")
    steps = math.ceil(position["images"] / (args.batch_size * args.grad_accum)) if position else 0
    engine.scheduler.last_epoch = (checkpoint["epoch"] + 1) * steps_per_epoch + steps  # in steps, as it is stepped
    engine.scheduler.base_lrs = [args.learning_rate] * len(engine.scheduler.base_lrs)
    for group, factor in zip(engine.optimizer.param_groups, engine.scheduler.lr_lambdas, strict=True):
        group["weight_decay"] = args.weight_decay
        group["lr"] = args.learning_rate * factor(engine.scheduler.last_epoch)
    if len(checkpoint["rng_state"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(checkpoint["rng_state"]["cuda"])
    best_metric, best_epoch = settle_best_model(checkpoint, args.resume, run_dir)
    return Progress(checkpoint["epoch"], best_metric, best_epoch, checkpoint["history"]), position


def train_and_validate(engine, train_loader, val_loader, figures, args, keeper):
    """One epoch, or what is left of it. figures: its `RunningFigures`. -> its row of `history.csv`."""
    train_loader.sampler.set_epoch(figures.epoch, skipped=figures.images)
    if isinstance(train_loader.dataset, AugmentedSkinDataset):
        train_loader.dataset.set_epoch(figures.epoch)
    image_size = progressive_size(figures.epoch, args.epochs, args.image_size) if args.progressive else None
    visit = functools.partial(keeper.visit, figures)
    row = engine.train_one_epoch(train_loader, figures, image_size, after_step=visit)
    started = time.perf_counter()
    name = f"validation (epoch {figures.epoch})"
    val_loss, probabilities, targets = engine.evaluate(val_loader, name, after_batch=visit)
    val = {f"val_{name}": value for name, value in summary_metrics(targets, probabilities).items()}
    val["val_recall"] = recalls(targets, probabilities, val_loader.dataset.index.classes)
    seconds = figures.seconds + time.perf_counter() - started
    return {"epoch": figures.epoch, **row, "val_loss": val_loss, **val, "seconds": seconds}


def print_epoch(row, epochs, improved):
    print(
        f"epoch {row['epoch']:3d} ({row['epoch'] + 1}/{epochs})"
        f" | train loss {row['train_loss']:.4f} acc {row['train_acc']:.3f}"
        f" | val loss {row['val_loss']:.4f} acc {row['val_acc']:.3f}"
        f" balanced_acc {row['val_balanced_acc']:.3f} macro_f1 {row['val_macro_f1']:.3f}"
        f" | {row['images_per_second']:.0f} images/s, {row['seconds']:.0f} s, waiting for input {row['input_wait']:.1%}"
        f"{' | best so far' if improved else ''}"
    )


def evaluate_parts(engine, parts, args, run_dir, checkpoint):
    """Evaluate the checkpoint's model, which `engine` has, on each part; write predictions and the confusion matrix.

    -> (results, {part: probabilities (N, C)}).
    """
    classes = parts["test"].classes
    results, probabilities = {"best_epoch": checkpoint["best_epoch"]}, {}
    for part, index in parts.items():
        loss, probabilities[part], targets = engine.evaluate(loader_for(index, args, engine.device), part)
        results[part] = {"loss": loss, **full_metrics(targets, probabilities[part], classes)}
        write_predictions(run_dir / f"{part}_predictions.csv", index.paths, targets, probabilities[part], classes)
    results |= {"classes": classes, "samples_per_cls": checkpoint["samples_per_cls"]}
    title = f"test: balanced accuracy {results['test']['balanced_acc']:.3f}"
    report.plot_confusion_matrix(run_dir / "confusion_matrix.png", results["test"]["confusion_matrix"], classes, title)
    return results, probabilities


def print_results(results, epoch, run_dir):
    print(f"model of epoch {epoch}:")
    for part in ("val", "test"):
        if part in results:
            figures = results[part]
            print(
                f"{part:>4}: balanced accuracy {figures['balanced_acc']:.3f}, macro F1 {figures['macro_f1']:.3f}, "
                f"accuracy {figures['acc']:.3f}, loss {figures['loss']:.4f}"
            )
    recalls = ", ".join(f"{name} {figures['recall']:.2f}" for name, figures in results["test"]["per_class"].items())
    print(f"test recall a class: {recalls}")
    print(f"results lie in {run_dir}")


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
    print_class_table(parts, args.beta)
    criterion = make_loss(args, samples_per_cls)

    train_set = make_train_set(args, parts["train"], device)
    engine = build_engine(args, device, criterion, len(classes))
    train_loader = loader_for(train_set, args, device, training=True)
    val_loader = loader_for(parts["val"], args, device)
    steps_per_epoch = math.ceil(len(train_loader) / args.grad_accum)
    add_optimizer(engine, args, steps_per_epoch)
    progress, position = Progress(), None
    if args.auto_resume and checkpoint and Path(args.resume).name == PREVIOUS:
        set_damaged_aside(run_dir)
    if checkpoint:
        progress, position = restore(engine, checkpoint, args, steps_per_epoch, run_dir)
    elif state_dict:
        engine.model.load_initial_weights(*state_dict, classes)
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
                row = train_and_validate(engine, train_loader, val_loader, figures, args, keeper)
                improved = progress.add_epoch(row, args.best_metric)
                print_epoch(row, args.epochs, improved)
                keeper.end_epoch(improved)
                run.log_epoch(row, progress)  # what is logged is saved: no epoch has to be logged twice
            keeper.finish()

        best = load_checkpoint(run_dir / BEST)
        engine.model.load_state_dict(best["model_state_dict"])
        evaluated = {part: parts[part] for part in ("val", "test")}
        results, probabilities = evaluate_parts(engine, evaluated, args, run_dir, best)
        report.plot_curves(run_dir / "curves.png", progress.history, best["epoch"])
        report.write_report(run_dir, vars(args), results)
        run.log_results(progress, results, parts["test"], probabilities["test"], run_dir / BEST)
    # the last file: the run is finished
    write_json(run_dir / "results.json", {**results, "epochs": progress.epoch + 1})
    print_results(results, best["epoch"], run_dir)


def is_finished(args, checkpoint, run_dir):
    """Whether a run has been trained for all its epochs, and tested after them."""
    try:
        results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(results, dict) and results.get("epochs") == checkpoint["epoch"] + 1 >= args.epochs


def make_loss(args, samples_per_cls):
    alpha = args.alpha[0] if args.alpha and len(args.alpha) == 1 else args.alpha
    if isinstance(alpha, list) and len(alpha) != len(samples_per_cls):
        raise UserError(f"--alpha: {len(alpha)} figures for {len(samples_per_cls)} classes; give one, or one a class")
    return build_loss(
        args.train_loss,
        samples_per_cls,
        beta=args.beta,
        gamma=args.gamma,
        alpha=alpha,
        smoothing=args.smoothing,
        cb_form=args.cb_form,
    )


def evaluate_only(args, checkpoint, device, run_dir):
    parts = data_to_evaluate(args, checkpoint)
    engine = build_engine(args, device, make_loss(args, checkpoint["samples_per_cls"]), len(checkpoint["classes"]))
    engine.model.load_state_dict(checkpoint["model_state_dict"])
    write_json(run_dir / "args.json", vars(args))
    write_json(run_dir / "splits.json", paths_of(parts))
    results, _ = evaluate_parts(engine, parts, args, run_dir, checkpoint)
    report.write_report(run_dir, vars(args), results)
    write_json(run_dir / "results.json", results)
    print_results(results, checkpoint["epoch"], run_dir)


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


def run(argv, signals):
    """What the command line asks for. -> exit status."""
    args = None
    try:
        with run_folder(first_look(argv)) as run_dir:
            args, checkpoint = parse_args(argv, run_dir)
            limit_image_size(args.max_megapixels)
            device = choose_device(args.device)
            if args.eval_only:
                evaluate_only(args, checkpoint, device, run_dir)
            elif args.auto_resume and checkpoint and is_finished(args, checkpoint, run_dir):
                print(f"finished before: {args.epochs} epochs, results lie in {run_dir}")
            else:
                train(args, checkpoint, device, run_dir, signals)
    except UserError as error:
        # an error raised in a loader worker arrives with that process's traceback in front of its text
        print(f"error: {str(error).rsplit('UserError: ', 1)[-1].strip()}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"stopped{how_to_go_on(args, argv, signals)}", file=sys.stderr)
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
    with Signals() as signals, redirect_stdout(LossyStream(sys.stdout)), redirect_stderr(LossyStream(sys.stderr)):
        return run(argv, signals)


if __name__ == "__main__":
    keep_freed_memory()
    status = main()
    for late in (signal.SIGINT, signal.SIGTERM):  # all is saved and said: what comes now must not change the status
        signal.signal(late, signal.SIG_IGN)
    with suppress(OSError):  # what no log takes any more is no error of the run's
        sys.stdout.flush()
    sys.exit(status)
