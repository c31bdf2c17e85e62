"""Files in folders and in zip archives, found alike and read alike, without unpacking.

AI-Hub delivers a tar file of zip files in pieces. These are read as they are, too.
"""

import io
import os
import re
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NamedTuple

from images.folders import images_below, print_left_out
from images.layout import SYSTEM_NAMES
from run.cli import UserError, printable

ZIP, TAR, PART = ".zip", ".tar", re.compile(r"\.part\d+")  # PART: extension of a piece of a divided archive
PIECE = re.compile(r"(.+\.zip)\.part(\d+)", re.IGNORECASE | re.DOTALL)
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field
SIGNATURE = b"PK\x03\x04"
IS_ENCRYPTED, IS_UTF8 = 0x1, 0x800  # flag bits of a member
TAR_MARK, TAR_MARK_AT = b"ustar", 257
MAX_BYTES = 2**30  # a larger file is not read into memory


class Member(NamedTuple):
    """A file on its own (archive -1, of which only `name`, its path, is used), or one in an archive.

    archive: position in `Archives.paths`; offset: of the local header, in bytes; packed, size: in bytes; method: of the
    compression.
    """

    archive: int
    name: str
    offset: int = 0
    packed: int = 0
    size: int = -1
    crc: int = 0
    method: int = zipfile.ZIP_STORED
    is_encrypted: bool = False

    @property
    def parts(self) -> list[str]:
        """-> its folders and its name. Archives of Windows may have backslashes."""
        return re.split(r"[/\\]", self.name)


class Piece(NamedTuple):
    """A part of a file: a piece of a divided archive, or what is in a tar file."""

    path: str
    start: int  # in bytes
    size: int


class DamagedMember(Exception):
    """A file in an archive that cannot be read, with the reason."""


class Archives:
    """The files of folders and zip archives. The list of an archive is read once; each thread has its own handle."""

    def __init__(self, names: Sequence[str | Path], extensions: Sequence[str], flag: str):
        """names: folders, in which archives are found at any depth, zip archives, their pieces, and tar files of them;
        extensions: in lower case, of the files that are wanted. Raises UserError, naming `flag`, for what does not
        exist, cannot be read, or lacks a piece.
        """
        self.extensions, self.flag = tuple(extensions), flag
        self.paths: list[str] = []  # of the archives; of one in pieces, the path that it has as a whole
        self._pieces: dict[str, list[Piece]] = {}  # of an archive in pieces, in their order, and of one in a tar file
        self._files: list[str] = []  # on their own
        self._handles = threading.local()
        passed_over, others, archives = Counter(), Counter(), []
        for name in map(str, names):
            if os.path.isdir(name):
                found, skipped, _ = images_below(Path(name), flag, passed_over, (ZIP, TAR, *extensions))
                if parts := [extension for extension in skipped if PART.fullmatch(extension)]:
                    pieces = list(filter(PIECE.fullmatch, images_below(Path(name), flag, Counter(), parts)[0]))
                    skipped -= Counter(os.path.splitext(path)[1].lower() for path in pieces)
                    archives += pieces
                others.update(skipped)
                archives += [path for path in found if path.lower().endswith((ZIP, TAR))]
                self._files += [path for path in found if not path.lower().endswith((ZIP, TAR))]
            elif os.path.exists(name):
                archives.append(name)
            else:
                raise UserError(f"{flag}: {printable(name)} does not exist")
        self._take(list(dict.fromkeys(archives)))
        print_left_out(passed_over, others, flag)

    def _take(self, archives):
        """Fill `paths` and `_pieces`. An archive that is there as a whole is not read from its pieces."""
        divided = defaultdict(list)
        for path in archives:
            inside = self._in_tar(path) if _is_tar(path) else {path: None}
            for name, piece in inside.items():
                if match := PIECE.fullmatch(name):
                    piece = piece or Piece(name, 0, os.path.getsize(name))
                    divided[match[1]].append((int(match[2]), name, piece))
                    continue
                self.paths.append(name)
                if piece:
                    self._pieces[name] = [piece]
        for path in sorted(divided.keys() - {*self.paths}):
            numbers, names, pieces = zip(*sorted(divided[path]), strict=True)
            starts = accumulate((piece.size for piece in pieces[:-1]), initial=0)
            for position, (number, start, name) in enumerate(zip(numbers, starts, names, strict=True)):
                if number not in (start, position):  # AI-Hub numbers them by where they start, in bytes
                    raise UserError(
                        f"{self.flag}: a piece before {printable(name)} is missing or cut short; download "
                        f"{printable(os.path.basename(path))} again, or name all of its pieces"
                    )
            self.paths.append(path)
            self._pieces[path] = list(pieces)

    def _in_tar(self, path):
        """-> {name: Piece} of the zip archives, and the pieces of some, in a tar file."""
        try:
            with tarfile.open(path, "r:") as tar:
                files = [
                    (f"{path}/{info.name}", Piece(path, info.offset_data, info.size)) for info in tar if info.isreg()
                ]
        except (tarfile.TarError, OSError) as error:
            raise UserError(
                f"{self.flag}: {printable(path)} is not a complete tar file ({error}); download it again"
            ) from error
        found = {name: piece for name, piece in files if name.lower().endswith(ZIP) or PIECE.fullmatch(name)}
        if not found:
            raise UserError(f"{self.flag}: there are no zip files in {printable(path)}; unpack it, and name its folder")
        return found

    def _open(self, path) -> BinaryIO:
        return io.BufferedReader(_Joined(self._pieces[path])) if path in self._pieces else open(path, "rb")

    def members(self) -> Iterator[Member]:
        """Yield every wanted file. Raises UserError, naming the flag, for an archive that is damaged as a whole."""
        yield from (Member(-1, path) for path in self._files)
        for number, path in enumerate(self.paths):
            listed = self._listed(path)[::-1]
            while listed:  # so that the entries of a million files can be freed one by one
                info = listed.pop()
                member = Member(
                    number,
                    _decoded(info),
                    info.header_offset,
                    info.compress_size,
                    info.file_size,
                    info.CRC,
                    info.compress_type,
                    bool(info.flag_bits & IS_ENCRYPTED),
                )
                if member.name.lower().endswith(self.extensions) and not _is_of_system(member):
                    yield member

    def _listed(self, path):
        """-> the entries of an archive."""
        try:
            if path not in self._pieces and not os.path.isfile(path):
                raise OSError("not a regular file")  # opening a named pipe would wait forever
            with self._open(path) as file, zipfile.ZipFile(file) as archive:
                listed = archive.infolist()
                if any(info.header_offset < 0 for info in listed):
                    raise zipfile.BadZipFile("its beginning is missing")
                return listed
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{self.flag}: {printable(path)} is not a complete zip file ({reason}); download it again, or "
                "unpack it if it is another kind of archive"
            ) from error

    def where(self, member: Member) -> str:
        """-> the place of a file, in one line."""
        archive = f"{self.paths[member.archive]}/" if member.archive >= 0 else ""
        return printable(archive + member.name)

    def read(self, member: Member, max_bytes: int = MAX_BYTES) -> bytes:
        """The content of a file, checked against its checksum. Raises OSError, or DamagedMember for one that is
        damaged, or larger than `max_bytes`."""
        size = max(member.size, member.packed)
        if member.archive < 0:
            status = os.stat(member.name)
            if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait forever
                raise DamagedMember("not a regular file")
            size = status.st_size
        if size > max_bytes:
            raise DamagedMember(f"larger than {max_bytes >> 20} MB")
        if member.archive < 0:
            return Path(member.name).read_bytes()
        if member.is_encrypted:
            raise DamagedMember("encrypted in the archive; unpack it")
        if member.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DamagedMember(f"packed by method {member.method}, which is not supported; unpack the archive")
        return _unpacked(self._packed(member), member)

    def _packed(self, member):
        file = self._handle(member.archive)
        file.seek(member.offset)
        header = file.read(LOCAL_HEADER.size)
        if len(header) < LOCAL_HEADER.size or not header.startswith(SIGNATURE):
            raise DamagedMember("damaged in the archive")
        _, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
        file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
        return file.read(member.packed)

    def _handle(self, archive):
        """-> the file of an archive. Each thread has one open, as there may be an archive of each person."""
        last = self._handles.__dict__
        if last.get("archive") != archive:
            if "file" in last:
                last.pop("file").close()
            last["archive"] = None
            last["file"] = self._open(self.paths[archive])  # closed when its thread ends
            last["archive"] = archive
        return last["file"]


