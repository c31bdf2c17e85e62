"""Subjects and near-duplicate photographs across splits."""

import io
import json
import signal
import time
import tracemalloc
import unicodedata
from types import SimpleNamespace
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from PIL import Image

from flags import SPLITS
from images import leakage
from images.folders import ImageIndex
from images.leakage import (
    check_subjects,
    near_duplicates,
    num_trained_on,
    subject_ids,
    subjects_of,
    warn_of_grouped_names,
    warn_of_near_duplicates,
)
from run.cli import UserError
from run.signals import Stopped


def test_a_subject_is_what_the_first_group_matches_in_the_file_name():
    paths = ["/7_a/01_left.jpg", "/7_a/02_left.jpg", "/7_b/01_right.jpg"]
    assert subject_ids(paths, r"^(\d+)_").tolist() == [0, 1, 0]
    assert subject_ids(paths, r"left|right").tolist() == [0, 0, 1]
    with pytest.raises(UserError, match=r"--group_regex: .* does not match the file name of /7_b/01_right.jpg"):
        subject_ids(paths, "left")


def test_a_subject_is_the_same_in_both_spellings_of_hangul():
    """Files from macOS have names of parts of letters (NFD), those from elsewhere of whole ones (NFC)."""
    whole, parts = (unicodedata.normalize(form, "김철수") for form in ("NFC", "NFD"))
    paths = [f"/{name}_{number}.jpg" for number, name in enumerate((whole, "김민수", parts))]
    assert subject_ids(paths, "^([가-힣]+)_").tolist() == subject_ids(paths, f"{parts}|김민수").tolist() == [1, 0, 1]
    index = ImageIndex(paths, np.zeros(3, int), ["a"], columns={"name": [whole, "", parts]}, subject_column="name")
    ids = subjects_of(index, None)
    assert ids[0] == ids[2] != ids[1]


def test_a_subject_in_two_splits_is_an_error():
    train, val = (ImageIndex([path], np.array([0]), ["a"]) for path in ("/x/p1_a.png", "/y/p1_b.png"))
    with pytest.raises(UserError, match=r"subject 'p1' is in two splits: /x/p1_a.png \(train\) and /y/p1_b.png"):
        check_subjects({"train": train, "val": val}, r"^(p\d)")


def test_an_image_that_was_trained_on_has_the_same_name_and_size(tmp_path):
    for name, size in (("a.jpg", 10), ("b.jpg", 11), ("c.jpg", 10)):
        (tmp_path / name).write_bytes(bytes(size))
    paths = [str(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg", "none.jpg")]
    names = {"train": ["/x/a.jpg", "/x/b.jpg", "/x/none.jpg"], "val": ["/x/c.jpg"]}
    sizes = {"train": np.array([10, 10, 10]), "val": np.array([10])}
    assert num_trained_on(paths, [{"splits": names, "file_sizes": sizes}]) == 1
    from_macos = {
        "splits": {"train": [unicodedata.normalize("NFD", "a/가.jpg")]},
        "file_sizes": {"train": np.array([4])},
    }
    (tmp_path / "가.jpg").write_bytes(bytes(4))
    assert num_trained_on([str(tmp_path / "가.jpg")], [from_macos]) == 1
    other = {"splits": {"train": ["b.jpg"]}, "file_sizes": {"train": np.array([11])}}
    assert num_trained_on(paths, [{"splits": names, "file_sizes": sizes}, other]) == 2


@pytest.mark.parametrize(
    "names, looks_grouped",
    [
        ([f"{i:04d}_{side}.jpg" for i in range(20) for side in "LR"], True),
        ([f"site-{i:04d}-{side}.jpg" for i in range(20) for side in "LR"], True),
        ([f"HAM_{i:07d}_ISIC_{i * 7:07d}.jpg" for i in range(40)], False),
        ([f"img_{i}.jpg" for i in range(40)], False),
        ([f"{i}.jpg" for i in range(40)], False),
        ([f"grade{i % 5}_{i}.jpg" for i in range(400)], False),
    ],
)
def test_file_names_that_look_grouped_are_reported(names, looks_grouped, capsys):
    warn_of_grouped_names(names)
    assert ("--group_regex" in capsys.readouterr().out) == looks_grouped


def smooth_images(count):
    """Different images, as smooth as skin. -> (count, 64, 64, 3) uint8"""
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 220, (count, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.array(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC)) for image in coarse])


