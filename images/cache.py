"""The image cache: every photograph is decoded once, into a file that all processes map into their memory."""

import argparse
import errno
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

from images.decode import decode, failure_reason
from images.folders import ImageIndex, Paths, file_stat
from run.cli import UserError, progress_bar
from run.cores import num_cores
from run.files import atomic_write

FORMAT_VERSION = 2  # increase it when the cache's files change, or how a photograph becomes pixels
CHUNK_BYTES = 256 * 2**20  # of pixels decoded at once, at most
SAVE_SECONDS = 30  # a process that is killed while filling the cache loses at most this much work
INDEX_FILE = "index.npz"


def default_cache_dir() -> str:
    """-> `$XDG_CACHE_HOME/skin-grading`, by default `~/.cache/skin-grading`."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "skin-grading")


def open_cache(args: argparse.Namespace) -> "ImageCache":
    folder = args.cache_dir or default_cache_dir()  # never inherited from a checkpoint: another user has another one
    return ImageCache(None if args.no_cache else folder, args.image_size)


def read_all(indexes: dict[str, ImageIndex], cache: "ImageCache", skip_broken: bool) -> dict[str, ImageIndex]:
    """Decode every image of `indexes` once, into the cache unless it is there already.

    Broken images are listed with the reason. -> the same indexes with the images' cache rows and file sizes, and
    without the broken images. Raises UserError if there are any, unless `skip_broken`, or if an index has no others.
    """
    paths = sum((index.paths for index in indexes.values()), Paths())
    stats = np.array([file_stat(path) for path in paths], dtype=np.int64).reshape(-1, 3)
    cache_rows, reasons = cache.fill(paths, stats)
    broken = [(paths[i], reason) for i, reason in sorted(reasons.items())]
    for path, reason in broken:
        print(f"broken: {path}: {reason}")
    if broken and not skip_broken:
        more = f", and {len(broken) - 1} more (listed above)" if len(broken) > 1 else ""
        raise UserError(
            f"{broken[0][0]} cannot be read: {broken[0][1]}{more}; fix or delete broken files, or skip them with "
            "--skip_broken"
        )
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


class ImageCache:
    """Images of one size in a file of raw pixels, mapped into the memory of every process that uses it.

    Rows are only ever added, so what other processes read never changes; a changed photograph gets a new row. One
    process fills the cache at a time; the others wait and then find the images there.
    """

    def __init__(self, cache_dir: str | Path | None, image_size: int):
        """cache_dir: None for no cache; every image is then decoded on every use."""
        self.image_size = image_size
        self.folder = Path(cache_dir, f"{image_size}px_v{FORMAT_VERSION}") if cache_dir else None
        self._pixel_file, self._shape = None, (0, image_size, image_size, 3)

    def fill(self, paths: Paths, stats: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """Decode every image that is not cached yet, and store it. -> (rows (N,) int64, {position: why it is broken}).

        paths: N paths; stats: (N, 3) int64, the `file_stat` of each. A row is -1 if the image is broken, or if there
        was no room for it.
        """
        with self._locked() as writable:
            index = CacheIndex(self.folder, self._shape)
            rows = index.find(paths, stats)
            missing = np.flatnonzero(rows < 0)
            if writable and missing.size and index.drop_dead_rows():
                rows = index.find(paths, stats)
            reasons = {}
            with CacheWriter(index, missing.size, writable) as writer:
                for chunk, pixels, chunk_reasons in _decode_chunks(paths, missing, self.image_size):
                    reasons |= chunk_reasons
                    intact = np.array([i not in chunk_reasons for i in chunk])
                    writer.add(pixels[intact], paths[chunk[intact]], stats[chunk[intact]])
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
        return rows, reasons

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

    The index is written after the pixels. A process that is killed in between leaves rows without an entry, and the
    next one overwrites them; entries without a row in the pixel file are dropped when the index is read.
    """

    def __init__(self, folder: Path | None, shape: tuple[int, ...]):
        self.folder, self.row_bytes = folder, int(np.prod(shape[1:]))
        self.paths, self.stats, self.pixel_file = Paths(), np.empty((0, 3), np.int64), _new_pixel_file()
        if folder:
            self._read()

    def __len__(self) -> int:
        return len(self.paths)

    def _read(self):
        try:
            with np.load(self.folder / INDEX_FILE, allow_pickle=False) as content:
                paths = Paths.from_arrays(content["letters"], content["ends"])
                stats, pixel_file = content["stats"], os.path.basename(str(content["pixel_file"]))
            complete_rows = os.path.getsize(self.folder / pixel_file) // self.row_bytes
        except (FileNotFoundError, PermissionError):  # PermissionError: reported when the folder could not be locked
            return
        except Exception as error:  # on a damaged file, the npz reader raises nearly any exception
            print(f"image cache: the index in {self.folder} is damaged and will be rebuilt ({error})")
            return
        if complete_rows < len(paths):
            print(f"image cache: {self.folder / pixel_file} is truncated; the missing images are decoded again")
        rows = min(complete_rows, len(paths))
        self.paths, self.stats, self.pixel_file = paths.first(rows), stats[:rows], pixel_file

    def save(self) -> None:
        with atomic_write(self.folder / INDEX_FILE, "wb") as file:
            np.savez(
                file, letters=self.paths.letters, ends=self.paths.ends, stats=self.stats, pixel_file=self.pixel_file
            )

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
            self.paths, self.stats, self.pixel_file = self.paths[live], self.stats[live], new_file
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
        self._file, self._new_paths, self._new_stats, self._saved_at = None, [], [], time.monotonic()
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

    def add(self, pixels: np.ndarray, paths: Paths, stats: np.ndarray) -> None:
        """pixels: (n, size, size, 3) uint8; stats: (n, 3) int64."""
        if not self._file:
            return
        with self._giving_up_on_errors():
            self._file.write(pixels)
            self._new_paths.append(paths)
            self._new_stats.append(stats)
            if time.monotonic() > self._saved_at + SAVE_SECONDS:
                self._save()

    def _save(self):
        self._file.flush()
        os.fsync(self._file.fileno())
        previous = self.index.paths, self.index.stats
        self.index.paths = sum(self._new_paths, self.index.paths)
        self.index.stats = np.concatenate([self.index.stats, *self._new_stats])
        try:
            self.index.save()
        except OSError:
            self.index.paths, self.index.stats = previous
            raise
        self._new_paths, self._new_stats, self._saved_at = [], [], time.monotonic()

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


