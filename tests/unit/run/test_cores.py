"""The number of CPU cores, and threads that leave them to others."""

import os
import subprocess
import sys

import joblib
import pytest
from helpers import ROOT

from run.cores import let_waiting_threads_sleep, num_cores


def test_num_cores_matches_joblib(monkeypatch):
    assert num_cores() == joblib.cpu_count()
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert num_cores() == 1


def test_waiting_threads_sleep_unless_the_user_has_set_how_they_wait(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    let_waiting_threads_sleep()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    let_waiting_threads_sleep()
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="the OpenMP library of torch on Linux")
@pytest.mark.parametrize("command", ["main", "bench"])
def test_the_openmp_library_of_torch_takes_it_from_the_commands(command):
    """The library prints its settings when it is loaded: so they are set before torch is imported."""
    script = f"import {command}; {command}.main(['--device', 'none'] + {['--demo'] if command == 'main' else []})"
    environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        environment.pop(name, None)
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "GOMP_SPINCOUNT = '1000'" in process.stderr
