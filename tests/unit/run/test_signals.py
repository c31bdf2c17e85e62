"""Signals: a second one ends the process, ignored ones stay ignored."""

import signal
import subprocess
import sys
import time

from helpers import ROOT

from run.signals import Signals


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
