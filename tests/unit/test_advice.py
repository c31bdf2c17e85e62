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
    split = {"balanced_acc": 0.8, "balanced_acc_ci": [0.7, 0.9], "macro_f1": 0.6, "macro_f1_ci": [0.5, 0.7]}
    few = {"support": 10, "recall": 0.25, "recall_ci": [0.1, 0.5]}
    per_class = {"0": {"support": 90, "recall": 0.8, "recall_ci": [0.7, 0.9]}, "<1>": few}
    usual = {name: {**split, "per_class": per_class} for name in ("val", "test")}
    usual |= {"best_epoch": 1, "classes": ["0", "<1>"], "samples_per_cls": [300, 30]}
    results = usual | (results or {})
    results["posthoc"] = {"tau": 0.0, "test": results["test"]} | results.get("posthoc", {})
    return Run(Path("runs/my run"), Namespace(**DEFAULTS | (flags or {})), results, list(history))


def undone(tau, f1_low=0.71, balanced=0.8):
    """Results after the adjustment by `tau`: low end of the interval of macro F1, and balanced accuracy."""
    test = {**run_of().results["test"], "macro_f1": 0.8, "macro_f1_ci": [f1_low, 0.9], "balanced_acc": balanced}
    return {"posthoc": {"tau": tau, "test": test}}


def epochs(**columns):
    """-> rows of history.csv: {column: values over the epochs}"""
    length = len(next(iter(columns.values())))
    constant = dict.fromkeys(("train_acc", "val_acc", "val_balanced_acc"), [0.5] * length)
    values = {"train_loss": [1 / (1 + k) for k in range(length)], "val_loss": [1.0] * length, **constant, **columns}
    return [{"epoch": k, **{name: values[name][k] for name in values}} for k in range(length)]


def said(run):
    """-> [(name of the rule, its text, its command)]"""
    return [(rule.__name__, *found) for rule in RULES if (found := rule(run))]


def of_class(support, train=3, val=1, subjects=None):
    """Results with a class that has this many test images, and this many subjects in validation and test each."""
    known = {} if subjects is None else {"subjects": subjects}
    rows = {split: {**run_of().results["val"], "per_class": {"0": {"support": n, "recall": 0.5, **known}}}
            for split, n in {"val": val, "test": support}.items()}  # fmt: skip
    return {**rows, "classes": ["0"], "samples_per_cls": [train]}


BOTH = {"train_loss": "cb", "use_augmentation": True}
RECALLS = {"0": {"support": 90, "recall": 0.2}, "<1>": {"support": 10, "recall": 0.1}}
TEST = {**run_of().results["test"], "balanced_acc": 0.6, "balanced_acc_ci": [0.55, 0.69], "per_class": RECALLS}
CLOSE = {"0": {"support": 90, "recall": 0.88, "recall_ci": [0.8, 0.93]},
         "<1>": {"support": 90, "recall": 0.87, "recall_ci": [0.79, 0.92]}}  # fmt: skip
