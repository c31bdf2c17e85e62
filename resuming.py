"""A run that can be stopped anywhere and go on as if it had not been: signals, when it is saved, to what files."""

import math
import os
import signal
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

from files import Damaged, LossyStream, UserError, write_history
from model import checkpoint_bytes, load_checkpoint, save_checkpoint

LAST, PREVIOUS, BEST, DAMAGED = "last_model.pth", "previous_model.pth", "best_model.pth", "damaged_model.pth"
RETRY_SECONDS = 60  # after a disk has refused a checkpoint
SECOND_SIGNAL_S = 1  # what comes sooner is the same signal by another way, of a queue and of the process group


# --------------------------------------------------------------------------------------------------------- signals


class Stopped(KeyboardInterrupt):
    """SIGINT (Ctrl-C), SIGTERM (of a queue that takes the machine away) or SIGHUP (a lost terminal) ended the run."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number
        self.status = 128 + number  # the exit status that shells know: 130, 143, 129


class Signals:
    """A context in which SIGINT, SIGTERM and SIGHUP raise `Stopped`; within `deferred`, at the next `raise_if_stopped`.

    A second one ends the process at once. SIGUSR1, with which queues warn, sets `save_wanted`. What was ignored when
    the process began (SIGINT in the background, SIGHUP under nohup) stays ignored.
    """

    def __init__(self):
        self.save_wanted, self.saved = False, False  # saved: by this process, so that it can be gone on with from there
        self._stopped_by, self._stopped_at, self._deferred = None, 0.0, False

    def __enter__(self):
        stops = dict.fromkeys(("SIGINT", "SIGTERM", "SIGHUP"), self._on_stop)
        handlers = {**stops, "SIGUSR1": self._on_save}
        handlers = {getattr(signal, name): handler for name, handler in handlers.items() if hasattr(signal, name)}
        self._former = {
            number: signal.signal(number, handler)
            for number, handler in handlers.items()
            if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_):
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _on_stop(self, number, frame):
        if self._stopped_by:
            if time.monotonic() - self._stopped_at > SECOND_SIGNAL_S:
                os._exit(128 + number)
            return
        self._stopped_by, self._stopped_at = number, time.monotonic()
        if not self._deferred:
            raise Stopped(number)
        with suppress(OSError):  # to where nobody reads any more, as tee ends of the same Ctrl-C
            # not by print, which may be at work when the signal comes
            os.write(1, b"stopping after this step; a second signal ends the process at once\n")

    def _on_save(self, number, frame):
        self.save_wanted = True

    @property
    def stopped(self):
        return self._stopped_by is not None

    def raise_if_stopped(self):
        if self._stopped_by:
            raise Stopped(self._stopped_by)

    @contextmanager
    def deferred(self):
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.raise_if_stopped()


def exit_status(run, argv):
    """Run a command. -> its own exit status, or 0 done, 2 a mistake of the user's, 128 + N stopped by signal N."""
    with redirect_stdout(LossyStream(sys.stdout)), redirect_stderr(LossyStream(sys.stderr)):
        try:
            return run(argv) or 0
        except UserError as error:
            # an error raised in a loader worker arrives with that process's traceback in front of its text
            print(f"error: {str(error).rsplit('UserError: ', 1)[-1].strip()}", file=sys.stderr)
            return 2
        except OSError as error:
            if error.filename is None:
                raise
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
        except Stopped as stop:
            print("stopped; go on with the same command", file=sys.stderr)
            return stop.status


# ---------------------------------------------------------------------------------------------------------- saving


