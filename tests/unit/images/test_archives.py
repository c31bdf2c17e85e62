"""Files in folders and zip archives are found alike and read alike."""

import io
import os
import sys
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from images.archives import Archives, DamagedMember
from run.cli import UserError

CONTENT = {"img/a.json": b"first" * 100, "img/b.jpg": b"second", "img/c.txt": b"third"}


def write_zip(path, content, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def read_all(*names, extensions=(".json", ".jpg")):
    archives = Archives(names, extensions, "DOWNLOADED")
    return {member.parts[-1]: archives.read(member) for member in archives.members()}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_wanted_files_have_the_same_content_in_folders_and_archives(tmp_path, method):
    folder = tmp_path / "folder"
    (folder / "img").mkdir(parents=True)
    for name, data in CONTENT.items():
        (folder / name).write_bytes(data)
    inside = tmp_path / "archives" / "deep"
    inside.mkdir(parents=True)
    archive = write_zip(inside / "TS.ZIP", CONTENT, compression=method)
    expected = {"a.json": b"first" * 100, "b.jpg": b"second"}
    assert read_all(folder) == read_all(archive) == read_all(tmp_path / "archives") == expected


def test_the_list_of_an_archive_is_read_once_and_each_thread_opens_it_once(tmp_path, monkeypatch):
    archive = write_zip(tmp_path / "a.zip", {f"{i}.json": str(i).encode() for i in range(50)})
    archives, listed, opened = Archives([archive], [".json"], "DOWNLOADED"), [], []
    zip_file, plain_open = zipfile.ZipFile, open
    monkeypatch.setattr(zipfile, "ZipFile", lambda *a: listed.append(a) or zip_file(*a))
    monkeypatch.setattr("builtins.open", lambda *a: opened.append(a) or plain_open(*a))
    members = list(archives.members())
    with ThreadPoolExecutor(4) as pool:
        contents = list(pool.map(archives.read, members))
    assert contents == [str(i).encode() for i in range(50)]
    assert len(listed) == 1 and 1 <= sum(str(call[0]) == str(archive) for call in opened) <= 4 + 1  # + the list


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts open files")
def test_there_may_be_more_archives_than_files_can_be_open(tmp_path):
    import resource

    for i in range(60):
        write_zip(tmp_path / f"{i}.zip", {f"{i}.json": b"{}"})
    limits, opened = resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 40, limits[1]))
    try:
        assert len(read_all(tmp_path)) == 60
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("encoding", ["cp949", "utf-8"])
def test_korean_names_without_the_mark_of_utf_8_are_legible(tmp_path, encoding):
    written = "디지털카메라/가.json".encode(encoding)
    archive = write_zip(tmp_path / "a.zip", {"x" * len(written): b"{}"})
    archive.write_bytes(archive.read_bytes().replace(b"x" * len(written), written))
    # the writer marks names as UTF-8 only where they are not ASCII: here it has not
    archives = Archives([archive], ["n"], "DOWNLOADED")
    (member,) = archives.members()
    assert member.name == "디지털카메라/가.json" and archives.where(member).endswith("a.zip/디지털카메라/가.json")


def test_what_systems_add_to_archives_and_names_of_windows(tmp_path):
    names = ["__MACOSX/._a.json", "x/._b.json", "label\\01\\c.json", ".DS_Store/d.json", ".x/e.json", "../x/f.json"]
    archive = write_zip(tmp_path / "a.zip", dict.fromkeys(names, b"{}"))
    assert set(read_all(archive)) == {"c.json", "f.json"}


def damage(path, data, change):
    content = path.read_bytes()
    place = content.index(data)
    path.write_bytes(content[:place] + change(data) + content[place + len(data) :])


