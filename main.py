#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Train a ResNet-50 to grade skin conditions from very imbalanced class folders: the experiment from top to bottom.

`train` is the experiment. The flags are in flags.py; python main.py --help lists them.
"""

import argparse
import copy
import functools
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flag_checks import parse_flags, trains_all_folds
from flag_queries import is_ordinal
from run.cli import UserError, attempt, end_process, run_command
from run.folder import FOLDS_FILE
from run.ranks import check_restart, hand_out, num_ranks, num_ranks_here, run_together
from run.signals import Signals, Stopped
from run.workers import end_workers

if TYPE_CHECKING:
    import torch

    from engine import Engine, Outputs, RunningMetrics
    from run.saver import Saver
    from schedule import Stage

# Everything that needs torch is imported where it is used: --help and a mistake in the flags are answered at once.


def train(args: argparse.Namespace, checkpoint: dict | None, device: "torch.device", signals: Signals) -> None:
    """Train, validate and test one model. checkpoint: of the run that is resumed, or None."""
    import torch

    from batch_search import resolve_batch_size
    from dataset_double import eval_loader
    from engine import RunningMetrics, build_engine
    from evaluation import evaluate_best, print_results
    from images.demo import use_demo_data
    from images.labels import check_columns
    from images.leakage import warn_of_near_duplicates
    from images.splits import make_splits, on_all_ranks, paths_by_split, print_class_table
    from model import initial_weights
    from pages import write_report
    from plots import plot_curves
    from resume import restore, restore_splits, snapshot
    from run.environment import write_environment
    from run.files import write_history, write_json
    from run.log import start_log
    from run.progress import Progress, print_epoch
    from run.ranks import from_first, gather, is_first
    from run.saver import BEST, Saver
    from schedule import (
        build_loss_from_flags,
        build_optimizer,
        plan_stages,
        print_early_end,
        print_stages,
        warn_of_early_best,
    )
    from tracking import WandbRun

    run_dir = Path(args.run_dir)
    # before the data, so that a missing file of weights is reported at once
    weights = None if checkpoint else from_first(lambda: initial_weights(args), "reads the weights")

    # data: index the images, check and cache them, split
    if args.demo and is_first():
        use_demo_data(args)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    read = functools.partial(restore_splits, args, checkpoint) if checkpoint else functools.partial(make_splits, args)
    splits = on_all_ranks(read, args)
    classes, samples_per_cls = splits["train"].classes, splits["train"].counts()
    print_class_table(splits, args)
    check_columns(args.subgroup_columns, splits["test"])
    if is_ordinal(args):
        print(f"order of the grades: {' < '.join(classes)}")

    # loss: from the counts of the original training images, before any oversampling
    criterion = build_loss_from_flags(args, samples_per_cls)
    resolve_batch_size(args, device, criterion, samples_per_cls)

    # schedule: only now are the training images oversampled
    stages = plan_stages(args, splits["train"], criterion, device)
    print_stages(stages, len(splits["train"]), args)
    val_loader = eval_loader(splits["val"], args, device)

    # model: built, and restored when resuming
    engine = build_engine(args, device, criterion, len(classes))
    engine.optimizer, engine.scheduler = build_optimizer(engine.model, args, stages)
    progress, epoch_state, best_outputs = Progress(), None, {}
    if checkpoint:
        progress, epoch_state = restore(engine, checkpoint, args, stages)
    elif weights:
        engine.load_initial_weights(*weights, classes)

    def begin_run_folder():
        start_log(run_dir)
        write_environment(run_dir, device, progress.hours_trained())
        write_json(run_dir / "args.json", vars(args))
        write_json(run_dir / "splits.json", paths_by_split(splits))
        write_history(run_dir / "history.csv", progress.history)
        if not checkpoint:
            warn_of_near_duplicates(splits, run_dir)

    from_first(begin_run_folder, "looks for near-duplicates")
    precision = str(engine.amp_dtype or torch.float32).removeprefix("torch.")
    print(f"training on {engine.device} in {precision}, run folder {run_dir}")

    with WandbRun(args, run_dir, checkpoint, dict(zip(classes, samples_per_cls.tolist(), strict=True))) as wandb_run:
        # loop: train and validate an epoch, save, log
        take_snapshot = functools.partial(snapshot, engine, progress, args, splits, samples_per_cls, wandb_run.id)
        saver = Saver(run_dir, take_snapshot, signals, args.save_every, args.save_minutes)
        wandb_run.catch_up(progress)
        with signals.deferred(), saver:
            for epoch in range(progress.epoch + 1, args.epochs):
                if progress.has_stalled(args.patience, stages[-1].start):
                    print_early_end(args, engine.scheduler)
                    break
                running_metrics = RunningMetrics(epoch, device, epoch_state)
                epoch_state = None  # only the first epoch of a resumed run starts in its middle
                stage = next(stage for stage in stages if epoch < stage.end)
                row, outputs = train_and_validate(engine, stage, val_loader, running_metrics, args, saver)
                row = gather(row)[0]  # all ranks decide alike
                improved = progress.add_epoch(row, args.best_metric)
                if improved:  # only the loss of the main stage is reported
                    best_outputs = {"val": outputs} if stage.criterion is criterion else {}
                print_epoch(row, args.epochs, improved, progress.seconds_left(args.epochs))
                saver.after_epoch(
                    improved,
                    functools.partial(write_environment, run_dir, device, progress.hours_trained()),
                    # what is logged is saved: no epoch is logged twice
                    functools.partial(wandb_run.log_epoch, row, copy.copy(progress)),
                )
            saver.finish()
        end_workers()

        # best model: test it, write plots, results and the report
        engine.criterion = criterion
        results, probabilities = evaluate_best(engine, splits, args, best_outputs)
        if not is_first():
            return
        write_json(run_dir / "results.json", {**results, "epochs": progress.epoch + 1})  # the run is finished
        wandb_run.log_results(progress, results, splits["test"], probabilities["test"], run_dir / BEST)
        curves = run_dir / "curves.png", progress.history, results["best_epoch"], [stage.start for stage in stages[1:]]
        attempt(lambda: plot_curves(*curves), "no curves.png")
        warn_of_early_best(results["best_epoch"], stages)
        print_results(results, run_dir)
        write_report(run_dir, splits, probabilities, engine.evaluated)


def train_and_validate(
    engine: "Engine",
    stage: "Stage",
    val_loader: "torch.utils.data.DataLoader",
    running_metrics: "RunningMetrics",
    args: argparse.Namespace,
    saver: "Saver",
) -> tuple[dict, "Outputs"]:
    """One epoch, or the rest of it. -> (its row of `history.csv`, outputs of the validation)"""
    from dataset_double import AugmentedSkinDataset, forks_workers
    from metrics import recalls, summary_metrics
    from schedule import progressive_size

    epoch = running_metrics.epoch
    stage.loader.batch_sampler.sampler.set_epoch(epoch, skipped=running_metrics.images)
    if isinstance(stage.loader.dataset, AugmentedSkinDataset):
        stage.loader.dataset.set_epoch(epoch)
    engine.criterion = stage.criterion
    if stage.head_only:
        engine.retrain_head(reset=epoch == stage.start and not running_metrics.images)
    image_size = progressive_size(epoch, args.epochs, args.image_size) if args.progressive else None
    after_step = functools.partial(saver.after_step, running_metrics)
    if forks_workers(stage.loader):
        saver.wait()  # new workers would keep what is in memory, and a file that is open, until they end
    row = engine.train_one_epoch(stage.loader, running_metrics, image_size, after_step)

    started = time.perf_counter()
    if forks_workers(val_loader):
        saver.wait()
    outputs = engine.evaluate(val_loader, f"validation (epoch {epoch})", after_step)
    val_loss, probabilities, targets = outputs
    val = {f"val_{name}": value for name, value in summary_metrics(targets, probabilities).items()}
    val["val_recall"] = recalls(targets, probabilities, val_loader.dataset.index.classes)
    seconds = running_metrics.seconds + time.perf_counter() - started
    return {"epoch": epoch, **row, "val_loss": val_loss, **val, "seconds": seconds}, outputs


def run(argv: list[str], signals: Signals, resume_hint: str | None = None) -> int:
    """Do what the command line asks for. -> exit status

    resume_hint: what to print after "stopped"; None for the command that resumes this run.
    """
    run_args = None  # all flags of the run, once its checkpoint is read
    try:
        args = parse_flags(argv)
        check_restart(args.auto_resume)
        with signals.deferred():  # torch aborts the process if a signal raises while it is imported
            from data_report import check_data
            from resume import how_to_resume, is_finished, open_run

        if trains_all_folds(args):
            from study.folds import run_folds

            return run_folds(args, argv, functools.partial(run, signals=signals))
        if args.run_dir and Path(args.run_dir, FOLDS_FILE).exists():
            raise UserError(
                f"--run_dir: {args.run_dir} is the folder of a cross-validation; resume it with its --folds"
            )
        with open_run(args, argv) as (run_args, checkpoint):
            if run_args.check_data:
                check_data(run_args)
            elif run_args.auto_resume and checkpoint and is_finished(run_args, checkpoint):
                print(f"already finished: {checkpoint['epoch'] + 1} epochs, results saved to {run_args.run_dir}")
            else:
                hand_out((run_args, checkpoint))
                run_rank((run_args, checkpoint), signals)
    except Stopped as stop:
        if resume_hint is None:
            resume_hint = how_to_resume(run_args, argv, signals.saved) if run_args else ""
        print(f"stopped{resume_hint}", file=sys.stderr)
        if "WANDB_SWEEP_ID" in os.environ:
            # wandb agent gives up after some exit statuses other than 0; an exit by signal does not count
            signal.signal(stop.number, signal.SIG_DFL)
            signal.raise_signal(stop.number)
        return stop.status
    return 0


def run_rank(job: tuple[argparse.Namespace, dict | None], signals: Signals) -> None:
    """What each rank does. job: all flags of the run, and the checkpoint from which it continues."""
    args, checkpoint = job
    with signals.deferred():
        import evaluation

    device = prepare_process(args)
    try:
        if args.eval_only:
            evaluation.evaluate_only(args, checkpoint, device)
        else:
            train(args, checkpoint, device, signals)
    finally:
        end_workers()


def prepare_process(args: argparse.Namespace) -> "torch.device":
    """Settings of this process. -> its device"""
    import torch

    from images.decode import limit_image_size
    from run.cores import num_cores
    from run.machine import choose_device, keep_freed_memory

    if __name__ == "__main__":
        keep_freed_memory()
    torch.set_num_threads(min(torch.get_num_threads(), num_cores()))  # a container may have fewer than the machine
    if num_ranks() > 1:  # torchrun gives each one thread
        torch.set_num_threads(max(torch.get_num_threads(), num_cores() // num_ranks_here()))
    limit_image_size(args.max_megapixels)
    return choose_device(args.device)


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0 done, 2 a mistake of the user, 130 / 143 / 129 stopped by Ctrl-C / SIGTERM / SIGHUP"""

    def run_together_on(argv):
        return run_together(lambda: run(argv, signals), functools.partial(run_rank, signals=signals))

    with Signals() as signals:
        return run_command(run_together_on, argv, in_several_processes=True)


if __name__ == "__main__":
    end_process(main())