def compressed(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=40)
    return np.array(Image.open(buffer))


ALTERATIONS = {
    "the same": lambda image: image,
    "compressed": compressed,
    "smaller": lambda image: np.array(Image.fromarray(image).resize((40, 40)).resize((64, 64))),
    "brighter": lambda image: np.clip(image * 1.1 + 5, 0, 255).astype(np.uint8),
}


def pairs_of(pixels, cache_rows, split_of):
    pairs, complete = near_duplicates(pixels, cache_rows, split_of)
    assert complete
    return list(map(tuple, pairs.tolist()))


@pytest.mark.parametrize("name", ALTERATIONS)
def test_only_near_duplicates_in_other_splits_are_found(name):
    pixels = smooth_images(300)
    pixels = np.concatenate([pixels, [ALTERATIONS[name](pixels[0]), ALTERATIONS[name](pixels[1])]])
    split_of = np.zeros(302, int)
    split_of[300] = 1  # the copy of image 1 is in the same split, where it does no harm
    assert pairs_of(pixels, np.arange(302), split_of) == [(0, 300)]


def test_images_of_a_single_color_are_not_near_duplicates():
    pixels = np.concatenate([np.full((1, 64, 64, 3), 199, np.uint8), smooth_images(5)])
    cache_rows = np.array([0] * 20_000 + [3, 4, 3])
    assert pairs_of(pixels, cache_rows, np.arange(20_003)) == [(20_000, 20_002)]
    assert pairs_of(pixels, cache_rows[:20_000], np.arange(20_000)) == []


def altered_images(count):
    """-> (2 * count, 64, 64, 3) uint8: `count` images, and as many that are less and less like one of the first 30"""
    rng, pixels = np.random.default_rng(1), smooth_images(count)
    stains = np.stack([cv2.GaussianBlur(noise, (0, 0), 4) for noise in rng.normal(size=(count, 64, 64, 3))])
    strengths = np.linspace(0, 60, count)[:, None, None, None]
    altered = pixels[rng.integers(0, 30, count)] * rng.uniform(0.8, 1.2, (count, 1, 1, 1)) + strengths * stains
    return np.concatenate([pixels, altered.clip(0, 255).astype(np.uint8)])


@pytest.mark.parametrize("block", [2**18, 50])
def test_all_pairs_within_the_thresholds_are_found(block, monkeypatch):
    """Against a comparison of every image with every other, whatever the size of the blocks."""
    pixels = altered_images(400)
    split_of, cache_rows = np.random.default_rng(2).integers(3, size=800), np.random.default_rng(3).permutation(800)
    cache_rows[::40] = -1  # not cached
    thumbnails = leakage._thumbnails(pixels, cache_rows)
    bits = np.unpackbits(leakage._hashes(thumbnails).view(np.uint8).reshape(-1, 8), axis=1).astype(int)
    apart = bits @ (1 - bits.T) + (1 - bits) @ bits.T
    similar = (apart <= 4) & (np.corrcoef(thumbnails.reshape(800, -1)) >= 0.98)
    similar &= (split_of[:, None] != split_of) & (cache_rows >= 0) & (cache_rows >= 0)[:, None]
    expected = np.argwhere(np.triu(similar))
    assert len(expected) > 500
    monkeypatch.setattr(leakage, "BLOCK", block)
    monkeypatch.setattr(leakage, "THUMBNAILS_AT_ONCE", block)
    assert pairs_of(pixels, cache_rows, split_of) == list(map(tuple, expected.tolist()))


def test_memory_is_bounded_for_photographs_that_are_all_alike():
    """Held at once, the thumbnails of all 69,375 pairs would take 570 MB."""
    cache_rows, split_of = np.zeros(500, int), np.repeat([0, 1, 2], [300, 125, 75])
    tracemalloc.start()
    pairs = pairs_of(smooth_images(1), cache_rows, split_of)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(pairs) == 69_375 and pairs == sorted(pairs)
    assert peak < 60e6


