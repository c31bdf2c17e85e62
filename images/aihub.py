"""The labels of AI-Hub 71645, "Korean skin condition measurement": grades and instrument values of facial areas.

Each photograph has one JSON file per area, `<person>_<device>_<angle>_<area>.json`, with the area's box, the grades
that dermatologists gave it (`annotations`), and what instruments measured there (`equipment`).
"""

import json
import math
import re
import sys
import unicodedata
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from images.archives import Archives, DamagedMember, Member
from images.formats import HEIF_EXTENSIONS, IMAGE_EXTENSIONS
from run.cli import UserError, printable, progress_bar
from run.cores import num_cores

LABEL = ".json"
EXTENSIONS = (LABEL, *IMAGE_EXTENSIONS, *HEIF_EXTENSIONS)
WHOLE_FACE = 0  # its area
AREAS = (
    "whole face", "forehead", "glabella", "left eye corner", "right eye corner", "left cheek", "right cheek", "lips",
    "chin",
)  # fmt: skip
SIDES = ("l_", "r_")
ABOUT = ("gender", "age", "skin_type", "sensitive")  # the person, in `info`
FIRST_COLUMNS = ("image", "person_id", "device", "angle", "area", *ABOUT)  # of the table; grades have others
VALUE = "equipment_"  # before the name of an instrument value in the table: grades and values share names
NAME = re.compile(r"(\w[\w-]*)_(\w+)_(\w+)_(\w+)")  # person, device, angle, area
MAX_NAME_LETTERS = 60  # of a crop, which is 180 bytes in Hangul; some file systems allow 255
MAX_LABEL_BYTES = 2**24
MAX_WHOLE = 2**53  # from here on, a float is not exact
PER_TASK = 100  # label files that a thread reads at once


class Label(NamedTuple):
    """What one JSON file says about one area of one photograph."""

    crop: str  # name of the crop, without extension
    person: str
    device: str
    angle: str
    area: int
    about: tuple[str, ...]  # in the order of ABOUT
    photo: str  # name of the photograph
    folders: tuple[str, str]  # in which the JSON file is: device and person, as far as there are any
    box: tuple[float, float, float, float] | str  # left, top, right, bottom in pixels, or why there is none
    size: tuple[int, int] | None  # width and height of the photograph, as far as they are stated
    grades: dict[str, int | None]
    values: dict[str, float | None]


class BadLabel(Exception):
    """A JSON file that is not a label of this data set, with the reason."""


def parse_label(content: bytes, parts: Sequence[str]) -> Label:
    """content: of a JSON file; parts: its folders and its name. Raises BadLabel."""
    document = _parsed(content)
    info, images = _part(document, "info"), _part(document, "images")
    stem = unicodedata.normalize("NFC", parts[-1][: -len(LABEL)])
    match = NAME.fullmatch(stem)
    if not match or len(stem) > MAX_NAME_LETTERS:
        raise BadLabel("its name is not PERSON_DEVICE_ANGLE_AREA.json")
    person, device, angle, named_area = match.groups()
    area, photo = _whole(images.get("facepart")), info.get("filename")
    if area is None or not isinstance(photo, str) or not photo:
        raise BadLabel("it has no images.facepart" if area is None else "it has no info.filename")
    if named_area.isdecimal() and int(named_area) != area:
        raise BadLabel(f"its name has area {int(named_area)}, its images.facepart is {area}")
    size = _whole(images.get("width")), _whole(images.get("height"))
    intern = sys.intern  # there are as few of these as areas and people, but one of each in every file
    return Label(
        stem,
        intern(person),
        intern(device),
        intern(angle),
        area,
        tuple("" if info.get(key) is None else intern(printable(str(info[key]))) for key in ABOUT),
        re.split(r"[/\\]", unicodedata.normalize("NFC", photo))[-1],
        folders_of(parts),
        _box(images.get("bbox"), area),
        size if all(size) else None,
        {key: _whole(grade) for key, grade in _named(document, "annotations") if _is_grade(key)},
        {key: _number(value) for key, value in _named(document, "equipment")},
    )


def folders_of(parts: Sequence[str]) -> tuple[str, str]:
    """-> the two folders that a file is in, outer and inner, "" where there is none. parts: folders and name."""
    outer, inner = ("", "", *parts[:-1])[-2:]
    return sys.intern(unicodedata.normalize("NFC", outer)), sys.intern(unicodedata.normalize("NFC", inner))


def _parsed(content):
    try:
        try:
            document = json.loads(content)
        except UnicodeDecodeError:  # of Korean Windows
            document = json.loads(content.decode("cp949"))
    except (ValueError, RecursionError) as error:
        reason = "it is empty" if not content.strip() else "it is cut short or damaged"
        raise BadLabel(reason) from error
    if not isinstance(document, dict):
        raise BadLabel("it is not a label of this data set")
    return document


