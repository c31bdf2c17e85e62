"""Class folders -> index -> splits -> data sets -> loaders.

An image is a (H, W, 3) uint8 RGB array until the loader hands batches of (N, 3, H, W) uint8 to the model, which
normalises them on its own device.
"""

import os
import re
import signal
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from files import UserError, progress_bar

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
PARTS = ("train", "val", "test")

# each loader worker and each scanning thread handles an image of its own: threads inside OpenCV would only fight them
cv2.setNumThreads(0)


# ---------------------------------------------------------------------------------------------- reading one image


def load_image(path):
    """Decode a file -> 8-bit RGB PIL image, upright by its EXIF orientation.

    16-bit and float greys are scaled, not clipped; transparent pixels are laid on white.
    Raises whatever the decoder raises when the file is broken, cut short or no image.
    """
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_grey_to_8_bit(np.nan_to_num(np.asarray(image)), image.mode))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey_to_8_bit(grey, mode):
    """16-bit values by mode; 32-bit integers and floats by their largest, as their files do not say what white is."""
    if mode == "F" and grey.max() <= 1:
        grey = grey * 255
    elif mode.startswith("I;16") or grey.max() > 255:
        grey = np.clip(grey, 0, 65535) // 256
    return np.clip(grey, 0, 255).astype(np.uint8)


def read_image(path, size):
    """Decode and resize (antialiased, to a square) -> (size, size, 3) uint8. Raises UserError if it can't be read."""
    try:
        image = load_image(path)
    except Exception as error:  # a decoder raises nearly anything on a broken file; the user needs to know which file
        raise UserError(f"{path} cannot be read: {error}") from error
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR))


# ------------------------------------------------------------------------------------------ class folders -> index


@dataclass
class ImageIndex:
    """Which image belongs to which class. paths: N strings; targets: (N,) int64 into `classes`."""

    paths: list
    targets: np.ndarray
    classes: list

    def subset(self, positions):
        return ImageIndex([self.paths[i] for i in positions], self.targets[positions], self.classes)

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
                suffix = path.suffix.lower()
                if suffix in IMAGE_EXTENSIONS:
                    images.append(str(path))
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
        files += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
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
    seen = set()
    for path in paths:
        real_path = os.path.realpath(path)
        if real_path in seen:
            raise UserError(f"{flag}: {path} is there twice; give each folder only once")
        seen.add(real_path)


def drop_broken(indexes, skip_broken):
    """Open and fully decode every image of {name: ImageIndex} once, in parallel. -> the same without the broken ones.

    Those are listed by path with the reason. Raises UserError if there are any, unless `skip_broken`.
    """
    paths = [path for index in indexes.values() for path in index.paths]
    with ThreadPoolExecutor(available_cpus()) as pool:
        reasons = list(progress_bar(pool.map(_why_broken, paths), "checking images", total=len(paths), unit="image"))
    broken = [(path, reason) for path, reason in zip(paths, reasons, strict=True) if reason]
    for path, reason in broken:
        print(f"broken: {path}: {reason}")
    if broken and not skip_broken:
        more = f", and {len(broken) - 1} more (listed above)" if len(broken) > 1 else ""
        raise UserError(
            f"{broken[0][0]} cannot be read: {broken[0][1]}{more}; mend or remove, or leave out with --skip_broken"
        )
    if not broken:
        return indexes
    left_out = {path for path, _ in broken}
    whole = {
        name: index.subset([i for i, path in enumerate(index.paths) if path not in left_out])
        for name, index in indexes.items()
    }
    if not all(map(len, whole.values())):
        raise UserError(f"{broken[0][0]} cannot be read, nor any other image beside it")
    return whole


def _why_broken(path):
    try:
        load_image(path)
    except Exception as error:  # whatever the decoder raises is the reason that is listed
        empty = os.path.exists(path) and os.path.getsize(path) == 0
        return "empty file" if empty else str(error).replace(repr(path), "it") or repr(error)
    return None


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


def stratified_split(index, fractions, seed, separate=()):
    """Split an index by class shares -> {part: ImageIndex} for the parts that are not in `separate`.

    fractions: of train, val, test; those of `separate` parts are shared out among the rest.
    A class that is too small may miss in a part: see `check_every_class_in_every_part`.
    """
    wanted = [(part, fraction) for part, fraction in zip(PARTS, fractions, strict=True) if part not in separate]
    rest, parts = np.arange(len(index)), {}
    share_left = sum(fraction for _, fraction in wanted)
    for part, fraction in reversed(wanted[1:]):
        try:
            rest, chosen = train_test_split(
                rest, test_size=fraction / share_left, stratify=index.targets[rest], random_state=seed
            )
        except ValueError:  # a class with one image left, or fewer images than classes: too small
            chosen = rest[:0]
        parts[part] = index.subset(np.sort(chosen))
        share_left -= fraction
    parts["train"] = index.subset(np.sort(rest))
    return parts


def check_every_class_in_every_part(parts, fractions):
    """Raise UserError, naming the class and its numbers, unless each class has an image in each part."""
    counts = {part: index.counts() for part, index in parts.items()}
    totals = sum(counts.values())
    for i in np.argsort(totals, kind="stable"):
        if any(count[i] == 0 for count in counts.values()):
            numbers = ", ".join(f"{part} {count[i]}" for part, count in counts.items())
            split = " ".join(f"{fraction:g}" for fraction in fractions)
            name = parts["train"].classes[i]
            raise UserError(
                f"--split: class {name!r} has too few images ({totals[i]}) for {split}: {numbers}; "
                f"each part needs one: add images, change the shares, or give --val_dirs / --test_dirs"
            )


