"""The command lines of child processes, and how the pool starts, stops and awaits them."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, wait_for

import ablate
import search
import study.process
from run.cli import UserError
from run.folder import locked
from run.signals import Signals, Stopped
from study.process import (
    ProcessPool,
    TrialProcess,
    check_main_flags,
    is_in_use,
    keep_best_model_only,
    without_flag,
)

# saves when it is asked to end, which takes a while; a second signal ends it at once, as with main.py
SLOW_TO_SAVE = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--run_dir") + 1])
folder.mkdir(exist_ok=True)
def save(*_):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    time.sleep(0.5)
    (folder / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
(folder / "started").touch()
time.sleep(60)
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The file that runs in the place of main.py."""
    path = tmp_path / "program.py"
    monkeypatch.setattr(study.process, "MAIN", path)
    return path


def test_a_run_gets_its_flags_its_folder_and_its_share_of_the_cores(program, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_RUN_ID", "2x3y4z5w")
    monkeypatch.setattr(study.process, "num_cores", lambda: 8)
    program.write_text(
        "import os; print(os.environ['WANDB_MODE'], os.environ.get('OMP_NUM_THREADS'), 'WANDB_RUN_ID' in os.environ)"
    )
    for jobs, threads in ((1, "None"), (2, "4"), (16, "1")):
        process = TrialProcess(["--gamma", "1 "], tmp_path / "runs" / f"run_{jobs}", jobs)
        process.wait()
        assert process.status == 0
        run_dir = tmp_path / "runs" / f"run_{jobs}"
        command = f"$ {sys.executable} {program} --gamma '1 ' --run_dir {run_dir} --auto_resume"
        assert process.log.read_text() == f"{command}\ndisabled {threads} False\n"


def test_processes_are_spread_over_the_gpus_unless_the_flags_name_a_device(program, tmp_path, monkeypatch):
    program.touch()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for flags, slot, device in (([], 3, "--device cuda:1 --run_dir"), (["--device", "cpu"], 3, "--device cpu --run")):
        process = TrialProcess(flags, tmp_path / f"run_{len(flags)}", 4, slot)
        process.wait()
        assert device in process.log.read_text()


def test_the_error_is_the_last_one_of_this_start(program, tmp_path):
    program.write_text("import sys; print('error: ' + sys.argv[2]); print('a warning')")
    for gamma in ("1", "2"):
        process = TrialProcess(["--gamma", gamma], tmp_path / "run")
        process.wait()
        assert process.error() == f"error: {gamma}"
    program.write_text("import os; os.kill(os.getpid(), 9)")
    process = TrialProcess([], tmp_path / "run")
    process.wait()
    assert process.error().startswith("killed by signal 9") and not process.was_stopped


def test_the_pool_reuses_the_lowest_free_slot(program, tmp_path):
    program.touch()
    pool = ProcessPool(3)
    first, second = (pool.start([], tmp_path / name) for name in "ab")
    assert (first.slot, second.slot, pool.num_free()) == (0, 1, 1)
    pool.wait()
    pool.release(first)
    assert pool.num_free() == 2 and pool.start([], tmp_path / "c").slot == 0
    pool.wait()


def test_after_a_signal_every_process_is_asked_once_to_save_and_none_outlives_the_pool(program, tmp_path, monkeypatch):
    monkeypatch.setattr(study.process, "POLL_SECONDS", 0.1)
    program.write_text(SLOW_TO_SAVE)
    pool = ProcessPool(2)
    processes = [pool.start([], tmp_path / name) for name in "ab"]
    for name in "ab":
        wait_for((tmp_path / name / "started").exists)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Stopped), Signals() as signals:
        pool.supervise(lambda: any(process.status is None for process in processes), signals)
    assert all(process.was_stopped for process in processes)
    assert all((tmp_path / name / "saved").exists() for name in "ab")


def test_a_process_that_does_not_end_after_a_signal_is_killed(program, tmp_path, monkeypatch):
    monkeypatch.setattr(study.process, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(study.process, "STOP_SECONDS", 0.5)
    program.write_text("import time; time.sleep(600)")
    pool = ProcessPool(1)
    process = pool.start([], tmp_path / "a")
    os.kill(process._process.pid, signal.SIGSTOP)  # as one that waits for a disk that does not answer
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Stopped), Signals() as signals:
        pool.supervise(lambda: process.status is None, signals)
    assert process.status == -signal.SIGKILL


