"""Labels of AI-Hub 71645: what one JSON file says, and what all of them say."""

import json
import math

import aihub_tree
import pytest

from images.aihub import (
    EXTENSIONS,
    BadLabel,
    Target,
    grade_of,
    in_threads,
    merged_names,
    parse_label,
    print_list,
    read_labels,
)
from images.archives import Archives
from run.cli import UserError


def parse(name="0001_1_F_01.json", folders=("label", "1", "0001"), **changes):
    return parse_label(aihub_tree.label("0001", "1", "F", 1, **changes), [*folders, name])


def read(folder, *targets):
    return read_labels(Archives([folder], EXTENSIONS, "DOWNLOADED"), targets)


def test_a_label_has_person_device_angle_area_box_grades_and_values():
    found = parse(name="0001_01_L15_01.json", width=90, height=120)
    assert (found.crop, found.person, found.device, found.angle, found.area) == (
        "0001_01_L15_01",
        "0001",
        "01",
        "L15",
        1,
    )
    assert found.box == (20, 10, 70, 30) and found.size == (90, 120) and found.photo == "0001_1_F.jpg"
    assert found.grades == {"forehead_wrinkle": 3, "forehead_pigmentation": 1}
    assert found.values == {"forehead_moisture": 59.97}
    assert found.folders == ("1", "0001") and found.about == ("F", "55", "", "")


@pytest.mark.parametrize("grade", [3, 3.0, "3", " 3"])
def test_a_grade_is_a_whole_number_however_it_is_written(grade):
    assert parse(annotations={"forehead_wrinkle": grade}).grades == {"forehead_wrinkle": 3}


@pytest.mark.parametrize("grade", [None, "", "Er", 2.5, True, math.nan, 1e300, "9" * 400])
def test_any_other_grade_is_missing(grade):
    assert parse(annotations={"forehead_wrinkle": grade}).grades == {"forehead_wrinkle": None}


def test_outlines_are_no_grade_and_null_is_as_good_as_nothing():
    assert parse(annotations={"acne": [{"points": [1, 2]}]}).grades == {}
    assert parse(annotations=None, equipment=None)[-2:] == ({}, {})


def test_what_would_replace_other_columns_of_the_table_is_no_grade():
    assert parse(annotations={"image": 1, "age": 2, "equipment_x": 3, "lip_dryness": 4}).grades == {"lip_dryness": 4}


def test_names_and_texts_are_one_line_of_the_table():
    found = parse(annotations={"a\nb": 1, "": 2, " ": 3, " lip_dryness ": 5}, equipment={"": 1, "\0": 2})
    assert found.grades == {r"a\nb": 1, "lip_dryness": 5} and found.values == {r"\x00": 2}
    content = aihub_tree.label("0001", "1", "F", 1).replace(b'"F"', b'"F\\n\\ud800"')
    assert parse_label(content, ["0001_1_F_01.json"]).about == (r"F\n\ud800", "55", "", "")


def test_a_box_may_have_its_corners_in_any_order_and_numbers_as_text():
    assert parse(bbox=[70, 30, "20", 10.0]).box == (20, 10, 70, 30)


@pytest.mark.parametrize("box", [None, [1, 2, 3], ["None"] * 4, "box", [1, 2, 3, None], []])
def test_a_label_without_a_box_says_so(box):
    assert isinstance(parse(bbox=box).box, str)


def test_the_whole_face_without_box_is_the_whole_photograph():
    content = aihub_tree.label("0001", "1", "F", 0, bbox=None)
    assert parse_label(content, ["0001_1_F_00.json"]).box == (-math.inf, -math.inf, math.inf, math.inf)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("0001_1_F_01.json", b'{"info": {"file', "cut short"),
        ("0001_1_F_01.json", b"", "empty"),
        ("0001_1_F_01.json", b"[" * 100_000, "damaged"),
        ("0001_1_F_01.json", b"[1]", "not a label"),
        ("0001_1_F_01.json", b"{}", "no images.facepart"),
        ("0001_1_F_01.json", b'{"images": {"facepart": 1}}', "no info.filename"),
        ("0001_1_F_05.json", aihub_tree.label("0001", "1", "F", 1), "its name has area 5, its images.facepart is 1"),
        ("package.json", aihub_tree.label("0001", "1", "F", 1), "PERSON_DEVICE_ANGLE_AREA"),
        (".._1_F_01.json", aihub_tree.label("0001", "1", "F", 1), "PERSON_DEVICE_ANGLE_AREA"),
        (f"{'가' * 60}_1_F_01.json", aihub_tree.label("0001", "1", "F", 1), "PERSON_DEVICE_ANGLE_AREA"),
    ],
)
def test_a_file_that_is_no_label_is_refused_with_the_reason(name, content, reason):
    with pytest.raises(BadLabel, match=reason):
        parse_label(content, [name])


def test_labels_in_the_encoding_of_korean_windows_and_with_a_byte_order_mark():
    document = json.loads(aihub_tree.label("0001", "1", "F", 1, filename="홍길동_1_F.jpg"))
    text = json.dumps(document, ensure_ascii=False)
    for encoding in ("cp949", "utf-8-sig", "utf-16"):
        assert parse_label(text.encode(encoding), ["0001_1_F_01.json"]).photo == "홍길동_1_F.jpg"


