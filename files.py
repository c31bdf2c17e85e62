"""What every room needs: files written whole or not at all, and what a user sees of errors and progress."""

import csv
import itertools
import json
import os
import re
import shutil
import socket
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import numpy as np
from tqdm import tqdm

HISTORY_COLUMNS = (
    "epoch", "train_loss", "train_acc", "val_loss", "val_acc", "val_balanced_acc", "val_macro_f1",
    "learning_rate", "seconds", "images_per_second",
)  # fmt: skip


LOCK_FILE = ".lock"  # in a run's folder


class UserError(Exception):
    """A mistake that the user can mend: `main.py` prints it as one `error:` line and exits with status 2."""


class Damaged(UserError):
    """A file that is not what was written to it."""


class LossyStream:
    """A text stream that drops what it cannot write: a training outlives a full disk under its log, and `| tee`."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        with suppress(OSError, ValueError):  # the second: it was closed
            self._stream.write(text)
        return len(text)

    def flush(self):
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


def progress_bar(iterable, title, unit="batch", total=None):
    """A progress bar that is quiet where there is no terminal."""
    quiet = not sys.stderr.isatty()
    return tqdm(iterable, title, total, unit=unit, leave=False, dynamic_ncols=True, disable=quiet)


@contextmanager
def atomic_write(path, mode="w", former=None):
    """Open a temporary file beside `path`; sync it and rename it over `path` once it is whole.

    A crash at any moment leaves the former file or the new one. `mode`: "w" (UTF-8 text) or "wb". former: a name that
    the former file is kept under.
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
        if former and path.exists():
            _keep(path, path.with_name(former))
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails does not say to what file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _keep(path, former):
    """Name the file at `path` also `former`, so that there is a file at `path` all the time."""
    link = former.with_name(f".{former.name}.{os.getpid()}.tmp")
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        os.replace(path, former)
    else:
        os.replace(link, former)
        link.unlink(missing_ok=True)  # where both names were one file already, replace has left it


def _sync_folder(folder):
    """Have the new name of a file survive a power cut too, where the system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(folder):
    """Hold a run's folder for this process. -> the folder.

    The lock goes with the process, however that ends. What writers that were killed have left is taken away. Raises
    UserError, naming the process and its host, if another holds it.
    """
    folder = Path(folder)
    lock_file = folder / LOCK_FILE
    lock = filelock.FileLock(lock_file, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
        lock_file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    except filelock.Timeout as error:
        holder = ""
        with suppress(OSError):  # some systems do not let the file be read
            holder = lock_file.read_text().strip()
        raise UserError(f"{folder} is in use by {holder or 'another process'}; wait for it, or stop it") from error
    except (OSError, NotImplementedError) as error:  # a file system that is full, or has no locks
        reason = getattr(error, "strerror", None) or error
        print(f"warning: {folder} cannot be locked ({reason}); start no second run in it", file=sys.stderr)
    try:
        for stray in folder.glob(".*.tmp"):
            if re.fullmatch(r"\..+\.(pth|csv|json|png|html)\.\d+\.tmp", stray.name):  # as atomic_write names them
                with suppress(OSError):
                    stray.unlink()
        yield folder
    finally:
        lock.release()


@contextmanager
def new_folder(folder, flag, numbered=False):
    """Make `folder`, which must not exist yet, with its parents, and hold its lock.

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
                raise UserError(f"{flag}: {folder} exists already; name a new folder, or add --auto_resume") from error
        except OSError as error:
            raise UserError(f"{flag}: {folder} cannot be made: {error.strerror}") from error
    with locked(folder):
        try:
            yield folder
        except BaseException as error:
            refused = isinstance(error, UserError) and not list(folder.rglob("*.pth"))
            if refused or [file.name for file in folder.iterdir()] in ([], [LOCK_FILE]):
                with suppress(OSError):  # what holds something stays
                    shutil.rmtree(folder)
                    for parent in missing_parents:
                        parent.rmdir()
            raise


@contextmanager
def own_folder(folder, flag):
    """The folder of a run that may have begun, held by its lock; made if it is not there.

    Raises UserError, naming `flag`, if it holds something else.
    """
    folder = Path(folder).absolute()
    if not folder.exists():
        with new_folder(folder, flag) as folder:
            yield folder
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not list(folder.glob("*.pth")) + list(folder.glob(LOCK_FILE))):
        raise UserError(f"{flag}: {folder} is there and is not the folder of a run; name another")
    with locked(folder):
        yield folder


def first_line(error):
    """Of an error whose text may go on for a page."""
    return str(error).strip().partition("\n")[0]


def timestamped(prefix):
    """-> `<prefix>_YYYYMMDD_HHMMSS`"""
    return f"{os.path.normpath(prefix)}_{time.strftime('%Y%m%d_%H%M%S')}"


def write_json(path, content):
    with atomic_write(path) as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path):
    """Raises UserError if the file is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8", errors="surrogateescape"))
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error})") from error


def read_rows(path):
    """A file of `write_csv` or `write_predictions` -> [{column: text}]."""
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path, columns, rows):
    """rows: dicts; what is in none of `columns` is left out."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_history(path, rows):
    write_csv(path, HISTORY_COLUMNS, rows)


def write_predictions(path, image_paths, targets, probabilities, classes):
    """One row an image. targets: (N,) int; probabilities: (N, C) float; classes: the C names."""
    predictions = np.argmax(probabilities, axis=1)
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "label", "prediction", "correct", *(f"prob_{name}" for name in classes)])
        for image_path, target, prediction, row in zip(image_paths, targets, predictions, probabilities, strict=True):
            correct = int(target == prediction)
            writer.writerow([image_path, classes[target], classes[prediction], correct, *(f"{p:.7g}" for p in row)])


def read_predictions(path, classes):
    """A file of `write_predictions` -> (paths (N,) str, targets (N,) int, probabilities (N, C))."""
    rows = read_rows(path)
    targets = np.array([classes.index(row["label"]) for row in rows])
    probabilities = np.array([[float(row[f"prob_{name}"]) for name in classes] for row in rows])
    return np.array([row["path"] for row in rows]), targets, probabilities
