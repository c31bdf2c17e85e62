"""What makes a test too optimistic: a subject in two splits, or the same photograph in two splits.

Subjects are read from file names; near-duplicate photographs are found by a perceptual hash of the cached images.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from images.folders import ImageIndex, file_stat
from images.names import composed
from run.cli import UserError, attempt
from run.cores import num_cores
from run.files import write_json

MAX_IMAGES_PER_SUBJECT = 50  # larger groups are not subjects, but grades or hospitals
MIN_SUBJECTS = 10
THUMBNAIL = 32  # pixels
HASH_SIDE = 8  # lowest frequencies of the thumbnail: a hash of 64 bits
MAX_BITS_APART = 4
MIN_CORRELATION = 0.98
MAX_LISTED = 20
DUPLICATES_FILE, MAX_STORED = "near_duplicates.json", 1000
# hashes with at most 4 different bits agree in at least 3 of 7 blocks of bits: only such hashes are compared
HASH_BLOCKS, BLOCKS_IN_COMMON = 7, 3
# past these limits, which only photographs that all look alike reach, the search is incomplete: its time and memory
# must not grow with the square of the number of images
MAX_COMPARISONS = 200_000_000  # of two hashes
MAX_CANDIDATES = 1_000_000  # pairs of images whose thumbnails are compared
BLOCK = 2**18  # pairs at a time
THUMBNAILS_AT_ONCE = 2**16  # 256 MB


def subject_ids(paths: Iterable[str], pattern: str | None) -> np.ndarray | None:
    """`--group_regex`: which images are of the same subject -> (N,) int64, the subjects' numbers; None if no pattern.

    The subject is what the first group of `pattern` (or, without groups, the whole pattern) matches in the file name.
    Raises UserError, naming the first file, if a file name does not match.
    """
    if not pattern:
        return None
    return np.unique(subject_names(paths, pattern), return_inverse=True)[1].astype(np.int64)


def subject_names(paths: Iterable[str], pattern: str) -> list[str]:
    """-> the N names of the images' subjects; see `subject_ids`."""
    regex = re.compile(composed(pattern))
    found = map(regex.search, map(_composed_name, paths))
    names = [match and match[1 if regex.groups else 0] for match in found]
    missing = [path for path, name in zip(paths, names, strict=True) if not name]
    if missing:
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(
            f"--group_regex: {pattern} does not match the file name of {missing[0]}{more} (if the names contain no "
            "subjects, pass --group_regex '')"
        )
    return names


def subjects_of(index: ImageIndex, pattern: str | None) -> np.ndarray | None:
    """-> (N,) int64, the numbers of the subjects by the table of the images, or else by `--group_regex`; None without.

    pattern: value of `--group_regex`. An image whose subject the table does not name is a subject of its own.
    """
    if index.subject_column is None:
        return subject_ids(index.paths, pattern)
    names = _names_in_table(index)  # an array of these would be as wide as the longest one
    number = {name: i for i, name in enumerate(sorted(set(names)))}
    return np.array([number[name] for name in names], np.int64)


def _names_in_table(index):
    names = map(composed, index.columns[index.subject_column])
    return [name or path for name, path in zip(names, index.paths, strict=True)]


def _composed_name(path):
    return composed(os.path.basename(path))


def has_subjects(flags: Mapping[str, Any], results: Mapping[str, Any]) -> bool:
    """Whether the subjects of a run are known. flags: {flag: value} of args.json; results: of results.json."""
    return bool(flags.get("group_regex") or results.get("subject_column"))


def num_nameless(index: ImageIndex) -> int:
    """-> how many images have an empty cell in the column of the subjects, 0 without such a column."""
    return sum(not name for name in index.columns[index.subject_column]) if index.subject_column else 0


def warn_of_nameless_subjects(index: ImageIndex) -> None:
    """Print how many images have an empty cell in the column of the subjects."""
    if number := num_nameless(index):
        print(
            f"warning: --subject_column: {number} of {len(index)} images have no subject in {index.subject_column!r}; "
            "each of them counts as a subject of its own"
        )


