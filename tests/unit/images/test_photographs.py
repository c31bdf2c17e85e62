"""Photographs without classes: what is found in folders, and what is named one by one."""

import os

import pytest
from helpers import write_images

from images.photographs import find_photographs
from run.cli import UserError


def test_folders_at_any_depth_and_single_files_in_the_order_they_are_named(tmp_path):
    first, second = write_images(tmp_path / "b", 2)
    (below,) = write_images(tmp_path / "b" / "deep" / "er", 1)
    (single,) = write_images(tmp_path, 1)
    found = find_photographs([single, f"{tmp_path}/b/"], "--images")
    assert list(found) == list(map(str, [single, first, second, below]))


def test_each_photograph_once_however_it_is_named(tmp_path, monkeypatch):
    first, second = write_images(tmp_path / "a", 2)
    os.symlink(tmp_path / "a", tmp_path / "link")
    os.symlink(first, tmp_path / "other.png")
    monkeypatch.chdir(tmp_path / "a")
    names = ["001.png", tmp_path / "link", tmp_path / "other.png", tmp_path / "a", second]
    assert list(find_photographs(names, "--images")) == ["001.png", f"{tmp_path}/link/000.png"]


def test_a_file_that_is_named_is_used_whatever_its_extension(tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("no photograph")
    assert list(find_photographs([note], "--images")) == [str(note)]


def test_what_is_left_out_of_a_folder_is_printed(tmp_path, capsys):
    write_images(tmp_path / "a", 1)
    for name in ("notes.txt", "._000.png"):
        (tmp_path / "a" / name).write_text("")
    assert len(find_photographs([tmp_path / "a"], "--images")) == 1
    printed = capsys.readouterr().out
    assert "passed over hidden files" in printed and "._*: 1" in printed
    assert "skipped 1 files with a non-image extension (.txt: 1)" in printed


def test_photographs_of_phones_are_found_even_if_they_cannot_be_read_here(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("images.formats.find_spec", lambda name: None)
    write_images(tmp_path, 1)
    (tmp_path / "photo.HEIC").touch()
    os.symlink("nowhere", tmp_path / "unreached.heic")
    names = [os.path.basename(path) for path in find_photographs([tmp_path], "--images")]
    assert names == ["000.png", "photo.HEIC", "unreached.heic"] and not capsys.readouterr().out


def test_a_name_that_does_not_exist_and_a_folder_without_photographs_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"--images: .*/none.jpg does not exist, and 1 more"):
        find_photographs([tmp_path, tmp_path / "none.jpg", tmp_path / "nor this"], "--images")
    with pytest.raises(UserError, match="--images: no photographs in"):
        find_photographs([tmp_path], "--images")
