"""Decoding photographs, and the cache: what is kept, what is read anew, and what faults leave."""

import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import write_class_folders, write_images
from PIL import Image

import image_cache
from dataset_double import DoubleSkinDataset, index_folders, read_all
from image_cache import CacheIndex, ImageCache, Paths, load_image, read_image, stat_of

# ------------------------------------------------------------------------------------------------------ decoding


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees: what is left in the file is on top in the picture
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = load_image(tmp_path / "turned.jpg")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[0] > 200 and upright.getpixel((10, 35))[2] > 200


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_greys_are_scaled_not_clipped(tmp_path, suffix):
    grey = np.array([[0, 256 * 100], [256 * 200, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / f"grey{suffix}")
    assert np.asarray(load_image(tmp_path / f"grey{suffix}"))[..., 0].tolist() == [[0, 100], [200, 255]]


def test_float_greys_are_scaled(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)).save(tmp_path / "f.tif")
    assert np.asarray(load_image(tmp_path / "f.tif"))[0, :, 1].tolist() == [0, 127, 255]


def test_32_bit_greys_are_scaled_by_their_range(tmp_path):
    for values, expected in [([0, 100, 200], [0, 100, 200]), ([0, 25600, 51200], [0, 100, 200])]:
        Image.fromarray(np.array([values], dtype=np.int32)).save(tmp_path / "i.tif")
        assert np.asarray(load_image(tmp_path / "i.tif"))[0, :, 0].tolist() == expected


def test_cmyk_palette_grey_and_bilevel_become_rgb(tmp_path):
    skin = Image.new("RGB", (8, 8), (220, 170, 140))
    for mode, name, tolerance in [
        ("CMYK", "c.jpg", 8), ("CMYK", "c.tif", 2), ("P", "p.png", 30), ("L", "l.png", 60), ("1", "b.png", 120)
    ]:  # fmt: skip
        skin.convert(mode).save(tmp_path / name)
        image = load_image(tmp_path / name)
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - np.asarray(skin)).mean() < tolerance, (mode, name)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_laid_on_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (10, 10, 10, 255))
    image = image.convert(mode)
    image.save(tmp_path / "t.png")
    pixels = np.asarray(load_image(tmp_path / "t.png"))
    assert pixels[3, 3].tolist() == [255, 255, 255]
    assert pixels[0, 0].max() < 20


def test_resizing_is_antialiased(tmp_path):
    checker = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checker).save(tmp_path / "checker.png")
    assert np.abs(read_image(tmp_path / "checker.png", 8).astype(int) - 127).max() < 10


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    y, x = np.mgrid[:1000, :800] / 100
    waves = 128 + 60 * np.sin(3 * x + y) + 50 * np.sin(0.5 * x * y)
    Image.fromarray(np.stack([waves, waves * 0.8, 255 - waves], -1).clip(0, 255).astype(np.uint8)).save(
        tmp_path / "l.jpg", quality=95
    )
    assert load_image(tmp_path / "l.jpg", 200).size == (200, 250)
    assert load_image(tmp_path / "l.jpg", 201).size == (400, 500)
    whole = load_image(tmp_path / "l.jpg").resize((200, 200), Image.Resampling.BILINEAR)
    assert np.abs(read_image(tmp_path / "l.jpg", 200).astype(int) - np.asarray(whole)).mean() < 2


# ---------------------------------------------------------------------------------------------------------- paths


def test_paths_are_strings_again_whatever_their_bytes():
    names = ["/a/0/x.jpg", "/a/주름/왼쪽.jpg", os.fsdecode(b"/a/\xff\xfe.png"), "", "/b/y.jpg"]
    paths = Paths(names)
    assert list(paths) == names == [paths[i] for i in range(5)] and len(paths) == 5
    assert paths[-1] == "/b/y.jpg" and list(paths[np.array([4, 0])]) == ["/b/y.jpg", "/a/0/x.jpg"]
    assert list(Paths() + paths + Paths(["z"])) == [*names, "z"] and list(paths.first(2)) == names[:2]
    with pytest.raises(IndexError):
        paths[5]


# ---------------------------------------------------------------------------------------------------------- cache

