"""Photographs of a report: mistakes and right answers with heat maps, near-duplicates, augmented images.

Their number, their size and the time for heat maps are bounded, whatever the number of images and classes.
"""

import base64
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from markupsafe import Markup

from dataset_double import AugmentedSkinDataset, DoubleSkinDataset, train_sampler, training_set
from explain import STRIDE, explain_predictions, overlay
from flag_queries import is_ordinal
from images.decode import read_image
from images.folders import ImageIndex
from model import Model
from run.cli import UserError, first_line, progress_bar
from run.cores import num_cores

SIDE, SHEET_SIDE = 160, 104  # pixels of an embedded photograph
JPEG_QUALITY = 80
MAX_PHOTOGRAPHS = 240  # of the test: with more classes there are fewer of each, then only the smallest classes
# kind: how many per class
KINDS = {"mistake": 4, "least certain": 2, "typical": 2}
MAX_HEAT_MAPS, HEAT_MAP_SECONDS, AT_ONCE = 60, 30, 4
SMALLEST_EXPLAINED = 64  # pixels: below, the last features have fewer than 4 x 4 cells, too few to point at anything
SHEET_CLASSES, SHEET_COPIES = 12, 6
MAX_PAIRS = 12


@dataclass
class Photo:
    """image: a data URI for `src`, None where there is none; heat_maps: [(what the map explains, data URI)]."""

    position: int
    kind: str
    path: str
    label: str
    prediction: str
    label_probability: float
    probability: float
    image: Markup | None = None
    heat_maps: list[tuple[str, Markup]] = field(default_factory=list)


