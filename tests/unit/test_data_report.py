"""The page of `--check_data`: what it points out, what it says of the training, and that it is bounded."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from helpers import index_of

import data_report
import gallery
from data_report import Data, find_pairs, page_values, what_needs_attention, what_training_sees
from flags import build_parser
from images.folders import ImageIndex
from images.statistics import MEASURES, Measurements
from pages import render


def patterns(count):
    """Different photographs as thumbnails."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 5, 5), np.uint8)
    return np.stack([cv2.resize(image, (32, 32), interpolation=cv2.INTER_CUBIC) for image in coarse])


def data_of(counts, pairs=(), unreadable=(), **values):
    """Photographs that do not exist, all in the training split. counts: per class; values: what is measured."""
    index, number = index_of(counts), sum(counts)
    measured = Measurements(np.zeros(number, MEASURES), np.zeros((number, 32, 32), np.uint8), ["JPEG RGB"], ["none"])
    for name, value in {"width": 300, "height": 300, "brightness": 100, **values}.items():
        measured.values[name] = value
    kinds = dict.fromkeys(data_report.PAIRS_SHOWN, np.empty((0, 2), int)) | dict(pairs)
    return Data(index, np.zeros(number, int), measured, kinds, True, list(unreadable))


def args_of(*flags):
    return build_parser().parse_args(["--data_dirs", "photos", "--image_size", "32", "--run_dir", "run", *flags])


def test_pairs_are_sorted_by_what_they_do_to_a_test(monkeypatch):
    search, searched = data_report.near_duplicates, []
    monkeypatch.setattr(data_report, "near_duplicates", lambda *data: searched.append(1) or search(*data))
    thumbnails = patterns(8)
    thumbnails[5], thumbnails[6], thumbnails[7] = thumbnails[0], thumbnails[1], thumbnails[2]
    targets, split_of = np.array([0, 0, 1, 0, 1, 1, 0, 1]), np.array([0, 0, 0, 1, 1, 2, 1, 0])
    pairs, complete = find_pairs(thumbnails, targets, split_of)
    assert complete and len(searched) == 1  # at a million photographs, each search costs
    assert {kind: found.tolist() for kind, found in pairs.items()} == {
        "different labels": [[0, 5]], "different splits": [[1, 6]], "one class and split": [[2, 7]],
    }  # fmt: skip


def test_one_pair_of_each_group_of_photographs_is_shown_first():
    pairs = np.array([[0, 1], [0, 2], [1, 2], [3, 5], [4, 6]])
    assert data_report.varied(pairs, 3) == [[0, 1], [3, 5], [4, 6]]
    assert data_report.varied(pairs, 4)[3:] == [[0, 2]]


def test_photographs_that_all_look_alike_end_the_search_with_the_worst_pairs(monkeypatch):
    monkeypatch.setattr("images.leakage.MAX_CANDIDATES", 500)
    thumbnails, targets = np.repeat(patterns(1), 300, axis=0), np.arange(300) % 2
    pairs, complete = find_pairs(thumbnails, targets, np.zeros(300, int))
    assert not complete and len(pairs["different labels"]) >= 500
    assert sum(map(len, pairs.values())) <= 1500


def test_what_needs_attention_is_counted():
    assert what_needs_attention(data_of([3, 3]), args_of()) == []
    data = data_of(
        [6, 4], {"different labels": np.array([[0, 7]])}, [("a.jpg", "empty file")],
        near_black=[True] + [False] * 9, one_color=[True] * 2 + [False] * 8, height=[300] * 8 + [20, 5000],
        width=[300] * 8 + [400, 5000],
    )  # fmt: skip
    text = "\n".join(what_needs_attention(data, args_of()))
    for line in (
        "cannot be read: 1 (a training stops", "with different labels: 1\n", "nearly black photographs: 1\n",
        "of a single color: 1\n", "over 4 times smaller or larger than the median: 2 (shorter side of 300 pixels)",
        "smaller than --image_size 32: 1", "stretch distorts over 1.5 times: 1",
    ):  # fmt: skip
        assert line in text
    text = "\n".join(what_needs_attention(data, args_of("--skip_broken", "--resize", "crop")))
    assert "as --skip_broken is on" in text and "distorts" not in text