def test_a_name_without_side_means_both_sides():
    left = parse_label(aihub_tree.label("0001", "1", "F", 5), ["0001_1_F_05.json"])
    right = parse_label(aihub_tree.label("0001", "1", "F", 6), ["0001_1_F_06.json"])
    assert [Target("cheek_pore").of(label) for label in (left, right)] == [2, 4]
    assert [Target("l_cheek_pore").is_in(label) for label in (left, right)] == [True, False]
    # grades and instrument values share names
    assert [Target("cheek_pore", (600, 1200)).of(label) for label in (left, right)] == [1, 2]
    assert merged_names(["l_a", "r_a", "l_b", "c"]) == {"a": ("l_a", "r_a")}


def test_a_value_has_the_grade_of_the_limits_that_it_reaches():
    assert [grade_of(value, (10, 20, 30)) for value in (-5, 9.9, 10, 19, 20, 30, 99)] == [0, 0, 1, 1, 2, 3, 3]


def test_every_label_of_the_targets_areas_is_kept_or_skipped_with_a_reason(tmp_path):
    content = aihub_tree.files()
    place = f"label/{aihub_tree.DEVICES['1']}/0001/0001_1"
    content[f"{place}_F_01.json"] = aihub_tree.label("0001", "1", "F", 1, bbox=None)
    content[f"{place}_L_01.json"] = aihub_tree.label("0001", "1", "L", 1, annotations={"forehead_wrinkle": None})
    place = place.replace("0001", "0002")
    content[f"{place}_F_01.json"] = aihub_tree.label("0002", "1", "F", 1, annotations={})
    content[f"{place}_L_01.json"] = content[f"{place}_L_01.json"][:-9]
    content[f"{place}_L_05.json"] = aihub_tree.label("0002", "1", "L", 5, annotations={})  # of another area
    found = read(aihub_tree.write_tree(tmp_path, content), Target("forehead_wrinkle"))
    assert len(found.labels) == 8 - 4 and {label.area for label in found.labels.values()} == {1}
    reasons = {where.split("/")[-1]: reason for where, _, reason in found.skipped}
    assert reasons == {
        "0001_1_F_01.json": "it has no box",
        "0001_1_L_01.json": "no grade of forehead_wrinkle",
        "0002_1_F_01.json": "no grade of forehead_wrinkle",
        "0002_1_L_01.json": "it is cut short or damaged",
    }


def test_two_label_files_of_a_crop_count_once_if_they_agree_and_not_at_all_otherwise(tmp_path):
    content = aihub_tree.files(angles=("F",), devices=("1",))
    first = f"label/{aihub_tree.DEVICES['1']}/0001/0001_1_F_01.json"
    content["again/label/1/0001/0001_1_F_01.json"] = content[first]
    content["again/label/1/0002/0002_1_F_01.json"] = aihub_tree.label(
        "0002", "1", "F", 1, annotations={"forehead_wrinkle": 5}
    )
    found = read(aihub_tree.write_tree(tmp_path, content), Target("forehead_wrinkle"))
    assert list(found.labels) == ["0001_1_F_01"] and found.repeated == 1
    assert [reason for *_, reason in found.skipped] == ["label files of the same crop differ"] * 2


def test_the_list_has_counts_per_grade_areas_and_quartiles(tmp_path, capsys):
    content = aihub_tree.files()
    missing = f"label/{aihub_tree.DEVICES['1']}/0001/0001_1_F_05.json"
    content[missing] = aihub_tree.label("0001", "1", "F", 5, annotations={"l_cheek_pore": None})
    print_list(read(aihub_tree.write_tree(tmp_path, content)))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["--target", "area", "0", "1", "2", "3", "4", "missing"]
    assert ["l_cheek_pore", "left", "cheek", "7", "1"] in lines
    assert ["cheek_pore", "l_cheek_pore", "+", "r_cheek_pore", "7", "8", "1"] in lines
    assert ["r_cheek_moisture", "right", "cheek", "8", *["43.5"] * 5] in lines
    assert ["l_cheek_moisture", "left", "cheek", "0", "8"] in lines
    assert not any(line[:1] == ["acne"] for line in lines)


def test_unknown_targets_are_errors_that_list_those_there_are(tmp_path):
    folder = aihub_tree.write_tree(tmp_path / "data", aihub_tree.files(angles=("F",), devices=("1",)))
    with pytest.raises(
        UserError, match=r"--target: no label file has a grade of glabella; there are cheek_pore, forehead_"
    ):
        read(folder, Target("forehead_wrinkle"), Target("glabella"))
    with pytest.raises(
        UserError, match=r"--equipment: no label file has a value of forehead_wrinkle; there are .*moisture"
    ):
        read(folder, Target("forehead_wrinkle", (1,)))
    with pytest.raises(UserError, match=r"DOWNLOADED: no label files .*TL\.zip"):
        read(folder / "img")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "package.json").write_text('{"info": {}}')
    with pytest.raises(
        UserError, match=r"--target: none of the 1 label files has a grade; .*package\.json: its name is not"
    ):
        read(tmp_path / "others", Target("forehead_wrinkle"))


def test_threads_keep_the_order_take_few_tasks_ahead_and_pass_errors_on():
    taken = []
    results = in_threads(lambda number: number**2, (taken.append(i) or i for i in range(10_000)))
    assert [next(results) for _ in range(3)] == [0, 1, 4] and len(taken) < 1000
    assert list(results) == [i**2 for i in range(3, 10_000)]
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda number: 1 // number, [1, 0]))
