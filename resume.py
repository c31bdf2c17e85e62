"""Which checkpoint a run continues from, which flags it inherits, and how everything is restored."""

import argparse
import copy
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_flags import LABEL_FLAGS
from engine import Engine
from flag_checks import check_inherited, parse_flags
from flag_queries import data_folders, replaced_splits
from flags import NOT_INHERITED, SPLITS, complete_flags
from images.cache import open_cache, read_all
from images.decode import DECODER_VERSION, warn_of_other_decoder
from images.folders import ImageIndex, file_stat
from images.splits import check_folders_used, find_images, paths_by_split
from images.table_state import table_state
from model import checkpoint_bytes, load_checkpoint, save_checkpoint, weights_do_not_fit
from run.cli import Damaged, UserError
from run.folder import is_inside, locked, new_folder, open_or_create_folder, timestamped
from run.machine import name_hardware_errors, random_state, restore_random_state
from run.progress import Progress
from run.ranks import from_first, is_first
from run.saver import BEST, DAMAGED, LAST, PREVIOUS
from run.surroundings import command_line, start_of_command
from schedule import Stage, last_stage_start, steps_before

# flags that name a folder to write to: a checkpoint from elsewhere must not choose one
WRITTEN_TO = ("cache_dir", "wandb_dir")
# flags that cannot change any more: the images are split, the weights initialized, the optimizer has its state, the
# best epoch was selected; the flags of the recipe are those of the checkpoint
FIXED_ON_RESUME = ("split", "folds", "fold", "pretrained", "weights", "zero_init", "optimizer", "recipe")
# those of the labels may be of another test set
FIXED_IN_TRAINING = ("best_metric", "group_regex", *LABEL_FLAGS)
# flags that set the order of the images within an epoch
ORDER_FLAGS = ("seed", "use_augmentation", "target_samples_per_class", "sampling", "drw_epoch", "crt_epochs", "ema")


# -------------------------------------------------------------------------------------- the folder and the checkpoint


@contextmanager
def open_run(args: argparse.Namespace, argv: Sequence[str]) -> Iterator[tuple[argparse.Namespace, dict | None]]:
    """Lock the folder of a run and read its checkpoint. -> (all flags of the run, its checkpoint or None)

    args: flags as given, by `parse_flags(argv)`. Raises UserError.
    """
    path, checkpoint = args.resume, None
    if path:  # read before its folder is locked: what is not a checkpoint gets no lock file beside it
        stat_when_read, checkpoint = file_stat(path), load_checkpoint(path)
    with run_folder(args) as run_dir:
        if args.auto_resume:
            path, checkpoint = find_checkpoint(run_dir) or (None, None)
        elif path and file_stat(path) != stat_when_read:  # another process has saved in between
            checkpoint = load_checkpoint(path)
        if checkpoint:
            inherited = inherited_flags(checkpoint, path, args, run_dir)
            was_auto, args = args.batch_size == "auto", parse_flags(argv, inherited, checkpoint_is_known=True)
            if was_auto:
                print(f"--batch_size auto: {args.batch_size} images, as in the checkpoint")
        elif args.auto_resume:
            args = parse_flags(argv, checkpoint_is_known=True)
        args.resume, args.run_dir = path and str(path), str(run_dir)
        if checkpoint:
            check_resumed_flags(args, checkpoint)
            warn_of_other_decoder(args.resume, checkpoint["decoder_version"])
        yield args, checkpoint


def run_folder(args: argparse.Namespace) -> AbstractContextManager[Path]:
    """-> context of the folder to write to, locked: that of the checkpoint if a training is resumed, else a new one."""
    if args.auto_resume:
        return open_or_create_folder(args.run_dir, "--run_dir")
    beside = Path(args.resume or "").absolute().parent
    if args.resume and not args.eval_only:
        return locked(beside)
    if args.run_dir:
        return new_folder(args.run_dir, "--run_dir")
    if args.eval_only:
        return new_folder(timestamped(beside / "eval"), "--run_dir", numbered=True)
    return new_folder(timestamped(args.output_dir), "--output_dir", numbered=True)


