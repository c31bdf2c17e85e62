"""Images found by their names in a table of labels, which come with or without folders and extensions."""

import functools
import os
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from run.cli import printable

MISSING, AMBIGUOUS = -1, -2


def match_names(
    cells: Sequence[str], paths: Sequence[str], folders: Sequence[str]
) -> tuple[np.ndarray, dict[int, tuple[int, int]]]:
    """Find images by their names in a table: with or without extension, with or without folders, in this case.

    -> (positions in `paths` (N,) int64, MISSING or AMBIGUOUS, {row that is ambiguous: the first two images}). The name
    of an image alone is enough if only one image has it. If the cell has folders, they must be those of the image: its
    path below its data folder, or its end, or what ends with that, as on another computer; the first of these counts.
    Time and memory grow with the number of cells and images, however many images have the same name.
    """
    paths = [composed(path).replace(os.sep, "/") for path in paths]
    folders = [composed(os.path.join(folder, "")).replace(os.sep, "/") for folder in folders]
    full, without_extension = _Names(paths, folders), None
    found, ambiguous = np.full(len(cells), MISSING, np.int64), {}
    for row, cell in enumerate(cells):
        cell = composed(cell)
        cell = cell.replace("\\", "/") if "\\" in cell else cell
        name, names = cell.rpartition("/")[2], full
        if name and name not in full.by_name:
            if without_extension is None:
                without_extension = _Names([_without_extension(path) for path in paths], folders)
            names = without_extension
        if name not in names.by_name:
            continue
        first, second = (names.by_name[name], names.twins.get(name)) if name == cell else names.in_folders(cell)
        found[row] = first if second is None else AMBIGUOUS
        if second is not None:
            ambiguous[row] = first, second
    return found, ambiguous


def composed(name: str) -> str:
    """-> a name in composed form (NFC), as all systems but macOS write it"""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _without_extension(path):
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.rpartition('.')[0] or name}"


class _Names:
    """The images of several paths, by the ends of these."""

    def __init__(self, paths: Sequence[str], folders: Sequence[str]):
        """folders: of the images, each with a slash at its end."""
        self.paths, self.folders, self._by_end = paths, folders, {}
        self.by_name, self.twins = _first_and_second(path.rpartition("/")[2] for path in paths)

    def in_folders(self, cell: str) -> tuple[int, int | None]:
        """-> (the image of a cell with folders, or MISSING; another one, if it is of several, or None)"""
        cell = cell.removeprefix("./").lstrip("/")
        ends = [cell]
        while "/" in ends[-1]:
            ends.append(ends[-1].partition("/")[2])
        depth = len(ends)
        for end, dictionaries in ((cell, self._below_folder), (cell, self._ends(depth))):
            if end in dictionaries[0]:
                return dictionaries[0][end], dictionaries[1].get(end)
        first, second = self._below_folder
        end = next((end for end in ends[1:] if end in first), None)
        return first.get(end, MISSING), second.get(end)

    @functools.cached_property
    def _below_folder(self):
        def below(path):
            inside = [path[len(folder) :].lstrip("/") for folder in self.folders if path.startswith(folder)]
            return min(inside, key=len) if inside else path

        return _first_and_second(map(below, self.paths))

    def _ends(self, depth):
        """depth: number of the last names of a path that are compared."""
        if depth not in self._by_end:
            pieces = (path.rsplit("/", depth) for path in self.paths)
            self._by_end[depth] = _first_and_second("/".join(names[-depth:]) for names in pieces)
        return self._by_end[depth]


def _first_and_second(names):
    """-> ({name: the first image of this name}, {name: the second one, if there is one})"""
    first, second = {}, {}
    for i, name in enumerate(names):
        if first.setdefault(name, i) != i:
            second.setdefault(name, i)
    return first, second


def similar_name(missing: Sequence[str], paths: Iterable[str]) -> str:
    """-> for a message: an image whose name differs from a missing one in extension or case, "" if there is none."""
    names = {}
    for path in paths:
        name = composed(os.path.basename(path))
        names.setdefault(os.path.splitext(name)[0].casefold(), name)
    for cell in missing:
        name = composed(cell).replace("\\", "/").rpartition("/")[2]
        for stem in (name, os.path.splitext(name)[0]):
            found = names.get(stem.casefold())
            if found and name not in (found, os.path.splitext(found)[0]):
                return f" (but there is {printable(found)}: extensions, upper and lower case have to be the same)"
    return ""