class Keeper:
    """Saves a run to its folder: after each epoch, after `save_every` steps or `save_minutes` (0: never) of one, on
    SIGUSR1, and before a signal ends it.

    What is on disk can be gone on with at any moment: history.csv is written before the checkpoint that counts its
    rows, and the best model no later than the checkpoint after its epoch. A disk that refuses stops nothing: the former
    checkpoint stays whole, the best model waits in memory, and it is tried again.
    """

    def __init__(self, run_dir, make_checkpoint, signals, save_every=0, save_minutes=0):
        """make_checkpoint: called with the position in the epoch, or None, -> the checkpoint of the run as it is."""
        self.run_dir, self._make_checkpoint, self._signals = Path(run_dir), make_checkpoint, signals
        self._save_every, self._save_seconds = save_every, 60 * save_minutes
        self._saved_at, self._saved_step = time.monotonic(), 0
        self._unsaved, self._unsaved_best = None, None  # (checkpoint, its bytes), bytes
        self._failing = False

    def visit(self, figures):
        """Save if it is time to, at a place where the run can be left: after a step, or a batch of validation.

        figures: the epoch's `RunningFigures`. Raises Stopped after a signal.
        """
        if self._is_due(figures) or self._signals.stopped:
            self._save(figures.position())
            self._saved_step = figures.steps
        self._signals.raise_if_stopped()

    def _is_due(self, figures):
        seconds = time.monotonic() - self._saved_at
        if self._failing:
            return seconds >= RETRY_SECONDS
        return (
            self._signals.save_wanted
            or 0 < self._save_every <= figures.steps - self._saved_step
            or 0 < self._save_seconds <= seconds
        )

    def end_epoch(self, is_best):
        self._saved_step = 0
        self._save(None, is_best)

    def _save(self, position, is_best=False):
        checkpoint = self._make_checkpoint(position)
        self._unsaved = checkpoint, checkpoint_bytes(checkpoint)
        if is_best:
            self._unsaved_best = self._unsaved[1]
        self._saved_at, self._signals.save_wanted = time.monotonic(), False
        try:
            self._write(is_best)
        except OSError as error:
            if not self._failing:
                where = f"{error.filename or self.run_dir} ({error.strerror or error})"
                print(f"warning: cannot save {where}; what was saved before is whole, trying again", file=sys.stderr)
            self._failing = True
        else:
            if self._failing:
                print(f"saved again: {self.run_dir / LAST}", file=sys.stderr)
            self._failing = False

    def _write(self, is_best):
        if self._unsaved:
            checkpoint, content = self._unsaved
            write_history(self.run_dir / "history.csv", checkpoint["history"])
            if not is_best:
                self._write_best()
            save_checkpoint(self.run_dir / LAST, content, former=PREVIOUS)
            self._unsaved, self._signals.saved = None, True
        self._write_best()  # that of this epoch after the last model, from which it can be mended

    def _write_best(self):
        if self._unsaved_best is not None:
            save_checkpoint(self.run_dir / BEST, self._unsaved_best)
            self._unsaved_best = None

    def finish(self):
        """Write what a disk has refused so far. Raises OSError if it still does."""
        self._write(is_best=False)


# ------------------------------------------------------------------------------------------------------- going on


def checkpoint_to_go_on_with(run_dir):
    """-> (path, checkpoint) of the last one in a run's folder, or of the one before if that is damaged; else None.

    Raises UserError if none of those that are there can be read.
    """
    errors = []
    for path in (Path(run_dir, LAST), Path(run_dir, PREVIOUS)):
        if not path.exists():
            continue
        try:
            checkpoint = load_checkpoint(path, "--auto_resume")
        except Damaged as error:
            errors.append(str(error))
            continue
        if errors:
            print(f"warning: {errors[0]}; it is kept as {DAMAGED}, going on with {path.name}", file=sys.stderr)
        return path, checkpoint
    if errors:
        raise UserError(f"{'; '.join(errors)}; to start again from nothing, take {run_dir} away")
    if Path(run_dir, BEST).exists():
        raise UserError(f"--auto_resume: {run_dir} has no {LAST}; go on with --resume {Path(run_dir, BEST)}")
    return None


def set_damaged_aside(run_dir):
    """Keep a damaged last checkpoint under another name: the next save would put it in the place of the one before."""
    with suppress(FileNotFoundError):
        os.replace(Path(run_dir, LAST), Path(run_dir, DAMAGED))


def settle_best_model(checkpoint, path, run_dir):
    """-> (metric, epoch) of the best model so far, whose best_model.pth is as it should be after this.

    A crash can have left that file one epoch behind the checkpoint of `path`, which then mends it; or ahead of it, if
    it is an older one that the run goes on with: then the model stays, as those epochs will come again.
    Raises UserError if the file is damaged or of another run.
    """
    so_far, best_path = (checkpoint["best_metric"], checkpoint["best_epoch"]), Path(run_dir, BEST)
    is_best_itself = checkpoint["position"] is None and checkpoint["epoch"] == checkpoint["best_epoch"]
    best, damage = None, None
    if best_path.exists():
        try:
            best = load_checkpoint(best_path)
        except Damaged as error:
            damage = error
    if best and best["classes"] == checkpoint["classes"]:
        found = best["best_metric"], best["best_epoch"]
        same_past = best["history"][: len(checkpoint["history"])] == checkpoint["history"]
        if found == so_far or (best["epoch"] > checkpoint["best_epoch"] and same_past):
            return found
    if is_best_itself:
        save_checkpoint(best_path, checkpoint_bytes(checkpoint))
        return so_far
    if damage:
        raise UserError(f"{damage}; put it back, or remove it, and the best of the epochs to come is kept")
    if best:
        raise UserError(
            f"--resume: {best_path} is not the best model of {path} (of epoch {best['epoch']}, not "
            f"{checkpoint['best_epoch']}); put the right one beside it"
        )
    if checkpoint["best_epoch"] >= 0:
        print(f"warning: {best_path} is not there; the best of the epochs to come is kept", file=sys.stderr)
    return -math.inf, -1
