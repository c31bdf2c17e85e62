"""What a command finds around it: standard streams, a home folder, a user name, text encoding, a launcher."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NO_HOME = os.devnull  # nothing can be created below it, not even by root
# set by a launcher to the number of its processes: torchrun, mpirun (Open MPI, MPICH), srun
LAUNCHER_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def prepare_surroundings(is_own_process: bool) -> None:
    """Provide what containers, daemons and job queues may lack. Call it before anything opens a file.

    is_own_process: whether the command is all that this process does, so that it may be restarted.
    """
    _open_missing_streams()
    if is_own_process:
        _restart_with_utf8()
    _provide_home_and_user()
    if launched_by_torchrun():
        # read when torch is imported: otherwise each process prints warnings, and pages about every lost connection
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if sys.platform == "darwin":
        # read when torch is imported: an operator that MPS does not have runs on the CPU
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")


def _open_missing_streams():
    """Connect standard streams that are closed to the null device.

    Otherwise the next file that is opened, perhaps a checkpoint, gets the number of a stream and what is printed to it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open until the process ends)


def _restart_with_utf8():
    """Start this process again in Python's UTF-8 mode if file names are ASCII to it: the locale C without that mode.

    The restarted process has the same id, arguments and environment.
    """
    if sys.getfilesystemencoding() != "ascii" or "utf8" in sys._xoptions or not sys.executable:
        return
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _provide_home_and_user():
    """Give a user that the system does not know a name, and a home in which nothing can be created.

    Without it `~` is not replaced, and libraries create a folder of that name, or raise. Folders of the XDG standard
    must be absolute; others are ignored, as the standard says.
    """
    if not os.path.isabs(os.path.expanduser("~")):
        os.environ["HOME"] = NO_HOME
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        folder = os.path.expanduser(os.environ.pop(name, ""))
        if os.path.isabs(folder):
            os.environ[name] = folder
    if hasattr(os, "getuid") and not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        import pwd  # not on every system

        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = str(os.getuid())


def user_folder(variable: str, default: str) -> str | None:
    """-> what an XDG variable names, by default a folder in the home folder; None for a user without one."""
    home = os.path.expanduser("~")
    return os.environ.get(variable) or (os.path.join(home, default) if os.path.isdir(home) else None)


def is_writable(folder: str | Path) -> bool:
    """Whether files can be written in `folder`, or in the closest of its parents that exists."""
    import tempfile

    folder = Path(os.path.abspath(folder))
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(4096))  # on a full disk an empty file can still be created
    except OSError:
        return False
    return True


def no_temporary_folder() -> str | None:
    """Choose a folder for temporary files, which torch needs already to be imported. -> an error message, or None.

    Other programs than Python use TMPDIR as it is, so it is set to what was found.
    """
    import tempfile

    reported = f"TMPDIR: {os.environ['TMPDIR']} is not writable" if os.environ.get("TMPDIR") else ""
    try:
        found = tempfile.gettempdir()
    except FileNotFoundError:
        found = next(filter(is_writable, ("/dev/shm", os.path.expanduser("~"))), None)
        reported = "there is no writable folder for temporary files, such as /tmp"
        if not found:
            return f"{reported}; set TMPDIR to one"
    if reported and os.path.abspath(os.environ.get("TMPDIR", "")) != found:
        print(f"{reported}; temporary files are kept in {found}")
        tempfile.tempdir = os.environ["TMPDIR"] = found
    return None


def launched_by_torchrun() -> bool:
    """Whether torchrun has started this process as one of several."""
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    size = os.environ.get("WORLD_SIZE", "")
    return size.isdecimal() and int(size) > 1 and all(os.environ.get(name) for name in names)


def rank_here() -> int:
    """The number of this rank among those of its machine."""
    return int(os.environ["LOCAL_RANK"]) if launched_by_torchrun() else 0


def restarts_here() -> int:
    """How often torchrun has restarted the processes of this machine."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def start_of_command() -> list[str]:
    """-> the words in front of the flags of a command line that starts main.py as it was started."""
    return ["torchrun", "...", "main.py"] if launched_by_torchrun() else ["python", "main.py"]


def command_line(words: Sequence[str]) -> str:
    """-> the words of a command, quoted for the shells of this system: to those of Windows, ' is a letter."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def is_follower() -> bool:
    """Whether another process that torchrun has started speaks for this one."""
    return launched_by_torchrun() and os.environ["RANK"] != "0"


def launched_several_times() -> str | None:
    """-> an error message if this process is one of several of the same launcher, else None.

    Each of them would do the whole work. An agent of a sweep under srun has trainings of its own.
    """
    for name in LAUNCHER_SIZES:
        size = os.environ.get(name, "")
        is_own_trial = name.startswith("SLURM") and "WANDB_RUN_ID" in os.environ
        if size.isdecimal() and int(size) > 1 and not is_own_trial:
            return (
                f"{name}={size}: a launcher such as srun or mpirun started {size} processes, and each would do all of "
                f"the work; start one process (or set {name}=1 if they are to do different work); one training on "
                "several GPUs is started with torchrun main.py"
            )
    return None
