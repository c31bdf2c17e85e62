"""The files of a run: atomic writes, history, predictions, and YAML input."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from run.cli import UserError
from run.files import (
    HISTORY_COLUMNS,
    RowFile,
    atomic_write,
    part_of,
    printable,
    read_json,
    read_rows,
    read_yaml,
    refuse_input,
    refuse_output,
    valid_text,
    write_csv,
    write_history,
    write_json,
    write_predictions,
)


def test_a_failed_write_leaves_the_previous_file_intact(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("previous")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "previous"
    assert list(tmp_path.iterdir()) == [path]


def test_history_has_one_row_per_epoch_with_columns_in_the_documented_order(tmp_path):
    rows = [dict.fromkeys(HISTORY_COLUMNS, 0.1 + epoch) | {"epoch": epoch, "input_wait": 0.5} for epoch in range(4)]
    write_history(tmp_path / "history.csv", rows)
    with open(tmp_path / "history.csv", newline="") as file:
        read_back = list(csv.DictReader(file))
    assert tuple(read_back[0]) == HISTORY_COLUMNS
    assert [row["epoch"] for row in read_back] == ["0", "1", "2", "3"]
    assert float(read_back[1]["val_macro_f1"]) == 1.1


def test_predictions_use_class_names_and_keep_unusual_paths(tmp_path):
    unusual_path = "/a b/주름, [1]/\udcff.jpg"  # a file name that is not valid UTF-8
    write_predictions(
        tmp_path / "p.csv", [unusual_path, "/x.jpg"], np.array([0, 1]), np.array([[0.7, 0.3], [0.6, 0.4]]), ["0", "3"]
    )
    with open(tmp_path / "p.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["path", "label", "prediction", "correct", "prob_0", "prob_3"],
        ["/a b/주름, [1]/\\udcff.jpg", "0", "0", "1", "0.7", "0.3"],
        ["/x.jpg", "3", "0", "0", "0.6", "0.4"],
    ]


def test_names_that_are_not_utf8_survive_json_whose_file_is_valid_utf8(tmp_path):
    content = {"train": ["/a/\udcc1\udcd6/\\x.jpg", "/주름/1.jpg"], "\udcff": 1}
    write_json(tmp_path / "splits.json", content)
    assert json.loads((tmp_path / "splits.json").read_text(encoding="utf-8")) == content
    assert read_json(tmp_path / "splits.json") == content
    (tmp_path / "splits.json").write_bytes(b'["/a/\xff.jpg"]')  # as previous versions wrote it
    assert read_json(tmp_path / "splits.json") == ["/a/\udcff.jpg"]


def test_text_that_is_not_valid_utf8_gets_escapes():
    assert valid_text("주름 $<b>") == "주름 $<b>" and valid_text("a\udcc1") == "a\\udcc1"


def test_a_name_is_shown_in_one_line_whatever_is_in_it():
    assert printable("주름 $<b> 🙂, é") == "주름 $<b> 🙂, é"
    assert printable("a\nb\x1b[31m\udcc1\u2028") == "a\\nb\\x1b[31m\\udcc1\\u2028"


def test_the_previous_file_is_kept_even_if_both_names_were_one_file(tmp_path):
    path, previous = tmp_path / "last.pth", tmp_path / "previous.pth"
    path.write_text("1")
    os.link(path, previous)
    for content, previous_content in (("2", "1"), ("3", "2")):
        with atomic_write(path, previous="previous.pth") as file:
            file.write(content)
        assert (path.read_text(), previous.read_text()) == (content, previous_content)
        assert sorted(tmp_path.iterdir()) == [path, previous]


def test_yaml_errors_name_the_flag_and_the_file(tmp_path):
    path = tmp_path / "grid.yaml"
    for content, message in {
        "a: [": "is not valid YAML",
        "a: 1\nb: 2\na: 3": "a is listed twice",
        "a: {b: 1, b: 2}": "b is listed twice",
        "a: [{b: 1}, {b: 1, c: 2, c: 2}]": "c is listed twice",
    }.items():
        path.write_text(content)
        with pytest.raises(UserError, match=f"^--grid: {path}.* {message}"):
            read_yaml(path, "--grid")
    path.write_bytes(b"a: \xff")
    with pytest.raises(UserError, match=f"^{path} is not valid YAML"):
        read_yaml(path)
    with pytest.raises(UserError, match=r"gone\.yaml cannot be read: No such file"):
        read_yaml(tmp_path / "gone.yaml")
    path.write_text("a: &x {b: [1, {b: 2}]}\nc: *x\nd: &y [*y]\n한글: é")
    assert read_yaml(path)["c"] == {"b": [1, {"b": 2}]} and read_yaml(path)["한글"] == "é"
    path.write_text("")
    assert read_yaml(path) is None


# ---------------------------------------------------------------------------------------------------- row by row


def test_a_file_of_rows_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "rows.csv"
    with RowFile(path, ["a", "b"], "--output") as rows:
        rows.write([(1, "x,y"), (2, "한")])
        assert not path.exists() and part_of(path).read_text(encoding="utf-8") == 'a,b\n1,"x,y"\n2,한\n'
        rows.finish()
    assert read_rows(path) == [{"a": "1", "b": "x,y"}, {"a": "2", "b": "한"}] and not part_of(path).exists()


def test_rows_are_kept_if_their_file_is_not_finished(tmp_path):
    path = tmp_path / "rows.csv"
    with pytest.raises(KeyboardInterrupt), RowFile(path, ["a"], "--output") as rows:
        rows.write([[1], [2]])
        assert rows.kept == f"; the 2 rows so far are in {path}.part"
        raise KeyboardInterrupt
    assert part_of(path).read_text() == "a\n1\n2\n" and not path.exists()
    with RowFile(path, ["a"], "--output") as rows:  # without rows, nothing is kept
        assert rows.kept == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["a\rb.png", "a\nb.png", "a\r\nb,.png", '"a".png'])
def test_any_file_name_is_one_row(tmp_path, name):
    with RowFile(tmp_path / "rows.csv", ["path"], "--output") as rows:
        rows.write([[name], ["plain.png"]])
        rows.finish()
    assert [row["path"] for row in read_rows(tmp_path / "rows.csv")] == [name, "plain.png"]
    assert (tmp_path / "rows.csv").read_bytes().endswith(b"\nplain.png\n")
    write_predictions(tmp_path / "p.csv", [name], np.array([0]), np.array([[0.7, 0.3]]), ["a", "b"])
    assert [row["path"] for row in read_rows(tmp_path / "p.csv")] == [name]
    write_csv(tmp_path / "c.csv", ["path"], [{"path": name}])
    assert [row["path"] for row in read_rows(tmp_path / "c.csv")] == [name]


def test_an_output_that_cannot_be_written_or_exists_is_refused(tmp_path):
    (tmp_path / "a").write_text("a")
    os.mkfifo(tmp_path / "pipe")
    for name, overwrite in [("new", False), ("a", True)]:
        refuse_output(tmp_path / name, "OUTPUT", overwrite)
    for name, overwrite, problem in [
        (".", True, "is a folder; name a file"),
        ("pipe", True, "is not a regular file"),
        ("none/new", True, "none does not exist; create it"),
        ("a", False, "already exists; name another file, or add --overwrite"),
    ]:
        with pytest.raises(UserError, match=rf"OUTPUT: .*{problem}"):
            refuse_output(tmp_path / name, "OUTPUT", overwrite)


def test_an_input_is_not_replaced_whatever_its_name_is(tmp_path):
    (tmp_path / "a").write_text("a")
    os.symlink("a", tmp_path / "link")
    refuse_input(tmp_path / "new", [tmp_path / "a"], "--output")
    refuse_input(tmp_path / "a", [tmp_path / "none"], "--output")
    with pytest.raises(UserError, match=r"--output: .*link is an input"):
        refuse_input(tmp_path / "link", [tmp_path / "none", tmp_path / "a"], "--output")


def test_a_full_disk_is_an_error_that_names_the_flag(tmp_path, monkeypatch):
    os.symlink("/dev/full", tmp_path / "rows.csv.part")
    with (
        pytest.raises(UserError, match=r"--output: .*rows.csv cannot be written: No space left"),
        RowFile(tmp_path / "rows.csv", ["a"], "--output"),
    ):
        pass


def test_half_a_row_that_a_full_disk_took_is_removed(tmp_path):
    path = tmp_path / "rows.csv"
    with RowFile(path, ["a"], "--output") as rows:
        rows.write([[1]])
        with open(part_of(path), "a") as file:
            file.write("2")
    assert part_of(path).read_text() == "a\n1\n"
