"""With the real W&B client, offline or against an address where nothing listens."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import TINY_FLAGS

import main
import tracking
from files import HISTORY_COLUMNS

ROOT = Path(main.__file__).parent
NO_ACCOUNT = {"WANDB_API_KEY": None, "WANDB_MODE": None}


def run_main(*flags, cwd, **environment):
    """main.py as a process without terminal. -> CompletedProcess."""
    env = {**os.environ, "NETRC": str(cwd / "netrc"), "WANDB_CONFIG_DIR": str(cwd / "wandb_config"), **environment}
    env = {name: value for name, value in env.items() if value is not None}
    command = [sys.executable, str(ROOT / "main.py"), *map(str, flags)]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240
    )


def synced_runs(folder):
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def test_without_an_account_the_run_goes_on_offline_and_resumes_under_its_id(tmp_path, data_dir):
    run_dir = tmp_path / "run"
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--run_dir", run_dir]
    done = run_main(*flags, cwd=tmp_path, **NO_ACCOUNT)
    assert done.returncode == 0, done.stderr
    (record,) = synced_runs(run_dir)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("W&B")]
    assert "no API key" in line and f"wandb sync {record.parent}" in line
    again = run_main("--resume", run_dir / "last_model.pth", "--epochs", 2, cwd=tmp_path, **NO_ACCOUNT)
    assert again.returncode == 0, again.stderr
    assert {path.name for path in synced_runs(run_dir)} == {record.name}
    assert len(synced_runs(run_dir)) == 2


def test_a_server_that_does_not_answer_means_offline_too(tmp_path, data_dir):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--run_dir", tmp_path / "run"]
        environment = {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address}
        done = run_main(*flags, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "did not answer" in done.stdout and "wandb sync" in done.stdout
    assert len(synced_runs(tmp_path / "run")) == 1


def test_the_summary_has_the_best_epochs_figures_at_any_time(tmp_path):
    args = main.build_parser().parse_args(["--wandb_mode", "offline"])
    progress = main.Progress()
    with tracking.Run(args, tmp_path, None, {"0": 3, "1": 2}) as run:
        for epoch, metric in enumerate([0.3, 0.7, 0.5]):
            row = dict.fromkeys(HISTORY_COLUMNS, metric / 2) | {"epoch": epoch, "val_balanced_acc": metric}
            progress.add_epoch(row, "val_balanced_acc")
            run.log_epoch(row, progress)
        summary = dict(run._run.summary)
    assert summary["val_balanced_acc"] == 0.7 and summary["train_loss"] == 0.35
    assert summary["epoch"] == 2 and summary["best_epoch"] == 1


def test_a_wandb_process_that_is_killed_stops_no_training(tmp_path, capsys):
    args = main.build_parser().parse_args(["--wandb_mode", "offline"])
    progress = main.Progress()
    with tracking.Run(args, tmp_path, None, {"0": 3, "1": 2}) as run:
        for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
            if b"wandb-core" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(int(child), signal.SIGKILL)
        for epoch in range(3):
            row = dict.fromkeys(HISTORY_COLUMNS, 0.5) | {"epoch": epoch}
            progress.add_epoch(row, "val_balanced_acc")
            run.log_epoch(row, progress)
            time.sleep(0.2)
    assert capsys.readouterr().out.count("warning: W&B has failed") == 1


@pytest.mark.parametrize("name, value", [("WANDB_MODE", "shared"), ("WANDB_BASE_URL", "127.0.0.1:9")])
def test_a_wandb_variable_that_makes_no_sense_is_refused_in_one_line(tmp_path, data_dir, name, value):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--run_dir", tmp_path / "run"]
    done = run_main(*flags, cwd=tmp_path, **{"WANDB_MODE": "online", name: value})
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and "WANDB_" in line
    assert not (tmp_path / "run").exists()


def test_disabled_touches_nothing(finished_run):
    assert not list(finished_run.glob("**/wandb"))


@pytest.fixture
def sweep():
    return yaml.safe_load((ROOT / "sweep.yaml").read_text())


def test_the_sweep_maximises_balanced_accuracy_over_the_promised_ranges(sweep):
    assert sweep["program"] == "main.py" and sweep["method"] == "bayes"
    assert sweep["metric"] == {"name": "val_balanced_acc", "goal": "maximize"}
    parameters = sweep["parameters"]
    assert parameters["learning_rate"] == {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3}
    assert parameters["gamma"]["values"] == [0.5, 1, 2, 3]
    assert parameters["beta"]["values"] == [0.99, 0.999, 0.9999]
    assert min(parameters["dropout_prob"]["values"]) == 0.2 and max(parameters["dropout_prob"]["values"]) == 0.5
    assert sweep["early_terminate"]["type"] == "hyperband"


def test_the_command_that_the_agent_makes_of_the_sweep_runs(sweep, tmp_path, data_dir):
    """The client's own functions put the command together; the values are those a sweep would send."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    chosen = {
        name: {"value": spec.get("value", spec.get("values", [1e-4])[0])} for name, spec in sweep["parameters"].items()
    }
    pieces = {
        **create_sweep_command_args({"args": chosen}),
        "env": ["/usr/bin/env"],
        "interpreter": ["python"],
        "program": [sweep["program"]],
    }
    command = []
    for word in create_sweep_command(sweep["command"]):
        command += pieces[word[2:-1]] if word.startswith("${") else [word]
    assert "--use_augmentation=True" in command
    small = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--run_dir", tmp_path / "trial"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*command, *map(str, small)],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    args = json.loads((tmp_path / "trial" / "args.json").read_text())
    assert args["use_augmentation"] is True and args["gamma"] == 0.5 and args["train_loss"] == "cb"