def find_checkpoint(run_dir: str | Path) -> tuple[Path, dict] | None:
    """-> (path, checkpoint) of the last one in a run folder, of the previous one if that is damaged, None without any.

    Raises UserError if none of them can be read.
    """
    errors = []
    for path in (Path(run_dir, LAST), Path(run_dir, PREVIOUS)):
        if not path.exists():
            continue
        try:
            checkpoint = load_checkpoint(path, "--auto_resume")
        except Damaged as error:
            errors.append(str(error))
            continue
        if errors:
            print(f"warning: {errors[0]}; it is kept as {DAMAGED}, resuming from {path.name}", file=sys.stderr)
        return path, checkpoint
    if errors:
        raise UserError(f"{'; '.join(errors)}; to start over, move {run_dir} away")
    if Path(run_dir, BEST).exists():
        raise UserError(f"--auto_resume: {run_dir} has no {LAST}; resume with --resume {Path(run_dir, BEST)}")
    return None


def set_damaged_aside(run_dir: str | Path) -> None:
    """Rename a damaged last checkpoint: the next save would keep it in the place of the previous one."""
    with suppress(FileNotFoundError):
        os.replace(Path(run_dir, LAST), Path(run_dir, DAMAGED))


# -------------------------------------------------------------------------------------------------------- the flags


def inherited_flags(
    checkpoint: dict, path: str | Path, args: argparse.Namespace, run_dir: str | Path
) -> dict[str, Any]:
    """-> {flag: value} of a checkpoint that are the defaults of a run resumed from it. Raises UserError.

    path: of the checkpoint; args: flags as given.
    """
    known = vars(args).keys() - set(NOT_INHERITED)
    if "WANDB_MODE" in os.environ:
        known.discard("wandb_mode")
    inherited = {name: value for name, value in checkpoint["args"].items() if name in known}
    check_inherited(inherited, path)
    for name in WRITTEN_TO:
        if inherited.get(name) and not is_inside(inherited[name], run_dir):
            outside = inherited.pop(name)
            if not getattr(args, name):
                print(f"--{name}: {outside} of the checkpoint is not used; give the flag again to use it")
    return inherited


def check_resumed_flags(args: argparse.Namespace, checkpoint: dict) -> None:
    """Raise UserError for flags that cannot change when a run is resumed."""
    if (args.train_loss == "ldam") != (checkpoint["args"].get("train_loss") == "ldam"):
        raise UserError("--train_loss: ldam has its own head; a trained model cannot change to or from it")
    fixed = FIXED_ON_RESUME if args.eval_only else FIXED_ON_RESUME + FIXED_IN_TRAINING
    if not replaced_splits(args, checkpoint["args"]):
        fixed += ("group_regex",)
    trained = complete_flags(checkpoint["args"])
    for name in fixed:
        if getattr(args, name) != trained[name]:
            raise UserError(f"--{name}: cannot change in a resumed run; omit this flag or start a new run")


def how_to_resume(args: argparse.Namespace, argv: Sequence[str], was_saved: bool) -> str:
    """What to print after "stopped". args: all flags of the run."""
    if args.eval_only:
        return ""
    if args.auto_resume:
        return "; resume with the same command"
    if not was_saved:
        same_command = command_line([*start_of_command(), *argv])
        return f"; resume with: {same_command}" if args.resume else "; nothing was saved yet"
    outside = [name for name in WRITTEN_TO if getattr(args, name) and not is_inside(getattr(args, name), args.run_dir)]
    flags = [word for name in outside for word in (f"--{name}", getattr(args, name))]
    return f"; resume with: {command_line([*start_of_command(), '--resume', str(Path(args.run_dir, LAST)), *flags])}"


# -------------------------------------------------------------------------------------------------------- the state


