"""A table of labels becomes an index: columns are chosen, images are found by their names below folders."""

import argparse
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flags import SPLITS
from images.classes import ClassNames
from images.folders import (
    ImageIndex,
    Paths,
    check_duplicates,
    images_below,
    natural_key,
    print_left_out,
    warn_of_similar_names,
)
from images.formats import HEIF_EXTENSIONS
from images.layout import SPLIT_NAMES, enumerated
from images.leakage import check_subjects
from images.names import AMBIGUOUS, MISSING, match_names, similar_name
from images.tables import FLAG, Table, read_tables
from run.cli import UserError, printable
from run.files import PREDICTION_COLUMNS
from run.folder import check_is_folder

# what a column is called when no flag names it, in any case
IMAGE_COLUMNS = ("image", "image_id", "img_id", "isic_id", "filename", "file", "path")
LABEL_COLUMNS = ("label", "dx", "diagnosis", "diagnostic", "grade", "class")
SUBJECT_COLUMNS = ("patient_id", "person_id", "subject_id", "lesion_id")  # the first one counts
SPLIT_COLUMNS = ("split", "set")
ONE_HOT = {"0": False, "1": True, "0.0": False, "1.0": True, "False": False, "True": True, "FALSE": False, "TRUE": True}
SHOWN_IMAGES = 5  # in a message


@dataclass
class Columns:
    """Which columns of a table mean what. labels: one, or several with 0 and 1, one per class."""

    image: str
    labels: list[str]
    subject: str | None = None
    split: str | None = None


def index_table(
    args: argparse.Namespace,
    folders: Sequence[str],
    flag: str,
    classes: list[str] | None = None,
    paths: Paths | None = None,
    only: str | None = None,
) -> tuple[ImageIndex, np.ndarray | None]:
    """The images that the tables of `--labels` name, found below `folders`, with their labels, in the order of rows.

    args: flags of main.py; flag: the one of `folders`; classes: the only ones allowed (those of a checkpoint), or None;
    paths: the images below `folders`, where known; only: read the rows of this split only -> (index, the split of each
    image (N,), positions in SPLITS, or None without a column of splits). All columns but those of images, labels and
    splits are kept in the index. Raises UserError.
    """
    table = read_tables(args.labels)
    columns = choose_columns(table, args)
    names, labels = ClassNames(args.merge, args.drop), _labels(table, columns)
    if classes is None:
        names.check(labels)
    new_name = {label: names.of(label) for label in set(labels)}
    rows = np.flatnonzero([new_name[label] is not None for label in labels])
    if not rows.size:
        known = enumerated(sorted(set(labels) - {""})) or "all empty"
        raise UserError(f"--drop: no row of {_files(args)} is left; its classes are {known}")
    splits = _splits(table, columns.split, rows)
    if only and splits is not None:
        rows, splits = rows[splits == SPLITS.index(only)], splits[splits == SPLITS.index(only)]
        if not rows.size:
            raise UserError(f"--split_column: no row of {_files(args)} is in {only}")
    empty = [i for i in rows.tolist() if not labels[i]]
    if empty:
        raise UserError(
            f"{FLAG}: {len(empty)} of {len(labels)} rows have no label ({table.places(empty)}); fill them in, or leave "
            "them out with --drop ''"
        )
    targets, classes = _targets([new_name[labels[i]] for i in rows.tolist()], classes, table, rows)
    paths = photographs_below(folders, flag) if paths is None else paths
    found = _find(table, columns.image, rows, paths, folders, flag, args.skip_broken)
    kept = np.flatnonzero(found >= 0)
    kept = kept[_first_rows(table, columns, paths, rows[kept], found[kept], targets[kept], classes)]
    own = {columns.image, columns.split, *columns.labels} - {columns.subject}
    chosen = rows[kept].tolist()
    kept_columns = {
        _safe_name(name): Paths(cells[i] for i in chosen) for name, cells in table.columns.items() if name not in own
    }
    subject = columns.subject and _safe_name(columns.subject)
    index = ImageIndex(paths[found[kept]], targets[kept], classes, columns=kept_columns, subject_column=subject)
    return index, None if splits is None else splits[kept]


