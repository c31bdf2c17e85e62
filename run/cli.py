"""What every command shares: errors in one line, exit status, argument types, progress bars."""

import argparse
import ast
import atexit
import csv
import glob
import math
import multiprocessing
import os
import re
import signal
import sys
import textwrap
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from typing import Any, NoReturn

from run.log import end_logs, keep_in_log, log_scope
from run.signals import CALL, POLL_SECONDS, STOP_SIGNALS, Signals, Stopped, takes_bytes
from run.surroundings import (
    is_follower,
    launched_by_torchrun,
    launched_several_times,
    no_temporary_folder,
    prepare_surroundings,
)

FLUSH_SECONDS = 2  # for the last lines to be written when the process ends
THREAD_SECONDS = 2  # for all other threads to end
EXIT_SECONDS = 10  # for libraries to end what they have started


class UserError(Exception):
    """A mistake that the user can fix. It is printed as one `error:` line, and the command exits with status 2."""


class Damaged(UserError):
    """A file whose content is not what was written to it."""


def run_command(
    run: Callable[[list[str]], int | None], argv: list[str] | None, in_several_processes: bool = False
) -> int:
    """Call `run(argv)`. -> exit status: its own or 0, 2 after a UserError or OSError, 128 + N after signal N.

    argv: None for the command line of the process. in_several_processes: whether torchrun may start the command.
    """
    prepare_surroundings(is_own_process=argv is None)  # before any file is opened
    for stream in (sys.stdout, sys.stderr):  # lines appear at once, also in a log; any file name can be printed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(LossyStream(sys.stdout)))
        stack.enter_context(redirect_stderr(LossyStream(sys.stderr)))
        stack.callback(end_logs)
        stack.enter_context(log_scope())
        try:
            is_allowed = in_several_processes and launched_by_torchrun()
            if problem := (not is_allowed and launched_several_times()) or no_temporary_folder():
                raise UserError(problem)
            return run(sys.argv[1:] if argv is None else argv) or 0
        except UserError as error:
            # an error raised in a loader worker arrives with the traceback of that process in front of its text
            return _print_error(str(error).rsplit("UserError: ", 1)[-1].strip())
        except OSError as error:
            if error.filename is None:
                raise
            return _print_error(f"{error.filename}: {error.strerror}")
        except Stopped as stop:
            print("stopped; resume with the same command", file=sys.stderr)
            return stop.status
        except Exception:
            keep_in_log(traceback.format_exc())  # which Python prints later
            raise


def _print_error(text):
    print(f"error: {printable(text)}", file=sys.stderr)  # in one line, whatever the names of files are
    return 2


