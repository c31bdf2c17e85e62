"""A W&B run of the real client, offline, and the curves that are logged to it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from flags import build_parser
from run.files import HISTORY_COLUMNS
from run.progress import Progress
from tracking import WandbRun, precision_recall_points


def kill_wandb_process():
    for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        if b"wandb-core" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch):
    """The client leaves its process in the environment, for programs that are started later."""
    monkeypatch.setenv("WANDB_SERVICE", "")


def test_the_summary_always_has_the_metrics_of_the_best_epoch(tmp_path):
    args = build_parser().parse_args(["--wandb_mode", "offline"])
    progress = Progress()
    with WandbRun(args, tmp_path, None, {"0": 3, "1": 2}) as run:
        for epoch, metric in enumerate([0.3, 0.7, 0.5]):
            row = {
                **dict.fromkeys(HISTORY_COLUMNS, metric / 2),
                "epoch": epoch,
                "val_balanced_acc": metric,
                "val_recall": {},
            }
            progress.add_epoch(row, "val_balanced_acc")
            run.log_epoch(row, progress)
        summary = dict(run._run.summary)
    assert summary["val_balanced_acc"] == 0.7 and summary["train_loss"] == 0.35
    assert summary["epoch"] == 2 and summary["best_epoch"] == 1


def test_a_killed_wandb_process_is_reported_once_and_does_not_stop_the_training(tmp_path, capsys):
    args = build_parser().parse_args(["--wandb_mode", "offline"])
    progress = Progress()
    with WandbRun(args, tmp_path, None, {"0": 3, "1": 2}) as run:
        kill_wandb_process()
        for epoch in range(3):
            row = {**dict.fromkeys(HISTORY_COLUMNS, 0.5), "epoch": epoch, "val_recall": {}}
            progress.add_epoch(row, "val_balanced_acc")
            run.log_epoch(row, progress)
            time.sleep(0.2)
    assert capsys.readouterr().out.count("warning: W&B has failed") == 1


def test_a_run_whose_wandb_process_is_killed_at_the_start_is_offline(tmp_path, capsys, monkeypatch):
    def start_online(run, arguments):
        kill_wandb_process()
        raise ConnectionError("no answer")

    monkeypatch.setattr(WandbRun, "_start_online", start_online)
    args = build_parser().parse_args(["--wandb_mode", "online"])
    with WandbRun(args, tmp_path, None, {"0": 3, "1": 2}):
        pass
    assert "W&B: offline (no answer)" in capsys.readouterr().out and list(tmp_path.glob("wandb/offline-run-*"))


def test_precision_at_a_recall_is_the_best_at_this_recall_or_more():
    targets = np.array([1, 0, 1, 0, 1, 0])
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.1])  # precision 1 at recall 1/3, 2/3 at 2/3, 3/5 at 1
    rows = precision_recall_points(targets, np.column_stack([1 - scores, scores]), ["low", "high"], points=4)
    curve = [(recall, precision) for name, recall, precision in rows if name == "high"]
    assert curve == [pytest.approx(p) for p in [(0, 1), (1 / 3, 1), (2 / 3, 2 / 3), (1, 3 / 5)]]
    assert len(rows) == 8


def test_a_run_without_wandb_does_not_wait_for_the_imports_of_those_with_it():
    script = "import sys, metrics, tracking; print(*{'wandb', 'sklearn', 'scipy', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
