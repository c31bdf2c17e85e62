"""The image cache: what is kept, what is decoded again, and what failures leave behind; broken files."""

import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import PATIENCE, ROOT, write_class_folders, write_images
from PIL import Image

import images.cache
from dataset_double import DoubleSkinDataset
from images.cache import CacheIndex, CacheWriter, ImageCache, read_all
from images.decode import FACTS, ONE_COLOR, read_image
from images.folders import ImageIndex, Paths, file_stat, index_folders
from run.cli import UserError
from run.signals import Signals, Stopped

SIZE = 16


ROW = 3 * SIZE**2


@pytest.fixture
def photos(tmp_path):
    return list(map(str, write_images(tmp_path / "photos", 12, suffix=".jpg", size=(70, 60))))


def fill(folder, photos, size=SIZE):
    """-> (cache, rows, reasons)."""
    cache = ImageCache(folder, size)
    stats = np.array([file_stat(photo) for photo in photos])
    rows, _, reasons = cache.fill(Paths(photos), stats)
    return cache, rows, reasons


def garble(path):
    """Replace the bytes but keep size and time: only opening the file reveals it."""
    stat = os.stat(path)
    Path(path).write_bytes(b"x" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def pixel_file(folder):
    (file,) = folder.glob("*/*.pixels")
    return file


def check_pixels(cache, rows, photos):
    for row, photo in zip(rows, photos, strict=True):
        assert np.array_equal(cache.pixels[row], read_image(photo, SIZE))


def test_cached_pixels_are_the_decoded_pixels(tmp_path, photos):
    photos += [str(path) for path in write_images(tmp_path / "png", 3)]
    cache, rows, reasons = fill(tmp_path / "cache", photos)
    assert sorted(rows) == list(range(15)) and not reasons
    check_pixels(cache, rows, photos)
    assert not cache.pixels.flags.writeable


def test_a_second_run_opens_no_image(tmp_path, photos, capsys):
    first, rows, _ = fill(tmp_path, photos)
    before = first.pixels.copy()
    for photo in photos:
        garble(photo)
    again, rows_again, reasons = fill(tmp_path, photos)
    assert not reasons and rows_again.tolist() == rows.tolist()
    assert np.array_equal(again.pixels, before)
    printed = capsys.readouterr().out.splitlines()
    assert "12 images, 0.0 MB" in printed[0] and "12 newly decoded" in printed[0] and str(first.folder) in printed[0]
    assert "(0 newly decoded)" in printed[1]


def test_only_changed_and_added_files_are_decoded_again(tmp_path, photos):
    running, rows, _ = fill(tmp_path / "cache", photos)
    before = running.pixels.copy()
    for photo in photos[3:]:
        garble(photo)
    os.remove(photos[0])
    Image.new("RGB", (40, 40), "red").save(photos[1])
    (added,) = map(str, write_images(tmp_path / "more", 1, seed=9))
    now = [photos[1], added, *photos[3:]]
    cache, new_rows, reasons = fill(tmp_path / "cache", now)
    assert not reasons
    check_pixels(cache, new_rows[:2], now[:2])
    assert np.array_equal(cache.pixels[new_rows[2:]], before[rows[3:]])
    assert np.array_equal(running.pixels, before)  # for a training that is still running


def test_swapped_files_of_the_same_size_and_time_are_decoded_again(tmp_path):
    photos = [str(tmp_path / f"{name}.bmp") for name in ("a", "b")]
    for photo, color in zip(photos, ("red", "blue"), strict=True):
        Image.new("RGB", (20, 20), color).save(photo)
        os.utime(photo, ns=(0, 0))
    fill(tmp_path / "cache", photos)
    os.rename(photos[0], tmp_path / "aside")
    os.rename(photos[1], photos[0])
    os.rename(tmp_path / "aside", photos[1])
    cache, rows, _ = fill(tmp_path / "cache", photos)
    check_pixels(cache, rows, photos)


def test_images_of_an_unmounted_folder_are_kept(tmp_path, photos):
    _, rows, _ = fill(tmp_path / "cache", photos)
    os.rename(tmp_path / "photos", tmp_path / "not mounted")
    fill(tmp_path / "cache", list(map(str, write_images(tmp_path / "other", 1))))
    os.rename(tmp_path / "not mounted", tmp_path / "photos")
    for photo in photos:
        garble(photo)
    _, rows_again, reasons = fill(tmp_path / "cache", photos)
    assert rows_again.tolist() == rows.tolist() and not reasons


def test_dead_rows_are_deleted_before_free_space_is_checked(tmp_path, photos, monkeypatch):
    fill(tmp_path / "cache", photos)
    for photo in photos:
        Image.new("RGB", (40, 40), "red").save(photo)

    class Usage:
        @property
        def free(self):  # on a disk with room for 15 rows, not counting the index
            return 15 * ROW - sum(file.stat().st_size for file in (tmp_path / "cache").glob("*/*.pixels"))

    monkeypatch.setattr(images.cache.shutil, "disk_usage", lambda folder: Usage())
    cache, rows, _ = fill(tmp_path / "cache", photos)
    check_pixels(cache, rows, photos)


def test_images_are_decoded_if_the_cache_file_is_gone(tmp_path, photos):
    write_class_folders(tmp_path / "data", {"0": 3, "1": 3})
    index = read_all({"data": index_folders([tmp_path / "data"])}, ImageCache(tmp_path / "cache", SIZE), False)["data"]
    worker_index = pickle.loads(pickle.dumps(index))  # as a worker that is not forked receives it
    pixel_file(tmp_path / "cache").unlink()
    image, _ = DoubleSkinDataset(worker_index, SIZE)[2]
    assert np.array_equal(image.permute(1, 2, 0), read_image(index.paths[2], SIZE))


def test_each_image_size_has_its_own_files(tmp_path, photos):
    fill(tmp_path, photos)
    cache, rows, _ = fill(tmp_path, photos, size=24)
    assert cache.pixels.shape == (12, 24, 24, 3) and (rows >= 0).all()
    assert len(list(tmp_path.glob("*/*.pixels"))) == 2


def test_a_broken_file_is_not_cached_and_is_reported_every_time(tmp_path, photos):
    Path(photos[4]).write_bytes(b"not a photograph")
    for _ in range(2):
        _, rows, reasons = fill(tmp_path / "cache", photos)
        assert list(reasons) == [4] and "cannot identify" in reasons[4] and rows[4] == -1
    write_images(tmp_path / "photos", 5, suffix=".jpg", size=(70, 60))  # repaired
    cache, rows, reasons = fill(tmp_path / "cache", photos)
    check_pixels(cache, rows, photos)


@pytest.mark.parametrize("rows_left", [0, 2.5, 11])
def test_a_truncated_file_is_noticed_and_missing_images_are_decoded_again(tmp_path, photos, rows_left, capsys):
    fill(tmp_path / "cache", photos)
    os.truncate(pixel_file(tmp_path / "cache"), int(rows_left * ROW))
    for photo in photos[: int(rows_left)]:
        garble(photo)
    cache, rows, reasons = fill(tmp_path / "cache", photos)
    assert "truncated" in capsys.readouterr().out and not reasons
    check_pixels(cache, rows[int(rows_left) :], photos[int(rows_left) :])


@pytest.mark.parametrize("content", [b"", b"nonsense", "half", "flipped"])
def test_a_damaged_index_is_noticed_and_all_images_are_decoded_again(tmp_path, photos, content, capsys):
    fill(tmp_path / "cache", photos)
    (index,) = (tmp_path / "cache").glob("*/index.npz")
    whole = index.read_bytes()
    middle = len(whole) // 2
    damaged = {"half": whole[:middle], "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]}
    index.write_bytes(damaged.get(content, content))
    cache, rows, reasons = fill(tmp_path / "cache", photos)
    assert "damaged" in capsys.readouterr().out and not reasons
    check_pixels(cache, rows, photos)
    assert pixel_file(tmp_path / "cache").stat().st_size == 12 * ROW  # the previous file is gone


def test_rows_of_a_killed_writer_are_never_read(tmp_path, photos):
    """At the worst moment: the file was truncated, and its repair was killed after the pixels, before the index."""
    cache, _, _ = fill(tmp_path / "cache", photos)
    os.truncate(pixel_file(tmp_path / "cache"), 3 * ROW)
    index = CacheIndex(cache.folder, (0, SIZE, SIZE, 3))
    writer = CacheWriter(index, 9, writable=True)
    writer.add(np.zeros((9, SIZE, SIZE, 3), np.uint8), Paths(photos[3:]), np.zeros((9, 3), int), np.zeros(9, FACTS))
    writer._file.flush()
    assert pixel_file(tmp_path / "cache").stat().st_size == 12 * ROW
    cache, rows, _ = fill(tmp_path / "cache", photos)
    check_pixels(cache, rows, photos)


FILL_SLOWLY = """
import sys, images.cache, numpy as np
from images.folders import Paths, file_stat
images.cache.CHUNK_BYTES, images.cache.SAVE_SECONDS = 1, 0.05
photos = open(sys.argv[2]).read().split()
stats = np.array([file_stat(photo) for photo in photos])
images.cache.ImageCache(sys.argv[1], 16).fill(Paths(photos), stats)
"""


def start_filling(folder, photos):
    (folder / "list.txt").write_text("\n".join(photos))
    command = [sys.executable, "-c", FILL_SLOWLY, folder / "cache", folder / "list.txt"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_process_stopped_while_filling_loses_only_seconds_of_work(tmp_path, number):
    photos = list(map(str, write_images(tmp_path / "photos", 400, suffix=".jpg", size=(200, 200))))
    process = start_filling(tmp_path, photos)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        files = list((tmp_path / "cache").glob("*/*.pixels"))
        if files and files[0].stat().st_size > 150 * ROW:
            break
    process.send_signal(number)
    process.communicate()
    assert process.returncode != 0
    kept = len(CacheIndex(tmp_path / "cache" / "16px_v4", (0, SIZE, SIZE, 3)))
    assert 0 < kept < 400
    cache, rows, reasons = fill(tmp_path / "cache", photos)
    assert not reasons
    check_pixels(cache, rows, photos)
    assert pixel_file(tmp_path / "cache").stat().st_size == 400 * ROW
    assert {path.suffix for path in (tmp_path / "cache" / "16px_v4").iterdir()} == {"", ".npz", ".pixels"}


def test_processes_that_fill_the_cache_at_once_do_not_disturb_each_other(tmp_path):
    photos = list(map(str, write_images(tmp_path / "photos", 150, suffix=".jpg", size=(200, 200))))
    processes = [start_filling(tmp_path, photos) for _ in range(3)]
    printed = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sorted("150 newly decoded" in text for text in printed) == [False, False, True]
    cache, rows, _ = fill(tmp_path / "cache", photos)
    check_pixels(cache, rows, photos)
    assert pixel_file(tmp_path / "cache").stat().st_size == 150 * ROW


def test_a_signal_ends_the_wait_for_another_process_and_for_a_file_that_cannot_be_read(tmp_path, photos, monkeypatch):
    def stop_soon():
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()

    fcntl = pytest.importorskip("fcntl")
    folder = tmp_path / "cache" / f"{SIZE}px_v{images.cache.FORMAT_VERSION}"
    folder.mkdir(parents=True)
    with open(folder / "lock", "w") as lock, pytest.raises(Stopped), Signals():
        fcntl.flock(lock, fcntl.LOCK_EX)
        stop_soon()
        fill(tmp_path / "cache", photos)
    disk_answers = threading.Event()
    monkeypatch.setattr(images.cache, "decode", lambda *_: disk_answers.wait())
    with pytest.raises(Stopped), Signals():
        stop_soon()
        fill(tmp_path / "cache", photos)
    disk_answers.set()


def test_a_full_disk_gets_its_space_back_and_images_are_decoded_on_use(tmp_path, photos, capsys):
    """A limit on the file size stands in for the full disk: write() fails in the same place."""
    fill(tmp_path / "cache", photos[:2])
    write_class_folders(tmp_path / "data", {"0": 40, "1": 4})
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * ROW, previous[1]))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(images.cache, "CHUNK_BYTES", 5 * ROW)
            index = read_all({"data": index_folders([tmp_path / "data"])}, ImageCache(tmp_path / "cache", SIZE), False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    printed = capsys.readouterr().out
    assert "cannot add images to" in printed and "(File too large); choose another folder with --cache_dir" in printed
    assert "44 images are not cached" in printed
    assert pixel_file(tmp_path / "cache").stat().st_size == 2 * ROW
    assert (index["data"].cache_rows == -1).all()
    image, _ = DoubleSkinDataset(index["data"], SIZE)[43]
    assert np.array_equal(image.permute(1, 2, 0), read_image(index["data"].paths[43], SIZE))
    for photo in photos[:2]:
        garble(photo)
    assert fill(tmp_path / "cache", photos[:2])[1].tolist() == [0, 1]


def test_nothing_is_written_if_the_disk_has_no_room_for_all_images(tmp_path, photos, capsys):
    index = CacheIndex(tmp_path, (0, SIZE, SIZE, 3))
    writer = CacheWriter(index, 10**15, writable=True)
    writer.add(np.zeros((1, SIZE, SIZE, 3), np.uint8), Paths(photos[:1]), np.zeros((1, 3), int), np.zeros(1, FACTS))
    assert "MB are needed" in capsys.readouterr().out and not list(tmp_path.glob("*.pixels"))


@pytest.mark.parametrize("place", ["/proc/cache", "file"])
def test_a_read_only_place_is_named_and_images_are_decoded(tmp_path, photos, place, capsys):
    (tmp_path / "file").write_text("")
    _, rows, reasons = fill(tmp_path / place, photos)
    assert (rows == -1).all() and not reasons
    printed = capsys.readouterr().out
    assert "is not writable" in printed and "--cache_dir" in printed and "12 images are not cached" in printed


@pytest.fixture
def public_folder():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_a_read_only_cache_is_used_and_left_unchanged(public_folder):
    photos = list(map(str, write_images(public_folder / "photos", 12)))
    fill(public_folder / "cache", photos[:8])
    folder = public_folder / "cache" / "16px_v4"
    for path in [*folder.iterdir(), folder]:
        path.chmod(0o555)

    def look(results):
        if os.geteuid() == 0:  # permissions do not stop root
            os.seteuid(65534)
        cache, rows, _ = fill(public_folder / "cache", photos)
        check_pixels(cache, rows[:8], photos[:8])
        results.put(rows.tolist())

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=look, args=(results,))
    process.start()
    assert results.get(timeout=30) == [*range(8), -1, -1, -1, -1]
    process.join()
    folder.chmod(0o755)
    assert pixel_file(public_folder / "cache").stat().st_size == 8 * ROW


def test_rows_of_deleted_files_are_dropped_if_they_are_the_majority(tmp_path, photos):
    running, rows, _ = fill(tmp_path / "cache", photos)
    before = running.pixels.copy()
    for photo in photos[2:9]:
        os.remove(photo)
    for photo in photos[9:]:
        garble(photo)
    (added,) = map(str, write_images(tmp_path / "more", 1, seed=9))
    now = [*photos[9:], added]
    cache, new_rows, reasons = fill(tmp_path / "cache", now)
    assert not reasons and pixel_file(tmp_path / "cache").stat().st_size == 6 * ROW
    assert np.array_equal(cache.pixels[new_rows[:3]], before[rows[9:]])
    check_pixels(cache, new_rows[3:], [added])
    assert np.array_equal(running.pixels, before)


def test_a_worker_that_is_not_forked_maps_the_file_again(tmp_path, photos):
    cache, rows, _ = fill(tmp_path, photos)
    content = pickle.dumps(cache)
    assert len(content) < 1000
    check_pixels(pickle.loads(content), rows, photos)


@pytest.fixture
def broken_folder(tmp_path):
    write_class_folders(tmp_path, {"0": 6, "1": 6})
    whole = write_images(tmp_path / "0", 1, suffix=".jpg", size=(200, 200))[0]
    (tmp_path / "0" / "cut.jpg").write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "0" / "text.jpg").write_text("not a photograph")
    (tmp_path / "1" / "empty.png").write_bytes(b"")
    return tmp_path


