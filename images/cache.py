"""The image cache: every photograph is decoded once, into a file that all processes map into their memory."""

import argparse
import errno
import itertools
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import filelock
import numpy as np

from images.decode import FACTS, ONE_COLOR, TOO_DARK, decode, failure_reason
from images.folders import ImageIndex, Paths, file_stat
from run.cli import UserError, printable, progress_bar
from run.cores import num_cores
from run.files import atomic_write
from run.surroundings import user_folder

FORMAT_VERSION = 4  # increase it when the cache's files change, or how a photograph becomes pixels
CHUNK_BYTES = 256 * 2**20  # of pixels decoded at once, at most
SAVE_SECONDS = 30  # a process that is killed while filling the cache loses at most this much work
INDEX_FILE = "index.npz"
MAX_ASPECT = 1.5  # longer side divided by the shorter; a warning if the median is above it and images are stretched
MAX_LISTED = 5  # images, in a warning
PROBLEMS = {
    ONE_COLOR: "of a single color, which may be damaged",
    TOO_DARK: "of more than 8 bits with values only in the darkest quarter; if they have 10, 12 or 14 bits, save them "
    "with 8, or state it in the TIFF tag MaxSampleValue or the PNG chunk sBIT",
}


def default_cache_dir() -> str | None:
    """-> `$XDG_CACHE_HOME/skin-grading`, by default `~/.cache/skin-grading`; None for a user without a home folder."""
    folder = user_folder("XDG_CACHE_HOME", ".cache")
    return folder and os.path.join(folder, "skin-grading")


def open_cache(args: argparse.Namespace) -> "ImageCache":
    folder = args.cache_dir or default_cache_dir()  # never inherited from a checkpoint: another user has another one
    if not folder and not args.no_cache:
        print("image cache: this user has no home folder; name a folder for it with --cache_dir")
    return ImageCache(None if args.no_cache else folder, args.image_size, args.resize)


def read_all(indexes: dict[str, ImageIndex], cache: "ImageCache", skip_broken: bool) -> dict[str, ImageIndex]:
    """Decode every image of `indexes` once, into the cache unless it is there already.

    Broken images are listed with the reason, odd ones in a warning. -> the same indexes with the images' cache rows
    and file sizes, and without the broken images. Raises UserError if there are any, unless `skip_broken`, or if an
    index has no others.
    """
    paths = sum((index.paths for index in indexes.values()), Paths())
    stats = np.array([file_stat(path) for path in paths], dtype=np.int64).reshape(-1, 3)
    cache_rows, facts, reasons = cache.fill(paths, stats)
    broken = cache.unreadable = [(paths[i], reason) for i, reason in sorted(reasons.items())]
    for path, reason in broken:
        print(f"broken: {printable(path)}: {reason}")
    if broken and not skip_broken:
        more = f", and {len(broken) - 1} more (listed above)" if len(broken) > 1 else ""
        raise UserError(
            f"{broken[0][0]} cannot be read: {broken[0][1]}{more}; fix or delete broken files, or skip them with "
            "--skip_broken"
        )
    _warn_of_odd_images(paths, facts, cache.resize)
    readable, start = {}, 0
    for name, index in indexes.items():
        kept = [i for i in range(len(index)) if start + i not in reasons]
        positions = slice(start, start + len(index))
        cached = replace(index, cache_rows=cache_rows[positions], cache=cache, sizes=stats[positions, 0].copy())
        readable[name] = cached.subset(kept) if len(kept) < len(index) else cached
        start += len(index)
        if not kept:
            raise UserError(f"{index.paths[0]} cannot be read, and neither can any other image of its folders")
    return readable


def _warn_of_odd_images(paths, facts, resize):
    """facts: (N,) FACTS, as for all images; those of a broken one are 0."""
    for note, problem in PROBLEMS.items():
        positions = np.flatnonzero(facts["notes"] & note)
        if positions.size:
            listed = ", ".join(paths[i] for i in positions[:MAX_LISTED])
            more = f" and {positions.size - MAX_LISTED} more" if positions.size > MAX_LISTED else ""
            images = "1 image" if positions.size == 1 else f"{positions.size} images"
            print(f"warning: {images} {problem} ({listed}{more})")
    aspects = facts["aspect"][facts["aspect"] > 0]
    if resize == "stretch" and aspects.size and (median := float(np.median(aspects))) > MAX_ASPECT:
        print(
            f"warning: --resize stretch distorts the images: their longer side is {median:.2f} times the shorter "
            "(median); crop or pad keeps their shape"
        )