ABSENT = {**CLOSE, "<1>": {"support": 0, "recall": None, "recall_ci": None}}
NOTHING = run_of().results["test"] | {"balanced_acc": 0.52, "balanced_acc_ci": [0.5, 0.6]}
FEW = {"0": {"support": 90, "recall": 0.6}, "<1>": {"support": 10, "recall": 0.1}}
DEFERRED = {"drw_epoch": 2, "sampling": "sqrt"}
ALL = {**DEFERRED, "augment_all": True}
CASES = {
    "nothing": (
        run_of({"learning_rate": 0.1}, results={"test": NOTHING}),
        run_of({"learning_rate": 0.1}, results={"test": {**NOTHING, "balanced_acc_ci": [0.5001, 0.6]}}),
        "learned_nothing", "balanced accuracy 0.520 [0.500, 0.600] in the test of 2 classes", "--learning_rate 0.0001",
    ),
    "nothing, low rate": (
        run_of({"learning_rate": 1e-8}, results={"test": NOTHING}),
        run_of({"learning_rate": 1e-8}, results={"test": {**NOTHING, "balanced_acc_ci": [0.3, 0.76]}}),
        "learned_nothing", "learning rate of 1e-08", "--learning_rate 0.0001",
    ),
    "nothing, usual rate": (
        run_of({"learning_rate": 2.99e-4, "pretrained": False, "weights": "x.pth"}, results={"test": NOTHING}),
        run_of({"learning_rate": 2.99e-4}),
        "learned_nothing", "check the photographs", "--check_data",
    ),
    "nothing, unusual rate": (
        run_of({"learning_rate": 3.01e-4}, results={"test": NOTHING}),
        run_of({"learning_rate": 3.01e-4}),
        "learned_nothing", "learning rate of 0.000301 is far from the usual one", "--learning_rate 0.0001",
    ),
    "nothing, many batches per step": (
        run_of({"learning_rate": 1.1e-3, "grad_accum": 16}, results={"test": NOTHING}),
        run_of({"learning_rate": 1.1e-3, "grad_accum": 16}),
        "learned_nothing", "check the photographs", "--check_data",
    ),
    "nothing, random weights, large batches": (
        run_of({"learning_rate": 2e-4, "pretrained": False, "batch_size": 512}, results={"test": NOTHING}),
        run_of({"learning_rate": 2e-4, "pretrained": False, "batch_size": 512}),
        "learned_nothing", "learning rate of 0.0002 is far from the usual one", "--learning_rate 0.004",
    ),
    "nothing, adjusted": (
        run_of(results={"test": NOTHING}),
        run_of(results={"test": NOTHING, "posthoc": run_of().results["posthoc"]}),
        "learned_nothing", "in the test of 2 classes; check the photographs", "--check_data",
    ),
    "splits": (
        run_of(results={"test": TEST}),
        run_of(results={"test": {**TEST, "balanced_acc_ci": [0.55, 0.7]}}),
        "splits_differ", "balanced accuracy 0.800 and 0.600", "--folds 5",
    ),
    "splits, few images": (
        run_of(results={"test": TEST}),
        run_of(results={"test": {**TEST, "per_class": FEW}}),
        "splits_differ", "balanced accuracy 0.800 and 0.600", "--folds 5",
    ),
    "given splits": (
        run_of({"test_dirs": ["x"]}, {"test": TEST}),
        run_of({"test_dirs": ["x"]}),
        "splits_differ", "compare their photographs", "--check_data",
    ),
    "twice": (
        run_of(BOTH, undone(-0.25)),
        run_of(BOTH, undone(-0.2)),
        "corrected_twice", "part of it undone (tau -0.25), the test has a macro F1 of 0.800 instead of 0.600, a "
        "balanced accuracy of 0.800 instead of 0.800", "--train_loss ce",
    ),
    "twice, new head": (
        run_of(BOTH, undone(-0.5)),
        run_of({**BOTH, "crt_epochs": 2}, undone(-0.5)),
        "corrected_twice", "(tau -0.5)", "--train_loss ce",
    ),
    "once": (
        run_of({"train_loss": "cb", "sampling": "sqrt"}, undone(-1.0)),
        run_of({"train_loss": "cb"}, undone(-1.0)),
        "corrected_twice", "(tau -1)", "--train_loss ce",
    ),
    "deferred": (
        run_of({"train_loss": "ldam", "drw_epoch": 8, "use_augmentation": True}, undone(-1.0)),
        run_of({"train_loss": "ldam", "use_augmentation": True}, undone(-1.0)),
        "corrected_twice", "--train_loss ldam", "--train_loss ce",
    ),
    "twice, macro F1": (
        run_of(BOTH, undone(-0.5, f1_low=0.71)),
        run_of(BOTH, undone(-0.5, f1_low=0.7)),
        "corrected_twice", "(tau -0.5)", "--train_loss ce",
    ),
    "twice, balanced accuracy": (
        run_of(BOTH, undone(-0.5, balanced=0.8)),
        run_of(BOTH, undone(-0.5, balanced=0.79)),
        "corrected_twice", "(tau -0.5)", "--train_loss ce",
    ),
    "twice, exact": (
        run_of(BOTH, {"posthoc_exact": {"test": undone(0)["posthoc"]["test"]}} | undone(0.0)),
        run_of(BOTH, {"posthoc_exact": {"test": undone(0, f1_low=0.1)["posthoc"]["test"]}} | undone(0.0)),
        "corrected_twice", "the shift of both undone", "--train_loss ce",
    ),
    "twice, more than half and half": (
        run_of({"train_loss": "logit_adjustment", "tau": 0.6, "sampling": "sqrt"}, undone(-0.5)),
        run_of({"train_loss": "logit_adjustment", "tau": 0.5, "sampling": "sqrt"}, undone(-0.5)),
        "corrected_twice", "(tau -0.5)", "--train_loss ce",
    ),
    "twice, shifted": (
        run_of({**BOTH, "train_loss": "logit_adjustment", "tau": 0.5}, undone(-0.5)),
        run_of({**BOTH, "train_loss": "logit_adjustment", "tau": 0.0}, undone(-0.5)),
        "corrected_twice", "(tau -0.5)", "--train_loss ce",
    ),
    "twice, shifted by alpha": (
        run_of({"train_loss": "focal", "alpha": [1, 2], "sampling": "sqrt"}, undone(-0.5)),
        run_of({"train_loss": "focal", "alpha": [2, 2], "sampling": "sqrt"}, undone(-0.5)),
        "corrected_twice", "(tau -0.5)", "--train_loss ce",
    ),
    "not corrected, certain": (
        run_of(results={"posthoc": {"tau": 0.5}}),
        run_of(results={"posthoc": {"tau": 2.0}, "test": {**run_of().results["test"], "per_class": CLOSE}}),
        "not_corrected", "tau is 0.5, and the recall of <1> is 0.25, that of 0 0.80", "--use_augmentation",
    ),
    "not corrected, class without test images": (
        run_of(results={"posthoc": {"tau": 0.5}}),
        run_of(results={"posthoc": {"tau": 2.0}, "test": {**run_of().results["test"], "per_class": ABSENT}}),
        "not_corrected", "tau is 0.5", "--use_augmentation",
    ),
    "not corrected by a head": (
        run_of(results={"posthoc": {"tau": 0.5}}),
        run_of({"crt_epochs": 2}, {"posthoc": {"tau": 0.5}}),
        "not_corrected", "tau is 0.5", "--use_augmentation",
    ),
    "not corrected by weights": (
        run_of({"train_loss": "focal", "alpha": [2.0]}, {"posthoc": {"tau": 0.5}}),
        run_of({"train_loss": "focal", "alpha": [0.1, 2.0]}, {"posthoc": {"tau": 0.5}}),
        "not_corrected", "tau is 0.5", "--use_augmentation",
    ),
    "not corrected": (
        run_of(results={"posthoc": {"tau": 0.5}}),
        run_of({"sampling": "balanced"}, {"posthoc": {"tau": 0.5}}),
        "not_corrected", "tau is 0.5, and the recall of <1> is 0.25, that of 0 0.80", "--use_augmentation",
    ),
    "overfits": (
        run_of(history=epochs(train_acc=[0.5, 0.76], val_loss=[1.0, 1.1])),
        run_of(history=epochs(train_acc=[0.5, 0.76], val_loss=[1.0, 1.09])),
        "overfits", "0.76 in training, 0.50 in validation, whose loss has risen from 1.000 to 1.100", "--augment_all",
    ),
    "overfits, augmented": (
        run_of({"augment_all": True, "sampling": "balanced"}, history=epochs(train_acc=[0.5, 0.8], val_loss=[1, 2])),
        run_of({"augment_all": True, "mixup": 0.2}, history=epochs(train_acc=[0.5, 0.8], val_loss=[1, 2])),
        "overfits", "0.80 in training, balanced accuracy 0.50 in validation", "--epochs 2",
    ),
    "overfits, best is last": (
        run_of({"augment_all": True, "epochs": 3}, history=epochs(train_acc=[0.8] * 3, val_loss=[1, 2, 3])),
        run_of({"augment_all": True, "epochs": 2}, history=epochs(train_acc=[0.8] * 2, val_loss=[1, 2])),
        "overfits", "fewer epochs", "--epochs 2",
    ),
    "overfits, sqrt": (
        run_of({"sampling": "sqrt"}, history=epochs(train_acc=[0.9] * 2, val_acc=[0.6] * 2, val_loss=[1, 2])),
        run_of({"sampling": "sqrt"}, history=epochs(train_acc=[0.9] * 2, val_acc=[0.8] * 2, val_loss=[1, 2])),
        "overfits", "0.90 in training, 0.60 in validation", "--augment_all",
    ),
    "overfits, not a number": (
        run_of(history=epochs(train_acc=[0.9] * 2, val_loss=[1, 2])),
        run_of(history=epochs(train_acc=[0.9] * 2, val_loss=[1, float("nan")])),
        "overfits", "risen from 1.000 to 2.000", "--augment_all",
    ),
    "overfits, stages": (
        run_of(DEFERRED, history=epochs(train_acc=[0.9] * 4, val_loss=[1, 1, 2, 3])),
        run_of(DEFERRED, history=epochs(train_acc=[0.9] * 4, val_loss=[1, 1, 2, 2])),
        "overfits", "risen from 2.000 to 3.000", "--augment_all",
    ),
    "overfits, fewer than a stage": (
        run_of(ALL, {"best_epoch": 2}, epochs(train_acc=[0.9] * 4, val_loss=[1, 1, 2, 3])),
        run_of(ALL, {"best_epoch": 1}, epochs(train_acc=[0.9] * 4, val_loss=[1, 1, 2, 3])),
        "overfits", "fewer epochs", "--epochs 3",
    ),
    "not finished": (
        run_of(results={"best_epoch": 3}, history=epochs(val_balanced_acc=[0.3, 0.4, 0.5, 0.53])),
        run_of(results={"best_epoch": 3}, history=epochs(val_balanced_acc=[0.3, 0.4, 0.52, 0.53])),
        "not_finished", "has risen from 0.500 to 0.530", "--resume 'runs/my run/best_model.pth' --epochs 200",
    ),
    "not finished, a quarter": (
        run_of(results={"best_epoch": 4}, history=epochs(val_balanced_acc=[0.3, 0.4, 0.5, 0.51, 0.53])),
        run_of(results={"best_epoch": 4}, history=epochs(val_balanced_acc=[0.3, 0.4, 0.5, 0.53, 0.54])),
        "not_finished", "has risen from 0.510 to 0.530", "--epochs 200",
    ),
    "not finished, stages": (
        run_of(DEFERRED, {"best_epoch": 5}, epochs(val_balanced_acc=[0.7, 0.7, 0.71, 0.71, 0.71, 0.8])),
        run_of({"crt_epochs": 1}, {"best_epoch": 3}, epochs(val_balanced_acc=[0.7, 0.7, 0.7, 0.8])),
        "not_finished", "has risen from 0.710 to 0.800", "--epochs 200",
    ),
    "not finished, folds": (
        run_of({"folds": 5}, {"best_epoch": 3}, epochs(val_balanced_acc=[0.3, 0.4, 0.5, 0.6])),
        run_of({"folds": 5}, {"best_epoch": 2}, epochs(val_balanced_acc=[0.3, 0.4, 0.5, 0.6])),
        "not_finished", "train for more epochs", "--config 'runs/my run/args.json' --epochs 200",
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
    "small, subjects": (
        run_of({"group_regex": "."}, of_class(8, train=90, subjects=3)),
        run_of({"group_regex": "."}, of_class(8, train=90, subjects=2)),
        "small_test_class", "only 8 test images of 0", "--folds 5",
    ),
    "small, subjects of an older run": (
        run_of({}, of_class(8, train=90)),
        run_of({}, of_class(8, train=90) | {"subject_column": "id"}),
        "small_test_class", "only 8 test images of 0", "--folds 5",
    ),
    "small, too small": (
        run_of({"split": [0.5, 0.3, 0.2]}, of_class(1, train=3)),
        run_of({"split": [0.5, 0.3, 0.2]}, of_class(1, train=2)),
        "small_test_class", "only 1 test image of 0", "--folds 5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_rule_speaks_from_its_limit_on(name):
    speaks, is_silent, rule, text, flags = CASES[name]
    ((spoken, sentence, command),) = said(speaks)
    assert spoken == rule and text in sentence and command.endswith(flags)
    assert said(is_silent) == []


def test_a_learning_rate_that_learns_the_training_images_is_not_the_fault():
    run = run_of({"learning_rate": 0.1}, {"test": NOTHING}, epochs(train_acc=[0.6, 0.9, 0.99], val_loss=[1, 1.5, 2]))
    assert [(name, command.split()[-1]) for name, _, command in said(run)] == [
        ("learned_nothing", "--check_data"), ("overfits", "--augment_all"),
    ]  # fmt: skip


def test_every_rule_has_a_case():
    assert {case[2] for case in CASES.values()} == {rule.__name__ for rule in RULES}


def test_the_three_most_important_are_kept_and_their_commands_parse(tmp_path, monkeypatch, capsys):
    run = run_of(BOTH, {"test": NOTHING} | undone(-1.0))
    history = epochs(train_acc=[1.0] * 3, val_loss=[1, 2, 3.0])
    folder = tmp_path / "my run"
    folder.mkdir()
    (tmp_path / "data").mkdir()
    few = {name: {**row, "support": 3} for name, row in RECALLS.items()}
    results = run.results | {"test": {**NOTHING, "per_class": few}}
    results["posthoc"]["test"]["balanced_acc_ci"] = NOTHING["balanced_acc_ci"]  # not "corrected twice" either
    results["val"] = {**run.results["val"], "per_class": {name: {"support": 90, "recall": 1.0} for name in RECALLS}}
    write_json(folder / "args.json", vars(run.args) | {"data_dirs": [str(tmp_path / "data")], "run_dir": str(folder)})
    write_json(folder / "results.json", results)
    write_history(folder / "history.csv", history)
    found = find_advice(folder)
    assert [piece.text.split()[0] for piece in found] == ["no", "validation", "overfits:"]
    print_advice(folder)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0].startswith("advice 1: no better than a constant answer")
    monkeypatch.setattr(advice, "MAX_ADVICE", len(RULES))
    for piece in find_advice(folder):
        words = piece.command.replace("'", "").split("python main.py ")[1]
        words = words.replace(str(folder), "FOLDER").split()
        parse_flags([word.replace("FOLDER", str(folder)) for word in words])


def test_data_are_checked_by_one_process(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert again(run_of(), folds=5).startswith("torchrun ... main.py")
    assert again(run_of(), check_data=True).startswith("python main.py")


def test_a_run_whose_files_are_damaged_gets_one_line_instead(tmp_path, capsys):
    print_advice(tmp_path)
    assert capsys.readouterr().out.count("\n") == 1