def check_subjects(splits: dict[str, ImageIndex], pattern: str | None) -> None:
    """Raise UserError if a subject is in two splits, which --val_dirs, --test_dirs and --split_column can cause."""
    first_seen = {}
    for split, index in splits.items():
        flag = "--subject_column" if index.subject_column else "--group_regex"
        names = _names_in_table(index) if index.subject_column else subject_names(index.paths, pattern)
        for name, path in zip(names, index.paths, strict=True):
            other_split, other_path = first_seen.setdefault(name, (split, path))
            if other_split != split:
                raise UserError(
                    f"{flag}: subject {name!r} is in two splits: {other_path} ({other_split}) and {path} ({split})"
                )


def warn_of_grouped_names(paths: Iterable[str]) -> None:
    """Print a line if the file names suggest several images per subject: `0001_left.jpg`, `0001_right.jpg`."""
    stems = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    for pattern in (r"^([^_-]+)[_-]", r"^([^_-]+[_-][^_-]+)[_-]"):
        counts = Counter(match[1] for match in map(re.compile(pattern).match, stems) if match)
        several = sum(count for count in counts.values() if count > 1)
        if len(counts) >= MIN_SUBJECTS and several > len(stems) / 2 and several <= MAX_IMAGES_PER_SUBJECT * len(counts):
            name, count = counts.most_common(1)[0]
            print(
                f"warning: the file names look grouped ({count} begin with {name!r}); if this identifies a subject, "
                "the test favors a model that recognizes subjects; keep each subject in one split with "
                f"--group_regex '{pattern}'"
            )
            return


def num_trained_on(paths: Iterable[str], checkpoints: Iterable[dict]) -> int:
    """How many images have the name and size of an image that one of the checkpoints was trained on."""
    trained_sizes = {}
    for checkpoint in checkpoints:
        names, sizes = (checkpoint[key]["train"] for key in ("splits", "file_sizes"))
        for name, size in zip(map(_composed_name, names), sizes.tolist(), strict=True):
            trained_sizes.setdefault(name, set()).add(size)
    found = ((path, trained_sizes.get(_composed_name(path))) for path in paths)
    return sum(sizes is not None and file_stat(path)[0] in sizes for path, sizes in found)


def warn_of_near_duplicates(splits: dict[str, ImageIndex], run_dir: Path | None = None) -> None:
    """List the pairs of nearly identical photographs in different splits. A failure costs the list, never the run.

    With a table of labels, which may name a photograph twice under two names, also those of two classes in one split.
    run_dir: a folder for `DUPLICATES_FILE`: {"complete": whether these are all, "count": pairs found, "pairs":
    [[[split, path], [split, path]], ...], the first MAX_STORED of them}; with a table also "other_class": as "pairs",
    of those in one split.
    """
    failure = "the search for near-duplicate photographs failed, none are listed"
    attempt(lambda: _list_near_duplicates(splits, run_dir), failure)


def _list_near_duplicates(splits, run_dir):
    cache_rows = np.concatenate([index.cache_rows for index in splits.values()])
    cache = next(iter(splits.values())).cache
    if (cache_rows < 0).all() or cache.pixels is None:  # decoding every image again would cost more than it is worth
        return
    sizes = [len(index) for index in splits.values()]
    split_of = np.repeat(np.arange(len(splits)), sizes)
    first = np.cumsum([0, *sizes])
    group_of, has_table = split_of, all(index.columns is not None for index in splits.values())
    if has_table:
        targets, classes = (np.concatenate([index.targets for index in splits.values()]), splits["train"].classes)
        group_of = split_of * len(classes) + targets
    pairs, complete = near_duplicates(cache.pixels, cache_rows, group_of)
    in_one_split = split_of[pairs[:, 0]] == split_of[pairs[:, 1]]
    relabelled, pairs = pairs[in_one_split], pairs[~in_one_split]

    def place(image):
        split = list(splits)[split_of[image]]
        return split, splits[split].paths[image - first[split_of[image]]]

    places = [[place(image) for image in pair] for pair in pairs[:MAX_STORED].tolist()]
    for pair in places[:MAX_LISTED]:
        print(f"nearly identical: {' and '.join(f'{path} ({split})' for split, path in pair)}")
    if len(pairs):
        count = f"{len(pairs)} pair{'s' if len(pairs) > 1 else ''}" if complete else f"at least {len(pairs)} pairs"
        or_column = " or --subject_column" if has_table else ""
        listed = f"{MAX_LISTED} of them listed above" if len(pairs) > MAX_LISTED else "listed above"
        print(
            f"warning: {count} of nearly identical photographs in different splits ({listed}); delete one of each "
            f"pair, or keep them in one split with --group_regex{or_column}"
        )
    for a, b in relabelled[:MAX_LISTED].tolist():
        labels = " and ".join(f"{place(i)[1]} ({classes[targets[i]]})" for i in (a, b))
        print(f"nearly identical, with two labels: {labels}")
    if len(relabelled):
        print(
            f"warning: pairs of nearly identical photographs in one split that have two labels: {len(relabelled)}; "
            "correct the table"
        )
    if not complete:
        print(
            "warning: too many photographs look alike to compare them all; the list of nearly identical photographs is "
            "incomplete"
        )
    if run_dir:
        with suppress(OSError):  # it is only informative
            found = {"complete": complete, "count": len(pairs), "pairs": places}
            if has_table:
                found["other_class"] = [[place(image) for image in pair] for pair in relabelled[:MAX_STORED].tolist()]
            write_json(Path(run_dir, DUPLICATES_FILE), found)


