"""Training, validation and test images: how they are split, and how the split of a checkpoint is found again."""

import argparse
import itertools
import os
import socket
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from flag_queries import data_folders
from flags import SPLITS
from images.cache import open_cache, read_all
from images.classes import ClassNames
from images.folders import ImageIndex, check_duplicates, file_stat, index_folders
from images.labels import check_columns, index_table, photographs_below, read_labelled
from images.layout import SPLIT_NAMES
from images.leakage import check_subjects, subjects_of, warn_of_grouped_names, warn_of_nameless_subjects
from images.table_state import with_table
from run.cli import UserError, printable
from run.ranks import from_first, from_first_here, is_on_first_machine
from utils import class_balanced_weights, effective_number

MAX_DENOMINATOR = 10  # subjects stay together: a share of --split is made up of at most this many folds
MAX_DRAWS = 10  # of subjects; the first is nearly always enough
MAX_LISTED = 100  # lost images
ALL_FOLDERS = "--data_dirs / --val_dirs / --test_dirs"


def make_splits(args: argparse.Namespace, skip_broken: bool = False) -> dict[str, ImageIndex]:
    """Index the class folders, check every image, split. -> {"train", "val", "test": ImageIndex}.

    skip_broken: leave out images that cannot be read, also without the flag of that name. Raises UserError for class
    folders, images or flags of which no such splits can be made.
    """
    index, separate = read_labelled(args) if args.labels else _read_class_folders(args)
    check_columns(args.subgroup_columns, index)
    every_path = itertools.chain(index.paths, *(source.paths for source in separate.values()))
    check_duplicates(every_path, ALL_FOLDERS)
    separate = read_all({"data": index, **separate}, open_cache(args), args.skip_broken or skip_broken)
    index = separate.pop("data")
    warn_of_nameless_subjects(index)
    subjects = subjects_of(index, args.group_regex)
    if args.folds:
        folds = fold_splits(index, args.folds, args.split, args.seed, subjects)
        for splits in folds:  # all of them, so that the last fold does not fail after days
            check_classes_in_splits(splits, args.split, args.folds)
        splits = folds[args.fold]
    else:
        splits = stratified_split(index, args.split, args.seed, separate, subjects)
        print_sources(args)
    splits = {split: {**splits, **separate}[split] for split in SPLITS}
    check_classes_in_splits(splits, args.split)
    if subjects is not None:
        check_subjects(splits, args.group_regex)
    else:
        warn_of_grouped_names(index.paths)
    return splits


def index_data(args: argparse.Namespace) -> ImageIndex:
    """The images of `--data_dirs`, with the labels of `--labels` or of their folders."""
    if args.labels:
        return index_table(args, args.data_dirs, "--data_dirs")[0]
    return index_folders(args.data_dirs, names=ClassNames(args.merge, args.drop))


def _read_class_folders(args):
    """-> (index of --data_dirs, {split: index of its own folders})"""
    names = ClassNames(args.merge, args.drop)
    index = index_folders(args.data_dirs, names=names)
    return index, {
        split: index_folders(getattr(args, f"{split}_dirs"), index.classes, f"--{split}_dirs", names=names)
        for split in ("val", "test")
        if getattr(args, f"{split}_dirs")
    }


def on_all_ranks(read: Callable[[], dict[str, ImageIndex]], args: argparse.Namespace) -> dict[str, ImageIndex]:
    """-> on every rank, the splits that `read()` returns on the first; each machine has its own cache of the images.

    Raises UserError if a machine has another file in the place of an image.
    """
    splits = from_first(read, "reads the images")

    def read_here():
        if is_on_first_machine():
            return None  # its ranks have them
        here = read_all(splits, open_cache(args), skip_broken=False)
        for split, index in splits.items():
            for i in np.flatnonzero(here[split].sizes != index.sizes)[:1]:
                raise UserError(f"{index.paths[i]} on {socket.gethostname()} is not the file of the first machine")
        return here

    return from_first_here(read_here, "reads the images") or splits


def print_sources(args: argparse.Namespace) -> None:
    """Print a line with the folders of each split, unless all are split off from ordinary class folders."""
    if args.labels:  # which says what it has published
        return
    sources = {split: getattr(args, f"{split}_dirs") for split in ("val", "test") if getattr(args, f"{split}_dirs")}
    if not sources and not any(os.path.basename(folder).casefold() in SPLIT_NAMES for folder in args.data_dirs):
        return
    shares = {split: share for split, share in zip(SPLITS, args.split, strict=True) if split not in sources}
    total = sum(shares.values())
    if len(shares) > 1:
        of_train = ", ".join(f"{split} {share / total:.0%}" for split, share in shares.items()) + " of"
    else:
        of_train = "train from"
    lines = [f"{of_train} {' '.join(args.data_dirs)}"]
    lines += [f"{split} from {' '.join(folders)}" for split, folders in sources.items()]
    print(f"splits: {'; '.join(lines)}")


