"""Training by several processes that torchrun has started: the same results, whatever happens to the processes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
from helpers import (
    PATIENCE,
    ROOT,
    THIN_MAIN,
    TINY_FLAGS,
    differences,
    history_but_times,
    run_main,
    wait_for,
    write_class_folders,
)
from thin_main import thin_resnet50

import resnet_custom
from model import load_checkpoint
from run.files import read_rows
from run.saver import BEST, LAST

THIN_RANKS = ROOT / "tests" / "tools" / "thin_ranks.py"
# 20 training images: the last batch of 6 has fewer images than 3 processes, and so has an evaluation of 8
# and a small learning rate, as Adam turns differences by rounding into steps of full size
COMMON = [*TINY_FLAGS, "--lr", "1e-5", "--amp", "off", "--batch_size", "6", "--save_minutes", "0", "--epochs", "3"]
COUNTS = {"0": 19, "2": 10, "10": 5}
METHODS = {
    "one_step": ["--batch_size", "36", "--epochs", "1", "--ema", "0.9"],
    "copies": ["--use_augmentation", "--mixup", "0.4", "--cutmix", "1", "--ema", "0.9", "--grad_accum", "2", "--tta"],
    "stages": ["--sampling", "progressive", "--drw_epoch", "1", "--crt_epochs", "1", "--train_loss", "ldam"],
    "long": ["--use_augmentation", "--save_every", "2", "--progressive", "--optimizer", "muon"],
    "table": ["--split", "0.5", "0.25", "0.25", "--subgroup_columns", "side", "--epochs", "1"],  # and --labels
    "own_statistics": ["--no-sync_bn", "--epochs", "1"],
}


def torchrun(processes, *flags, program=THIN_MAIN, **launch):
    """-> Popen"""
    launch_flags = [f"--{name}={value}" for name, value in {"nproc_per_node": processes, **launch}.items()]
    command = [sys.executable, "-m", "torch.distributed.run", *launch_flags, str(program), *map(str, flags)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"}  # main.py sets it before it imports torch
    return subprocess.Popen(command, start_new_session=True, env=environment, **pipes)


def end_of(process, seconds=PATIENCE):
    """-> what torchrun and its processes have printed"""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        for pid in (*pids_of(process).values(), process.pid):  # each is in a session of its own
            os.kill(pid, signal.SIGKILL)
        pytest.fail(f"still running: {process.communicate()[0]}")


def pids_of(process):
    """-> {rank: process id}"""
    pids = {}
    for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split():
        with open(f"/proc/{pid}/environ", "rb") as file:
            variables = dict(item.partition(b"=")[::2] for item in file.read().split(b"\0"))
        if b"RANK" in variables:
            pids[int(variables[b"RANK"])] = int(pid)
    return pids


@pytest.fixture(scope="module")
def folder(tmp_path_factory, worker_id):
    """What `train_by_every_method` makes; once, whichever of the workers of pytest-xdist comes first."""
    if worker_id == "master":
        folder = tmp_path_factory.mktemp("ranks")
        train_by_every_method(folder)
        return folder
    folder = tmp_path_factory.getbasetemp().parent / "ranks"  # shared by the workers
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            train_by_every_method(folder)
    return folder


@pytest.fixture
def images(folder):
    return folder / "images"


def train_by_every_method(folder):
    """Runs in `<method>_<number of processes>`, and those of more commands by two processes."""
    images = write_class_folders(folder / "images", COUNTS)
    table = folder / "labels.csv"
    table.write_text(
        "image,label,person_id,side\n"
        + "".join(f"{name}/{i:03d},{name},{name}_{i // 2},{i % 2}\n" for name in COUNTS for i in range(COUNTS[name]))
    )
    with_table = {"table": [*METHODS["table"], "--labels", table]}

    def start(processes, *more):
        commands = [
            ["--data_dirs", images, *COMMON, *flags, "--run_dir", folder / f"{method}_{processes}"]
            for method, flags in (METHODS | with_table).items()
        ]
        path = folder / f"{processes}.json"
        path.write_text(json.dumps([*commands, *more], default=str))
        return torchrun(processes, path, program=THIN_RANKS)

    evaluation = ["--eval_only", "--resume", folder / "copies_2" / BEST, "--tta", "--run_dir", folder / "evaluated"]
    cross_validation = ["--data_dirs", images, *COMMON, "--epochs", "1", "--folds", "2", "--run_dir", folder / "folds"]
    launched = [start(3, ["--help"]), start(2, evaluation, cross_validation), start(1)]
    for process in launched:
        output = end_of(process, 400)
        assert process.returncode == 0, output
        assert output.count("usage: ") == (process is launched[0])  # only the first process prints
        assert "Warning" not in output and "Traceback" not in output, output
    for method in METHODS:
        log = (folder / f"{method}_3" / "log.txt").read_text()
        assert log.count("results saved to") == log.count("image cache: 34") == log.count("training on cpu") == 1


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "own_statistics"])
def test_several_processes_train_as_one_does(folder, method, processes):
    alone, together = (folder / f"{method}_{number}" for number in (1, processes))
    for row, expected in zip(history_but_times(together), history_but_times(alone), strict=True):
        for name in ("train_loss", "val_loss", "learning_rate"):
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-3), name
    for split in ("val", "test"):
        rows, expected_rows = (read_rows(run / f"{split}_predictions.csv") for run in (together, alone))
        for row, expected in zip(rows, expected_rows, strict=True):
            assert row["path"] == expected["path"] and row["label"] == expected["label"]
            for name in expected:
                if name.startswith("prob_"):
                    assert float(row[name]) == pytest.approx(float(expected[name]), abs=1e-4)
    assert (together / "splits.json").read_bytes() == (alone / "splits.json").read_bytes()


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_keep_the_subjects_of_a_table_apart(folder, processes):
    alone, together = (folder / f"table_{number}" for number in (1, processes))
    splits = json.loads((together / "splits.json").read_text())
    # two images of a subject, whose numbers are in the order of the images
    subjects = [{(Path(path).parent.name, int(Path(path).stem) // 2) for path in paths} for paths in splits.values()]
    assert sum(map(len, subjects)) == len(set.union(*subjects)) == 10 + 5 + 3
    rows, expected = (read_rows(run / "test_predictions.csv") for run in (together, alone))
    columns = [[(row["person_id"], row["side"]) for row in of_run] for of_run in (rows, expected)]
    assert columns[0] == columns[1] and {name for name, _ in columns[0]} == {f"{c}_{i}" for c, i in subjects[2]}
    files = [read_rows(run / "subgroups.csv") for run in (together, alone)]
    assert [(row["value"], row["images"]) for row in files[0]] == [(row["value"], row["images"]) for row in files[1]]
    checkpoints = [load_checkpoint(run / LAST)["table"] for run in (together, alone)]
    assert all(checkpoint["subject_column"] == "person_id" for checkpoint in checkpoints)


@pytest.mark.parametrize("processes", [2, 3])
def test_the_gradient_of_the_first_step_is_that_of_one_process(folder, processes):
    def gradient(run):  # Adam's first moment after one step is a tenth of it
        states = load_checkpoint(run / LAST)["optimizer_state_dict"]["state"]
        return np.concatenate([state["exp_avg"].numpy().ravel() for state in states.values()])

    expected, found = gradient(folder / "one_step_1"), gradient(folder / f"one_step_{processes}")
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    assert not np.array_equal(found, expected)  # it was summed in other parts


def test_batch_norm_of_each_process_is_another_training(folder):
    alone, together = (history_but_times(folder / f"own_statistics_{number}") for number in (1, 2))
    assert abs(float(together[0]["train_loss"]) - float(alone[0]["train_loss"])) > 1e-4


def test_a_killed_process_is_restarted_and_the_result_has_the_same_bits(folder, images, tmp_path):
    flags = ["--data_dirs", images, *COMMON, *METHODS["long"], "--run_dir", tmp_path / "run", "--auto_resume"]
    process = torchrun(2, *flags, max_restarts=1)
    wait_for(lambda: (tmp_path / "run" / LAST).exists())
    os.kill(pids_of(process)[1], signal.SIGKILL)
    output = end_of(process)
    assert process.returncode == 0, output
    assert "resuming with epoch" in output and output.count("results saved to") == 1
    assert not differences(folder / "long_2", tmp_path / "run")


def test_two_machines_fill_their_own_caches_and_restart_together(folder, images, tmp_path, monkeypatch):
    """Two starts of torchrun with one process each; the second counts its restart, the first does not."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        launch = {"nnodes": 2, "rdzv_backend": "c10d", "rdzv_endpoint": f"localhost:{free.getsockname()[1]}"}
    flags = ["--data_dirs", images, *COMMON, *METHODS["long"], "--run_dir", tmp_path / "run", "--auto_resume"]
    flags += ["--wandb_mode", "offline"]
    machines = []
    for number in range(2):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache_{number}"))
        machines.append(torchrun(1, *flags, **launch, max_restarts=1))
    wait_for(lambda: (tmp_path / "run" / LAST).exists())
    pids = [pids_of(machine) for machine in machines]
    os.kill({**pids[0], **pids[1]}[1], signal.SIGKILL)
    outputs = [end_of(machine) for machine in machines]
    assert not any(machine.returncode for machine in machines), outputs
    assert sum(output.count("resuming with epoch") for output in outputs) == 1
    for number in range(2):
        assert len(list((tmp_path / f"cache_{number}").glob("skin-grading/*/*.pixels"))) == 1
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2  # one per start: only rank 0 logs
    for row, expected in zip(history_but_times(tmp_path / "run"), history_but_times(folder / "long_2"), strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(expected["train_loss"]), rel=1e-3)


