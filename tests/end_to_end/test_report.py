"""report.py on folders of runs and cross-validations; of a finished run it needs only two files."""

import json

import numpy as np
import pytest
from helpers import write_run_folder

import report


@pytest.fixture(autouse=True)
def current_folder(tmp_path, monkeypatch):
    """comparison.html is written to the current folder."""
    monkeypatch.chdir(tmp_path)


def write_run(folder, balanced_acc, **flags):
    """-> path of a run folder with the same metrics on validation and test."""
    folder.mkdir()
    metrics = {"balanced_acc": balanced_acc, "macro_f1": 0.5, "acc": 0.9}
    (folder / "args.json").write_text(json.dumps({"gamma": 2.0, "run_dir": str(folder), **flags}))
    (folder / "results.json").write_text(json.dumps({"test": metrics, "val": metrics}))
    return str(folder)


def test_runs_are_grouped_by_their_flags_and_the_best_group_comes_first(tmp_path, capsys):
    runs = [write_run(tmp_path / f"low{seed}", 0.4 + 0.1 * seed, seed=seed) for seed in (0, 1)]
    runs += [write_run(tmp_path / f"high{seed}", 0.7, seed=seed, gamma=0.5) for seed in (0, 1, 2)]
    assert report.main([*runs, runs[0]]) == 0  # one is listed twice: it counts once
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if line.startswith("--")]
    assert titles == ["--gamma 0.5 (3 runs):", "--gamma 2.0 (2 runs):"]
    (line,) = [line for line in lines if "test_balanced_acc 0.450" in line]
    assert "0.450 +- 0.071  (0.400, 0.500)" in line


def test_runs_without_validation_metrics_come_last(tmp_path, capsys):
    runs = [write_run(tmp_path / name, 0.5, gamma=gamma) for name, gamma in (("tested", 1.0), ("validated", 2.0))]
    results = json.loads((tmp_path / "tested" / "results.json").read_text())
    del results["val"]
    (tmp_path / "tested" / "results.json").write_text(json.dumps(results))
    assert report.main(runs) == 0
    titles = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--")]
    assert titles == ["--gamma 2.0 (1 run):", "--gamma 1.0 (1 run):"]