class ImageCache:
    """Images of one size in a file of raw pixels, mapped into the memory of every process that uses it.

    Rows are only ever added, so what other processes read never changes; a changed photograph gets a new row. One
    process fills the cache at a time; the others wait and then find the images there.
    """

    def __init__(self, cache_dir: str | Path | None, image_size: int, resize: str = "stretch"):
        """cache_dir: None for no cache; every image is then decoded on every use. resize: as for `decode`."""
        self.image_size, self.resize = image_size, resize
        kind = f"{image_size}px" if resize == "stretch" else f"{image_size}px_{resize}"
        self.folder = Path(cache_dir, f"{kind}_v{FORMAT_VERSION}") if cache_dir else None
        self._pixel_file, self._shape = None, (0, image_size, image_size, 3)
        self.unreadable: list[tuple[str, str]] = []  # (path, reason), as `read_all` has found them

    def fill(self, paths: Paths, stats: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Decode every image that is not cached yet, and store it.

        -> (rows (N,) int64, facts (N,) FACTS, {position: why it is broken}). paths: N paths; stats: (N, 3) int64, the
        `file_stat` of each. A row is -1 if the image is broken, or if there was no room for it.
        """
        with self._locked() as writable:
            index = CacheIndex(self.folder, self._shape)
            rows = index.find(paths, stats)
            missing = np.flatnonzero(rows < 0)
            if writable and missing.size and index.drop_dead_rows():
                rows = index.find(paths, stats)
            facts, reasons = np.zeros(len(paths), FACTS), {}
            facts[rows >= 0] = index.facts[rows[rows >= 0]]
            with CacheWriter(index, missing.size, writable) as writer:
                for chunk, pixels, chunk_facts, chunk_reasons in _decode_chunks(paths, missing, self):
                    facts[chunk] = chunk_facts
                    reasons |= chunk_reasons
                    intact = np.array([i not in chunk_reasons for i in chunk])
                    chunk = chunk[intact]
                    writer.add(pixels[intact], paths[chunk], stats[chunk], facts[chunk])
            if missing.size:
                rows = index.find(paths, stats)
            if len(index):  # mapped under the lock: no other process can delete the file in between
                self.__dict__.pop("pixels", None)
                self._pixel_file, self._shape = index.pixel_file, (len(index), *self._shape[1:])
                if self.pixels is None:
                    print(
                        f"image cache: {self.folder} cannot be mapped into memory; choose another folder with "
                        "--cache_dir"
                    )
                    rows[:] = -1
        self._report(rows, missing.size - len(reasons))
        return rows, facts, reasons

    @cached_property
    def pixels(self) -> np.ndarray | None:
        """(rows, size, size, 3) uint8, read-only; None if the file is gone or its file system cannot map files."""
        try:
            return np.asarray(np.memmap(self.folder / self._pixel_file, np.uint8, mode="r", shape=self._shape))
        except OSError:
            return None

    def __getstate__(self):  # a worker that is not forked maps the file again
        return {name: value for name, value in self.__dict__.items() if name != "pixels"}

    @contextmanager
    def _locked(self):
        """Yields whether the cache is writable."""
        if not self.folder:
            yield False
            return
        lock = filelock.FileLock(self.folder / "lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # photographs of people
            try:
                lock.acquire(blocking=False)
            except filelock.Timeout:
                print(f"image cache: waiting for another process that is filling {self.folder}")
                lock.acquire()
        except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
            reason = getattr(error, "strerror", None) or error
            print(f"image cache: {self.folder} is not writable ({reason}); choose another folder with --cache_dir")
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _report(self, rows, decoded):
        cached = int((rows >= 0).sum())
        if cached:
            megabytes = cached * np.prod(self._shape[1:]) / 1e6
            print(f"image cache: {cached} images, {megabytes:.1f} MB, in {self.folder} ({decoded} newly decoded)")
        if cached < len(rows):
            print(f"image cache: {len(rows) - cached} images are not cached and are decoded on every use")


class CacheIndex:
    """Describes the rows of the cache's pixel file: row k holds `paths[k]` as it was when it had `stats[k]`.

    facts: (rows,) FACTS.
    The index is written after the pixels. A process that is killed in between leaves rows without an entry, and the
    next one overwrites them; entries without a row in the pixel file are dropped when the index is read.
    """

    def __init__(self, folder: Path | None, shape: tuple[int, ...]):
        self.folder, self.row_bytes = folder, int(np.prod(shape[1:]))
        self.paths, self.stats, self.pixel_file = Paths(), np.empty((0, 3), np.int64), _new_pixel_file()
        self.facts = np.empty(0, FACTS)
        if folder:
            self._read()

    def __len__(self) -> int:
        return len(self.paths)

    def _read(self):
        try:
            with np.load(self.folder / INDEX_FILE, allow_pickle=False) as content:
                paths = Paths.from_arrays(content["letters"], content["ends"])
                stats, pixel_file = content["stats"], os.path.basename(str(content["pixel_file"]))
                facts = content["facts"].astype(FACTS)
            complete_rows = os.path.getsize(self.folder / pixel_file) // self.row_bytes
        except (FileNotFoundError, PermissionError):  # PermissionError: reported when the folder could not be locked
            return
        except Exception as error:  # on a damaged file, the npz reader raises nearly any exception
            print(f"image cache: the index in {self.folder} is damaged and will be rebuilt ({error})")
            return
        if complete_rows < len(paths):
            print(f"image cache: {self.folder / pixel_file} is truncated; the missing images are decoded again")
        rows = min(complete_rows, len(paths))
        self.paths, self.stats, self.facts, self.pixel_file = paths.first(rows), stats[:rows], facts[:rows], pixel_file

    def save(self) -> None:
        with atomic_write(self.folder / INDEX_FILE, "wb") as file:
            letters, ends = self.paths.letters, self.paths.ends
            np.savez(file, letters=letters, ends=ends, stats=self.stats, facts=self.facts, pixel_file=self.pixel_file)

    def find(self, paths: Paths, stats: np.ndarray) -> np.ndarray:
        """-> (N,) int64: the row of each file, -1 if its present state is not cached."""
        newest = {path: row for row, path in enumerate(self.paths)}
        rows = np.array([newest.get(path, -1) for path in paths], dtype=np.int64)
        found = np.flatnonzero(rows >= 0)
        rows[found[(self.stats[rows[found]] != stats[found]).any(axis=1)]] = -1
        return rows

    def drop_dead_rows(self) -> bool:
        """If most rows belong to files that are gone or have changed, copy the others to a new pixel file.

        -> whether that was done, which renumbers the rows. Files whose folder is gone too are kept: they may be on a
        disk that is not mounted at the moment.
        """
        newest = {path: row for row, path in enumerate(self.paths)}
        live = [
            row
            for path, row in newest.items()
            if file_stat(path) == tuple(self.stats[row]) or not os.path.exists(os.path.dirname(path))
        ]
        if len(self) <= 2 * len(live):
            return False
        new_file = _new_pixel_file()
        try:
            with open(self.folder / self.pixel_file, "rb") as source, open(self.folder / new_file, "wb") as target:
                for row in live:
                    source.seek(row * self.row_bytes)
                    target.write(source.read(self.row_bytes))
                target.flush()
                os.fsync(target.fileno())
            self.paths, self.stats, self.facts = self.paths[live], self.stats[live], self.facts[live]
            self.pixel_file = new_file
            self.save()
        except OSError:  # there is no room for new images either: the writer reports it
            (self.folder / new_file).unlink(missing_ok=True)
            self._read()
            return False
        return True


class CacheWriter:
    """Adds images to the cache, under its lock. If a write fails, the other images stay uncached, after one line.

    A failed write also gives back what was added since the index was last saved, so a full disk has some room again.
    """

    def __init__(self, index: CacheIndex, count: int, writable: bool):
        self.index = index
        self._file, self._added, self._saved_at = None, [], time.monotonic()
        if writable and count:
            with self._giving_up_on_errors():
                self._begin(count * index.row_bytes)

    def _begin(self, needed):
        folder = self.index.folder
        for stray in [*folder.glob("*.pixels"), *folder.glob(".*.tmp")]:  # left by processes that were killed
            if stray.name != self.index.pixel_file:
                with suppress(OSError):  # some systems do not delete a file that another process uses
                    stray.unlink()
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
        self._file = open(folder / self.index.pixel_file, "ab")  # noqa: SIM115 (closed in __exit__)
        self._file.truncate(len(self.index) * self.index.row_bytes)
        self.index.save()  # without entries for rows that were lost: other images will soon be written there

    def add(self, pixels: np.ndarray, paths: Paths, stats: np.ndarray, facts: np.ndarray) -> None:
        """pixels: (n, size, size, 3) uint8; stats: (n, 3) int64; facts: (n,) FACTS."""
        if not self._file:
            return
        with self._giving_up_on_errors():
            self._file.write(pixels)
            self._added.append((paths, stats, facts))
            if time.monotonic() > self._saved_at + SAVE_SECONDS:
                self._save()

    def _save(self):
        self._file.flush()
        os.fsync(self._file.fileno())
        index = self.index
        previous = index.paths, index.stats, index.facts
        added_paths, added_stats, added_facts = zip(*self._added, strict=True) if self._added else ((), (), ())
        index.paths = sum(added_paths, index.paths)
        index.stats = np.concatenate([index.stats, *added_stats])
        index.facts = np.concatenate([index.facts, *added_facts])
        try:
            index.save()
        except OSError:
            index.paths, index.stats, index.facts = previous
            raise
        self._added, self._saved_at = [], time.monotonic()

    @contextmanager
    def _giving_up_on_errors(self):
        try:
            yield
        except OSError as error:
            folder = self.index.folder
            print(
                f"image cache: cannot add images to {folder} ({error.strerror}); choose another folder with --cache_dir"
            )
            if self._file:
                with suppress(OSError):  # what is still buffered cannot be written either
                    self._file.close()
                with suppress(OSError):  # rows without an entry in the index do no harm
                    os.truncate(folder / self.index.pixel_file, len(self.index) * self.index.row_bytes)
            self._file = None

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *_):
        if self._file:  # also after Ctrl-C: the next run continues from here
            with self._giving_up_on_errors():
                self._save()
                self._file.close()


def _new_pixel_file():
    return f"{secrets.token_hex(4)}.pixels"


def _decode_chunks(paths, positions, cache) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, str]]]:
    """Decode the images at `positions` in threads, as the decoder releases the interpreter's lock.

    Yields chunks of (positions (n,), pixels (n, size, size, 3) uint8, facts (n,), {position: why it is broken}).
    """
    size = cache.image_size
    # small enough that a process that is stopped loses seconds of work
    chunk_size = max(1, min(32 * num_cores(), CHUNK_BYTES // (3 * size**2)))
    pool = ThreadPoolExecutor(num_cores())
    with ExitStack() as stack:
        # after a signal, no thread is waited for: its disk may never answer
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        bar = stack.enter_context(progress_bar(None, "images", "image", len(positions)))
        for start in range(0, len(positions), chunk_size):
            chunk = positions[start : start + chunk_size]
            pixels, facts, reasons = np.empty((len(chunk), size, size, 3), np.uint8), np.zeros(len(chunk), FACTS), {}
            results = pool.map(_decode_into, paths[chunk], pixels, itertools.repeat(cache.resize))
            for k, (image_facts, reason) in zip(range(len(chunk)), results, strict=True):
                if reason:
                    reasons[int(chunk[k])] = reason
                else:
                    facts[k] = image_facts
                bar.update()
            yield chunk, pixels, facts, reasons


def _decode_into(path, pixels, resize):
    """Fill `pixels`, (size, size, 3) uint8. -> (its FACTS or None, None or why the file is broken)"""
    try:
        pixels[:], facts = decode(path, len(pixels), resize)
    except Exception as error:  # whatever the decoder raises is the reason in the list
        return None, failure_reason(error, path)
    return facts, None
