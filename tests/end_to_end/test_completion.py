"""Tab completion: what a shell gets from each command by the protocol of argcomplete."""

import os
import re
import subprocess
import sys

import pytest
from helpers import PATIENCE, ROOT

from run.cli import Parser, UserError

COMMANDS = [file.name for file in sorted(ROOT.glob("*.py")) if "return run_command(" in file.read_text("utf-8")]
SLOW_IMPORTS = {"torch", "torchvision", "numpy", "wandb", "sklearn", "matplotlib", "optuna", "cv2", "PIL"}


def complete(line, tmp_path, *options):
    """The words that the shell offers at the end of `python X.py ...`. -> (them, finished process)."""
    answer = tmp_path / "answer"
    protocol = {
        "_ARGCOMPLETE": "2",  # the command is the second word
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    command = [sys.executable, *options, line.split()[1]]  # without flags, as the shell does it
    process = subprocess.run(
        command, env=os.environ | protocol, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    return [word.strip() for word in answer.read_text().splitlines()], process


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python main.py --target", ["--target_samples_per_class"]),
        ("python main.py --demo --sampling ", ["instance", "balanced", "sqrt", "progressive"]),
        ("python main.py --train_loss la", ["label_smoothing"]),
        ("python search.py sweep.yaml --tr", ["--train_loss", "--trials"]),
        ("python ablate.py --epochs 3 --seed", ["--seed", "--seeds"]),
        ("python bench.py --parts input st", ["step", "startup"]),
        ("python prepare_aihub.py TL.zip --t", ["--target"]),
    ],
)
def test_flags_and_choices_are_completed_also_those_that_are_passed_on_to_main(line, expected, tmp_path):
    words, process = complete(line, tmp_path)
    assert process.returncode == 0 and sorted(words) == sorted(expected)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_answers_at_once_and_the_shell_can_see_that_it_does(command, tmp_path):
    first_bytes = (ROOT / command).read_bytes()[:1024]
    assert b"PYTHON_ARGCOMPLETE_OK" in first_bytes, f"{command}: # PYTHON_ARGCOMPLETE_OK is not in the first lines"
    assert "main.py" in COMMANDS and len(COMMANDS) > 4
    words, process = complete(f"python {command} --hel", tmp_path, "-X", "importtime")
    imported = re.findall(r"\| +(\w+)$", process.stderr, re.M)
    assert words == ["--help"] and "argcomplete" in imported and not set(imported) & SLOW_IMPORTS
    assert process.stdout == ""


def test_without_argcomplete_the_command_does_not_start_its_work(monkeypatch):
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    with pytest.raises(UserError, match="argcomplete is not installed"):
        Parser("bench.py", None).parse_args([])


def test_argcomplete_is_not_imported_unless_a_shell_asks():
    script = "import sys, main; assert main.main(['--epochs', 'x']) == 2 and 'argcomplete' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, timeout=PATIENCE)