def test_damaged_members_are_found_by_their_checksum_and_others_are_read(tmp_path):
    packed = {name: zlib.compressobj(wbits=-15) for name in "ab"}
    stored = write_zip(tmp_path / "stored.zip", {"a.json": b"0123456789", "b.json": b"good"})
    damage(stored, b"0123456789", lambda data: data[::-1])
    deflated = write_zip(tmp_path / "packed.zip", {"a.json": b"x" * 999}, compression=zipfile.ZIP_DEFLATED)
    data = packed["a"].compress(b"x" * 999) + packed["a"].flush()
    damage(deflated, data, lambda data: b"\xff" * len(data))
    for archive in (stored, deflated):
        archives = Archives([archive], [".json"], "DOWNLOADED")
        first, *rest = archives.members()
        with pytest.raises(DamagedMember, match="damaged in the archive"):
            archives.read(first)
        assert [archives.read(member) for member in rest] in ([b"good"], [])


def test_a_member_never_grows_beyond_its_stated_size(tmp_path):
    archive = write_zip(tmp_path / "a.zip", {"a.json": b"0" * 10**7}, compression=zipfile.ZIP_DEFLATED)
    archives = Archives([archive], [".json"], "DOWNLOADED")
    (member,) = archives.members()
    with pytest.raises(DamagedMember):
        archives.read(member._replace(size=1000))
    with pytest.raises(DamagedMember, match="larger than 1024 MB"):
        archives.read(member._replace(size=2**31))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"method": 12}, "method 12"), ({"is_encrypted": True}, "encrypted"), ({"offset": 7}, "damaged")],
)
def test_members_that_are_not_supported_are_named(tmp_path, changes, reason):
    archives = Archives([write_zip(tmp_path / "a.zip", {"a.json": b"0" * 99})], [".json"], "DOWNLOADED")
    (member,) = archives.members()
    with pytest.raises(DamagedMember, match=reason):
        archives.read(member._replace(**changes))


def test_an_archive_that_was_cut_off_is_an_error_that_names_it(tmp_path):
    archive = write_zip(tmp_path / "TS.zip", CONTENT)
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"DOWNLOADED: .*TS\.zip is not a complete zip file .*download it again"):
        read_all(archive)
    archive.write_bytes(write_zip(archive, CONTENT).read_bytes()[30:])
    with pytest.raises(UserError, match=r"DOWNLOADED: .*TS\.zip is not a complete zip file"):
        read_all(archive)
    with pytest.raises(UserError, match=r"DOWNLOADED: .*nowhere\.zip does not exist"):
        read_all(tmp_path / "nowhere.zip")


def divide(path, starts, names=None):
    """Replace a file by its pieces, which begin at `starts`; names: of the pieces, by default where they start."""
    content = path.read_bytes()
    path.unlink()
    ends = [*starts[1:], len(content)]
    for start, end, name in zip(starts, ends, names or starts, strict=True):
        path.with_name(f"{path.name}.part{name}").write_bytes(content[start:end])
    return sorted(path.parent.glob("*.part*"))  # as shells sort them: part10 before part2


@pytest.mark.parametrize("starts", [[0], [0, 2, 10, 100, 110], [0, 1, 7, 500]])
@pytest.mark.parametrize("is_counted", [False, True])
def test_an_archive_in_pieces_is_read_like_a_whole_one(tmp_path, starts, is_counted):
    content = {f"img/{i}.json": bytes([i]) * 50 for i in range(8)}
    pieces = divide(write_zip(tmp_path / "TS.zip", content), starts, range(len(starts)) if is_counted else None)
    expected = {f"{i}.json": bytes([i]) * 50 for i in range(8)}
    assert read_all(tmp_path) == read_all(*pieces) == read_all(tmp_path, *pieces) == expected


def test_the_name_of_a_file_in_an_archive_in_pieces_is_that_of_the_whole(tmp_path):
    divide(write_zip(tmp_path / "TS.zip", CONTENT), [0, 50])
    archives = Archives([tmp_path], [".json"], "DOWNLOADED")
    assert [archives.where(member) for member in archives.members()] == [str(tmp_path / "TS.zip/img/a.json")]


def test_a_whole_archive_is_read_rather_than_its_pieces(tmp_path):
    whole = write_zip(tmp_path / "TS.zip", CONTENT).read_bytes()
    divide(tmp_path / "TS.zip", [0, 50])
    (tmp_path / "TS.zip").write_bytes(whole)
    (tmp_path / "TS.zip.part50").unlink()
    archives = Archives([tmp_path], [".json"], "DOWNLOADED")
    assert len(list(archives.members())) == 1


