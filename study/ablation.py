"""The runs of an ablation: planned with the same number of optimizer steps for every method, then trained."""

import argparse
import itertools
import shlex
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from flag_checks import parse_flags
from images.decode import limit_image_size
from images.folders import ImageIndex
from images.splits import make_splits
from images.table_state import table_digest
from run.cli import UserError
from run.files import read_json, read_rows, write_json
from run.signals import Signals
from schedule import build_loss_from_flags, plan_stages
from study.grid import common_flags, with_epochs
from study.process import ProcessPool, TrialProcess, keep_best_model_only
from study.started_with import check_same_settings


@dataclass
class MethodRun:
    """One method trained with one seed."""

    method: str
    seed: int
    flags: list[str]  # of main.py
    folder: Path

    def has_results(self) -> bool:
        return (self.folder / "results.json").exists()

    def minutes(self) -> float:
        """Time of all epochs so far."""
        return sum(float(row["seconds"]) for row in read_rows(self.folder / "history.csv")) / 60


def plan_runs(
    args: argparse.Namespace, main_flags: list[str], grid: Mapping[str, str], ablate_dir: Path
) -> tuple[list[MethodRun], int, str | None]:
    """-> (runs, seed by seed; number of images; `table_digest` of them). Reads the images once, to count the steps.

    args: of ablate.py; main_flags: of main.py, for all runs; grid: {method: its flags}. Raises UserError, naming the
    method, for flags that do not fit the images.
    """
    common = common_flags(main_flags)

    def parse(flags):
        return parse_flags([*common, *flags])

    plain_args = parse(["--epochs", str(args.epochs)])
    limit_image_size(plain_args.max_megapixels)
    splits = make_splits(plain_args)
    index, flags_of = splits["train"], {}
    for method, flags in grid.items():
        try:
            flags_of[method] = with_same_steps(flags, parse, plain_args, index)
        except UserError as error:
            raise UserError(f"{method}: {error}") from error
        num_steps = sum(steps_of(parse(flags_of[method]), index))
        print(f"{method}: {shlex.join(flags_of[method])}, {num_steps} steps")
    runs = []
    for seed, method in itertools.product(args.seeds, grid):
        folder = ablate_dir / f"{slug(method)}_seed{seed}"
        runs.append(MethodRun(method, seed, [*common, *flags_of[method], "--seed", str(seed)], folder))
    if len({run.folder for run in runs}) < len(runs):
        raise UserError("--grid / --seeds: two runs would share a folder; use distinct seeds and method names")
    return runs, sum(map(len, splits.values())), table_digest(splits)


def with_same_steps(
    flags: str, parse: Callable[[list[str]], argparse.Namespace], plain_args: argparse.Namespace, index: ImageIndex
) -> list[str]:
    """Choose the epochs of a method so that its steps come closest to those of `plain_args`, with equal warm-up steps.

    index: the training images. -> the flags of the method
    """
    step_budget = steps_of(plain_args, index)

    def total(epochs):
        try:
            return sum(steps_of(parse(with_epochs(flags, epochs)), index))
        except UserError:  # a share of so few epochs is none or all of them
            return 0

    first_enough = 1 + bisect_left(range(1, 100 * plain_args.epochs), sum(step_budget), key=total)
    candidates = max(1, first_enough - 1), first_enough
    epochs = min(candidates, key=lambda epochs: abs(total(epochs) - sum(step_budget)))
    chosen = with_epochs(flags, epochs)
    warmup = plain_args.warmup_epochs * step_budget[0] / steps_of(parse(chosen), index)[0]
    return ["--warmup_epochs", f"{warmup:.4g}", *chosen]  # first, so that a method may set its own


def steps_of(args: argparse.Namespace, index: ImageIndex) -> list[int]:
    """-> number of optimizer steps in each epoch of a training on `index` with main.py's flags `args`."""
    stages = plan_stages(args, index, build_loss_from_flags(args, index.counts()), torch.device("cpu"))
    return [stage.steps(args.grad_accum) for stage in stages for _ in range(stage.start, stage.end)]


def slug(name: str) -> str:
    """A method's name as part of a folder's name."""
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower())


def check_and_record_runs(path: Path, runs: list[MethodRun], num_images: int, table: str | None = None) -> None:
    """Raise UserError if the runs in the folder of `path` were started with other flags or images, else note theirs.

    table: `table_digest` of the images.
    """

    def settings(num_images, flags, table):
        flags = {f"flags of {name}": shlex.join(flags[name]) for name in flags}
        return {"number of images": num_images, "table": table} | flags

    flags = {run.folder.name: run.flags for run in runs}
    previous = read_json(path) if path.exists() else {"images": num_images, "table": table, "flags": {}}
    try:
        previous_settings = settings(previous["images"], previous["flags"], previous.get("table", table))
    except (KeyError, TypeError) as error:
        raise UserError(f"--ablate_dir: {path} is damaged; choose another --ablate_dir") from error
    check_same_settings(
        previous_settings, settings(num_images, flags, table), "--ablate_dir", f"the ablation in {path.parent}"
    )
    write_json(path, {"images": num_images, "table": table, "flags": {**previous["flags"], **flags}})


def train_runs(runs: list[MethodRun], jobs: int, signals: Signals) -> None:
    """Train the runs that have no results yet, `jobs` at once; those that have a checkpoint are resumed.

    Raises Stopped after a signal, once all runs have saved, and UserError if runs failed, after all others.
    """
    pool, errors = ProcessPool(jobs), []
    waiting = [run for run in runs if not run.has_results()]
    training: dict[TrialProcess, MethodRun] = {}

    def poll():
        for process in [process for process in training if process.status is not None]:
            pool.release(process)
            run = training.pop(process)
            if process.status == 0:
                keep_best_model_only(run.folder)
                print(f"{run.method}, seed {run.seed}: done, {run.minutes():.1f} min")
            elif not process.was_stopped:
                errors.append(f"{run.method}, seed {run.seed}: {process.error()}")
                print(errors[-1])
        if pool.is_stopping:
            waiting.clear()
        while pool.num_free() and (run := next((run for run in waiting if not pool.stop_left_over(run.folder)), None)):
            waiting.remove(run)
            training[pool.start(run.flags, run.folder)] = run
        return bool(waiting or training)

    pool.supervise(poll, signals)
    if errors:
        raise UserError(f"{len(errors)} runs failed; {errors[-1]}")