def _part(document, key):
    part = document.get(key)
    return part if isinstance(part, dict) else {}


def _named(document, part):
    """-> (name, value) of what has a name; outlines, as those of acne, are no grade."""
    pairs = ((printable(key).strip(), value) for key, value in _part(document, part).items())
    return ((sys.intern(key), value) for key, value in pairs if key and not isinstance(value, (list, dict)))


def _is_grade(key):
    return key not in FIRST_COLUMNS and not key.startswith(VALUE)


def _number(value):
    """A finite number, also written as text; None for all else, such as "Er" of an instrument."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _whole(value):
    number = _number(value)
    return int(number) if number is not None and number.is_integer() and abs(number) < MAX_WHOLE else None


def _box(values, area):
    if values is None:
        return (-math.inf, -math.inf, math.inf, math.inf) if area == WHOLE_FACE else "it has no box"
    numbers = [_number(value) for value in values] if isinstance(values, list) else []
    if len(numbers) != 4 or None in numbers:
        return "its box is not four numbers"
    left, top, right, bottom = numbers
    return min(left, right), min(top, bottom), max(left, right), max(top, bottom)


# ------------------------------------------------------------------------------------------------------------ targets


@dataclass(frozen=True)
class Target:
    """A grade, or an instrument value cut into grades at `bins`. A name without side means both sides."""

    name: str
    bins: tuple[float, ...] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """-> the names that it can have in a label."""
        return self.name, *(side + self.name for side in SIDES)

    @property
    def column(self) -> str:
        """-> its column in the table."""
        return self.name if self.bins is None else f"{VALUE}{self.name}_grade"

    def is_in(self, label: Label) -> bool:
        return not (label.grades if self.bins is None else label.values).keys().isdisjoint(self.keys)

    def of(self, label: Label) -> int | None:
        """-> the grade of a label, None if it has none."""
        found = label.grades if self.bins is None else label.values
        value = next((found[key] for key in self.keys if found.get(key) is not None), None)
        return value if self.bins is None or value is None else grade_of(value, self.bins)


def grade_of(value: float, bins: Sequence[float]) -> int:
    """-> how many of the limits the value reaches: 0 below the first. bins: ascending."""
    return sum(value >= limit for limit in bins)


@dataclass
class Found:
    """What is in the label files, the photographs, and the labels of the targets."""

    labels: dict[str, Label] = field(default_factory=dict)  # by the name of the crop
    grades: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))  # of each target; None: missing
    values: dict[str, array] = field(default_factory=lambda: defaultdict(lambda: array("d")))  # of each instrument
    missing_values: Counter = field(default_factory=Counter)
    areas: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))  # of each target and instrument
    photos: dict[str, list[Member]] = field(default_factory=lambda: defaultdict(list))  # by `photo_key`
    skipped: list[tuple[str, str, str]] = field(default_factory=list)  # label file, photograph, reason
    label_files: int = 0
    repeated: int = 0  # label files that say the same as others

    @property
    def targets(self) -> set[str]:
        """-> the names of `grades` that are a grade in any label; acne, for example, has outlines."""
        return {name for name, counter in self.grades.items() if counter.keys() - {None}}

    @property
    def instruments(self) -> set[str]:
        return {*self.values, *self.missing_values}

    def count(self, label: Label) -> None:
        for key, grade in label.grades.items():
            self.grades[key][grade] += 1
            self.areas[key].add(label.area)
        for key, value in label.values.items():
            if value is None:
                self.missing_values[key] += 1
            else:
                self.values[key].append(value)
            self.areas[key].add(label.area)


def photo_key(name: str) -> str:
    """-> a file name in composed form (NFC) and lower case."""
    return unicodedata.normalize("NFC", name).casefold()


def read_labels(archives: Archives, targets: Sequence[Target]) -> Found:
    """Read all label files, and keep the labels of the targets. Raises UserError if there are no label files.

    A label of the targets' areas that cannot be used is in `skipped`, as is each file that cannot be read.
    """
    found, members = Found(), []
    for member in archives.members():
        if member.name.lower().endswith(LABEL):
            members.append(member)
        else:
            found.photos[photo_key(member.parts[-1])].append(member)
    found.label_files = len(members)
    if not members:
        raise UserError(f"{archives.flag}: no label files ({LABEL}) in it; name the labels too, such as TL.zip")
    # label files without the targets, by area: in the targets' areas, labels are missing
    without, others, origins = defaultdict(list), defaultdict(list), {}
    for member, label in _parsed_members(archives, members):
        if isinstance(label, str):
            found.skipped.append((archives.where(member), "", label))
            continue
        found.count(label)
        if not targets:
            continue
        if not any(target.is_in(label) for target in targets):
            without[label.area].append(member)
        elif label.crop not in found.labels:
            found.labels[label.crop], origins[label.crop] = label, member
        elif label._replace(folders=("", "")) == found.labels[label.crop]._replace(folders=("", "")):
            found.repeated += 1
        else:
            others[label.crop].append(member)
    _check_targets(targets, found)
    _leave_out_unusable(found, targets, archives, without, others, origins)
    return found


def _parsed_members(archives, members):
    """Yield (member, its Label, or why it cannot be used)."""

    def parse(chunk):
        return [(member, _label_of(archives, member)) for member in chunk]

    chunks = [members[start : start + PER_TASK] for start in range(0, len(members), PER_TASK)]
    with progress_bar(None, "label files", "file", len(members)) as bar:
        for parsed in in_threads(parse, chunks):
            yield from parsed
            bar.update(len(parsed))


def _label_of(archives, member):
    try:
        return parse_label(archives.read(member, MAX_LABEL_BYTES), member.parts)
    except (BadLabel, DamagedMember) as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)


def _leave_out_unusable(found, targets, archives, without, others, origins):
    """Move labels without box, without any grade, and of which there are different ones, to `found.skipped`."""
    kind = "value" if targets and targets[0].bins is not None else "grade"
    missing = f"no {kind} of {' or '.join(target.name for target in targets)}"
    for area in {label.area for label in found.labels.values()}:
        found.skipped += [(archives.where(member), "", missing) for member in without[area]]
    for crop, label in list(found.labels.items()):
        problem = label.box if isinstance(label.box, str) else None
        if all(target.of(label) is None for target in targets):
            problem = missing
        if crop in others:
            problem = "label files of the same crop differ"
        if problem:
            members = origins[crop], *others[crop]
            found.skipped += [(archives.where(member), label.photo, problem) for member in members]
            del found.labels[crop]


def _check_targets(targets, found):
    for target in targets:
        flag, kind, known = "--target", "grade", found.targets
        if target.bins is not None:
            flag, kind, known = "--equipment", "value", found.instruments
        if not known:
            first = "; {}: {}".format(*found.skipped[0][::2]) if found.skipped else ""
            raise UserError(f"{flag}: none of the {found.label_files} label files has a {kind}{first}")
        if not any(key in known for key in target.keys):
            names = ", ".join(sorted({*known, *merged_names(known)}))
            raise UserError(f"{flag}: no label file has a {kind} of {target.name}; there are {names}")


def in_threads(function: Callable[[Any], Any], tasks: Iterable) -> Iterator[Any]:
    """Yield `function(task)` of each task in order, computed ahead by one thread per core.

    A few tasks are ahead, however many there are. If the caller leaves, no thread is waited for: its disk may never
    answer.
    """
    count = num_cores()
    pool = ThreadPoolExecutor(count)
    try:
        waiting = (pool.submit(function, task) for task in tasks)
        ahead = deque(islice(waiting, 4 * count))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(islice(waiting, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def merged_names(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """-> {name without side: its names on the left and on the right} of those that have both."""
    names = set(names)
    bases = sorted(name.removeprefix(SIDES[0]) for name in names if name.startswith(SIDES[0]))
    pairs = {base: (SIDES[0] + base, SIDES[1] + base) for base in bases}
    return {base: pair for base, pair in pairs.items() if pair[1] in names and base not in names}


def print_list(found: Found) -> None:
    """Print the targets with their counts per grade, and the instrument values with their quartiles."""
    import numpy as np

    pairs = merged_names(found.targets)
    counts = {name: found.grades[name] for name in found.targets}
    counts |= {base: found.grades[a] + found.grades[b] for base, (a, b) in pairs.items()}
    grades = sorted({grade for counter in counts.values() for grade in counter if grade is not None})
    rows = [["--target", "area", *map(str, grades), "missing"]]
    for name in sorted(counts, key=lambda name: (name in pairs, name)):
        areas = " + ".join(pairs[name]) if name in pairs else _area_names(found.areas[name])
        rows.append([name, areas, *(str(counts[name][grade] or "") for grade in (*grades, None))])
    _print_table(rows)
    rows = [["--equipment", "area", "values", "min", "25%", "50%", "75%", "max", "missing"]]
    for name in sorted(found.instruments):
        numbers, quartiles = np.array(found.values[name]), [""] * 5
        if len(numbers):
            quartiles = [f"{value:.4g}" for value in np.percentile(numbers, [0, 25, 50, 75, 100])]
        missing = str(found.missing_values[name] or "")
        rows.append([name, _area_names(found.areas[name]), str(len(numbers)), *quartiles, missing])
    if len(rows) > 1:
        print()
        _print_table(rows)


def _area_names(areas):
    return ", ".join(AREAS[area] if 0 <= area < len(AREAS) else f"area {area}" for area in sorted(areas))


def _print_table(rows):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join([*left, *right]).rstrip())
