"""`main.py` as a child process, and a pool of such processes, which `search.py` and `ablate.py` share."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from flag_checks import with_config
from flag_queries import flag_of
from flags import build_parser
from run.cli import UserError
from run.cores import num_cores
from run.folder import holder_of, locked
from run.saver import LAST, PREVIOUS
from run.signals import STOP_SIGNALS, Signals, call_in_thread

MAIN = Path(__file__).resolve().parent.parent / "main.py"
# flags of main.py that the program that starts a run sets itself, or that make no sense for its runs
RESERVED_FLAGS = frozenset({
    "run_dir", "resume", "auto_resume", "output_dir", "eval_only", "check_data", "demo", "folds", "fold",
})  # fmt: skip
SET_PER_RUN = "is set separately for each run or not supported here; omit this flag"
POLL_SECONDS = 1
STOP_SECONDS = 300  # for a process to save and end; after that it is killed
ANSWER_SECONDS = 10  # for a database to answer after a signal, once all processes have ended


def check_system() -> None:
    """Raise UserError on Windows, where a process cannot be asked to save and end."""
    if sys.platform == "win32":
        raise UserError(
            "search.py and ablate.py need Linux or macOS, as they stop and resume trainings by signals; "
            "on Windows, run them in the Windows Subsystem for Linux (WSL)"
        )


def refuse_flags(words: list[str], refused: Collection[str], reason: str = SET_PER_RUN) -> None:
    """Raise UserError if a command line for main.py has one of these flags."""
    for word in words:
        if word.startswith("--") and flag_of(word) in refused:
            raise UserError(f"{word}: {reason}")


def check_main_flags(main_flags: list[str]) -> None:
    """Raise UserError for flags that main.py's parser refuses, or that the program that starts it sets itself."""
    refuse_flags(main_flags, RESERVED_FLAGS)
    build_parser().parse_args(with_config(main_flags, RESERVED_FLAGS))


def without_flag(words: list[str], name: str) -> list[str]:
    """-> a command line of main.py without one flag, in whichever form (--lr, --no-pretrained), and its values."""
    kept, is_kept = [], True
    for word in words:
        if word.startswith("--"):
            is_kept = flag_of(word) != flag_of(name)
        if is_kept:
            kept.append(word)
    return kept


class TrialProcess:
    """A process of main.py that trains in `run_dir`, or resumes the run in it. Its output is appended to a log file."""

    def __init__(self, flags: list[str], run_dir: str | Path, jobs: int = 1, slot: int = 0):
        """jobs: number of processes at once on this machine, which share its cores and GPUs; slot: 0 to jobs - 1."""
        self.run_dir, self.log, self.slot = Path(run_dir), log_of(run_dir), slot
        program = [sys.executable, str(MAIN)]
        command = [*program, *flags, *_device_flags(flags, slot), "--run_dir", str(run_dir), "--auto_resume"]
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        self._asked_at: float | None = None  # when it was asked to stop
        with open(self.log, "a", encoding="utf-8", errors="backslashreplace") as log:
            self._log_start = log.tell()
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            # a process group of its own: Ctrl-C reaches only this program, which then stops its processes
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self._process = subprocess.Popen(command, **streams, env=_environment(jobs), process_group=0)

    @property
    def status(self) -> int | None:
        """The exit status, None while the process runs, -N if signal N killed it."""
        return self._process.poll()

    @property
    def was_stopped(self) -> bool:
        """Whether a signal asked the process to end, so that its run can be resumed."""
        return self.status in (*(-number for number in STOP_SIGNALS), *(128 + number for number in STOP_SIGNALS))

    def stop(self) -> None:
        """Ask the process to save and end, once: a second signal would end it before it has saved.

        Called again, it kills a process that has not ended after `STOP_SECONDS`.
        """
        if self.status is not None:
            return
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._process.terminate()
        elif time.monotonic() - self._asked_at > STOP_SECONDS:
            self._process.kill()

    def wait(self) -> None:
        self._process.wait()

    def error(self) -> str:
        """Why the process failed, in one line."""
        if self.status < 0:
            memory = ", perhaps because the system ran out of memory" if self.status == -signal.SIGKILL else ""
            return f"killed by signal {-self.status}{memory}"
        with open(self.log, encoding="utf-8", errors="replace") as log:
            log.seek(self._log_start)
            lines = log.read().strip().splitlines()
        reported = [line for line in lines if line.startswith("error: ")]
        return (reported or lines)[-1]


