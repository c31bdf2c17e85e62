"""Decoding a photograph, and the cache of decoded ones: bytes in one memory-mapped file that all processes share."""

import errno
import os
import secrets
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import filelock
import numpy as np
from joblib import cpu_count
from PIL import Image, ImageOps

from files import UserError, atomic_write, progress_bar

FORMAT_VERSION = 2  # of the cache's files, and of the way from a photograph to its pixels: change one, raise this
CHUNK_BYTES = 256 * 2**20  # decoded at once, at the most
SAVE_SECONDS = 30  # a process that is killed while it fills the cache loses no more than this
INDEX_FILE = "index.npz"

# ---------------------------------------------------------------------------------------------- decoding one image


def limit_image_size(megapixels):
    """Refuse larger images before they are decoded: a file of some kB can claim to hold gigabytes of pixels."""
    Image.MAX_IMAGE_PIXELS = round(megapixels * 1e6)
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow itself refuses from twice as many on


def image_size_limit():
    """-> megapixels."""
    return Image.MAX_IMAGE_PIXELS / 1e6


def load_image(path, size=None):
    """Decode a file -> 8-bit RGB PIL image, upright by its EXIF orientation.

    16-bit and float greys are scaled, not clipped; transparent pixels are laid on white. size: sides that are wanted
    in the end; a JPEG is decoded straight to 1/2, 1/4 or 1/8 of its size where that is not smaller.
    Raises whatever the decoder raises when the file is broken, cut short or no image.
    """
    if not os.path.isfile(path) and os.path.exists(path):
        raise OSError("it is no regular file")  # opening a named pipe would wait for ever
    with Image.open(path) as image:
        if size:
            image.draft(None, (size, size))
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_grey_to_8_bit(np.nan_to_num(np.asarray(image)), image.mode))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_to_8_bit(grey, mode):
    """16-bit values by mode; 32-bit integers and floats by their largest, as their files do not say what white is."""
    if mode == "F" and grey.max() <= 1:
        grey = grey * 255
    elif mode.startswith("I;16") or grey.max() > 255:
        grey = np.clip(grey, 0, 65535) // 256
    return np.clip(grey, 0, 255).astype(np.uint8)


def _decode(path, size):
    """Decode and resize (antialiased, to a square) -> (size, size, 3) uint8."""
    return np.asarray(load_image(path, size).resize((size, size), Image.Resampling.BILINEAR))


def read_image(path, size):
    """The image of a file -> (size, size, 3) uint8, resized to a square. Raises UserError if it can't be read."""
    try:
        return _decode(path, size)
    except Exception as error:  # a decoder raises nearly anything on a broken file; the user needs to know which file
        raise UserError(f"{path} cannot be read: {_why(error, path)}") from error


def _why(error, path):
    """What the decoder raised, in words for the user."""
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"it claims more than {image_size_limit():g} million pixels; if that is right, raise --max_megapixels"
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "empty file"
    return str(error).replace(repr(path), "it") or repr(error)


# -------------------------------------------------------------------------------------------------- paths of images


class Paths(Sequence):
    """Many paths as one block of bytes, each a string when it is asked for.

    A million Python strings would take 150 MB, and again in each loader worker, which copies every page whose
    reference counts it touches.
    """

    def __init__(self, paths=()):
        encoded = [os.fsencode(path) for path in paths]
        self.letters = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    @classmethod
    def from_arrays(cls, letters, ends):
        paths = cls()
        paths.letters, paths.ends = letters, ends
        return paths

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        """The path at `i`, or the Paths at an array of positions."""
        if not np.isscalar(i):
            letters, ends = self.letters.tobytes(), self.ends.tolist()
            pieces = [letters[ends[k - 1] if k else 0 : ends[k]] for k in np.asarray(i).tolist()]
            ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
            return Paths.from_arrays(np.frombuffer(b"".join(pieces), dtype=np.uint8), ends)
        i = range(len(self))[i]
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.letters[start : self.ends[i]].tobytes())

    def __iter__(self):
        letters, start = self.letters.tobytes(), 0
        # what os.fsdecode does, which is slower
        encoding, errors = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
        for end in self.ends.tolist():
            yield letters[start:end].decode(encoding, errors)
            start = end

    def __add__(self, other):
        letters = np.concatenate([self.letters, other.letters])
        return Paths.from_arrays(letters, np.concatenate([self.ends, len(self.letters) + other.ends]))

    def first(self, count):
        ends = self.ends[:count]
        return Paths.from_arrays(self.letters[: ends[-1] if count else 0], ends)


def stat_of(path):
    """-> (size in bytes, time of change in ns, inode): others mean another image. -1s for what is not there.

    The inode tells two files of one size and time apart that have changed places.
    """
    try:
        stat = os.stat(path)
    except OSError:
        return -1, -1, -1
    return stat.st_size, stat.st_mtime_ns, stat.st_ino & (2**63 - 1)


