"""Class folders and lists of paths."""

import os
import re
import subprocess

import numpy as np
import pytest
from helpers import write_class_folders, write_images
from PIL import Image

import images.formats
from images.decode import read_image
from images.folders import Paths, check_duplicates, index_folders, natural_key
from run.cli import UserError


def test_classes_are_in_natural_order():
    names = ["10", "2", "grade 10", "1", "grade 9", "주름", "0"]
    assert sorted(names, key=natural_key) == ["0", "1", "2", "10", "grade 9", "grade 10", "주름"]


def test_several_folders_are_merged_class_by_class(tmp_path):
    write_class_folders(tmp_path / "a", {"0": 2, "10": 3})
    write_class_folders(tmp_path / "b", {"10": 1, "2": 4})
    index = index_folders([tmp_path / "a", tmp_path / "b"])
    assert index.classes == ["0", "2", "10"]
    assert index.counts().tolist() == [2, 4, 4]
    assert all(index.classes[t] == path.split(os.sep)[-2] for path, t in zip(index.paths, index.targets, strict=True))


def test_nested_folders_unusual_names_and_all_extensions_are_found(tmp_path):
    names = ["왼쪽 볼/사진 1.JPG", "a [b] (c)/x.jpeg", "x.png", "y.Bmp", "z.webp", "q.tif", "r.TIFF"]
    for name in names:
        path = tmp_path / "1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    write_images(tmp_path / "0", 1)
    (tmp_path / "1" / "notes.txt").write_text("not an image")
    (tmp_path / "1" / "._x.jpg").write_text("left by macOS")
    (tmp_path / ".cache").mkdir()
    index = index_folders([tmp_path])
    found = {
        os.path.relpath(path, tmp_path / "1") for path, t in zip(index.paths, index.targets, strict=True) if t == 1
    }
    assert found == set(names)
    assert all(read_image(path, 8).shape == (8, 8, 3) for path in index.paths)


def test_a_class_name_in_composed_and_decomposed_hangul_is_the_same_class(tmp_path):
    composed, decomposed = "주름", "\u110c\u116e\u1105\u1173\u11b7"
    write_images(tmp_path / "a" / composed, 1)
    write_images(tmp_path / "a" / "0", 1)
    write_images(tmp_path / "b" / decomposed, 2)
    assert index_folders([tmp_path / "a", tmp_path / "b"]).counts().tolist() == [1, 3]


def test_a_link_to_a_parent_folder_is_followed_once(tmp_path):
    write_class_folders(tmp_path, {"0": 2, "1": 2})
    (tmp_path / "0" / "loop").symlink_to(tmp_path / "0", target_is_directory=True)
    assert len(index_folders([tmp_path])) == 4


def test_files_are_sorted_in_every_file_system(tmp_path):
    write_class_folders(tmp_path, {"0": 9, "1": 2})
    os.rename(tmp_path / "0" / "004.png", tmp_path / "0" / "moved")
    os.rename(tmp_path / "0" / "moved", tmp_path / "0" / "004.png")
    paths = list(index_folders([tmp_path]).paths)
    assert paths == sorted(paths)


@pytest.mark.parametrize(
    "layout, message",
    [
        ({}, "does not exist"),
        ({"x/a.txt": 0}, "skipped|no images"),
        ({"a.png": 1}, "contains images, not class folders: pass its parent folder"),
        ({"0/a.png": 1, "1/b.txt": 1}, "class '1' has no images"),
        ({"0/a.png": 1}, "found only one class, '0', .* needs two$"),
        ({"faces/0/a.png": 1, "faces/1/a.png": 1, "__MACOSX/faces/0/a.png": 1}, "'faces', .* pass .*/data/faces"),
        ({"note.txt": 1}, "contains no class folders"),
        ({"@eaDir/a.png": 1}, "contains no class folders"),
        ({"0/a.png": 1, "1/@eaDir/a.png": 1}, "class '1' has no images"),
        ({"wandb/debug.log": 1}, "no images in"),
    ],
)
def test_folders_without_class_folders_are_rejected(tmp_path, layout, message):
    for name in layout:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"--data_dirs: .*({message})"):
        index_folders([tmp_path / "data"])


def test_images_without_classes_in_the_folder_of_a_split_are_rejected_with_other_advice(tmp_path):
    write_images(tmp_path / "test", 1)
    with pytest.raises(UserError, match=r"--test_dirs: .*/test contains images, not class folders: sort them into"):
        index_folders([tmp_path / "test"], ["0", "1"], "--test_dirs")


REGIONS = ["forehead/0", "forehead/1", "forehead/2", "lips/0", "lips/1", "lips/2"]


@pytest.mark.parametrize(
    "folders",
    [
        REGIONS,
        REGIONS[:-1],  # no photograph of the last grade
        [f"{region}/{grade:02d}" for region in ("이마", "입술", "눈가") for grade in range(7)],
        [*REGIONS, "@eaDir/lips", "wandb/run-20260101_120000-ab/media"],
    ],
)
def test_a_folder_of_folders_of_class_folders_is_the_wrong_level(tmp_path, folders):
    for folder in folders:
        write_images(tmp_path / folder, 1)
    first = tmp_path / min(folder.partition("/")[0] for folder in folders if "@" not in folder)
    with pytest.raises(UserError, match=f"--data_dirs: .* pass one of them, --data_dirs '?{first}"):
        index_folders([tmp_path])


