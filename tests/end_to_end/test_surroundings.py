"""Whole runs where much is missing: streams, a home, a user name, TMPDIR, UTF-8 file names."""

import json
import os
import subprocess
import sys

import pytest
from helpers import PATIENCE, THIN_MAIN, TINY_FLAGS, write_class_folders

from run.files import read_rows

NAMES = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "TMPDIR", "PYTHONUTF8")
AS_NOBODY = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]  # a user id without a name


def can_be_nobody():
    """Whether this system lets a test run a command as another user."""
    try:
        return subprocess.run([*AS_NOBODY, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def run_bare(folder, *flags, closed, **environment):
    """main.py in `folder` without what NAMES are for. closed: redirections. -> CompletedProcess"""
    env = {name: value for name, value in os.environ.items() if name not in NAMES} | environment
    words = [sys.executable, str(THIN_MAIN), *map(str, flags)]
    if can_be_nobody():
        words = [*AS_NOBODY, *words]
    else:
        env["HOME"] = "nowhere"  # not absolute: no home either
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "<&-"])
def test_a_run_ends_whole_for_a_user_without_home_and_streams(tmp_path, data_dir, closed):
    run_dir = tmp_path / "run"
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--num_workers", 1, "--run_dir", run_dir]
    done = run_bare(tmp_path, *flags, closed=closed, WANDB_MODE="offline", TMPDIR=str(tmp_path / "gone"))
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "results.json").read_text())["epochs"] == 2
    assert len(read_rows(run_dir / "history.csv")) == 2 and list(run_dir.glob("wandb/offline-run-*"))
    assert os.listdir(tmp_path) == ["run"]  # no folder that is called ~
    if ">&-" not in closed:
        lines = done.stdout.splitlines()
        for start in ("TMPDIR: ", "image cache: this user has no home folder", "W&B: offline"):
            assert len([line for line in lines if line.startswith(start)]) == 1
        assert "W&B has failed" not in done.stdout and "Traceback" not in done.stderr


def test_korean_names_survive_the_locale_c(tmp_path):
    data = write_class_folders(tmp_path / "이마 주름", {"정상": 6, "주름": 5})
    flags = ["--data_dirs", data, *TINY_FLAGS, "--run_dir", tmp_path / "실행"]
    done = run_bare(tmp_path, *flags, closed="", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    assert f"results saved to {tmp_path / '실행'}" in done.stdout and "정상" in done.stdout
    assert json.loads((tmp_path / "실행" / "results.json").read_text(encoding="utf-8"))["classes"] == ["정상", "주름"]
