"""A trial: main.py as a process of its own, with a folder and a log, watched by another program, as search.py is."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from joblib import cpu_count

import main
from files import LOCK_FILE, UserError, locked
from flags import build_parser, flag_of
from resuming import LAST, PREVIOUS

# flags of main.py that the program which starts trials sets itself, or that trials have no use for
OWN_FLAGS = {"run_dir", "resume", "auto_resume", "output_dir", "eval_only", "demo", "folds", "fold"}


def check_no_own_flags(words, own=OWN_FLAGS):
    """Raise UserError if a command line for main.py has a flag that the program which starts it keeps to itself."""
    for word in words:
        if word.startswith("--") and flag_of(word) in own:
            raise UserError(f"{word}: is set for each trial, or has no meaning there; leave this flag out")


class TrialProcess:
    """main.py at work in `run_dir`, or going on with what is there. It is one of `jobs` at once on this machine."""

    def __init__(self, flags, run_dir, jobs=1, slot=0):
        """slot: 0 to jobs - 1, which of them it is. The cores are shared out, and the GPUs where there are several."""
        self.run_dir, self.log = Path(run_dir), log_of(run_dir)
        program = [sys.executable, str(Path(main.__file__).resolve())]
        command = [*program, *flags, *_device_flags(flags, slot), "--run_dir", str(run_dir), "--auto_resume"]
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a", encoding="utf-8") as log:
            self._log_start = log.tell()
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            # a group of its own: Ctrl-C is for the watching program, which then stops its trials
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self._process = subprocess.Popen(command, **streams, env=_environment(jobs), process_group=0)

    @property
    def status(self):
        """Exit status, None while it is at work, -N for a death by signal N."""
        return self._process.poll()

    @property
    def was_stopped(self):
        """Whether a signal asked it to end, after which it can be gone on with."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        return self.status in (*(-number for number in numbers), *(128 + number for number in numbers))

    def stop(self):
        if self.status is None:
            self._process.terminate()

    def wait(self):
        self._process.wait()

    def error(self):
        """In a line, why it failed."""
        if self.status < 0:
            memory = ", perhaps by a system without memory" if self.status == -signal.SIGKILL else ""
            return f"killed by signal {-self.status}{memory}"
        with open(self.log, encoding="utf-8", errors="replace") as log:
            log.seek(self._log_start)
            lines = log.read().strip().splitlines()
        told = [line for line in lines if line.startswith("error: ")]
        return (told or lines)[-1]


def log_of(run_dir):
    """What main.py prints, beside the run's folder, which must be the run's alone."""
    return Path(run_dir).with_name(f"{Path(run_dir).name}.log")


def is_in_use(run_dir):
    """Whether a process is at work in a run's folder."""
    if not Path(run_dir).is_dir():
        return False
    try:
        with locked(run_dir):
            return False
    except UserError:
        return True


def is_left_over(run_dir, told):
    """Whether a process that nobody watches any more is at work in a run's folder. It is told to save and end.

    told: set of the folders whose process was told: a second signal would end it before it has saved.
    """
    if not is_in_use(run_dir):
        return False
    if run_dir not in told:
        told.add(run_dir)
        with suppress(OSError):
            held = re.match(r"process (\d+) on (.*)", Path(run_dir, LOCK_FILE).read_text())
            if held and held[2] == socket.gethostname():
                os.kill(int(held[1]), signal.SIGTERM)
    return True


def keep_best_model_only(run_dir):
    """Of a trial that has ended: many trials would fill a disk with the other checkpoints."""
    for name in (LAST, PREVIOUS):
        Path(run_dir, name).unlink(missing_ok=True)


def _device_flags(flags, slot):
    gpus = main.torch.cuda.device_count()
    if gpus > 1 and build_parser().parse_args(flags).device == "auto":
        return ["--device", f"cuda:{slot % gpus}"]
    return []


def _environment(jobs):
    """Without W&B unless it is asked for; the cores are shared out, as threads of two trials would fight."""
    environment = {"WANDB_MODE": "disabled", **os.environ}
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // jobs)))
    return environment