@pytest.mark.parametrize(
    ("flags", "said", "per_epoch"),
    [
        ([], "once, unchanged: --use_augmentation and --augment_all are off", [6, 3]),
        (["--augment_all"], "once, augmented (--augment_all).", [6, 3]),
        (["--use_augmentation"], "copies until every class has 6, as many as the largest has", [6, 6]),
        (["--use_augmentation", "--target_samples_per_class", "4"], "until every class has at least 4 (", [6, 4]),
        (["--sampling", "balanced"], "every class equally often (--sampling balanced)", [5, 4]),
        (["--sampling", "balanced", "--crt_epochs", "2"], "The last 2 epochs draw every class", [5, 4]),
        (["--use_augmentation", "--drw_epoch", "5"], "This starts in epoch 5", [6, 6]),
        (["--progressive"], "have 32 x 32 pixels", [6, 3]),
        (["--cutmix", "0.2"], "--augment_all are off. CutMix then mixes the", [6, 3]),
        # a loss that is deferred changes no photograph
        (["--train_loss", "weighted_ce", "--drw_epoch", "5"], "--augment_all are off. Validation and test", [6, 3]),
    ],
)
def test_the_page_says_what_training_sees(flags, said, per_epoch):
    args, index = args_of(*flags), index_of([6, 3])
    drawn = gallery.drawn_epochs(index, args)[0]
    assert said in " ".join(what_training_sees(args, drawn))
    rows = data_report.class_rows(dict.fromkeys(("train", "val", "test"), index), drawn, args)["rows"]
    assert abs(np.array([row[-1] for row in rows]) - per_epoch).max() <= 1 and sum(per_epoch) == len(drawn.positions)


@pytest.mark.parametrize("num_classes", [1, 1500])
def test_the_page_is_bounded(monkeypatch, num_classes):
    """With 20,000 photographs, pairs and reasons, and pictures of noise, which take the most bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), np.uint8)
    read = []
    monkeypatch.setattr(gallery, "read_image", lambda path, side, resize: read.append(path) or noise[:side, :side])
    monkeypatch.setattr("dataset_double.read_image", lambda path, side, resize: noise[:side, :side])
    number = 20_000
    pairs = np.stack([np.arange(number - 1), np.arange(1, number)], axis=1)
    counts = [number // num_classes] * (num_classes - 1) + [number - (number // num_classes) * (num_classes - 1)]
    data = data_of(
        counts, dict.fromkeys(data_report.PAIRS_SHOWN, pairs), [("/a/<b>.jpg", "empty")] * number, near_black=True,
        sharpness=np.arange(number),
    )  # fmt: skip
    data.all_pairs = False
    args = args_of("--use_augmentation", "--augment_all")
    page = render("data_report.html", **page_values(data, dict.fromkeys(("train", "val", "test"), data.index), args,
                                                    what_needs_attention(data, args), []))  # fmt: skip
    assert len(page) < 12e6 and len(read) < 500
    assert "Too many photographs look alike" in page
    assert "/a/<b>.jpg" not in page and page.count("/a/&lt;b&gt;.jpg") == data_report.MAX_LISTED
    assert f'{number - 1} pairs<span class="muted">, 24 are shown</span>' in page
    assert page.count("<summary>List of the first 500, with their folders</summary>") == 3 + 1  # of the near-black
    for outside in ("http", "<script", "<link", "url(", 'src="/'):
        assert outside not in page


def test_classes_without_photographs_of_known_size_have_a_row():
    data = data_of([2, 1], width=[0, 300, 0], height=[0, 200, 0])
    assert [row[1:3] for row in data_report.median_rows(data)] == [[2, "300 x 200"], [1, "-"]]


def test_subjects_with_several_classes_are_counted():
    names = ("a_1", "a_2", "a_3", "b_1", "c_1", "c_2")
    index = ImageIndex([f"{name}.jpg" for name in names], np.array([0, 1, 2, 1, 1, 1]), ["x", "y", "z"])
    table = data_report.subject_table(
        dict.fromkeys(("train", "val", "test"), index), SimpleNamespace(group_regex="^(.)_")
    )
    assert table[0] == ["train", 3, "2", 3, 1]
    assert data_report.subject_table({"train": index}, SimpleNamespace(group_regex=None)) is None
