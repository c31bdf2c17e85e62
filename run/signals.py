"""Signals that stop a run after it has saved, or ask it to save."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from run.surroundings import is_follower, launched_by_torchrun

# that stop a run; Windows lacks SIGHUP
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
POLL_SECONDS = 0.5
CALL = "call_in_thread"  # name of the threads, which may never end
SECOND_SIGNAL_S = 1  # sooner, it is the same signal sent twice: to the process and to its process group
TORCHRUN_SIGNAL_S = 10  # torchrun, or a job queue, passes on later what it received itself


class Stopped(KeyboardInterrupt):
    """The run was stopped by SIGINT (Ctrl-C), SIGTERM (sent by job queues) or SIGHUP (the terminal was closed)."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number
        self.status = 128 + number  # as shells report it: 130, 143, 129


class Signals:
    """A context in which SIGINT, SIGTERM and SIGHUP raise `Stopped`; within `deferred`, at the next `raise_if_stopped`.

    A second signal ends the process at once. SIGUSR1, which job queues send as a warning, sets `save_requested`.
    Signals that were ignored when the process started (SIGINT in the background, SIGHUP under nohup) stay ignored.
    """

    current: "Signals | None" = None  # the one that handles the signals of this process

    def __init__(self):
        self.save_requested, self.saved = False, False  # saved: by this process, which can be resumed
        self._stopped_by, self._stopped_at, self._deferred = None, 0.0, False

    def __enter__(self):
        handlers = dict.fromkeys(STOP_SIGNALS, self._on_stop)
        if hasattr(signal, "SIGUSR1"):
            handlers[signal.SIGUSR1] = self._on_save
        self._previous = {
            number: signal.signal(number, handler)
            for number, handler in handlers.items()
            if signal.getsignal(number) != signal.SIG_IGN
        }
        self._pid, self._outer, Signals.current = os.getpid(), Signals.current, self
        return self

    def __exit__(self, *_):
        Signals.current = self._outer
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_stop(self, number, frame):
        if os.getpid() != self._pid:  # a worker that has just been forked: the main process ends it
            return
        if self._stopped_by:
            same = TORCHRUN_SIGNAL_S if launched_by_torchrun() else SECOND_SIGNAL_S
            if time.monotonic() - self._stopped_at > same:
                os._exit(128 + number)
            return
        self._stopped_by, self._stopped_at = number, time.monotonic()
        if not self._deferred:
            raise Stopped(number)
        with suppress(OSError):  # nobody reads it any more: tee ends at the same Ctrl-C
            # not print, which may be running when the signal arrives
            if not is_follower() and takes_bytes(1, seconds=0):
                os.write(1, b"stopping after this step; a second signal ends the process at once\n")

    def _on_save(self, number, frame):
        self.save_requested = True

    @property
    def stopped(self) -> bool:
        return self._stopped_by is not None

    @property
    def stopped_by(self) -> int:
        """The number of the signal, 0 for none."""
        return self._stopped_by or 0

    def raise_if_stopped(self) -> None:
        """Raises Stopped after a signal."""
        if self._stopped_by:
            raise Stopped(self._stopped_by)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this context a signal only sets `stopped`; `Stopped` is raised at its end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.raise_if_stopped()


def takes_bytes(descriptor: int, seconds: float) -> bool:
    """Whether a stream takes a line now or within `seconds`: a full pipe that nobody reads takes none."""
    return sys.platform == "win32" or bool(select.select([], [descriptor], [], seconds)[1])


@contextmanager
def interruptible() -> Iterator[None]:
    """For waits within `deferred`: a signal raises Stopped at once, or has been raised before the wait begins.

    What is waited for may never come: a batch from a disk or a process that does not answer.
    """
    signals = Signals.current
    if signals is None or not signals._deferred:
        yield
        return
    signals._deferred = False
    try:
        signals.raise_if_stopped()
        yield
    finally:
        signals._deferred = True


class Call:
    """A call of `function` in a thread of its own, which a signal never has to wait for, even if it never returns."""

    def __init__(self, function: Callable[[], Any]):
        self._outcome: list[tuple[Any, BaseException | None]] = []

        def call():
            try:
                self._outcome.append((function(), None))
            except BaseException as error:  # raised again in the thread that waits
                self._outcome.append((None, error))

        self._thread = threading.Thread(target=call, daemon=True, name=CALL)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def wait(self, while_waiting: Callable[[], None] = lambda: None) -> None:
        """Wait for the end. while_waiting: called about twice per second; it may raise to give up."""
        while self._thread.is_alive():
            self._thread.join(POLL_SECONDS)
            if self._thread.is_alive():
                while_waiting()

    def result(self) -> Any:
        """After its end: what the function has returned, or raises what it has raised."""
        result, error = self._outcome[0]
        if error is not None:
            raise error
        return result


def call_in_thread(function: Callable[[], Any], while_waiting: Callable[[], None] = lambda: None) -> Any:
    """-> what `function()` returns, which runs in a thread: so a signal ends the wait for it even if it never returns.

    Drivers of databases, for example, wait without looking at signals. while_waiting: see `Call.wait`.
    """
    call = Call(function)
    call.wait(while_waiting)
    return call.result()