@pytest.mark.parametrize(
    "folders",
    [
        ["0/cam1", "1/cam1"],
        ["dry/cam1", "dry/cam2", "oily/cam1", "oily/cam2"],
        ["0/0", "0/1", "1/0", "1/1"],  # the classes are numbers themselves
        ["dry/1", "dry/2", "dry/3", "oily/3", "oily/4", "oily/5"],  # subjects
        ["dry/1", "oily/1"],
        [*(f"dry/{subject}" for subject in range(30)), *(f"oily/{subject}" for subject in range(40))],
        [*REGIONS, "lips"],  # images beside the folders
    ],
)
def test_folders_below_class_folders_may_have_equal_names(tmp_path, folders):
    for folder in folders:
        write_images(tmp_path / folder, 1)
    assert len(index_folders([tmp_path])) == len(folders)


@pytest.mark.parametrize(
    "names",
    [
        ("Dry", "dry"), ("1", "01"), ("grade 1", "grade  1"), ("grade 1", "grade1"), ("1", "1 "), ("1", "１"),
        ("grade 01", "Grade 1"), ("ﬁne", "fine"), ("①", "1"), ("a", "a\u200b"), ("Straße", "STRASSE"),
    ],
)  # fmt: skip
def test_classes_whose_names_are_nearly_the_same_are_reported(tmp_path, names, capsys):
    write_class_folders(tmp_path / "a", {names[0]: 1, "other": 1})
    write_class_folders(tmp_path / "b", {names[1]: 1, "other": 1})
    assert len(index_folders([tmp_path / "a", tmp_path / "b"]).classes) == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: --data_dirs: ") and all(repr(name) in line for name in names)


def test_classes_with_different_names_are_not_reported(tmp_path, capsys):
    write_class_folders(tmp_path, {"0": 1, "10": 1, "100": 1, "1-0": 1, "1.0": 1})
    write_class_folders(tmp_path, {"주름": 1, "주근깨": 1, "a+": 1, "a-": 1})
    assert len(index_folders([tmp_path]).classes) == 9 and not capsys.readouterr().out


def test_a_class_folder_that_is_not_utf8_is_refused_with_the_command_that_renames_it(tmp_path):
    folder = tmp_path / "data's"
    write_class_folders(folder, {"0": 1, "1": 1})
    (folder / os.fsdecode("주름".encode("cp949"))).mkdir()
    write_images(folder / os.fsdecode("주름".encode("cp949")), 1)
    with pytest.raises(UserError, match="not valid UTF-8") as error:
        index_folders([folder])
    assert str(error.value).isprintable()
    rename = re.search(r"for example: (.*) \(", str(error.value))[1]
    subprocess.run(["bash", "-c", rename], check=True)
    assert index_folders([folder]).classes == ["0", "1", "주름"]
    (folder / "0").rename(folder / os.fsdecode(b"L\xe4sion"))  # of some other encoding
    with pytest.raises(UserError, match=r"mv \$'.*/L\\xe4sion' .*/NAME"):
        index_folders([folder])


def test_a_run_that_has_begun_with_a_class_that_is_not_utf8_finds_it_again(tmp_path):
    name = "\udcc1\udcd6"
    write_class_folders(tmp_path, {"0": 1, name: 2})
    assert index_folders([tmp_path], ["0", name]).counts().tolist() == [1, 2]


def test_classes_that_differ_from_training_are_rejected(tmp_path):
    write_class_folders(tmp_path, {"0": 1, "7": 1})
    with pytest.raises(UserError, match=r"--val_dirs: class '7' .* not one of the classes 0, 1"):
        index_folders([tmp_path], ["0", "1"], "--val_dirs")
    with pytest.raises(UserError, match="--test_dirs: class '2' has no images"):
        index_folders([tmp_path], ["0", "2", "7"], "--test_dirs")
    assert index_folders([tmp_path], ["0", "2", "7"], "--test_dirs", allow_missing=True).counts().tolist() == [1, 0, 1]


def test_an_image_listed_twice_is_rejected_also_through_a_link(tmp_path):
    write_class_folders(tmp_path / "a", {"0": 1, "1": 1})
    (tmp_path / "b").symlink_to(tmp_path / "a")
    index = index_folders([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UserError, match=r"--test_dirs: .*listed twice"):
        check_duplicates(index.paths, "--test_dirs")


def test_paths_are_restored_exactly_even_if_they_are_not_utf8():
    names = ["/a/0/x.jpg", "/a/주름/왼쪽.jpg", os.fsdecode(b"/a/\xff\xfe.png"), "", "/b/y.jpg"]
    paths = Paths(names)
    assert list(paths) == names == [paths[i] for i in range(5)] and len(paths) == 5
    assert paths[-1] == "/b/y.jpg" and list(paths[np.array([4, 0])]) == ["/b/y.jpg", "/a/0/x.jpg"]
    assert list(Paths() + paths + Paths(["z"])) == [*names, "z"] and list(paths.first(2)) == names[:2]
    with pytest.raises(IndexError):
        paths[5]


def test_heic_photographs_that_cannot_be_read_are_counted_class_by_class(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(images.formats, "find_spec", lambda name: None)
    write_class_folders(tmp_path, {"0": 2, "1": 2, "2": 2})
    for name in ("0/a.HEIC", "0/b.heif", "2/c.heic", "2/notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert len(index_folders([tmp_path])) == 6
    printed = capsys.readouterr().out
    assert "3 HEIC photographs are left out (class 0: 2, class 2: 1)" in printed and "install pillow-heif" in printed
    assert "skipped 1 files with a non-image extension (.txt: 1)" in printed
    monkeypatch.setattr(images.formats, "find_spec", lambda name: object())
    assert len(index_folders([tmp_path])) == 9 and "HEIC" not in capsys.readouterr().out


def test_the_list_of_classes_with_heic_photographs_is_bounded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(images.formats, "find_spec", lambda name: None)
    for name in map(str, range(50)):
        write_images(tmp_path / name, 1)
        (tmp_path / name / "a.heic").touch()
    index_folders([tmp_path])
    assert "class 19: 1, and 30 more)" in capsys.readouterr().out