def restore_split(index, split):
    """Find the images of a checkpoint's split again. split: {part: [path]} -> {part: ImageIndex}."""
    position = {path: i for i, path in enumerate(index.paths)}
    parts = {}
    for part, paths in split.items():
        missing = [path for path in paths if path not in position]
        if missing:
            raise UserError(
                f"--resume: {len(missing)} of {len(paths)} {part} images of the checkpoint are not in the data folders "
                f"any more, the first is {missing[0]}"
            )
        parts[part] = index.subset([position[path] for path in paths])
    return parts


# ------------------------------------------------------------------------------------------------------- data sets


class DoubleSkinDataset(Dataset):
    """Validation and test images, and the originals of the training set: resized, never augmented.

    [i] -> (image (3, image_size, image_size) uint8, target int)
    """

    def __init__(self, index, image_size):
        self.index, self.image_size = index, image_size

    def read(self, i):
        """-> (image_size, image_size, 3) uint8."""
        return read_image(self.index.paths[i], self.image_size)

    def __getitem__(self, i):
        return to_tensor(self.read(i)), int(self.index.targets[i])

    def __len__(self):
        return len(self.index)


class AugmentedSkinDataset(Dataset):
    """The training images once each, then augmented copies until each class has `target_samples_per_class`.

    A class above the target keeps all its originals. The copies of an epoch are drawn anew from (seed, epoch,
    position), whatever process draws them. Costs 4 bytes a position: images are read when they are asked for.

    [position] -> (image (3, image_size, image_size) uint8, target int)
    """

    def __init__(self, originals, target_samples_per_class=None, methods=None, seed=42):
        self.originals, self.seed = originals, seed
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

    def __getitem__(self, position):
        source = self.sources[position]
        image = self.originals.read(source)
        if position >= len(self.originals):
            rng = np.random.default_rng((self.seed, int(self.epoch), position))
            image = augment(image, self.methods, rng)
        return to_tensor(image), int(self.originals.index.targets[source])

    def __len__(self):
        return len(self.sources)


def to_tensor(image):
    """(H, W, 3) uint8 array -> (3, H, W) uint8 tensor, without a copy."""
    return torch.from_numpy(image).permute(2, 0, 1)


def available_cpus():
    """CPUs that this process may use: fewer than the machine has under a queue or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _leave_signals_to_the_main_process(worker_id):
    # terminals and queues signal the whole process group; a worker that died of it would look like a crash
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def make_loader(dataset, batch_size, *, shuffle=False, seed=0, num_workers=0, pin_memory=False):
    """Batches of (images (N, 3, H, W) uint8, targets (N,) int64).

    Shuffled by (seed, epoch): call `loader.sampler.set_epoch`.
    """
    # torch's own sampler that shuffles by (seed, epoch) alone
    sampler = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=shuffle, seed=seed)
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_main_process,
        persistent_workers=num_workers > 0,
        # of its own: else it would draw from the random state of dropout, more or less often by the number of workers
        generator=torch.Generator().manual_seed(seed),
    )


# --------------------------------------------------------------------------------------------------- augmentations
#
# Geometric methods compose to one affine map, so that an image is resampled once; colour methods to one affine map of
# colour. Each draws its own parameters from `rng`. A new method is a function and its line in AUGMENTATIONS.

MAX_ROTATION_DEGREES = 15
MAX_COLOR_CHANGE = 0.2
GREY = np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601, as in Pillow and torchvision


def _horizontal_flip(rng):
    return np.diag([-1.0 if rng.random() < 0.5 else 1.0, 1.0])


def _rotation(rng):
    angle = np.deg2rad(rng.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES))
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _color_jitter(rng, image):
    """Brightness, contrast about the image's mean grey, then saturation -> (3, 4) affine map of RGB."""
    brightness, contrast, saturation = rng.uniform(1 - MAX_COLOR_CHANGE, 1 + MAX_COLOR_CHANGE, 3)
    mean_grey = np.dot(GREY, cv2.mean(image)[:3])
    linear = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * GREY)
    return np.column_stack([linear, np.full(3, brightness * (1 - contrast) * mean_grey)])


GEOMETRIC = {"horizontal_flip": _horizontal_flip, "rotation": _rotation}
COLOR = {"color_jitter": _color_jitter}
AUGMENTATIONS = {**GEOMETRIC, **COLOR}


def augment(image, methods, rng):
    """Apply the named `methods`, with parameters drawn from `rng`. image: (H, W, 3) uint8 -> the same."""
    geometric = [draw(rng) for name, draw in GEOMETRIC.items() if name in methods]
    if geometric:
        image = _warp_about_centre(image, reduce(np.matmul, geometric))
    for name, draw in COLOR.items():
        if name in methods:
            image = cv2.transform(image, draw(rng, image))
    return image


def _warp_about_centre(image, linear):
    height, width = image.shape[:2]
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    affine = np.column_stack([linear, centre - linear @ centre])
    # reflected at the border: black corners would tell the model which images are copies
    return cv2.warpAffine(image, affine, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
