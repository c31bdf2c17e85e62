"""Class folders become an index: the path and the class of every image."""

import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from images.formats import HEIF_EXTENSIONS, image_extensions
from run.cli import UserError
from run.folder import check_is_folder

MAX_LISTED = 20  # classes, in a warning


class Paths(Sequence):
    """Many paths in a single block of bytes; each becomes a string only when it is read.

    A million Python strings would take 150 MB, and as much again in each loader worker, because reading a string
    changes its reference count and so copies its page of memory.
    """

    def __init__(self, paths: Iterable[str | os.PathLike] = ()):
        encoded = [os.fsencode(path) for path in paths]
        self.letters = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    @classmethod
    def from_arrays(cls, letters: np.ndarray, ends: np.ndarray) -> "Paths":
        """letters: the bytes of all paths, uint8; ends: (N,) int64, where each path ends in `letters`."""
        paths = cls()
        paths.letters, paths.ends = letters, ends
        return paths

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: Any) -> Any:
        """The path at position `i` as a string, or the `Paths` at an array of positions."""
        if not np.isscalar(i):
            letters, ends = self.letters.tobytes(), self.ends.tolist()
            pieces = [letters[ends[k - 1] if k else 0 : ends[k]] for k in np.asarray(i).tolist()]
            ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
            return Paths.from_arrays(np.frombuffer(b"".join(pieces), dtype=np.uint8), ends)
        i = range(len(self))[i]
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.letters[start : self.ends[i]].tobytes())

    def __iter__(self) -> Iterator[str]:
        letters, start = self.letters.tobytes(), 0
        # the same as os.fsdecode, but faster
        encoding, errors = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
        for end in self.ends.tolist():
            yield letters[start:end].decode(encoding, errors)
            start = end

    def __add__(self, other: "Paths") -> "Paths":
        letters = np.concatenate([self.letters, other.letters])
        return Paths.from_arrays(letters, np.concatenate([self.ends, len(self.letters) + other.ends]))

    def first(self, count: int) -> "Paths":
        ends = self.ends[:count]
        return Paths.from_arrays(self.letters[: ends[-1] if count else 0], ends)


@dataclass
class ImageIndex:
    """The path and the class of every image, and where its pixels are.

    paths: N strings; targets: (N,) int64, positions in `classes`; cache_rows: (N,) int64, rows of the cache, -1 (the
    default) for an image that is not cached and is decoded on every use; cache: an `ImageCache`; sizes: (N,) int64,
    file sizes in bytes, -1 where unknown.
    """

    paths: Paths | Sequence[str]
    targets: np.ndarray
    classes: list[str]
    cache_rows: np.ndarray | None = None
    cache: Any = None
    sizes: np.ndarray | None = None

    def __post_init__(self):
        if not isinstance(self.paths, Paths):
            self.paths = Paths(self.paths)
        if self.cache_rows is None:
            self.cache_rows = np.full(len(self.paths), -1)
        if self.sizes is None:
            self.sizes = np.full(len(self.paths), -1)

    def subset(self, positions: Sequence[int] | np.ndarray) -> "ImageIndex":
        """positions: (n,) int."""
        positions = np.asarray(positions, dtype=np.int64)
        cache_rows, sizes = self.cache_rows[positions], self.sizes[positions]
        return ImageIndex(self.paths[positions], self.targets[positions], self.classes, cache_rows, self.cache, sizes)

    def counts(self) -> np.ndarray:
        """-> (C,) int64: images per class."""
        return np.bincount(self.targets, minlength=len(self.classes))

    def __len__(self) -> int:
        return len(self.paths)


def natural_key(name: str) -> list[tuple]:
    """Sort key under which "2" comes before "10", and numbers before letters."""
    pieces = [piece for piece in re.split(r"(\d+)", name) if piece]
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces]


