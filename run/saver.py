"""When a run is saved, to which files, and the thread that writes them."""

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run.files import write_bytes, write_history
from run.ranks import agree, is_first
from run.signals import Call, Signals, Stopped

LAST, PREVIOUS, BEST, DAMAGED = "last_model.pth", "previous_model.pth", "best_model.pth", "damaged_model.pth"
RETRY_SECONDS = 60  # after the disk refused a checkpoint


class Saver:
    """Saves a run to its folder: after each epoch, within an epoch after `save_every` steps or `save_minutes` (0:
    never), on SIGUSR1, and before a signal ends the run.

    The training goes on while a thread writes what `snapshot` has copied. It waits only if the next save is due before
    the thread has finished, and before a signal ends the run, which a second signal does not wait for.
    So there is at most one copy of what a checkpoint holds (283 MB for the ResNet-50, 377 MB with --ema), and its file
    as bytes; a best model that waits for a disk is one file more.

    The files on disk can be resumed from at any moment: history.csv is written before the checkpoint that has its
    rows, and the best model no later than the checkpoint that follows its epoch. A disk that refuses does not stop the
    run: the previous checkpoint stays intact, the best model waits in memory, and saving is tried again.

    A context, at whose end nothing is being written any more, whatever ends it.
    """

    def __init__(
        self,
        run_dir: str | Path,
        snapshot: Callable[[dict | None], tuple[list[dict], Callable[[], bytes]]],
        signals: Signals,
        save_every: int = 0,
        save_minutes: float = 0,
    ):
        """snapshot: called with the state of the epoch, None between two epochs. -> (history, function that returns
        the checkpoint file, which the thread calls)"""
        self.run_dir, self._snapshot, self._signals = Path(run_dir), snapshot, signals
        self._save_every, self._save_seconds = save_every, 60 * save_minutes
        self._saved_at, self._saved_step = time.monotonic(), 0
        self._writing: Call | None = None
        # (history, checkpoint file), checkpoint file; until the thread has ended, only it may use them
        self._unsaved, self._unsaved_best = None, None
        self._when_saved: list[Callable[[], None]] = []  # of epochs that are not known to be saved yet
        self._failing = False

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_):
        self.wait()

    def after_step(self, running_metrics: Any) -> None:
        """Save if it is time to. Called where the run can be interrupted: after a step, or a batch of validation.

        running_metrics: `RunningMetrics` of the epoch. Raises Stopped after a signal, once the run is saved.
        """
        if self._writing and not self._writing.is_running:
            self.wait()  # returns at once
        stopped_by = agree(self._signals.stopped_by)  # all ranks stop after the same step
        if is_first() and (stopped_by or self._is_due(running_metrics.steps)):
            self._save(running_metrics.epoch_state())
            self._saved_step = running_metrics.steps
        if stopped_by:
            self.wait()
            raise Stopped(stopped_by)

    def after_epoch(
        self, is_best: bool, also_write: Callable[[], None] | None = None, when_saved: Callable[[], None] | None = None
    ) -> None:
        """also_write: called in the thread, after the files are written; when_saved: called in this one, once the epoch
        is on disk."""
        if not is_first():
            return
        self._save(None, is_best, also_write)
        self._saved_step = 0
        if when_saved:
            self._when_saved.append(when_saved)

    def wait(self) -> None:
        """Wait until nothing is being written any more."""
        self._wait(is_last_try=False)

    def finish(self) -> None:
        """Write what the disk has refused so far. Raises OSError if it still refuses."""
        self.wait()
        self._writing = Call(self._write)
        self._wait(is_last_try=True)

    def _is_due(self, steps):
        seconds = time.monotonic() - self._saved_at
        if self._failing:
            return seconds >= RETRY_SECONDS
        return (
            self._signals.save_requested
            or 0 < self._save_every <= steps - self._saved_step
            or 0 < self._save_seconds <= seconds
        )

    def _save(self, epoch_state, is_best=False, also_write=None):
        """Copy the state of the run, and begin to write it, after what is being written now."""
        self.wait()
        self._saved_at, self._signals.save_requested = time.monotonic(), False
        self._unsaved = None  # an older one: its memory is free for this one
        self._writing = Call(functools.partial(self._write, self._snapshot(epoch_state), is_best, also_write))

    def _write(self, snapshot=None, is_best=False, also_write=None):
        """Write what is not saved yet. Runs in the thread. Raises OSError."""
        if snapshot:
            history, checkpoint_file = snapshot
            self._unsaved = history, checkpoint_file()
            if is_best:
                self._unsaved_best = self._unsaved[1]
        try:
            if self._unsaved:
                history, checkpoint_file = self._unsaved
                write_history(self.run_dir / "history.csv", history)
                if not is_best:
                    self._write_best()
                write_bytes(self.run_dir / LAST, checkpoint_file, previous=PREVIOUS)
                self._unsaved, self._signals.saved = None, True
            self._write_best()  # the best model of this epoch is written last: the last model can restore it
        finally:
            if also_write:
                also_write()

    def _write_best(self):
        if self._unsaved_best is not None:
            write_bytes(self.run_dir / BEST, self._unsaved_best)
            self._unsaved_best = None

    def _wait(self, is_last_try):
        if self._writing is None:
            return
        self._writing.wait()
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except OSError as error:
            if is_last_try:
                raise
            if not self._failing:
                where = f"{error.filename or self.run_dir} ({error.strerror or error})"
                print(f"warning: cannot save {where}; earlier files are intact, trying again", file=sys.stderr)
            self._failing = True
            return
        if self._failing:
            print(f"saved again: {self.run_dir / LAST}", file=sys.stderr)
        self._failing = False
        while self._when_saved:
            self._when_saved.pop(0)()
