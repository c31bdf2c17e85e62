#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Crop the facial areas of AI-Hub 71645, "Korean skin condition measurement", and tabulate their labels."""

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from run.cli import Parser, PathsAction, UserError, end_process, number, run_command

if TYPE_CHECKING:
    from images.aihub import Found, Target
    from images.archives import Archives

DESCRIPTION = """Crop the facial areas of AI-Hub 71645, "Korean skin condition measurement", as downloaded:
download.tar, or a folder with TS.zip and TL.zip, also in pieces. Nothing is unpacked.

python prepare_aihub.py DOWNLOADED --list
python prepare_aihub.py DOWNLOADED --target forehead_wrinkle --output forehead
python main.py --data_dirs forehead/images --labels forehead/labels.csv --label_column forehead_wrinkle \\
    --recipe strong --rotation 15
"""
MAX_MEGAPIXELS = 200  # of a photograph, as in main.py
TRAIN_FLAGS = "--recipe strong --rotation 15"  # a face has an upright


def bins(text: str) -> tuple[float, ...]:
    """An argparse type: ascending numbers with commas."""
    limits = tuple(number(float)(word) for word in text.split(","))
    if list(limits) != sorted(set(limits)):
        raise argparse.ArgumentTypeError(f"{text} is not ascending")
    return limits


def build_parser() -> Parser:
    parser = Parser("prepare_aihub.py", DESCRIPTION)
    add = parser.add_argument
    add(
        "downloaded",
        nargs="+",
        action=PathsAction,
        metavar="DOWNLOADED",
        help="folders, zip files, pieces of zip files, and tar files of the data set",
    )
    add("--list", action="store_true", help="show the targets with their counts per grade, and the instruments [off]")
    add(
        "--target",
        nargs="+",
        metavar="NAME",
        help="crop the areas of these grades, named as by --list; a name without l_ and r_ means both sides [none]",
    )
    add(
        "--equipment",
        metavar="NAME",
        help="crop the area of this instrument value, named as by --list, graded by --bins [none]",
    )
    add(
        "--bins",
        type=bins,
        metavar="LIMITS",
        help="limits of the grades of --equipment, such as 10,20,30 [none]",
    )
    add("--output", metavar="DIR", help="crops and tables are saved to this folder [none]")
    add("--class_folders", action="store_true", help="write one folder per grade instead of a table [off]")
    return parser


def run(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    check_task(args)
    from run.signals import Signals

    with Signals():
        from images.aihub import EXTENSIONS, Target, print_list, read_labels
        from images.aihub_crops import check_output_folder, count_reasons
        from images.archives import Archives

        names = dict.fromkeys(args.target or [])  # each one once
        targets = [Target(args.equipment, args.bins)] if args.equipment else list(map(Target, names))
        if not args.list:
            check_output_folder(Path(args.output), args.downloaded, args.class_folders)
        archives = Archives(args.downloaded, EXTENSIONS, "DOWNLOADED")
        found = read_labels(archives, targets)
        print(f"{found.label_files} label files, {sum(map(len, found.photos.values()))} photographs")
        if not args.list:
            return make_crops(archives, found, targets, args)
        print_list(found)
        if found.skipped:
            print(f"label files that cannot be used: {count_reasons(found.skipped)}", file=sys.stderr)
        return 1 if found.skipped else 0


def check_task(args: argparse.Namespace) -> None:
    """Raise UserError for flags that are missing, or that exclude each other."""
    tasks = {"--list": args.list, "--target": args.target, "--equipment": args.equipment}
    given = [flag for flag, value in tasks.items() if value]
    if len(given) != 1:
        problem = f"{' and '.join(given)} exclude each other" if given else "nothing to do"
        raise UserError(f"{problem}; add one of --list, --target and --equipment")
    if bool(args.equipment) != bool(args.bins):
        raise UserError(
            "--equipment: add --bins, the limits of its grades, such as --bins 10,20"
            if args.equipment
            else "--bins: it grades an instrument value; add --equipment"
        )
    if not args.list and not args.output:
        raise UserError("--output: name a folder for the crops")
    if args.class_folders and len(args.target or [1]) > 1:
        raise UserError("--class_folders: a crop can be in the folder of one grade; name one --target")


def make_crops(archives: "Archives", found: "Found", targets: "Sequence[Target]", args: argparse.Namespace) -> int:
    """Write crops and tables, and print what is there. -> exit status: 1 if labels have no crop"""
    from images.aihub_crops import (
        IMAGES,
        SKIPPED,
        TABLE,
        check_class_folders,
        count_reasons,
        output_folder,
        write_crops,
        write_skipped,
        write_table,
    )
    from images.decode import limit_image_size
    from run.cli import printable

    folder, class_target = Path(args.output), targets[0] if args.class_folders else None
    limit_image_size(MAX_MEGAPIXELS)
    with output_folder(folder):
        if class_target:
            check_class_folders(folder, found.labels, class_target)
        crops, new = write_crops(archives, found, folder, class_target)
        write_skipped(found.skipped, folder)
        images, shown = folder if class_target else folder / IMAGES, shlex.quote(str(folder))
        print(f"{len(crops)} crops in {images}, {new} of them new")
        for target in targets:
            counts = Counter(target.of(found.labels[crop]) for crop in crops)
            listed = ", ".join(f"grade {grade}: {counts[grade]}" for grade in sorted(counts.keys() - {None}))
            print(f"{target.column}: {listed}")
        if crops and class_target:
            print(f'train: python main.py --data_dirs {shown} --group_regex "^(.+)_.+_.+_.+" {TRAIN_FLAGS}')
        elif crops:
            for target, missing in zip(targets, write_table(found, crops, folder, targets), strict=True):
                drop = " --drop=" if missing else ""  # what shells of Windows take for an empty word differs
                print(
                    f"train: python main.py --data_dirs {shlex.quote(str(images))} --labels "
                    f"{shlex.quote(str(folder / TABLE))} --label_column {target.column}{drop} {TRAIN_FLAGS}"
                )
    if found.repeated:
        print(f"{found.repeated} label files say the same as others")
    if found.skipped:
        where = printable(str(folder / SKIPPED))
        print(f"labels without crop, listed in {where}: {count_reasons(found.skipped)}", file=sys.stderr)
    return 1 if found.skipped else 0


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0 done, 1 some labels have no crop, 2 a mistake of the user, 128 + N after signal N"""
    return run_command(run, argv)


if __name__ == "__main__":
    end_process(main())