def test_broken_files_are_listed_with_the_reason_and_stop_the_run(broken_folder, capsys):
    with pytest.raises(UserError, match=r"and 2 more .*--skip_broken"):
        read_all({"data": index_folders([broken_folder])}, ImageCache(None, 32), skip_broken=False)
    listed = capsys.readouterr().out
    for name, reason in [("cut.jpg", "truncated"), ("text.jpg", "cannot identify"), ("empty.png", "empty file")]:
        assert any(name in line and reason in line for line in listed.splitlines())


def test_broken_files_are_skipped_only_on_request(broken_folder):
    index = read_all({"data": index_folders([broken_folder])}, ImageCache(None, 32), skip_broken=True)["data"]
    assert index.counts().tolist() == [7, 6]
    assert not any(name in path for path in index.paths for name in ("cut", "text", "empty"))


def test_an_index_of_only_broken_images_is_rejected_even_with_skip_broken(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "x.png").write_bytes(b"")
    index = ImageIndex([str(tmp_path / "0" / "x.png")], np.array([0]), ["0", "1"])
    with pytest.raises(UserError, match=r"x\.png"):
        read_all({"test": index}, ImageCache(None, 32), skip_broken=True)


def read_twice(folder, cache_dir, capsys, **options):
    """-> warnings of the first and of the second run."""
    printed = []
    for _ in range(2):
        read_all({"data": index_folders([folder])}, ImageCache(cache_dir, 32, **options), False)
        printed.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")])
    return printed


