"""Data folders as downloads, systems and earlier runs leave them, in whole runs of the commands."""

import json
import os
import shutil

import pytest
from helpers import run_main, write_class_folders

from run.files import read_rows
from run.saver import LAST

pytestmark = pytest.mark.usefixtures("thin_network")
FLAGS = ["--no-pretrained", "--image_size", 32, "--batch_size", 8, "--epochs", 1, "--train_loss", "ce"]
COUNTS = {"0": 12, "1": 8}


def splits_of(run_dir):
    return json.loads((run_dir / "splits.json").read_text(encoding="utf-8"))


def results_of(run_dir):
    return json.loads((run_dir / "results.json").read_text(encoding="utf-8"))


@pytest.fixture
def download(tmp_path):
    """A data folder with folders of splits."""
    for seed, name in enumerate(("Train", "valid", "test")):
        write_class_folders(tmp_path / "download" / name, COUNTS, seed)
    return tmp_path / "download"


def test_a_run_trains_on_the_splits_of_a_download_and_finds_them_again_after_a_move(download, tmp_path, capsys):
    command = [*FLAGS, "--data_dirs", download, "--run_dir", tmp_path / "run", "--auto_resume"]
    assert run_main(*command) == 0
    line = f"splits: train from {download}/Train; val from {download}/valid; test from {download}/test"
    assert line in capsys.readouterr().out.splitlines()
    folders = {"train": "Train", "val": "valid", "test": "test"}
    for split, paths in splits_of(tmp_path / "run").items():
        assert len(paths) == 20 and all(path.startswith(f"{download / folders[split]}/") for path in paths)
    assert run_main(*command, "--epochs", 2) == 0  # the same command
    moved = shutil.move(download, tmp_path / "moved")
    resume = ["--resume", tmp_path / "run" / LAST, "--data_dirs", moved]
    assert run_main(*resume, "--epochs", 3) == 0
    assert len(read_rows(tmp_path / "run" / "history.csv")) == 3
    assert splits_of(tmp_path / "run")["test"][0].startswith(f"{moved}/test/")
    assert run_main("--eval_only", *resume[:1], tmp_path / "run" / "best_model.pth", *resume[2:]) == 0
    (evaluated,) = (tmp_path / "run").glob("eval_*")
    assert results_of(evaluated)["test"] == results_of(tmp_path / "run")["test"]


def test_a_missing_split_is_split_off_from_train_and_the_model_is_tested_on_other_images(download, tmp_path, capsys):
    shutil.rmtree(download / "valid")
    assert run_main(*FLAGS, "--data_dirs", download, "--run_dir", tmp_path / "run") == 0
    line = f"splits: train 75%, val 25% of {download}/Train; test from {download}/test"
    assert line in capsys.readouterr().out.splitlines()
    assert {split: len(paths) for split, paths in splits_of(tmp_path / "run").items()} == {
        "train": 15, "val": 5, "test": 20
    }  # fmt: skip
    shutil.move(download / "test", tmp_path / "other")  # the folder of the training is gone
    flags = ["--eval_only", "--resume", tmp_path / "run" / "best_model.pth", "--test_dirs", tmp_path / "other"]
    assert run_main(*flags, "--run_dir", tmp_path / "eval") == 0
    assert results_of(tmp_path / "eval")["val"] == results_of(tmp_path / "run")["val"]


def test_cross_validation_of_a_download_names_the_folder_to_use(download, tmp_path, capsys):
    assert run_main(*FLAGS, "--data_dirs", download, "--folds", 3, "--run_dir", tmp_path / "cv") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --folds: ") and f"--data_dirs {download / 'Train'}" in line
    assert not (tmp_path / "cv").exists()


