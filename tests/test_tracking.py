"""With the real W&B client, offline or against an address where nothing listens."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY_FLAGS, read_rows, start_main

import main
import tracking
from files import HISTORY_COLUMNS
from flags import build_parser

NO_ACCOUNT = {"WANDB_API_KEY": None, "WANDB_MODE": None}


def start(*flags, cwd, **environment):
    """main.py with the thin network as a process without terminal. -> Popen."""
    env = {**os.environ, "NETRC": str(cwd / "netrc"), "WANDB_CONFIG_DIR": str(cwd / "wandb_config"), **environment}
    env = {name: value for name, value in env.items() if value is not None}
    return start_main(*flags, program=ROOT / "tests" / "thin_main.py", cwd=cwd, env=env)


def run_main(*flags, cwd, **environment):
    """-> CompletedProcess."""
    process = start(*flags, cwd=cwd, **environment)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_a_run_resumed_by_its_id_goes_on_as_one_line(tmp_path, data_dir, server):
    run_dir, env = tmp_path / "run", {"cwd": tmp_path, **server.environment}
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 3, "--run_dir", run_dir, "--wandb_project", "skin"]
    done = run_main(*flags, "--wandb_images", 3, "--wandb_artifact", **env)
    assert done.returncode == 0 and "W&B has failed" not in done.stdout, done.stderr
    ((run_id, run),) = server.runs.items()
    assert f"/lab/skin/runs/{run_id}" in done.stdout and run.state == "finished" and run.epochs == [0, 1, 2]
    assert {"val_recall/0", "val_recall/2", "val_recall/10", "images_per_second"} <= run.history[0].keys()
    assert run.config["learning_rate"]["value"] == 1e-3 and run.config["samples_per_cls"]["value"]["10"] == 3
    rows = read_rows(run_dir / "history.csv")
    best = max(rows, key=lambda row: float(row["val_balanced_acc"]))
    assert run.summary["val_balanced_acc"] == pytest.approx(float(best["val_balanced_acc"]))
    assert run.summary["best_epoch"] == int(best["epoch"]) and "test_macro_f1" in run.summary
    charts = json.dumps([row for row in run.history if "val_loss" not in row])
    assert "confusion_matrix" in charts and "pr_curves" in charts and "test_worst_mistakes" in charts
    (model,) = (artifact for artifact in server.artifacts.values() if artifact["artifactTypeName"] == "model")
    assert model["files"]["best_model.pth"] == (run_dir / "best_model.pth").read_bytes()

    again = ["--resume", run_dir / "best_model.pth", "--wandb_id", run_id, "--wandb_resume"]
    done = run_main(*again, "allow", "--epochs", 4, **env)
    assert done.returncode == 0, done.stderr
    assert list(server.runs) == [run_id] and run.starts == 2
    best_epoch = int(best["epoch"])
    assert run.epochs == [0, 1, 2, *range(best_epoch + 1, 4)]
    assert run.summary["best_metric"] >= float(best["val_balanced_acc"])
    done = run_main("--resume", run_dir / "last_model.pth", "--wandb_resume", "must", "--epochs", 5, **env)
    assert done.returncode == 0 and run.starts == 3 and run.epochs[-2:] == [3, 4]  # by the checkpoint's id
    done = run_main(*again, "must", "--wandb_id", "nowhere", "--epochs", 6, **env)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: --wandb_id") and "nowhere" in line and "does not exist" in line


def test_epochs_that_were_saved_but_not_logged_are_logged_later(tmp_path, data_dir, server):
    env = {"cwd": tmp_path, **server.environment}
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 2, "--run_dir", tmp_path / "run"]
    assert run_main(*flags, **env).returncode == 0
    (run,) = server.runs.values()
    del run.lines["wandb-history.jsonl"][1:]  # as if the machine had lost its power behind the first epoch
    run.summary["epoch"] = 0
    assert run_main("--resume", tmp_path / "run" / "last_model.pth", "--epochs", 3, **env).returncode == 0
    assert run.epochs == [0, 1, 2]


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_server_that_is_lost_in_mid_run_stops_nothing(tmp_path, data_dir, server, fault):
    env = {"cwd": tmp_path, **server.environment, "WANDB_FINISH_TIMEOUT": "2"}
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 3, "--run_dir", tmp_path / "run"]
    process = start(*flags, **env)
    while "W&B: http" not in process.stdout.readline():
        assert process.poll() is None
    if fault == "dies":
        server.die()
    server.hanging = True
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (tmp_path / "run" / "results.json").exists()
    (line,) = [line for line in out.splitlines() if line.startswith("W&B: not all was uploaded")]
    assert f"wandb sync {tmp_path}/run/wandb/run-" in line


def sync_as_told(out, env, folder):
    (line,) = [line for line in out.splitlines() if "wandb sync" in line]
    command = shlex.split(line.partition("wandb login && ")[2])
    wandb = str(Path(sys.executable).with_name("wandb"))
    synced = {**os.environ, **env, "WANDB_CONFIG_DIR": str(folder / "wandb_config")}
    synced = {name: value for name, value in synced.items() if name not in ("cwd", "WANDB_MODE")}
    subprocess.run([wandb, *command[1:]], env=synced, cwd=folder, check=True, capture_output=True, timeout=60)


def test_offline_runs_and_their_resumes_are_synced_by_the_command_that_is_printed(tmp_path, data_dir, server):
    env = {"cwd": tmp_path, **server.environment, "WANDB_MODE": "offline"}
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--run_dir", tmp_path / "run"]
    done = run_main(*flags, **env)
    assert done.returncode == 0, done.stderr
    for part in (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"):
        part.write_bytes(part.read_bytes()[:100])  # as a kill leaves it: the client writes in blocks
    done = run_main("--resume", tmp_path / "run" / "last_model.pth", "--epochs", 3, **env)
    assert done.returncode == 0 and not server.runs
    sync_as_told(done.stdout, env, tmp_path)
    (run,) = server.runs.values()
    assert run.epochs == [0, 1, 2] and run.state == "finished"


def test_an_offline_run_that_goes_on_online_and_back_has_each_epoch_on_the_server(tmp_path, data_dir, server):
    env = {"cwd": tmp_path, **server.environment}
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--run_dir", tmp_path / "run"]
    again = ["--resume", tmp_path / "run" / "last_model.pth", "--epochs"]
    assert run_main(*flags, **{**env, "WANDB_MODE": "offline"}).returncode == 0
    assert run_main(*again, 3, **env).returncode == 0
    (run,) = server.runs.values()
    assert run.epochs == [0, 1, 2]
    done = run_main(*again, 4, **{**env, "WANDB_MODE": "offline"})
    sync_as_told(done.stdout, env, tmp_path)
    assert run.epochs == [0, 1, 2, 3]


def test_a_wrong_key_means_offline(tmp_path, data_dir, server):
    env = {"cwd": tmp_path, **server.environment, "WANDB_API_KEY": "b" * 40}
    done = run_main("--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--run_dir", tmp_path / "run", **env)
    assert done.returncode == 0, done.stderr
    assert "did not accept the API key" in done.stdout and "wandb sync" in done.stdout and not server.runs


def synced_runs(folder):
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def test_without_an_account_the_run_goes_on_offline_and_resumes_under_its_id(tmp_path, data_dir):
    run_dir = tmp_path / "run"
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--run_dir", run_dir]
    done = run_main(*flags, cwd=tmp_path, **NO_ACCOUNT)
    assert done.returncode == 0, done.stderr
    (record,) = synced_runs(run_dir)
    first, last = [line for line in done.stdout.splitlines() if line.startswith("W&B")]
    assert "no API key" in first and f"wandb sync {record.parent}" in last
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
    args = build_parser().parse_args(["--wandb_mode", "offline"])
    progress = main.Progress()
    with tracking.Run(args, tmp_path, None, {"0": 3, "1": 2}) as run:
        for epoch, metric in enumerate([0.3, 0.7, 0.5]):
            row = {
                **dict.fromkeys(HISTORY_COLUMNS, metric / 2),
                "epoch": epoch,
                "val_balanced_acc": metric,
                "val_recall": {},
            }
            progress.add_epoch(row, "val_balanced_acc")
            run.log_epoch(row, progress)
        summary = dict(run._run.summary)
    assert summary["val_balanced_acc"] == 0.7 and summary["train_loss"] == 0.35
    assert summary["epoch"] == 2 and summary["best_epoch"] == 1


def test_a_wandb_process_that_is_killed_stops_no_training(tmp_path, capsys):
    args = build_parser().parse_args(["--wandb_mode", "offline"])
    progress = main.Progress()
    with tracking.Run(args, tmp_path, None, {"0": 3, "1": 2}) as run:
        for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
            if b"wandb-core" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(int(child), signal.SIGKILL)
        for epoch in range(3):
            row = {**dict.fromkeys(HISTORY_COLUMNS, 0.5), "epoch": epoch, "val_recall": {}}
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