SIZE = 16
ROW = 3 * SIZE**2


@pytest.fixture
def photos(tmp_path):
    return list(map(str, write_images(tmp_path / "photos", 12, suffix=".jpg", size=(70, 60))))


def fill(folder, photos, size=SIZE):
    """-> (cache, rows, reasons)."""
    cache = ImageCache(folder, size)
    stats = np.array([stat_of(photo) for photo in photos])
    return cache, *cache.fill(Paths(photos), stats)


def garble(path):
    """Other bytes under the same length and time: only who opens the file sees it."""
    stat = os.stat(path)
    Path(path).write_bytes(b"x" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def pixel_file(folder):
    (file,) = folder.glob("*/*.pixels")
    return file


def check_pixels(cache, rows, photos):
    for row, photo in zip(rows, photos, strict=True):
        assert np.array_equal(cache.pixels[row], read_image(photo, SIZE))


def test_what_is_cached_is_what_is_decoded(tmp_path, photos):
    photos += [str(path) for path in write_images(tmp_path / "png", 3)]
    cache, rows, reasons = fill(tmp_path / "cache", photos)
    assert sorted(rows) == list(range(15)) and not reasons
    check_pixels(cache, rows, photos)
    assert not cache.pixels.flags.writeable


def test_the_second_time_no_image_is_opened(tmp_path, photos, capsys):
    first, rows, _ = fill(tmp_path, photos)
    before = first.pixels.copy()
    for photo in photos:
        garble(photo)
    again, rows_again, reasons = fill(tmp_path, photos)
    assert not reasons and rows_again.tolist() == rows.tolist()
    assert np.array_equal(again.pixels, before)
    said = capsys.readouterr().out.splitlines()
    assert "12 images, 0.0 MB" in said[0] and "12 read anew" in said[0] and str(first.folder) in said[0]
    assert "0 read anew" in said[1]


def test_changed_added_and_removed_files_refresh_only_themselves(tmp_path, photos):
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
    assert np.array_equal(running.pixels, before)  # of a training that runs meanwhile


def test_files_of_one_size_and_time_that_change_places_are_read_again(tmp_path):
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


def test_images_of_a_folder_that_is_away_are_kept(tmp_path, photos):
    _, rows, _ = fill(tmp_path / "cache", photos)
    os.rename(tmp_path / "photos", tmp_path / "not mounted")
    fill(tmp_path / "cache", list(map(str, write_images(tmp_path / "other", 1))))
    os.rename(tmp_path / "not mounted", tmp_path / "photos")
    for photo in photos:
        garble(photo)
    _, rows_again, reasons = fill(tmp_path / "cache", photos)
    assert rows_again.tolist() == rows.tolist() and not reasons


def test_the_file_of_dropped_rows_makes_room_before_room_is_looked_for(tmp_path, photos, monkeypatch):
    fill(tmp_path / "cache", photos)
    for photo in photos:
        Image.new("RGB", (40, 40), "red").save(photo)

    class Usage:
        @property
        def free(self):  # of a disk of 15 rows, the index not counted
            return 15 * ROW - sum(file.stat().st_size for file in (tmp_path / "cache").glob("*/*.pixels"))

    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda folder: Usage())
    cache, rows, _ = fill(tmp_path / "cache", photos)
    check_pixels(cache, rows, photos)


def test_a_cache_whose_file_is_gone_is_done_without(tmp_path, photos):
    write_class_folders(tmp_path / "data", {"0": 3, "1": 3})
    index = read_all({"data": index_folders([tmp_path / "data"])}, ImageCache(tmp_path / "cache", SIZE), False)["data"]
    worker_index = pickle.loads(pickle.dumps(index))  # as a worker gets it that is not a fork
    pixel_file(tmp_path / "cache").unlink()
    image, _ = DoubleSkinDataset(worker_index, SIZE)[2]
    assert np.array_equal(image.permute(1, 2, 0), read_image(index.paths[2], SIZE))


def test_another_image_size_has_files_of_its_own(tmp_path, photos):
    fill(tmp_path, photos)
    cache, rows, _ = fill(tmp_path, photos, size=24)
    assert cache.pixels.shape == (12, 24, 24, 3) and (rows >= 0).all()
    assert len(list(tmp_path.glob("*/*.pixels"))) == 2