class ProcessPool:
    """Up to `jobs` processes of main.py at once on this machine, each in its slot: 0 to jobs - 1."""

    def __init__(self, jobs: int):
        self.jobs = jobs
        self.processes: list[TrialProcess] = []  # started and not released yet
        self.is_stopping = False
        self._ended_at: float | None = None  # when all had ended after a signal
        self.left_over: dict[str, str] = {}  # folders for which the last `poll` waits: what is waited for, in one line
        self._asked_at: dict[str, float] = {}  # when the left-over process of a folder was asked to end

    def num_free(self) -> int:
        """Number of slots without a process."""
        return self.jobs - len(self.processes)

    def start(self, flags: list[str], run_dir: str | Path) -> TrialProcess:
        """Start main.py in the first free slot."""
        slot = min(set(range(self.jobs)) - {process.slot for process in self.processes})
        process = TrialProcess(flags, run_dir, self.jobs, slot)
        self.processes.append(process)
        return process

    def release(self, process: TrialProcess) -> None:
        """Free the slot of a process that has ended."""
        self.processes.remove(process)

    def supervise(self, poll: Callable[[], bool], signals: Signals) -> None:
        """Call `poll()`, which starts and releases processes, about once per second until it returns False.

        After a signal, all processes are asked to save and end, and `is_stopping` is set: `poll` starts no more then.
        No process outlives this call. Raises Stopped after a signal, once all have ended, also if `poll` waits for a
        database that does not answer. Raises UserError if nothing is left but a process that does not end.
        """
        with signals.deferred():
            try:
                has_more = True
                while has_more:
                    if signals.stopped:
                        self.stop_all()
                    self.left_over.clear()
                    has_more = call_in_thread(poll, lambda: self._look_after(signals))
                    if has_more and not self.processes:
                        self._check_left_over()
                    time.sleep(POLL_SECONDS if has_more else 0)
            finally:
                self.stop_all()
                self.wait()

    def _look_after(self, signals):
        """Also while `poll` waits: ask the processes to end after a signal; raise Stopped if nothing else is left."""
        if not signals.stopped:
            return
        self.stop_all()
        if any(process.status is None for process in self.processes):
            self._ended_at = None
            return
        self._ended_at = self._ended_at or time.monotonic()
        if time.monotonic() - self._ended_at > ANSWER_SECONDS:
            signals.raise_if_stopped()

    def stop_all(self) -> None:
        """Ask all processes to save and end; kill those that have not after `STOP_SECONDS`."""
        self.is_stopping = True
        for process in self.processes:
            process.stop()

    def wait(self) -> None:
        """Wait until all processes have ended, which are asked to first."""
        while any(process.status is None for process in self.processes):
            self.stop_all()
            time.sleep(POLL_SECONDS / 10)

    def stop_left_over(self, run_dir: str | Path) -> bool:
        """Whether a process that nobody supervises any more, as its program was killed, still works in a run's folder.

        It is asked, once, to save and end; the run can be resumed when it has. `supervise` waits `STOP_SECONDS` for it.
        """
        folder = str(run_dir)
        if not is_in_use(folder):
            self._asked_at.pop(folder, None)
            return False
        holder = holder_of(folder)
        self.left_over[folder] = f"waiting for {holder}, which still works in {folder}"
        if folder not in self._asked_at:
            self._asked_at[folder] = time.monotonic()
            print(self.left_over[folder])
            names = re.match(r"process (\d+) on (.*)", holder)
            if names and names[2] == socket.gethostname():
                with suppress(OSError):
                    os.kill(int(names[1]), signal.SIGTERM)
        return True

    def _check_left_over(self):
        for folder in self.left_over:
            if time.monotonic() - self._asked_at[folder] > STOP_SECONDS:
                raise UserError(
                    f"{folder} is in use by {holder_of(folder)}, which has not ended within {STOP_SECONDS / 60:.0f} "
                    "minutes; stop it, then repeat this command"
                )


def log_of(run_dir: str | Path) -> Path:
    """The file with the output of main.py: beside the run's folder, in which main.py alone writes."""
    return Path(run_dir).with_name(f"{Path(run_dir).name}.log")


def is_in_use(run_dir: str | Path) -> bool:
    """Whether a process works in a run's folder."""
    if not Path(run_dir).is_dir():
        return False
    try:
        with locked(run_dir):
            return False
    except UserError:
        return True


def keep_best_model_only(run_dir: str | Path) -> None:
    """Delete the other checkpoints of a finished run: those of many runs would fill the disk."""
    for name in (LAST, PREVIOUS):
        Path(run_dir, name).unlink(missing_ok=True)


def _device_flags(flags, slot):
    """`--device` for a machine with several GPUs, unless the flags choose the device."""
    if build_parser().parse_args(flags).device != "auto":
        return []
    import torch

    gpus = torch.cuda.device_count()
    return ["--device", f"cuda:{slot % gpus}"] if gpus > 1 else []


def _environment(jobs):
    """Without W&B unless it is asked for, then with a run for each process. Processes share the cores: with all threads
    each, they would be slower."""
    environment = {"WANDB_MODE": "disabled", **os.environ}
    environment.pop("WANDB_RUN_ID", None)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // jobs)))
    return environment