def snapshot(
    engine: Engine,
    progress: Progress,
    args: argparse.Namespace,
    splits: dict[str, ImageIndex],
    samples_per_cls: np.ndarray,
    wandb_id: str | None,
    epoch_state: dict | None,
) -> tuple[list[dict], Callable[[], bytes]]:
    """-> (history, function that returns the checkpoint file) of a run as it is now.

    What changes in the training is copied to the memory of the CPU; the function may be called later, in any thread.
    epoch_state: of the epoch after `progress.epoch`, by `RunningMetrics.epoch_state`; None between two epochs. Raises
    UserError if the training has diverged: the previous checkpoint is the better one.
    """
    engine.check_weights()
    checkpoint = {
        "epoch": progress.epoch,
        "position": epoch_state,
        "model_state_dict": copied_to_cpu(engine.evaluated.state_dict()),
        "raw_state_dict": copied_to_cpu(engine.model.state_dict()) if engine.average else {},
        "averaged_steps": engine.average.steps if engine.average else 0,
        "optimizer_state_dict": copied_to_cpu(engine.optimizer.state_dict()),
        "scheduler_state_dict": copied_to_cpu(engine.scheduler.state_dict()),
        "scaler_state_dict": copied_to_cpu(engine.scaler.state_dict()),
        "posthoc": None,
        "posthoc_macro_f1": None,
        "val_outputs": None,
        "best_metric": progress.best_metric,
        "best_metric_name": args.best_metric,
        "best_epoch": progress.best_epoch,
        "history": copied_to_cpu(progress.history),
        "classes": splits["train"].classes,
        "samples_per_cls": samples_per_cls.tolist(),
        "args": copied_to_cpu(vars(args)),
        "wandb_id": wandb_id,
        "splits": {},  # by the function, as the table: they never change, and a million paths take a while
        "file_sizes": {split: torch.from_numpy(index.sizes) for split, index in splits.items()},
        "rng_state": random_state(engine.device),
        "decoder_version": DECODER_VERSION,
        "table": None,
    }
    return checkpoint["history"], lambda: checkpoint_bytes(
        checkpoint | {"splits": paths_by_split(splits), "table": table_state(splits)}
    )