@pytest.mark.parametrize("cached", [True, False])
def test_odd_images_are_listed_also_when_they_are_cached(tmp_path, cached, capsys):
    write_class_folders(tmp_path / "data", {"0": 4, "1": 4})
    for number in range(9):
        Image.new("RGB", (40, 40), "white").save(tmp_path / "data" / "0" / f"white_{number}.png")
    dark = np.random.default_rng(0).integers(0, 4096, (40, 40), dtype=np.uint16)
    Image.fromarray(dark).save(tmp_path / "data" / "1" / "12_bits.png")
    for warnings in read_twice(tmp_path / "data", tmp_path / "cache" if cached else None, capsys):
        one_color, too_dark = warnings
        assert "9 images of a single color" in one_color and "white_0.png" in one_color
        assert "white_5.png" not in one_color and "and 4 more" in one_color
        assert "1 image of more than 8 bits" in too_dark and "12_bits.png" in too_dark


def test_facts_stay_with_their_images_when_rows_are_dropped(tmp_path, capsys):
    photos = list(map(str, write_images(tmp_path / "photos", 9)))
    Image.new("RGB", (90, 30), "white").save(photos[8])
    fill(tmp_path / "cache", photos)
    for photo in photos[:7]:
        os.remove(photo)
    (added,) = map(str, write_images(tmp_path / "more", 1, seed=9))
    now = [photos[7], photos[8], added]
    for _ in range(2):
        stats = np.array([file_stat(photo) for photo in now])
        _, facts, _ = ImageCache(tmp_path / "cache", SIZE).fill(Paths(now), stats)
        assert facts["notes"].tolist() == [0, ONE_COLOR, 0]
        assert np.allclose(facts["aspect"], [1.2, 3, 1.2])


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_stretching_long_images_is_worth_a_warning(tmp_path, resize, capsys):
    write_images(tmp_path / "data" / "0", 4, suffix=".jpg", size=(80, 40))
    write_images(tmp_path / "data" / "1", 3, suffix=".jpg", size=(40, 40))
    for warnings in read_twice(tmp_path / "data", tmp_path / "cache", capsys, resize=resize):
        assert [("2.00 times" in line and "--resize" in line) for line in warnings] == [True] * (resize == "stretch")
    write_images(tmp_path / "data" / "1", 6, suffix=".jpg", size=(40, 40))
    assert read_twice(tmp_path / "data", tmp_path / "cache", capsys, resize=resize) == [[], []]


def test_each_way_to_resize_has_its_own_files(tmp_path, photos):
    for resize in ("stretch", "crop", "pad"):
        cache = ImageCache(tmp_path, SIZE, resize)
        rows, _, _ = cache.fill(Paths(photos), np.array([file_stat(photo) for photo in photos]))
        assert all(
            np.array_equal(cache.pixels[row], read_image(photo, SIZE, resize))
            for row, photo in zip(rows, photos, strict=True)
        )
    assert len(list(tmp_path.glob("*/*.pixels"))) == 3
