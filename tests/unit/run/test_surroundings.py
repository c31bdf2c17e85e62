"""What containers, daemons and job queues lack: streams, a home, a user name, a place for temporary files."""

import os
import subprocess
import sys

import pytest
from helpers import PATIENCE, ROOT, write_images

import search
from run import surroundings

COMMANDS = ("main", "search", "ablate", "report", "bench")
LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}  # as torchrun does


def python(script, *words, shell=None, unset=(), **environment):
    """Run a script with the project on its path. shell: redirections. -> CompletedProcess"""
    env = {name: value for name, value in {**os.environ, "PYTHONPATH": str(ROOT), **environment}.items()}
    env = {name: value for name, value in env.items() if name not in unset}
    command = [sys.executable, "-c", script, *map(str, words)]
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)


def test_what_is_printed_never_gets_into_a_file_of_a_run_whose_streams_are_closed(tmp_path):
    script = """
import os, sys
from run.cli import run_command

def run(argv):
    with open(argv[0], "w") as checkpoint:
        print("to nobody", flush=True)
        print("to nobody", file=sys.stderr, flush=True)
        os.write(1, b"to nobody"), os.write(2, b"to nobody")
        os.system("echo to nobody; echo to nobody >&2; cat")
        checkpoint.write("content")
    assert sys.stdin.read() == ""

sys.exit(run_command(run, sys.argv[1:]))
"""
    for number, closed in enumerate(("<&- >&- 2>&-", "<&-", "<&- >&-", ">&- 2>&-", "2>&-")):
        done = python(script, tmp_path / str(number), shell=closed + (" </dev/null" if "<&-" not in closed else ""))
        assert done.returncode == 0 and (tmp_path / str(number)).read_text() == "content", closed


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_streams_ends_with_its_status(command):
    script = f"import sys, {command}; sys.exit({command}.main(['--unknown']))"
    assert python(script, shell="<&- >&- 2>&-").returncode == 2


UNKNOWN_USER = """
import os, pwd, sys

def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = getpwuid
"""


def test_a_user_whom_the_system_does_not_know_has_a_name_and_a_home_without_files():
    script = UNKNOWN_USER + (
        "import getpass, pathlib\n"
        "from run.surroundings import *\n"
        "prepare_surroundings(is_own_process=True)\n"
        "print(getpass.getuser(), pathlib.Path('~/.netrc').expanduser().exists(), os.path.expanduser('~'))\n"
        "print(user_folder('XDG_CACHE_HOME', '.cache'), is_writable(os.path.expanduser('~/.cache')))\n"
    )
    names = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME")
    done = python(script, unset=names)
    assert done.stdout.split() == [str(os.getuid()), "False", os.devnull, "None", "False"], done.stderr
    assert python(script, unset=names[1:], HOME="relative").stdout == done.stdout


def test_folders_of_the_xdg_standard_are_absolute_or_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, expected in {"cache": f"{tmp_path}/.cache", "": f"{tmp_path}/.cache", "~/c": f"{tmp_path}/c"}.items():
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        surroundings.prepare_surroundings(is_own_process=False)
        assert surroundings.user_folder("XDG_CACHE_HOME", ".cache") == expected
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))  # a home is not created
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert surroundings.user_folder("XDG_CACHE_HOME", ".cache") is None


def test_with_ascii_file_names_the_process_starts_again_in_the_utf8_mode(tmp_path):
    folder = tmp_path / "주름"
    write_images(folder / "0", 1)
    script = (
        "import os, sys\n"
        "from run.cli import run_command\n"
        "def run(argv): print(os.listdir(argv[0]), argv[1:], sys.getfilesystemencoding(), os.environ['OLD'])\n"
        "os.environ.setdefault('OLD', str(os.getpid()))\n"
        "sys.exit(run_command(run, None))\n"
    )
    for locale in ("C", "POSIX"):
        environment = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        done = python(script, tmp_path, "--name=주름 둘", **environment)
        assert done.stdout.startswith("['주름'] ['--name=주름 둘'] utf-8"), done.stderr


def test_temporary_files_are_kept_where_they_can_be(tmp_path):
    script = (
        "import os, subprocess, sys, tempfile\n"
        "from run.cli import run_command\n"
        "def run(argv): print(tempfile.gettempdir(), os.environ['TMPDIR'])\n"
        "sys.exit(run_command(run, []))\n"
    )
    gone = tmp_path / "gone"
    out = python(script, TMPDIR=str(gone)).stdout.splitlines()
    assert out[0].startswith(f"TMPDIR: {gone} is not writable") and len(out) == 2
    assert len(set(out[1].split())) == 1 and os.path.isdir(out[1].split()[0])
    nowhere = "import tempfile\ntempfile._candidate_tempdir_list = lambda: ['/dev/null/tmp']\n"
    (tmp_path / "home").mkdir()
    out = python(nowhere + script, HOME=str(tmp_path / "home"), unset=["TMPDIR"]).stdout.splitlines()
    assert out[0].startswith("there is no writable folder") and out[1].split()[0] in ("/dev/shm", f"{tmp_path}/home")


def test_a_folder_is_writable_if_a_file_with_content_can_be_written_in_it(tmp_path):
    assert surroundings.is_writable(tmp_path) and surroundings.is_writable(tmp_path / "new" / "folder")
    (tmp_path / "file").touch()
    assert not surroundings.is_writable(tmp_path / "file" / "folder") and not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_under_torchrun_a_command_is_one_error_line_before_it_writes(command, tmp_path, monkeypatch):
    words = {"main": ["--demo", "--run_dir", str(tmp_path / "run")]}.get(command, ["--help"])
    script = f"import sys, {command}; sys.exit({command}.main({words!r}))"
    done = python(script, **LAUNCHED)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: WORLD_SIZE=2: ") and "start one process" in line


@pytest.mark.parametrize(
    "environment, is_refused",
    [
        ({"WORLD_SIZE": "1", "RANK": "0"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, False),  # a batch script, which is one process of a job for four
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_STEP_NUM_TASKS": "4", "WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r"}, False),  # srun wandb agent
        ({**LAUNCHED, "WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r"}, True),  # an agent that starts torchrun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"PMI_SIZE": "2"}, True),
    ],
)
def test_only_one_of_several_processes_of_a_launcher_is_refused(environment, is_refused, monkeypatch):
    for name in (*surroundings.LAUNCHER_SIZES, "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert bool(surroundings.launched_several_times()) == is_refused


def test_torchrun_starts_no_search(monkeypatch, capsys):
    for name, value in {**LAUNCHED, "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert search.main(["sweep.yaml"]) == 2 and capsys.readouterr().err.startswith("error: WORLD_SIZE=2: ")


def test_a_command_is_quoted_for_the_shells_of_the_system(monkeypatch):
    words = ["python", "main.py", "--config", r"C:\my runs\args.json"]
    monkeypatch.setattr(sys, "platform", "win32")
    assert surroundings.command_line(words) == r'python main.py --config "C:\my runs\args.json"'
    monkeypatch.setattr(sys, "platform", "linux")
    assert surroundings.command_line(words) == r"python main.py --config 'C:\my runs\args.json'"
