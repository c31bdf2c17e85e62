"""The documents say what the code does: flags, commands, links, modules and keys are checked against it."""

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from flags import FROM_SCRATCH, RECIPES

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
# command: the module that has its `build_parser()`
COMMANDS = {
    "main.py": "flags", "predict.py": "predict", "export.py": "export",
    "search.py": "search", "ablate.py": "ablate", "report.py": "report", "bench.py": "bench",
    "prepare_aihub.py": "prepare_aihub",
}  # fmt: skip
# {flag: what its number counts or measures}; another flag with a number is listed in NO_UNIT
UNITS = {
    "batch_size": "images", "crt_epochs": "epochs", "drw_epoch": "epochs", "epochs": "epochs", "fold": "fold",
    "folds": "trainings", "grad_accum": "batches", "image_size": "pixels", "jobs": "at once",
    "max_megapixels": "megapixels", "num_workers": "processes", "patience": "epochs", "save_every": "steps",
    "scaling": "processes",
    "save_minutes": "minutes", "target_samples_per_class": "images", "trials": "trials", "wandb_images": "photographs",
    "warmup_epochs": "epochs", "rotation": "degrees",
}  # fmt: skip
NO_UNIT = {
    "alpha", "beta", "clip_grad", "coverage", "cutmix", "dropout_prob", "ema", "gamma", "learning_rate", "max_margin",
    "mixup", "ordinal_decay", "search_seed", "seed", "seeds", "smoothing", "split", "tau", "weight_decay",
}  # fmt: skip
PASSES_ON = ("search.py", "ablate.py")  # these pass flags that they do not know to main.py
# placeholders, another spelling, and options of other tools
NOT_FLAGS = {
    "--name",
    "--no-name",
    "--X",
    "--no-X",
    "--image-size",
    "--rounds",
    "--signal",
    "--shm-size",
    "--max_restarts",
}


def by_name(path):
    return str(path.relative_to(ROOT))


def parser_of(command):
    return importlib.import_module(COMMANDS[command]).build_parser()


def is_number(action):
    return getattr(action.type, "__name__", "").partition(" ")[0] in ("int", "float")  # also "int or auto"


def options(parser):
    """-> the actions that docs/flags.md documents one by one."""
    switched_off = argparse._StoreFalseAction  # `--no-X`
    return [action for action in parser._actions if action.dest != "help" and not isinstance(action, switched_off)]


def fences_and_prose(path):
    """-> (lines of code blocks, text outside them)."""
    pieces = re.split(r"^```.*\n", path.read_text(encoding="utf-8"), flags=re.M)
    return "".join(pieces[1::2]).splitlines(), "".join(pieces[::2])


def code_spans(path):
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", fences_and_prose(path)[1])]


# ------------------------------------------------------------------------------------------------------------- flags


