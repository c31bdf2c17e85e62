"""The search without W&B: every distribution of a sweep's yaml, and whole searches of main.py with the thin network."""

import math
import os
import re
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from conftest import ROOT, TINY_FLAGS, read_rows, start_with_thin_trials, stop_while_training, wait_for

import search
from files import UserError
from flags import build_parser
from sweep_config import Parameter, read_sweep

pytestmark = pytest.mark.usefixtures("thin_trials")
SWEEP = {
    "program": "main.py",
    "method": "random",
    "metric": {"name": "val_balanced_acc", "goal": "maximize"},
    "parameters": {"learning_rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}},
}
KNOWN = {"learning_rate", "gamma", "epochs", "use_augmentation", "augmentation_methods", "image_size", "dropout_prob"}


def write_sweep(folder, **changes):
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, **changes}))
    return path


# --------------------------------------------------------------------------------------- the yaml and its distributions


def draws(spec, count=4000):
    """Values of a parameter, drawn by Optuna's random sampler."""
    parameter = Parameter("p", spec)
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(sampler=sampler)
    trial = optuna.trial.FixedTrial({})
    drawn = (sampler.sample_independent(study, trial, "p", parameter.distribution) for _ in range(count))
    return [parameter.value(value) for value in drawn]


# spec -> (transform under which the values are spread evenly between low and high)
UNIFORM = {
    "uniform": ({"min": 2.0, "max": 4.0}, float, 2, 4),
    "log_uniform": ({"min": -3, "max": 1}, math.log, -3, 1),
    "log_uniform_values": ({"min": 1e-5, "max": "1e-1"}, math.log10, -5, -1),  # yaml reads 1e-1 as a text
    "inv_log_uniform": ({"min": -3, "max": 1}, lambda x: math.log(1 / x), -3, 1),
    "inv_log_uniform_values": ({"min": 1e-3, "max": 1e2}, math.log10, -3, 2),
}


@pytest.mark.parametrize("kind", UNIFORM)
def test_continuous_distributions_are_those_of_wandb(kind):
    spec, transform, low, high = UNIFORM[kind]
    values = np.sort([transform(value) for value in draws({"distribution": kind, **spec})])
    evenly = np.linspace(low, high, len(values))
    assert np.abs(values - evenly).max() < 0.05 * (high - low)


@pytest.mark.parametrize("kind, transform", [("normal", float), ("log_normal", math.log)])
def test_normal_distributions_have_their_mean_and_spread(kind, transform):
    values = [transform(value) for value in draws({"distribution": kind, "mu": 3, "sigma": 0.5})]
    assert np.mean(values) == pytest.approx(3, abs=0.05) and np.std(values) == pytest.approx(0.5, rel=0.05)
    assert np.mean(np.abs(np.array(values) - 3) < 0.5) == pytest.approx(0.683, abs=0.03)


ROUNDED = {
    "q_uniform": ({"min": 0.1, "max": 0.5, "q": 0.1}, {0.1, 0.2, 0.3, 0.4, 0.5}),
    "q_log_uniform": ({"min": 0, "max": 2, "q": 2}, {0, 2, 4, 6, 8}),
    "q_log_uniform_values": ({"min": 1, "max": 8, "q": 2}, {0, 2, 4, 6, 8}),
    "q_normal": ({"mu": 0, "sigma": 0.3, "q": 1}, {-1, 0, 1}),
    "q_log_normal": ({"mu": 0, "sigma": 0.3, "q": 1}, {0, 1, 2, 3}),
    "int_uniform": ({"min": 3, "max": 6}, {3, 4, 5, 6}),
    "categorical": ({"values": [0.5, "two", True]}, {0.5, "two", True}),
}


@pytest.mark.parametrize("kind", ROUNDED)
def test_rounded_and_discrete_distributions_give_multiples_and_choices(kind):
    spec, expected = ROUNDED[kind]
    assert set(draws({"distribution": kind, **spec})) <= expected
    assert len(set(draws({"distribution": kind, **spec}))) >= min(3, len(expected))


def test_choices_with_probabilities_come_as_often():
    values = draws({"values": ["a", "b", "c"], "probabilities": [0.7, 0.3, 0.0]})
    assert values.count("a") / len(values) == pytest.approx(0.7, abs=0.03) and "c" not in values


