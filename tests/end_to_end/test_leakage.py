"""Subjects and near-duplicate photographs across splits, in whole runs of main.py."""

import json

from helpers import run_main, write_class_folders, write_images


def test_a_run_lists_photographs_that_are_in_two_splits(tmp_path, capsys, thin_network):
    data = write_class_folders(tmp_path / "train")
    tests = write_class_folders(tmp_path / "test", seed=5)
    (tests / "0" / "stolen.png").write_bytes((data / "0" / "003.png").read_bytes())
    flags = ["--image_size", 32, "--batch_size", 8, "--epochs", 1, "--no-pretrained", "--split", 0.9, 0.1, 0]
    assert run_main("--data_dirs", data, "--test_dirs", tests, *flags, "--run_dir", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert f"{tests}/0/stolen.png (test)" in out
    assert "1 pair of nearly identical photographs in different splits (listed above)" in out


def test_no_subject_is_in_two_splits(tmp_path, capsys, thin_network):
    for grade, count in {"0": 30, "1": 20}.items():
        for number, path in enumerate(write_images(tmp_path / "data" / grade, count, (90, 90 + 60 * int(grade), 90))):
            path.rename(path.with_name(f"{number // 2:03d}_{'LR'[number % 2]}.png"))
    flags = ["--image_size", 32, "--batch_size", 8, "--epochs", 1, "--no-pretrained", "--data_dirs", tmp_path / "data"]
    assert run_main(*flags, "--group_regex", r"^(\d+)_", "--run_dir", tmp_path / "run") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("subjects")]
    assert sum(map(int, line.split()[1:])) == 15
    assert run_main("--resume", tmp_path / "run" / "last_model.pth", "--group_regex", "x") == 2
    assert "--group_regex: cannot change" in capsys.readouterr().err
    flags = ["--eval_only", "--resume", tmp_path / "run" / "best_model.pth"]
    assert run_main(*flags, "--run_dir", tmp_path / "subjects") == 0
    assert run_main(*flags, "--group_regex", "x", "--run_dir", tmp_path / "other") == 2
    assert "--group_regex: cannot change" in capsys.readouterr().err
    # subjects of other images are read from their names, those of the run's own validation images as in the training
    flags += ["--test_dirs", write_class_folders(tmp_path / "elsewhere", {"0": 9, "1": 9}, seed=7)]
    assert run_main(*flags, "--run_dir", tmp_path / "other") == 2
    assert "does not match the file name of" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert run_main(*flags, "--group_regex", r"^(\d)", "--run_dir", tmp_path / "digits") == 0
    assert run_main(*flags, "--group_regex", "", "--run_dir", tmp_path / "images") == 0
    run, subjects, digits, images = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "subjects", "digits", "images")
    )
    assert subjects["test"] == run["test"] and run["val"] == subjects["val"] == digits["val"] == images["val"]
    assert digits["test"]["nll"] == images["test"]["nll"] and digits["test"]["nll_ci"] != images["test"]["nll_ci"]