def documented_options(command):
    """-> {option strings, or the metavar of a positional argument: (help text, further explanation)}."""
    text = (ROOT / "docs/flags.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(command)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]
    rows = {}
    for line in re.findall(r"^\| (`.*) \|$", section, re.M):
        name, help_text, more = (cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line))
        rows[tuple(word.split()[0].removesuffix("...") for word in re.findall(r"`([^`]+)`", name))] = help_text, more
    return rows


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_md_has_each_option_with_the_help_text_of_its_parser(command):
    expected = {
        tuple(action.option_strings) or (action.metavar,): action.help for action in options(parser_of(command))
    }
    documented = {names: help_text for names, (help_text, _) in documented_options(command).items()}
    wrong = [
        f"{' '.join(names)}: docs/flags.md has {documented.get(names)!r}, --help has {expected.get(names)!r}"
        for names in {**expected, **documented}
        if documented.get(names) != expected.get(names)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_md_names_each_choice(command):
    rows = documented_options(command)
    for action in options(parser_of(command)):
        row = " ".join(rows[tuple(action.option_strings) or (action.metavar,)])
        missing = [choice for choice in action.choices or () if not re.search(rf"\b{re.escape(choice)}\b", row)]
        assert not missing, (action.dest, missing)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_states_the_default(command):
    """At the end and in brackets, "off" or "none" included."""
    for action in options(parser_of(command)):
        if not action.option_strings:
            continue  # a positional argument has no default
        stated = re.search(r"\S \[([^]]+)\]$", action.help)
        assert stated, f"{action.dest}: its help does not end with its default, such as [{action.default}]"
        if action.default in (None, argparse.SUPPRESS) or "else" in stated[1]:
            continue  # described in words: it depends on the machine or other flags
        if isinstance(action.default, bool):
            assert stated[1] == ("on" if action.default else "off"), action.dest
        elif is_number(action) and not isinstance(action.default, list):
            assert float(stated[1].partition(":")[0]) == action.default, action.dest
        else:
            values = action.default if isinstance(action.default, list) else [action.default]
            assert stated[1] in (" ".join(map(str, values)), "all"), action.dest


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_number_names_its_unit(command):
    for action in filter(is_number, options(parser_of(command))):
        name = action.dest
        assert (name in UNITS) != (name in NO_UNIT), f"list {name} in UNITS or in NO_UNIT"
        assert name in NO_UNIT or UNITS[name] in action.help, f"--{name} does not say {UNITS[name]}: {action.help}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_each_flag_once_and_no_second_one_to_turn_it_off(command):
    parser = parser_of(command)
    entries = re.findall(r"^  (-.*)$", parser.format_help(), re.M)
    listed = [option for entry in entries for option in re.findall(r"(?:^|, )(--[\w-]+)", entry.split("  ")[0])]
    expected = [option for action in options(parser) for option in action.option_strings]
    assert listed == ["--help", *expected]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_usage_names_only_what_a_command_needs(command):
    """All flags of main.py would fill a screen before the first word of help."""
    usage, *_ = parser_of(command).format_help().partition("\n\n")
    assert usage.startswith(f"usage: {command}") and "[flags]" in usage and len(usage) < 80


def test_flags_md_groups_the_flags_of_main_as_its_help_does():
    text = (ROOT / "docs/flags.md").read_text(encoding="utf-8")
    text = re.search(r"^## main.py\n(.*?)(?=^## )", text, re.M | re.S)[1]
    sections = dict(re.findall(r"^### (.*)\n((?:(?!###).*\n?)*)", text, re.M))
    documented = {title: re.findall(r"^\| `--(\w+)", rows, re.M) for title, rows in sections.items()}
    groups = [group for group in parser_of("main.py")._action_groups if group.title not in ("options", None)]
    switched_off = argparse._StoreFalseAction
    expected = {
        group.title: [action.dest for action in group._group_actions if not isinstance(action, switched_off)]
        for group in groups
        if group._group_actions
    }
    assert list(documented.items()) == list(expected.items())


def test_switches_are_turned_off_in_the_words_of_flags_md():
    for action in parser_of("main.py")._actions:
        if isinstance(action, argparse._StoreFalseAction):
            assert action.option_strings == [f"--no-{action.dest}"]
            assert action.help == f"turn --{action.dest} off"


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_name)
def test_flags_that_a_document_mentions_exist(path):
    known = {
        option for command in COMMANDS for action in parser_of(command)._actions for option in action.option_strings
    }
    mentioned = {word for span in code_spans(path) for word in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", span)}
    assert mentioned <= known | NOT_FLAGS


# ---------------------------------------------------------------------------------------------------- command lines


def command_lines():
    """-> [(document, command, its words)] of every `python X.py ...` in a code block or between backticks."""
    found = []
    for path in DOCUMENTS:
        for line in fences_and_prose(path)[0] + code_spans(path):
            words = shlex.split(line, comments=True) if "python " in line else []
            program = next((i + 1 for i, word in enumerate(words[:-1]) if word == "python"), None)
            if program and words[program] in COMMANDS:
                found.append((by_name(path), words[program], words[program + 1 :]))
    return found


def test_there_are_command_lines_of_every_command():
    assert {command for _, command, _ in command_lines()} == set(COMMANDS)
    assert len(command_lines()) > 20


@pytest.mark.parametrize(("document", "command", "words"), command_lines())
def test_command_lines_of_the_documents_parse(document, command, words):
    parser = parser_of(command)
    if words == ["--help"]:
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        return
    _, rest = parser.parse_known_args(words)
    if command in PASSES_ON:
        _, rest = parser_of("main.py").parse_known_args(rest)
    assert not rest


# --------------------------------------------------------------------------------------------------------- documents


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_name)
def test_links_between_documents_resolve(path):
    text = fences_and_prose(path)[1]
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'\b(?:src|href)="([^"]+)"', text)
    for link in links:
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", fences_and_prose(file)[1], re.M)
            assert anchor in map(slug, headings), link