def print_class_table(splits: dict[str, ImageIndex], args: argparse.Namespace) -> None:
    """Print one line per class: images per split, share, effective number, and weight in a Class-Balanced loss.

    The last three are of the training split. A class of `--merge` is followed by what was merged. If there are
    subjects, a last line has their number per split.
    """
    beta, merged = args.beta, ClassNames(args.merge, args.drop).merged()
    counts = {split: index.counts() for split, index in splits.items()}
    train = counts["train"]
    shares, effective, weights = train / train.sum(), effective_number(train, beta), class_balanced_weights(train, beta)
    print(f"{'class':>16} {'train':>7} {'val':>7} {'test':>7} {'share':>7} {'effective':>10} {'weight':>7}")
    for i, name in enumerate(splits["train"].classes):
        images = " ".join(f"{counts[split][i]:7d}" for split in SPLITS)
        of = f"  ({' + '.join(map(printable, merged[name]))})" if name in merged else ""
        print(f"{printable(name):>16} {images} {shares[i]:7.1%} {effective[i]:10.1f} {weights[i]:7.3f}{of}")
    totals = " ".join(f"{counts[split].sum():7d}" for split in SPLITS)
    print(f"{'all':>16} {totals} (effective number and Class-Balanced weight at beta {beta:g})")
    subjects = {split: subjects_of(splits[split], args.group_regex) for split in SPLITS}
    if subjects["train"] is not None:
        subjects = (len(np.unique(numbers)) for numbers in subjects.values())
        print(f"{'subjects':>16} {' '.join(f'{number:7d}' for number in subjects)}")


def paths_by_split(splits: dict[str, ImageIndex]) -> dict[str, list[str]]:
    return {split: list(index.paths) for split, index in splits.items()}


def stratified_split(
    index: ImageIndex,
    shares: Sequence[float],
    seed: int,
    separate: Collection[str] = (),
    subjects: np.ndarray | None = None,
) -> dict[str, ImageIndex]:
    """Split an index, with the same shares of every class -> {split: ImageIndex} without the splits in `separate`.

    shares: of train, val and test; those of `separate` are divided among the others. subjects: (N,) int; the images of
    a subject stay together. A class that is too small may be missing in a split: see `check_classes_in_splits`.
    """
    names = [split for split in SPLITS if split not in separate]
    shares = [share for split, share in zip(SPLITS, shares, strict=True) if split in names]

    def draw(seed):
        rest, parts, share_left = np.arange(len(index)), [], sum(shares)
        for share in reversed(shares[1:]):
            rest, chosen = _take_share(rest, share / share_left, index.targets, subjects, seed)
            parts.insert(0, chosen)
            share_left -= share
        return [_mended([rest, *parts], index.targets, subjects)]

    (parts,) = _first_complete(draw, index, subjects, seed)
    return {split: index.subset(part) for split, part in zip(names, parts, strict=True)}


def fold_splits(
    index: ImageIndex, folds: int, shares: Sequence[float], seed: int, subjects: np.ndarray | None = None
) -> list[dict[str, ImageIndex]]:
    """Cross-validation -> one {split: ImageIndex} per fold.

    Each fold is the test split once; the rest is divided between train and val in the proportion of their `shares`.
    subjects: as in `stratified_split`.
    """
    everything, targets, val_share = np.arange(len(index)), index.targets, shares[1] / (shares[0] + shares[1])

    def draw(seed):
        result = []
        for test in _mended(_folds(everything, folds, targets, subjects, seed), targets, subjects):
            rest = _take_share(np.setdiff1d(everything, test), val_share, targets, subjects, seed)
            result.append([*_mended(rest, targets, subjects), test])
        return result

    drawn = _first_complete(draw, index, subjects, seed)
    return [{split: index.subset(part) for split, part in zip(SPLITS, parts, strict=True)} for parts in drawn]


def _first_complete(draw: Callable[[int], list[Sequence[np.ndarray]]], index, subjects, seed):
    """The first draw, by seeds derived from `seed`, with every class in every part; else the last one. Without subjects
    another draw would be the same in this."""
    for number in range(MAX_DRAWS if subjects is not None else 1):
        drawn = draw((seed + number * 1_000_003) % 2**32)
        if all(len(np.unique(index.targets[part])) == len(index.classes) for parts in drawn for part in parts):
            break
    return drawn