def end_process(status: int) -> NoReturn:
    """Leave the process after all its work: no signal changes its status any more, and nothing is waited for.

    A thread that still reads a file from a disk that does not answer, a reader of the log that does not read, or a
    process that a library waits for when Python ends, would keep the process for ever.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

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
    ending = threading.Event()

    def end_anyway():
        ending.wait()
        time.sleep(EXIT_SECONDS)
        os._exit(status)

    threading.Thread(target=end_anyway, daemon=True).start()
    atexit.register(ending.set)  # the first to be called: a shell that goes on after the command is not ended
    sys.exit(status)


class LossyStream:
    """A text stream that drops what it cannot write: a training outlives a full disk under its log, and `| tee`.

    After a signal, it also drops what it would have to wait for: a pipe that nobody reads.

    What is written is kept in the log of the run too, except through `unlogged`.
    """

    def __init__(self, stream, is_logged: bool = True):
        self._stream, self._is_logged = stream, is_logged

    @property
    def unlogged(self) -> "LossyStream":
        return LossyStream(self._stream, is_logged=False)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: the stream is closed
            if self._is_read():
                self._stream.write(text)
        if self._is_logged:
            keep_in_log(text)
        return len(text)

    def _is_read(self):
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError, AttributeError):  # in memory, or closed
            return True
        while not takes_bytes(descriptor, POLL_SECONDS):
            if Signals.current and Signals.current.stopped:
                return False
        return True

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


def progress_bar(iterable: Iterable | None, title: str, unit: str = "batch", total: int | None = None) -> Any:
    """A tqdm progress bar that is silent where there is no terminal, and in all but one of several processes."""
    from tqdm import tqdm

    quiet, stream = is_follower() or not sys.stderr.isatty(), getattr(sys.stderr, "unlogged", sys.stderr)
    return tqdm(iterable, title, total, unit=unit, leave=False, dynamic_ncols=True, disable=quiet, file=stream)


def printable(name: str) -> str:
    """-> a name in one line, with escapes for control characters and for what is not valid UTF-8."""
    if name.isprintable():  # nearly always
        return name
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in name)


def first_line(error: BaseException) -> str:
    """The first line of an error whose text may fill a page."""
    return str(error).strip().partition("\n")[0]


def attempt(action: Callable[[], Any], failure: str) -> Any:
    """Do what is only informative. -> what `action()` returns; if it raises, None, after a line that starts with
    `failure`."""
    try:
        return action()
    except Exception as error:
        print(f"warning: {failure} ({first_line(error) or type(error).__name__})")
        return None


# --------------------------------------------------------------------------------------------------------- parsing


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One entry per flag, as in docs/flags.md: a switch without its `--no-X`, several values as `DIR...`."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, max_help_position=32, **options)

    def _split_lines(self, text, width):
        return textwrap.wrap(text, width, break_on_hyphens=False)  # --flags and file names stay whole

    def add_argument(self, action: argparse.Action) -> None:
        if not isinstance(action, argparse._StoreFalseAction):
            super().add_argument(action)

    def _format_action_invocation(self, action):
        takes_value = action.nargs != 0 and action.type is not boolean
        names = self._metavar_formatter(action, action.dest.upper())(
            action.nargs if isinstance(action.nargs, int) else 1
        )
        values = " ".join(names) + ("..." if action.nargs == "+" else "") if takes_value else ""
        return f"{', '.join(action.option_strings)} {values}".strip()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of exiting. Flags cannot be abbreviated; `--image-size` is
    `--image_size`.

    passes_on: for a command that passes flags that it does not know to another one, `build_parser` of that.
    """

    def __init__(
        self,
        prog: str,
        description: str | None,
        add_help: bool = True,
        passes_on: Callable[[], argparse.ArgumentParser] | None = None,
    ):
        super().__init__(prog, None, description, formatter_class=HelpFormatter, allow_abbrev=False, add_help=add_help)
        self.passes_on = passes_on

    def format_help(self) -> str:
        formatter = self._get_formatter()
        required = [formatter._format_action_invocation(action) for action in self._actions if action.required]
        others = [] if self.passes_on is None else [f"[flags of {self.passes_on().prog}]"]
        self.usage = " ".join(["%(prog)s", *required, "[flags]", *others])  # all flags are listed below it
        return super().format_help()

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if "_ARGCOMPLETE" in os.environ and self.add_help:  # not the parser of `--config` alone
            self._complete()
        words = [self.canonical(word) for word in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(plain_words(words, self._option_string_actions), namespace)

    def canonical(self, word: str) -> str:
        """--image-size=64 -> --image_size=64: a word of the command line with the name of its flag as it is defined."""
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            return word
        known = {option.replace("-", "_"): option for option in self._option_string_actions}
        return known.get(name.replace("-", "_"), name) + equals + value

    def _complete(self):
        """Answer a shell that asks what the word at the cursor can become, and leave the process.

        The shell has started the command without its flags, which must not do its work then.
        https://kislyuk.github.io/argcomplete/
        """
        try:
            import argcomplete
        except ImportError as error:
            raise UserError("argcomplete is not installed: pip install argcomplete") from error
        parents = [self] if self.passes_on is None else [self.passes_on(), self]
        # without this class's parse_known_args, which argcomplete calls; of two flags with a name, the last one counts
        argcomplete.autocomplete(argparse.ArgumentParser(parents=parents, add_help=False, conflict_handler="resolve"))

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see python {self.prog} --help)")


