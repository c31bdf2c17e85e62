"""What a finished run says to do next: each rule, just past its limit and just before it."""

from argparse import Namespace
from pathlib import Path

import pytest

import advice
from advice import RULES, Run, again, find_advice, print_advice
from flag_checks import parse_flags
from flags import build_parser
from run.files import write_history, write_json

DEFAULTS = vars(build_parser().parse_args(["--train_loss", "ce"]))


def run_of(flags=None, results=None, history=()):
    """A run in which nothing is to be said, but for what is given."""
    split = {"balanced_acc": 0.6, "balanced_acc_ci": [0.5, 0.7]}
    per_class = {"0": {"support": 90, "recall": 0.8}, "<1>": {"support": 10, "recall": 0.25}}
    usual = {"val": split, "test": {**split, "per_class": per_class}, "posthoc": {"tau": 0.0}, "best_epoch": 1}
    usual |= {"classes": ["0", "<1>"], "samples_per_cls": [300, 30]}
    return Run(Path("runs/my run"), Namespace(**DEFAULTS | (flags or {})), usual | (results or {}), list(history))


def epochs(**columns):
    """-> rows of history.csv: {column: values over the epochs}"""
    length = len(next(iter(columns.values())))
    constant = dict.fromkeys(("train_acc", "val_acc", "val_balanced_acc"), [0.5] * length)
    values = {"train_loss": [1 / (1 + k) for k in range(length)], "val_loss": [1.0] * length, **constant, **columns}
    return [{"epoch": k, **{name: values[name][k] for name in values}} for k in range(length)]


def said(run):
    """-> [(name of the rule, its text, its command)]"""
    return [(rule.__name__, *found) for rule in RULES if (found := rule(run))]


def of_class(support):
    return {"test": {**run_of().results["test"], "per_class": {"0": {"support": support, "recall": 0.5}}}}