@pytest.mark.parametrize("missing", [0, 1, 2])
@pytest.mark.parametrize("names", [None, range(4)])
def test_a_missing_piece_is_an_error_that_says_where(tmp_path, missing, names):
    divide(write_zip(tmp_path / "TS.zip", CONTENT), [0, 50, 100, 150], names)
    pieces = [tmp_path / f"TS.zip.part{name}" for name in names or (0, 50, 100, 150)]
    pieces[missing].unlink()
    with pytest.raises(UserError, match=rf"a piece before .*{pieces[missing + 1].name} is missing or cut short"):
        read_all(tmp_path)


def test_a_piece_that_was_cut_short_or_the_last_one_missing_is_an_error(tmp_path):
    first, *_, last = divide(write_zip(tmp_path / "TS.zip", CONTENT), [0, 50, 60])
    last.rename(tmp_path / "last")
    with pytest.raises(UserError, match=r"TS\.zip is not a complete zip file"):
        read_all(tmp_path)
    (tmp_path / "last").rename(last)
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"a piece before .*part50 is missing or cut short; download TS\.zip again"):
        read_all(tmp_path)


def write_tar(path, *files):
    with tarfile.open(path, "w") as archive:
        for file in files:
            archive.add(file, f"한국인 피부상태 측정 데이터/{'x' * 120}/{file.name}")
    return path


def test_zip_files_and_their_pieces_in_a_tar_file_are_read(tmp_path):
    content = {f"img/{i}.json": bytes([i]) * 50 for i in range(8)}
    whole = write_zip(tmp_path / "TL.zip", CONTENT)
    pieces = divide(write_zip(tmp_path / "TS.zip", content), [0, 2, 10, 700])
    (folder := tmp_path / "folder").mkdir()
    tar = write_tar(folder / "download.tar", *pieces, whole)
    expected = {f"{i}.json": bytes([i]) * 50 for i in range(8)} | {"a.json": b"first" * 100, "b.jpg": b"second"}
    assert read_all(tar) == read_all(folder) == read_all(folder, tar) == expected
    # under any name: a zip file's list is at its end, so that of the last one would be found
    assert read_all(tar.rename(tmp_path / "받은파일")) == expected


def test_tar_files_that_cannot_be_used_are_errors_that_name_them(tmp_path):
    whole = write_zip(tmp_path / "TL.zip", CONTENT)
    tar = write_tar(tmp_path / "download.tar", whole, whole)
    with tarfile.open(tar) as archive:
        last = archive.getmembers()[-1]
    os.truncate(tar, last.offset_data + last.size - 1)
    with pytest.raises(UserError, match=r"DOWNLOADED: .*download\.tar is not a complete tar file .*download it again"):
        read_all(tar)
    (tmp_path / "a.json").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"there are no zip files in .*download\.tar; unpack it"):
        read_all(write_tar(tar, tmp_path / "a.json"))


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(DamagedMember, match="not a regular file"):
        read_all(tmp_path)
    os.mkfifo(tmp_path / "b.zip")
    with pytest.raises(UserError, match="not a regular file"):
        read_all(tmp_path / "b.zip")


def test_a_file_larger_than_wanted_is_not_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b"")
    os.truncate(tmp_path / "a.json", 2**21)  # which takes no room on the disk
    archives = Archives([tmp_path], [".json"], "DOWNLOADED")
    (member,) = archives.members()
    with pytest.raises(DamagedMember, match="larger than 1 MB"):
        archives.read(member, 2**20)


@pytest.mark.skipif(sys.platform == "win32", reason="offsets beyond 4 GB in a sparse file")
def test_members_beyond_4_gigabytes_are_read(tmp_path):
    path, file = tmp_path / "a.zip", io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.json", b"far")
    with open(path, "wb") as target:  # what is before the first member moves all offsets
        target.seek(5 * 2**30)
        target.write(file.getvalue())
    assert read_all(path) == {"a.json": b"far"}