def test_a_broken_file_is_not_kept_and_is_named_each_time(tmp_path, photos):
    Path(photos[4]).write_bytes(b"no photograph")
    for _ in range(2):
        _, rows, reasons = fill(tmp_path / "cache", photos)
        assert list(reasons) == [4] and "cannot identify" in reasons[4] and rows[4] == -1
    write_images(tmp_path / "photos", 5, suffix=".jpg", size=(70, 60))  # mended
    cache, rows, reasons = fill(tmp_path / "cache", photos)
    check_pixels(cache, rows, photos)


@pytest.mark.parametrize("rows_left", [0, 2.5, 11])
def test_a_file_cut_short_is_noticed_and_what_is_missing_read_again(tmp_path, photos, rows_left, capsys):
    fill(tmp_path / "cache", photos)
    os.truncate(pixel_file(tmp_path / "cache"), int(rows_left * ROW))
    for photo in photos[: int(rows_left)]:
        garble(photo)
    cache, rows, reasons = fill(tmp_path / "cache", photos)
    assert "cut short" in capsys.readouterr().out and not reasons
    check_pixels(cache, rows[int(rows_left) :], photos[int(rows_left) :])


@pytest.mark.parametrize("content", [b"", b"nonsense", "half", "flipped"])
def test_a_damaged_index_is_noticed_and_all_read_again(tmp_path, photos, content, capsys):
    fill(tmp_path / "cache", photos)
    (index,) = (tmp_path / "cache").glob("*/index.npz")
    whole = index.read_bytes()
    middle = len(whole) // 2
    spoilt = {"half": whole[:middle], "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]}
    index.write_bytes(spoilt.get(content, content))
    cache, rows, reasons = fill(tmp_path / "cache", photos)
    assert "damaged" in capsys.readouterr().out and not reasons
    check_pixels(cache, rows, photos)
    assert pixel_file(tmp_path / "cache").stat().st_size == 12 * ROW  # the former file is gone


def test_rows_of_a_writer_that_was_killed_are_never_read(tmp_path, photos):
    """The worst moment: the file had been cut short, and who mends it dies with pixels written and no index."""
    cache, _, _ = fill(tmp_path / "cache", photos)
    os.truncate(pixel_file(tmp_path / "cache"), 3 * ROW)
    index = CacheIndex(cache.folder, (0, SIZE, SIZE, 3))
    writer = image_cache.CacheWriter(index, 9, writable=True)
    writer.add(np.zeros((9, SIZE, SIZE, 3), np.uint8), Paths(photos[3:]), np.zeros((9, 3), np.int64))
    writer._file.flush()
    assert pixel_file(tmp_path / "cache").stat().st_size == 12 * ROW
    cache, rows, _ = fill(tmp_path / "cache", photos)
    check_pixels(cache, rows, photos)


FILL_SLOWLY = """
import sys, image_cache, numpy as np
image_cache.CHUNK_BYTES, image_cache.SAVE_SECONDS = 1, 0.05
photos = open(sys.argv[2]).read().split()
stats = np.array([image_cache.stat_of(photo) for photo in photos])
image_cache.ImageCache(sys.argv[1], 16).fill(image_cache.Paths(photos), stats)
"""


def start_filling(folder, photos):
    (folder / "list.txt").write_text("\n".join(photos))
    command = [sys.executable, "-c", FILL_SLOWLY, folder / "cache", folder / "list.txt"]
    return subprocess.Popen(command, cwd=Path(image_cache.__file__).parent, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_process_stopped_while_filling_loses_seconds_of_its_work(tmp_path, number):
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
    kept = len(CacheIndex(tmp_path / "cache" / "16px_v2", (0, SIZE, SIZE, 3)))
    assert 0 < kept < 400
    cache, rows, reasons = fill(tmp_path / "cache", photos)
    assert not reasons
    check_pixels(cache, rows, photos)
    assert pixel_file(tmp_path / "cache").stat().st_size == 400 * ROW
    assert {path.suffix for path in (tmp_path / "cache" / "16px_v2").iterdir()} == {"", ".npz", ".pixels"}


def test_processes_that_fill_at_once_do_not_disturb_each_other(tmp_path):
    photos = list(map(str, write_images(tmp_path / "photos", 150, suffix=".jpg", size=(200, 200))))
    processes = [start_filling(tmp_path, photos) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sorted("150 read anew" in text for text in said) == [False, False, True]
    cache, rows, _ = fill(tmp_path / "cache", photos)
    check_pixels(cache, rows, photos)
    assert pixel_file(tmp_path / "cache").stat().st_size == 150 * ROW


def test_a_full_disk_gives_its_room_back_and_images_are_decoded_when_used(tmp_path, photos, capsys):
    """A limit on the size of files stands for the full disk: write() fails in the same place."""
    fill(tmp_path / "cache", photos[:2])
    write_class_folders(tmp_path / "data", {"0": 40, "1": 4})
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * ROW, former[1]))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(image_cache, "CHUNK_BYTES", 5 * ROW)
            index = read_all({"data": index_folders([tmp_path / "data"])}, ImageCache(tmp_path / "cache", SIZE), False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    said = capsys.readouterr().out
    assert "takes no more images (File too large); name another place with --cache_dir" in said
    assert "44 images are not in it" in said
    assert pixel_file(tmp_path / "cache").stat().st_size == 2 * ROW
    assert (index["data"].rows == -1).all()
    image, _ = DoubleSkinDataset(index["data"], SIZE)[43]
    assert np.array_equal(image.permute(1, 2, 0), read_image(index["data"].paths[43], SIZE))
    for photo in photos[:2]:
        garble(photo)
    assert fill(tmp_path / "cache", photos[:2])[1].tolist() == [0, 1]


def test_more_images_than_the_disk_has_room_for_are_not_begun_with(tmp_path, photos, capsys):
    index = CacheIndex(tmp_path, (0, SIZE, SIZE, 3))
    writer = image_cache.CacheWriter(index, 10**15, writable=True)
    writer.add(np.zeros((1, SIZE, SIZE, 3), np.uint8), Paths(photos[:1]), np.zeros((1, 3), np.int64))
    assert "MB are needed" in capsys.readouterr().out and not list(tmp_path.glob("*.pixels"))


@pytest.mark.parametrize("place", ["/proc/cache", "file"])
def test_a_place_that_cannot_be_written_to_is_named_and_images_are_decoded(tmp_path, photos, place, capsys):
    (tmp_path / "file").write_text("")
    _, rows, reasons = fill(tmp_path / place, photos)
    assert (rows == -1).all() and not reasons
    said = capsys.readouterr().out
    assert "cannot be written to" in said and "--cache_dir" in said and "12 images are not in it" in said


@pytest.fixture
def folder_for_everybody():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_a_read_only_cache_is_used_and_left_as_it_is(folder_for_everybody):
    photos = list(map(str, write_images(folder_for_everybody / "photos", 12)))
    fill(folder_for_everybody / "cache", photos[:8])
    folder = folder_for_everybody / "cache" / "16px_v2"
    for path in [*folder.iterdir(), folder]:
        path.chmod(0o555)

    def look(results):
        if os.geteuid() == 0:  # whom permissions do not stop
            os.seteuid(65534)
        cache, rows, _ = fill(folder_for_everybody / "cache", photos)
        check_pixels(cache, rows[:8], photos[:8])
        results.put(rows.tolist())

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=look, args=(results,))
    process.start()
    assert results.get(timeout=30) == [*range(8), -1, -1, -1, -1]
    process.join()
    folder.chmod(0o755)
    assert pixel_file(folder_for_everybody / "cache").stat().st_size == 8 * ROW


def test_rows_of_files_that_are_gone_are_dropped_when_they_are_most(tmp_path, photos):
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


def test_a_worker_that_is_not_a_fork_maps_the_file_anew(tmp_path, photos):
    cache, rows, _ = fill(tmp_path, photos)
    content = pickle.dumps(cache)
    assert len(content) < 1000
    check_pixels(pickle.loads(content), rows, photos)