class PathsAction(argparse.Action):
    """Several paths. On Windows, whose shells leave it to programs, `checkpoints_*` becomes what it matches."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Sequence[str],
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, [path for value in values for path in _matches_of(value)])


def _matches_of(pattern):
    if sys.platform != "win32" or os.path.exists(pattern):
        return [pattern]
    return sorted(glob.glob(pattern.replace("[", "[[]"))) or [pattern]  # to shells of Windows, brackets are letters


def plain_words(words: Sequence[str], options: Mapping[str, argparse.Action]) -> list[str]:
    """A command line as the agent of a W&B sweep writes it -> as argparse reads it.

    options: {option: its action}. `--flag=None` and `--flag None` are left out: the flag is not given.
    `--flag=['a', 'b']` and `--flag "['a', 'b']"` become `--flag a b` if the flag takes several words.
    """
    plain, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        action = options.get(option)
        if action is None or action.nargs == 0:
            plain.append(word)
            continue
        takes_several = action.nargs not in (None, "?")
        count = next((k for k, following in enumerate(rest) if following.startswith("--")), len(rest))
        count = 0 if equals else count if takes_several else min(count, 1)
        values, rest = [value] if equals else rest[:count], rest[count:]
        if values == ["None"]:
            continue
        items = _items_of(values[0]) if takes_several and len(values) == 1 else None
        plain += [option, *items] if items else [word] if equals else [option, *values]
    return plain


def _items_of(text):
    """A list as Python prints it -> its items as text; None for any other text."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        return [str(item) for item in ast.literal_eval(text)]
    except (ValueError, SyntaxError):
        return None


def number(
    cast: type,
    low: float = -math.inf,
    high: float = math.inf,
    below: float = math.inf,
    above: float = -math.inf,
    word: str | None = None,
) -> Callable[[str], Any]:
    """An argparse type: a finite number, low <= number <= high, above < number < below; or `word`, as it is."""

    def parse(text):
        if text == word:
            return text
        value = cast(text) if cast is not int else _whole_number(text)
        if not (math.isfinite(value) and low <= value <= high and above < value < below):
            bounds = {"at least": low, "at most": high, "below": below, "above": above}
            expected = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
            raise argparse.ArgumentTypeError(f"must be {expected or 'a finite number'}, not {text}")
        return value

    parse.__name__ = f"{cast.__name__} or {word}" if word else cast.__name__  # "invalid int or auto value: 'AUTO'"
    return parse


def _whole_number(text):
    """32, or 32.0 as the agent of a W&B sweep writes it. Raises ValueError."""
    try:
        return int(text)
    except ValueError:
        if not float(text).is_integer():
            raise
        return int(float(text))


def regex(text: str) -> str:
    """An argparse type: a regular expression."""
    try:
        return re.compile(text).pattern
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression ({error})") from error


def class_merge(text: str) -> str:
    """An argparse type: classes that become one, as A,B=NAME."""
    try:
        names, merged = split_merge(text)
    except csv.Error:  # a line end outside of quotes
        names, merged = [], ""
    if not (names and all(map(str.strip, [*names, merged]))):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A,B=NAME")
    return text


def split_merge(text: str) -> tuple[list[str], str]:
    """'A,B=NAME' -> (["A", "B"], "NAME"). A name with a comma is quoted, as in a CSV file: '"A, B",C=NAME'."""
    names, _, merged = text.rpartition("=")
    return next(csv.reader([names], skipinitialspace=True), []), merged


def boolean(text: str) -> bool:
    """An argparse type: true or false."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def add_switch(group: argparse._ActionsContainer, name: str, default: bool, help: str) -> None:
    """`--name`, `--no-name`, and `--name=true` / `--name=false` as W&B sweeps write them.

    Its default is added to `help`.
    """
    help += " [on]" if default else " [off]"
    group.add_argument(f"--{name}", nargs="?", const=True, default=default, type=boolean, metavar="BOOL", help=help)
    group.add_argument(
        f"--no-{name}", dest=name, action="store_false", default=argparse.SUPPRESS, help=f"turn --{name} off"
    )