# ---------------------------------------------------------------------------------------------------- image cache


def default_cache_dir():
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "skin-grading")


class ImageCache:
    """Images of one size, decoded once, in a file of bytes that is mapped into the memory of all processes.

    Rows are only ever added, so what another process reads never changes under it; a changed photograph gets a new
    row. One process at a time fills, the others wait and then find everything there.
    """

    def __init__(self, cache_dir, image_size):
        """cache_dir: None for no cache, every image is then decoded whenever it is used."""
        self.image_size = image_size
        self.folder = Path(cache_dir, f"{image_size}px_v{FORMAT_VERSION}") if cache_dir else None
        self._pixel_file, self._shape = None, (0, image_size, image_size, 3)

    def fill(self, paths, stats):
        """Decode each image that is not held yet, and keep it. -> (rows (N,) int64, {position: why it is broken}).

        paths: N paths; stats: (N, 3) int64, each `stat_of` the file. A row of -1: broken, or there was no room.
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
                    whole = np.array([i not in chunk_reasons for i in chunk])
                    writer.add(pixels[whole], paths[chunk[whole]], stats[chunk[whole]])
            if missing.size:
                rows = index.find(paths, stats)
            if len(index):  # opened under the lock: nobody can take the file away in between
                self.__dict__.pop("pixels", None)
                self._pixel_file, self._shape = index.pixel_file, (len(index), *self._shape[1:])
                if self.pixels is None:
                    print(
                        f"image cache: {self.folder} cannot be mapped into memory; name another place with --cache_dir"
                    )
                    rows[:] = -1
        self._say(rows, missing.size - len(reasons))
        return rows, reasons

    @cached_property
    def pixels(self):
        """(rows, size, size, 3) uint8, read-only; None where the file is gone, or its place has no memory mapping."""
        try:
            return np.asarray(np.memmap(self.folder / self._pixel_file, np.uint8, mode="r", shape=self._shape))
        except OSError:
            return None

    def __getstate__(self):  # a worker that is not a fork maps the file anew
        return {name: value for name, value in self.__dict__.items() if name != "pixels"}

    @contextmanager
    def _locked(self):
        """Yields whether the cache may be written to."""
        if not self.folder:
            yield False
            return
        lock = filelock.FileLock(self.folder / "lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # photographs of people
            try:
                lock.acquire(blocking=False)
            except filelock.Timeout:
                print(f"image cache: waiting for another process that fills {self.folder}")
                lock.acquire()
        except (OSError, NotImplementedError) as error:  # the second: a file system without locks
            reason = getattr(error, "strerror", None) or error
            print(f"image cache: {self.folder} cannot be written to ({reason}); name another place with --cache_dir")
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _say(self, rows, new):
        held = int((rows >= 0).sum())
        if held:
            megabytes = held * np.prod(self._shape[1:]) / 1e6
            print(f"image cache: {held} images, {megabytes:.1f} MB, in {self.folder} ({new} read anew)")
        if held < len(rows):
            print(f"image cache: {len(rows) - held} images are not in it, they are decoded whenever they are used")


class CacheIndex:
    """What the rows of the cache's pixel file are: row k holds `paths[k]` as it was when it had `stats[k]`.

    It is written after the pixels. A process that is killed in between leaves rows that no index names, and the next
    one writes over them; rows that the index names and the file lacks are left out when it is read.
    """

    def __init__(self, folder, shape):
        self.folder, self.row_bytes = folder, int(np.prod(shape[1:]))
        self.paths, self.stats, self.pixel_file = Paths(), np.empty((0, 3), np.int64), _new_pixel_file()
        if folder:
            self._read()

    def __len__(self):
        return len(self.paths)

    def _read(self):
        try:
            with np.load(self.folder / INDEX_FILE, allow_pickle=False) as content:
                paths = Paths.from_arrays(content["letters"], content["ends"])
                stats, pixel_file = content["stats"], os.path.basename(str(content["pixel_file"]))
            whole_rows = os.path.getsize(self.folder / pixel_file) // self.row_bytes
        except (FileNotFoundError, PermissionError):  # the second was said when the folder could not be locked
            return
        except Exception as error:  # of a damaged file the reader of npz raises nearly anything
            print(f"image cache: the index in {self.folder} is damaged, it is built anew ({error})")
            return
        if whole_rows < len(paths):
            print(f"image cache: {self.folder / pixel_file} is cut short, what is missing is read again")
        rows = min(whole_rows, len(paths))
        self.paths, self.stats, self.pixel_file = paths.first(rows), stats[:rows], pixel_file

    def save(self):
        with atomic_write(self.folder / INDEX_FILE, "wb") as file:
            np.savez(
                file, letters=self.paths.letters, ends=self.paths.ends, stats=self.stats, pixel_file=self.pixel_file
            )

    def find(self, paths, stats):
        """-> (N,) int64: the row of each file, -1 where it is not held as it is now."""
        newest = {path: row for row, path in enumerate(self.paths)}
        rows = np.array([newest.get(path, -1) for path in paths], dtype=np.int64)
        held = np.flatnonzero(rows >= 0)
        rows[held[(self.stats[rows[held]] != stats[held]).any(axis=1)]] = -1
        return rows

    def drop_dead_rows(self):
        """Where most rows are of files that are gone or have changed, copy the others to a new pixel file.

        -> whether that was done, and rows have new numbers. Files whose folder is gone too are kept: they may lie on a
        disk that is not mounted just now.
        """
        newest = {path: row for row, path in enumerate(self.paths)}
        live = [
            row
            for path, row in newest.items()
            if stat_of(path) == tuple(self.stats[row]) or not os.path.exists(os.path.dirname(path))
        ]
        if len(self) <= 2 * len(live):
            return False
        new_file = _new_pixel_file()
        try:
            with open(self.folder / self.pixel_file, "rb") as old, open(self.folder / new_file, "wb") as new:
                for row in live:
                    old.seek(row * self.row_bytes)
                    new.write(old.read(self.row_bytes))
                new.flush()
                os.fsync(new.fileno())
            self.paths, self.stats, self.pixel_file = self.paths[live], self.stats[live], new_file
            self.save()
        except OSError:  # there will be no room for new images either: the writer says so
            (self.folder / new_file).unlink(missing_ok=True)
            self._read()
            return False
        return True


class CacheWriter:
    """Adds images to a cache, under its lock. What cannot be written is left out and said in one line.

    A write that fails gives back what was added since the index was saved last: a full disk has some room again.
    """

    def __init__(self, index, count, writable):
        self.index = index
        self._file, self._new_paths, self._new_stats, self._saved = None, [], [], time.monotonic()
        if writable and count:
            with self._giving_up_on_errors():
                self._begin(count * index.row_bytes)

    def _begin(self, needed):
        folder = self.index.folder
        for stray in [*folder.glob("*.pixels"), *folder.glob(".*.tmp")]:  # left by processes that were killed
            if stray.name != self.index.pixel_file:
                with suppress(OSError):  # some systems keep a file that another process uses
                    stray.unlink()
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free")
        self._file = open(folder / self.index.pixel_file, "ab")  # noqa: SIM115 (closed in __exit__)
        self._file.truncate(len(self.index) * self.index.row_bytes)
        self.index.save()  # without the rows that were cut off: others will lie there soon

    def add(self, pixels, paths, stats):
        """pixels: (n, size, size, 3) uint8."""
        if not self._file:
            return
        with self._giving_up_on_errors():
            self._file.write(pixels)
            self._new_paths.append(paths)
            self._new_stats.append(stats)
            if time.monotonic() > self._saved + SAVE_SECONDS:
                self._save()

    def _save(self):
        self._file.flush()
        os.fsync(self._file.fileno())
        former = self.index.paths, self.index.stats
        self.index.paths = sum(self._new_paths, self.index.paths)
        self.index.stats = np.concatenate([self.index.stats, *self._new_stats])
        try:
            self.index.save()
        except OSError:
            self.index.paths, self.index.stats = former
            raise
        self._new_paths, self._new_stats, self._saved = [], [], time.monotonic()

    @contextmanager
    def _giving_up_on_errors(self):
        try:
            yield
        except OSError as error:
            folder = self.index.folder
            print(f"image cache: {folder} takes no more images ({error.strerror}); name another place with --cache_dir")
            if self._file:
                with suppress(OSError):  # what is left unwritten in its buffer has no place to go
                    self._file.close()
                with suppress(OSError):  # rows that no index names do no harm
                    os.truncate(folder / self.index.pixel_file, len(self.index) * self.index.row_bytes)
            self._file = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._file:  # also when Ctrl-C ends it: the next start goes on from here
            with self._giving_up_on_errors():
                self._save()
                self._file.close()


def _new_pixel_file():
    return f"{secrets.token_hex(4)}.pixels"


def _decode_chunks(paths, positions, size):
    """Decode the images at `positions` in threads, as the decoder leaves the interpreter free meanwhile.

    -> chunks of (positions (n,), pixels (n, size, size, 3) uint8, {position: why it is broken}).
    """
    # small enough that a process that is stopped loses seconds of work
    rows = max(1, min(32 * cpu_count(), CHUNK_BYTES // (3 * size**2)))
    with ThreadPoolExecutor(cpu_count()) as pool, progress_bar(None, "images", "image", len(positions)) as bar:
        for start in range(0, len(positions), rows):
            chunk = positions[start : start + rows]
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
        pixels[:] = _decode(path, len(pixels))
    except Exception as error:  # whatever the decoder raises is the reason that is listed
        return _why(error, path)
    return None
