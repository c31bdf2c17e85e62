"""What lets a test flatter a model: a person in two parts of the split, or one photograph in two.

Groups (persons) are read from file names; near-duplicates are found by a perceptual hash of the cached images.
"""

import itertools
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from joblib import cpu_count

from files import UserError

THUMBNAIL = 32  # pixels
HASH_SIDE = 8  # lowest frequencies of the thumbnail: a hash of 64 bits
MOST_BITS_APART = 4
LEAST_CORRELATION = 0.98
MOST_LISTED = 20
MOST_PER_GROUP = 50  # larger ones are no persons, but grades or hospitals
FEWEST_GROUPS = 10


# ---------------------------------------------------------------------------------------------------------- groups


def groups_of(paths, pattern):
    """`--group_regex`: which images are of one person. -> (N,) int64, numbers of the groups; None without a pattern.

    The group is what the first parenthesis of `pattern` (or, without any, the whole of it) matches in the file name.
    Raises UserError, naming the first file, if one does not match.
    """
    if not pattern:
        return None
    return np.unique(group_names(paths, pattern), return_inverse=True)[1].astype(np.int64)


def group_names(paths, pattern):
    """-> [name of the group an image]; see `groups_of`."""
    regex = re.compile(pattern)
    found = map(regex.search, map(os.path.basename, paths))
    names = [match and match[1 if regex.groups else 0] for match in found]
    missing = [path for path, name in zip(paths, names, strict=True) if not name]
    if missing:
        more = f", nor {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(
            f"--group_regex: {pattern} finds nobody in the name of {missing[0]}{more} (--group_regex '': no persons)"
        )
    return names


def check_groups(parts, pattern):
    """Raise UserError if a group is in two of {part: ImageIndex}, as --val_dirs and --test_dirs could have it."""
    part_of = {}
    for part, index in parts.items():
        for name, path in zip(group_names(index.paths, pattern), index.paths, strict=True):
            former, former_path = part_of.setdefault(name, (part, path))
            if former != part:
                raise UserError(
                    f"--group_regex: group {name!r} is in two parts: {former_path} ({former}) and {path} ({part})"
                )


def warn_of_grouped_names(paths):
    """A line if the file names look as if several images were of one person: `0001_left.jpg`, `0001_right.jpg`."""
    stems = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    for pattern in (r"^([^_-]+)[_-]", r"^([^_-]+[_-][^_-]+)[_-]"):
        counts = Counter(match[1] for match in map(re.compile(pattern).match, stems) if match)
        several = sum(count for count in counts.values() if count > 1)
        if len(counts) >= FEWEST_GROUPS and several > len(stems) / 2 and several <= MOST_PER_GROUP * len(counts):
            name, count = counts.most_common(1)[0]
            print(
                f"warning: the file names look grouped ({count} begin with {name!r}); if that is a person, the test "
                f"flatters a model that recognises persons; keep each in one part with --group_regex '{pattern}'"
            )
            return


# -------------------------------------------------------------------------------------------------- near-duplicates


def warn_of_near_duplicates(parts):
    """List the pairs of photographs in different parts that are nearly the same. parts: {part: ImageIndex}."""
    rows = np.concatenate([index.rows for index in parts.values()])
    cache = next(iter(parts.values())).cache
    if (rows < 0).all() or cache.pixels is None:  # decoding them all again would cost more than this is worth
        return
    paths = [(part, path) for part, index in parts.items() for path in index.paths]
    of_part = np.repeat(np.arange(len(parts)), [len(index) for index in parts.values()])
    pairs = near_duplicates(cache.pixels, rows, of_part)
    for one, other in pairs[:MOST_LISTED]:
        print("nearly the same: " + " and ".join(f"{paths[i][1]} ({paths[i][0]})" for i in (one, other)))
    if pairs:
        more = f", {MOST_LISTED} of them listed above" if len(pairs) > MOST_LISTED else " (listed above)"
        print(
            f"warning: {len(pairs)} pairs of photographs in different parts are nearly the same{more}; remove one of "
            "each, or keep them in one part with --group_regex"
        )


def near_duplicates(pixels, rows, of_part):
    """-> [(i, j)], i < j: images of different parts whose hashes differ by few bits and whose thumbnails correlate.

    pixels: (M, S, S, 3) uint8; rows: (N,) into it, -1 for an image that is not there; of_part: (N,) int.
    """
    here = np.flatnonzero(rows >= 0)
    with ThreadPoolExecutor(cpu_count()) as pool:
        blocks = np.array_split(here, max(1, len(here) // 256))
        done = list(pool.map(lambda block: _thumbnails_and_hashes(pixels, rows[block]), blocks))
    thumbnails, hashes = (np.concatenate(parts) for parts in zip(*done, strict=True))
    varied = thumbnails.any(axis=1)  # images of one colour are all alike, and say nothing
    here, thumbnails, hashes = here[varied], thumbnails[varied], hashes[varied]
    pairs = _close_pairs(hashes)
    pairs = pairs[of_part[here[pairs[:, 0]]] != of_part[here[pairs[:, 1]]]]
    correlation = np.einsum("np,np->n", thumbnails[pairs[:, 0]], thumbnails[pairs[:, 1]])
    return [tuple(pair) for pair in here[pairs[correlation >= LEAST_CORRELATION]].tolist()]


def _thumbnails_and_hashes(pixels, rows):
    """-> (grey thumbnails of mean 0 and norm 1 (n, THUMBNAIL^2) float32, 64-bit hashes (n,) uint64).

    The hash tells which of the lowest frequencies are above their median: what is left of an image that is compressed,
    scaled, or made brighter.
    """
    thumbnails = np.empty((len(rows), THUMBNAIL, THUMBNAIL), np.float32)
    bits = np.empty((len(rows), HASH_SIDE**2), bool)
    for n, row in enumerate(rows):
        grey = cv2.cvtColor(pixels[row], cv2.COLOR_RGB2GRAY)
        thumbnails[n] = cv2.resize(grey, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
        low = cv2.dct(thumbnails[n])[:HASH_SIDE, :HASH_SIDE].ravel()
        bits[n] = low > np.median(low[1:])
    flat = thumbnails.reshape(len(rows), -1)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    return flat, np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def _close_pairs(hashes):
    """-> (P, 2): every pair at most MOST_BITS_APART bits apart.

    Cut into one band of bits more than that, two such hashes agree in a band.
    """
    found = [np.empty((0, 2), np.int64)]
    edges = np.linspace(0, 64, MOST_BITS_APART + 2).astype(int)
    for low, high in itertools.pairwise(edges):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=band[order][:1] + 1))
        sizes = np.diff(starts, append=len(order))
        for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
            members = np.sort(order[start : start + size])
            i, j = np.triu_indices(size, 1)
            differing = (hashes[members[i]] ^ hashes[members[j]]).view(np.uint8).reshape(-1, 8)
            near = np.unpackbits(differing, axis=1).sum(axis=1) <= MOST_BITS_APART
            found.append(np.column_stack([members[i[near]], members[j[near]]]))
    return np.unique(np.concatenate(found), axis=0)
