"""Square crops of facial areas: where they are, and which photograph they are cut from."""

import io
import math
import re
import unicodedata

import aihub_tree
import numpy as np
import pytest
from PIL import Image

from images.aihub import EXTENSIONS, Target, read_labels
from images.aihub_crops import count_reasons, is_complete, output_folder, square_box, write_crops
from images.archives import Archives
from images.decode import limit_image_size
from run.cli import UserError
from run.files import read_rows


def crop_all(data, folder, target="forehead_wrinkle"):
    """-> ({crop: its file}, what was skipped)"""
    limit_image_size(200)
    archives = Archives([data], EXTENSIONS, "DOWNLOADED")
    found = read_labels(archives, [Target(target)])
    with output_folder(folder):
        crops, _ = write_crops(archives, found, folder, None)
    return crops, {label.split("/")[-1]: reason for label, _, reason in found.skipped}


def one(**changes):
    """One photograph with a label of the forehead."""
    photo = changes.pop("photo", aihub_tree.photograph())
    return {
        "img/1/0001/0001_1_F.jpg": photo,
        "label/1/0001/0001_1_F_01.json": aihub_tree.label("0001", "1", "F", 1, **changes),
    }


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((20, 30, 40, 60), (15, 30, 45, 60)),  # about its center
        ((0, 30, 10, 70), (0, 30, 40, 70)),  # moved to the right
        ((85, 100, 90, 120), (70, 100, 90, 120)),  # moved to the left
        ((40, 110, 70, 120), (40, 90, 70, 120)),  # moved up
        ((-50, -50, 20, 10), (0, 0, 20, 20)),  # the part outside is cut off first
        ((0, 0, 90, 120), (-15, 0, 105, 120)),  # larger than the photograph: reaches out on both sides
        ((-math.inf, -math.inf, math.inf, math.inf), (-15, 0, 105, 120)),
        ((90, 10, 99, 20), None),
        ((10, 130, 20, 140), None),
        ((-20, -20, -1, -1), None),
        ((10, 10, 10, 20), None),  # without width
    ],
)
def test_the_square_is_about_the_box_and_in_the_photograph_if_it_fits(box, expected):
    assert square_box(box, 90, 120) == expected


def test_the_square_holds_the_box_has_its_longer_side_and_is_in_the_photograph():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        width, height = rng.integers(1, 60, 2)
        left, right = sorted(rng.integers(0, width + 1, 2))
        top, bottom = sorted(rng.integers(0, height + 1, 2))
        square = square_box((left, top, right, bottom), width, height)
        if left == right or top == bottom:
            assert square is None
            continue
        side = max(right - left, bottom - top)
        assert square[2] - square[0] == square[3] - square[1] == side
        for axis, length, start, end in ((0, width, left, right), (1, height, top, bottom)):
            assert square[axis] <= start and end <= square[axis + 2]
            assert side > length or 0 <= square[axis] <= length - side


def pixels_of(path):
    return np.asarray(Image.open(path), dtype=int)


def test_a_crop_has_the_pixels_of_its_square(tmp_path):
    data = aihub_tree.write_tree(tmp_path / "data", one(bbox=[20, 30, 40, 60]))
    crops, skipped = crop_all(data, tmp_path / "out")
    pixels = pixels_of(crops["0001_1_F_01"])
    assert pixels.shape == (30, 30, 3) and not skipped
    assert abs(pixels[..., 0] - 2 * np.arange(15, 45)).max() < 10  # red grows to the right
    assert abs(pixels[..., 1] - 2 * np.arange(30, 60)[:, None]).max() < 10


def test_a_square_larger_than_the_photograph_is_padded_with_black(tmp_path):
    crops, _ = crop_all(aihub_tree.write_tree(tmp_path / "data", one(bbox=[0, 0, 90, 120])), tmp_path / "out")
    pixels = pixels_of(crops["0001_1_F_01"])
    assert pixels.shape == (120, 120, 3)
    assert pixels[:, :12].max() < 20 and pixels[:, 108:].max() < 20 and pixels[60, 20:100, 1].min() > 100