# ----------------------------------------------------------------------------------------------------------- columns


def choose_columns(table: Table, args: argparse.Namespace) -> Columns:
    """The columns that the flags name; the others are guessed by their names, and printed. Raises UserError."""
    guessed = {}
    image = _column(table, args, "image_column", IMAGE_COLUMNS, guessed)
    if not image:
        raise UserError(f"--image_column: {_no_column(table, args, IMAGE_COLUMNS)}; name the one to use")
    subject = _subject_column(table, args, guessed)
    split = None
    if args.split_column or not (args.folds or args.eval_only):  # which make or need no splits
        split = _column(table, args, "split_column", SPLIT_COLUMNS, guessed, lambda name: _are_splits(table, name))
    if split is None and args.split_column is None and not args.eval_only:
        _warn_of_other_splits(table, args)
    labels = _label_columns(table, args, guessed, (image, subject, split))
    if guessed:
        listed = ", ".join(f"--{flag} {printable(name)}" for flag, name in guessed.items())
        print(f"{FLAG}: columns guessed by their names: {listed}")
    return Columns(image, labels, subject, split)


def _column(table, args, flag, known, guessed, is_suitable=lambda name: True):
    """The column that a flag names, or the only one called as one of `known`; None if there is none, or for ''."""
    name = getattr(args, flag)
    if name is None:
        found = [name for name in table.columns if name.casefold() in known and is_suitable(name)]
        if len(found) > 1:
            raise UserError(f"--{flag}: {_files(args)} has {_quoted(found)}; name the one to use")
        if not found:
            return None
        name = guessed[flag] = found[0]
    if name:
        table.require(name, f"--{flag}")
    return name or None


def _subject_column(table, args, guessed):
    if args.subject_column is None and args.group_regex is None:
        for known in SUBJECT_COLUMNS:
            if name := _column(table, args, "subject_column", (known,), guessed):
                return name
    return _column(table, args, "subject_column", (), guessed)


def _label_columns(table, args, guessed, others):
    """-> the column of the labels, or one per class. others: columns that mean something else."""
    if args.label_column:
        for name in args.label_column:
            table.require(name, "--label_column")
        return list(args.label_column)
    if name := _column(table, args, "label_column", LABEL_COLUMNS, guessed):
        return [name]
    names = [name for name in table.columns if name not in others and ONE_HOT.keys() >= set(table.columns[name])]
    if len(names) < 2:
        raise UserError(
            f"--label_column: {_no_column(table, args, LABEL_COLUMNS)}, and fewer than two columns are all 0 and 1; "
            "name the one to use"
        )
    guessed["label_column"] = " ".join(names)
    return names


def _no_column(table, args, known):
    return f"none of the columns of {_files(args)} ({table.listed_columns()}) is called {' or '.join(known)}"


def _quoted(names):
    return " and ".join(f"{printable(name)!r}" for name in names)


def _files(args):
    return " ".join(map(printable, args.labels))


def _safe_name(name):
    """The name of a column in a file of predictions, which has columns of its own."""
    return f"table_{name}" if name in PREDICTION_COLUMNS or name.startswith("prob_") else name


def _labels(table, columns):
    """-> N labels in composed form (NFC), "" where there is none"""
    if len(columns.labels) == 1:
        known = {}
        cells = table.columns[columns.labels[0]]
        return [known.get(cell) or known.setdefault(cell, unicodedata.normalize("NFC", cell)) for cell in cells]
    values = np.empty((len(table), len(columns.labels)), bool)
    for c, name in enumerate(columns.labels):
        cells = table.columns[name]
        if wrong := [i for i, cell in enumerate(cells) if cell not in ONE_HOT]:
            raise UserError(f"--label_column: {cells[wrong[0]]!r} in {name!r} ({table.place(wrong[0])}) is not 0 or 1")
        values[:, c] = [ONE_HOT[cell] for cell in cells]
    wrong = np.flatnonzero(values.sum(axis=1) > 1)
    if wrong.size:
        several = [name for name, value in zip(columns.labels, values[wrong[0]], strict=True) if value]
        raise UserError(
            f"--label_column: {table.place(wrong[0])} has a 1 in {_quoted(several)}; a row has one class: name the "
            "columns of the classes"
        )
    names = np.array([*map(printable, columns.labels), ""], object)
    return names[np.where(values.any(axis=1), values.argmax(axis=1), -1)].tolist()