BOTH = {"train_loss": "cb", "use_augmentation": True}
TEST = {**run_of().results["test"], "balanced_acc": 0.4, "balanced_acc_ci": [0.3, 0.49]}
CASES = {
    "loss": (
        run_of(history=epochs(train_loss=[1.5, 1.48, 1.6])),
        run_of(history=epochs(train_loss=[1.5, 1.46, 1.6])),
        "loss_never_fell", "1.500 in the first epoch, 1.480 at best later", "--learning_rate 0.001",
    ),
    "low rate": (
        run_of({"learning_rate": 1e-8}, history=epochs(train_loss=[1.5, 1.5, 1.5])),
        run_of({"learning_rate": 1e-8}, history=epochs(train_loss=[1.5, 1.5])),
        "loss_never_fell", "learning rate of 1e-08", "--learning_rate 1e-07",
    ),
    "splits": (
        run_of(results={"test": TEST}),
        run_of(results={"test": {**TEST, "balanced_acc_ci": [0.3, 0.5]}}),
        "splits_differ", "balanced accuracy 0.600 and 0.400", "--folds 5",
    ),
    "given splits": (
        run_of({"test_dirs": ["x"]}, {"test": TEST}),
        run_of({"test_dirs": ["x"]}),
        "splits_differ", "compare their photographs", "--check_data",
    ),
    "twice": (
        run_of(BOTH, {"posthoc": {"tau": -0.25}}),
        run_of(BOTH, {"posthoc": {"tau": -0.2}}),
        "corrected_twice", "tau is -0.25", "--train_loss ce",
    ),
    "once": (
        run_of({"train_loss": "cb", "sampling": "sqrt"}, {"posthoc": {"tau": -1.0}}),
        run_of({"train_loss": "cb"}, {"posthoc": {"tau": -1.0}}),
        "corrected_twice", "tau is -1", "--train_loss ce",
    ),
    "deferred": (
        run_of({"train_loss": "ldam", "drw_epoch": 8, "use_augmentation": True}, {"posthoc": {"tau": -1.0}}),
        run_of({"train_loss": "ldam", "use_augmentation": True}, {"posthoc": {"tau": -1.0}}),
        "corrected_twice", "--train_loss ldam", "--train_loss ce",
    ),
    "not corrected": (
        run_of(results={"posthoc": {"tau": 0.5}}),
        run_of({"sampling": "balanced"}, {"posthoc": {"tau": 0.5}}),
        "not_corrected", "tau is 0.5, and the recall of <1> is 0.25", "--use_augmentation",
    ),
    "overfits": (
        run_of(history=epochs(train_acc=[0.5, 0.76], val_loss=[1.0, 1.1])),
        run_of(history=epochs(train_acc=[0.5, 0.76], val_loss=[1.0, 1.09])),
        "overfits", "0.76 in training, 0.50 in validation, whose loss has risen from 1.000 to 1.100", "--augment_all",
    ),
    "overfits, augmented": (
        run_of({"augment_all": True, "sampling": "balanced"}, history=epochs(train_acc=[0.5, 0.8], val_loss=[1, 2])),
        run_of({"augment_all": True, "mixup": 0.2}, history=epochs(train_acc=[0.5, 0.8], val_loss=[1, 2])),
        "overfits", "fewer epochs", "--epochs 2",
    ),
    "not finished": (
        run_of(results={"best_epoch": 3}, history=epochs(val_balanced_acc=[0.3, 0.4, 0.5, 0.53])),
        run_of(results={"best_epoch": 3}, history=epochs(val_balanced_acc=[0.3, 0.4, 0.52, 0.53])),
        "not_finished", "has risen from 0.500 to 0.530", "--epochs 200",
    ),
    "small": (
        run_of(results=of_class(8)),
        run_of(results=of_class(10)),
        "small_test_class", "only 8 test images of 0: a recall of one half has the interval 0.22 to 0.78", "--folds 5",
    ),
    "small, folds": (
        run_of(results=of_class(1)),
        run_of({"folds": 5}, of_class(1)),
        "small_test_class", "only 1 test image of 0", "--folds 5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_rule_speaks_from_its_limit_on(name):
    speaks, is_silent, rule, text, flags = CASES[name]
    ((spoken, sentence, command),) = said(speaks)
    assert spoken == rule and text in sentence and command.endswith(flags)
    assert said(is_silent) == []


def test_every_rule_has_a_case():
    assert {case[2] for case in CASES.values()} == {rule.__name__ for rule in RULES}


def test_the_three_most_important_are_kept_and_their_commands_parse(tmp_path, monkeypatch, capsys):
    run = run_of(BOTH, {"test": TEST, "posthoc": {"tau": -1.0}} | of_class(3))
    history = epochs(train_loss=[1.5, 1.5, 1.6], train_acc=[1.0] * 3, val_loss=[1, 2, 3.0])
    folder = tmp_path / "my run"
    folder.mkdir()
    (tmp_path / "data").mkdir()
    results = run.results | {"test": {**TEST, "per_class": of_class(3)["test"]["per_class"]}}
    write_json(folder / "args.json", vars(run.args) | {"data_dirs": [str(tmp_path / "data")], "run_dir": str(folder)})
    write_json(folder / "results.json", results)
    write_history(folder / "history.csv", history)
    found = find_advice(folder)
    assert [piece.text.split()[0] for piece in found] == ["the", "validation", "corrected"]
    print_advice(folder)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0].startswith("advice 1: the training loss never fell")
    monkeypatch.setattr(advice, "MAX_ADVICE", len(RULES))
    for piece in find_advice(folder):
        words = piece.command.replace("'", "").split("python main.py ")[1]
        words = words.replace(str(folder), "FOLDER").split()
        parse_flags([word.replace("FOLDER", str(folder)) for word in words if word != "--check_data"])


def test_data_are_checked_by_one_process(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert again(run_of(), folds=5).startswith("torchrun ... main.py")
    assert again(run_of(), check_data=True).startswith("python main.py")


def test_a_run_whose_files_are_damaged_gets_one_line_instead(tmp_path, capsys):
    print_advice(tmp_path)
    assert capsys.readouterr().out.count("\n") == 1
