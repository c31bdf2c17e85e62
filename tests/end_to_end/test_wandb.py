"""main.py with the real W&B client: against a small server, without an account, without an answer, in a sweep."""

import json
import os
import resource
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import PATIENCE, ROOT, THIN_MAIN, TINY_FLAGS, start_main, wait_for
from warm_main import WarmMain

from model import load_checkpoint
from run.files import read_rows

NO_ACCOUNT = {"WANDB_API_KEY": None, "WANDB_MODE": None}


def with_own_files(cwd, environment):
    env = {**os.environ, "NETRC": str(cwd / "netrc"), "WANDB_CONFIG_DIR": str(cwd / "wandb_config"), **environment}
    return {name: value for name, value in env.items() if value is not None}


def start_thin_main(*flags, cwd, **environment):
    """main.py with the thin network as a process without a terminal. -> Popen"""
    return start_main(*flags, program=THIN_MAIN, cwd=cwd, env=with_own_files(cwd, environment))


def run_thin_main(*flags, cwd, **environment):
    """Start main.py and wait for its end. -> CompletedProcess"""
    return warm_main(*flags, cwd=cwd, **environment).end(seconds=PATIENCE)


def warm_main(*flags, cwd, **environment):
    return WarmMain([str(flag) for flag in flags], cwd, with_own_files(cwd, environment))


def test_a_run_resumed_by_its_id_continues_its_line(tmp_path, data_dir, server):
    run_dir, env = tmp_path / "run", {"cwd": tmp_path, **server.environment}
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 3, "--run_dir", run_dir, "--wandb_project", "skin"]
    done = run_thin_main(*flags, "--wandb_images", 3, "--wandb_artifact", **env)
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
    uploaded = {
        **run.files,
        **{name: data for item in server.artifacts.values() for name, data in item["files"].items()},
    }
    assert not [name for name, data in uploaded.items() if "report" in name or "MODEL_CARD" in name or b"<html" in data]

    again = ["--resume", run_dir / "best_model.pth", "--wandb_id", run_id, "--wandb_resume"]
    done = run_thin_main(*again, "allow", "--epochs", 4, **env)
    assert done.returncode == 0, done.stderr
    assert list(server.runs) == [run_id] and run.starts == 2
    best_epoch = int(best["epoch"])
    assert run.epochs == [0, 1, 2, *range(best_epoch + 1, 4)]
    assert run.summary["best_metric"] >= float(best["val_balanced_acc"])
    done = run_thin_main("--resume", run_dir / "last_model.pth", "--wandb_resume", "must", "--epochs", 5, **env)
    assert done.returncode == 0 and run.starts == 3 and run.epochs[-2:] == [3, 4]  # by the checkpoint's id
    done = run_thin_main(*again, "must", "--wandb_id", "nowhere", "--epochs", 6, **env)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: --wandb_id") and "nowhere" in line and "does not exist" in line


def test_epochs_that_were_saved_but_not_logged_are_logged_later(tmp_path, data_dir, server):
    env = {"cwd": tmp_path, **server.environment}
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 2, "--run_dir", tmp_path / "run"]
    assert run_thin_main(*flags, **env).returncode == 0
    (run,) = server.runs.values()
    del run.lines["wandb-history.jsonl"][1:]  # as if the power had failed after the first epoch
    run.summary["epoch"] = 0
    assert run_thin_main("--resume", tmp_path / "run" / "last_model.pth", "--epochs", 3, **env).returncode == 0
    assert run.epochs == [0, 1, 2]


