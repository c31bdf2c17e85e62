"""`log.txt` in the folder of a run: everything that it prints, except progress bars."""

import shlex
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOG_FILE = "log.txt"
EARLY_PIECES = 5000  # kept of what is printed before the folder of the run is known


class _Scope:
    """What belongs in one log. The text is kept in memory until the file is known."""

    def __init__(self):
        self.early, self.file = deque(maxlen=EARLY_PIECES), None

    def write(self, text):
        if self.file is None:
            self.early.append(text)
            return
        with suppress(OSError, ValueError):  # a full disk under the log does not stop the run
            self.file.write(text)


_scopes: list[_Scope] = []  # the outermost first; what is printed belongs in the logs of all of them


def keep_in_log(text: str) -> None:
    """Add printed text to every log."""
    for scope in _scopes:
        scope.write(text)


@contextmanager
def log_scope() -> Iterator[None]:
    """What the body prints belongs in one log more, from `start_log` on a file, with what was printed before.

    If the body raises, the log stays open for the message that follows, until `end_logs`.
    """
    scope = _Scope()
    _scopes.append(scope)
    yield
    _scopes.remove(scope)
    if scope.file:
        scope.file.close()


def start_log(run_dir: str | Path) -> None:
    """Append what belongs in the innermost log to `log.txt` of this folder, under a line with the time and command."""
    path = Path(run_dir, LOG_FILE)
    if not _scopes or _scopes[-1].file:
        return
    try:
        file = open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115, end_logs
    except OSError as error:
        print(f"warning: {path} cannot be written ({error.strerror}); nothing is logged there", file=sys.stderr)
        return
    early, _scopes[-1].file = _scopes[-1].early, file
    header = f"{time.strftime('%Y-%m-%d %H:%M:%S')} $ {shlex.join(sys.orig_argv)}\n"
    for text in (header, *early):
        _scopes[-1].write(text)


def end_logs() -> None:
    """Close all logs."""
    while _scopes:
        if file := _scopes.pop().file:
            with suppress(OSError):
                file.close()
