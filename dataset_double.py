"""Class folders -> index -> splits -> data sets -> augmentation -> loaders.

An image is a (H, W, 3) uint8 RGB array until the loader hands batches of (N, 3, H, W) uint8 to the model, which
normalises them on its own device.
"""

import atexit
import functools
import itertools
import math
import multiprocessing
import os
import re
import signal
import sys
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, train_test_split
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from files import UserError
from image_cache import ImageCache, Paths, image_size_limit, limit_image_size, read_image, stat_of

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
PARTS = ("train", "val", "test")
MOST_FOLDS_A_SPLIT = 10  # which the shares of --split are made up of, where groups stay together
MOST_DRAWS_A_SPLIT = 50  # of groups, until each class is in each part
MOST_LISTED = 100  # lines about images that are lost

# each loader worker and each scanning thread handles an image of its own: threads inside OpenCV would only fight them
cv2.setNumThreads(0)


# ------------------------------------------------------------------------------------------ class folders -> index


@dataclass
class ImageIndex:
    """Which image belongs to which class, and where its pixels are.

    paths: N strings; targets: (N,) int64 into `classes`; rows: (N,) int64 into the cache, -1 (the default) for an image
    that is not in it and is decoded whenever it is used; sizes: (N,) int64, bytes of the files, -1 where not known.
    """

    paths: Paths | list
    targets: np.ndarray
    classes: list
    rows: np.ndarray | None = None
    cache: ImageCache | None = None
    sizes: np.ndarray | None = None

    def __post_init__(self):
        if not isinstance(self.paths, Paths):
            self.paths = Paths(self.paths)
        if self.rows is None:
            self.rows = np.full(len(self.paths), -1)
        if self.sizes is None:
            self.sizes = np.full(len(self.paths), -1)

    def subset(self, positions):
        """positions: (n,) int array or list."""
        positions = np.asarray(positions, dtype=np.int64)
        rows, sizes = self.rows[positions], self.sizes[positions]
        return ImageIndex(self.paths[positions], self.targets[positions], self.classes, rows, self.cache, sizes)

    def counts(self):
        """-> (C,) int64: images a class."""
        return np.bincount(self.targets, minlength=len(self.classes))

    def __len__(self):
        return len(self.paths)


def natural_key(name):
    """Sort key under which "2" comes before "10", and numbers before letters."""
    pieces = [piece for piece in re.split(r"(\d+)", name) if piece]
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in pieces]


def index_folders(folders, classes=None, flag="--data_dirs", allow_missing=False):
    """Merge class folders (`folder/CLASS/**/image`) of several places class by class -> ImageIndex.

    Hidden files and folders are passed over. `classes`: the only classes there may be (those of the training images
    or of a checkpoint); all must be there unless `allow_missing`. Raises UserError if the folders hold anything else.
    """
    found, ignored = {}, Counter()
    for folder in folders:
        for name, class_folder in _class_folders(folder, flag):
            images = found.setdefault(name, [])
            for path in _files_below(class_folder):
                suffix = os.path.splitext(path)[1].lower()
                if suffix in IMAGE_EXTENSIONS:
                    images.append(path)
                else:
                    ignored[suffix or "no ending"] += 1
    if ignored:
        kinds = ", ".join(f"{kind} {count}" for kind, count in ignored.most_common(5))
        print(f"{flag}: left out {sum(ignored.values())} files that are no images by their ending ({kinds})")
    names = sorted(found, key=natural_key)
    _check_classes(names, found, folders, classes, flag, allow_missing)
    names = list(classes) if classes is not None else names
    paths = [path for name in names for path in found.get(name, [])]
    targets = np.repeat(np.arange(len(names)), [len(found.get(name, [])) for name in names])
    return ImageIndex(paths, targets, names)