def near_duplicates(pixels: np.ndarray, cache_rows: np.ndarray, split_of: np.ndarray) -> tuple[np.ndarray, bool]:
    """Find images of different splits whose hashes differ in few bits and whose thumbnails correlate.

    pixels: (M, S, S, 3) uint8, or (M, THUMBNAIL, THUMBNAIL) uint8 of `thumbnail_of`; cache_rows: (N,) int into
    `pixels`, -1 for an image that is not there; split_of: (N,) int. -> (pairs (P, 2) int64, i < j in each, sorted;
    whether that is all of them). Neither time nor memory grows with the square of N.
    """
    images = np.flatnonzero(cache_rows >= 0)
    hashes, varied = np.empty(len(images), np.uint64), np.empty(len(images), bool)

    def hash_block(block):
        thumbnails = _thumbnails(pixels, cache_rows[images[block]])
        hashes[block] = _hashes(thumbnails)
        varied[block] = thumbnails.min(axis=(1, 2)) < thumbnails.max(axis=(1, 2))

    _in_threads(hash_block, len(images), 256)
    images, hashes = images[varied], hashes[varied]  # images of a single color are all alike, which means nothing
    candidates, complete = _candidates(hashes, split_of[images])
    pairs = np.sort(images[candidates], axis=1)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return pairs[_correlations(pixels, cache_rows, pairs) >= MIN_CORRELATION], complete


def _in_threads(function, count, block_size):
    """Call `function` with slices that together cover `count` positions."""
    with ThreadPoolExecutor(num_cores()) as pool:
        for _ in pool.map(function, [slice(i, i + block_size) for i in range(0, count, block_size)]):
            pass  # a call that failed raises here


def _thumbnails(pixels, rows):
    """-> (n, THUMBNAIL, THUMBNAIL) uint8, grayscale."""
    if pixels.ndim == 3:
        return pixels[rows]
    thumbnails = np.empty((len(rows), THUMBNAIL, THUMBNAIL), np.uint8)
    for n, row in enumerate(rows):
        thumbnails[n] = thumbnail_of(pixels[row])
    return thumbnails


def thumbnail_of(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8, RGB -> (THUMBNAIL, THUMBNAIL) uint8, grayscale."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return cv2.resize(gray, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)


def _hashes(thumbnails):
    """-> (n,) uint64: which of the lowest frequencies are above their median.

    This survives when an image is compressed, scaled, or made brighter.
    """
    low = np.empty((len(thumbnails), HASH_SIDE**2), np.float32)
    for n, thumbnail in enumerate(thumbnails):
        low[n] = cv2.dct(thumbnail.astype(np.float32))[:HASH_SIDE, :HASH_SIDE].ravel()
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def _correlations(pixels, cache_rows, pairs):
    """-> (P,) float32: the correlation of the thumbnails of each pair of images."""
    images, positions = np.unique(pairs, return_inverse=True)
    if len(images) > THUMBNAILS_AT_ONCE:
        halves = np.array_split(pairs, 2)
        return np.concatenate([_correlations(pixels, cache_rows, half) for half in halves])
    first, second = positions.reshape(-1, 2).T
    thumbnails = np.empty((len(images), THUMBNAIL**2), np.float32)
    correlations = np.empty(len(pairs), np.float32)

    def normalize_block(block):
        flat = _thumbnails(pixels, cache_rows[images[block]]).reshape(-1, THUMBNAIL**2).astype(np.float32)
        flat -= flat.mean(axis=1, keepdims=True)
        thumbnails[block] = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)

    def correlate_block(block):
        correlations[block] = np.einsum("np,np->n", thumbnails[first[block]], thumbnails[second[block]])

    _in_threads(normalize_block, len(images), 256)
    _in_threads(correlate_block, len(pairs), 512)
    return correlations