def test_the_readme_is_one_page():
    content = (ROOT / "README.md").read_bytes()
    assert len(content) <= 12_000
    assert content.count(b"\n") <= 200


def test_the_readme_links_to_every_document():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [by_name(path) for path in DOCUMENTS if f"]({by_name(path)})" not in readme] == ["README.md"]


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=by_name)
def test_files_that_a_document_mentions_exist(path):
    mentioned = {name for span in code_spans(path) for name in re.findall(r"^[\w./]+\.(?:py|yaml|toml|txt)$", span)}
    missing = {name for name in mentioned if not any((ROOT / base / name).exists() for base in ("", "tests/tools"))}
    assert not missing - {"log.txt"}  # of a run


def test_design_md_names_every_module():
    modules = [*ROOT.glob("*.py"), *(ROOT / "images").glob("*.py"), *(ROOT / "run").glob("*.py")]
    modules += (ROOT / "study").glob("*.py")
    names = {by_name(path) for path in modules if path.name != "__init__.py"}
    assert names <= set(code_spans(ROOT / "docs/design.md"))


def constant(module, name):
    """-> a top-level constant of a module, without importing it: the value, or the keys of a dict."""
    for node in ast.parse((ROOT / module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return [ast.literal_eval(key) for key in getattr(node.value, "keys", [])] or ast.literal_eval(node.value)
    raise AssertionError(f"{module} has no {name}")


def test_design_md_names_the_checkpoint_keys():
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", text.partition("## Checkpoint keys")[2], re.M)
    assert [key for row in rows for key in re.findall(r"`(\w+)`", row)] == list(
        constant("model.py", "CHECKPOINT_TYPES")
    )


def test_design_md_names_the_columns_of_history_csv():
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    (entry,) = re.findall(r"`history.csv`: (.*?)\.\n", text, re.S)
    assert tuple(re.findall(r"`(\w+)`", entry)) == constant("run/files.py", "HISTORY_COLUMNS")


def test_the_changelog_names_the_version_of_the_cache():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"image cache, version {constant('images/cache.py', 'FORMAT_VERSION')}" in text


def test_the_hooks_use_a_ruff_of_the_requirements():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    (version,) = [hook["rev"].removeprefix("v") for hook in hooks if "ruff" in hook["repo"]]
    (line,) = re.findall(r"^ruff(.*)$", (ROOT / "requirements-dev.txt").read_text(encoding="utf-8"), re.M)
    assert version in SpecifierSet(line)


def test_the_citation_names_project_and_license():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    project = yaml.safe_load((ROOT / "sweep.yaml").read_text(encoding="utf-8"))["project"]
    assert citation["authors"] == [{"name": project}]
    assert citation["license"] == "MIT"


def test_the_recipes_have_their_flags():
    rows = (ROOT / "docs/methods.md").read_text(encoding="utf-8").splitlines()
    for name in RECIPES:
        (row,) = [row for row in rows if row.startswith(f"| `{name}` |")]
        for flags in filter(None, (RECIPES[name], FROM_SCRATCH[name])):
            words = [f"--{flag}" if value is True else f"--{flag} {value}" for flag, value in flags.items()]
            assert f"`{' '.join(words)}`" in row