def _mended(parts, targets, subjects):
    """Move single subjects, those with the fewest images first, into parts that lack their class, from parts that
    lack nothing without them: subjects are drawn whole, so that a rare class can be missing. -> the parts, sorted"""
    num_classes = len(np.unique(targets))
    if subjects is None or all(len(np.unique(targets[part])) == num_classes for part in parts):
        return parts
    part_of = {subject: number for number, part in enumerate(parts) for subject in np.unique(subjects[part]).tolist()}
    positions = np.concatenate(parts)
    pairs = np.unique(np.stack([subjects[positions], targets[positions]]), axis=1).T.tolist()
    images, classes_of, subjects_of_class = Counter(subjects[positions].tolist()), defaultdict(list), defaultdict(list)
    count = Counter()  # of (part, class): subjects
    for subject, c in sorted(pairs, key=lambda pair: images[pair[0]]):
        classes_of[subject].append(c)
        subjects_of_class[c].append(subject)
        count[part_of[subject], c] += 1
    for number, c in itertools.product(range(len(parts)), subjects_of_class):
        for subject in subjects_of_class[c]:
            donor = part_of[subject]
            if count[number, c]:
                break
            if all(count[donor, other] > 1 for other in classes_of[subject]):
                part_of[subject] = number
                count.subtract((donor, other) for other in classes_of[subject])
                count.update((number, other) for other in classes_of[subject])
    numbers = np.array([part_of[subject] for subject in subjects[positions].tolist()])
    return [np.sort(positions[numbers == number]) for number in range(len(parts))]


def _take_share(positions, share, targets, subjects, seed):
    """Choose `share` of the positions, and of each class -> (the rest, the chosen), both sorted."""
    from sklearn.model_selection import train_test_split  # takes a second to import; a resumed run does not split

    if subjects is None:
        try:
            rest, chosen = train_test_split(positions, test_size=share, stratify=targets[positions], random_state=seed)
        except ValueError:  # a class with one image left, or fewer images than classes: too small
            return positions, positions[:0]
        return np.sort(rest), np.sort(chosen)
    # as many folds as make up the share, or nearly
    parts = Fraction(share).limit_denominator(MAX_DENOMINATOR)
    if parts in (0, 1):
        parts = abs(parts - Fraction(1, round(1 / min(share, 1 - share))))
    folds = _folds(positions, parts.denominator, targets, subjects, seed)
    chosen = np.sort(np.concatenate(folds[: parts.numerator]))
    return np.setdiff1d(positions, chosen), chosen