def test_a_run_is_stopped_and_saved_once_and_resumed_by_another_number_of_processes(
    folder, images, tmp_path, monkeypatch
):
    flags = ["--data_dirs", images, *COMMON, *METHODS["long"], "--run_dir", tmp_path / "run"]
    process = torchrun(2, *flags)
    wait_for(lambda: (tmp_path / "run" / LAST).exists())
    process.terminate()
    output = end_of(process)
    assert output.count("stopped; resume with: torchrun ... main.py --resume") == 1
    assert "error:" not in output and output.count("Traceback") == 1  # that of torchrun itself
    checkpoint = load_checkpoint(tmp_path / "run" / LAST)
    assert checkpoint["position"] is None or checkpoint["position"]["images"] % 6 == 0
    monkeypatch.setattr(resnet_custom, "resnet50", thin_resnet50)
    assert run_main("--resume", tmp_path / "run" / LAST) == 0  # by one process
    expected = history_but_times(folder / "long_1")
    for row, expected_row in zip(history_but_times(tmp_path / "run"), expected, strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(expected_row["train_loss"]), rel=1e-3)


def test_a_process_that_fails_prints_its_line_and_the_others_end(images, tmp_path):
    copies = shutil.copytree(images, tmp_path / "images")
    flags = ["--data_dirs", copies, *COMMON, "--no_cache", "--epochs", "500", "--run_dir", tmp_path / "run"]
    process = torchrun(2, *flags)
    wait_for(lambda: (tmp_path / "run" / LAST).exists())
    for path in copies.glob("*/*.png"):
        path.write_bytes(b"no image")
    started = time.monotonic()
    output = end_of(process)
    assert time.monotonic() - started < 60
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and ".png" in lines[0], output
    assert process.returncode == 1 and output.count("Traceback") == 1  # that of torchrun itself
    assert re.search(r"Root Cause.*?exitcode\s+: 2 ", output, re.DOTALL), output