def copied_to_cpu(state: Any) -> Any:
    """-> a copy of dicts, lists and tuples with all tensors in them, which are in the memory of the CPU; a file of the
    copy has the bytes of a file of `state` on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)  # with its strides
    if isinstance(state, dict):
        copied = copy.copy(state)  # a state dict is of another class, and has an attribute: the versions of its modules
        copied.update((key, copied_to_cpu(value)) for key, value in state.items())
        return copied
    if isinstance(state, (list, tuple)):
        return type(state)(map(copied_to_cpu, state))
    return state


def restore_splits(args: argparse.Namespace, checkpoint: dict) -> dict[str, ImageIndex]:
    """-> the splits of the checkpoint, as they were. Raises UserError if an image is missing or has changed."""
    splits, num_unused = find_images(checkpoint, SPLITS, vars(args))
    check_folders_used(splits, data_folders(vars(args)))
    if num_unused:
        print(f"left out {num_unused} images that are in no split of the checkpoint")
    return read_all(splits, open_cache(args), skip_broken=False)  # without one of its images it is another split


def restore(
    engine: Engine, checkpoint: dict, args: argparse.Namespace, stages: list[Stage]
) -> tuple[Progress, dict | None]:
    """Restore model, optimizer, schedule, scaler and random state. -> (progress, state of the epoch after it)

    Flags that are given again win over those of the checkpoint.
    """
    if is_first() and args.auto_resume and Path(args.resume).name == PREVIOUS:
        set_damaged_aside(args.run_dir)
    epoch_state, trained_flags = checkpoint["position"], checkpoint["args"]
    names = (*ORDER_FLAGS, "epochs") if args.sampling == "progressive" or args.crt_epochs else ORDER_FLAGS
    if epoch_state and any(getattr(args, name) != trained_flags.get(name, getattr(args, name)) for name in names):
        print(f"epoch {checkpoint['epoch'] + 1} restarts from its first image: changed flags change their order")
        epoch_state = None
    try:
        with name_hardware_errors():
            engine.evaluated.load_state_dict(checkpoint["model_state_dict"])
            if engine.average:
                engine.model.load_state_dict(checkpoint["raw_state_dict"] or checkpoint["model_state_dict"])
                # at least one: a run without --ema that is resumed with it starts the average from its weights
                engine.average.steps = max(1, checkpoint["averaged_steps"])
            engine.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
            engine.scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
            if checkpoint["scaler_state_dict"]:  # empty unless it was trained in float16
                engine.scaler.load_state_dict(checkpoint["scaler_state_dict"])
            restore_random_state(checkpoint["rng_state"], engine.device)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise weights_do_not_fit(args.resume, error) from error
    where = f", after {epoch_state['images']} of its images" if epoch_state else ""
    if checkpoint["epoch"] + 1 < args.epochs:
        print(f"resuming with epoch {checkpoint['epoch'] + 1}{where}")
    else:
        print(f"all {args.epochs} epochs are trained: testing the best model; raise --epochs to train longer")
    steps = math.ceil(epoch_state["images"] / (args.batch_size * args.grad_accum)) if epoch_state else 0
    engine.scheduler.last_epoch = steps_before(checkpoint["epoch"] + 1, stages, args.grad_accum) + steps  # in steps
    engine.scheduler.base_lrs = [args.learning_rate] * len(engine.scheduler.base_lrs)
    for group, factor in zip(engine.optimizer.param_groups, engine.scheduler.lr_lambdas, strict=True):
        group["weight_decay"] = args.weight_decay
        group["lr"] = args.learning_rate * factor(engine.scheduler.last_epoch)
    reconcile = functools.partial(reconcile_best_model, checkpoint, args.resume, args.run_dir)
    best_metric, best_epoch = from_first(reconcile, "reads the best model")
    return Progress(checkpoint["epoch"], best_metric, best_epoch, checkpoint["history"]), epoch_state


def reconcile_best_model(checkpoint: dict, path: str | Path, run_dir: str | Path) -> tuple[float, int]:
    """-> (metric, epoch) of the best model so far; best_model.pth agrees with them afterwards.

    A crash can leave that file one epoch behind the checkpoint at `path`, which then replaces it; or ahead of it, if
    the run is resumed from an older checkpoint: the file then stays, as those epochs will come again. Raises UserError
    if the file is damaged or belongs to another run.
    """
    so_far, best_path = (checkpoint["best_metric"], checkpoint["best_epoch"]), Path(run_dir, BEST)
    is_best_itself = checkpoint["position"] is None and checkpoint["epoch"] == checkpoint["best_epoch"]
    best, damage = None, None
    if best_path.exists():
        try:
            best = checkpoint if os.path.samefile(path, best_path) else load_checkpoint(best_path)
        except Damaged as error:
            damage = error
    if best and best["classes"] == checkpoint["classes"]:
        found = best["best_metric"], best["best_epoch"]
        same_past = best["history"][: len(checkpoint["history"])] == checkpoint["history"]
        if found == so_far or (best["epoch"] > checkpoint["best_epoch"] and same_past):
            return found
    if is_best_itself:
        save_checkpoint(best_path, checkpoint)
        return so_far
    if damage:
        raise UserError(f"{damage}; restore it, or delete it to keep the best of the epochs to come")
    if best:
        raise UserError(
            f"--resume: {best_path} is not the best model of {path} (of epoch {best['epoch']}, not "
            f"{checkpoint['best_epoch']}); copy the matching best_model.pth into the folder"
        )
    if checkpoint["best_epoch"] >= 0:
        print(f"warning: {best_path} does not exist; the best of the epochs to come is kept", file=sys.stderr)
    return -math.inf, -1


def is_finished(args: argparse.Namespace, checkpoint: dict) -> bool:
    """Whether a run has been trained for all its epochs, or until `--patience` ended it, and tested afterwards."""
    try:
        results = json.loads(Path(args.run_dir, "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(results, dict) or results.get("epochs") != checkpoint["epoch"] + 1:
        return False
    progress = Progress(checkpoint["epoch"], checkpoint["best_metric"], checkpoint["best_epoch"])
    return results["epochs"] >= args.epochs or progress.has_stalled(args.patience, last_stage_start(args))
