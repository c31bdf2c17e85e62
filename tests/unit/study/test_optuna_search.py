"""A search without its trials: the flags it makes, the settings of its study, and a storage that does not respond."""

import argparse
import os
import signal
import socket
import sqlite3
import threading
import time
from contextlib import closing

import pytest
import sqlalchemy
import yaml
from optuna.trial import TrialState

import study.process
from flags import build_parser
from run.cli import UserError
from run.folder import locked
from run.signals import Signals, Stopped
from study.optuna_search import IN_USE, STALE_SECONDS, Search, is_process, run_search, sqlite_url
from study.sweep_yaml import read_sweep

SWEEP = {
    "method": "random",
    "metric": {"name": "val_balanced_acc", "goal": "maximize"},
    "parameters": {"learning_rate": {"min": 1e-4, "max": 1e-2}, "gamma": {"values": [1, 2]}, "epochs": {"value": 7}},
}


def open_search(folder, *main_flags, storage=None, **changes):
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**SWEEP, **changes}))
    config = read_sweep(folder / "sweep.yaml", {"learning_rate", "gamma", "epochs"})
    own_flags = {"trials": 1, "jobs": 1, "search_dir": str(folder / "found"), "study": None, "search_seed": 0}
    return Search(argparse.Namespace(**own_flags, storage=storage), list(main_flags), config)


def test_flags_of_the_command_line_replace_those_of_the_sweep(tmp_path):
    search = open_search(tmp_path, "--gamma", "3", "--data_dirs", "a", "b")
    assert set(search.config.searched()) == {"learning_rate"} and search.epochs == 7
    flags = ["--epochs=7", "--learning_rate=0.1", "--best_metric", "val_balanced_acc"]
    assert search.command_flags({"learning_rate": 0.1}) == [*flags, "--gamma", "3", "--data_dirs", "a", "b"]


def test_a_sweep_wins_over_a_config_and_the_command_line_over_both(tmp_path):
    (tmp_path / "base.yaml").write_text("learning_rate: 1\nfolds: 3\nbeta: 0.9\nepochs: 9\ndata_dirs: [a]\n")
    for where in ("command line", "command of the sweep"):
        config, changes = ["--config", str(tmp_path / "base.yaml")], {}
        if where != "command line":
            changes, config = {"command": ["${program}", *config, "${args}"]}, []
        search = open_search(tmp_path, *config, "--epochs", "8", **changes)
        args = build_parser().parse_args(search.command_flags({"learning_rate": 0.1, "gamma": 1}))
        assert (args.learning_rate, args.beta, args.epochs, args.folds) == (0.1, 0.9, 8, None)
        assert search.constants.beta == 0.9 and args.data_dirs == ["a"]


def test_a_study_continues_with_the_settings_that_it_was_started_with(tmp_path):
    open_search(tmp_path, "--data_dirs", "a", "--gamma", "3")
    open_search(tmp_path, "--data_dirs", "a", "--gamma=3.0", "--num_workers", "2")  # which changes no result
    for flags, words in {
        ("--data_dirs", "a", "--gamma", "4"): r"\(--gamma: 3\.0, now 4\.0\)",
        ("--data_dirs", "a", "--gamma", "3", "--beta", "0.9"): r"\(--beta: 0\.999, now 0\.9\)",
        ("--data_dirs", "b", "--gamma", "3"): r"\(--data_dirs",
        ("--data_dirs", "a", "--gamma", "3", "--recipe", "strong"): r"\(--recipe: None, now strong\)",
    }.items():
        with pytest.raises(UserError, match=f"^--search_dir: the study found was started with other settings {words}"):
            open_search(tmp_path, *flags)
    with pytest.raises(UserError, match=r"\(method: random, now bayes\); choose another --search_dir$"):
        open_search(tmp_path, "--data_dirs", "a", "--gamma", "3", method="bayes")


def test_machines_that_share_a_storage_may_have_the_images_elsewhere(tmp_path):
    storage = sqlite_url(tmp_path / "shared.db")
    open_search(tmp_path, "--data_dirs", "a", storage=storage)
    open_search(tmp_path, "--data_dirs", "b", storage=storage)
    with pytest.raises(UserError, match=r"choose another --search_dir or --study$"):
        open_search(tmp_path, "--data_dirs", "b", "--beta", "0.9", storage=storage)


