"""Files in folders and in zip archives, found alike and read alike, without unpacking."""

import os
import re
import struct
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from images.folders import images_below, print_left_out
from images.layout import SYSTEM_NAMES
from run.cli import UserError
from run.files import printable

ZIP, PART = ".zip", re.compile(r"\.part\d+")  # PART: extension of a piece of a divided archive
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field
SIGNATURE = b"PK\x03\x04"
IS_ENCRYPTED, IS_UTF8 = 0x1, 0x800  # flag bits of a member
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


class DamagedMember(Exception):
    """A file in an archive that cannot be read, with the reason."""


class Archives:
    """The files of folders and zip archives. The list of an archive is read once; each thread has its own handles."""

    def __init__(self, names: Sequence[str | Path], extensions: Sequence[str], flag: str):
        """names: folders, in which zip archives are found at any depth, and zip archives; extensions: in lower case, of
        the files that are wanted. Raises UserError, naming `flag`, for what does not exist or cannot be read.
        """
        self.extensions, self.flag = tuple(extensions), flag
        self.paths: list[str] = []  # of the archives
        self._files: list[str] = []  # on their own
        self._handles = threading.local()
        passed_over, others = Counter(), Counter()
        for name in map(str, names):
            if os.path.isdir(name):
                found, skipped, _ = images_below(Path(name), flag, passed_over, (ZIP, *extensions))
                others.update(skipped)
                self.paths += [path for path in found if path.lower().endswith(ZIP)]
                self._files += [path for path in found if not path.lower().endswith(ZIP)]
            elif os.path.exists(name):
                self.paths.append(name)
            else:
                raise UserError(f"{flag}: {printable(name)} does not exist")
        self.paths = list(dict.fromkeys(self.paths))
        pieces = [extension for extension in others if PART.fullmatch(extension)]
        if pieces:
            raise UserError(
                f"{flag}: there are {sum(others[piece] for piece in pieces)} pieces of divided archives "
                f"({', '.join(sorted(pieces)[:3])}); join them first, in their order: cat X.zip.part* > X.zip"
            )
        print_left_out(passed_over, others, flag)

    def members(self) -> Iterator[Member]:
        """Yield every wanted file. Raises UserError, naming the flag, for an archive that is damaged as a whole."""
        yield from (Member(-1, path) for path in self._files)
        for number, path in enumerate(self.paths):
            try:
                with zipfile.ZipFile(path) as archive:
                    listed = archive.infolist()[::-1]
                del archive  # so that the entries of a million files can be freed one by one
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(
                    f"{self.flag}: {printable(path)} is not a complete zip file ({reason}); download it again, or "
                    "unpack it if it is another kind of archive"
                ) from error
            while listed:
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

    def where(self, member: Member) -> str:
        """-> the place of a file, in one line."""
        archive = f"{self.paths[member.archive]}/" if member.archive >= 0 else ""
        return printable(archive + member.name)

    def read(self, member: Member) -> bytes:
        """The content of a file, checked against its checksum. Raises OSError or DamagedMember."""
        if member.archive < 0:
            return Path(member.name).read_bytes()
        if member.is_encrypted:
            raise DamagedMember("encrypted in the archive")
        if member.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DamagedMember(f"packed by method {member.method}, which is not supported; unpack the archive")
        if max(member.size, member.packed) > MAX_BYTES:
            raise DamagedMember("larger than 1 GB")
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
        handles = self._handles.__dict__
        if archive not in handles:
            handles[archive] = open(self.paths[archive], "rb")  # noqa: SIM115 (closed when its thread ends)
        return handles[archive]


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
    """Whether a file is what macOS and Windows put into archives, such as `__MACOSX/._a.json`."""
    return any(part.startswith("._") or part.casefold() in SYSTEM_NAMES for part in member.parts)
