#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Compare finished runs: mean and spread over their seeds and folds."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flags import is_neutral
from run.cli import Parser, PathsAction, UserError, run_command

DESCRIPTION = """Mean and spread over the seeds and folds of runs with the same flags,
best validation balanced accuracy first.

python report.py checkpoints_*
"""


def build_parser() -> Parser:
    parser = Parser("report.py", DESCRIPTION)
    parser.add_argument(
        "run_dirs", nargs="+", action=PathsAction, metavar="RUN", help="folder of a finished run of main.py"
    )
    return parser


def run(argv: Sequence[str]) -> None:
    compare_runs(build_parser().parse_args(argv).run_dirs)


def compare_runs(run_dirs: Sequence[str]) -> None:
    """Print the comparison. Runs that were not evaluated on validation images come last."""
    from study.spread import print_spread, spread_over

    groups = runs_by_flags(run_dirs)
    if not groups:
        raise UserError("none of the folders is a finished run; name folders of finished runs")
    flags_of_groups = [json.loads(key) for key in groups]
    names = dict.fromkeys(name for flags in flags_of_groups for name in flags)
    differing = [name for name in names if len({json.dumps(flags.get(name)) for flags in flags_of_groups}) > 1]
    spreads = []
    for flags, members in zip(flags_of_groups, groups.values(), strict=True):
        title = " ".join(f"--{name} {flags.get(name)}" for name in differing)
        count = "1 run" if len(members) == 1 else f"{len(members)} runs"
        spreads.append((f"{title or members[0]} ({count})", spread_over(members)))
    for title, spread in sorted(spreads, key=lambda item: -item[1].get("val_balanced_acc", {"mean": 0})["mean"]):
        print_spread(title, spread)


def runs_by_flags(run_dirs: Sequence[str]) -> dict[str, list[Path]]:
    """-> {flags as JSON: run folders}, without neutral flags, seed and fold. Prints the folders that it skips."""
    from run.files import read_json

    groups = {}
    for run_dir in dict.fromkeys(Path(run_dir).resolve() for run_dir in run_dirs):
        if not (run_dir / "results.json").exists():
            print(f"skipped: {run_dir} is not a finished run")
            continue
        args = read_json(run_dir / "args.json")
        if not isinstance(args, dict):
            raise UserError(f"{run_dir / 'args.json'} is damaged; restore it or delete the run")
        flags = {name: value for name, value in args.items() if not is_neutral(name) and name not in ("seed", "fold")}
        groups.setdefault(json.dumps(flags, sort_keys=True), []).append(run_dir)
    return groups


def main(argv: list[str] | None = None) -> int:
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
