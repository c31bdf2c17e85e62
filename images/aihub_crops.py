"""Square crops of facial areas, and the table of their labels, from AI-Hub 71645."""

import csv
import heapq
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import filelock
from PIL import Image, UnidentifiedImageError

from images.aihub import (
    FIRST_COLUMNS,
    NAME,
    SIDES,
    VALUE,
    Found,
    Label,
    Target,
    folders_of,
    grade_of,
    in_threads,
    merged_names,
    photo_key,
)
from images.archives import Archives, Member
from images.decode import image_size_limit, load_image
from images.folders import file_stat
from images.formats import HEAD_BYTES, describe_content
from run.cli import UserError, printable, progress_bar
from run.files import atomic_write, csv_writer
from run.folder import is_inside

SKIPPED_COLUMNS = ("label", "photograph", "reason")
IMAGES, TABLE, SKIPPED, LOCK = "images", "labels.csv", "skipped.csv", ".prepare_aihub.lock"
SUFFIX = ".jpg"
JPEG = {"quality": 95, "subsampling": 0}  # subsampling 0: colors at full resolution
MAX_REASONS = 8  # that are printed


class Task(NamedTuple):
    """The crops of one photograph that are to be made: (label, file of the crop)."""

    photo: Member
    crops: list[tuple[Label, Path]]


def square_box(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int] | None:
    """-> the square (left, top, right, bottom) about the center of a box, in pixels; None for a box outside.

    box: left, top, right, bottom; its part outside of the photograph of `width` x `height` pixels is cut off. The side
    of the square is the longer side of the box. The square is moved into the photograph; where it is larger, it is
    centered, and reaches out on both sides.
    """
    left, right = (round(min(max(x, 0), width)) for x in (box[0], box[2]))
    top, bottom = (round(min(max(y, 0), height)) for y in (box[1], box[3]))
    if right <= left or bottom <= top:
        return None
    side = max(right - left, bottom - top)
    corner = []
    for start, end, length in ((left, right, width), (top, bottom, height)):
        wanted = (start + end - side) // 2
        corner.append(min(max(wanted, 0), length - side) if side <= length else (length - side) // 2)
    x, y = corner
    return x, y, x + side, y + side


def is_complete(path: Path) -> bool:
    """Whether a crop is there to its end."""
    try:
        with open(path, "rb") as file:
            start = file.read(2)
            file.seek(-2, os.SEEK_END)
            return start == b"\xff\xd8" and file.read(2) == b"\xff\xd9"
    except OSError:
        return False


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Create the folder of the output, and keep other processes out of it. Raises UserError if it is in use."""
    lock = filelock.FileLock(folder / LOCK, blocking=False, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be created: {error.strerror}") from error
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise UserError(f"--output: another process is writing to {folder}; wait for it or stop it") from error
    except (OSError, NotImplementedError) as error:  # a full file system, or one without locks
        reason = getattr(error, "strerror", None) or error
        print(f"warning: --output: {folder} cannot be locked ({reason}); do not start a second command for it")
    try:
        yield
    finally:
        with suppress(OSError):  # some systems do not delete open files
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def check_output_folder(folder: Path, downloaded: Sequence[str], class_folders: bool) -> None:
    """Raise UserError if the folder is in one of those that are read, or holds what is not of this kind of output."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: {folder} is not a folder")
    for name in filter(os.path.isdir, downloaded):
        if is_inside(str(folder), name) or is_inside(str(folder / IMAGES), name):  # which may be a link
            raise UserError(f"--output: {folder} is in {name}, which is read; name a folder outside of it")
    if not folder.exists():
        return
    with os.scandir(folder) as entries:
        folders = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    others = [name for name in folders if not (re.fullmatch(r"-?\d+", name) if class_folders else name == IMAGES)]
    if class_folders and (folder / TABLE).exists():
        others.insert(0, TABLE)
    if others:
        raise UserError(
            f"--output: {folder} holds {printable(others[0])}, which is not "
            f"{'a folder of a grade' if class_folders else 'of this command'}; name another folder"
        )
    if not class_folders:
        _columns_of(folder / TABLE)
    skipped = folder / SKIPPED
    if skipped.exists() and _first_row(skipped) != [*SKIPPED_COLUMNS]:
        raise UserError(f"--output: {skipped} is not a list of this command; name another folder")


def check_class_folders(folder: Path, labels: Mapping[str, Label], target: Target) -> None:
    """Raise UserError if there are crops of another target in the folder."""
    areas = {label.area for label in labels.values()}
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        for name in os.listdir(place):
            label = labels.get(name.removesuffix(SUFFIX))
            match = NAME.fullmatch(name.removesuffix(SUFFIX))
            of_other_area = match and match[4].isdecimal() and int(match[4]) not in areas
            if of_other_area or (label and str(target.of(label)) != place.name):
                raise UserError(
                    f"--output: {place / name} is not of grade {place.name} of {target.name}; name another folder"
                )