def index_folders(
    folders: Sequence[str | Path],
    classes: list[str] | None = None,
    flag: str = "--data_dirs",
    allow_missing: bool = False,
) -> ImageIndex:
    """Merge the class folders (`folder/CLASS/**/image`) of all `folders`, class by class.

    Hidden files and folders are skipped. classes: the only classes allowed (those of the training images or of a
    checkpoint); each needs an image unless `allow_missing`. Raises UserError, naming `flag`, for any other layout.
    """
    found, skipped, unread, extensions = {}, Counter(), Counter(), image_extensions()
    for folder in folders:
        for name, class_folder in _class_folders(folder, flag):
            images = found.setdefault(name, [])
            for path in _files_below(class_folder):
                extension = os.path.splitext(path)[1].lower()
                if extension in extensions:
                    images.append(path)
                elif extension in HEIF_EXTENSIONS:
                    unread[name] += 1
                else:
                    skipped[extension or "no extension"] += 1
    if skipped:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in skipped.most_common(5))
        print(f"{flag}: skipped {sum(skipped.values())} files with a non-image extension ({kinds})")
    _warn_of_heif(unread, flag)
    names = sorted(found, key=natural_key)
    _check_classes(names, found, folders, classes, flag, allow_missing)
    names = list(classes) if classes is not None else names
    paths = [path for name in names for path in found.get(name, [])]
    targets = np.repeat(np.arange(len(names)), [len(found.get(name, [])) for name in names])
    return ImageIndex(paths, targets, names)


def _warn_of_heif(unread, flag):
    """unread: {class: number of photographs that need pillow-heif}."""
    if unread:
        counts = [f"class {name}: {unread[name]}" for name in sorted(unread, key=natural_key)]
        if len(counts) > MAX_LISTED:
            counts[MAX_LISTED:] = [f"{len(counts) - MAX_LISTED} more classes"]
        print(
            f"warning: {flag}: {sum(unread.values())} HEIC photographs are left out ({', '.join(counts)}); to read "
            "them, install the package pillow-heif: pip install pillow-heif"
        )


def _class_folders(folder, flag):
    """-> [(class name, its folder)]. Names are compared in composed form (NFC), as macOS decomposes them."""
    check_is_folder(folder, flag)
    folder = Path(folder)
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    class_folders = [(unicodedata.normalize("NFC", entry.name), entry) for entry in entries if entry.is_dir()]
    extensions = image_extensions()
    loose = sum(entry.suffix.lower() in extensions for entry in entries if entry.is_file())
    if not class_folders:
        problem = "contains images, not class folders: pass its parent folder" if loose else "contains no class folders"
        raise UserError(f"{flag}: {folder} {problem} (expected {folder}/CLASS/image.jpg)")
    if loose:
        print(f"{flag}: skipped {loose} images directly in {folder}, outside the class folders")
    return sorted(class_folders)


def _files_below(folder):
    """All files below `folder` in a fixed order. Links are followed, and each folder is visited once, as a link may
    lead back to a parent.
    """

    def refuse(error):  # os.walk would silently skip an unreadable folder
        raise error

    files, visited = [], set()
    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real_place = os.path.realpath(place)
        if real_place in visited:
            subfolders.clear()
            continue
        visited.add(real_place)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [f"{place}{os.sep}{name}" for name in sorted(names) if not name.startswith(".")]
    return files


def _check_classes(names, found, folders, classes, flag, allow_missing):
    where = " ".join(map(str, folders))
    empty = [name for name in names if not found[name]]
    if classes is not None:
        unknown = [name for name in names if name not in classes]
        if unknown:
            raise UserError(f"{flag}: class {unknown[0]!r} in {where} is not one of the classes {', '.join(classes)}")
        absent = [name for name in classes if not found.get(name)]
        if absent and not allow_missing:
            raise UserError(
                f"{flag}: class {absent[0]!r} has no images in {where}; every split needs images of each class"
            )
    elif empty:
        raise UserError(f"{flag}: class {empty[0]!r} has no images in {where}; add images or delete the folder")
    elif len(names) < 2:
        raise UserError(f"{flag}: found only one class, {names[0]!r}, in {where}; a classifier needs at least two")
    if not any(found.values()):
        raise UserError(f"{flag}: no images in {where}")


def check_duplicates(paths: Iterable[str], flag: str) -> None:
    """Raise UserError if an image is listed twice, also through a link: it could land in both training and test."""
    seen, real_folders = set(), {}
    for path in paths:
        folder, _, name = path.rpartition(os.sep)
        if folder not in real_folders:
            real_folders[folder] = os.path.realpath(folder)
        real_path = os.path.realpath(path) if os.path.islink(path) else f"{real_folders[folder]}{os.sep}{name}"
        if real_path in seen:
            raise UserError(f"{flag}: {path} is listed twice; pass each folder only once")
        seen.add(real_path)


def file_stat(path: str) -> tuple[int, int, int]:
    """-> (size in bytes, modification time in ns, inode), which change with the image; all -1 if there is no file.

    The inode tells apart two files of the same size and time that have been swapped.
    """
    try:
        stat = os.stat(path)
    except OSError:
        return -1, -1, -1
    return stat.st_size, stat.st_mtime_ns, stat.st_ino & (2**63 - 1)
