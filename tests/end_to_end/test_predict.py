"""predict.py: its file, its exit statuses, its lines, and how it is stopped."""

import os
import re
import signal
import subprocess
import sys

import pytest
from helpers import (
    PATIENCE,
    ROOT,
    TINY_COUNTS,
    changed_checkpoint,
    run_main,
    start_main,
    wait_for,
    write_class_folders,
    write_images,
)

import predict
from inference import load
from run.files import read_json, read_rows

THIN_PREDICT = ROOT / "tests" / "tools" / "thin_predict.py"
pytestmark = pytest.mark.usefixtures("thin_network")


def run_predict(*flags):
    """predict.py in this process, on the CPU. -> exit status"""
    return predict.main([*map(str, flags), "--device", "cpu"])


def test_the_file_has_the_digits_of_the_run(finished_run, tmp_path, capsys):
    rows = read_rows(finished_run / "test_predictions.csv")
    paths, output = [row["path"] for row in rows], tmp_path / "predictions.csv"
    assert run_predict(finished_run, "--images", *paths, "--output", output) == 0
    predicted = read_rows(output)
    shared = ["path", "prediction", *(f"prob_{name}" for name in TINY_COUNTS)]
    assert [[row[name] for name in shared] for row in predicted] == [[row[name] for name in shared] for row in rows]
    assert list(predicted[0]) == [*shared[:2], "probability", *shared[2:], "prediction_set", "uncertain", "error"]
    assert all(row["error"] == "" and row["prediction_set"].startswith("{") for row in predicted)
    out, err = capsys.readouterr()
    assert f"{len(rows)} photographs predicted (" in out and f"predictions saved to {output}" in out and not err
    assert "warning" not in out  # none of them was trained on
    assert f"uncertain: {sum(row['uncertain'] == '1' for row in predicted)}" in out


def test_unreadable_photographs_are_rows_and_the_status_is_1(finished_run, tmp_path, capsys):
    photographs = write_images(tmp_path / "new", 3)
    (tmp_path / "new" / "001.png").write_bytes(b"<!doctype html><html>")
    assert run_predict(finished_run, "--images", tmp_path / "new", "--output", tmp_path / "p.csv") == 1
    rows = read_rows(tmp_path / "p.csv")
    assert [row["path"] for row in rows] == list(map(str, photographs))
    assert [bool(row["prediction"]) for row in rows] == [True, False, True]
    assert "an HTML page" in rows[1]["error"] and rows[1]["prob_0"] == rows[1]["uncertain"] == ""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("1 of 3 photographs cannot be read; the first is ") and "an HTML page" in line


def test_photographs_that_are_too_large_are_refused_by_the_limit_of_the_command(finished_run, tmp_path):
    photographs, output = write_images(tmp_path / "new", 1), tmp_path / "p.csv"
    assert run_predict(finished_run, "--images", *photographs, "--output", output, "--max_megapixels", "0.001") == 1
    assert "raise --max_megapixels" in read_rows(output)[0]["error"]
    assert run_predict(finished_run, "--images", *photographs, "--output", output, "--overwrite") == 0


