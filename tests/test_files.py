import csv
import os
import time

import numpy as np
import pytest

from files import (
    HISTORY_COLUMNS,
    UserError,
    atomic_write,
    new_folder,
    timestamped,
    write_history,
    write_predictions,
)


def test_a_write_that_fails_leaves_the_former_file_whole(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("former")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def test_history_has_a_row_an_epoch_in_the_promised_order(tmp_path):
    rows = [dict.fromkeys(HISTORY_COLUMNS, 0.1 + epoch) | {"epoch": epoch, "input_wait": 0.5} for epoch in range(4)]
    write_history(tmp_path / "history.csv", rows)
    with open(tmp_path / "history.csv", newline="") as file:
        again = list(csv.DictReader(file))
    assert tuple(again[0]) == HISTORY_COLUMNS
    assert [row["epoch"] for row in again] == ["0", "1", "2", "3"]
    assert float(again[1]["val_macro_f1"]) == 1.1


def test_predictions_name_classes_and_survive_odd_paths(tmp_path):
    odd = "/a b/주름, [1]/\udcff.jpg"  # a file name that is not valid UTF-8
    write_predictions(
        tmp_path / "p.csv", [odd, "/x.jpg"], np.array([0, 1]), np.array([[0.7, 0.3], [0.6, 0.4]]), ["0", "3"]
    )
    with open(tmp_path / "p.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["path", "label", "prediction", "correct", "prob_0", "prob_3"],
        [odd, "0", "0", "1", "0.7", "0.3"],
        ["/x.jpg", "3", "0", "0", "0.6", "0.4"],
    ]


def test_a_run_folder_is_never_an_existing_one(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda pattern: "20260101_120000")
    names = []
    for _ in range(3):
        with new_folder(timestamped(tmp_path / "checkpoints"), "--output_dir", numbered=True) as folder:
            names.append(folder.name)
    assert names == [f"checkpoints_20260101_120000{end}" for end in ("", "_2", "_3")]


def test_folders_that_exist_or_cannot_be_made_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for name, reason in [(".", "exists"), ("file", "exists"), ("dangling", "exists"), ("file/run", "Not a directory")]:
        with pytest.raises(UserError, match=f"--run_dir: .*{reason}"), new_folder(tmp_path / name, "--run_dir"):
            pass


def test_a_trailing_slash_makes_no_other_folder(tmp_path):
    assert timestamped(f"{tmp_path}/checkpoints/").startswith(f"{tmp_path}/checkpoints_2")


def test_a_refused_run_leaves_nothing_unless_it_has_a_checkpoint(tmp_path):
    for name in ("args.json", "last_model.pth"):
        with pytest.raises(UserError), new_folder(tmp_path / "run", "--run_dir") as folder:
            (folder / name).touch()
            raise UserError("W&B knows no such run")
        assert (tmp_path / "run").exists() is (name == "last_model.pth")


def test_a_new_folder_goes_again_with_its_parents_when_it_stays_empty(tmp_path):
    for leaves_something in (False, True):
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a" / "run", "--run_dir") as folder:
            if leaves_something:
                (folder / "last_model.pth").touch()
            raise KeyboardInterrupt
        assert (tmp_path / "a").exists() is leaves_something


def test_the_former_file_is_kept_under_another_name_also_where_both_were_one(tmp_path):
    path, former = tmp_path / "last.pth", tmp_path / "previous.pth"
    path.write_text("1")
    os.link(path, former)
    for text, kept in (("2", "1"), ("3", "2")):
        with atomic_write(path, former="previous.pth") as file:
            file.write(text)
        assert (path.read_text(), former.read_text()) == (text, kept)
        assert sorted(tmp_path.iterdir()) == [path, former]