def test_runs_inside_the_data_folder_do_not_change_what_is_trained_on(tmp_path, monkeypatch, capsys):
    data = write_class_folders(tmp_path / "data", COUNTS)
    monkeypatch.chdir(data)
    assert run_main(*FLAGS, "--data_dirs", ".") == 0
    (first,) = data.glob("checkpoints_*")
    inside = ["--run_dir", "runs/a", "--cache_dir", "cache", "--wandb_dir", "."]
    assert run_main(*FLAGS, "--data_dirs", ".", *inside) == 0
    assert run_main(*FLAGS, "--data_dirs", ".", "--run_dir", "0/b", "--cache_dir", "1") == 0
    assert run_main(*FLAGS, "--data_dirs", ".", *inside, "--auto_resume", "--epochs", 2) == 0
    assert run_main("--resume", first / LAST, "--epochs", 2) == 0
    for run_dir in (first, data / "runs" / "a", data / "0" / "b"):
        assert splits_of(run_dir) == splits_of(first) and results_of(run_dir)["classes"] == ["0", "1"]
    assert "run folders" in capsys.readouterr().out


def test_photographs_whose_names_are_not_utf8_are_trained_on_and_found_again(tmp_path, capsys):
    data = write_class_folders(tmp_path / os.fsdecode(b"\xb5\xa5"), COUNTS)
    names = [os.fsdecode(f"사진_{number}.png".encode("cp949")) for number in range(12)]
    for path, name in zip(sorted((data / "0").iterdir()), names, strict=True):
        path.rename(path.with_name(name))
    command = [*FLAGS, "--data_dirs", data, "--run_dir", tmp_path / "run", "--auto_resume"]
    assert run_main(*command) == 0 and run_main(*command) == 0 and run_main(*command, "--epochs", 2) == 0
    assert "already finished" in capsys.readouterr().out
    assert run_main("--eval_only", "--resume", tmp_path / "run" / "best_model.pth", "--run_dir", tmp_path / "eval") == 0
    assert all(os.path.exists(path) for paths in splits_of(tmp_path / "run").values() for path in paths)
    for file in (tmp_path / "run").iterdir():
        if file.suffix in (".json", ".csv", ".html"):
            file.read_text(encoding="utf-8")  # raises if it is not valid


def test_photographs_whose_names_are_not_utf8_are_sent_to_wandb(tmp_path, capsys):
    data = write_class_folders(tmp_path / "data", COUNTS)
    for path in [*data.glob("*/*.png")]:
        path.rename(path.with_name(os.fsdecode(f"사진_{path.name}".encode("cp949"))))
    wandb_flags = ["--wandb_mode", "offline", "--wandb_images", 3, "--run_dir", tmp_path / "run"]
    assert run_main(*FLAGS, "--data_dirs", data, *wandb_flags) == 0
    (table,) = (tmp_path / "run").glob("wandb/offline-run-*/files/media/table/test_worst_mistakes*.json")
    assert "W&B has failed" not in capsys.readouterr().out
    paths = [row[1] for row in json.loads(table.read_text(encoding="utf-8"))["data"]]
    assert paths and all("/\\udcbb\\udce7\\udcc1\\udcf8_0" in path for path in paths)


def test_a_class_that_is_not_utf8_is_refused_before_anything_is_written(tmp_path, capsys):
    data = write_class_folders(tmp_path / "data", {"0": 6, os.fsdecode("주름".encode("cp949")): 6})
    assert run_main(*FLAGS, "--data_dirs", data, "--run_dir", tmp_path / "run", "--auto_resume") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not valid UTF-8; rename it" in line and f"{data}/주름" in line
    assert not (tmp_path / "run").exists()


def test_class_names_with_unusual_characters_get_through_to_every_file(tmp_path, capsys):
    counts = dict.fromkeys(["$\\frac$", "<b>&", "a\nb", "a,b;\"c'", "| 주름 🙂"], 5)
    data = write_class_folders(tmp_path / "data", counts)
    assert run_main(*FLAGS, "--data_dirs", data, "--run_dir", tmp_path / "run") == 0
    assert "a\\nb" in capsys.readouterr().out
    assert set(results_of(tmp_path / "run")["classes"]) == set(counts)
    rows = read_rows(tmp_path / "run" / "test_predictions.csv")
    assert {row["label"] for row in rows} == set(counts) and all(f"prob_{name}" in rows[0] for name in counts)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page
