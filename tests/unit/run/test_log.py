"""log.txt: what is printed, but for progress bars, whenever its folder becomes known."""

import io
import sys

import pytest

from run.cli import UserError, progress_bar, run_command
from run.log import log_scope, start_log


def lines_of(folder):
    return (folder / "log.txt").read_text(encoding="utf-8").splitlines()


def test_the_log_has_what_is_printed_before_and_after_its_folder_is_known(tmp_path):
    def run(argv):
        print("early")
        print("a warning", file=sys.stderr)
        start_log(tmp_path)
        print("주름 late")
        return 0

    assert run_command(run, []) == 0
    command, *lines = lines_of(tmp_path)
    assert " $ " in command and lines == ["early", "a warning", "주름 late"]
    run_command(run, [])
    assert lines_of(tmp_path)[5:] == lines  # appended


def test_the_log_has_the_error_that_ends_the_run(tmp_path, capsys):
    def refused(argv):
        with log_scope():
            start_log(tmp_path)
            raise UserError("--gamma: no")

    def broken(argv):
        start_log(tmp_path)
        raise ZeroDivisionError("a bug")

    assert run_command(refused, []) == 2
    assert lines_of(tmp_path)[1:] == ["error: --gamma: no"]
    with pytest.raises(ZeroDivisionError):
        run_command(broken, [])
    assert lines_of(tmp_path)[-1] == "ZeroDivisionError: a bug"


def test_progress_bars_are_not_logged(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)

    def run(argv):
        start_log(tmp_path)
        for _ in progress_bar(range(3), "validation"):
            print("a warning", file=sys.stderr)

    run_command(run, [])
    assert "validation" in terminal.getvalue() and lines_of(tmp_path)[1:] == ["a warning"] * 3


def test_an_inner_log_has_its_part_and_the_outer_one_everything(tmp_path):
    def run(argv):
        start_log(tmp_path)
        for name in "ab":
            with log_scope():
                print(name)
                (tmp_path / name).mkdir()
                start_log(tmp_path / name)
        print("summary")

    run_command(run, [])
    assert lines_of(tmp_path)[1:] == ["a", "b", "summary"]
    assert lines_of(tmp_path / "a")[1:] == ["a"] and lines_of(tmp_path / "b")[1:] == ["b"]


def test_a_log_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "log.txt").mkdir()
    assert run_command(lambda argv: start_log(tmp_path), []) == 0
    assert f"warning: {tmp_path}/log.txt cannot be written" in capsys.readouterr().err