def test_epochs_that_the_disk_refused_are_logged_once_although_they_are_trained_again(tmp_path, data_dir, server):
    env, last = {"cwd": tmp_path, **server.environment}, tmp_path / "run" / "last_model.pth"
    process = start_thin_main("--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 8, "--run_dir", last.parent, **env)
    wait_for(last.exists)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))  # no checkpoint any more
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2 and "epoch   7" in out and "error: " in err
    saved, best = load_checkpoint(last), last.with_name("best_model.pth")
    num_saved = saved["epoch"] + 1
    # the disk may have taken the last model of an epoch, but not the best one, which is written after it
    is_complete = best.exists() and load_checkpoint(best)["epoch"] == saved["best_epoch"]
    (run,) = server.runs.values()
    assert run.epochs == list(range(num_saved if is_complete else num_saved - 1)) and num_saved < 8
    assert run_thin_main("--resume", last, **env).returncode == 0
    assert run.epochs == list(range(8))


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_losing_the_server_during_a_run_does_not_stop_the_training(tmp_path, data_dir, server, fault):
    env = {"cwd": tmp_path, **server.environment, "WANDB_FINISH_TIMEOUT": "2"}
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 3, "--run_dir", tmp_path / "run"]
    process = start_thin_main(*flags, **env)
    while "W&B: http" not in process.stdout.readline():
        assert process.poll() is None
    if fault == "dies":
        server.die()
    server.hanging = True
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert (tmp_path / "run" / "results.json").exists()
    (line,) = [line for line in out.splitlines() if line.startswith("W&B: not everything was uploaded")]
    assert f"wandb sync {tmp_path}/run/wandb/run-" in line


def test_a_signal_waits_only_briefly_for_a_server_that_hangs(tmp_path, data_dir, server):
    env = {"cwd": tmp_path, **server.environment}
    process = start_thin_main(
        "--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 300, "--run_dir", tmp_path / "run", **env
    )
    while "W&B: http" not in process.stdout.readline():
        assert process.poll() is None
    server.hanging = True
    while not process.stdout.readline().startswith("epoch   1"):
        assert process.poll() is None
    process.terminate()
    out, err = process.communicate(timeout=60)  # the client's own limit is FINISH_TIMEOUT_S, 120 s
    assert process.returncode == 143 and "Traceback" not in out + err
    assert "W&B: not everything was uploaded" in out and "stopped; resume with" in err