def test_folders_that_are_not_finished_runs_are_skipped_and_named(tmp_path, capsys):
    run = str(write_run_folder(tmp_path / "run", np.array([0, 1, 2]), np.eye(3)))
    (tmp_path / "other").mkdir()
    assert report.main([str(tmp_path / "other"), str(tmp_path / "missing"), run]) == 0
    out = capsys.readouterr().out
    assert f"skipped: {tmp_path / 'other'} holds no run with a finished epoch" in out
    assert f"skipped: {tmp_path / 'missing'} does not exist" in out
    assert report.main([str(tmp_path / "other")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: none of the folders holds a run with a finished epoch")


@pytest.mark.parametrize("name", ["results.json", "args.json"])
def test_a_damaged_run_is_one_error_line(tmp_path, capsys, name):
    run = write_run(tmp_path / "run", 0.5)
    (tmp_path / "run" / name).write_text("{")
    assert report.main([run]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and f"{name} is damaged" in line


def write_runs(tmp_path):
    targets = np.array([0, 1, 2] * 5)
    return [write_run_folder(tmp_path / f"g{g}", targets, np.eye(3)[targets], gamma=g) for g in (1.0, 2.0)]


def test_several_runs_are_compared_on_a_page_in_the_current_folder(tmp_path, capsys):
    runs = list(map(str, write_runs(tmp_path)))
    for _ in range(2):  # the second time it replaces its own page
        assert report.main(runs) == 0
    out = capsys.readouterr().out
    assert "--gamma 1.0 (1 run):" in out and "comparison saved to comparison.html" in out
    assert "Comparison of 2 runs" in (tmp_path / "comparison.html").read_text()
    assert report.main([*runs, "--output", "other.html"]) == 0 and (tmp_path / "other.html").exists()
    assert not list(tmp_path.glob("g*/report.html"))


def test_a_page_that_report_py_did_not_make_is_kept(tmp_path, capsys):
    (tmp_path / "comparison.html").write_text("my notes")
    assert report.main(list(map(str, write_runs(tmp_path)))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --output: comparison.html exists and was not written by report.py")
    assert (tmp_path / "comparison.html").read_text() == "my notes"


def test_a_folder_that_cannot_be_written_to_is_one_error_line_after_the_comparison(tmp_path, capsys):
    assert report.main([*map(str, write_runs(tmp_path)), "--output", "missing/page.html"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert "--gamma 1.0" in captured.out and line == "error: missing/page.html: No such file or directory"


def test_the_report_of_one_run_is_the_same_when_it_is_written_again(
    finished_run, copied_run, tmp_path, thin_network, capsys
):
    first = (copied_run / "report.html").read_text().replace(f"{finished_run}/args.json", f"{copied_run}/args.json")
    (copied_run / "report.html").unlink()
    capsys.readouterr()
    assert report.main([str(copied_run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report saved to {copied_run / 'report.html'}"
    lines = [first.splitlines(), (copied_run / "report.html").read_text().splitlines()]
    different = [line for pair in zip(*lines, strict=True) if len(set(pair)) > 1 for line in pair]
    assert different == [f"<{tag}>{name}</{tag}>" for tag in ("title", "h1") for name in ("finished", "copied")]
    assert not (tmp_path / "comparison.html").exists()


def test_a_run_that_was_interrupted_gets_a_report_of_what_there_is(copied_run, capsys):
    for name in ("results.json", "report.html", "best_model.pth", "last_model.pth", "environment.json"):
        (copied_run / name).unlink(missing_ok=True)
    assert report.main([str(copied_run)]) == 0
    assert "not finished: " in (out := capsys.readouterr().out) and "2 of 2 epochs" in out and "warning" not in out
    page = (copied_run / "report.html").read_text()
    assert "not finished" in page and "<svg" in page
    assert '<tr class="main"><td>all</td><td>21</td><td>7</td><td>7</td></tr>' in page


def test_an_interrupted_run_with_its_checkpoint_has_its_images_per_class_and_augmented_images(copied_run, capsys):
    (copied_run / "results.json").unlink()
    assert report.main([str(copied_run)]) == 0
    assert f"report saved to {copied_run / 'report.html'}" in (out := capsys.readouterr().out) and "warning" not in out
    page = (copied_run / "report.html").read_text()
    assert "<td>0</td><td>12</td><td>4</td><td>4</td>" in page and "<h2>Augmented images</h2>" in page


def test_a_cross_validation_gets_its_report_and_the_doubtful_labels(tmp_path, capsys):
    for fold in (0, 1):
        targets = np.array([0, 1, 2] * 5)
        write_run_folder(tmp_path / "cv" / f"fold_{fold}", targets, np.eye(3)[targets], fold=fold, folds=2)
    (tmp_path / "cv" / "folds.json").write_text("{}")
    assert report.main([str(tmp_path / "cv")]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'cv'} (2 runs):" in out and f"report saved to {tmp_path / 'cv' / 'report.html'}" in out
    assert (tmp_path / "cv" / "label_issues.csv").exists() and (tmp_path / "cv" / "report.html").exists()
    assert not (tmp_path / "comparison.html").exists()
    assert report.main([str(tmp_path / "cv"), *map(str, write_runs(tmp_path))]) == 0
    assert "Comparison of 4 runs" in (tmp_path / "comparison.html").read_text()


@pytest.mark.parametrize("name", ["report.html", "label_issues.csv"])
def test_a_file_that_cannot_be_written_is_one_error_line_after_its_warning(tmp_path, capsys, name):
    targets = np.array([0, 1, 2] * 5)
    for fold in (0, 1):
        write_run_folder(tmp_path / "cv" / f"fold_{fold}", targets, np.eye(3)[targets], fold=fold, folds=2)
    (tmp_path / "cv" / "folds.json").write_text("{}")
    folders = {"report.html": tmp_path / "cv" / "fold_0", "label_issues.csv": tmp_path / "cv"}
    (folders[name] / name).mkdir()  # the disk takes no file of this name
    assert report.main([str(folders[name])]) == 2
    out, err = capsys.readouterr()
    assert out.count(f"warning: {name}: not written (") == 1
    assert err == f"error: {folders[name]}: a file was not written; the warning above says why\n"


def test_a_report_without_the_model_and_the_training_images_says_so(copied_run, capsys, monkeypatch):
    (copied_run / "best_model.pth").unlink()
    assert report.main([str(copied_run)]) == 0
    assert "warning: the report has no heat maps (" in capsys.readouterr().out
    assert "balanced accuracy" in (copied_run / "report.html").read_text()