def turned_photograph(orientation):
    """A photograph as a phone stores it, on its side with the EXIF orientation that turns it upright."""
    upright = Image.open(io.BytesIO(aihub_tree.photograph()))
    stored = upright.transpose({6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}[orientation])
    exif, file = Image.Exif(), io.BytesIO()
    exif[274] = orientation
    stored.save(file, "JPEG", quality=98, subsampling=0, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("orientation", [3, 6])
def test_boxes_are_of_the_upright_photograph(tmp_path, orientation):
    turned = one(bbox=[20, 30, 40, 60], photo=turned_photograph(orientation), width=90, height=120)
    for name, content in (("upright", one(bbox=[20, 30, 40, 60])), ("turned", turned)):
        crop_all(aihub_tree.write_tree(tmp_path / name, content), tmp_path / f"{name}_crops")
    upright, turned = (pixels_of(tmp_path / f"{name}_crops/images/0001_1_F_01.jpg") for name in ("upright", "turned"))
    assert abs(upright - turned).max() < 12


def test_a_label_for_a_photograph_of_another_size_is_skipped(tmp_path):
    data = aihub_tree.write_tree(tmp_path / "data", one(photo=turned_photograph(6), width=120, height=90))
    crops, skipped = crop_all(data, tmp_path / "out")
    assert not crops
    assert skipped == {"0001_1_F_01.json": "its label is for 120 x 90 pixels, upright it has 90 x 120"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bbox": [95, 10, 120, 30]}, "its box is outside the photograph"),
        ({"photo": aihub_tree.photograph()[:300]}, "[Tt]runcated"),
        ({"photo": b""}, "empty file"),
        ({"photo": b"<html><body>"}, "it is an HTML page"),
        ({"photo": bytes(range(1, 30))}, "^it is not an image$"),
        ({"filename": "0001_1_F.png"}, "there is no such photograph"),
        ({"filename": "../../0001/../other.jpg"}, "there is no such photograph"),
    ],
)
def test_what_cannot_be_cropped_is_skipped_with_the_reason(tmp_path, changes, reason):
    data = aihub_tree.write_tree(tmp_path / "data", one(**changes))
    crops, skipped = crop_all(data, tmp_path / "out")
    assert not crops and list(skipped) == ["0001_1_F_01.json"]
    assert re.search(reason, skipped["0001_1_F_01.json"])


def test_photographs_of_the_same_name_are_told_apart_by_their_folders(tmp_path):
    content = {}
    for number, person in enumerate(("홍길동", "김철수")):
        content[f"img/1/{person}/F.jpg"] = aihub_tree.photograph(number)
        content[f"label/1/{person}/{person}_1_F_01.json"] = aihub_tree.label(person, "1", "F", 1, filename="F.jpg")
    content["label/1/이영희/이영희_1_F_01.json"] = aihub_tree.label("이영희", "1", "F", 1, filename="F.jpg")
    crops, skipped = crop_all(aihub_tree.write_tree(tmp_path / "data", content), tmp_path / "out")
    blue = {crop: pixels_of(path)[..., 2].mean().round() for crop, path in crops.items()}
    assert blue == {"홍길동_1_F_01": 0, "김철수_1_F_01": 20}
    assert skipped == {"이영희_1_F_01.json": "there is no such photograph"}


def test_the_same_photograph_twice_is_used_and_different_ones_are_not(tmp_path):
    content = one()
    content["copy/0001/0001_1_F.jpg"] = content["img/1/0001/0001_1_F.jpg"]
    crops, _ = crop_all(aihub_tree.write_tree(tmp_path / "data", content), tmp_path / "out")
    assert len(crops) == 1
    content["copy/1/0001/0001_1_F.jpg"] = aihub_tree.photograph(3, size=(95, 120))
    crops, skipped = crop_all(aihub_tree.write_tree(tmp_path / "data", content), tmp_path / "out2")
    assert not crops and list(skipped.values()) == ["there are different photographs of this name"]


def test_a_name_in_decomposed_form_and_an_extension_in_upper_case_are_found(tmp_path):
    person = unicodedata.normalize("NFD", "홍길동")
    content = {
        f"img/1/{person}/{person}_1_F.JPG": aihub_tree.photograph(),
        f"label/1/{person}/{person}_1_F_01.json": aihub_tree.label("홍길동", "1", "F", 1),
    }
    crops, skipped = crop_all(aihub_tree.write_tree(tmp_path / "data", content), tmp_path / "out")
    assert list(crops) == ["홍길동_1_F_01"] and not skipped


def test_a_crop_that_was_cut_off_is_not_complete(tmp_path):
    path = tmp_path / "a.jpg"
    assert not is_complete(path)
    content = aihub_tree.photograph()
    for data, expected in ((content, True), (content[:-1], False), (b"", False), (content[:-9] + bytes(9), False)):
        path.write_bytes(data)
        assert is_complete(path) == expected


def test_a_crop_that_cannot_be_written_stops_the_command_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def no_room(self, file, *_, **__):
        file.write(b"\xff\xd8")
        raise OSError(28, "No space left on device")

    data = aihub_tree.write_tree(tmp_path / "data", one())
    monkeypatch.setattr(Image.Image, "save", no_room)
    with pytest.raises(UserError, match=r"--output: .*0001_1_F_01\.jpg cannot be written: No space left on device"):
        crop_all(data, tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_two_processes_do_not_write_to_the_same_folder(tmp_path):
    with (
        output_folder(tmp_path),
        pytest.raises(UserError, match="another process is writing to"),
        output_folder(tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_rows_of_the_reasons_are_in_order(tmp_path):
    from images.aihub_crops import write_skipped

    write_skipped([("b", "", "second"), ("a", "x.jpg", "first")], tmp_path)
    assert [row["reason"] for row in read_rows(tmp_path / "skipped.csv")] == ["first", "second"]
    write_skipped([], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_truncated_at_different_places_are_one_reason():
    skipped = [(f"{n}.json", "", f"image file is truncated ({n} bytes not processed)") for n in range(20)]
    assert count_reasons([*skipped, ("", "", "it has no box")]) == "image file is truncated: 20; it has no box: 1"
