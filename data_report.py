"""`main.py --check_data`: the data as a training would see them, on a page, without training."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from charts import count_bar, histogram_chart
from dataset_double import AugmentedSkinDataset, DoubleSkinDataset
from flag_queries import is_ordinal
from flags import SPLITS
from gallery import DrawnEpoch, augmented_sheet, data_uris, drawn_epochs
from images.cache import MAX_ASPECT
from images.classes import ClassNames
from images.decode import limit_image_size
from images.demo import use_demo_data
from images.folders import ImageIndex, Paths
from images.leakage import near_duplicates, num_nameless, subjects_of
from images.splits import make_splits, print_class_table
from images.statistics import Measurements, measure
from pages import LONGEST_NAME, write_page
from run.files import shortened
from run.log import start_log
from schedule import progressive_size

PAGE_FILE = "data_report.html"
# the page has a few MB at most: photographs that it shows, lines of text, rows of a table
MAX_SHEET, MAX_PER_CLASS, LEAST_PER_CLASS = 200, 8, 4  # of the random ones
SHEET_SIDE, AUGMENTED_CLASSES = 104, 24
PAIRS_SHOWN = {"different labels": 24, "different splits": 12, "one class and split": 12}
MAX_PROBLEMS, MAX_EXTREMES = 12, 6
MAX_LISTED, MAX_ROWS = 500, 1000
MAX_SORTED = 100_000  # pairs among which those to show are chosen
SIZES_APART = 4  # times the median side: what is smaller or larger is pointed out


@dataclass
class Data:
    """All photographs. index: those of train, val and test in turn; split_of: (N,) int, positions in SPLITS;
    pairs: {kind of PAIRS_SHOWN: (P, 2) int}; all_pairs: whether those are all."""

    index: ImageIndex
    split_of: np.ndarray
    measured: Measurements
    pairs: dict[str, np.ndarray]
    all_pairs: bool
    unreadable: list[tuple[str, str]]

    def about(self, i: int) -> str:
        """-> class and split of a photograph"""
        return f"{shortened(self.index.classes[self.index.targets[i]], 24)}, {SPLITS[self.split_of[i]]}"


def check_data(args: argparse.Namespace) -> None:
    """Read, split and measure the images of a run, and write PAGE_FILE to its folder. args: all flags of the run.

    Images that cannot be read are listed on the page. Raises UserError for other data that cannot be trained on.
    """
    run_dir = Path(args.run_dir)
    limit_image_size(args.max_megapixels)
    if args.demo:
        use_demo_data(args)
    all_folds = args.folds and args.fold is None
    if all_folds:
        args.fold = 0
    splits = make_splits(args, skip_broken=True)
    print_class_table(splits, args)
    data = collect(splits, args.resize, args.image_size)
    findings = what_needs_attention(data, args)
    notes = [f"The splits are those of fold 0 of {args.folds}; all folds have the same photographs."] * bool(all_folds)
    write_page(run_dir / PAGE_FILE, "data_report.html", **page_values(data, splits, args, findings, notes))
    start_log(run_dir)  # not before: a check that is stopped or fails leaves no folder
    for finding in findings:
        print(f"warning: {finding}")
    print(f"checked {len(data.index)} photographs of {len(data.index.classes)} classes; nothing was trained")
    print(f"data report saved to {run_dir / PAGE_FILE}")


def collect(splits: dict[str, ImageIndex], resize: str, image_size: int) -> Data:
    """Measure all photographs and search for near-duplicates. resize, image_size: the flags of those names."""
    indexes = [splits[split] for split in SPLITS]
    index = ImageIndex(
        paths=sum((index.paths for index in indexes), Paths()),
        targets=np.concatenate([index.targets for index in indexes]),
        classes=indexes[0].classes,
        cache_rows=np.concatenate([index.cache_rows for index in indexes]),
        cache=indexes[0].cache,
    )
    split_of = np.repeat(np.arange(len(SPLITS)), [len(index) for index in indexes])
    measured = measure(index.paths, DoubleSkinDataset(index, image_size, resize).read, resize)
    pairs, all_pairs = find_pairs(measured.thumbnails, index.targets, split_of)
    return Data(index, split_of, measured, pairs, all_pairs, index.cache.unreadable)


def find_pairs(thumbnails: np.ndarray, targets: np.ndarray, split_of: np.ndarray) -> tuple[dict[str, np.ndarray], bool]:
    """-> ({kind of PAIRS_SHOWN: (P, 2) int, sorted pairs of nearly identical photographs}, whether those are all).

    thumbnails: (N, THUMBNAIL, THUMBNAIL) uint8; targets, split_of: (N,) int.
    """
    rows = np.arange(len(targets))
    pairs, all_pairs = near_duplicates(thumbnails, rows, rows)
    if not all_pairs:  # too many photographs look alike to compare them all: those that matter are searched for apart
        others = [near_duplicates(thumbnails, rows, group_of)[0] for group_of in (targets, split_of)]
        pairs = np.unique(np.concatenate([pairs, *others]), axis=0)
    other_label, other_split = (group_of[pairs[:, 0]] != group_of[pairs[:, 1]] for group_of in (targets, split_of))
    kinds = (other_label, ~other_label & other_split, ~other_label & ~other_split)
    return {kind: pairs[chosen] for kind, chosen in zip(PAIRS_SHOWN, kinds, strict=True)}, all_pairs


def what_needs_attention(data: Data, args: argparse.Namespace) -> list[str]:
    """-> one line for each kind of problem that there is"""
    measured, values, sides = data.measured, data.measured.values, data.measured.shorter_sides()
    at_least = "" if data.all_pairs else "at least "
    advice = "left out, as --skip_broken is on" if args.skip_broken else (
        "a training stops at them: fix or delete them, or leave them out with --skip_broken"
    )  # fmt: skip
    lines = {
        "photographs that cannot be read": (len(data.unreadable), advice),
        "pairs of nearly identical photographs with different labels": (len(data.pairs["different labels"]), ""),
        "pairs of nearly identical photographs of one class in different splits": (
            len(data.pairs["different splits"]), "the test is too optimistic",
        ),
        "nearly black photographs": (values["near_black"].sum(), ""),
        "photographs of a single color": (is_plain(measured).sum(), ""),
        f"photographs over {SIZES_APART} times smaller or larger than the median": (
            far_sized(measured).sum(), f"shorter side of {median_side(measured):g} pixels",
        ),
        f"photographs smaller than --image_size {args.image_size}": (
            ((sides > 0) & (sides < args.image_size)).sum(), "they are enlarged",
        ),
        f"photographs that --resize stretch distorts over {MAX_ASPECT:g} times": (
            (elongation(measured) > MAX_ASPECT).sum() * (args.resize == "stretch"), "crop or pad keeps their shape",
        ),
    }  # fmt: skip
    return [
        f"{what}: {at_least * what.startswith('pairs')}{number}{f' ({advice})' if advice else ''}"
        for what, (number, advice) in lines.items()
        if number
    ]


def elongation(measured: Measurements) -> np.ndarray:
    """-> (N,) longer side divided by the shorter, 1 where they are unknown"""
    aspects = measured.aspects()
    return np.where(aspects > 0, np.maximum(aspects, 1 / np.where(aspects > 0, aspects, 1)), 1)


def is_plain(measured: Measurements) -> np.ndarray:
    """-> (N,) bool: of a single color that is not nearly black"""
    return measured.values["one_color"] & ~measured.values["near_black"]


def median_side(measured: Measurements) -> float:
    """-> median of the shorter sides in pixels, 0 if none is known"""
    sides = measured.shorter_sides()
    return float(np.median(sides[sides > 0])) if (sides > 0).any() else 0.0


def far_sized(measured: Measurements) -> np.ndarray:
    """-> (N,) bool: whose shorter side is far from the median"""
    sides, median = measured.shorter_sides(), median_side(measured)
    return (sides > 0) & ((sides * SIZES_APART < median) | (sides > SIZES_APART * median))


# --------------------------------------------------------------------------------------------------------- the page


def page_values(
    data: Data, splits: dict[str, ImageIndex], args: argparse.Namespace, findings: Sequence[str], notes: Sequence[str]
) -> dict[str, Any]:
    """-> what templates/data_report.html is filled with"""
    drawn = drawn_epochs(splits["train"], args)
    augmenting = next((epoch for epoch in drawn if isinstance(epoch.train_set, AugmentedSkinDataset)), drawn[0])
    measured, names = data.measured, [shortened(name, LONGEST_NAME) for name in data.index.classes]
    return {
        "title": Path(args.run_dir).resolve().name,
        "command": shlex.join(sys.orig_argv),
        "num_images": len(data.index),
        "num_classes": len(names),
        "findings": [_with_code(finding) for finding in findings],
        "notes": notes,
        "grades": data.index.classes if is_ordinal(args) else None,
        "classes": class_rows(splits, drawn[0], args),
        "subjects": subject_table(splits, args),
        "num_nameless": sum(map(num_nameless, splits.values())),
        "training": [_with_code(sentence) for sentence in what_training_sees(args, drawn[0])],
        "sheet": augmented_sheet(augmenting, AUGMENTED_CLASSES),
        "sheet_epoch": augmenting.epoch,
        "histograms": [
            histogram_chart("shorter side", measured.shorter_sides(), "shorter side in pixels", log=True),
            histogram_chart("shape", measured.aspects(), "width divided by height", log=True),
            histogram_chart("brightness", measured.values["brightness"], "brightness (mean luma, 0 to 255)"),
            histogram_chart(
                "sharpness", measured.values["sharpness"], "sharpness (variance of the Laplacian)", log=True
            ),
        ],
        "medians": median_rows(data),
        "kinds": _name_rows(measured.values["kind"], measured.kinds),
        "profiles": _name_rows(measured.values["profile"], measured.profiles),
        "problems": problem_groups(data, args.resize),
        "unreadable": data.unreadable[:MAX_LISTED],
        "num_unreadable": len(data.unreadable),
        "pairs": pair_groups(data, args.resize),
        "all_pairs": data.all_pairs,
        "random": random_sheet(data, args),
        "max_rows": MAX_ROWS,
    }  # fmt: skip


def _with_code(text):
    """A text in HTML, with the flags in it as code."""
    return Markup(re.sub(r"--\w+", r"<code>\g<0></code>", str(escape(text))))


def class_rows(splits: dict[str, ImageIndex], drawn: DrawnEpoch, args: argparse.Namespace) -> dict[str, Any]:
    """-> heads and rows of the table of classes: images per split, share of the training, images per epoch"""
    counts = np.stack([splits[split].counts() for split in SPLITS])
    train = splits["train"]
    per_epoch = np.bincount(train.targets[drawn.sources()], minlength=len(train.classes))
    merged = ClassNames(args.merge, args.drop).merged()
    rows = []
    for c, name in enumerate(train.classes[:MAX_ROWS]):
        of = f" ({' + '.join(merged[name])})" if name in merged else ""
        bar = Markup('<span class="bar">{} {}</span>').format(count_bar(counts[0, c], counts[0].max()), counts[0, c])
        share = f"{counts[0, c] / counts[0].sum():.1%}"
        rows.append([shortened(name + of, LONGEST_NAME), bar, counts[1, c], counts[2, c], share, per_epoch[c]])
    total = ["all", *counts.sum(axis=1), "100%", per_epoch.sum()]
    return {"heads": ["class", *SPLITS, "share", "per epoch"], "rows": rows, "total": total}


def subject_table(splits: dict[str, ImageIndex], args: argparse.Namespace) -> list[list] | None:
    """-> per split: subjects, photographs per subject (median and most), subjects with several classes; or None"""
    rows = []
    for split in SPLITS:
        subjects = subjects_of(splits[split], args.group_regex)
        if subjects is None:
            return None
        counts = np.unique(subjects, return_counts=True)[1]
        of_classes = np.unique(np.stack([subjects, splits[split].targets]), axis=1)[0]
        several = (np.unique(of_classes, return_counts=True)[1] > 1).sum()
        rows.append([split, len(counts), f"{np.median(counts):g}", counts.max(), several])
    return rows


def what_training_sees(args: argparse.Namespace, drawn: DrawnEpoch) -> list[str]:
    """-> what a training with these flags does with the photographs, in sentences"""
    size = args.image_size
    shape = {
        "stretch": "both sides are stretched", "crop": "the square in the middle is cut out",
        "pad": "the shorter side is padded with black",
    }[args.resize]  # fmt: skip
    sentences = [f"Photographs are resized to {size} x {size} pixels; {shape} (--resize {args.resize})."]
    first = "augmented (--augment_all)" if args.augment_all else "unchanged"
    if args.use_augmentation:
        target = f"{drawn.train_set.counts().max()}, as many as the largest has"
        if args.target_samples_per_class:
            target = f"at least {args.target_samples_per_class}"
        sentences.append(
            f"Each epoch has every training photograph once, {first}, and then augmented copies until every class has "
            f"{target} (--use_augmentation)."
        )
    elif args.sampling != "instance":
        shares = {
            "balanced": "every class equally often", "sqrt": "every class in proportion to the root of its size",
            "progressive": "every class in proportion to its size at first, and in the end equally often",
        }[args.sampling]  # fmt: skip
        sentences.append(
            f"Each epoch draws as many photographs as there are, {shares} (--sampling {args.sampling}). A photograph "
            f"is {first} when an epoch draws it for the first time, and augmented when it is drawn again."
        )
    else:
        off = "" if args.augment_all else ": --use_augmentation and --augment_all are off"
        sentences.append(f"Each epoch has every training photograph once, {first}{off}.")
    if isinstance(drawn.train_set, AugmentedSkinDataset) or args.crt_epochs:
        methods = ", ".join(args.augmentation_methods).replace("_", " ")
        sentences.append(f"Augmentation: {methods} (--augmentation_methods).")
    if args.drw_epoch and (args.use_augmentation or args.sampling != "instance"):
        sentences.append(
            f"This starts in epoch {args.drw_epoch}; before, every photograph is seen once, {first} (--drw_epoch)."
        )
    if args.crt_epochs:
        sentences.append(
            f"The last {args.crt_epochs} epochs draw every class equally often, photographs that are drawn again "
            "augmented (--crt_epochs)."
        )
    if args.progressive:
        sizes = dict.fromkeys(progressive_size(epoch, args.epochs, size) for epoch in range(args.epochs))
        listed = ", then ".join(f"{side} x {side}" for side in sizes)
        sentences.append(f"Training images have {listed} pixels (--progressive).")
    for name, value in {"Mixup": args.mixup, "CutMix": args.cutmix}.items():
        if value:
            sentences.append(f"{name} then mixes the images of a batch, which is not shown here (--{name.lower()}).")
    return [*sentences, "Validation and test photographs are never augmented."]


def median_rows(data: Data) -> list[list]:
    """-> one row per class: photographs, and the medians of what is measured"""
    values = data.measured.values
    order = np.argsort(data.index.targets, kind="stable")
    ends = np.cumsum(data.index.counts())
    rows = []
    for name, members in zip(data.index.classes[:MAX_ROWS], np.split(order, ends), strict=False):
        if not len(members):
            continue
        known = members[values["width"][members] > 0]
        sides = "-"
        if len(known):
            sides = " x ".join(f"{np.median(values[side][known]):.0f}" for side in ("width", "height"))
        brightness, sharpness = (np.median(values[what][members]) for what in ("brightness", "sharpness"))
        row = [shortened(name, LONGEST_NAME), len(members), sides, f"{brightness:.0f}", f"{sharpness:.0f}"]
        rows.append(row)
    return rows


def _name_rows(positions, names):
    counts = np.bincount(positions, minlength=len(names))
    return [[shortened(names[n], LONGEST_NAME), counts[n]] for n in np.argsort(-counts, kind="stable").tolist()]


def problem_groups(data: Data, resize: str) -> list[dict[str, Any]]:
    """-> [{title, number, photos, listed: texts}]: photographs with a problem, then the extremes of what is measured"""
    measured, values = data.measured, data.measured.values
    sides = measured.shorter_sides()
    flagged = {
        "Nearly black": values["near_black"],
        "A single color": is_plain(measured),
        "Of very different size": far_sized(measured),
    }
    groups = [(title, np.flatnonzero(is_odd)) for title, is_odd in flagged.items()]
    extremes = {
        "Smallest": np.where(sides > 0, sides, np.inf), "Most elongated": -elongation(measured),
        "Darkest": values["brightness"], "Brightest": -values["brightness"],
        "Least sharp": values["sharpness"], "Sharpest": -values["sharpness"],
    }  # fmt: skip
    for title, score in extremes.items():
        if len(np.unique(score[np.isfinite(score)])) > 1:  # otherwise all are alike
            groups.append((title, np.argsort(score, kind="stable")[:MAX_EXTREMES]))
    groups = [(title, members) for title, members in groups if len(members)]
    images = iter(data_uris([data.index.paths[i] for _, members in groups for i in members[:MAX_PROBLEMS]], resize))

    def photo(i):
        about = f"{values['width'][i]} x {values['height'][i]}, brightness {values['brightness'][i]:.0f}, " \
                f"sharpness {values['sharpness'][i]:.0f}"  # fmt: skip
        return {"image": next(images), "path": data.index.paths[i], "label": data.about(i), "about": about}

    return [
        {
            "title": title, "number": len(members) if title in flagged else None,
            "photos": [photo(i) for i in members[:MAX_PROBLEMS]],
            "listed": [f"{data.index.paths[i]} ({data.about(i)})" for i in members[:MAX_LISTED]],
        }
        for title, members in groups
    ]  # fmt: skip


def pair_groups(data: Data, resize: str) -> list[dict[str, Any]]:
    """-> [{kind, number, shown: pairs of photos, listed: texts}]"""
    groups = []
    for kind, pairs in data.pairs.items():
        if not len(pairs):
            continue
        chosen = varied(pairs, PAIRS_SHOWN[kind])
        images = iter(data_uris([data.index.paths[i] for pair in chosen for i in pair], resize))
        shown = [
            [{"image": next(images), "path": data.index.paths[i], "label": data.about(i)} for i in pair]
            for pair in chosen
        ]
        listed = [
            " and ".join(f"{data.index.paths[i]} ({data.about(i)})" for i in pair)
            for pair in pairs[:MAX_LISTED].tolist()
        ]
        groups.append({"kind": kind, "number": len(pairs), "shown": shown, "listed": listed})
    return groups


def varied(pairs: np.ndarray, number: int) -> list[list[int]]:
    """-> up to `number` of the pairs (P, 2), one for each group of photographs that look alike before others of it"""
    first, others, seen = [], [], set()
    for pair in pairs[:MAX_SORTED].tolist():
        (first if seen.isdisjoint(pair) else others).append(pair)
        seen.update(pair)
    return [*first, *others][:number]


def random_sheet(data: Data, args: argparse.Namespace) -> list[tuple[str, list]]:
    """-> [(class, photographs of it that are drawn at random)], the smallest classes first; bounded"""
    rng, counts = np.random.default_rng(args.seed), data.index.counts()
    order = np.argsort(counts, kind="stable")[: MAX_SHEET // LEAST_PER_CLASS].tolist()
    number = min(MAX_PER_CLASS, max(LEAST_PER_CLASS, MAX_SHEET // len(order)))
    members = {c: np.flatnonzero(data.index.targets == c) for c in order}
    chosen = {c: rng.permutation(of_class)[:number].tolist() for c, of_class in members.items()}
    paths = [data.index.paths[i] for of_class in chosen.values() for i in of_class]
    images = iter(data_uris(paths, args.resize, SHEET_SIDE))
    return [
        (data.index.classes[c], [(next(images), data.index.paths[i]) for i in of_class])
        for c, of_class in chosen.items()
    ]