def test_a_process_that_does_not_answer_is_named(images, tmp_path, monkeypatch):
    monkeypatch.setenv("WAIT_SECONDS", "3")
    flags = ["--data_dirs", images, *COMMON, "--epochs", 500, "--run_dir", tmp_path / "run"]
    (tmp_path / "commands.json").write_text(json.dumps([list(map(str, flags))]))
    process = torchrun(2, tmp_path / "commands.json", program=THIN_RANKS)
    wait_for(lambda: (tmp_path / "run" / LAST).exists())
    frozen = pids_of(process)[1]
    os.kill(frozen, signal.SIGSTOP)
    try:
        wait_for(lambda: "connection is lost" in (tmp_path / "run" / "log.txt").read_text())
    finally:
        os.kill(frozen, signal.SIGKILL)
    assert f"lost to rank 1 on {socket.gethostname()} (" in end_of(process)


def test_a_job_of_slurm_saves_before_its_time_ends_and_is_queued_again(images, tmp_path):
    """The script of docs/, with stand-ins for the commands of Slurm."""
    for name, script in {
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "srun": 'exec "$@"',
        "scontrol": f'[ "$1" = requeue ] && touch {tmp_path}/requeued; echo localhost',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    program = tmp_path / "main.py"
    program.write_text(
        f"import runpy, sys; sys.path.insert(0, {str(THIN_MAIN.parent)!r})\n"
        f"runpy.run_path({str(THIN_MAIN)!r}, run_name='__main__')\n"
    )
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    environment = {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    flags = ["--data_dirs", images, *COMMON, "--epochs", 500]
    script = subprocess.Popen(
        ["bash", ROOT / "docs" / "slurm.sbatch", *map(str, flags)],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(lambda: (tmp_path / "runs" / "job_7" / LAST).exists())
    script.terminate()
    output = script.communicate(timeout=PATIENCE)[0]
    assert "stopped; resume with the same command" in output and (tmp_path / "requeued").exists(), output


def test_a_restart_that_would_begin_again_is_refused(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run_main("--data_dirs", images, *COMMON, "--run_dir", tmp_path / "run") == 2
    assert "--auto_resume" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_several_processes_evaluate_only_and_cross_validate(folder):
    results, expected = (json.loads((folder / run / "results.json").read_text()) for run in ("evaluated", "copies_2"))
    assert results["test"] == expected["test"] and results["tta"] == expected["tta"]
    assert (folder / "folds" / "folds.json").exists()
