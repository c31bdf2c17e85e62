"""`main.py --check_data`, in whole."""

import os
import re
import shutil
import signal

import numpy as np
import pytest
from helpers import run_main, write_class_folders, write_images
from PIL import Image

import data_report

FLAGS = ["--check_data", "--image_size", 32]


def page_of(run_dir):
    return (run_dir / "data_report.html").read_text(encoding="utf-8")


def test_the_data_of_class_folders_are_checked(tmp_path, capsys):
    data = write_class_folders(tmp_path / "data", {"0": 20, "2": 10, "10": 6})
    shutil.copy(data / "0" / "003.png", data / "2" / "again.png")
    Image.new("RGB", (40, 40)).save(data / "0" / "black.png")
    (data / "10" / "cut.png").write_bytes((data / "10" / "000.png").read_bytes()[:200])
    assert run_main("--data_dirs", data, *FLAGS, "--use_augmentation", "--run_dir", data / "check") == 0
    assert {path.name for path in (data / "check").iterdir()} == {".lock", "data_report.html", "log.txt"}
    out, page = capsys.readouterr().out, page_of(data / "check")
    assert (data / "check" / "log.txt").read_text().endswith(out[-400:])
    for line in ("cannot be read: 1 (a training", "with different labels: 1", "nearly black photographs: 1"):
        assert line in out and line in page
    assert out.endswith(f"data report saved to {data}/check/data_report.html\n")
    assert "again.png" in page and "cut.png" in page and "<h2>Random photographs</h2>" in page
    (sheet,) = re.findall(r"<th class=.left.>augmented</th></tr>(.*?)</table>", page, re.S)
    assert re.findall(r"<tr><td>(.*?)</td>", sheet) == ["10", "2"]  # the smallest first; the largest has no copies
    # a folder of a check is no class, and a training may follow in it; a fold is one of the splits
    assert run_main("--data_dirs", data, *FLAGS, "--folds", 3, "--no_cache", "--run_dir", tmp_path / "folds") == 0
    page = page_of(tmp_path / "folds")
    assert "those of fold 0 of 3" in page and "With these flags, training augments no photograph." in page
    assert "with different labels: 1" in capsys.readouterr().out  # also without a cache
    assert run_main("--data_dirs", data, "--run_dir", data / "check", "--auto_resume", "--no-pretrained") == 2
    assert "cut.png cannot be read" in capsys.readouterr().err  # as the check said


def test_the_data_of_a_table_are_checked_with_their_subjects(tmp_path, capsys):
    paths = [path.name for path in write_images(tmp_path / "photos", 40)]
    rows = [f"{name},{'ab'[i % 3 == 0]},{f'p{i // 2}' if i else ''},{i}" for i, name in enumerate(paths)]
    (tmp_path / "table.csv").write_text("\n".join(["image,label,patient_id,age", *rows]))
    flags = ["--data_dirs", tmp_path / "photos", "--labels", tmp_path / "table.csv", *FLAGS, "--merge", "a=A"]
    assert run_main(*flags, "--run_dir", tmp_path / "check") == 0
    page = page_of(tmp_path / "check")
    assert "photographs per subject" in page and "A (a)" in page and "subjects" in capsys.readouterr().out
    assert "1 photograph has no subject in the table." in page


def test_a_class_that_is_missing_in_a_split_is_one_line_and_leaves_no_folder(tmp_path, capsys):
    data = write_class_folders(tmp_path / "data", {"0": 9, "1": 2})
    assert run_main("--data_dirs", data, *FLAGS, "--run_dir", tmp_path / "check") == 2
    assert "class '1' has too few images" in capsys.readouterr().err and not (tmp_path / "check").exists()


def test_photographs_that_are_all_alike_are_checked(tmp_path, capsys):
    for name in "ab":
        for i in range(12):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((20, 20, 3), 130, np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    assert run_main("--data_dirs", tmp_path / "data", *FLAGS, "--resize", "pad", "--run_dir", tmp_path / "check") == 0
    assert "photographs of a single color: 24" in capsys.readouterr().out and page_of(tmp_path / "check")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "x.pth"], "--check_data: checks the images of a new run; omit --resume"),
        (["--run_dir", "x", "--auto_resume"], "--check_data: checks the images of a new run"),
        (["--eval_only"], "--check_data: checks the images of a new run"),
        (["--data_dirs", "/nowhere"], "--data_dirs: /nowhere does not exist"),
        (["--data_dirs", ".", "--run_dir", "."], "--run_dir: . already exists; name a new folder\n"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(capsys, flags, message):
    assert run_main("--check_data", *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("step", ["measure", "find_pairs", "page_values"])
def test_a_check_that_is_stopped_leaves_nothing(tmp_path, capsys, monkeypatch, step):
    take_step = getattr(data_report, step)

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return take_step(*arguments)

    monkeypatch.setattr(data_report, step, stopped)
    data = write_class_folders(tmp_path / "data")
    assert run_main("--data_dirs", data, *FLAGS, "--run_dir", tmp_path / "check") == 130
    assert "stopped" in capsys.readouterr().err and not (tmp_path / "check").exists()


def test_a_page_that_cannot_be_written_is_one_line_and_leaves_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data_report, "PAGE_FILE", "missing/page.html")
    data = write_class_folders(tmp_path / "data")
    assert run_main("--data_dirs", data, *FLAGS, "--run_dir", tmp_path / "check") == 2
    assert "missing/page.html" in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "check").exists()