def test_what_is_not_named_is_as_in_wandb():
    assert Parameter("p", {"min": 1, "max": 3}).kind == "int_uniform"
    assert Parameter("p", {"min": 1, "max": 3.5}).kind == "uniform"
    assert Parameter("p", {"value": 3}).distribution is None and Parameter("p", {"value": 3}).value(None) == 3
    lists = Parameter("p", {"values": [["rotation", "scale"], ["shear"]]})
    assert lists.value(lists.distribution.choices[0]) == ["rotation", "scale"]


def test_the_projects_own_sweep_is_read_whole():
    known = {option[2:] for action in build_parser()._actions for option in action.option_strings}
    config = read_sweep(ROOT / "sweep.yaml", known)
    assert set(config.searched()) == {"learning_rate", "gamma", "dropout_prob", "beta"}
    assert isinstance(config.sampler(0), optuna.samplers.TPESampler) and config.maximizes
    assert isinstance(config.pruner(30), optuna.pruners.HyperbandPruner)
    flags = config.flags({"learning_rate": 0.1, "use_augmentation": True})
    assert flags == ["--data_dirs", "data", "--learning_rate=0.1", "--use_augmentation=True"]


WRONG = {
    "methods": ({"methods": "bayes"}, "methods is not known"),
    "method": ({"method": "evolution"}, "method: evolution"),
    "metric": ({"metric": {"name": "accuracy"}}, "metric.name: accuracy"),
    "goal": ({"metric": {"name": "val_acc", "goal": "max"}}, "metric.goal: max"),
    "metric key": ({"metric": {"name": "val_acc", "aim": 1}}, "metric.aim is not known"),
    "program": ({"program": "train.py"}, "program: train.py"),
    "flag": ({"parameters": {"learnign_rate": {"value": 1}}}, "parameters.learnign_rate: main.py has no flag"),
    "distribution": ({"parameters": {"gamma": {"distribution": "cauchy"}}}, "parameters.gamma.distribution: cauchy"),
    "missing": (
        {"parameters": {"gamma": {"distribution": "uniform", "min": 1}}},
        "parameters.gamma: uniform needs max",
    ),
    "extra": ({"parameters": {"gamma": {"value": 1, "q": 2}}}, "parameters.gamma: q is not known"),
    "nested": ({"parameters": {"gamma": {"parameters": {}}}}, "parameters.gamma.parameters"),
    "order": ({"parameters": {"gamma": {"min": 2.0, "max": 1.0}}}, "parameters.gamma: min must not be above max"),
    "figure": ({"parameters": {"gamma": {"min": "low", "max": 1.0}}}, "parameters.gamma.min: 'low'"),
    "stopping": ({"early_terminate": {"type": "median"}}, "early_terminate.type: median"),
    "stopping key": ({"early_terminate": {"type": "hyperband", "min_iters": 3}}, "early_terminate.min_iters"),
    "macro": ({"command": ["${program}", "${args_json}"]}, "command: ${args_json}"),
    "macro in a word": ({"command": ["${program}", "--cache_dir=${home}/x"]}, "command: ${home}"),
    "variable": ({"command": ["${program}", "${envvar:NOT_SET_ANYWHERE}"]}, "no variable NOT_SET_ANYWHERE"),
    "no program": ({"command": ["python", "${args}"]}, "command: ${program} is wanted"),
    "command": ({"command": "python main.py"}, "command: a list of words"),
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
        {"parameters": {"epochs": {"distribution": "q_uniform", "min": 1, "max": 5, "q": 1.0}}},
        "parameters.epochs: argument",
    ),
    "twice": ({"parameters": {"lr": {"value": 1}, "learning_rate": {"value": 2}}}, "are the same flag"),
    "own flag": ({"parameters": {"run_dir": {"value": "x"}}}, "parameters.run_dir: the search sets"),
    "grid": ({"method": "grid"}, "parameters.learning_rate: method grid needs"),
    "no mapping": ({"parameters": {"gamma": 3}}, "parameters.gamma: a mapping"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_sweep_cannot_mean_is_named(name, tmp_path, capsys):
    changes, wanted = WRONG[name]
    path = write_sweep(tmp_path, **changes)
    assert search.main_search([str(path), "--search_dir", str(tmp_path / "s")]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"error: {path}: ") and wanted in error


def test_a_yaml_that_is_none_is_refused(tmp_path):
    for content in ("a: [", "- 1", ""):
        (tmp_path / "s.yaml").write_text(content)
        with pytest.raises(UserError, match=r"s\.yaml"):
            read_sweep(tmp_path / "s.yaml", KNOWN)
    with pytest.raises(UserError, match=r"gone\.yaml cannot be read"):
        read_sweep(tmp_path / "gone.yaml", KNOWN)


def test_flags_of_the_command_line_take_the_place_of_the_yamls():
    flags = ["--data_dirs", "a", "b", "--lr=1", "--use_augmentation", "--epochs", "3"]
    assert search.without(flags, "--data_dirs") == ["--lr=1", "--use_augmentation", "--epochs", "3"]
    for name in ("--lr", "--learning_rate"):
        assert search.without(flags, name) == ["--data_dirs", "a", "b", "--use_augmentation", "--epochs", "3"]
    assert search.without(flags, "--no-use_augmentation") == ["--data_dirs", "a", "b", "--lr=1", "--epochs", "3"]
    assert search.without(flags, "--epochs") == flags[:-2]


# ------------------------------------------------------------------------------------------------------ whole searches


def run_search(path, *flags, data_dir):
    tiny = [*TINY_FLAGS[:5], "--data_dirs", str(data_dir)]
    return search.main_search([str(path), "--search_dir", str(path.parent / "found"), *map(str, flags), *tiny])


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
    (command,) = [line for line in out.splitlines() if line.startswith("in full: ")]
    assert "--epochs" not in command and "--use_augmentation=True" in command and str(data_dir) in command
    assert (Path(best["run_dir"]) / "best_model.pth").exists() and not list(tmp_path.rglob("last_model.pth"))
    assert (tmp_path / "found" / "search_history.png").stat().st_size > 5000
    assert "gamma" not in rows[0] and "--gamma=3" in command and "gamma=0.5" not in command
    assert run_search(path, "--trials", 2, "--gamma=3", data_dir=data_dir) == 0  # there is nothing left to do
    assert rows_of(path) == rows
    assert run_search(path, "--trials", 3, data_dir=data_dir.parent / "other") == 2
    assert "--search_dir: the study found began with other flags" in capsys.readouterr().err
    assert run_search(path, "--trials", 3, "--study", "another", "--gamma=3", data_dir=data_dir) == 2
    assert "trial_0000 is there already, of another study" in capsys.readouterr().err
    changed = write_sweep(tmp_path, parameters={"epochs": {"value": 2}})
    assert run_search(changed, "--gamma=3", data_dir=data_dir) == 2
    assert "began with other sweep (parameters" in capsys.readouterr().err


def test_a_trial_that_crashes_is_told_and_the_others_go_on(tmp_path, data_dir, capsys):
    """And does not count: the search makes up for it, and tries it again when it is started again."""
    wrong = [1.0, 2.0]  # for three classes
    parameters = {"alpha": {"values": [wrong, [1.0], [1.0]]}, "epochs": {"value": 1}, "train_loss": {"value": "focal"}}
    path = write_sweep(tmp_path, parameters=parameters, method="grid")
    for turn in (1, 2):
        assert run_search(path, data_dir=data_dir) == 0
        failed, done, *again = rows_of(path)
        assert done["state"] == "done" and failed["state"] == "failed" and len(again) == turn - 1
        assert failed["error"].startswith("error: --alpha: 2 figures for 3 classes")
        assert f"1 done, {turn} failed" in capsys.readouterr().out


def test_a_command_that_cannot_work_ends_the_search(tmp_path, capsys):
    path = write_sweep(tmp_path)
    assert run_search(path, "--trials", 9, data_dir=tmp_path / "gone") == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "3 trials failed and none was finished" in error and f"no folder {tmp_path / 'gone'}" in error
    assert run_search(path, "--run_dir", "x", data_dir=tmp_path) == 2
    assert "--run_dir: is set for each trial" in capsys.readouterr().err


def test_trials_that_do_not_promise_anything_are_stopped_early(tmp_path, data_dir):
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
def test_a_search_that_was_stopped_goes_on_where_it_was(tmp_path, data_dir, number):
    """Killed, it leaves the trial's own process behind, which is not let train unwatched."""
    path = write_sweep(tmp_path, parameters={**SWEEP["parameters"], "epochs": {"value": 60}})
    first = start_search(path, data_dir, "--trials", "1")
    history = tmp_path / "found" / "trial_0000" / "history.csv"
    stop_while_training(first, history, number)
    done = start_search(path, data_dir, "--trials", "1")
    _, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    (row,) = rows_of(path)
    assert row["state"] == "done" and row["epochs"] == "60"
    assert "going on with epoch" in (tmp_path / "found" / "trial_0000.log").read_text()


def test_a_trial_that_the_system_kills_is_gone_on_with(tmp_path, data_dir):
    path = write_sweep(tmp_path, parameters={**SWEEP["parameters"], "epochs": {"value": 40}})
    searching = start_search(path, data_dir, "--trials", "1")
    last = tmp_path / "found" / "trial_0000" / "last_model.pth"
    wait_for(last.exists)
    pid = re.match(r"process (\d+) on", (last.parent / ".lock").read_text())[1]
    os.kill(int(pid), signal.SIGKILL)
    out, err = searching.communicate(timeout=120)
    assert searching.returncode == 0, err
    assert "killed by signal 9, perhaps by a system without memory; going on with it" in out
    assert rows_of(path)[0]["state"] == "done"


def test_a_storage_that_does_not_answer_for_a_while_stops_no_trial(tmp_path, data_dir):
    path = write_sweep(tmp_path, parameters={**SWEEP["parameters"], "epochs": {"value": 4}})
    searching = start_search(path, data_dir, "--trials", "1")
    wait_for((tmp_path / "found" / "trial_0000").exists)
    with sqlite3.connect(tmp_path / "found" / "study.db", timeout=30) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(12)  # the client waits for 5
    out, err = searching.communicate(timeout=120)
    assert searching.returncode == 0, err
    assert out.count("warning: the storage does not answer") == 1 and rows_of(path)[0]["state"] == "done"


def test_a_seed_draws_other_trials_when_the_search_goes_on(tmp_path, data_dir):
    path = write_sweep(tmp_path, parameters={**SWEEP["parameters"], "epochs": {"value": 1}})
    for trials in (1, 2):
        assert run_search(path, "--trials", trials, "--search_seed", 7, data_dir=data_dir) == 0
    assert len({row["learning_rate"] for row in rows_of(path)}) == 2


def test_own_flags_and_places_are_refused_in_one_line(tmp_path, data_dir, capsys):
    path = write_sweep(tmp_path)
    (tmp_path / "file").touch()
    for flags, wanted in {
        ("--trials", "0"): "--trials: 0 is not at least 1",
        ("--search_dir", str(tmp_path / "file")): f"{tmp_path / 'file'}: File exists",
        ("--batch_size", "x"): "--batch_size",
    }.items():
        assert run_search(path, *flags, data_dir=data_dir) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert error.startswith("error: ") and wanted in error


def test_two_searches_share_a_storage(tmp_path, data_dir):
    path = write_sweep(tmp_path, parameters={**SWEEP["parameters"], "epochs": {"value": 1}})
    storage = f"sqlite:///{tmp_path / 'studies.db'}"
    both = [start_search(path, data_dir, "--trials", "4", "--storage", storage) for _ in range(2)]
    for one in both:
        _, err = one.communicate(timeout=240)
        assert one.returncode == 0, err
    rows = rows_of(path)
    assert 4 <= len(rows) <= 5 and all(row["state"] == "done" for row in rows)
    assert len({row["learning_rate"] for row in rows}) == len(rows)


def test_a_storage_that_cannot_be_opened_is_named(tmp_path, data_dir, capsys):
    path = write_sweep(tmp_path)
    assert run_search(path, "--storage", "nosuchdb://host/x", data_dir=data_dir) == 2
    assert "--storage: nosuchdb://host/x cannot be opened" in capsys.readouterr().err
