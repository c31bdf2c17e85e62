"""What is measured of each photograph when data are checked: its file, and the pixels that training sees."""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import cv2
import numpy as np

from images.color import describe_profile
from images.decode import is_one_color, read_header
from images.leakage import THUMBNAIL, thumbnail_of
from run.cli import progress_bar
from run.cores import num_cores

# width, height: of the file, upright, 0 where it does not state them; kind, profile: positions in the names of
# `Measurements`; brightness: mean luma, 0 to 255; sharpness: variance of the Laplacian of the luma
MEASURES = np.dtype([
    ("width", np.int32), ("height", np.int32), ("kind", np.int16), ("profile", np.int16),
    ("brightness", np.float32), ("sharpness", np.float32), ("near_black", bool), ("one_color", bool),
])  # fmt: skip
BLACK, BLACK_SHARE = 16, 0.95  # near-black: this share of the pixels has a luma below this level of 255
CHUNK = 512  # photographs that are submitted at once
MAX_NAMES, OTHERS = 30, "others"  # of kinds, and of profiles


@dataclass
class Measurements:
    """values: (N,) MEASURES; thumbnails: (N, THUMBNAIL, THUMBNAIL) uint8; kinds: formats with their color modes."""

    values: np.ndarray
    thumbnails: np.ndarray
    kinds: list[str]
    profiles: list[str]

    def shorter_sides(self) -> np.ndarray:
        """-> (N,) pixels, 0 where unknown."""
        return np.minimum(self.values["width"], self.values["height"])

    def aspects(self) -> np.ndarray:
        """-> (N,) width divided by height, NaN where unknown."""
        width, height = (self.values[name].astype(float) for name in ("width", "height"))
        return np.divide(width, height, out=np.full(len(width), np.nan), where=height > 0)


def measure(paths: Sequence[str], read: Callable[[int], np.ndarray], resize: str) -> Measurements:
    """Measure every photograph once, in threads: the libraries that do the work release the interpreter's lock.

    paths: N files, of which only the beginning is read; read: position -> (S, S, 3) uint8, what training sees of it,
    resized as `resize` says. Memory grows by 1 kB per photograph, for the thumbnails.
    """
    values, names = np.zeros(len(paths), MEASURES), {"kind": {}, "profile": {}}
    thumbnails = np.empty((len(paths), THUMBNAIL, THUMBNAIL), np.uint8)

    def measure_one(i, path):
        header = _header(path)
        pixels = read(i)
        if resize == "pad":  # black beside them would make all photographs dark, and alike
            pixels = _without_padding(pixels, header)
        thumbnails[i] = thumbnail_of(pixels)
        return header, _measure_pixels(pixels)

    pool = ThreadPoolExecutor(num_cores())
    with ExitStack() as stack:
        # after a signal, no thread is waited for: its disk may never answer
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        bar = stack.enter_context(progress_bar(None, "measured", "image", len(paths)))
        numbered, position = enumerate(paths), 0
        while chunk := list(itertools.islice(numbered, CHUNK)):
            for (width, height, *stated), measured in pool.map(measure_one, *zip(*chunk, strict=True)):
                numbers = [_number_of(name, names[what]) for what, name in zip(names, stated, strict=True)]
                values[position] = (width, height, *numbers, *measured)
                position += 1
                bar.update()
    return Measurements(values, thumbnails, list(names["kind"]), list(names["profile"]))


def _header(path):
    """-> (width, height, kind, profile)"""
    try:
        header = read_header(path)
    except Exception:  # the pixels could be read, or were read before: it is only the statistics that lack it
        return 0, 0, "unknown", "unknown"
    kind = f"{header.format} {header.mode}".strip()
    return header.width, header.height, kind, describe_profile(header.profile, header.mode)


def _number_of(name, names):
    """The position of a name in {name: position}, to which new ones are added while there is room."""
    if name not in names and len(names) >= MAX_NAMES:
        name = OTHERS
    return names.setdefault(name, len(names))


def _without_padding(pixels, header):
    """The photograph that `--resize pad` has put into the middle of a square."""
    width, height, *_ = header
    if not width:
        return pixels
    size = len(pixels)
    inner = [max(1, round(side * size / max(width, height))) for side in (height, width)]
    top, left = ((size - side) // 2 for side in inner)
    return np.ascontiguousarray(pixels[top : top + inner[0], left : left + inner[1]])


def _measure_pixels(pixels):
    """-> brightness, sharpness, near_black, one_color"""
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    near_black = np.count_nonzero(gray < BLACK) >= BLACK_SHARE * gray.size
    laplacian = cv2.Laplacian(gray, cv2.CV_16S, ksize=1)
    return cv2.mean(gray)[0], float(cv2.meanStdDev(laplacian)[1][0, 0] ** 2), near_black, is_one_color(pixels)
