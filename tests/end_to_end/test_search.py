"""Whole searches of main.py with the thin network, and what is wrong with a sweep."""

import os
import re
import signal
import sqlite3
import time
from pathlib import Path

import pytest
import yaml
from helpers import PATIENCE, TINY_FLAGS, start_with_thin_trials, stop_while_training, wait_for

import search
from run.files import read_rows

pytestmark = pytest.mark.usefixtures("thin_trials")
SWEEP = {
    "program": "main.py",
    "method": "random",
    "metric": {"name": "val_balanced_acc", "goal": "maximize"},
    "parameters": {"learning_rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}},
}


def write_sweep(folder, **changes):
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, **changes}))
    return path


WRONG = {
    "methods": ({"methods": "bayes"}, "methods: unknown key"),
    "method": ({"method": "evolution"}, "method: evolution"),
    "metric": ({"metric": {"name": "accuracy"}}, "metric.name: accuracy"),
    "goal": ({"metric": {"name": "val_acc", "goal": "max"}}, "metric.goal: max"),
    "metric key": ({"metric": {"name": "val_acc", "aim": 1}}, "metric.aim: unknown key"),
    "program": ({"program": "train.py"}, "program: train.py"),
    "flag": ({"parameters": {"learnign_rate": {"value": 1}}}, "parameters.learnign_rate: main.py has no flag"),
    "distribution": ({"parameters": {"gamma": {"distribution": "cauchy"}}}, "parameters.gamma.distribution: cauchy"),
    "missing": (
        {"parameters": {"gamma": {"distribution": "uniform", "min": 1}}},
        "parameters.gamma: uniform needs max",
    ),
    "extra": ({"parameters": {"gamma": {"value": 1, "q": 2}}}, "parameters.gamma: constant has no key q"),
    "nested": ({"parameters": {"gamma": {"parameters": {}}}}, "parameters.gamma.parameters"),
    "order": ({"parameters": {"gamma": {"min": 2.0, "max": 1.0}}}, "parameters.gamma: min must not be above max"),
    "number": ({"parameters": {"gamma": {"min": "low", "max": 1.0}}}, "parameters.gamma.min: 'low'"),
    "stopping": ({"early_terminate": {"type": "median"}}, "early_terminate.type: median"),
    "stopping key": ({"early_terminate": {"type": "hyperband", "min_iters": 3}}, "early_terminate.min_iters"),
    "macro": ({"command": ["${program}", "${args_json}"]}, "command: ${args_json}"),
    "macro in a word": ({"command": ["${program}", "--cache_dir=${home}/x"]}, "command: ${home}"),
    "variable": (
        {"command": ["${program}", "${envvar:NOT_SET_ANYWHERE}"]},
        "variable NOT_SET_ANYWHERE is not set",
    ),
    "no program": ({"command": ["python", "${args}"]}, "command: ${program} is missing"),
    "command": ({"command": "python main.py"}, "command: expected a list of words"),
    "cap": ({"run_cap": "many"}, "run_cap: 'many'"),
    "strict": ({"early_terminate": {"type": "hyperband", "min_iter": 3, "strict": True}}, "early_terminate.strict"),
    "shares": ({"parameters": {"gamma": {"values": [1, 2], "probabilities": 1}}}, "parameters.gamma.probabilities"),
    "grid with shares": (
        {"method": "grid", "parameters": {"gamma": {"values": [1, 2], "probabilities": [0.5, 0.5]}}},
        "parameters.gamma.probabilities: method grid",
    ),
    "kind": ({"parameters": {"gamma": {"distribution": ["normal"]}}}, "parameters.gamma.distribution"),
    "exponents": (
        {"parameters": {"gamma": {"distribution": "log_uniform", "min": 1, "max": 1000}}},
        "min and max are exponents",
    ),
    "empty": ({"parameters": {"batch_size": {"distribution": "int_uniform", "min": 1.2, "max": 1.8}}}, "batch_size"),
    "not a number": ({"parameters": {"gamma": {"min": 0.5, "max": float("inf")}}}, "parameters.gamma.max: inf"),
    "nan": ({"parameters": {"gamma": {"values": [float("nan"), 1]}}}, "parameters.gamma.values: nan"),
    "refused by main.py": ({"parameters": {"dropout_prob": {"values": [0.1, 3]}}}, "parameters.dropout_prob: argument"),
    "a float for an int": (
        {"parameters": {"epochs": {"distribution": "q_uniform", "min": 1.5, "max": 5, "q": 0.5}}},
        "parameters.epochs: argument",
    ),
    "twice": ({"parameters": {"lr": {"value": 1}, "learning_rate": {"value": 2}}}, "are the same flag"),
    "own flag": ({"parameters": {"run_dir": {"value": "x"}}}, "parameters.run_dir: the search sets"),
    "grid": ({"method": "grid"}, "parameters.learning_rate: method grid needs"),
    "no mapping": ({"parameters": {"gamma": 3}}, "parameters.gamma: expected a mapping"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_a_sweep_is_named_in_one_line(name, tmp_path, capsys):
    changes, words = WRONG[name]
    path = write_sweep(tmp_path, **changes)
    assert search.main([str(path), "--search_dir", str(tmp_path / "s")]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"error: {path}: ") and words in error


# ------------------------------------------------------------------------------------------------------ whole searches


def run_search(path, *flags, data_dir):
    tiny = [*TINY_FLAGS[:5], "--data_dirs", str(data_dir)]
    return search.main([str(path), "--search_dir", str(path.parent / "found"), *map(str, flags), *tiny])


def rows_of(path):
    return read_rows(path.parent / "found" / "search.csv")


def test_a_search_leaves_a_table_plots_and_the_command_of_the_best(tmp_path, data_dir, capsys):
    parameters = {**SWEEP["parameters"], "epochs": {"value": 2}, "use_augmentation": {"value": True}}
    parameters["gamma"] = {"values": [0.5, 1]}  # which the command line takes from the search
    path = write_sweep(tmp_path, parameters=parameters, method="bayes")
    assert run_search(path, "--trials", 2, "--jobs", 2, "--gamma=3", data_dir=data_dir) == 0
    rows, out = rows_of(path), capsys.readouterr().out
    assert [row["state"] for row in rows] == ["done", "done"] and {row["epochs"] for row in rows} == {"2"}
    best = max(rows, key=lambda row: float(row["val_balanced_acc"]))
    (command,) = [line for line in out.splitlines() if line.startswith("full training: ")]
    assert "--epochs" not in command and "--use_augmentation=True" in command and str(data_dir) in command
    assert (Path(best["run_dir"]) / "best_model.pth").exists() and not list(tmp_path.rglob("last_model.pth"))
    assert (tmp_path / "found" / "search_history.png").stat().st_size > 5000
    assert "gamma" not in rows[0] and "--gamma=3" in command and "gamma=0.5" not in command
    assert run_search(path, "--trials", 2, "--gamma=3", data_dir=data_dir) == 0  # there is nothing left to do
    assert rows_of(path) == rows
    assert run_search(path, "--trials", 3, data_dir=data_dir.parent / "other") == 2
    assert "--search_dir: the study found was started with other settings (--data_dirs" in capsys.readouterr().err
    assert run_search(path, "--trials", 3, "--study", "another", "--gamma=3", data_dir=data_dir) == 2
    assert "trial_0000 belongs to another study" in capsys.readouterr().err
    changed = write_sweep(tmp_path, parameters={"epochs": {"value": 2}})
    assert run_search(changed, "--gamma=3", data_dir=data_dir) == 2
    assert "was started with other settings (parameters" in capsys.readouterr().err


def test_a_trial_that_fails_is_reported_and_the_others_continue(tmp_path, data_dir, capsys):
    """It does not count: the search runs another one, and tries it again when it is started again."""
    wrong = [1.0, 2.0]  # for three classes
    parameters = {"alpha": {"values": [wrong, [1.0], [1.0]]}, "epochs": {"value": 1}, "train_loss": {"value": "focal"}}
    path = write_sweep(tmp_path, parameters=parameters, method="grid")
    for turn in (1, 2):
        assert run_search(path, data_dir=data_dir) == 0
        failed, done, *again = rows_of(path)
        assert done["state"] == "done" and failed["state"] == "failed" and len(again) == turn - 1
        assert failed["error"].startswith("error: --alpha: 2 values for 3 classes")
        assert f"1 done, {turn} failed" in capsys.readouterr().out


def test_flags_that_cannot_work_end_the_search(tmp_path, capsys):
    path = write_sweep(tmp_path)
    assert run_search(path, "--trials", 9, data_dir=tmp_path / "gone") == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "3 trials failed and none finished" in error and str(tmp_path / "gone") in error
    assert run_search(path, "--run_dir", "x", data_dir=tmp_path) == 2
    assert "--run_dir: is set separately for each run" in capsys.readouterr().err


def test_trials_that_are_not_promising_are_stopped_early(tmp_path, data_dir):
    parameters = {"learning_rate": {"values": [1e-3, 1e-12]}, "epochs": {"value": 40}}
    stopping = {"type": "hyperband", "min_iter": 1, "max_iter": 1, "eta": 2}
    metric = {"name": "val_loss", "goal": "minimize"}
    path = write_sweep(tmp_path, parameters=parameters, method="grid", early_terminate=stopping, metric=metric)
    assert run_search(path, data_dir=data_dir) == 0
    rows = rows_of(path)
    assert [row["state"] for row in rows] == ["done", "stopped early"]
    assert int(rows[1]["epochs"]) < 40 and (Path(rows[1]["run_dir"]) / "best_model.pth").exists()


def start_search(path, data_dir, *flags):
    tiny = [*TINY_FLAGS[:5], "--data_dirs", data_dir]
    return start_with_thin_trials("search", path, "--search_dir", path.parent / "found", *flags, *tiny)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_search_that_was_stopped_resumes_where_it_was(tmp_path, data_dir, number):
    """If it is killed, it leaves the process of its trial behind, which must not train unsupervised."""
    path = write_sweep(tmp_path, parameters={**SWEEP["parameters"], "epochs": {"value": 60}})
    first = start_search(path, data_dir, "--trials", "1")
    history = tmp_path / "found" / "trial_0000" / "history.csv"
    stop_while_training(first, history, number)
    assert run_search(path, "--trials", 1, data_dir=data_dir) == 0
    (row,) = rows_of(path)
    assert row["state"] == "done" and row["epochs"] == "60"
    assert "resuming with epoch" in (tmp_path / "found" / "trial_0000.log").read_text()


def test_a_trial_that_the_system_kills_is_resumed(tmp_path, data_dir):
    path = write_sweep(tmp_path, parameters={**SWEEP["parameters"], "epochs": {"value": 40}})
    searching = start_search(path, data_dir, "--trials", "1")
    last = tmp_path / "found" / "trial_0000" / "last_model.pth"
    wait_for(last.exists)
    pid = re.match(r"process (\d+) on", (last.parent / ".lock").read_text())[1]
    os.kill(int(pid), signal.SIGKILL)
    out, err = searching.communicate(timeout=PATIENCE)
    assert searching.returncode == 0, err
    assert "killed by signal 9, perhaps because the system ran out of memory; resuming it" in out
    assert rows_of(path)[0]["state"] == "done"


def test_a_storage_that_does_not_respond_for_a_while_stops_no_trial(tmp_path, data_dir):
    path = write_sweep(tmp_path, parameters={**SWEEP["parameters"], "epochs": {"value": 4}})
    searching = start_search(path, data_dir, "--trials", "1")
    wait_for((tmp_path / "found" / "trial_0000").exists)
    with sqlite3.connect(tmp_path / "found" / "study.db", timeout=30) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(12)  # the client waits for 5
    out, err = searching.communicate(timeout=PATIENCE)
    assert searching.returncode == 0, err
    assert out.count("warning: the storage does not respond") == 1 and rows_of(path)[0]["state"] == "done"


def test_with_a_seed_a_resumed_search_draws_other_trials(tmp_path, data_dir):
    path = write_sweep(tmp_path, parameters={**SWEEP["parameters"], "epochs": {"value": 1}})
    for trials in (1, 2):
        assert run_search(path, "--trials", trials, "--search_seed", 7, data_dir=data_dir) == 0
    assert len({row["learning_rate"] for row in rows_of(path)}) == 2


def test_invalid_flags_and_folders_are_refused_in_one_line(tmp_path, data_dir, capsys):
    path = write_sweep(tmp_path)
    (tmp_path / "file").touch()
    for flags, words in {
        ("--trials", "0"): "--trials: must be at least 1, not 0",
        ("--search_dir", str(tmp_path / "file")): f"{tmp_path / 'file'}: File exists",
        ("--batch_size", "x"): "--batch_size",
    }.items():
        assert run_search(path, *flags, data_dir=data_dir) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert error.startswith("error: ") and words in error


def test_two_searches_share_a_storage(tmp_path, data_dir):
    path = write_sweep(tmp_path, parameters={**SWEEP["parameters"], "epochs": {"value": 1}})
    storage = f"sqlite:///{tmp_path / 'studies.db'}"
    both = [start_search(path, data_dir, "--trials", "4", "--storage", storage) for _ in range(2)]
    for searching in both:
        _, err = searching.communicate(timeout=PATIENCE)
        assert searching.returncode == 0, err
    rows = rows_of(path)
    assert 4 <= len(rows) <= 5 and all(row["state"] == "done" for row in rows)
    assert len({row["learning_rate"] for row in rows}) == len(rows)


def test_a_storage_that_cannot_be_opened_is_named(tmp_path, data_dir, capsys):
    path = write_sweep(tmp_path)
    assert run_search(path, "--storage", "nosuchdb://host/x", data_dir=data_dir) == 2
    assert "--storage: nosuchdb://host/x cannot be opened" in capsys.readouterr().err
