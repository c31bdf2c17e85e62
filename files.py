"""What every room needs: files written whole or not at all, and what a user sees of errors and progress."""

import csv
import itertools
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

HISTORY_COLUMNS = (
    "epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_balanced_acc", "val_macro_f1",
    "learning_rate", "seconds", "images_per_second",
)  # fmt: skip


class UserError(Exception):
    """A mistake that the user can mend: `main.py` prints it as one `error:` line and exits with status 2."""


def progress_bar(iterable, title, unit="batch", total=None):
    """A progress bar that is quiet where there is no terminal."""
    quiet = not sys.stderr.isatty()
    return tqdm(iterable, title, total, unit=unit, leave=False, dynamic_ncols=True, disable=quiet)


@contextmanager
def atomic_write(path, mode="w"):
    """Open a temporary file beside `path`; sync it and rename it over `path` once it is whole.

    A crash at any moment leaves the former file or the new one. `mode`: "w" (UTF-8 text) or "wb".
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # surrogateescape: a file name that is not valid UTF-8 must survive the way into splits.json and back
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(folder, flag, numbered=False):
    """Make `folder`, which must not exist yet, with its parents.

    Taken away again if the body fails with it empty, or by a UserError before there is a checkpoint in it.
    numbered: where the name is taken (by a run that began in the same second), add `_2`, `_3` ... instead of failing.
    Raises UserError, naming `flag`, if it exists or cannot be made.
    """
    wanted = Path(folder).absolute()
    missing_parents = [parent for parent in wanted.parents if not parent.exists()]
    names = itertools.chain([wanted.name], (f"{wanted.name}_{number}" for number in itertools.count(2)))
    for folder in map(wanted.with_name, names):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError as error:
            if not numbered:
                raise UserError(f"{flag}: {folder} exists already; name a new folder, or --resume its run") from error
        except OSError as error:
            raise UserError(f"{flag}: {folder} cannot be made: {error.strerror}") from error
    try:
        yield folder
    except BaseException as error:
        with suppress(OSError):  # what holds something stays
            if isinstance(error, UserError) and not list(folder.glob("*.pth")):
                shutil.rmtree(folder)
            else:
                folder.rmdir()
            for parent in missing_parents:
                parent.rmdir()
        raise


def timestamped(prefix):
    """-> `<prefix>_YYYYMMDD_HHMMSS`"""
    return f"{os.path.normpath(prefix)}_{time.strftime('%Y%m%d_%H%M%S')}"


def write_json(path, content):
    with atomic_write(path) as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_history(path, last_epoch):
    """The rows of `history.csv` up to `last_epoch`, as dicts of strings; none if there is no such file."""
    if not Path(path).exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["epoch"]) <= last_epoch]


def write_history(path, rows):
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, HISTORY_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_predictions(path, image_paths, targets, probabilities, classes):
    """One row an image. targets: (N,) int; probabilities: (N, C) float; classes: the C names."""
    predictions = np.argmax(probabilities, axis=1)
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "label", "prediction", "correct", *(f"prob_{name}" for name in classes)])
        for image_path, target, prediction, row in zip(image_paths, targets, predictions, probabilities, strict=True):
            correct = int(target == prediction)
            writer.writerow([image_path, classes[target], classes[prediction], correct, *(f"{p:.6f}" for p in row)])