def _decode_chunks(paths, positions, size) -> Iterator[tuple[np.ndarray, np.ndarray, dict[int, str]]]:
    """Decode the images at `positions` in threads, as the decoder releases the interpreter's lock.

    Yields chunks of (positions (n,), pixels (n, size, size, 3) uint8, {position: why it is broken}).
    """
    # small enough that a process that is stopped loses seconds of work
    chunk_size = max(1, min(32 * num_cores(), CHUNK_BYTES // (3 * size**2)))
    pool = ThreadPoolExecutor(num_cores())
    with ExitStack() as stack:
        # after a signal, no thread is waited for: its disk may never answer
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        bar = stack.enter_context(progress_bar(None, "images", "image", len(positions)))
        for start in range(0, len(positions), chunk_size):
            chunk = positions[start : start + chunk_size]
            pixels = np.empty((len(chunk), size, size, 3), np.uint8)
            reasons = {}
            for i, reason in zip(chunk, pool.map(_decode_into, paths[chunk], pixels), strict=True):
                if reason:
                    reasons[int(i)] = reason
                bar.update()
            yield chunk, pixels, reasons


def _decode_into(path, pixels):
    """Fill `pixels`, (size, size, 3) uint8. -> None, or why the file is broken."""
    try:
        pixels[:] = decode(path, len(pixels))
    except Exception as error:  # whatever the decoder raises is the reason in the list
        return failure_reason(error, path)
    return None
