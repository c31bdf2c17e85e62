"""Photographs of a report: which are chosen, and that their number is bounded."""

import base64
from argparse import Namespace

import cv2
import numpy as np
import pytest
import torch
from helpers import write_images

import explain
import gallery
from dataset_double import training_set
from flag_checks import parse_flags
from gallery import (
    KINDS,
    MAX_PHOTOGRAPHS,
    SHEET_COPIES,
    augmented_sheet,
    choose_photos,
    data_uri,
    drawn_epochs,
    photographs,
)
from images.folders import ImageIndex
from model import Model

FLAGS = {
    "image_size": 32, "resize": "stretch", "augment_all": False, "target_samples_per_class": None,
    "augmentation_methods": None, "rotation": 15, "seed": 3, "use_augmentation": False, "sampling": "instance",
    "epochs": 10, "drw_epoch": 0, "crt_epochs": 0,
}  # fmt: skip


def test_the_worst_mistakes_the_least_certain_and_the_surest_right_answers_are_chosen():
    of_first = np.array([0.1, 0.3, 0.2, 0.45, 0.49, 0.51, 0.55, 0.8, 0.99, 0.9])
    chosen = choose_photos(np.zeros(10, int), np.stack([of_first, 1 - of_first], axis=1), [10, 4])
    assert chosen == {0: {"mistake": [0, 2, 1, 3], "least certain": [4, 5], "typical": [8, 9]}}


def test_the_classes_with_the_fewest_training_images_come_first():
    targets = np.array([0, 1, 2, 2])
    assert list(choose_photos(targets, np.eye(3)[targets], [50, 7, 20])) == [1, 2, 0]


@pytest.mark.parametrize("num_classes", [2, 31, 100, 300])
def test_the_number_of_photographs_is_bounded(num_classes):
    rng = np.random.default_rng(0)
    targets = np.arange(num_classes).repeat(20)
    chosen = choose_photos(targets, rng.dirichlet(np.ones(num_classes), len(targets)), [5] * num_classes)
    positions = [i for kinds in chosen.values() for members in kinds.values() for i in members]
    assert len(positions) == len(set(positions)) <= MAX_PHOTOGRAPHS
    assert len(positions) >= min(num_classes, MAX_PHOTOGRAPHS // len(KINDS))


def test_a_photograph_that_is_gone_leaves_the_others(tmp_path):
    paths = [str(path) for path in write_images(tmp_path, 3)]
    paths[1] = str(tmp_path / "gone.png")
    groups = photographs(paths, np.array([0, 0, 1]), np.eye(2)[[0, 0, 0]], ["<a>", "b"], [2, 1], "stretch")
    assert [(photo.kind, photo.label, photo.prediction) for photo in groups["b"]] == [("mistake", "b", "<a>")]
    images = {photo.path: photo.image for group in groups.values() for photo in group}
    assert images[paths[1]] is None and images[paths[0]].startswith("data:image/jpeg;base64,")


def small_index(tmp_path, counts):
    paths = [write_images(tmp_path / str(c), count, color=(90, 60 * c, 120)) for c, count in enumerate(counts)]
    targets = np.repeat(np.arange(len(counts)), counts)
    return ImageIndex([str(path) for group in paths for path in group], targets, list("abc")[: len(counts)])


def test_the_sheet_shows_the_augmented_images_that_training_sees(tmp_path):
    index = small_index(tmp_path, [9, 2])
    train_set = training_set(index, Namespace(**FLAGS), use_augmentation=True, sampling="instance")
    (drawn,) = drawn_epochs(index, Namespace(**FLAGS | {"use_augmentation": True}))
    ((name, original, copies),) = augmented_sheet(drawn)  # the largest class has no copies
    assert name == "b" and len(copies) == SHEET_COPIES
    seen = {data_uri(train_set[position][0].permute(1, 2, 0).numpy()) for position in range(11, 18)}
    assert set(copies) <= seen and len(set(copies)) == SHEET_COPIES
    originals = {data_uri(train_set[position][0].permute(1, 2, 0).numpy()) for position in (9, 10)}
    assert original in originals


def test_the_sheet_shows_what_a_class_sampler_and_augment_all_augment(tmp_path):
    index = small_index(tmp_path, [5, 2])
    (balanced,) = drawn_epochs(index, Namespace(**FLAGS | {"sampling": "balanced"}))
    assert [name for name, *_ in augmented_sheet(balanced)] == ["b"]  # of the larger class, no image is repeated
    (every,) = drawn_epochs(index, Namespace(**FLAGS | {"augment_all": True}))
    sheet = augmented_sheet(every)
    assert [(name, len(copies)) for name, _, copies in sheet] == [("b", 2), ("a", 5)]
    assert all(original not in copies for _, original, copies in sheet)
    assert len(augmented_sheet(every, max_classes=1)) == 1
    (plain,) = drawn_epochs(index, Namespace(**FLAGS))
    assert augmented_sheet(plain) == []


def test_the_sheet_is_of_the_epoch_in_which_a_stage_begins(tmp_path):
    index = small_index(tmp_path, [9, 2])
    late, head = drawn_epochs(index, Namespace(**FLAGS | {"use_augmentation": True, "drw_epoch": 3, "crt_epochs": 2}))
    assert (late.epoch, head.epoch) == (3, 8) and len(late.positions) == 18 and len(head.positions) == 11
    expected = training_set(index, Namespace(**FLAGS), use_augmentation=True, sampling="instance")
    expected.set_epoch(3)
    copies = augmented_sheet(late)[0][2]
    assert set(copies) <= {data_uri(expected[i][0].permute(1, 2, 0).numpy()) for i in range(11, 18)}
    (progressive,) = drawn_epochs(index, Namespace(**FLAGS | {"sampling": "progressive"}))
    assert progressive.epoch == 9 and np.bincount(index.targets[progressive.sources()]).tolist() in ([5, 6], [6, 5])


def test_heat_maps_are_made_in_turn_until_their_number_or_their_time_is_over(tmp_path, monkeypatch):
    """With another method in place of Grad-CAM, which tests/unit/test_explain.py tests."""
    paths = [str(path) for path in write_images(tmp_path, 12)]
    targets, classes = np.repeat([0, 1], 6), ["a", "b"]
    explained = []

    def maps_of(model, images, answers, rivals):
        explained.extend(answers)
        return np.full((len(images), *images.shape[2:]), 0.5, np.float32)

    monkeypatch.setattr(explain, "grad_cam", maps_of)
    monkeypatch.setattr(gallery, "MAX_HEAT_MAPS", 6)

    def number_of_maps():
        groups = photographs(paths, targets, np.eye(2)[targets], classes, [6, 6], "stretch")
        note = gallery.explain_photos(groups, SmallModel(), np.eye(2)[targets], classes, flags_at(64))
        numbers = [sum(bool(photo.heat_maps) for photo in group) for group in groups.values()]
        assert f"{sum(numbers)} of 8 photographs" in note
        return numbers

    assert number_of_maps() == [3, 3] and sorted(explained) == [0, 0, 0, 1, 1, 1]
    monkeypatch.setattr(gallery, "HEAT_MAP_SECONDS", -1)
    assert number_of_maps() == [2, 2]  # one chunk


def test_grades_get_a_second_map_that_says_why_not_the_neighbor(tmp_path, thin_network):
    paths = [str(path) for path in write_images(tmp_path, 2)]
    probabilities = np.array([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]])
    groups = photographs(paths, np.array([0, 2]), probabilities, ["0", "1", "2"], [1, 1, 1], "stretch")
    args = Namespace(**vars(flags_at(64)) | {"ordinal": True})
    note = gallery.explain_photos(groups, Model(3), probabilities, ["0", "1", "2"], args)
    photos = [photo for group in groups.values() for photo in group]
    titles = {photo.label: [title.partition(":")[0] for title, _ in photo.heat_maps] for photo in photos}
    assert titles == {"0": ["0", "why not 1"], "2": ["2", "why not 1"]} and "neighboring grade" in note