def write_crops(archives: Archives, found: Found, folder: Path, class_target: Target | None) -> tuple[dict, int]:
    """Make the crops of `found.labels` that are not there yet. -> ({crop: its file}, how many are new)

    class_target: whose grade is the name of the folder of a crop; None for one folder for all. What cannot be made is
    added to `found.skipped`. Raises UserError if there is no room, and if there are no photographs at all.
    """
    places = {
        crop: (folder / IMAGES if class_target is None else folder / str(class_target.of(label))) / f"{crop}{SUFFIX}"
        for crop, label in found.labels.items()
    }
    made, missing = {}, {}
    for crop, path in places.items():
        (made if is_complete(path) else missing)[crop] = path
    if missing and not found.photos:
        raise UserError(f"{archives.flag}: no photographs in it; name them too, such as TS.zip")
    for place in {path.parent for path in places.values()}:
        place.mkdir(exist_ok=True)
        for stray in place.glob(".*.tmp"):  # of a process that was killed
            if re.fullmatch(rf"\..+\{SUFFIX}\.\d+\.tmp", stray.name):
                stray.unlink()
    finished, tasks = len(made), _tasks(found, missing)
    with progress_bar(None, "photographs", "photo", len(tasks)) as bar:
        for crops, problems in in_threads(lambda task: _cut(archives, task), tasks):
            made |= crops
            found.skipped += problems
            bar.update()
    return {crop: path for crop, path in places.items() if crop in made}, len(made) - finished


def _tasks(found, missing):
    """-> tasks in the order of the photographs in the archives; labels without photograph become `found.skipped`."""
    crops = defaultdict(list)
    for crop, path in missing.items():
        label = found.labels[crop]
        photo = _photo_of(label, found.photos.get(photo_key(label.photo), ()))
        if isinstance(photo, str):
            found.skipped.append((f"{crop}.json", label.photo, photo))
        else:
            crops[photo].append((label, path))
    return [Task(photo, crops[photo]) for photo in sorted(crops, key=lambda photo: (photo.archive, photo.offset))]


def _photo_of(label, members):
    """-> the photograph of a label among those with its name, or why there is none."""
    outer, inner = label.folders
    candidates = [(member, folders_of(member.parts)) for member in members]
    # a name such as F.jpg is the same in the folder of each person
    named = label.photo.startswith(f"{label.person}_")
    candidates = [c for c in candidates if named or c[1][1] in (inner, label.person)]
    for closer in (lambda c: c[1][1] in (inner, label.person), lambda c: c[1][0] == outer):
        candidates = list(filter(closer, candidates)) or candidates
    if not candidates:
        return "there is no such photograph"
    if len({_size(member) for member, _ in candidates}) > 1:
        return "there are different photographs of this name"
    return candidates[0][0]


def _size(member):
    return member.size if member.archive >= 0 else file_stat(member.name)[0]


def _cut(archives, task):
    """Make the crops of one photograph. -> ({crop: its file}, what was skipped). Raises UserError if one cannot be
    written."""
    content = b""
    try:
        content = archives.read(task.photo)
        photograph = load_image(content)
    except Exception as error:  # whatever the decoder raises is the reason in the list
        reason = _reason(error, content)
        return {}, [_skipped(label, reason) for label, _ in task.crops]
    made, problems = {}, []
    for label, path in task.crops:
        square = square_box(label.box, *photograph.size)
        if label.size and label.size != photograph.size:
            stated, actual = ("{} x {}".format(*size) for size in (label.size, photograph.size))
            problems.append(_skipped(label, f"its label is for {stated} pixels, upright it has {actual}"))
        elif square is None:
            problems.append(_skipped(label, "its box is outside the photograph"))
        else:
            _write_crop(photograph, square, path)
            made[label.crop] = path
    return made, problems


def _skipped(label, reason):
    return f"{label.crop}.json", label.photo, reason


def _reason(error, content):
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"larger than {image_size_limit():g} megapixels"
    if isinstance(error, UnidentifiedImageError):
        kind = describe_content(content[:HEAD_BYTES], len(content)) or "not an image"
        return f"it is {kind}" if content else "empty file"
    return getattr(error, "strerror", None) or str(error) or repr(error)


def _write_crop(photograph, square, path):
    crop = photograph.crop(square)  # black outside of the photograph
    try:
        with atomic_write(path, "wb") as file:
            crop.save(file, "JPEG", **JPEG)
    except OSError as error:
        raise UserError(
            f"--output: {path} cannot be written: {error.strerror or error}; the same command makes what is missing"
        ) from error


