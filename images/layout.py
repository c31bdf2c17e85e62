"""How a data folder is laid out: its class folders or splits, and the entries that systems and runs have put there.

It imports nothing heavy: a command knows the splits of a data folder as soon as its flags are parsed.
"""

import argparse
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from flags import SPLITS
from run.cli import UserError
from run.folder import LOCK_FILE, STUDY_FILES

# what file servers, operating systems and tools add to a user's folders, in lower case
SYSTEM_NAMES = frozenset({
    "@eadir", "@tmp", "@sharebin", "@recycle", "@recently-snapshot", "#recycle", "#snapshot",  # Synology, QNAP
    "~snapshot", ".snapshot", ".snapshots", ".zfs",  # other file servers
    "$recycle.bin", "recycler", "system volume information", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db",
    "desktop.ini", "found.000", "$winreagent", "config.msi",  # Windows
    "__macosx", ".ds_store", ".appledouble", ".appledb", ".appledesktop", ".spotlight-v100", ".trashes", ".fseventsd",
    ".temporaryitems", ".documentrevisions-v100", "network trash folder", "temporary items", "icon\r",  # macOS
    "lost+found", ".trash", ".thumbnails", ".directory",  # Linux
    ".ipynb_checkpoints", "__pycache__", ".git", ".picasaoriginals", ".picasa.ini", "picasa.ini",
})  # fmt: skip
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
RUN_FILES = {"splits.json", "history.csv", "results.json"}  # beside args.json
TRIAL_LOG = re.compile(r"trial_\d{4,}\.log")  # of a search
LOCK_TEXT = re.compile(r"process \d+ on ")  # what a run writes into its lock
CACHE_NAME, CACHE_FILES = re.compile(r"\d+px(_[a-z]+)?_v\d+"), {"index.npz", "lock"}
WANDB_NAME = re.compile(r"wandb|(offline-)?run-\d{8}_\d{6}-.+")
SHOWN = 6  # kinds of passed-over entries, or names, in a message


@dataclass
class Entries:
    """What is in a folder: sorted names, and what was passed over, as {kind: how many}."""

    folders: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    dead_links: list[str] = field(default_factory=list)
    passed_over: Counter = field(default_factory=Counter)
    written_by: str | None = None  # the kind of the folder, if a run writes to it


def read_entries(folder: str, flag: str) -> Entries:
    """List a folder. Links are followed. Raises UserError, naming `flag`, if it cannot be read."""
    entries, names = Entries(), set()
    try:
        with os.scandir(folder) as found:
            for entry in found:
                name = entry.name
                names.add(name)
                if kind := _kind_of(name):
                    entries.passed_over[kind] += 1
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    entries.dead_links.append(name)
                else:
                    (entries.folders if entry.is_dir() else entries.files).append(name)
    except OSError as error:
        raise UserError(
            f"{flag}: {error.filename or folder} cannot be read: {error.strerror}; allow reading it, or move it out of "
            "the data folder"
        ) from error
    entries.written_by = _written_by(folder, names)
    for kind in (entries.folders, entries.files, entries.dead_links):
        kind.sort()
    return entries


def has_file(folder: str, endings: Iterable[str]) -> bool:
    """Whether a file with one of these endings, in lower or upper case, is directly in a folder that can be read."""
    endings = tuple(endings)
    with suppress(OSError), os.scandir(folder) as found:
        return any(entry.name.lower().endswith(endings) and not _kind_of(entry.name) for entry in found)
    return False


def _kind_of(name):
    """What an entry is passed over as; None for one of the user."""
    if name.casefold() in SYSTEM_NAMES:
        return name.strip()
    if name.startswith("._"):
        return "._*"  # of macOS: what a file has besides its content
    return "other hidden" if name.startswith(".") else None


def _written_by(folder, names):
    """The kind of a folder that runs write to, by the names in it; None for any other."""
    name = os.path.basename(folder)
    if WANDB_NAME.fullmatch(name):
        return "W&B folders"
    if CACHE_NAME.fullmatch(name) and names & CACHE_FILES:
        return "image caches"
    if ("args.json" in names and names & RUN_FILES) or any(name.endswith("_model.pth") for name in names):
        return "run folders"
    if names & STUDY_FILES or any(name.startswith("trial_") and TRIAL_LOG.fullmatch(name) for name in names):
        return "run folders"
    if names == {LOCK_FILE}:  # where files cannot be locked, it is empty
        return "run folders"
    if LOCK_FILE in names:  # of a run that has only begun
        try:
            with open(os.path.join(folder, LOCK_FILE), encoding="utf-8", errors="replace") as file:
                return "run folders" if LOCK_TEXT.match(file.read(100)) else None
        except OSError:  # some systems refuse to read a locked file
            return "run folders"
    return None


def refuse_dead_links(folder: str, names: Sequence[str], flag: str) -> None:
    """Raise UserError, naming the first of the links `names` in `folder`, if there are any."""
    if names:
        path = os.path.join(folder, names[0])
        target = "what it links to"
        with suppress(OSError):
            target = os.readlink(path)
        more = f" (nor do those of {len(names) - 1} other links beside it)" if len(names) > 1 else ""
        raise UserError(
            f"{flag}: {path} is a link to {target}, which does not exist{more}; mount the disk, or delete the link"
        )


