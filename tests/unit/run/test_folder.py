"""The folder of a run: created, locked, and cleaned up."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import ROOT

import run.folder
import run.saver
from run.cli import UserError
from run.folder import locked, new_folder, open_or_create_folder, timestamped


def test_a_file_system_without_locks_gives_a_warning_only(copied_run, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for _ in range(2):
        with locked(copied_run):
            assert "cannot be locked (Function not implemented)" in capsys.readouterr().err


def test_a_lock_into_which_nothing_can_be_written_is_a_lock_all_the_same(copied_run, monkeypatch, capsys):
    """Windows refuses to write to a locked file."""

    def refused(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "write_text", refused)
    with locked(copied_run), pytest.raises(UserError, match="is in use by"), locked(copied_run):
        pass
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["args.json", "folds_begun.json", "ablation.json", "last_model.pth", ".lock"])
def test_a_folder_of_runs_is_recognized_without_its_hidden_files(tmp_path, name):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="is not the folder of a run"), open_or_create_folder(tmp_path, "--run_dir"):
        pass
    (tmp_path / name).touch()
    with open_or_create_folder(tmp_path, "--run_dir") as folder:
        assert folder == tmp_path


def test_a_process_that_loses_the_race_for_a_new_folder_leaves_it_intact(tmp_path, monkeypatch):
    @contextmanager
    def locked_by_another(folder):
        (folder / "args.json").touch()
        raise UserError("in use")
        yield

    monkeypatch.setattr(run.folder, "locked", locked_by_another)
    with pytest.raises(UserError, match="in use"), run.folder.new_folder(tmp_path / "run", "--run_dir"):
        pass
    assert (tmp_path / "run" / "args.json").exists()


def test_a_killed_process_releases_its_lock_and_its_temporary_files_are_deleted(copied_run):
    script = (
        "import run.folder, sys\n"
        "with run.folder.locked(sys.argv[1]):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, copied_run]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {process.pid} on"), locked(copied_run):
        pass
    process.kill()
    process.wait()
    for name in (".last_model.pth.123.tmp", ".of_another_program.tmp"):
        (copied_run / name).write_bytes(b"half")
    with locked(copied_run):
        assert [path.name for path in copied_run.glob(".*.tmp")] == [".of_another_program.tmp"]


def test_runs_started_in_the_same_second_get_numbered_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda pattern: "20260101_120000")
    names = []
    for _ in range(3):
        with new_folder(timestamped(tmp_path / "checkpoints"), "--output_dir", numbered=True) as folder:
            names.append(folder.name)
    assert names == [f"checkpoints_20260101_120000{suffix}" for suffix in ("", "_2", "_3")]


def test_folders_that_exist_or_cannot_be_created_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for name, reason in [(".", "exists"), ("file", "exists"), ("dangling", "exists"), ("file/run", "Not a directory")]:
        with pytest.raises(UserError, match=f"--run_dir: .*{reason}"), new_folder(tmp_path / name, "--run_dir"):
            pass


def test_a_trailing_slash_puts_the_run_inside_the_folder(tmp_path):
    assert timestamped(f"{tmp_path}/checkpoints/").startswith(f"{tmp_path}/checkpoints/2")
    assert timestamped(f"{tmp_path}/a/../checkpoints").startswith(f"{tmp_path}/checkpoints_2")


def test_the_folder_of_a_refused_run_is_deleted_unless_it_has_a_checkpoint(tmp_path):
    for name in ("args.json", "last_model.pth"):
        with pytest.raises(UserError), new_folder(tmp_path / "run", "--run_dir") as folder:
            (folder / name).touch()
            raise UserError("this run does not exist on W&B")
        assert (tmp_path / "run").exists() is (name == "last_model.pth")


def test_a_new_folder_that_stays_empty_is_deleted_with_its_new_parents(tmp_path):
    for has_a_file in (False, True):
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a" / "run", "--run_dir") as folder:
            if has_a_file:
                (folder / "last_model.pth").touch()
            raise KeyboardInterrupt
        assert (tmp_path / "a").exists() is has_a_file


def test_the_root_of_the_file_system_is_not_a_new_folder():
    with pytest.raises(UserError, match="--run_dir: / already exists"), new_folder("/", "--run_dir"):
        pass