def test_a_class_that_no_region_speaks_for_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(explain, "grad_cam", lambda model, images, *_: np.zeros((len(images), 64, 64), np.float32))
    paths, probabilities = [str(path) for path in write_images(tmp_path, 1)], np.array([[0.6, 0.4]])
    groups = photographs(paths, np.array([0]), probabilities, ["a", "b"], [1, 1], "stretch")
    gallery.explain_photos(groups, SmallModel(), probabilities, ["a", "b"], flags_at(64))
    assert [title for title, _ in groups["a"][0].heat_maps] == ["a: no region"]


def flags_at(image_size):
    return parse_flags(["--demo", "--image_size", str(image_size)])


class SmallModel:
    def parameters(self):
        yield torch.zeros(1)


def test_heat_maps_that_fail_cost_no_photographs(tmp_path, capsys):
    paths = [str(path) for path in write_images(tmp_path, 2)]
    groups = photographs(paths, np.array([0, 1]), np.eye(2), ["a", "b"], [1, 1], "stretch")
    assert "No heat maps" in gallery.explain_photos(groups, None, np.eye(2), ["a", "b"], flags_at(64))
    assert "at 32 px" in gallery.explain_photos(groups, SmallModel(), np.eye(2), ["a", "b"], flags_at(32))
    assert "Heat maps failed" in gallery.explain_photos(groups, SmallModel(), np.eye(2), ["a", "b"], flags_at(64))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: heat maps are missing in the report (")
    assert all(photo.image for group in groups.values() for photo in group)


def test_an_embedded_photograph_has_the_colors_of_its_file():
    uri = data_uri(np.full((8, 8, 3), (200, 80, 30), np.uint8))
    pixels = cv2.imdecode(np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert np.abs(pixels.astype(int) - (200, 80, 30)).max() < 8
