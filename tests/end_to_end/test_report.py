"""report.py on folders of finished runs, of which it needs only two files."""

import json

import pytest

import report


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
    run = write_run(tmp_path / "run", 0.5)
    (tmp_path / "other").mkdir()
    assert report.main([str(tmp_path / "other"), run]) == 0
    assert f"skipped: {tmp_path / 'other'} is not a finished run" in capsys.readouterr().out
    assert report.main([str(tmp_path / "other")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: none of the folders is a finished run")


@pytest.mark.parametrize("name", ["results.json", "args.json"])
def test_a_damaged_run_is_one_error_line(tmp_path, capsys, name):
    run = write_run(tmp_path / "run", 0.5)
    (tmp_path / "run" / name).write_text("{")
    assert report.main([run]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and f"{name} is damaged" in line