def _candidates(hashes, split_of):
    """-> (pairs (P, 2) int64 of images of different splits at most MAX_BITS_APART bits apart, whether that is all).

    Images of the same hash and split are one group; the groups are compared, however many images are in them.
    """
    order = np.lexsort((split_of, hashes))
    hashes, split_of = hashes[order], split_of[order]
    starts = np.flatnonzero(np.diff(hashes, prepend=~hashes[:1]) | (np.diff(split_of, prepend=split_of[:1]) != 0))
    sizes = np.diff(starts, append=len(order))
    a, b, complete = _close_groups(hashes[starts], split_of[starts], sizes)
    numbers_of_pairs = sizes[a] * sizes[b]
    pairs = [np.empty((0, 2), np.int64)]
    for g, k in _count_up(numbers_of_pairs, MAX_CANDIDATES):
        i, j = np.divmod(k, sizes[b[g]])
        pairs.append(np.column_stack([order[starts[a[g]] + i], order[starts[b[g]] + j]]))
    return np.concatenate(pairs), complete and int(numbers_of_pairs.sum()) <= MAX_CANDIDATES


def _close_groups(hashes, split_of, sizes):
    """-> (a (P,), b (P,), whether that is all): pairs of groups of different splits with few bits apart."""
    edges = np.linspace(0, 64, HASH_BLOCKS + 1).astype(int)
    blocks = [((1 << int(high - low)) - 1) << int(low) for low, high in itertools.pairwise(edges)]
    masks = [2**64 - 1, *map(sum, itertools.combinations(blocks, BLOCKS_IN_COMMON))]  # the same hash first of all
    masks = np.array(masks, np.uint64)
    found, comparisons, candidates = [np.empty((2, 0), np.int64)], 0, 0
    for number, mask in enumerate(masks):
        for a, b in _equal_pairs(hashes & mask):
            differing = hashes[a] ^ hashes[b]
            more_bits = differing.copy()
            for _ in range(MAX_BITS_APART):
                more_bits &= more_bits - np.uint64(1)  # clears the lowest bit that is set
            close = np.flatnonzero((more_bits == 0) & (split_of[a] != split_of[b]))
            for previous in masks[:number]:  # by which the pair was found already
                close = close[differing[close] & previous != 0]
            found.append(np.stack([a[close], b[close]]))
            comparisons += len(a)
            candidates += (sizes[a[close]] * sizes[b[close]]).sum()
            if comparisons > MAX_COMPARISONS or candidates > MAX_CANDIDATES:
                return *np.concatenate(found, axis=1), False
    return *np.concatenate(found, axis=1), True


def _equal_pairs(keys) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs of positions with equal keys in blocks of (positions, positions)."""
    order = np.argsort(keys, kind="stable")
    ends = np.searchsorted(keys[order], keys[order], side="right")
    for position, k in _count_up(ends - np.arange(1, len(keys) + 1)):
        yield order[position], order[position + 1 + k]


def _count_up(counts, limit=None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (position, k), k = 0 ... counts[position] - 1, for each position in turn, in blocks. limit: of them all."""
    ends = np.cumsum(counts)
    starts, total = ends - counts, ends[-1] if len(ends) else 0
    total = total if limit is None else min(total, limit)
    for start in range(0, total, BLOCK):
        numbers = np.arange(start, min(start + BLOCK, total))
        position = np.searchsorted(ends, numbers, side="right")
        yield position, numbers - starts[position]