class _Joined(io.RawIOBase):
    """Pieces read as if they were one file. Only one of their files is open: there may be many."""

    def __init__(self, pieces):
        self._pieces, self._position, self._path, self._file = pieces, 0, None, None
        self._ends = list(accumulate(piece.size for piece in pieces))

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        position = (0, self._position, self._ends[-1])[whence] + offset
        if position < 0:
            raise ValueError("negative position")
        self._position = position
        return position

    def readinto(self, buffer):
        number = bisect_right(self._ends, self._position)
        if number == len(self._ends):
            return 0
        piece, left = self._pieces[number], self._ends[number] - self._position
        if piece.path != self._path:
            self._close_file()
            self._file, self._path = open(piece.path, "rb"), piece.path  # noqa: SIM115 (closed below)
        self._file.seek(piece.start + piece.size - left)
        count = self._file.readinto(memoryview(buffer)[:left])
        self._position += count
        return count

    def close(self):
        self._close_file()
        super().close()

    def _close_file(self):
        if self._file:
            self._file.close()


def _is_tar(path):
    """Whether a file is a tar file, by its content: as a zip file, it would have the list of the last one in it."""
    if not os.path.isfile(path):
        return False
    with suppress(OSError), open(path, "rb") as file:
        file.seek(TAR_MARK_AT)
        return file.read(len(TAR_MARK)) == TAR_MARK
    return False


def _unpacked(content, member):
    if member.method == zipfile.ZIP_DEFLATED:
        try:
            # no more than stated, whatever it would grow to
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, member.size + 1)
        except zlib.error as error:
            raise DamagedMember("damaged in the archive") from error
    if len(content) != member.size or zlib.crc32(content) != member.crc:
        raise DamagedMember("damaged in the archive")
    return content


def _decoded(info):
    """The name of a member. Korean Windows writes it in CP949 and macOS in UTF-8, without saying so."""
    if info.flag_bits & IS_UTF8 or info.filename.isascii():
        return info.filename
    for encoding in ("utf-8", "cp949"):
        try:
            return info.filename.encode("cp437").decode(encoding)
        except UnicodeError:
            continue
    return info.filename


def _is_of_system(member):
    """Whether a file is hidden, or what macOS and Windows put into archives, such as `__MACOSX/._a.json`."""
    hidden = any(part.startswith(".") and part not in (".", "..") for part in member.parts)
    return hidden or any(part.casefold() in SYSTEM_NAMES for part in member.parts)