def _targets(labels, classes, table, rows):
    """-> (targets (n,) int64, classes). Raises UserError for a label that is not one of `classes`, if given."""
    found = sorted(set(labels), key=natural_key)
    if classes is None:
        if len(found) < 2:
            raise UserError(f"{FLAG}: found only one class, {found[0]!r}; a classifier needs two")
        warn_of_similar_names(found, FLAG)
        classes = found
    elif unknown := [name for name in found if name not in classes]:
        row = rows[labels.index(unknown[0])]
        raise UserError(
            f"{FLAG}: class {unknown[0]!r} ({table.place(row)}) is not one of the classes "
            f"{', '.join(map(printable, classes))}; rename it, or leave it out with --drop"
        )
    position = {name: i for i, name in enumerate(classes)}
    return np.array([position[label] for label in labels], np.int64), list(classes)


def _are_splits(table, column):
    return {cell.casefold() for cell in set(table.columns[column])} <= SPLIT_NAMES.keys()


def _warn_of_other_splits(table, args):
    """Print a line for each column that is called like one of splits, but is not used as such."""
    for name in table.columns:
        if name.casefold() not in SPLIT_COLUMNS:
            continue
        reason = "--folds makes the splits itself"
        if not _are_splits(table, name):
            i = next(i for i, cell in enumerate(table.columns[name]) if cell.casefold() not in SPLIT_NAMES)
            reason = f"{table.columns[name][i]!r} ({table.place(i)}) is not train, val or test"
        elif not args.folds:
            continue
        print(f"warning: {FLAG}: the splits in {printable(name)!r} are not used: {reason}")


def _splits(table, column, rows):
    """-> (n,) int8, positions in SPLITS, or None. Raises UserError for another value."""
    if column is None:
        return None
    cells = table.columns[column]
    number = {cell: SPLITS.index(SPLIT_NAMES[low]) for cell in set(cells) if (low := cell.casefold()) in SPLIT_NAMES}
    for i in rows.tolist():
        if cells[i] not in number:
            raise UserError(
                f"--split_column: {cells[i]!r} in {column!r} ({table.place(i)}) is not train, val or test; fix it, or "
                "omit the column with --split_column ''"
            )
    return np.array([number[cells[i]] for i in rows.tolist()], np.int8)


# ------------------------------------------------------------------------------------------------------------ images


def photographs_below(folders: Sequence[str], flag: str) -> Paths:
    """The images below `folders` at any depth, in a fixed order. Raises UserError, naming `flag`, if there are none."""
    found, skipped, unread, passed_over = [], Counter(), Counter(), Counter()
    for folder in folders:
        check_is_folder(folder, flag)
        images, others, _ = images_below(folder, flag, passed_over)
        unread[str(folder)] += sum(others.pop(extension, 0) for extension in HEIF_EXTENSIONS)
        found += images
        skipped.update(others)
    print_left_out(passed_over, skipped, flag, unread)
    if len(folders) > 1:  # of which one may be in another
        check_duplicates(found, flag)
    if not found:
        raise UserError(f"{flag}: no images in {' '.join(map(str, folders))}")
    return Paths(found)


