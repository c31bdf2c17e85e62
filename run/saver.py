"""When a run is saved, and to which files."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run.files import write_bytes, write_history
from run.ranks import agree, is_first
from run.signals import Signals, Stopped

LAST, PREVIOUS, BEST, DAMAGED = "last_model.pth", "previous_model.pth", "best_model.pth", "damaged_model.pth"
RETRY_SECONDS = 60  # after the disk refused a checkpoint


class Saver:
    """Saves a run to its folder: after each epoch, within an epoch after `save_every` steps or `save_minutes` (0:
    never), on SIGUSR1, and before a signal ends the run.

    The files on disk can be resumed from at any moment: history.csv is written before the checkpoint that has its
    rows, and the best model no later than the checkpoint that follows its epoch. A disk that refuses does not stop the
    run: the previous checkpoint stays intact, the best model waits in memory, and saving is tried again.
    """

    def __init__(
        self,
        run_dir: str | Path,
        snapshot: Callable[[dict | None], tuple[list[dict], bytes]],
        signals: Signals,
        save_every: int = 0,
        save_minutes: float = 0,
    ):
        """snapshot: called with the state of the epoch, None between two epochs. -> (history, checkpoint file)"""
        self.run_dir, self._snapshot, self._signals = Path(run_dir), snapshot, signals
        self._save_every, self._save_seconds = save_every, 60 * save_minutes
        self._saved_at, self._saved_step = time.monotonic(), 0
        self._unsaved, self._unsaved_best = None, None  # (history, checkpoint file), checkpoint file
        self._failing = False

    def after_step(self, running_metrics: Any) -> None:
        """Save if it is time to. Called where the run can be interrupted: after a step, or a batch of validation.

        running_metrics: `RunningMetrics` of the epoch. Raises Stopped after a signal.
        """
        stopped_by = agree(self._signals.stopped_by)  # all ranks stop after the same step
        if is_first() and (stopped_by or self._is_due(running_metrics.steps)):
            self._unsaved = self._snapshot(running_metrics.epoch_state())
            self._write()
            self._saved_step = running_metrics.steps
        if stopped_by:
            raise Stopped(stopped_by)

    def after_epoch(self, is_best: bool) -> None:
        if not is_first():
            return
        self._unsaved = self._snapshot(None)
        if is_best:
            self._unsaved_best = self._unsaved[1]
        self._write(is_best)
        self._saved_step = 0

    def finish(self) -> None:
        """Write what the disk has refused so far. Raises OSError if it still refuses."""
        self._write(is_last_try=True)

    def _is_due(self, steps):
        seconds = time.monotonic() - self._saved_at
        if self._failing:
            return seconds >= RETRY_SECONDS
        return (
            self._signals.save_requested
            or 0 < self._save_every <= steps - self._saved_step
            or 0 < self._save_seconds <= seconds
        )

    def _write(self, is_best=False, is_last_try=False):
        self._saved_at, self._signals.save_requested = time.monotonic(), False
        try:
            if self._unsaved:
                history, checkpoint_file = self._unsaved
                write_history(self.run_dir / "history.csv", history)
                if not is_best:
                    self._write_best()
                write_bytes(self.run_dir / LAST, checkpoint_file, previous=PREVIOUS)
                self._unsaved, self._signals.saved = None, True
            self._write_best()  # the best model of this epoch is written last: the last model can restore it
        except OSError as error:
            if is_last_try:
                raise
            if not self._failing:
                where = f"{error.filename or self.run_dir} ({error.strerror or error})"
                print(f"warning: cannot save {where}; earlier files are intact, trying again", file=sys.stderr)
            self._failing = True
        else:
            if self._failing:
                print(f"saved again: {self.run_dir / LAST}", file=sys.stderr)
            self._failing = False

    def _write_best(self):
        if self._unsaved_best is not None:
            write_bytes(self.run_dir / BEST, self._unsaved_best)
            self._unsaved_best = None