def test_the_search_ends_at_its_limit_for_many_equal_photographs():
    started = time.perf_counter()
    pairs, complete = near_duplicates(smooth_images(1), np.zeros(20_000, int), np.arange(20_000) % 3)
    assert len(pairs) == leakage.MAX_CANDIDATES and not complete
    assert time.perf_counter() - started < 30


def test_copies_with_the_same_hash_are_found_even_if_the_search_ends_at_its_limit(monkeypatch):
    pixels = np.concatenate([altered_images(400), smooth_images(2)])
    split_of = np.r_[np.zeros(800, int), 1, 0]
    assert len(pairs_of(pixels, np.arange(802), split_of)) > 5
    monkeypatch.setattr(leakage, "MAX_COMPARISONS", 1)
    pairs, complete = near_duplicates(pixels, np.arange(802), split_of)
    assert [0, 800] in pairs.tolist() and not complete


def splits_of(pixels):
    """Three splits that share the images out in turn."""
    paths = [f"/{i}.png" for i in range(len(pixels))]
    index = ImageIndex(paths, np.zeros(len(paths), int), ["0"], np.arange(len(paths)), SimpleNamespace(pixels=pixels))
    return {split: index.subset(range(k, len(paths), 3)) for k, split in enumerate(SPLITS)}


def test_pairs_are_listed_with_their_splits_and_counted(capsys):
    pixels = smooth_images(300)
    pixels[7] = pixels[3]
    warn_of_near_duplicates(splits_of(pixels))
    assert capsys.readouterr().out.splitlines() == [
        "nearly identical: /3.png (train) and /7.png (val)",
        "warning: 1 pair of nearly identical photographs in different splits (listed above); delete one of each pair, "
        "or keep them in one split with --group_regex",
    ]
    warn_of_near_duplicates(splits_of(np.repeat(smooth_images(1), 30, axis=0)))
    *listed, warning = capsys.readouterr().out.splitlines()
    assert len(listed) == 20 and "300 pairs of" in warning and "(20 of them listed above)" in warning
    warn_of_near_duplicates(splits_of(smooth_images(300)))
    assert capsys.readouterr().out == ""


def test_an_incomplete_list_says_so(capsys, monkeypatch):
    monkeypatch.setattr(leakage, "MAX_CANDIDATES", 100)
    warn_of_near_duplicates(splits_of(np.repeat(smooth_images(1), 30, axis=0)))
    warning, incomplete = capsys.readouterr().out.splitlines()[-2:]
    assert "at least 100 pairs" in warning and incomplete.endswith("photographs is incomplete")


@pytest.mark.parametrize("error", [MemoryError(), OSError("the disk is gone"), cv2.error("src is empty")])
def test_a_failed_search_is_reported_and_does_not_end_the_run(error, capsys, monkeypatch):
    monkeypatch.setattr(leakage, "near_duplicates", Mock(side_effect=error))
    warn_of_near_duplicates(splits_of(smooth_images(3)))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: the search for near-duplicate photographs failed")
    assert (str(error) or "MemoryError") in line


def test_a_stopped_search_ends_the_run(monkeypatch):
    monkeypatch.setattr(leakage, "near_duplicates", Mock(side_effect=Stopped(signal.SIGTERM)))
    with pytest.raises(Stopped):
        warn_of_near_duplicates(splits_of(smooth_images(3)))


def test_the_pairs_are_stored_for_the_report(tmp_path):
    pixels = smooth_images(300)
    pixels[7] = pixels[3]
    warn_of_near_duplicates(splits_of(pixels), str(tmp_path))
    found = json.loads((tmp_path / leakage.DUPLICATES_FILE).read_text())
    assert found == {"complete": True, "count": 1, "pairs": [[["train", "/3.png"], ["val", "/7.png"]]]}
    warn_of_near_duplicates(splits_of(smooth_images(300)), str(tmp_path))
    assert json.loads((tmp_path / leakage.DUPLICATES_FILE).read_text())["count"] == 0


def test_a_folder_that_cannot_be_written_costs_only_the_file(tmp_path, capsys):
    pixels = smooth_images(300)
    pixels[7] = pixels[3]
    warn_of_near_duplicates(splits_of(pixels), str(tmp_path / "missing"))
    assert "warning: 1 pair" in capsys.readouterr().out