def _class_folders(folder, flag):
    """-> [(class name, its folder)] of one data folder. Names are compared composed (NFC), as macOS decomposes them."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{flag}: {folder} is not a folder" if folder.exists() else f"{flag}: no folder {folder}")
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    class_folders = [(unicodedata.normalize("NFC", entry.name), entry) for entry in entries if entry.is_dir()]
    loose = sum(entry.suffix.lower() in IMAGE_EXTENSIONS for entry in entries if entry.is_file())
    if not class_folders:
        what = "holds images, not class folders: give the folder above it" if loose else "holds no class folders"
        raise UserError(f"{flag}: {folder} {what} (wanted: {folder}/CLASS/image.jpg)")
    if loose:
        print(f"{flag}: left out {loose} images that lie in {folder} itself, outside the class folders")
    return sorted(class_folders)


def _files_below(folder):
    """Every file below `folder` in a fixed order, links followed, each folder entered once (a link may lead back)."""

    def refuse(error):  # os.walk would pass over a folder that it may not read
        raise error

    files, entered = [], set()
    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real_place = os.path.realpath(place)
        if real_place in entered:
            subfolders.clear()
            continue
        entered.add(real_place)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [f"{place}{os.sep}{name}" for name in sorted(names) if not name.startswith(".")]
    return files


def _check_classes(names, found, folders, classes, flag, allow_missing):
    where = " ".join(map(str, folders))
    empty = [name for name in names if not found[name]]
    if classes is not None:
        unknown = [name for name in names if name not in classes]
        if unknown:
            raise UserError(f"{flag}: class {unknown[0]!r} in {where} is none of the classes {', '.join(classes)}")
        absent = [name for name in classes if not found.get(name)]
        if absent and not allow_missing:
            raise UserError(f"{flag}: class {absent[0]!r} has no image in {where}; every class needs one in each part")
    elif empty:
        raise UserError(f"{flag}: class {empty[0]!r} has no image in {where}; add images or remove the folder")
    elif len(names) < 2:
        raise UserError(f"{flag}: only one class, {names[0]!r}, in {where}; a classifier needs two or more")
    if not any(found.values()):
        raise UserError(f"{flag}: no image in {where}")


def check_doubles(paths, flag):
    """Raise UserError if an image is in `paths` twice, also by a link: it could land in training and test."""
    seen, real_folders = set(), {}
    for path in paths:
        folder, _, name = path.rpartition(os.sep)
        if folder not in real_folders:
            real_folders[folder] = os.path.realpath(folder)
        real_path = os.path.realpath(path) if os.path.islink(path) else f"{real_folders[folder]}{os.sep}{name}"
        if real_path in seen:
            raise UserError(f"{flag}: {path} is there twice; give each folder only once")
        seen.add(real_path)


def read_all(indexes, cache, skip_broken):
    """Decode every image of {name: ImageIndex} once, into the cache if it is not there yet. -> the same indexes, with
    the images' rows in the cache and without the broken ones.

    Those are listed by path with the reason. Raises UserError if there are any, unless `skip_broken`.
    """
    paths = sum((index.paths for index in indexes.values()), Paths())
    stats = np.array([stat_of(path) for path in paths], dtype=np.int64).reshape(-1, 3)
    rows, reasons = cache.fill(paths, stats)
    broken = [(paths[i], reason) for i, reason in sorted(reasons.items())]
    for path, reason in broken:
        print(f"broken: {path}: {reason}")
    if broken and not skip_broken:
        more = f", and {len(broken) - 1} more (listed above)" if len(broken) > 1 else ""
        raise UserError(
            f"{broken[0][0]} cannot be read: {broken[0][1]}{more}; mend or remove, or leave out with --skip_broken"
        )
    whole, start = {}, 0
    for name, index in indexes.items():
        kept = [i for i in range(len(index)) if start + i not in reasons]
        own = slice(start, start + len(index))
        cached = replace(index, rows=rows[own], cache=cache, sizes=stats[own, 0].copy())
        whole[name] = cached.subset(kept) if len(kept) < len(index) else cached
        start += len(index)
    if not all(map(len, whole.values())):
        raise UserError(f"{broken[0][0]} cannot be read, nor any other image beside it")
    return whole


# ---------------------------------------------------------------------------------------------------------- splits


def check_fractions(fractions, separate):
    """Raise UserError unless `--split` sums to 1 and gives images to each part that has no folders of its own.

    separate: the parts ("val", "test") that do.
    """
    text = " ".join(f"{fraction:g}" for fraction in fractions)
    if abs(sum(fractions) - 1) > 1e-6 or min(fractions) < 0:
        raise UserError(f"--split: {text} does not sum to 1 (train val test, for example 0.6 0.2 0.2)")
    for part, fraction in zip(PARTS, fractions, strict=True):
        if fraction == 0 and part not in separate:
            raise UserError(f"--split: {text} leaves no images for {part}")


def stratified_split(index, fractions, seed, separate=(), groups=None):
    """Split an index by class shares -> {part: ImageIndex} for the parts that are not in `separate`.

    fractions: of train, val, test; those of `separate` parts are shared out among the rest. groups: (N,) int, images of
    one stay together. A class that is too small may miss in a part: see `check_every_class_in_every_part`.
    """
    draws = _draws(index, groups, len(PARTS) - len(separate))
    (parts,) = _first_complete(lambda seed: [_shares(index, fractions, seed, separate, groups)], seed, draws)
    return parts


def fold_splits(index, folds, fractions, seed, groups=None):
    """-> [{part: ImageIndex} a fold]: each fold is the test once, the rest is split as `fractions` has train to val."""
    everything, val_share = np.arange(len(index)), fractions[1] / (fractions[0] + fractions[1])

    def draw(seed):
        splits = []
        for chosen in _folds(everything, folds, index.targets, groups, seed):
            rest, val = _take_share(np.setdiff1d(everything, chosen), val_share, index.targets, groups, seed)
            splits.append({"train": index.subset(rest), "val": index.subset(val), "test": index.subset(chosen)})
        return splits

    return _first_complete(draw, seed, _draws(index, groups, max(folds, len(PARTS))))


def _draws(index, groups, parts):
    """How often to draw: of classes with fewer groups than `parts` no split has one in each, without groups any has."""
    if groups is None:
        return 1
    fewest = min(len(np.unique(groups[index.targets == c])) for c in range(len(index.classes)))
    return MOST_DRAWS_A_SPLIT if fewest >= parts else 1


def _first_complete(draw, seed, draws):
    """Of `draws` splits by seeds derived from `seed`, the first with each class in each part, else the last."""
    for number in range(draws):
        splits = draw((seed + number * 1_000_003) % 2**32)
        if all(part.counts().all() for parts in splits for part in parts.values()):
            break
    return splits


def _shares(index, fractions, seed, separate, groups):
    wanted = [(part, fraction) for part, fraction in zip(PARTS, fractions, strict=True) if part not in separate]
    rest, parts = np.arange(len(index)), {}
    share_left = sum(fraction for _, fraction in wanted)
    for part, fraction in reversed(wanted[1:]):
        rest, chosen = _take_share(rest, fraction / share_left, index.targets, groups, seed)
        parts[part] = index.subset(chosen)
        share_left -= fraction
    parts["train"] = index.subset(rest)
    return parts


def _take_share(positions, share, targets, groups, seed):
    """-> (what is left, what is chosen), sorted: `share` of the positions, of each class alike."""
    if groups is None:
        try:
            rest, chosen = train_test_split(positions, test_size=share, stratify=targets[positions], random_state=seed)
        except ValueError:  # a class with one image left, or fewer images than classes: too small
            return positions, positions[:0]
        return np.sort(rest), np.sort(chosen)
    # as many folds as make up the share, or nearly
    parts = Fraction(share).limit_denominator(MOST_FOLDS_A_SPLIT)
    if parts in (0, 1):
        parts = abs(parts - Fraction(1, round(1 / min(share, 1 - share))))
    folds = _folds(positions, parts.denominator, targets, groups, seed)
    chosen = np.sort(np.concatenate(folds[: parts.numerator]))
    return np.setdiff1d(positions, chosen), chosen


def _folds(positions, folds, targets, groups, seed):
    """-> `folds` sorted arrays, of each class alike. Groups stay together, which may leave class shares uneven."""
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of small classes, which are checked afterwards
        try:
            splitter = kind(folds, shuffle=True, random_state=seed)
            split = list(splitter.split(positions, targets[positions], None if groups is None else groups[positions]))
        except ValueError as error:
            few = "images" if groups is None else "images or persons"
            raise UserError(f"--folds / --split / --group_regex: too few {few} for {folds} folds ({error})") from error
    return [positions[chosen] for _, chosen in split]


def check_every_class_in_every_part(parts, fractions, folds=None):
    """Raise UserError, naming the class and its numbers, unless each class has an image in each part.

    fractions: of `--split`; folds: the number of `--folds` that `parts` is one of.
    """
    counts = {part: index.counts() for part, index in parts.items()}
    totals = sum(counts.values())
    for i in np.argsort(totals, kind="stable"):
        if any(count[i] == 0 for count in counts.values()):
            numbers = ", ".join(f"{part} {count[i]}" for part, count in counts.items())
            split = " ".join(f"{fraction:g}" for fraction in fractions)
            flag, wanted, other = "--split", split, "change the shares, or give --val_dirs / --test_dirs"
            if folds:
                flag, wanted, other = "--folds", f"{folds} folds", "or take fewer folds"
            raise UserError(
                f"{flag}: class {parts['train'].classes[i]!r} has too few images ({totals[i]}), or too few persons "
                f"among them, for {wanted}: {numbers}; each part needs one: add images, {other}"
            )


def restore_split(index, split, sizes, folders, former_folders):
    """Find the images of a checkpoint's split again, also where their folders lie elsewhere now.

    An image is known by its path below its folder and by its size, a folder by its images; of several that hold the
    same, the one at the same place among `folders` as among `former_folders`. split: {part: [path]};
    sizes: {part: [bytes]}. -> {part: ImageIndex}. Raises UserError if an image is missing or has changed, after
    listing them.
    """
    position_at = {_place(path, folders): i for i, path in enumerate(index.paths)}
    places = {part: [_place(path, former_folders) for path in paths] for part, paths in split.items()}
    size_at = [stat_of(path)[0] for path in index.paths]
    held = Counter()
    for part, at in places.items():
        for (former, relative), size in zip(at, sizes[part], strict=True):
            for new in range(len(folders)):
                position = position_at.get((new, relative))
                held[former, new] += position is not None and size_at[position] == size
    new_folder = {
        former: max(range(len(folders)), key=lambda new, former=former: (held[former, new], new == former))
        for former in {former for former, _ in held}
    }
    positions, lost = {part: [] for part in split}, []
    for part, at in places.items():
        for path, (former, relative), size in zip(split[part], at, sizes[part], strict=True):
            position = position_at.get((new_folder[former], relative))
            if position is None:
                lost.append(f"missing: {path}")
            elif size_at[position] != size:
                lost.append(f"changed: {index.paths[position]}")
            else:
                positions[part].append(position)
    _refuse_lost_images(lost, sum(map(len, split.values())))
    return {part: index.subset(chosen) for part, chosen in positions.items()}


def _place(path, folders):
    """-> (number of the folder that `path` is in, its path below it). Names are compared composed (NFC)."""
    prefixes = [os.path.join(folder, "") for folder in folders]
    holding = [number for number, prefix in enumerate(prefixes) if path.startswith(prefix)]
    if not holding:
        return -1, path
    number = max(holding, key=lambda number: len(prefixes[number]))
    return number, unicodedata.normalize("NFC", path[len(prefixes[number]) :])


def check_every_folder_is_used(parts, folders):
    """Raise UserError if one of `folders` holds no image of any part: of a split that stays, it could only be more."""
    used = {_place(path, folders)[0] for index in parts.values() for path in index.paths}
    for number, folder in enumerate(folders):
        if number not in used:
            raise UserError(
                f"--data_dirs: no image of the checkpoint's split is in {folder}; the split stays, start a new run"
            )


def _refuse_lost_images(lost, total):
    for line in lost[:MOST_LISTED]:
        print(line)
    if len(lost) > MOST_LISTED:
        print(f"... and {len(lost) - MOST_LISTED} more")
    if lost:
        raise UserError(
            f"--resume: {len(lost)} of {total} images of the checkpoint's split are missing or have changed (listed "
            f"above), the first is {lost[0]}; put them back, or say where they lie now with --data_dirs"
        )


# ------------------------------------------------------------------------------------------------------- data sets


class DoubleSkinDataset(Dataset):
    """Validation and test images, and the originals of the training set: resized, never augmented.

    [i] -> (image (3, image_size, image_size) uint8, target int); a list of positions -> the batch.
    """

    def __init__(self, index, image_size):
        self.index, self.image_size = index, image_size

    def read(self, i):
        """-> (image_size, image_size, 3) uint8, read-only where it lies in the cache."""
        row = self.index.rows[i]
        if row >= 0 and self.index.cache.pixels is not None:
            return self.index.cache.pixels[row]
        return read_image(self.index.paths[i], self.image_size)

    def __getitem__(self, i):
        images, targets = self.__getitems__([i])
        return images[0], int(targets[0])

    def __getitems__(self, positions):
        """-> (images (N, 3, image_size, image_size) uint8, targets (N,) int64)."""
        batch = np.empty((len(positions), self.image_size, self.image_size, 3), np.uint8)
        for pixels, i in zip(batch, positions, strict=True):
            pixels[:] = self.read(i)
        return to_tensor(batch), torch.from_numpy(self.index.targets[positions])

    def __len__(self):
        return len(self.index)


class AugmentedSkinDataset(Dataset):
    """The training images once each, then augmented copies until each class has `target_samples_per_class`.

    A class above the target keeps all its originals. The copies of an epoch are drawn anew from (seed, epoch,
    position), whatever process draws them. Costs 4 bytes a position: images are read when they are asked for.
    augment_all: the originals are augmented too.

    [position] -> (image (3, image_size, image_size) uint8, target int); a list of positions -> the batch. Positions
    from the length on go round: further copies, of which a `ClassSampler` makes use. With `on_device` the images come
    as they are, and behind the targets the parameters (N, 9) for `augment_batch`.
    """

    def __init__(
        self, originals, target_samples_per_class=None, methods=None, seed=42, on_device=False, augment_all=False
    ):
        self.originals, self.seed, self.on_device, self.augment_all = originals, seed, on_device, augment_all
        self.methods = tuple(AUGMENTATIONS if methods is None else methods)
        counts = originals.index.counts()
        target = counts.max() if target_samples_per_class is None else target_samples_per_class
        order = np.random.default_rng(seed)
        sources = [np.arange(len(originals), dtype=np.int32)]
        for c, count in enumerate(counts):
            members = order.permutation(np.flatnonzero(originals.index.targets == c)).astype(np.int32)
            # resize repeats the members in turn: no original gets more than one copy above another
            sources.append(np.resize(members, max(0, target - count)))
        self.sources = np.concatenate(sources)
        # shared memory, so that loader workers that live on see the new epoch
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch):
        """Draw other augmentations from now on, also in running loader workers."""
        self.epoch.fill_(epoch)

    def counts(self):
        """-> (C,) int64: positions a class."""
        index = self.originals.index
        return np.bincount(index.targets[self.sources], minlength=len(index.classes))

    def parameters(self, position):
        """-> (9,) of `draw_parameters`; originals stay as they are, unless all are augmented."""
        if position < len(self.originals) and not self.augment_all:
            return IDENTITY
        return draw_parameters(self.methods, np.random.default_rng((self.seed, int(self.epoch), position)))

    def __getitem__(self, position):
        images, targets, *parameters = self.__getitems__([position])
        return images[0], int(targets[0]), *(p[0] for p in parameters)

    def __getitems__(self, positions):
        """-> (images (N, 3, image_size, image_size) uint8, targets (N,) int64[, parameters (N, 9) float32])."""
        sources = self.sources[np.asarray(positions) % len(self.sources)]
        parameters = [self.parameters(position) for position in positions]
        if self.on_device:
            images, targets = self.originals.__getitems__(sources)
            return images, targets, torch.tensor(parameters, dtype=torch.float32)
        size = self.originals.image_size
        batch = np.empty((len(positions), size, size, 3), np.uint8)
        for pixels, source, of_image in zip(batch, sources, parameters, strict=True):
            augment(self.originals.read(source), of_image, out=pixels)
        return to_tensor(batch), torch.from_numpy(self.originals.index.targets[sources])

    def __len__(self):
        return len(self.sources)


def to_tensor(images):
    """(N, H, W, 3) uint8 array -> (N, 3, H, W) uint8 tensor in channels-last order, without a copy."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _begin_worker(max_megapixels, worker_id):
    """Terminals and queues signal the whole process group, but the main process still waits for this worker's batch.

    It ends when the main process tells it to, or is gone.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    limit_image_size(max_megapixels)  # a worker that is not a fork starts without it


@atexit.register
def _end_workers():
    """Workers that an error has left over: Python would send them SIGTERM, and wait for ever."""
    for worker in multiprocessing.active_children():
        worker.kill()


class EpochSampler(DistributedSampler):
    """Every position once, shuffled by (seed, epoch) alone; an epoch may begin in its middle."""

    def __init__(self, dataset, seed):
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=True, seed=seed)
        self.skipped = 0

    def set_epoch(self, epoch, skipped=0):
        """skipped: how many positions of the epoch are left out, as they were trained on before."""
        super().set_epoch(epoch)
        self.skipped = skipped

    def __iter__(self):
        return itertools.islice(super().__iter__(), self.skipped, None)

    def __len__(self):
        return super().__len__() - self.skipped


SAMPLINGS = ("instance", "balanced", "sqrt", "progressive")


class ClassSampler(EpochSampler):
    """As many positions an epoch as there are images, each class with a share of its own (Kang et al. 2020, sec. 4.1).

    The share of a class with n images is by `sampling`: "balanced" the same for all, "sqrt" as the root of n,
    "progressive" as n in the first epoch and nearer to the same for all with each of `epochs`. Its images take turns,
    so that none comes more than once above another; when an image comes again in an epoch, its position is
    `len(dataset)` higher each time.
    """

    def __init__(self, dataset, sampling, epochs, seed):
        super().__init__(dataset, seed)
        self.sampling, self.epochs = sampling, epochs
        index = dataset.originals.index
        self.members = [np.flatnonzero(index.targets == c) for c in range(len(index.classes))]

    def shares(self, epoch):
        """-> (C,), summing to 1."""
        natural = np.array([len(members) for members in self.members]) / len(self.dataset)
        balanced = np.full(len(natural), 1 / len(natural))
        if self.sampling == "progressive":
            return natural + min(1, epoch / self.epochs) * (balanced - natural)
        return balanced if self.sampling == "balanced" else np.sqrt(natural) / np.sqrt(natural).sum()

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        # rounded up or down at random, so that the shares hold over the epochs
        ends = np.floor(np.cumsum(self.shares(self.epoch)) * len(self.dataset) + rng.random()).astype(int)
        ends[-1] = len(self.dataset)
        positions = []
        for members, number in zip(self.members, np.diff(ends, prepend=0), strict=True):
            times = np.arange(number) // len(members)
            positions.append(np.resize(rng.permutation(members), number) + times * len(self.dataset))
        yield from rng.permutation(np.concatenate(positions))[self.skipped :].tolist()


def _as_it_is(batch):
    return batch


def make_loader(dataset, batch_size, *, sampler=None, seed=0, num_workers=0, pin_memory=False):
    """Batches as the data set gives them: (images (N, 3, S, S) uint8, targets (N,) int64[, parameters (N, 9)]).

    sampler: an EpochSampler, whose `set_epoch` is to be called; None: every image in the order of the index.
    """
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_it_is,  # the data sets give whole batches
        pin_memory=pin_memory,
        # where it can be had: the workers then share the index instead of getting copies
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        worker_init_fn=functools.partial(_begin_worker, image_size_limit()),
        persistent_workers=num_workers > 0,
        # of its own: else it would draw from the random state of dropout, more or less often by the number of workers
        generator=torch.Generator().manual_seed(seed),
    )


# --------------------------------------------------------------------------------------------------- augmentations
#
# Flip, rotation, scale, shear and shift compose to one affine map of the plane, so that an image is resampled once;
# brightness, contrast and saturation to one affine map of colour. On a CPU the loader's workers apply them image by
# image (`augment`), on a GPU whole batches are augmented there (`augment_batch`): the same parameters, the same image.

AUGMENTATIONS = ("horizontal_flip", "rotation", "scale", "shear", "shift", "color_jitter")
MAX_ROTATION = math.radians(15)
MAX_SCALE = 1.1
MAX_SHEAR = math.tan(math.radians(5))
MAX_SHIFT = 0.05  # of the side
MAX_COLOR_CHANGE = 0.2
GREY = np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601, as in Pillow and torchvision
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0)


def draw_parameters(methods, rng):
    """Parameters of one augmented image -> (a, b, x, c, d, y, brightness, contrast, saturation).

    A point p of the result, seen from its centre in units of half its side, comes from [[a, b], [c, d]] p + (x, y) of
    the original. A method that is not named leaves the draws of the others as they are.
    """
    flip, angle, zoom, shear, x, y, brightness, contrast, saturation = rng.uniform(-1, 1, 9).tolist()
    flip = -1.0 if "horizontal_flip" in methods and flip < 0 else 1.0
    angle = MAX_ROTATION * angle if "rotation" in methods else 0.0
    zoom = MAX_SCALE**zoom if "scale" in methods else 1.0
    shear = MAX_SHEAR * shear if "shear" in methods else 0.0
    x, y = (2 * MAX_SHIFT * x, 2 * MAX_SHIFT * y) if "shift" in methods else (0.0, 0.0)
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    # rotation and scale of the sheared of the flipped
    affine = (flip * cos, shear * cos + sin, x, -flip * sin, cos - shear * sin, y)
    if "color_jitter" not in methods:
        return (*affine, 1.0, 1.0, 1.0)
    return (*affine, *(1 + MAX_COLOR_CHANGE * change for change in (brightness, contrast, saturation)))


def augment(image, parameters, out):
    """Write the image that `parameters` (see `draw_parameters`) make of `image` to `out`, both (S, S, 3) uint8."""
    affine, color = parameters[:6], parameters[6:]
    if affine == IDENTITY[:6]:
        out[:] = image
    else:
        a, b, x, c, d, y = affine
        centre = (len(image) - 1) / 2
        x, y = (centre * (1 - a - b) + x * len(image) / 2, centre * (1 - c - d) + y * len(image) / 2)
        rgba = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)  # four channels are warped twice as fast as three
        # reflected at the border: black corners would tell the model which images are copies
        flags = {"flags": cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, "borderMode": cv2.BORDER_REFLECT}
        warped = cv2.warpAffine(rgba, np.array([[a, b, x], [c, d, y]]), image.shape[:2], **flags)
        cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB, dst=out)
    if color != IDENTITY[6:]:
        brightness, contrast, saturation = color
        mean_grey = np.dot(GREY, cv2.mean(out)[:3])
        linear = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * GREY)
        cv2.transform(out, np.column_stack([linear, np.full(3, brightness * (1 - contrast) * mean_grey)]), dst=out)


@functools.cache  # copied once: each copy would have the GPU waited for
def _grey_on(device):
    return torch.tensor(GREY, dtype=torch.float32, device=device)


def augment_batch(images, parameters):
    """`augment` for a whole batch, on its device. images: (N, 3, S, S) uint8; parameters: (N, 9) -> the same as images.

    Colour: brightness; contrast about the image's mean grey; saturation about each pixel's grey.
    """
    grid = F.affine_grid(parameters[:, :6].reshape(-1, 2, 3), images.shape, align_corners=False)
    warped = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False).flatten(2)
    brightness, contrast, saturation = parameters[:, 6:, None, None].unbind(1)
    grey = _grey_on(images.device)
    mean_grey = (warped.mean(dim=2) @ grey)[:, None, None]
    linear = brightness * contrast * (saturation * torch.eye(3, device=images.device) + (1 - saturation) * grey)
    colored = torch.baddbmm(brightness * (1 - contrast) * mean_grey, linear, warped)
    return colored.round_().clamp_(0, 255).to(torch.uint8).reshape(images.shape)
