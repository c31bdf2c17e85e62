"""Signals: a second one ends the process, ignored ones stay ignored."""

import os
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT, wait_for

from run.signals import Signals, Stopped, call_in_thread, interruptible


def test_a_second_signal_ends_the_process_at_once_unless_it_is_a_duplicate():
    script = (
        "import os, signal, time\n"
        "from run.signals import Signals\n"
        "with Signals() as signals, signals.deferred():\n"
        "    for pause in (0, 0.01, 1.5):\n"
        "        time.sleep(pause)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print('still running', flush=True)\n"
        "    time.sleep(60)\n"
    )
    started = time.monotonic()
    completed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert completed.returncode == 143 and completed.stdout.count("still running") == 2
    assert time.monotonic() - started < 50


def test_ignored_signals_stay_ignored():
    """A run in the background of a shell, or under nohup, is not stopped by a Ctrl-C meant for another process."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert not signals.stopped
    finally:
        signal.signal(signal.SIGINT, previous)


def test_a_deferred_signal_ends_a_wait_at_once_whenever_it_came():
    """Before the wait, or during it; outside of waits it is only noted."""
    for sent_before in (True, False):
        with pytest.raises(Stopped), Signals() as signals, signals.deferred():
            if sent_before:
                signal.raise_signal(signal.SIGTERM)
            reached = "step"
            with interruptible():
                reached = "wait"
                threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM)).start()
                threading.Event().wait(60)
                reached = "end"
        assert reached == ("step" if sent_before else "wait")


def test_a_worker_that_has_just_been_forked_is_not_stopped_by_a_signal_to_the_process_group():
    with Signals():
        pid = os.fork()
        if pid == 0:
            try:
                signal.raise_signal(signal.SIGTERM)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0


def test_a_call_in_a_thread_returns_raises_and_is_given_up():
    assert call_in_thread(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        call_in_thread(lambda: 1 / 0)
    never, started = threading.Event(), time.monotonic()
    threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM)).start()
    with pytest.raises(Stopped), Signals():
        call_in_thread(never.wait)
    with pytest.raises(TimeoutError):
        call_in_thread(never.wait, give_up)
    assert time.monotonic() - started < 10


def give_up():
    raise TimeoutError


@pytest.mark.skipif(sys.platform != "linux", reason="looks into a pipe as Linux allows")
def test_a_signal_ends_a_process_whose_output_nobody_reads():
    script = """
from run.cli import end_process, run_command
from run.signals import Signals

def run(argv):
    with signals.deferred():
        while not signals.stopped:
            print("x" * 99, flush=True)

with Signals() as signals:
    end_process(run_command(run, []))
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **pipes) as process:
        process.stdout.read(1)
        with open(f"/proc/{process.pid}/fd/1", "wb") as pipe:
            wait_for(lambda: not select.select([], [pipe], [], 0)[1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143
        assert process.stderr.read() == b"stopped; resume with the same command\n"


def test_what_a_library_waits_for_when_python_ends_does_not_keep_the_process():
    script = "import atexit, threading, run.cli\nrun.cli.EXIT_SECONDS = 0.1\natexit.register(threading.Event().wait)"
    done = subprocess.run([sys.executable, "-c", f"{script}\nrun.cli.end_process(3)"], cwd=ROOT, timeout=20)
    assert done.returncode == 3