def choose_photos(targets: np.ndarray, probabilities: np.ndarray, counts: Sequence[int]) -> dict[int, dict[str, list]]:
    """-> {class: {kind of KINDS: positions}}, the classes with the fewest training images first; bounded.

    targets: (N,) int; probabilities: (N, C); counts: (C,) training images. Per class: the mistakes whose label got the
    lowest probability, other images with the smallest margin between the two best answers, and the right answers of
    the highest probability.
    """
    predictions = np.argmax(probabilities, axis=1)
    present = np.flatnonzero(np.bincount(targets, minlength=len(counts)))
    order = present[np.argsort(np.asarray(counts)[present], kind="stable")][: MAX_PHOTOGRAPHS // len(KINDS)].tolist()
    share = MAX_PHOTOGRAPHS / (max(1, len(order)) * sum(KINDS.values()))
    numbers = {kind: max(1, int(min(1, share) * number)) for kind, number in KINDS.items()}
    chosen = {}
    for c in order:
        members = np.flatnonzero(targets == c)
        of_class = probabilities[members]
        best_two = np.sort(of_class, axis=1)[:, -2:]
        margins = best_two[:, -1] - best_two[:, 0]
        is_right = predictions[members] == c
        scores = {
            "mistake": np.where(is_right, np.inf, of_class[:, c]),
            "least certain": margins,
            "typical": np.where(is_right, -of_class[:, c], np.inf),
        }
        taken, chosen[c] = set(), {}
        for kind, score in scores.items():
            ranked = [i for i in np.argsort(score, kind="stable")[: sum(KINDS.values())] if score[i] < np.inf]
            picked = [i for i in ranked if i not in taken][: numbers[kind]]
            taken |= set(picked)
            chosen[c][kind] = members[picked].tolist() if picked else []
    return chosen


def photographs(
    paths: Sequence[str], targets: np.ndarray, probabilities: np.ndarray, classes: Sequence[str],
    counts: Sequence[int], resize: str,
) -> dict[str, list[Photo]]:  # fmt: skip
    """-> {class: its photos, kind by kind}, read from their files. Arguments: see `choose_photos`."""
    groups, photos = {}, []
    predictions = np.argmax(probabilities, axis=1)
    for c, kinds in choose_photos(targets, probabilities, counts).items():
        group = groups.setdefault(classes[c], [])
        for kind, positions in kinds.items():
            for i in positions:
                prediction = predictions[i]
                numbers = float(probabilities[i, c]), float(probabilities[i, prediction])
                group.append(Photo(i, kind, str(paths[i]), classes[c], classes[prediction], *numbers))
        photos += group
    images = data_uris([photo.path for photo in photos], resize)
    for photo, image in zip(photos, images, strict=True):
        photo.image = image
    return groups


def data_uris(paths: Sequence[str], resize: str, side: int = SIDE) -> list[Markup | None]:
    """-> photographs as data URIs, None for one that cannot be read."""

    def read(path):
        try:
            return data_uri(read_image(path, side, resize))
        except UserError:  # moved, deleted or damaged since
            return None

    with ThreadPoolExecutor(num_cores()) as pool:
        return list(pool.map(read, paths))


def data_uri(pixels: np.ndarray) -> Markup:
    """(H, W, 3) uint8 RGB -> a JPEG for `src`."""
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return Markup("data:image/jpeg;base64," + base64.b64encode(encoded).decode())


def add_heat_maps(
    groups: Mapping[str, Sequence[Photo]], model: Model, probabilities: np.ndarray, classes: Sequence[str],
    args: Namespace,
) -> None:  # fmt: skip
    """Give photos the heat map of their predicted class, for grades also of the neighboring grade: one photo of each
    class in turn, until a bound is reached. probabilities: (N, C) of the test images; args: flags of the run.
    """
    device = next(model.parameters()).device
    ranks = max(map(len, groups.values()), default=0)
    turns = [group[rank] for rank in range(ranks) for group in groups.values() if rank < len(group)]
    turns = [photo for photo in turns if photo.image][:MAX_HEAT_MAPS]
    started = time.monotonic()
    chunks = [turns[start : start + AT_ONCE] for start in range(0, len(turns), AT_ONCE)]
    for chunk in progress_bar(chunks, "heat maps"):
        pixels = np.stack([read_image(photo.path, args.image_size, args.resize) for photo in chunk])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)
        rows = probabilities[[photo.position for photo in chunk]]
        found = explain_predictions([model], images, rows, is_ordinal(args))
        for photo, seen, explanations in zip(chunk, pixels, found, strict=True):
            for target, _, heat_map in explanations:
                laid = cv2.resize(overlay(seen, heat_map), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
                title = classes[target] if classes[target] == photo.prediction else f"why not {classes[target]}"
                title += "" if heat_map.any() else ": no region"
                photo.heat_maps.append((title, data_uri(laid)))
        if time.monotonic() - started > HEAT_MAP_SECONDS:
            break


def heat_scale() -> Markup:
    """-> the colors of heat maps from 0 to 1, over gray, as a data URI"""
    colors = overlay(np.full((8, SIDE, 3), 128, np.uint8), np.linspace(0, 1, SIDE, dtype=np.float32)[None])
    return data_uri(colors)


@dataclass
class DrawnEpoch:
    """What an epoch of a training draws. positions: (P,) int64, sorted, of `train_set`, which is set to the epoch."""

    epoch: int
    train_set: DoubleSkinDataset | AugmentedSkinDataset
    positions: np.ndarray

    def sources(self) -> np.ndarray:
        """-> (P,) int: the training image at each position."""
        sources = getattr(self.train_set, "sources", np.arange(len(self.train_set)))
        return sources[self.positions % len(sources)]


def drawn_epochs(index: ImageIndex, args: Namespace) -> list[DrawnEpoch]:
    """-> an epoch of the main stage, and with `--crt_epochs` one of the stage after it.

    index: the training images; args: flags of the run. The epoch is the first of its stage; with `--sampling
    progressive`, whose first epoch repeats nothing, the last.
    """
    end = args.epochs - args.crt_epochs
    first = end - 1 if args.sampling == "progressive" else args.drw_epoch
    stages = [(first, args.use_augmentation, args.sampling)]
    if args.crt_epochs:
        stages.append((end, False, "balanced"))
    drawn = []
    for epoch, use_augmentation, sampling in stages:
        train_set = training_set(index, args, use_augmentation=use_augmentation, sampling=sampling)
        if isinstance(train_set, AugmentedSkinDataset):
            train_set.set_epoch(epoch)
        sampler = train_sampler(train_set, args, sampling)
        sampler.set_epoch(epoch)
        drawn.append(DrawnEpoch(epoch, train_set, np.sort(np.fromiter(sampler, np.int64, len(sampler)))))
    return drawn


def augmented_sheet(drawn: DrawnEpoch, max_classes: int = SHEET_CLASSES) -> list[tuple[str, Markup, list[Markup]]]:
    """-> [(class, an original, what the epoch draws of it augmented)], the smallest classes first; bounded.

    Classes without augmented images are left out.
    """
    train_set = drawn.train_set
    if not isinstance(train_set, AugmentedSkinDataset):
        return []
    index, sheet, sources = train_set.originals.index, [], drawn.sources()
    is_copy, targets = drawn.positions >= len(index), index.targets[sources]
    order = np.argsort(index.counts(), kind="stable")
    augmented = np.isin(order, targets if train_set.augment_all else targets[is_copy])
    for c in order[augmented][:max_classes].tolist():
        members = np.flatnonzero((targets == c) & is_copy)
        if not len(members):
            members = np.flatnonzero(targets == c)
        # copies of one original, then others
        members = members[np.argsort(sources[members] != sources[members[0]], kind="stable")][:SHEET_COPIES]
        original = train_set.originals.read(sources[members[0]])
        images = train_set.__getitems__(drawn.positions[members].tolist())[0].permute(0, 2, 3, 1).numpy()
        sheet.append((index.classes[c], _small(original), [_small(image) for image in images]))
    return sheet


def _small(image):
    side = min(SHEET_SIDE, len(image))
    return data_uri(cv2.resize(np.ascontiguousarray(image), (side, side), interpolation=cv2.INTER_AREA))


def duplicate_pairs(found: Mapping[str, Any], resize: str) -> list[list[tuple[str, str, Markup | None]]]:
    """found: content of `DUPLICATES_FILE` -> the first pairs of (split, path, data URI)."""
    pairs = found["pairs"][:MAX_PAIRS]
    images = iter(data_uris([path for pair in pairs for _, path in pair], resize, SHEET_SIDE))
    return [[(split, path, next(images)) for split, path in pair] for pair in pairs]


def explain_photos(
    groups: Mapping[str, Sequence[Photo]], model: Model | None, probabilities: np.ndarray, classes: Sequence[str],
    args: Namespace,
) -> str:  # fmt: skip
    """`add_heat_maps` where it can be done; a failure costs the heat maps only. -> what the page says of them"""
    photos = [photo for group in groups.values() for photo in group]
    if model is None:
        return "No heat maps: the model is not available."
    if args.image_size < SMALLEST_EXPLAINED:
        return f"No heat maps: at {args.image_size} px the network's last features are too coarse to point at a region."
    try:
        add_heat_maps(groups, model, probabilities, classes, args)
    except Exception as error:
        reason = first_line(error) or type(error).__name__
        print(f"warning: heat maps are missing in the report ({reason})")
        return f"Heat maps failed: {reason}."
    number, cells = sum(bool(photo.heat_maps) for photo in photos), -(-args.image_size // STRIDE)
    neighbor = ", and for the neighboring grade that is more probable" if is_ordinal(args) else ""
    return (
        f"Beside a photograph: its heat map (Grad-CAM), the regions that support the predicted class{neighbor}. "
        f"{number} of {len(photos)} photographs have one. A map shows where the network looked, not that it is right, "
        f"and no finer than {cells} x {cells} cells at {args.image_size} px."
    )
