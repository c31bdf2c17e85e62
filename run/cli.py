"""What every command shares: errors in one line, exit status, argument types, progress bars."""

import argparse
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import Any, NoReturn

from run.signals import CALL, POLL_SECONDS, Signals, Stopped, is_writable

FLUSH_SECONDS = 2  # for the last lines to be written when the process ends
THREAD_SECONDS = 2  # for all other threads to end


class UserError(Exception):
    """A mistake that the user can fix. It is printed as one `error:` line, and the command exits with status 2."""


class Damaged(UserError):
    """A file whose content is not what was written to it."""


def run_command(run: Callable[[list[str]], int | None], argv: list[str] | None) -> int:
    """Call `run(argv)`. -> exit status: its own or 0, 2 after a UserError or OSError, 128 + N after signal N.

    argv: None for the command line of the process.
    """
    with redirect_stdout(LossyStream(sys.stdout)), redirect_stderr(LossyStream(sys.stderr)):
        try:
            return run(sys.argv[1:] if argv is None else argv) or 0
        except UserError as error:
            # an error raised in a loader worker arrives with the traceback of that process in front of its text
            print(f"error: {str(error).rsplit('UserError: ', 1)[-1].strip()}", file=sys.stderr)
            return 2
        except OSError as error:
            if error.filename is None:
                raise
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
        except Stopped as stop:
            print("stopped; resume with the same command", file=sys.stderr)
            return stop.status


def end_process(status: int) -> NoReturn:
    """Leave the process after all its work: no signal changes its status any more, and nothing is waited for.

    A thread that still reads a file from a disk that does not answer, or a reader of the log that does not read, would
    keep the process for ever.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)

    def flush():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # AttributeError: there is no such stream
                stream.flush()

    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(FLUSH_SECONDS)
    # also those that were given up: at its exit, the library that they are in would wait for them
    others = [t for t in threading.enumerate() if (not t.daemon or t.name == CALL) and t is not threading.main_thread()]
    for thread in others:
        thread.join(THREAD_SECONDS / len(others))
    if flushing.is_alive() or any(t.is_alive() for t in others) or multiprocessing.active_children():
        os._exit(status)
    sys.exit(status)


class LossyStream:
    """A text stream that drops what it cannot write: a training outlives a full disk under its log, and `| tee`.

    After a signal, it also drops what it would have to wait for: a pipe that nobody reads.
    """

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: the stream is closed
            if self._is_read():
                self._stream.write(text)
        return len(text)

    def _is_read(self):
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError, AttributeError):  # in memory, or closed
            return True
        while not is_writable(descriptor, POLL_SECONDS):
            if Signals.current and Signals.current.stopped:
                return False
        return True

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


def progress_bar(iterable: Iterable | None, title: str, unit: str = "batch", total: int | None = None) -> Any:
    """A tqdm progress bar that is silent where there is no terminal."""
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    return tqdm(iterable, title, total, unit=unit, leave=False, dynamic_ncols=True, disable=quiet)


def first_line(error: BaseException) -> str:
    """The first line of an error whose text may fill a page."""
    return str(error).strip().partition("\n")[0]


# --------------------------------------------------------------------------------------------------------- parsing


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of exiting. Flags cannot be abbreviated."""

    def __init__(self, prog: str, description: str | None):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see python {self.prog} --help)")


def number(
    cast: type, low: float = -math.inf, high: float = math.inf, below: float = math.inf, above: float = -math.inf
) -> Callable[[str], Any]:
    """An argparse type: a finite number, low <= number <= high, above < number < below."""

    def parse(text):
        value = cast(text)
        if not (math.isfinite(value) and low <= value <= high and above < value < below):
            bounds = {"at least": low, "at most": high, "below": below, "above": above}
            expected = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
            raise argparse.ArgumentTypeError(f"must be {expected or 'a finite number'}, not {text}")
        return value

    parse.__name__ = cast.__name__
    return parse


def regex(text: str) -> str:
    """An argparse type: a regular expression."""
    try:
        return re.compile(text).pattern
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression ({error})") from error


def boolean(text: str) -> bool:
    """An argparse type: true or false."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def add_switch(group: argparse._ActionsContainer, name: str, default: bool, help: str) -> None:
    """`--name`, `--no-name`, and `--name=true` / `--name=false` as W&B sweeps write them."""
    group.add_argument(f"--{name}", nargs="?", const=True, default=default, type=boolean, metavar="BOOL", help=help)
    group.add_argument(
        f"--no-{name}", dest=name, action="store_false", default=argparse.SUPPRESS, help=f"turn --{name} off"
    )