def print_passed_over(passed_over: Counter, flag: str) -> None:
    """Print one line with what was passed over, the most frequent kinds first."""
    if passed_over:
        shown = dict(passed_over.most_common(SHOWN))
        if len(shown) < len(passed_over):
            shown["others"] = passed_over.total() - sum(shown.values())
        listed = ", ".join(f"{kind}: {count}" for kind, count in shown.items())
        print(f"{flag}: passed over hidden files, and what systems and runs have put there ({listed})")


# ------------------------------------------------------------------------------------------------------------ splits


def take_splits(args: argparse.Namespace, explicit: Collection[str], inherited: Mapping[str, Any]) -> None:
    """Replace `--data_dirs D` where D holds `train`, `val` and `test` folders: D/train, `--val_dirs D/val` and so on.

    A flag that is given explicitly wins over the folder of D. args: flags of main.py, changed in place; explicit: names
    of the flags on the command line; inherited: {flag: value} of the checkpoint that is resumed. Raises UserError for a
    folder that holds splits and other folders, and for several folders of which only some hold splits.
    """
    for split in ("val", "test"):
        for folder in getattr(args, f"{split}_dirs") or []:
            if folders := _split_folders(folder, f"--{split}_dirs"):
                inside = folders.get(split) or next(iter(folders.values()))
                raise UserError(f"--{split}_dirs: {folder} holds splits; pass one of them, such as {inside[0]}")
    if not args.data_dirs or args.data_dirs == inherited.get("data_dirs"):
        return
    layouts = {folder: _split_folders(folder, "--data_dirs") for folder in args.data_dirs}
    if not any(layouts.values()):
        return
    for folder, folders in layouts.items():
        if not folders:
            other = next(other for other in args.data_dirs if layouts[other])
            raise UserError(
                f"--data_dirs: {other} holds splits ({_names(layouts[other])}), {folder} does not; pass folders of one "
                f"kind, for example {_first(layouts[other])} instead of {other}"
            )
        if "train" not in folders:
            raise UserError(f"--data_dirs: {folder} holds {_names(folders)}, but no train; pass the folder to train on")
    train_dirs = [path for folders in layouts.values() for path in folders["train"]]
    if args.folds:
        raise UserError(
            f"--folds: {args.data_dirs[0]} holds splits ({_names(layouts[args.data_dirs[0]])}), but --folds makes its "
            f"own; pass --data_dirs {' '.join(train_dirs)}"
        )
    for split in SPLITS:
        name = "data_dirs" if split == "train" else f"{split}_dirs"
        is_given = name in explicit or getattr(args, name) not in (None, inherited.get(name))
        if split != "train" and is_given:
            continue
        for folder, folders in layouts.items():
            if len(folders.get(split, ())) > 1:
                raise UserError(
                    f"--data_dirs: {folder} holds {' and '.join(map(os.path.basename, folders[split]))}, which are the "
                    "same split; merge them"
                )
        paths = [path for folders in layouts.values() for path in folders.get(split, ())]
        if paths:
            setattr(args, name, paths)


def _split_folders(folder, flag):
    """-> {split: its folders in `folder`}, empty if it holds none. Raises UserError if it holds other folders too."""
    if not os.path.isdir(folder):  # reported where it is used
        return {}
    entries = read_entries(folder, flag)
    found = {}
    for name in [*entries.folders, *entries.dead_links]:
        if split := SPLIT_NAMES.get(name.casefold()):
            found.setdefault(split, []).append(os.path.join(folder, name))
    if not found:
        return {}
    refuse_dead_links(folder, [name for name in entries.dead_links if name.casefold() in SPLIT_NAMES], flag)
    others = [name for name in entries.folders if name.casefold() not in SPLIT_NAMES]
    others = [name for name in others if not is_written_by_runs(os.path.join(folder, name), flag)]
    found = {split: found[split] for split in SPLITS if split in found}
    if others:
        raise UserError(
            f"{flag}: {folder} holds splits ({_names(found)}) and other folders ({enumerated(others)}); move the "
            f"others away, rename what is not a split, or pass the folders to use, for example {flag} {_first(found)}"
        )
    return found


def is_written_by_runs(folder: str, flag: str) -> bool:
    """Whether runs write to a folder, or to all folders in it, and it holds nothing else."""
    entries = read_entries(folder, flag)
    if entries.written_by:
        return True
    inside = [os.path.join(folder, name) for name in entries.folders]
    return bool(inside) and all(read_entries(path, flag).written_by for path in inside)


def enumerated(names: Iterable[str]) -> str:
    """-> the names with commas, only the first of many."""
    names = list(names)
    return ", ".join(names[:SHOWN] + ["..."] * (len(names) > SHOWN))


def _names(folders):
    return ", ".join(os.path.basename(path) for paths in folders.values() for path in paths)


def _first(folders):
    return next(iter(folders.values()))[0]
