"""The Dockerfile, as far as it can be checked without building it, and what .dockerignore lets into the image."""

import fnmatch
import re
import shlex
from pathlib import PurePosixPath

from helpers import ROOT
from packaging.version import Version

from flags import build_parser

INSTRUCTIONS = {"FROM", "ENV", "COPY", "RUN", "USER", "VOLUME", "WORKDIR", "ENTRYPOINT", "CMD"}
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMMENTS = "\n".join(line.removeprefix("#") for line in TEXT.splitlines() if line.startswith("#"))


def steps():
    """-> [(instruction, its arguments)], in their order."""
    lines = [line for line in TEXT.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [tuple(line.split(None, 1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def only(instruction):
    (argument,) = [argument for name, argument in steps() if name == instruction]
    return argument


def position(instruction, text):
    (number,) = [i for i, (name, argument) in enumerate(steps()) if name == instruction and text in argument]
    return number


def is_sent(path):
    """Whether Docker gets a file: the last pattern of .dockerignore that matches it or a folder of it decides."""
    sent, names = True, [str(parent) for parent in (PurePosixPath(path), *PurePosixPath(path).parents)]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = PurePosixPath(line.removeprefix("!"))
        if line and not line.startswith("#"):
            # a star does not match a slash
            matches = [n for n in names if len(PurePosixPath(n).parts) == len(pattern.parts)]
            if any(all(map(fnmatch.fnmatch, PurePosixPath(n).parts, pattern.parts)) for n in matches):
                sent = line.startswith("!")
    return sent


def test_every_instruction_is_known_and_has_an_argument():
    assert all(len(step) == 2 and step[0] in INSTRUCTIONS for step in steps())
    assert steps()[0][0] == "FROM"


def test_the_image_is_of_a_fixed_python_that_the_project_supports():
    image, _, tag = only("FROM").partition(":")
    target = re.search(r'target-version = "py3(\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert image == "python" and Version(tag.split("-")[0]) >= Version(f"3.{target}")


def test_the_process_is_not_root_and_writes_to_its_two_folders():
    assert int(only("USER")) > 0  # a number, of which a cluster can see that it is not root
    assert steps().index(("USER", only("USER"))) > position("RUN", "useradd")
    assert "install -d -m 1777 /cache /runs" in dict(steps())["RUN"]
    assert only("WORKDIR") == "/runs"


def test_the_cache_is_a_volume_that_all_caches_are_in():
    folders = re.findall(r"=(/\S+)", only("ENV"))
    assert only("VOLUME") == "/cache" and len(folders) == 3
    assert all(folder == "/cache" or folder.startswith("/cache/") for folder in folders)


def test_plots_have_a_font_for_hangul():
    (package,) = re.findall(r"fonts-(\w+)", dict(steps())["RUN"])
    fonts = "".join(
        re.findall(r"^HANGUL_FONTS = (.*)$", "\n".join(file.read_text("utf-8") for file in ROOT.glob("*.py")), re.M)
    )
    assert package in fonts.lower()


def test_requirements_are_installed_before_the_program_is_copied():
    """Otherwise each change of the program would download several GB again."""
    assert position("COPY", "requirements.txt") < position("RUN", "requirements.txt") < position("COPY", ". /app/")
    assert "--no-cache-dir" in dict(steps())["RUN"]


def test_docker_gets_the_program_and_nothing_else():
    program = [*ROOT.glob("*.py"), *(file for name in ("images", "run", "study") for file in ROOT.glob(f"{name}/*.py"))]
    program += [*ROOT.glob("templates/*"), *ROOT.glob("grids/*"), ROOT / "requirements.txt", ROOT / "sweep.yaml"]
    missing = [file.name for file in program if not is_sent(file.relative_to(ROOT).as_posix())]
    assert len(program) > 50 and not missing
    others = ["data/0/a.jpg", "photos/a.png", "images/a.jpg", "runs/a/best_model.pth", "best_model.pth", ".git/config"]
    others += [".venv/lib/python3.11/site-packages/torch/__init__.py", "wandb/settings", ".netrc", "tests/helpers.py"]
    assert not [path for path in others if is_sent(path)]
    unknown = {file.parent.name for file in ROOT.glob("*/__init__.py")} - {"images", "run", "study"}
    assert not unknown, "list the package in .dockerignore"


def test_the_command_of_the_comments_is_one_that_works():
    (command,) = re.findall(r"docker run (.*?)\n\n", COMMENTS.replace("\\\n", " "), re.S)
    words = shlex.split(command)
    mounts = [words[i + 1].split(":", 1)[1] for i, word in enumerate(words) if word == "-v"]
    assert mounts == ["/data:ro", "/runs", "/cache"] and "--shm-size=1g" in words
    program = next(i for i, word in enumerate(words) if word.startswith("/app/"))
    assert only("ENTRYPOINT") == '["python"]' and (ROOT / words[program].removeprefix("/app/")).is_file()
    args = build_parser().parse_args(words[program + 1 :])
    assert args.data_dirs[0].startswith("/data/")
    explained = re.findall(r"^ (--[\w-]+) {3,}", COMMENTS, re.M)
    assert set(explained) < {word.partition("=")[0] for word in words} and "--shm-size" in explained
