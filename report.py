#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Compare runs: mean and spread over their seeds and folds, and pages with curves and paired differences."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from run.cli import Parser, PathsAction, UserError, end_process, run_command

if TYPE_CHECKING:
    from study.run_records import RunRecord

DESCRIPTION = """Mean and spread over the seeds and folds of runs with the same flags,
best validation balanced accuracy first, and a page to look at:

several runs          comparison.html: curves, metrics, differing flags, paired differences
one run               its report.html, written again from its files, finished or not
a cross-validation    its report.html and label_issues.csv, the images whose labels are doubtful

python report.py checkpoints_*
"""


def build_parser() -> Parser:
    parser = Parser("report.py", DESCRIPTION)
    parser.add_argument(
        "run_dirs",
        nargs="+",
        action=PathsAction,
        metavar="RUN",
        help="folder of a run of main.py or of a cross-validation",
    )
    parser.add_argument(
        "--output", default="comparison.html", metavar="FILE", help="page of several runs [comparison.html]"
    )
    return parser


def run(argv: Sequence[str]) -> None:
    args = build_parser().parse_args(argv)
    from study.run_records import is_cross_validation, read_records

    folders = list(dict.fromkeys(Path(folder).resolve() for folder in args.run_dirs))
    records = read_records(folders)
    if not records:
        raise UserError("none of the folders holds a run with a finished epoch; name folders of runs of main.py")
    cross_validations = [folder for folder in folders if is_cross_validation(folder)]
    compares_several = len(records) > 1 and folders != cross_validations[:1]
    if compares_several:
        from study.comparison_page import check_own_page

        check_own_page(args.output)
    print_comparison(records)
    incomplete = []
    for folder in cross_validations:
        from study.cross_validation_page import write_cross_validation

        if not write_cross_validation(folder):
            incomplete.append(folder)
    if compares_several:
        from study.comparison_page import write_comparison_page

        write_comparison_page(args.output, records)
        print(f"comparison saved to {args.output}")
    elif not cross_validations:
        from study.run_page import rewrite_report

        if not rewrite_report(records[0]):
            incomplete.append(records[0].folder)
    if incomplete:
        raise UserError(f"{incomplete[0]}: a file was not written; the warning above says why")


def print_comparison(records: Sequence["RunRecord"]) -> None:
    """Print mean and spread of each group, then the runs that are not finished.

    Runs that were not evaluated on validation images come last.
    """
    from study.run_records import group_records
    from study.spread import print_spread, spread_over

    for group in group_records([record for record in records if record.results]):
        print_spread(f"{group.title} ({group.count()})", spread_over([run.folder for run in group.runs]))
    for record in records:
        if not record.results:
            best = record.val_balanced_acc()
            about = "" if best is None else f", best validation balanced accuracy {best:.3f}"
            print(f"not finished: {record.folder}: {record.epochs_done()} epochs{about}")


def main(argv: list[str] | None = None) -> int:
    """-> exit status, see `run_command`."""
    return run_command(run, argv)


if __name__ == "__main__":
    end_process(main())