def _find(table, column, rows, paths, folders, flag, skip_broken):
    """-> (n,) positions in `paths` of the images of `rows`, MISSING where one is not there. Raises UserError.

    Rows that are left out count as rows of their images.
    """
    cells = table.columns[column]
    matched, twins = match_names(cells, paths, folders)
    found = matched[rows]
    for row in rows[found == AMBIGUOUS][:1].tolist():
        first, second = (paths[i] for i in twins[row])
        raise UserError(
            f"{FLAG}: {cells[row]!r} ({table.place(row)}) is the name of {first} and of {second}; rename one of them, "
            "or write their folders and extensions into the table"
        )
    missing = [cells[i] for i in rows[found == MISSING].tolist()]
    if missing:
        _refuse_missing(missing, len(rows), similar_name(missing, paths), folders, skip_broken, flag)
    is_named = np.zeros(len(paths), bool)
    is_named[matched[matched >= 0]] = True
    if number := int((~is_named).sum()):
        print(f"{FLAG}: photographs below {_names(folders)} that no row names: {number}")
    return found


def _refuse_missing(missing, total, similar, folders, skip_broken, flag):
    shown = [printable(name) or "(an empty cell)" for name in missing[:SHOWN_IMAGES]]
    listed = ", ".join(shown) + (", ..." if len(missing) > SHOWN_IMAGES else "") + similar
    text = f"{FLAG}: {len(missing)} of {total} images are not below {_names(folders)}: {listed}"
    if len(missing) == total:
        raise UserError(f"{text}; check --image_column and {flag}")
    if not skip_broken:
        raise UserError(f"{text}; add them, or go on without them with --skip_broken")
    print(f"warning: {text}; they are left out")


def _names(folders):
    return " ".join(map(printable, map(str, folders)))


def _first_rows(table, columns, paths, rows, images, targets, classes):
    """-> positions in `rows` of the first row of each image. Raises UserError if another row says something else.

    rows: (n,) of the table; images: (n,) positions in `paths`; targets: (n,) int.
    """
    _, first, image_of = np.unique(images, return_index=True, return_inverse=True)
    others = np.flatnonzero(first[image_of] != np.arange(len(rows)))
    if not others.size:
        return np.arange(len(rows))
    for k in others.tolist():
        j = int(first[image_of[k]])
        pairs = [("label", *(classes[targets[i]] for i in (j, k)))]
        for what, name in (("subject", columns.subject), ("split", columns.split)):
            if name:
                pairs.append((what, *(table.columns[name][rows[i]] for i in (j, k))))
        for what, one, other in pairs:
            if one != other:
                raise UserError(
                    f"{FLAG}: {paths[images[k]]} has two {what}s: {one!r} ({table.place(rows[j])}) and {other!r} "
                    f"({table.place(rows[k])}); delete one of the rows"
                )
    print(f"{FLAG}: {len(others)} of {len(rows)} rows repeat a row of the same image ({table.places(rows[others])})")
    return np.sort(first)


def check_columns(names: Sequence[str] | None, index: ImageIndex) -> None:
    """Raise UserError unless the table of the images has the columns `names` of `--subgroup_columns`."""
    for name in names or ():
        if name not in (index.columns or {}):
            known = ", ".join(map(printable, index.columns)) if index.columns else "there are none without --labels"
            raise UserError(f"--subgroup_columns: there is no column {name!r} beside those of the labels: {known}")


def read_labelled(args: argparse.Namespace) -> tuple[ImageIndex, dict[str, ImageIndex]]:
    """The images of `--data_dirs` with the labels of `--labels`. -> (those to split, {split: published ones})"""
    index, split_of = index_table(args, args.data_dirs, "--data_dirs")
    if split_of is None:
        return index, {}
    parts = {split: index.subset(np.flatnonzero(split_of == i)) for i, split in enumerate(SPLITS)}
    if not len(parts["train"]):
        raise UserError(f"--split_column: no image of {_files(args)} is in train")
    print(f"splits of the table: {', '.join(f'{split} {len(part)}' for split, part in parts.items() if len(part))}")
    separate = {split: part for split, part in parts.items() if split != "train" and len(part)}
    if index.subject_column:  # at once, not after all images are decoded
        check_subjects({"train": parts["train"], **separate}, None)
    return parts["train"], separate