def test_processes_are_stopped_if_their_supervision_fails(program, tmp_path):
    program.write_text("import time; time.sleep(60)")
    pool = ProcessPool(1)
    process = pool.start([], tmp_path / "a")
    with pytest.raises(ZeroDivisionError), Signals() as signals:
        pool.supervise(lambda: 1 / 0, signals)
    assert process.was_stopped


def test_a_left_over_process_is_asked_once_to_end(tmp_path):
    holder = (
        "import signal, sys, time; from run.folder import locked\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\n"
        "with locked(sys.argv[1]): print('holding', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    root = study.process.MAIN.parent
    with subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], cwd=root, **pipes) as process:
        assert process.stdout.readline() == "holding\n"
        pool = ProcessPool(1)
        assert is_in_use(tmp_path) and pool.stop_left_over(tmp_path)
        assert process.stdout.readline() == "asked\n"
        assert pool.stop_left_over(str(tmp_path))
        time.sleep(0.2)
        assert process.communicate()[0] == ""
    assert not pool.stop_left_over(tmp_path) and not pool.stop_left_over(tmp_path / "gone")


def test_a_left_over_process_that_does_not_end_is_an_error_once_all_others_have_ended(
    program, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(study.process, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(study.process, "STOP_SECONDS", 0)
    program.touch()
    (tmp_path / "stuck").mkdir()
    pool, polls = ProcessPool(1), iter(range(200))
    process = pool.start([], tmp_path / "a")

    def poll():
        if process in pool.processes and process.status is not None:
            pool.release(process)
        return pool.stop_left_over(tmp_path / "stuck") and next(polls, None) is not None

    with locked(tmp_path / "stuck"):
        (tmp_path / "stuck" / ".lock").write_text("process 17 on another\n")
        error = r"stuck is in use by process 17 on another, which has not ended within"
        with pytest.raises(UserError, match=error), Signals() as signals:
            pool.supervise(poll, signals)
    assert process.status == 0
    waiting = f"waiting for process 17 on another, which still works in {tmp_path / 'stuck'}\n"
    assert capsys.readouterr().out == waiting


def test_the_lock_names_its_process_as_the_pool_reads_it(tmp_path):
    with locked(tmp_path):
        assert re.match(r"process (\d+) on (.*)", (tmp_path / ".lock").read_text())[1] == str(os.getpid())


def test_flags_that_the_starting_program_sets_itself_are_refused():
    check_main_flags(["--gamma", "1", "--data_dirs", "runs"])
    for words in (["--run_dir", "x"], ["--resume=x"], ["--no-auto_resume"], ["--folds", "3"], ["--lr", "-1"]):
        with pytest.raises(UserError, match=words[0].partition("=")[0]):
            check_main_flags(words)


def test_a_flag_is_removed_with_its_values_whatever_its_form():
    words = ["--data_dirs", "a", "b", "--lr=1", "--use_augmentation", "--epochs", "3"]
    assert without_flag(words, "--data_dirs") == ["--lr=1", "--use_augmentation", "--epochs", "3"]
    for name in ("--lr", "--learning_rate"):
        assert without_flag(words, name) == ["--data_dirs", "a", "b", "--use_augmentation", "--epochs", "3"]
    assert without_flag(words, "--no-use_augmentation") == ["--data_dirs", "a", "b", "--lr=1", "--epochs", "3"]
    assert without_flag(words, "--epochs") == words[:-2]


def test_only_the_best_model_of_a_finished_run_is_kept(tmp_path):
    for name in ("last_model.pth", "best_model.pth", "history.csv"):
        (tmp_path / name).touch()
    keep_best_model_only(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"best_model.pth", "history.csv"}


@pytest.mark.parametrize("command, flags", [(search, ["sweep.yaml"]), (ablate, ["--epochs", "1"])])
def test_on_windows_the_commands_say_where_to_run_them(monkeypatch, capsys, command, flags):
    monkeypatch.setattr(study.process, "sys", SimpleNamespace(platform="win32"))
    assert command.main(flags) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and error.endswith("run them in the Windows Subsystem for Linux (WSL)")


@pytest.mark.parametrize("name", ["process", "optuna_search", "benchmark"])
def test_modules_are_imported_where_the_system_lacks_signals_and_resource(monkeypatch, name):
    """As Windows does."""
    for missing in ("SIGHUP", "SIGKILL"):
        monkeypatch.delattr(signal, missing)
    monkeypatch.setitem(sys.modules, "resource", None)
    spec = importlib.util.spec_from_file_location(f"copy_of_{name}", ROOT / "study" / f"{name}.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