def test_results_do_not_wait_for_a_server_that_hangs(tmp_path, data_dir, server):
    env = {"cwd": tmp_path, **server.environment, "WANDB_FINISH_TIMEOUT": "600"}
    process = start_thin_main("--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 3, "--run_dir", tmp_path / "run", **env)
    while "W&B: http" not in process.stdout.readline():
        assert process.poll() is None
    server.hanging = True
    wait_for((tmp_path / "run" / "report.html").exists, seconds=PATIENCE)
    assert (tmp_path / "run" / "results.json").exists()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_run_that_is_stopped_during_its_report_is_finished(tmp_path, data_dir, server):
    program = tmp_path / "stopped.py"
    program.write_text(f"""
import signal, sys
sys.path[:0] = [{str(THIN_MAIN.parent)!r}]
import thin_main
import pages, resnet_custom
pages.write_report = lambda *_: signal.raise_signal(signal.SIGTERM)
resnet_custom.resnet50 = thin_main.thin_resnet50
thin_main.end_process(thin_main.main.main())
""")
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--run_dir", tmp_path / "run"]
    process = start_main(*flags, program=program, cwd=tmp_path, env=with_own_files(tmp_path, server.environment))
    out, err = process.communicate(timeout=PATIENCE)
    (run,) = server.runs.values()
    assert process.returncode == 143 and "Traceback" not in out + err
    assert run.state == "finished" and "test_macro_f1" in run.summary and (tmp_path / "run" / "results.json").exists()


def run_printed_sync(out, env, folder):
    (line,) = [line for line in out.splitlines() if "wandb sync" in line]
    command = shlex.split(line.partition("wandb login && ")[2])
    wandb = str(Path(sys.executable).with_name("wandb"))
    synced = {**os.environ, **env, "WANDB_CONFIG_DIR": str(folder / "wandb_config")}
    synced = {name: value for name, value in synced.items() if name not in ("cwd", "WANDB_MODE")}
    subprocess.run([wandb, *command[1:]], env=synced, cwd=folder, check=True, capture_output=True, timeout=PATIENCE)


def test_the_printed_command_syncs_an_offline_run_and_its_resumption(tmp_path, data_dir, server):
    env = {"cwd": tmp_path, **server.environment, "WANDB_MODE": "offline"}
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--run_dir", tmp_path / "run"]
    done = run_thin_main(*flags, **env)
    assert done.returncode == 0, done.stderr
    for record in (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"):
        record.write_bytes(record.read_bytes()[:100])  # as a kill leaves it: the client writes in blocks
    done = run_thin_main("--resume", tmp_path / "run" / "last_model.pth", "--epochs", 3, **env)
    assert done.returncode == 0 and not server.runs
    run_printed_sync(done.stdout, env, tmp_path)
    (run,) = server.runs.values()
    assert run.epochs == [0, 1, 2] and run.state == "finished"


def test_a_run_resumed_online_and_then_offline_again_has_each_epoch_on_the_server(tmp_path, data_dir, server):
    env = {"cwd": tmp_path, **server.environment}
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--run_dir", tmp_path / "run"]
    again = ["--resume", tmp_path / "run" / "last_model.pth", "--epochs"]
    assert run_thin_main(*flags, **{**env, "WANDB_MODE": "offline"}).returncode == 0
    assert run_thin_main(*again, 3, **env).returncode == 0
    (run,) = server.runs.values()
    assert run.epochs == [0, 1, 2]
    done = run_thin_main(*again, 4, **{**env, "WANDB_MODE": "offline"})
    run_printed_sync(done.stdout, env, tmp_path)
    assert run.epochs == [0, 1, 2, 3]


def test_with_a_wrong_key_the_run_is_offline(tmp_path, data_dir, server):
    env = {"cwd": tmp_path, **server.environment, "WANDB_API_KEY": "b" * 40}
    done = run_thin_main("--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--run_dir", tmp_path / "run", **env)
    assert done.returncode == 0, done.stderr
    assert "did not accept the API key" in done.stdout and "wandb sync" in done.stdout and not server.runs


def test_a_run_that_was_deleted_from_the_server_is_logged_to_a_new_one(tmp_path, data_dir, server):
    env, run_dir = {"cwd": tmp_path, **server.environment}, tmp_path / "run"
    env["WANDB_INIT_TIMEOUT"] = "40"  # the client tries again for as long; 20 was once too little on a busy machine
    env["WANDB_HTTP_TIMEOUT"] = "60"  # for the check of the API key
    assert run_thin_main("--data_dirs", data_dir, *TINY_FLAGS, "--run_dir", run_dir, **env).returncode == 0
    (deleted,) = server.runs
    server.delete(deleted)
    cases = {"named": ["--wandb_id", deleted], "must": ["--wandb_resume", "must"], "own": []}
    processes = {}
    for name, flags in cases.items():  # side by side, as each waits for the client to give up
        last = shutil.copytree(run_dir, tmp_path / name, ignore=shutil.ignore_patterns("wandb")) / "last_model.pth"
        processes[name] = warm_main("--resume", last, "--epochs", 3, *flags, **env)
    done = {name: process.end(seconds=PATIENCE) for name, process in processes.items()}
    for name in ("named", "must"):
        assert done[name].returncode == 2, done[name].stdout
        (line,) = done[name].stderr.strip().splitlines()
        assert line.startswith("error: --wandb_id") and deleted in line
    out = done["own"].stdout
    assert done["own"].returncode == 0, done["own"].stderr
    ((run_id, run),) = server.runs.items()
    assert run_id != deleted and run.epochs == [0, 1, 2] and "wandb sync" not in out
    assert f"W&B: the run {deleted} was deleted from the server; logging to a new run" in out
    assert load_checkpoint(tmp_path / "own" / "last_model.pth")["wandb_id"] == run_id


@pytest.mark.parametrize(
    "environment, line",
    [
        ({"WANDB_API_KEY": "not a key"}, "W&B: offline ("),
        # the client raises RuntimeError where it looks for its settings, or does not find a place for its files
        (
            {"WANDB_CONFIG_DIR": "~nobody-of-this-name"},
            "warning: W&B does not start (Could not determine home directory",
        ),
        ({"HOME": os.devnull, "XDG_CACHE_HOME": None}, "W&B: http"),
    ],
)
def test_whatever_the_client_raises_the_training_goes_on(tmp_path, data_dir, server, environment, line):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--run_dir", tmp_path / "run"]
    done = run_thin_main(*flags, cwd=tmp_path, **{**server.environment, **environment})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "results.json").exists()
    assert len([text for text in done.stdout.splitlines() if text.startswith(line)]) == 1
    assert "W&B has failed" not in done.stdout and "Traceback" not in done.stderr and not list(tmp_path.glob("~*"))


@pytest.mark.parametrize(
    "flags", [["--wandb_project", "a/b"], ["--wandb_id", "a/b"], ["--wandb_id", "absent", "--wandb_resume", "must"]]
)
def test_what_was_asked_for_and_cannot_be_had_is_one_error_line(tmp_path, data_dir, server, flags):
    start = ["--data_dirs", data_dir, *TINY_FLAGS, "--run_dir", tmp_path / "run"]
    done = run_thin_main(*start, *flags, cwd=tmp_path, **server.environment)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: {flags[0]}")


def offline_records(folder):
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def test_without_an_account_the_run_is_offline_and_resumes_under_its_id(tmp_path, data_dir):
    run_dir = tmp_path / "run"
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--run_dir", run_dir]
    done = run_thin_main(*flags, cwd=tmp_path, **NO_ACCOUNT)
    assert done.returncode == 0, done.stderr
    (record,) = offline_records(run_dir)
    first, last = [line for line in done.stdout.splitlines() if line.startswith("W&B")]
    assert "no API key" in first and f"wandb sync {record.parent}" in last
    # as in a notebook whose own client has ended
    env = {"cwd": tmp_path, "WANDB_SERVICE": f"3-1-unix-{tmp_path}/socket", **NO_ACCOUNT}
    again = run_thin_main("--resume", run_dir / "last_model.pth", "--epochs", 2, **env)
    assert again.returncode == 0, again.stderr
    assert {path.name for path in offline_records(run_dir)} == {record.name}
    assert len(offline_records(run_dir)) == 2


def test_with_a_server_that_does_not_answer_the_run_is_offline(tmp_path, data_dir):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--run_dir", tmp_path / "run"]
        environment = {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address}
        done = run_thin_main(*flags, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "did not answer" in done.stdout and "wandb sync" in done.stdout
    assert len(offline_records(tmp_path / "run")) == 1


@pytest.mark.parametrize("name, value", [("WANDB_MODE", "shared"), ("WANDB_BASE_URL", "127.0.0.1:9")])
def test_an_invalid_wandb_variable_is_one_error_line(tmp_path, data_dir, name, value):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--run_dir", tmp_path / "run"]
    done = run_thin_main(*flags, cwd=tmp_path, **{"WANDB_MODE": "online", name: value})
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and "WANDB_" in line
    assert not (tmp_path / "run").exists()


def test_disabled_wandb_writes_nothing(finished_run):
    assert not list(finished_run.glob("**/wandb"))


@pytest.fixture
def sweep():
    return yaml.safe_load((ROOT / "sweep.yaml").read_text())


def test_the_sweep_maximises_balanced_accuracy_over_the_documented_ranges(sweep):
    assert sweep["program"] == "main.py" and sweep["method"] == "bayes"
    assert sweep["metric"] == {"name": "val_balanced_acc", "goal": "maximize"}
    parameters = sweep["parameters"]
    assert parameters["learning_rate"] == {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3}
    assert parameters["gamma"]["values"] == [0.5, 1, 2, 3]
    assert parameters["beta"]["values"] == [0.99, 0.999, 0.9999]
    assert min(parameters["dropout_prob"]["values"]) == 0.2 and max(parameters["dropout_prob"]["values"]) == 0.5
    assert sweep["early_terminate"]["type"] == "hyperband"


def test_the_command_that_an_agent_makes_from_the_sweep_runs(sweep, tmp_path, data_dir):
    """The client's functions compose the command, with values that a sweep would send."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    chosen = {
        name: {"value": spec.get("value", spec.get("values", [1e-4])[0])} for name, spec in sweep["parameters"].items()
    }
    pieces = {
        **create_sweep_command_args({"args": chosen}),
        "env": ["/usr/bin/env"],
        "interpreter": ["python"],
        "program": [str(THIN_MAIN)],
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
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    args = json.loads((tmp_path / "trial" / "args.json").read_text())
    assert args["use_augmentation"] is True and args["gamma"] == 0.5 and args["train_loss"] == "cb"
