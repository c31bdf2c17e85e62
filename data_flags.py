"""The flags of `main.py` that say which images there are, what their labels are, and how they are split."""

import argparse

from run.cli import add_switch, class_merge, number, regex

RESIZES = ("stretch", "crop", "pad")
FOLDER_FLAGS = ("data_dirs", "val_dirs", "test_dirs")
PATH_FLAGS = (*FOLDER_FLAGS, "labels")  # made absolute, so that a run can be resumed from any folder
COLUMN_FLAGS = ("image_column", "label_column", "subject_column", "split_column")
# flags that say what the label of an image is
LABEL_FLAGS = ("labels", *COLUMN_FLAGS, "merge", "drop")


def add_data_flags(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    about = "folders with one folder per class, or with train, val and test; same names are merged [none]"
    add("--data_dirs", nargs="+", metavar="DIR", help=about)
    add("--val_dirs", nargs="+", metavar="DIR", help="validation images [a share of --data_dirs]")
    add("--test_dirs", nargs="+", metavar="DIR", help="test images [a share of --data_dirs]")
    add_label_flags(group)
    add(
        "--split_column",
        metavar="NAME",
        help="column of --labels with train, val and test [guessed: split, set]",
    )
    add(
        "--merge",
        type=class_merge,
        nargs="+",
        metavar="A,B=NAME",
        help="train several classes as one, for example 0,1=low 2,3=high [none]",
    )
    add("--drop", nargs="+", metavar="CLASS", help="leave out these classes; '': images without a label [none]")
    add(
        "--split",
        type=number(float, low=0, high=1),
        nargs=3,
        metavar=("TRAIN", "VAL", "TEST"),
        default=[0.6, 0.2, 0.2],
        help="shares of the images, which add up to 1; stratified by class [0.6 0.2 0.2]",
    )
    add(
        "--group_regex",
        type=regex,
        metavar="REGEX",
        help="regular expression that finds the subject in a file name; each subject stays in one split [none]",
    )
    add(
        "--folds",
        type=number(int, low=2),
        metavar="K",
        help="cross-validation: K trainings, each image tested once [off]",
    )
    add("--fold", type=number(int, low=0), metavar="I", help="train only fold I of --folds, counted from 0 [all folds]")
    add(
        "--image_size",
        type=number(int, low=32),
        default=224,
        metavar="N",
        help="images are resized to N x N pixels [224]",
    )
    add(
        "--resize",
        choices=RESIZES,
        default="stretch",
        help="stretch both sides, crop the square in the middle, or pad with black [stretch]",
    )
    add_switch(group, "skip_broken", False, "leave out images that cannot be read, instead of stopping")
    add(
        "--max_megapixels",
        type=number(float, above=0),
        default=200,
        metavar="M",
        help="refuse images of more than M megapixels [200]",
    )
    add("--demo", action="store_true", help="draw a small synthetic dataset and train on it [off]")


def add_label_flags(group: argparse._ActionsContainer) -> None:
    """The flags of `main.py` and of `predict.py` that name a table of labels and its columns."""
    add = group.add_argument
    add(
        "--labels",
        nargs="+",
        metavar="FILE",
        help="tables of labels, .csv or .xlsx, one row per image [none]",
    )
    add(
        "--image_column",
        metavar="NAME",
        help="column of --labels with file names [guessed: image, image_id, img_id, isic_id, filename, file, path]",
    )
    add(
        "--label_column",
        nargs="+",
        metavar="NAME",
        help="column of --labels with classes, or several with 0 and 1 [guessed: label, dx, diagnosis, diagnostic, "
        "grade, class]",
    )
    add(
        "--subject_column",
        metavar="NAME",
        help="column of --labels with subjects; '': none [guessed: patient_id, person_id, subject_id, lesion_id]",
    )


def add_subgroup_flag(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--subgroup_columns",
        nargs="+",
        metavar="NAME",
        help="metrics for each value of these columns of --labels [none]",
    )
