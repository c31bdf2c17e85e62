"""The folder of a run: made, locked, and never shared by two processes."""

import itertools
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from run.cli import UserError

LOCK_FILE = ".lock"  # in the folder of a run
# in the folder of a cross-validation: its flags and images, and its results
FOLDS_FILE, FOLDS_RESULTS = "folds_begun.json", "folds.json"
STUDY_FILES = {FOLDS_FILE, "ablation.json"}  # what a cross-validation or an ablation begins with
# any of these shows that a folder is that of runs: a copy may lack hidden files
OF_RUNS = {LOCK_FILE, "*.pth", "args.json", *STUDY_FILES}


@contextmanager
def locked(folder: str | Path) -> Iterator[Path]:
    """Lock the folder of a run for this process. -> the folder

    The lock ends with the process, however that ends, and a refused command leaves no new lock file. Temporary files
    of killed processes are deleted. Raises UserError, naming the process and its host, if another holds the lock.
    """
    folder = Path(folder)
    lock_file = folder / LOCK_FILE
    is_first = not lock_file.exists()
    # kept on Windows too, where it would be deleted: it shows that the folder is that of a run
    lock = filelock.FileLock(lock_file, blocking=False, fallback_to_soft=False, preserve_lock_file=True)
    try:
        lock.acquire()
        with suppress(OSError):  # a full disk, or Windows, which lets nobody write to a locked file
            lock_file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    except filelock.Timeout as error:
        raise UserError(f"{folder} is in use by {holder_of(folder)}; wait for it or stop it") from error
    except (OSError, NotImplementedError) as error:  # a full file system, or one without locks
        reason = getattr(error, "strerror", None) or error
        print(f"warning: {folder} cannot be locked ({reason}); do not start a second run in it", file=sys.stderr)
    try:
        for stray in folder.glob(".*.tmp"):
            if re.fullmatch(r"\..+\.(pth|csv|json|png|html)\.\d+\.tmp", stray.name):  # as atomic_write names them
                with suppress(OSError):
                    stray.unlink()
        yield folder
    except UserError:
        if is_first and not _has_checkpoint(folder):  # nothing was started: leave the folder as it was
            lock_file.unlink(missing_ok=True)
        raise
    finally:
        lock.release()


def holder_of(folder: str | Path) -> str:
    """-> the process that has locked the folder of a run, in words"""
    with suppress(OSError):  # some systems refuse to read a locked file
        return Path(folder, LOCK_FILE).read_text().strip() or "another process"
    return "another process"


def _has_checkpoint(folder):
    """Whether a run, or a fold of it, has saved anything in the folder."""
    return any(folder.rglob("*.pth"))


@contextmanager
def new_folder(folder: str | Path, flag: str, numbered: bool = False) -> Iterator[Path]:
    """Create `folder`, which must not exist yet, with its parents, and lock it. -> the folder

    It is deleted again if the body raises while it is empty, or raises UserError before it holds a checkpoint.
    numbered: if the name is taken (by a run that started in the same second), add `_2`, `_3` ... instead of raising.
    Raises UserError, naming `flag`, if the folder exists or cannot be created.
    """
    wanted = Path(os.path.abspath(folder))
    if not wanted.name:
        raise UserError(f"{flag}: {wanted} already exists; name a new folder")
    missing_parents = [parent for parent in wanted.parents if not parent.exists()]
    names = itertools.chain([wanted.name], (f"{wanted.name}_{number}" for number in itertools.count(2)))
    for folder in map(wanted.with_name, names):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError as error:
            if not numbered:
                raise UserError(f"{flag}: {folder} already exists; name a new folder or add --auto_resume") from error
        except OSError as error:
            raise UserError(f"{flag}: {folder} cannot be created: {error.strerror}") from error
    with locked(folder):
        try:
            yield folder
        except BaseException as error:
            refused = isinstance(error, UserError) and not _has_checkpoint(folder)
            if refused or [file.name for file in folder.iterdir()] in ([], [LOCK_FILE]):
                with suppress(OSError):  # a folder that is not empty stays
                    shutil.rmtree(folder)
                    for parent in missing_parents:
                        parent.rmdir()
            raise


@contextmanager
def open_or_create_folder(folder: str | Path, flag: str) -> Iterator[Path]:
    """Lock the folder of a run that may have started; create it if it does not exist. -> the folder

    Raises UserError, naming `flag`, if it holds something else.
    """
    folder = Path(folder).absolute()
    if not folder.exists():
        with new_folder(folder, flag) as folder:
            yield folder
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not any(any(folder.glob(name)) for name in OF_RUNS)):
        raise UserError(f"{flag}: {folder} exists and is not the folder of a run; name another folder")
    with locked(folder):
        yield folder


def prefixed(prefix: str | Path, name: str) -> str:
    """-> `<prefix>_<name>`, or `<prefix>/<name>` if the prefix ends in a slash."""
    if str(prefix).endswith(("/", os.sep)):
        return os.path.join(prefix, name)
    return f"{os.path.normpath(prefix)}_{name}"


def timestamped(prefix: str | Path) -> str:
    """-> `<prefix>_YYYYMMDD_HHMMSS`, or `<prefix>/YYYYMMDD_HHMMSS` if the prefix ends in a slash."""
    return prefixed(prefix, time.strftime("%Y%m%d_%H%M%S"))


def is_inside(path: str, folder: str | Path) -> bool:
    """Whether `path` is in `folder`, links resolved."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def check_is_file(path: str | Path, flag: str) -> None:
    """Raise UserError, naming `flag`, if `path` is not an existing file: opening a named pipe would wait forever."""
    if not os.path.isfile(path):
        raise UserError(f"{flag}: {path} {'is not a regular file' if os.path.exists(path) else 'does not exist'}")


def check_is_folder(path: str | Path, flag: str) -> None:
    """Raise UserError, naming `flag`, if `path` is not an existing folder."""
    if not os.path.isdir(path):
        problem = "is not a folder" if os.path.exists(path) else "does not exist"
        if os.path.islink(path) and not os.path.exists(path):
            problem = f"is a link to {os.readlink(path)}, which does not exist"
        raise UserError(f"{flag}: {path} {problem}")
