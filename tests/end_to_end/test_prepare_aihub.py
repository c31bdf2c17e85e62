"""prepare_aihub.py: crops and tables of a small data set, from folders and zip archives, also in several attempts."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import aihub_tree
import pytest
from helpers import PATIENCE, ROOT, run_main, wait_for
from PIL import Image

import images.aihub_crops
import prepare_aihub
from run.files import read_rows


def prepare(*flags):
    return prepare_aihub.main([str(flag) for flag in flags])


def outputs(folder):
    """-> {path below the folder: content}"""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def data(tmp_path):
    return aihub_tree.write_tree(tmp_path / "data", aihub_tree.files())


def test_zip_archives_and_folders_give_the_same_crops_and_the_same_table(data, tmp_path, capsys):
    zips = aihub_tree.write_zips(tmp_path / "zips", aihub_tree.files())
    assert prepare(data, "--target", "cheek_pore", "--output", tmp_path / "a") == 0
    assert prepare(*zips, "--target", "cheek_pore", "--output", tmp_path / "b") == 0
    assert prepare(tmp_path / "zips", "--target", "l_cheek_pore", "r_cheek_pore", "--output", tmp_path / "c") == 0
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b") == outputs(tmp_path / "c")
    assert len(outputs(tmp_path / "a")) == 2 * 8 + 1
    assert "16 crops in" in capsys.readouterr().out


def test_the_table_has_each_crop_with_its_person_grades_and_values(data, tmp_path, capsys):
    assert prepare(data, "--target", "cheek_pore", "--output", tmp_path / "out") == 0
    rows = {row["image"]: row for row in read_rows(tmp_path / "out" / "labels.csv")}
    assert rows.keys() == set(os.listdir(tmp_path / "out" / "images"))
    row = rows["0002_1_L_05.jpg"]
    expected = {
        "person_id": "0002", "device": "1", "angle": "L", "area": "5", "gender": "F", "age": "55",
        "cheek_pore": "2", "l_cheek_pore": "2", "r_cheek_pore": "", "forehead_wrinkle": "",
        "equipment_l_cheek_pore": "608", "equipment_cheek_pore": "608", "equipment_l_cheek_moisture": "",
    }  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    assert rows["0002_1_L_06.jpg"]["equipment_r_cheek_moisture"] == "43.5"
    assert "--label_column cheek_pore --recipe strong --rotation 15\n" in capsys.readouterr().out


def test_one_folder_serves_several_targets_and_its_table_keeps_earlier_rows(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(data, "--target", "forehead_wrinkle", "--output", out) == 0
    first = read_rows(out / "labels.csv")
    assert prepare(data, "--target", "lip_dryness", "--output", out) == 0
    assert "--label_column lip_dryness --drop= --recipe strong --rotation 15\n" in capsys.readouterr().out
    (out / "images" / "0001_1_F_07.jpg").unlink()  # one that the user has deleted
    assert prepare(data, "--target", "forehead_pigmentation", "--output", out) == 0
    rows = read_rows(out / "labels.csv")
    assert [row["image"] for row in rows] == sorted(os.listdir(out / "images")) and len(rows) == 8 + 7
    assert [row for row in rows if row["area"] == "1"] == first


def test_an_instrument_value_is_graded_by_its_limits_in_all_rows(data, tmp_path, capsys):
    out, flags = tmp_path / "out", ["--equipment", "cheek_pore", "--bins"]
    (half := tmp_path / "half").mkdir()
    for top in ("img", "label"):
        (half / top).symlink_to(data / top / aihub_tree.DEVICES["1"])
    assert prepare(data, *flags, "608,2000", "--output", out) == 0
    grades = {row["image"][-6:-4]: row["equipment_cheek_pore_grade"] for row in read_rows(out / "labels.csv")}
    assert grades == {"05": "1", "06": "1"}
    assert prepare(half, *flags, "700,1200", "--output", out) == 0  # other limits also for rows of the first command
    rows = read_rows(out / "labels.csv")
    assert {(row["image"][-6:-4], row["equipment_cheek_pore_grade"]) for row in rows} == {("05", "0"), ("06", "2")}
    assert len(rows) == 16 and "grade 0: 4, grade 2: 4" in capsys.readouterr().out


@pytest.mark.parametrize("is_table", [True, False])
def test_the_printed_command_trains_with_persons_kept_apart(tmp_path, capsys, thin_network, is_table):
    people = [f"{number:04d}" for number in range(9)] + ["홍길동"]
    content = aihub_tree.files(people, angles=("F",))
    for number, person in enumerate(people):
        for device, name in aihub_tree.DEVICES.items():
            place = f"label/{name}/{person}/{person}_{device}_F_01.json"
            grades = {"forehead_wrinkle": number % 2}
            content[place] = aihub_tree.label(person, device, "F", 1, annotations=grades)
    data, out = aihub_tree.write_tree(tmp_path / "data", content), tmp_path / "our crops"
    if is_table:  # rows of another target, which have no grade of this one
        assert prepare(data, "--target", "lip_dryness", "--output", out) == 0
    assert prepare(data, "--target", "forehead_wrinkle", "--output", out, *[] if is_table else ["--class_folders"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(line.removeprefix("train: python main.py "))
    flags = ["--no-pretrained", "--image_size", 32, "--epochs", 1, "--wandb_mode", "disabled", "--batch_size", 4]
    assert run_main(*words, *flags, "--run_dir", tmp_path / "run") == 0
    splits = json.loads((tmp_path / "run" / "splits.json").read_text(encoding="utf-8"))
    persons = [{Path(image).name.split("_")[0] for image in splits[split]} for split in ("train", "val", "test")]
    assert all(persons) and sum(map(len, persons)) == len(set.union(*persons)) == 10


def test_class_folders_are_of_one_target(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(data, "--target", "cheek_pore", "--output", out, "--class_folders") == 0
    before = outputs(out)
    assert prepare(data, "--target", "lip_dryness", "--output", out, "--class_folders") == 2
    assert prepare(data, "--equipment", "cheek_pore", "--bins", "1", "--output", out, "--class_folders") == 2
    assert prepare(data, "--target", "lip_dryness", "--output", out) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all("--output: " in e and "name another folder" in e for e in errors)
    assert outputs(out) == before


def test_problems_are_listed_and_the_rest_is_done(tmp_path, capsys):
    content = aihub_tree.files(people=("0001", "홍길동"))
    label, photo = (f"{top}/{aihub_tree.DEVICES['1']}/홍길동/홍길동_1" for top in ("label", "img"))
    content[f"{label}_F_01.json"] = aihub_tree.label("홍길동", "1", "F", 1, bbox=None)
    content[f"{label}_L_01.json"] = content[f"{label}_L_01.json"][:40]
    label, photo = (
        path.replace(aihub_tree.DEVICES["1"], aihub_tree.DEVICES["2"])[:-1] + "2" for path in (label, photo)
    )
    content[f"{label}_F_01.json"] = aihub_tree.label("홍길동", "2", "F", 1, bbox=[500, 0, 600, 9])
    content[f"{photo}_L.jpg"] = content[f"{photo}_L.jpg"][:-200]
    zips = aihub_tree.write_zips(tmp_path, content)
    assert prepare(*zips, "--target", "forehead_wrinkle", "--output", tmp_path / "out") == 1
    captured = capsys.readouterr()
    reasons = {row["label"].split("/")[-1]: row["reason"] for row in read_rows(tmp_path / "out" / "skipped.csv")}
    assert reasons.pop("홍길동_2_L_01.json").startswith(("image file is truncated", "broken data stream"))
    assert reasons == {
        "홍길동_1_F_01.json": "it has no box",
        "홍길동_1_L_01.json": "it is cut short or damaged",
        "홍길동_2_F_01.json": "its box is outside the photograph",
    }
    assert sorted(os.listdir(tmp_path / "out" / "images")) == [f"0001_{d}_{a}_01.jpg" for d in "12" for a in "FL"]
    assert captured.err.count("\n") == 1 and "skipped.csv: " in captured.err
    # mended, everything is done, and the list is gone
    zips = aihub_tree.write_zips(tmp_path, aihub_tree.files(people=("0001", "홍길동")))
    assert prepare(*zips, "--target", "forehead_wrinkle", "--output", tmp_path / "out") == 0
    assert not (tmp_path / "out" / "skipped.csv").exists() and len(read_rows(tmp_path / "out" / "labels.csv")) == 8


def test_the_list_names_what_cannot_be_used_and_writes_nothing(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepare(data, "--list") == 0
    assert "lip_dryness" in capsys.readouterr().out
    (data / "label" / "x_1_F_01.json").write_text("{")
    assert prepare(data, "--list") == 1
    assert "cut short or damaged: 1" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["data"]


def test_finished_crops_are_not_made_again_and_one_that_was_cut_off_is(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(data, "--target", "lip_dryness", "--output", out) == 0
    expected, times = outputs(out), {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    cut = sorted(times)[3]
    cut.write_bytes(cut.read_bytes()[:-50])
    (out / "images" / ".0001_1_F_07.jpg.99999.tmp").write_bytes(b"of a process that was killed")
    assert prepare(data, "--target", "lip_dryness", "--output", out) == 0
    assert outputs(out) == expected and "8 crops in" in (text := capsys.readouterr().out) and "1 of them new" in text
    assert [path for path in times if path.stat().st_mtime_ns != times[path]] == [cut]


def test_after_a_full_disk_the_same_command_makes_what_is_missing(data, tmp_path, capsys, monkeypatch):
    out, written = tmp_path / "out", []
    save = Image.Image.save

    def save_three(self, *args, **options):
        written.append(1)
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        return save(self, *args, **options)

    monkeypatch.setattr(Image.Image, "save", save_three)
    assert prepare(data, "--target", "lip_dryness", "--output", out) == 2
    assert "No space left on device; the same command makes what is missing" in capsys.readouterr().err
    # the command waits for no thread; here, unlike in its own process, they go on for a moment
    wait_for(lambda: not any(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate()))
    assert all(images.aihub_crops.is_complete(path) for path in out.rglob("*") if path.is_file())
    monkeypatch.setattr(Image.Image, "save", save)
    assert prepare(data, "--target", "lip_dryness", "--output", out) == 0
    assert len(read_rows(out / "labels.csv")) == 8


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_a_command_that_is_stopped_continues_where_it_was(data, tmp_path):
    out = tmp_path / "out"
    script = (
        "import sys, time, images.aihub_crops, prepare_aihub\n"
        "cut = images.aihub_crops._cut\n"
        "images.aihub_crops._cut = lambda *task: (time.sleep(0.3), cut(*task))[1]\n"
        "prepare_aihub.end_process(prepare_aihub.main())"
    )
    command = [sys.executable, "-c", script, str(data), "--target", "lip_dryness", "--output", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: out.exists() and list(out.rglob("*.jpg")))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and err == "stopped; resume with the same command\n"
    left = [path for path in out.rglob("*") if path.is_file()]
    assert 0 < len(left) < 8 and all(images.aihub_crops.is_complete(path) for path in left)
    assert prepare(data, "--target", "lip_dryness", "--output", out) == 0
    assert len(read_rows(out / "labels.csv")) == 8


def test_paths_in_archives_cannot_leave_the_output(tmp_path):
    archive, outside = tmp_path / "evil.zip", "../../../outside"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("/etc/0001_1_F_01.json", f"{outside}/0002_1_F_01.json", f"{outside}\\.._1_F_01.json"):
            file.writestr(name, aihub_tree.label("0001", "1", "F", 1, filename=f"{outside}/0001_1_F.jpg"))
        file.writestr(f"{outside}/0001_1_F.jpg", aihub_tree.photograph())
    place = tmp_path / "a" / "b" / "c" / "out"
    place.parent.mkdir(parents=True)
    before = outputs(tmp_path)
    prepare(archive, "--target", "forehead_wrinkle", "--output", place)
    assert (place / "images" / "0001_1_F_01.jpg").exists()
    assert all(name.startswith("a/b/c/out/") for name in outputs(tmp_path).keys() - before.keys())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to do; add one of --list, --target and --equipment"),
        (["--list", "--target", "a"], "--list and --target exclude each other"),
        (["--target", "lip_dryness"], "--output: name a folder"),
        (["--equipment", "l_cheek_pore", "--output", "OUT"], "--equipment: add --bins"),
        (["--target", "lip_dryness", "--bins", "1,2", "--output", "OUT"], "--bins: it grades an instrument value"),
        (["--equipment", "l_cheek_pore", "--bins", "2,1", "--output", "OUT"], "2,1 is not ascending"),
        (["--equipment", "l_cheek_pore", "--bins", "nan", "--output", "OUT"], "must be a finite number"),
        (["--target", "a", "b", "--class_folders", "--output", "OUT"], "--class_folders: a crop can be in"),
        (
            ["--target", "lips", "--output", "OUT"],
            "--target: no label file has a grade of lips; there are cheek_pore, ",
        ),
        (["--target", "lip_dryness", "--output", "DATA/out"], "name a folder outside of it"),
        (["--target", "lip_dryness", "--output", "DATA/label/FILE"], "is not a folder"),
    ],
)
def test_mistakes_are_errors_in_one_line_and_leave_nothing(data, tmp_path, capsys, flags, message):
    (data / "label" / "FILE").write_text("")
    places = {"OUT": tmp_path / "out", "DATA/out": data / "out", "DATA/label/FILE": data / "label" / "FILE"}
    before = outputs(tmp_path)
    assert prepare(data, *(places.get(flag, flag) for flag in flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert outputs(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["labels.csv", "skipped.csv"])
@pytest.mark.parametrize("content", [b"mine\n1\n", b"mine," + b"x" * 200_000, "\ufeffimage,label\n".encode("utf-16")])
def test_a_table_of_something_else_is_not_replaced(data, tmp_path, capsys, name, content):
    (out := tmp_path / "out").mkdir()
    (out / name).write_bytes(content)
    assert prepare(data, "--target", "lip_dryness", "--output", out) == 2
    assert outputs(out) == {name: content}
    assert re.search(rf"^error: --output: .*{name} is not a (table|list) of this command", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("_05.jpg,0001,", "_05.jpg,1,", "person_id of 0001_1_F_05.jpg is 1"),  # Excel takes it for a number
        (",608,", ",608 µm,", "equipment_cheek_pore of 0001_1_F_05.jpg is 608 µm"),
    ],
)
def test_rows_that_another_program_has_changed_are_not_continued(data, tmp_path, capsys, before, after, problem):
    out = tmp_path / "out"
    assert prepare(data, "--target", "l_cheek_pore", "--output", out) == 0
    table = out / "labels.csv"
    table.write_text(table.read_text(encoding="utf-8").replace(before, after), encoding="utf-8")
    changed = table.read_bytes()
    capsys.readouterr()
    others = aihub_tree.write_tree(tmp_path / "others", aihub_tree.files(("0002",)))  # so 0001 is known from the table
    assert prepare(others, "--equipment", "cheek_pore", "--bins", "700", "--output", out) == 2
    error = capsys.readouterr().err
    assert f"another program has changed {table} ({problem}); delete it" in error and error.count("\n") == 1
    assert table.read_bytes() == changed


def test_a_folder_of_crops_that_links_into_the_data_is_refused(data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "images").symlink_to(data / "img", target_is_directory=True)
    before = outputs(tmp_path)
    assert prepare(data, "--target", "lip_dryness", "--output", tmp_path / "out") == 2
    assert "which is read; name a folder outside of it" in capsys.readouterr().err and outputs(tmp_path) == before


def test_labels_without_photographs_are_listed_but_not_cropped(data, tmp_path, capsys):
    assert prepare(data / "label", "--list") == 0
    assert prepare(data / "label", "--target", "lip_dryness", "--output", tmp_path / "out") == 2
    assert "error: DOWNLOADED: no photographs in it; name them too, such as TS.zip" in capsys.readouterr().err
    # the grades of finished crops need no photographs
    assert prepare(data, "--target", "lip_dryness", "--output", tmp_path / "out") == 0
    assert prepare(data / "label", "--target", "lip_dryness", "lip_dryness", "--output", tmp_path / "out") == 0
    assert capsys.readouterr().out.count("train: ") == 2  # a target named twice counts once


def test_a_download_in_pieces_gives_the_same_crops(data, tmp_path):
    for path in aihub_tree.write_zips(tmp_path / "zips", aihub_tree.files()):
        content = path.read_bytes()
        path.unlink()
        for start in range(0, len(content), 1000):  # 10000 comes before 2000 in the alphabet
            path.with_name(f"{path.name}.part{start}").write_bytes(content[start : start + 1000])
    assert prepare(tmp_path / "zips", "--target", "lip_dryness", "--output", tmp_path / "a") == 0
    assert prepare(data, "--target", "lip_dryness", "--output", tmp_path / "b") == 0
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")