def test_a_signal_ends_the_search_even_if_the_storage_does_not_respond(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study.process, "POLL_SECONDS", 0.05)
    search = open_search(tmp_path, "--data_dirs", "a")

    def fail(*_, **__):
        raise sqlalchemy.exc.OperationalError("select", {}, Exception("the database is locked"))

    monkeypatch.setattr(search.study, "get_trials", fail)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Stopped), Signals() as signals:
        search.run_trials(signals)
    assert capsys.readouterr().out.count("warning: the storage does not respond") == 1


def test_a_signal_ends_the_search_even_if_the_storage_never_answers(tmp_path, monkeypatch):
    """The connection to a database server whose machine is gone: its driver waits and looks at no signal."""
    monkeypatch.setattr(study.process, "ANSWER_SECONDS", 0.1)
    search = open_search(tmp_path, "--data_dirs", "a")
    monkeypatch.setattr(search.study, "get_trials", lambda *_, **__: threading.Event().wait())
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Stopped), Signals() as signals:
        search.run_trials(signals)


def test_a_signal_ends_the_wait_for_a_locked_database_at_once(tmp_path):
    """SQLite waits in C, where Python cannot handle a signal."""
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    search_dir = tmp_path / "found"
    search_dir.mkdir()
    own_flags = {"sweep": str(tmp_path / "sweep.yaml"), "trials": 1, "jobs": 1, "search_dir": str(search_dir)}
    args = argparse.Namespace(**own_flags, study=None, search_seed=0, storage=None)
    with closing(sqlite3.connect(search_dir / "study.db")) as database:
        database.execute("begin exclusive")
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        started = time.monotonic()
        with pytest.raises(Stopped):
            run_search(args, ["--data_dirs", "a"])
        assert time.monotonic() - started < 3


def left_trial(folder, owner):
    """A trial of a search that may have been killed just now."""
    trial = open_search(folder, "--data_dirs", "a")._new_trial()
    for name, value in {"run_dir": str(folder / "found" / "trial_0000"), "owner": owner, "beat": time.time()}.items():
        trial.set_user_attr(name, value)
    return trial


@pytest.mark.parametrize(
    "owner", [f"{socket.gethostname()}:{os.getpid()}", "another:17"], ids=["same process id", "another host name"]
)
def test_a_restarted_search_resumes_its_trial_even_if_that_may_be_of_another_search(
    tmp_path, monkeypatch, capsys, owner
):
    """A restarted container has the same process id or another host name."""
    monkeypatch.setattr(study.process, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(study.process, "MAIN", tmp_path / "program.py")
    (tmp_path / "program.py").write_text(
        "import pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--run_dir') + 1])\n"
        "folder.mkdir()\n"
        "(folder / 'history.csv').write_text('epoch,val_balanced_acc\\n0,0.5\\n')\n"
    )
    left_trial(tmp_path, owner)
    search = open_search(tmp_path, "--data_dirs", "a")
    assert search._poll() and search._poll() and not search.pool.processes
    out = capsys.readouterr().out
    assert out == f"waiting up to 120 s for a sign that another search supervises trial 0 of {owner}\n"
    search.opened_at -= STALE_SECONDS  # the wait is over, also if the clock of the other machine is ahead
    with Signals() as signals:
        search.run_trials(signals)
    assert [trial.state for trial in search.study.trials] == [TrialState.COMPLETE]


def test_a_search_waits_for_no_trial_that_another_one_supervises_and_after_a_signal_for_none(tmp_path):
    trial = left_trial(tmp_path, "another:17")
    search, stopped = (open_search(tmp_path, "--data_dirs", "a") for _ in range(2))
    assert search._poll() and stopped._poll()
    stopped.pool.stop_all()
    assert not stopped._poll()
    trial.set_user_attr("beat", time.time() + 1)
    assert not search._poll() and not search.pool.processes


def test_a_trial_whose_folder_is_in_use_is_recognized_by_the_error_of_main(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match=IN_USE), locked(tmp_path):
        pass


def test_whether_a_process_runs():
    assert is_process(os.getpid()) and is_process(1)
    assert not is_process(2**22 + 1)  # above the highest id of Linux


def test_a_folder_whose_name_a_url_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--search_dir: .* is not valid UTF-8; name another folder"):
        sqlite_url(tmp_path / "\udcc1" / "study.db")
