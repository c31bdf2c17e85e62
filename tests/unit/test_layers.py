"""The layout of docs/design.md: layers, size of the files, names, and commands that start at once."""

import ast
import graphlib
import json
import subprocess
import sys
from collections import defaultdict

import pytest
from helpers import PATIENCE, ROOT

# from the top; a module imports only from layers below its own, or from its own package
LAYERS = (
    ("main", "predict", "export", "search", "ablate", "report", "bench", "prepare_aihub"),
    ("study",),
    ("evaluation", "inference", "portable", "resume", "batch_search", "data_report"),
    ("pages", "heatmaps"),
    ("gallery",),
    ("schedule", "engine", "explain"),
    ("dataset_double", "model", "tracking", "calibration", "averaging", "parallel", "subgroups", "advice"),
    ("flag_checks",),
    ("images",),
    ("metrics", "utils", "resnet_custom", "muon", "plots", "charts"),
    ("flag_queries",),
    ("flags",),
    ("data_flags",),
    ("run",),
)
COMMANDS = LAYERS[0]
PACKAGES = ("images", "run", "study")
CORE = ("main", "schedule", "engine", "model", "resnet_custom", "dataset_double", "utils", "metrics")
MAX_LINES, MAX_CORE_LINES, MAX_MAIN_LINES = 450, 1900, 280  # of a file; of CORE together; of main.py
# names that every command has
COMMAND_FUNCTIONS = {"main", "run", "build_parser"}
# parameters whose class is in a layer above: they cannot be annotated
FROM_ABOVE = {"running_metrics"}
# mistakes in the flags that each command finds itself
MISTAKES = {
    "main": ["--epochs", "none"],
    "predict": ["runs/x", "--images", "a.jpg", "--coverage", "1"],
    "search": ["sweep.yaml", "--jobs", "0"],
    "ablate": ["--epochs", "0"],
    "report": [],
    "bench": ["--parts", "everything"],
    "export": ["runs/x", "model.h5"],
    "prepare_aihub": ["TL.zip", "--target", "forehead_wrinkle"],
}
SLOW_IMPORTS = ("torch", "torchvision", "numpy", "wandb", "sklearn", "matplotlib", "optuna", "cv2", "PIL", "joblib")
MAX_CPU_SECONDS = 1


def find_modules():
    """-> {dotted name: its file}, without tests"""
    files = [*ROOT.glob("*.py"), *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))]
    dotted = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in dotted.items()}


MODULES = find_modules()
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


def imported_modules(tree):
    """Dotted names of the project's modules that are imported anywhere in a file, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            # from study import process: the module; from study.process import MAIN: a name in it
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            names |= submodules or {node.module}
    return names & MODULES.keys()


IMPORTS = {name: imported_modules(tree) for name, tree in TREES.items()}


def layer_of(name):
    """-> position in LAYERS of a module or its package"""
    top = name.partition(".")[0]
    return next(number for number, layer in enumerate(LAYERS) if top in layer)


def line_count(name):
    return len(MODULES[name].read_text(encoding="utf-8").splitlines())


def test_every_module_belongs_to_exactly_one_layer():
    assert sorted(name for layer in LAYERS for name in layer) == sorted({name.partition(".")[0] for name in MODULES})


def test_the_packages_are_all_there_are():
    """A new folder with Python files is listed here, or the other tests would not look at it."""
    folders = {file.parent.name for file in ROOT.glob("*/*.py")}
    assert folders - {"tests", "docs"} == set(PACKAGES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_lower_layers_or_its_own_package(name):
    package, _, is_submodule = name.partition(".")
    own_package = {other for other in MODULES if is_submodule and other.startswith(f"{package}.")}
    above = {other for other in IMPORTS[name] - own_package if layer_of(other) <= layer_of(name)}
    assert not above, f"{name} imports {', '.join(sorted(above))}, which are not in a layer below it"


def test_nobody_imports_a_command():
    importers = {name: IMPORTS[name] & set(COMMANDS) for name in MODULES}
    assert not {name: found for name, found in importers.items() if found}


def test_no_modules_import_each_other_in_a_circle():
    graphlib.TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the circle


def test_no_file_is_longer_than_450_lines():
    assert not {name: count for name in MODULES if (count := line_count(name)) > MAX_LINES}


def test_main_can_be_read_in_five_minutes_and_the_core_in_an_afternoon():
    assert line_count("main") <= MAX_MAIN_LINES
    assert sum(map(line_count, CORE)) <= MAX_CORE_LINES


def test_train_comes_first_in_main():
    functions = [node.name for node in TREES["main"].body if isinstance(node, ast.FunctionDef)]
    assert functions[0] == "train"


def test_every_file_says_its_subject_in_its_first_line():
    first_lines = {name: (ast.get_docstring(tree) or "").partition("\n")[0] for name, tree in TREES.items()}
    empty = [name for name, line in first_lines.items() if len(line) < 20 and MODULES[name].read_bytes()]
    assert not empty


def test_no_two_public_functions_or_classes_have_the_same_name():
    places = defaultdict(list)
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                is_usual = node.name in COMMAND_FUNCTIONS and name in (*COMMANDS, "flags")
                places[node.name] += [] if is_usual else [name]
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}


def test_public_functions_have_type_hints():
    """Every parameter of a function or method."""
    missing = []
    for name, tree in TREES.items():
        for owner in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
            for node in owner.body:
                is_public = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
                if not is_public or getattr(owner, "name", "").startswith("_"):
                    continue
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = {a.arg for a in arguments if a.annotation is None} - FROM_ABOVE - {"self", "cls"}
                missing += [f"{name}.{node.name}({argument})" for argument in bare]
    assert not missing


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_answers_at_once_without_importing_what_only_its_work_needs(command):
    """--help and a mistake in the flags: no slow import, under a second, exit status 0 and 2."""
    script = f"""
import json, sys, time
sys.path.insert(0, {str(ROOT)!r})
import {command}
try:
    statuses = [{command}.main(["--help"])]
except SystemExit as end:
    statuses = [end.code]
statuses.append({command}.main({MISTAKES[command]!r}))
imported = [name for name in {SLOW_IMPORTS!r} if name in sys.modules]
print(json.dumps([statuses, imported, time.process_time()]))
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    statuses, imported, seconds = json.loads(process.stdout.splitlines()[-1])
    assert statuses == [0, 2] and not imported and seconds < MAX_CPU_SECONDS
    assert process.stdout.startswith("usage: ")
    assert process.stderr.startswith("error: ") and len(process.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_main_of_argv_with_an_exit_status(command):
    (main,) = [node for node in TREES[command].body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert ast.unparse(main.args) == "argv: list[str] | None=None" and ast.unparse(main.returns) == "int"
