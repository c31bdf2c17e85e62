"""Cross-validation: each fold as a run of its own, then mean and spread over them and all test images together."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from evaluation import print_metrics
from flag_checks import parse_flags
from flag_queries import is_neutral, is_ordinal
from flags import complete_flags
from images.splits import index_data
from images.table_state import table_digest
from resume import run_folder
from run.cli import UserError
from run.files import read_json, write_json
from run.folder import FOLDS_FILE, FOLDS_RESULTS
from run.log import log_scope, start_log
from run.signals import Stopped
from run.surroundings import command_line, start_of_command
from study.cross_validation_page import write_cross_validation
from study.out_of_fold import pooled_metrics, read_folds
from study.spread import print_spread, spread_over
from study.started_with import check_same_settings


def run_folds(args: argparse.Namespace, argv: Sequence[str], run_fold: Callable[..., int]) -> int:
    """Train every fold in one folder, then summarize them. -> exit status

    args: by `parse_flags(argv)`. run_fold: called with a command line and `resume_hint`, -> exit status of the run.
    """
    with run_folder(args) as folder:
        if list(folder.glob("*.pth")):
            raise UserError(f"--folds: {folder} is the folder of a single run; name another --run_dir")
        run_args = parse_flags([*argv, "--fold", "0"], checkpoint_is_known=True)
        run_args.run_dir = str(folder)
        command = command_line([*start_of_command(), *argv, "--run_dir", str(folder), "--auto_resume"])
        resume_hint = "; resume with the same command" if args.auto_resume else f"; resume with: {command}"
        run_dirs = [folder / f"fold_{fold}" for fold in range(args.folds)]
        check_and_record_folds(folder / FOLDS_FILE, run_args)
        start_log(folder)
        try:
            for fold, run_dir in enumerate(run_dirs):
                print(f"fold {fold} of {args.folds}")
                name = f"{args.wandb_name or folder.name}_fold_{fold}"
                fold_flags = ["--fold", str(fold), "--run_dir", str(run_dir), "--wandb_name", name, "--auto_resume"]
                if run_args.batch_size == "auto" and fold:  # all folds are trained alike
                    found = read_json(run_dirs[0] / "args.json")
                    for flag in ("batch_size", "learning_rate"):
                        fold_flags += [f"--{flag}", str(found[flag])]
                with log_scope():
                    status = run_fold([*argv, *fold_flags], resume_hint=resume_hint)
                if status:
                    return status
            spread, images = spread_over(run_dirs), read_folds(run_dirs)
            samples_per_cls = read_json(run_dirs[0] / "results.json")["samples_per_cls"]
            pooled = pooled_metrics(images, samples_per_cls, run_args.group_regex, is_ordinal(run_args))
            write_json(folder / FOLDS_RESULTS, {**spread, "test_pooled": pooled})
            print_spread(f"mean and standard deviation of {args.folds} folds", spread)
            print_metrics("test images of all folds together", pooled)
            print(f"results saved to {folder}")
            write_cross_validation(folder)
        except Stopped as stop:
            print(f"stopped{resume_hint}", file=sys.stderr)
            return stop.status
    return 0


def check_and_record_folds(path: Path, args: argparse.Namespace) -> None:
    """Raise UserError if the folds were started with other flags or images; `path` keeps those of the first time."""
    index = None if args.demo else index_data(args)
    images = index and dict(zip(index.classes, index.counts().tolist(), strict=True))
    current = {"flags": vars(args), "images": images, "table": index and table_digest({"all": index})}
    previous = read_json(path) if path.exists() else current
    compared = {name: value for name, value in vars(args).items() if not is_neutral(name)}
    previous_images = {name: previous[name] for name in ("images", "table") if name in previous}
    check_same_settings(
        {**complete_flags(previous["flags"]), **previous_images},
        {**compared, "images": images, "table": current["table"]},
        "--run_dir",
        f"the cross-validation in {path.parent}",
    )
    write_json(path, previous)