def test_images_of_the_training_are_a_warning(finished_run, tmp_path, capsys):
    trained = read_json(finished_run / "splits.json")["train"]
    assert run_predict(finished_run, "--images", *trained, "--output", tmp_path / "p.csv") == 0
    assert f"warning: {len(trained)} of the {len(trained)} photographs have the name" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--images", "{none}"], "--images: {none} does not exist"),
        (["--images", "{empty}"], "--images: no photographs in {empty}"),
        (["--images", "{photo}", "--output", "{photo}"], "--output: {photo} already exists; name another file, or add"),
        (
            ["--images", "{photo}", "--output", "{photo}", "--overwrite"],
            "--output: {photo} is an input of this command",
        ),
        (["--images", "{photo}", "--output", "{pipe}", "--overwrite"], "--output: {pipe} is not a regular file"),
        (["--images", "{photo}", "--output", "{empty}"], "--output: {empty} is a folder"),
        (["--images", "{photo}", "--output", "{none}/p.csv"], "--output: the folder {none} does not exist"),
        (["--images", "{photo}", "{other}"], "MODEL: {other} has other classes"),
        (["--images", "{photo}", "--heatmaps", "{photo}"], "--heatmaps: {photo} is not a folder"),
        (["--images", "{photo}", "--heatmaps", "{none}/maps"], "--heatmaps: the folder {none} does not exist"),
        (["--images", "{empty}", "--heatmaps", "{empty}/maps"], "--heatmaps: {empty}/maps is in {empty}, a folder of"),
        (["--images", "{photo}", "--coverage", "1"], "argument --coverage: must be below 1"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(finished_run, tmp_path, capsys, monkeypatch, flags, problem):
    monkeypatch.chdir(tmp_path)
    names = {"none": tmp_path / "none", "empty": tmp_path / "empty", "photo": write_images(tmp_path, 1)[0]}
    names["empty"].mkdir()
    names["pipe"] = tmp_path / "pipe"
    os.mkfifo(names["pipe"])
    models = [finished_run]
    if "{other}" in flags:
        flags, names["other"] = (
            flags[:-1],
            changed_checkpoint(finished_run, tmp_path / "o.pth", classes=["a", "b", "c"]),
        )
        models.append(names["other"])
    before = sorted(tmp_path.iterdir())
    assert run_predict(*models, *(flag.format(**names) for flag in flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and problem.format(**names) in line
    assert sorted(tmp_path.iterdir()) == before


def test_a_cross_validation_predicts_with_all_its_folds(tmp_path, capsys):
    data = write_class_folders(tmp_path / "data", {"0": 12, "1": 9, "2": 6})
    flags = ["--no-pretrained", "--image_size", "32", "--batch_size", "8", "--epochs", "1", "--ordinal"]
    assert run_main("--data_dirs", data, *flags, "--folds", "3", "--run_dir", tmp_path / "cv") == 0
    output = tmp_path / "p.csv"
    assert run_predict(tmp_path / "cv", "--images", data, "--output", output, "--coverage", "0.5") == 0
    rows = read_rows(output)
    last_columns = ["expected_grade", "prediction_set", "uncertain", "agreement", "error"]
    assert len(rows) == 27 and list(rows[0])[-5:] == last_columns
    assert {row["agreement"] for row in rows} <= {"0.3333333", "0.6666667", "1"}
    assert re.search(r"warning: \d+ of the 27 photographs have the name and size", capsys.readouterr().out)
    folds = [tmp_path / "cv" / f"fold_{fold}" for fold in range(3)]
    mean = sum(load(fold, "cpu")([rows[0]["path"]])[0].probabilities for fold in folds) / 3
    assert [float(rows[0][f"prob_{c}"]) for c in range(3)] == pytest.approx(mean, abs=1e-4)


def test_heat_maps_are_named_by_their_rows_and_change_no_prediction(finished_run, tmp_path, capsys):
    for name in ("a", "b"):
        write_images(tmp_path / "new" / name, 2, seed=len(name))
    (tmp_path / "new" / "a" / "001.png").write_bytes(b"")
    flags = [finished_run, "--images", tmp_path / "new", "--output"]
    maps = tmp_path / "maps"
    assert run_predict(*flags, tmp_path / "plain.csv") == 1
    assert run_predict(*flags, tmp_path / "p.csv", "--heatmaps", maps) == 1
    assert (tmp_path / "p.csv").read_bytes() == (tmp_path / "plain.csv").read_bytes()
    written = ["000001_000.png", "000003_000.png", "000004_001.png"]
    assert sorted(file.name for file in maps.iterdir()) == written
    assert f"3 heat maps saved to {maps}\n" in capsys.readouterr().out
    assert run_predict(*flags, tmp_path / "q.csv", "--heatmaps", maps) == 2
    assert "--heatmaps: " in capsys.readouterr().err and not (tmp_path / "q.csv").exists()
    assert run_predict(*flags, tmp_path / "q.csv", "--heatmaps", maps, "--overwrite") == 1
    assert sorted(file.name for file in maps.iterdir()) == written


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_rows_so_far(finished_run, tmp_path, number):
    """Many names of one photograph."""
    (photograph,), many = write_images(tmp_path, 1), tmp_path / "many"
    many.mkdir()
    for i in range(30_000):
        os.link(photograph, many / f"{i}.png")
    output = tmp_path / "p.csv"
    process = start_main(
        finished_run, "--images", many, "--output", output, "--device", "cpu", program=THIN_PREDICT, cwd=tmp_path
    )
    part = tmp_path / "p.csv.part"
    wait_for(lambda: part.exists() and part.stat().st_size > 1000)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number and not output.exists()
    rows = read_rows(part)
    assert 0 < len(rows) < 30_000 and all(row["prob_10"] and row["error"] == "" for row in rows)
    assert err == f"stopped; the {len(rows)} rows so far are in {part}\n"
    assert run_predict(finished_run, "--images", photograph, "--output", output) == 2  # they are not lost
    assert run_predict(finished_run, "--images", photograph, "--output", output, "--overwrite") == 0
    assert len(read_rows(output)) == 1 and not part.exists()


def test_load_is_imported_from_predict(finished_run, tmp_path):
    """As in the README; without torch until then."""
    (photograph,) = write_images(tmp_path, 1)
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "tools")!r}]
import predict
assert "torch" not in sys.modules
import resnet_custom, thin_main
resnet_custom.resnet50 = thin_main.thin_resnet50
from predict import load
grade = load({str(finished_run / "best_model.pth")!r})
print(grade([{str(photograph)!r}])[0].prediction in grade.classes)
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert process.stdout.splitlines()[-1:] == ["True"], process.stderr