# -------------------------------------------------------------------------------------------------------------- tables


def write_table(found: Found, crops: Mapping[str, Path], folder: Path, targets: Sequence[Target]) -> list[int]:
    """Write the labels of `crops`, and those of earlier commands whose crops are there.

    -> of each target, how many rows have no grade. Raises UserError if the table there is not of this command.
    """
    known = {"": found.targets, VALUE: found.instruments}  # by the prefix of their columns
    asked = {"": [t.name for t in targets if not t.bins], VALUE: [t.name for t in targets if t.bins]}
    sides = {prefix: _sides(known[prefix], asked[prefix]) for prefix in known}
    columns = [*FIRST_COLUMNS, *(p + name for p in known for name in sorted(known[p] | sides[p].keys()))]
    columns += [target.column for target in targets if target.bins]
    others = set(os.listdir(folder / IMAGES)) - {path.name for path in crops.values()}
    columns += [name for name in _columns_of(folder / TABLE) if name not in columns]
    missing = [0] * len(targets)
    with atomic_write(folder / TABLE) as file:
        writer = csv_writer(file)
        writer.writerow(columns)
        new = (_row(found.labels[crop], image, sides) for image, crop in sorted((crops[c].name, c) for c in crops))
        earlier = _rows_of(folder / TABLE, others)
        for row in heapq.merge(new, earlier, key=lambda row: row["image"]):
            for i, target in enumerate(targets):
                if target.bins:  # of all rows, by the same limits
                    value = row.get(VALUE + target.name, "")
                    try:
                        row[target.column] = "" if value == "" else grade_of(float(value), target.bins)
                    except ValueError as error:
                        raise _changed(folder / TABLE, f"{VALUE}{target.name} of {row['image']} is {value}") from error
                missing[i] += row.get(target.column, "") == ""
            writer.writerow([row.get(column, "") for column in columns])
    return missing


def _sides(known, asked):
    """-> {name without side: the two names with sides} of what has both, and of what is asked for without side."""
    return merged_names(known) | {name: tuple(side + name for side in SIDES) for name in asked if name not in known}


def _row(label, image, sides):
    """-> {column: value}; a name without side has the value of the side that there is."""
    row = dict(zip(FIRST_COLUMNS, (image, *label[1:5], *label.about), strict=True))
    for prefix, values in (("", label.grades), (VALUE, label.values)):
        row |= {prefix + key: _text(value) for key, value in values.items()}
        for name, pair in sides[prefix].items():
            row[prefix + name] = next((_text(values[key]) for key in pair if values.get(key) is not None), "")
    return row


def _text(value):
    return "" if value is None else int(value) if value == int(value) else value


def _columns_of(table):
    """-> the columns of the table that is there. Raises UserError if it is not of this command."""
    if not table.exists():
        return []
    columns = _first_row(table)
    if not {*FIRST_COLUMNS} <= {*columns}:
        raise UserError(
            f"--output: {table} is not a table of this command, or another program has changed it; name another folder"
        )
    return columns


def _first_row(path):
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file, suppress(csv.Error):
        return next(csv.reader(file), [])
    return []


def _rows_of(table, images):
    """Yield the rows of some images of the table that is there. Raises UserError if their persons are not those of the
    images: Excel makes 1 of 0001, which would be another person in later rows."""
    if images and table.exists():
        with open(table, encoding="utf-8", errors="surrogateescape", newline="") as file:
            for row in csv.DictReader(file):
                if row["image"] in images:
                    match = NAME.fullmatch(row["image"].removesuffix(SUFFIX))
                    if match and match[1] != row["person_id"]:
                        raise _changed(table, f"person_id of {row['image']} is {row['person_id']}")
                    yield row


def _changed(table, what):
    return UserError(
        f"--output: another program has changed {table} ({what}); delete it, and repeat the commands of all its targets"
    )


def write_skipped(skipped: Sequence[tuple[str, str, str]], folder: Path) -> None:
    """List the labels that have no crop, and why; delete an earlier list if there are none."""
    if not skipped:
        (folder / SKIPPED).unlink(missing_ok=True)
        return
    with atomic_write(folder / SKIPPED) as file:
        writer = csv_writer(file)
        writer.writerow(SKIPPED_COLUMNS)
        writer.writerows(sorted(skipped))


def count_reasons(skipped: Sequence[tuple[str, str, str]]) -> str:
    """-> the most frequent reasons in one line."""
    # "image file is truncated (10 bytes not processed)" and the like are one reason
    counts = Counter(re.sub(r" \(.*\)$", "", reason) for _, _, reason in skipped).most_common()
    listed = "; ".join(f"{reason}: {count}" for reason, count in counts[:MAX_REASONS])
    return printable(listed) + ("; ..." if len(counts) > MAX_REASONS else "")
