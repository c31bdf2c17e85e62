"""The report and the model card of whole runs: photographs, heat maps, near-duplicates, failures."""

import json
import re
import shutil
import time

import pytest
from helpers import run_main, write_class_folders, write_images
from PIL import Image

import pages
from pages import write_report

pytestmark = pytest.mark.usefixtures("thin_network")

FLAGS = ["--no-pretrained", "--image_size", "64", "--batch_size", "8", "--epochs", "1", "--amp", "off"]


@pytest.fixture(scope="module")
def data_with_copies(tmp_path_factory):
    folder = write_class_folders(tmp_path_factory.mktemp("data"), {"0": 12, "1": 8, "2": 5})
    for number, path in enumerate(write_images(folder / "0", 12, (200, 80, 80), seed=1)):
        with Image.open(path) as image:  # smooth, as photographs are
            image.resize((4, 4)).resize((64, 64), Image.BICUBIC).save(path)
        shutil.copy(path, folder / "0" / f"copy_{number}.png")
    return folder


def test_a_run_shows_photographs_with_heat_maps_duplicates_and_augmented_images(data_with_copies, tmp_path):
    run_dir = tmp_path / "run"
    flags = [*FLAGS, "--data_dirs", data_with_copies, "--use_augmentation", "--ordinal"]
    assert run_main(*flags, "--run_dir", run_dir) == 0
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    number = len(re.findall('alt="heat map for', page))
    assert number >= 5 and f"{number} of {number} photographs have one" in page
    found = json.loads((run_dir / "near_duplicates.json").read_text())
    assert found["count"] == len(found["pairs"]) > 0 and found["complete"]
    assert f"{found['count']} pair" in page and page.count('alt="augmented"') == 12  # of the two smaller classes
    assert "grade of the expert" in page and "0 &lt; 1 &lt; 2" not in page
    assert "0 < 1 < 2" in (run_dir / "MODEL_CARD.md").read_text(encoding="utf-8")

    # evaluated again: no history, no training images
    again = tmp_path / "again"
    assert run_main("--eval_only", "--resume", run_dir / "best_model.pth", "--run_dir", again) == 0
    page = (again / "report.html").read_text(encoding="utf-8")
    assert page.count('alt="heat map for') == number
    assert 'alt="augmented"' not in page and str(run_dir / "best_model.pth") in (again / "MODEL_CARD.md").read_text()


def test_a_report_that_fails_costs_neither_results_nor_exit_status(data_dir, tmp_path, capsys, monkeypatch):
    def fail(*args, **values):
        raise MemoryError

    monkeypatch.setattr(pages, "render", fail)
    flags = ["--no-pretrained", "--image_size", "32", "--batch_size", "8", "--epochs", "1", "--data_dirs", data_dir]
    assert run_main(*flags, "--run_dir", tmp_path / "run") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "not written" in line]
    assert lines == [f"warning: {name}: not written (MemoryError)" for name in ("MODEL_CARD.md", "report.html")]
    assert (tmp_path / "run" / "results.json").exists() and not (tmp_path / "run" / "report.html").exists()


def test_a_report_of_a_small_run_takes_less_than_0_3_seconds(finished_run, tmp_path):
    for name in ("args.json", "results.json", "history.csv", "environment.json", "test_predictions.csv"):
        shutil.copy(finished_run / name, tmp_path)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        write_report(tmp_path)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.3 and (tmp_path / "report.html").stat().st_size < 500_000
