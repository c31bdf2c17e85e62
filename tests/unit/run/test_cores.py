"""The number of CPU cores."""

import joblib

from run.cores import num_cores


def test_num_cores_matches_joblib(monkeypatch):
    assert num_cores() == joblib.cpu_count()
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert num_cores() == 1