def _folds(positions, folds, targets, subjects, seed):
    """-> `folds` sorted arrays with the same share of each class. Subjects stay together, so shares may be uneven."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    splitter_type = StratifiedKFold if subjects is None else StratifiedGroupKFold
    groups = None if subjects is None else subjects[positions]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about small classes, which are checked afterwards
        try:
            splitter = splitter_type(folds, shuffle=True, random_state=seed)
            drawn = list(splitter.split(positions, targets[positions], groups))
        except ValueError as error:
            few = "images" if subjects is None else "images or subjects"
            flags = "--folds / --split / --group_regex / --subject_column"
            raise UserError(f"{flags}: too few {few} for {folds} folds ({error})") from error
    return [positions[chosen] for _, chosen in drawn]


def check_classes_in_splits(splits: dict[str, ImageIndex], shares: Sequence[float], folds: int | None = None) -> None:
    """Raise UserError, naming the class and its counts, unless every split has an image of every class.

    shares: of `--split`; folds: the value of `--folds` if `splits` are of one of its folds.
    """
    counts = {split: index.counts() for split, index in splits.items()}
    totals = sum(counts.values())
    for i in np.argsort(totals, kind="stable"):
        if any(count[i] == 0 for count in counts.values()):
            if folds:
                flag, target, advice = "--folds", f"{folds} folds", "or use fewer folds"
            else:
                flag, target = "--split", f"shares of {' '.join(f'{share:g}' for share in shares)}"
                advice = "change the shares, or pass --val_dirs / --test_dirs"
            numbers = ", ".join(f"{split} {count[i]}" for split, count in counts.items())
            raise UserError(
                f"{flag}: class {splits['train'].classes[i]!r} has too few images ({totals[i]}), or images of too few "
                f"subjects, for {target}: {numbers}; every split needs at least one: add images, {advice}"
            )


def find_images(
    checkpoint: dict[str, Any], names: Collection[str], flags: dict[str, Any]
) -> tuple[dict[str, ImageIndex], int]:
    """Find the images of the checkpoint's splits `names` in the folders of `flags`.

    -> ({split: ImageIndex}, how many other images the folders contain). Raises UserError as `restore_split` does.
    """
    folders = data_folders(flags)
    index = index_of_checkpoint(checkpoint, flags)
    paths, sizes = ({split: checkpoint[key][split] for split in names} for key in ("splits", "file_sizes"))
    splits = restore_split(index, paths, sizes, folders, data_folders(checkpoint["args"]))
    splits = with_table(splits, checkpoint)
    return splits, len(index) - sum(map(len, splits.values()))


def index_of_checkpoint(
    checkpoint: dict[str, Any], flags: dict[str, Any], flag: str = ALL_FOLDERS, allow_missing: bool = False
) -> ImageIndex:
    """The images in the folders of `flags`. If the labels were those of a table, `with_table` adds them."""
    folders, classes = data_folders(flags), checkpoint["classes"]
    if checkpoint["table"]:
        paths = photographs_below(folders, flag)
        return ImageIndex(paths, np.zeros(len(paths), np.int64), classes)
    names = ClassNames(flags.get("merge"), flags.get("drop"))
    return index_folders(folders, classes, flag, allow_missing, names)


def restore_split(
    index: ImageIndex,
    paths: dict[str, list[str]],
    sizes: dict[str, list[int]],
    folders: Sequence[str],
    previous_folders: Sequence[str],
) -> dict[str, ImageIndex]:
    """Find the images of a checkpoint's splits again, also if their folders have been moved.

    An image is identified by its path below its folder and by its size, a folder by its images; if several folders hold
    the same images, the position among `folders` decides. paths, sizes: per split, the checkpoint's image paths
    and file sizes in bytes; previous_folders: the data folders of the checkpoint's run. Raises UserError if an image is
    missing or has changed, after listing all of these.
    """
    position_at = {_locate(path, folders): i for i, path in enumerate(index.paths)}
    places = {split: [_locate(path, previous_folders) for path in split_paths] for split, split_paths in paths.items()}
    size_at = [file_stat(path)[0] for path in index.paths]
    matches = Counter()
    for split, split_places in places.items():
        for (previous, relative), size in zip(split_places, sizes[split], strict=True):
            for new in range(len(folders)):
                position = position_at.get((new, relative))
                matches[previous, new] += position is not None and size_at[position] == size
    new_folder = {
        previous: max(range(len(folders)), key=lambda new, previous=previous: (matches[previous, new], new == previous))
        for previous in {previous for previous, _ in matches}
    }
    positions, lost = {split: [] for split in paths}, []
    for split, split_places in places.items():
        for path, (previous, relative), size in zip(paths[split], split_places, sizes[split], strict=True):
            position = position_at.get((new_folder[previous], relative))
            if position is None:
                lost.append(f"missing: {path}")
            elif size_at[position] != size:
                lost.append(f"changed: {index.paths[position]}")
            else:
                positions[split].append(position)
    _refuse_lost_images(lost, sum(map(len, paths.values())))
    return {split: index.subset(chosen) for split, chosen in positions.items()}


def _locate(path, folders):
    """-> (number of the folder that contains `path`, path below it). Names are compared in composed form (NFC)."""
    prefixes = [os.path.join(folder, "") for folder in folders]
    containing = [number for number, prefix in enumerate(prefixes) if path.startswith(prefix)]
    if not containing:
        return -1, path
    number = max(containing, key=lambda number: len(prefixes[number]))
    return number, unicodedata.normalize("NFC", path[len(prefixes[number]) :])


def _refuse_lost_images(lost, total):
    for line in lost[:MAX_LISTED]:
        print(line)
    if len(lost) > MAX_LISTED:
        print(f"... and {len(lost) - MAX_LISTED} more")
    if lost:
        raise UserError(
            f"--resume: {len(lost)} of {total} images of the checkpoint's splits are missing or have changed (listed "
            f"above, starting with {lost[0]}); restore them, or pass their new location with --data_dirs"
        )


def check_folders_used(splits: dict[str, ImageIndex], folders: Sequence[str]) -> None:
    """Raise UserError if one of `folders` has no image of the splits: a resumed run keeps its splits, it adds none."""
    used = {_locate(path, folders)[0] for index in splits.values() for path in index.paths}
    for number, folder in enumerate(folders):
        if number not in used:
            raise UserError(
                f"--data_dirs: no image of the checkpoint's splits is in {folder}; a resumed run keeps its splits: "
                "start a new run to add images"
            )
