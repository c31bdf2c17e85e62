"""Class folders become an index: the path and the class of every image."""

import os
import re
import shlex
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from images.classes import ClassNames
from images.formats import HEIF_EXTENSIONS, image_extensions
from images.layout import (
    SPLIT_NAMES,
    enumerated,
    has_file,
    is_written_by_runs,
    print_passed_over,
    read_entries,
    refuse_dead_links,
)
from run.cli import UserError
from run.files import valid_text
from run.folder import check_is_folder

MAX_GRADES = 12  # a class folder with more numbered folders holds subjects or years, not grades
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
    file sizes in bytes, -1 where unknown. Of a table of labels: columns: {name: N cells}, None if the classes are
    folders; subject_column: the column of the subjects.
    """

    paths: Paths | Sequence[str]
    targets: np.ndarray
    classes: list[str]
    cache_rows: np.ndarray | None = None
    cache: Any = None
    sizes: np.ndarray | None = None
    columns: dict[str, Paths] | None = None
    subject_column: str | None = None

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
        columns = self.columns and {name: cells[positions] for name, cells in self.columns.items()}
        return replace(
            self,
            paths=self.paths[positions],
            targets=self.targets[positions],
            cache_rows=cache_rows,
            sizes=sizes,
            columns=columns,
        )

    @property
    def is_cached(self) -> bool:
        """Whether the pixels of every image are in the cache."""
        return bool((self.cache_rows >= 0).all()) and self.cache.pixels is not None

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
    names: ClassNames | None = None,
) -> ImageIndex:
    """Merge the class folders (`folder/CLASS/**/image`) of all `folders`, class by class.

    What systems and runs have put there is passed over. classes: the only classes allowed (those of the training images
    or of a checkpoint); each needs an image unless `allow_missing`. names: under which names they are trained. Raises
    UserError, naming `flag`, for any other layout.
    """
    names_in_training, folder_names = names or ClassNames(), set()
    found, skipped, unread, passed_over = {}, Counter(), Counter(), Counter()
    for folder in folders:
        class_folders = _class_folders(folder, classes, flag, passed_over)
        if classes is None:
            _check_level(folder, class_folders, flag)
        folder_names.update(name for name, _ in class_folders)
        for folder_name, class_folder in class_folders:
            name = names_in_training.of(folder_name)
            if name is None:
                continue
            images, others, is_written = images_below(class_folder, flag, passed_over)
            unread[f"class {name}"] += sum(others.pop(extension, 0) for extension in HEIF_EXTENSIONS)
            if images or not is_written:  # otherwise it is a folder of runs, not of a class
                found.setdefault(name, []).extend(images)
                skipped.update(others)
    print_left_out(passed_over, skipped, flag, unread)
    if classes is None:
        names_in_training.check(folder_names)
    names = sorted(found, key=natural_key)
    _check_classes(names, found, folders, classes, flag, allow_missing)
    if classes is None:
        warn_of_similar_names(names, flag)
    names = list(classes) if classes is not None else names
    paths = [path for name in names for path in found.get(name, [])]
    targets = np.repeat(np.arange(len(names)), [len(found.get(name, [])) for name in names])
    return ImageIndex(paths, targets, names)


def print_left_out(passed_over: Counter, skipped: Counter, flag: str, unread: Counter | None = None) -> None:
    """Print what of the folders of `flag` is not used.

    passed_over: {kind: how many}; skipped: {extension: files}; unread: {place: photographs that need pillow-heif}.
    """
    print_passed_over(passed_over, flag)
    if skipped:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in skipped.most_common(5))
        print(f"{flag}: skipped {sum(skipped.values())} files with a non-image extension ({kinds})")
    unread = +(unread or Counter())  # without zeros
    if unread:
        counts = [f"{name}: {unread[name]}" for name in sorted(unread, key=natural_key)]
        if len(counts) > MAX_LISTED:
            counts[MAX_LISTED:] = [f"and {len(counts) - MAX_LISTED} more"]
        print(
            f"warning: {flag}: {sum(unread.values())} HEIC photographs are left out ({', '.join(counts)}); to read "
            "them, install the package pillow-heif: pip install pillow-heif"
        )


def _class_folders(folder, classes, flag, passed_over):
    """-> [(class name, its folder)]. Names are compared in composed form (NFC), as macOS decomposes them."""
    check_is_folder(folder, flag)
    folder = str(folder)
    entries = read_entries(folder, flag)
    passed_over.update(entries.passed_over)
    refuse_dead_links(folder, entries.dead_links, flag)
    loose = sum(os.path.splitext(name)[1].lower() in image_extensions() for name in entries.files)
    if not entries.folders:
        problem = "contains no class folders"
        if loose:
            is_split = os.path.basename(folder).casefold() in SPLIT_NAMES
            advice = "sort them into class folders, or leave this folder out" if is_split else "pass its parent folder"
            problem = f"contains images, not class folders: {advice}"
        raise UserError(f"{flag}: {folder} {problem} (expected {folder}/CLASS/image.jpg)")
    if loose:
        print(f"{flag}: skipped {loose} images directly in {folder}, outside the class folders")
    paths = [os.path.join(folder, name) for name in entries.folders]
    return sorted((_class_name(path, classes, flag), path) for path in paths)


def _class_name(path, classes, flag):
    """The name of a class folder in composed form (NFC). Raises UserError for a new class that is not valid UTF-8."""
    name = os.path.basename(path)
    try:
        return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8"))
    except UnicodeDecodeError as error:
        if classes and name in classes:  # a run that has begun with it
            return name
        guess = "NAME"
        with suppress(UnicodeDecodeError):  # of a zip file that was made on Windows in Korean
            guess = os.fsencode(name).decode("euc-kr")
        renamed = os.path.join(os.path.dirname(path), guess)
        raise UserError(
            f"{flag}: the name of the class folder {valid_text(path)} is not valid UTF-8; rename it, for example: "
            f"mv {_shell_word(path)} {_shell_word(renamed)} (convmv -f cp949 -t utf8 -r --notest renames all at once)"
        ) from error


def _shell_word(path):
    """A path for the command line of bash, also if it is not valid UTF-8."""
    if valid_text(path) == path:
        return shlex.quote(path)
    escapes = {"'": "\\'", "\\": "\\\\"} | {chr(0xDC00 + byte): f"\\x{byte:02x}" for byte in range(0x80, 0x100)}
    return f"$'{''.join(escapes.get(letter, letter) for letter in path)}'"


def images_below(
    folder: str | Path, flag: str, passed_over: Counter, extensions: Sequence[str] | None = None
) -> tuple[list[str], Counter, bool]:
    """-> (paths of the images below a folder in a fixed order, {extension: how many other files}, whether runs write
    there).

    extensions: of images, in lower case; by default of those that can be read. What is passed over is added to
    `passed_over`. Raises UserError, naming `flag`, for what cannot be read.
    """
    extensions = image_extensions() if extensions is None else extensions
    files, is_written = _files_below(folder, flag, passed_over, extensions)
    images, others = [], Counter()
    for path in files:
        extension = os.path.splitext(path)[1].lower()
        if extension in extensions:
            images.append(path)
        else:
            others[extension or "no extension"] += 1
    return images, others, is_written


def _files_below(folder, flag, passed_over, extensions):
    """-> (all files below `folder` in a fixed order, whether runs write to a folder in it, which is passed over).

    Links are followed, and each folder is visited once, as a link may lead back to a parent.
    """
    files, waiting, visited, is_written = [], [str(folder)], set(), False
    while waiting:
        place = waiting.pop()
        real_place = os.path.realpath(place)
        if real_place in visited:
            continue
        visited.add(real_place)
        entries = read_entries(place, flag)
        if entries.written_by:
            passed_over[entries.written_by] += 1
            is_written = True
            continue
        passed_over.update(entries.passed_over)
        # a photograph that cannot be reached is listed with the broken ones; anything else may be a folder of them
        photographs = [name for name in entries.dead_links if os.path.splitext(name)[1].lower() in extensions]
        refuse_dead_links(place, sorted(set(entries.dead_links) - set(photographs)), flag)
        files += [f"{place}{os.sep}{name}" for name in sorted(entries.files + photographs)]
        waiting += [f"{place}{os.sep}{name}" for name in reversed(entries.folders)]
    return files, is_written


def _check_level(folder, class_folders, flag):
    """Raise UserError if the class folders hold the same numbers, but are none themselves: `forehead/0`, `lips/0`."""
    if any(unicodedata.normalize("NFKC", name).isdecimal() for name, _ in class_folders):
        return
    numbers = {path: _numbered_folders(path, flag) for _, path in class_folders}
    others = [path for path in numbers if not numbers[path]]
    numbers = {path: found for path, found in numbers.items() if found}
    if len(numbers) < 2 or not all(is_written_by_runs(path, flag) for path in others):
        return
    common, every = set.intersection(*numbers.values()), set.union(*numbers.values())
    # a grade without photographs may be missing in one of them; other numbers, as of subjects, rarely are the same
    if len(common) >= 2 and (common == every or (len(every) <= MAX_GRADES and 2 * len(common) >= len(every))):
        first, second = list(map(shlex.quote, numbers))[:2]
        raise UserError(
            f"{flag}: the folders in {folder} ({enumerated(map(os.path.basename, numbers))}) each hold class folders "
            f"({enumerated(sorted(common, key=natural_key))}): pass one of them, {flag} {first}, or several to merge "
            f"them class by class, {flag} {first} {second} (if they are the classes, rename the folders in them)"
        )


def _numbered_folders(path, flag):
    """-> the names of the folders in a folder if all of them are numbers and no images are beside them, else none."""
    if has_file(path, image_extensions()):  # as in most class folders: at once, however many there are
        return set()
    names = read_entries(path, flag).folders
    return set(names) if all(name.isdecimal() for name in names) else set()


def warn_of_similar_names(names: Sequence[str], flag: str) -> None:
    """Print a line for the classes that differ only in case, zeros (01, 1.0), spaces or forms of the same letter."""
    similar = {}
    for name in names:
        similar.setdefault(_comparable(name), []).append(name)
    groups = [" and ".join(map(repr, group)) for group in similar.values() if len(group) > 1]
    if groups:
        print(
            f"warning: {flag}: some classes have nearly the same name ({enumerated(groups)}) and are trained as "
            "different classes; if they are one class, give them the same name, for example with --merge"
        )


def _comparable(name):
    """A class name without case, leading zeros, a final .0, spaces, invisible characters and compatibility forms."""
    name = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    name = "".join(letter for letter in name if unicodedata.category(letter)[0] not in "ZC")
    return re.sub(r"(?<![\d.])0+(?=\d)", "", re.sub(r"(?<=\d)\.0+$", "", name))


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
    elif not names:
        raise UserError(f"{flag}: no images in {where}")
    elif empty:
        raise UserError(f"{flag}: class {empty[0]!r} has no images in {where}; add images or delete the folder")
    elif len(names) < 2:
        inside = [path for path in (os.path.join(folder, names[0]) for folder in folders) if os.path.isdir(path)]
        has_folders = inside and read_entries(inside[0], flag).folders
        advice = f"; if the folders in it are the classes, pass {inside[0]}" if has_folders else ""
        raise UserError(f"{flag}: found only one class, {names[0]!r}, in {where}; a classifier needs two{advice}")
    if not any(found.values()):
        raise UserError(f"{flag}: no images in {where}")


def check_duplicates(paths: Iterable[str], flag: str) -> None:
    """Raise UserError if an image is listed twice, also through a link: it could land in both training and test."""
    seen = set()
    for path, real_path in with_real_paths(paths):
        if real_path in seen:
            raise UserError(f"{flag}: {path} is listed twice; pass each folder only once")
        seen.add(real_path)


def with_real_paths(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """-> (path, the same file without links) of each file; each folder is resolved only once."""
    real_folders = {}
    for path in paths:
        folder, separator, name = path.rpartition(os.sep)
        if folder + separator not in real_folders:
            real_folders[folder + separator] = os.path.realpath(folder + separator)
        real_folder = real_folders[folder + separator]
        yield path, os.path.realpath(path) if os.path.islink(path) else f"{real_folder}{os.sep}{name}"


def file_stat(path: str) -> tuple[int, int, int]:
    """-> (size in bytes, modification time in ns, inode), which change with the image; all -1 if there is no file.

    The inode tells apart two files of the same size and time that have been swapped.
    """
    try:
        stat = os.stat(path)
    except OSError:
        return -1, -1, -1
    return stat.st_size, stat.st_mtime_ns, stat.st_ino & (2**63 - 1)
