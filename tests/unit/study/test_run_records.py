"""Which folders are runs, and which runs belong together."""

import json

import numpy as np
import pytest
from helpers import write_run_folder

from flags import build_parser
from run.cli import UserError
from run.folder import FOLDS_FILE
from study.run_records import fold_folders, group_records, is_cross_validation, read_record, read_records

TARGETS = np.array([0, 1, 2] * 4)
RIGHT, WRONG = np.eye(3)[TARGETS], np.eye(3)[(TARGETS + 1) % 3]


def test_a_cross_validation_is_read_fold_by_fold_in_the_order_of_numbers(tmp_path):
    for fold in (10, 2, 0):
        write_run_folder(tmp_path / "cv" / f"fold_{fold}", TARGETS, RIGHT, fold=fold)
    (tmp_path / "cv" / FOLDS_FILE).write_text("{}")
    (tmp_path / "cv" / "fold_notes").mkdir()
    assert is_cross_validation(tmp_path / "cv")
    assert [path.name for path in fold_folders(tmp_path / "cv")] == ["fold_0", "fold_2", "fold_10"]
    records = read_records([tmp_path / "cv", tmp_path / "cv" / "fold_0"])  # one is listed twice: it counts once
    assert [record.args["fold"] for record in records] == [0, 2, 10]
    assert len(group_records(records)) == 1


def test_a_run_that_is_not_finished_is_read_from_its_history(tmp_path):
    folder = write_run_folder(tmp_path / "run", TARGETS, RIGHT)
    (folder / "results.json").unlink()
    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps({**args, "epochs": 8}))
    record = read_record(folder)
    assert record.results is None and record.epochs_done() == "3 of 8" and record.val_balanced_acc() == 0.5


def test_folders_without_a_run_are_no_records(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "history.csv").write_text("a table of something else\n")  # but no args.json
    assert read_records([tmp_path / "photos", tmp_path / "missing"]) == []
    assert capsys.readouterr().out.count("skipped: ") == 2


@pytest.mark.parametrize("content", ["epoch,val_loss\n0,many\n", "epoch,val_loss\n0,1,2\n", "epoch,val_loss\n\0\n"])
def test_a_damaged_history_costs_only_the_curves(tmp_path, capsys, content):
    folder = write_run_folder(tmp_path / "run", TARGETS, RIGHT)
    (folder / "history.csv").write_text(content)
    assert read_record(folder).history == []
    assert read_record(folder).test_metrics()["balanced_acc"] == 1
    capsys.readouterr()


@pytest.mark.parametrize("name, content", [("results.json", "[]"), ("results.json", "{}"), ("args.json", "[]")])
def test_other_damaged_files_are_an_error_that_names_them(tmp_path, name, content):
    folder = write_run_folder(tmp_path / "run", TARGETS, RIGHT)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        read_record(folder)


def test_runs_of_other_classes_are_not_pooled(tmp_path):
    """The same flags, but the folder of the data has changed."""
    first = write_run_folder(tmp_path / "first", TARGETS, RIGHT)
    second = write_run_folder(tmp_path / "second", TARGETS, WRONG, classes=("a", "b", "주름"))
    third = write_run_folder(tmp_path / "third", TARGETS, WRONG)
    (third / "results.json").unlink()  # not finished: it says nothing of its classes
    groups = group_records(read_records([third, first, second]))
    assert [[run.folder.name for run in group.runs] for group in groups] == [["first", "third"], ["second"]]
    assert len({group.title for group in groups}) == 2


def test_a_run_that_is_older_than_a_flag_belongs_to_those_with_its_default(tmp_path):
    default = build_parser().get_default("gamma")
    write_run_folder(tmp_path / "old", TARGETS, RIGHT)
    for name, gamma in {"same": default, "other": default + 1}.items():
        write_run_folder(tmp_path / name, TARGETS, RIGHT, gamma=gamma)
    groups = group_records(read_records([tmp_path / name for name in ("old", "same", "other")]))
    assert {group.title: len(group.runs) for group in groups} == {f"--gamma {default}": 2, f"--gamma {default + 1}": 1}


def test_the_title_of_a_group_has_the_flags_that_are_set_as_they_are_written(tmp_path):
    flags = [{"folds": None, "val_dirs": ["a", "b"], "tta": True}, {"folds": 3, "val_dirs": None, "tta": False}]
    flags.append({"folds": None, "val_dirs": None, "tta": None})
    for number, values in enumerate(flags):
        write_run_folder(tmp_path / str(number), TARGETS, RIGHT, **values)
    groups = group_records(read_records([tmp_path / str(number) for number in range(3)]))
    titles = {group.title for group in groups}
    assert titles == {"--tta true --val_dirs a b", "--folds 3 --tta false", str(tmp_path / "2")}
