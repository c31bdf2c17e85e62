"""The report page and the model card of a run."""

import os
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers import index_of, write_images
from sklearn.dummy import DummyClassifier
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score

import pages
from charts import line_chart
from flags import build_parser
from metrics import full_metrics
from pages import most_confused, reliability_bins, stage_changes, trivial_metrics, write_report
from run.files import read_json, write_history, write_json, write_predictions
from schedule import build_loss_from_flags, plan_stages

ANY_NAMES = ["$\\frac$", "$", "<b>", "a\nb", "a,b", "x" * 255, "{}", "%s", "\\", "_^", "🙂", "=1"]


ARGS = vars(build_parser().parse_args(["--data_dirs", "/a <b>", "--beta", "0.99", "--image_size", "32"]))
EPOCH = {
    "train_loss": 1.0, "train_acc": 0.5, "val_loss": 0.9, "val_acc": 0.6, "val_balanced_acc": 0.4, "val_macro_f1": 0.3,
    "learning_rate": 1e-3, "seconds": 1.0, "images_per_second": 10,
}  # fmt: skip


def page_of(run_dir, targets=(0, 0, 1, 1), predictions=(0, 1, 1, 1), classes=("<dry>", "주름"), counts=(30, 7), **more):
    """`report.html` of a run; the first of two classes is half right. args, results, paths: of the run -> its text"""
    targets, probabilities = np.array(targets), np.eye(len(classes))[list(predictions)] * 0.9 + 0.1 / len(classes)
    args = ARGS | more.get("args", {})
    test = full_metrics(targets, probabilities, classes, counts, args["ordinal"]) | {"loss": 0.5}
    results = {"evaluated_epoch": 3, "best_epoch": 3, "test": test, "classes": list(classes)}
    write_json(run_dir / "args.json", args)
    write_json(run_dir / "results.json", results | {"samples_per_cls": list(counts)} | more.get("results", {}))
    write_history(run_dir / "history.csv", [EPOCH | {"epoch": epoch} for epoch in range(4)])
    paths = more.get("paths", [f"/nowhere/{i}.jpg" for i in range(len(targets))])
    write_predictions(run_dir / "test_predictions.csv", paths, targets, probabilities, classes)
    write_report(run_dir)
    return (run_dir / "report.html").read_text(encoding="utf-8")


def card_of(run_dir):
    return (run_dir / "MODEL_CARD.md").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- the page


def test_any_class_name_is_shown(tmp_path, capsys):
    """Mathematical text, markup, line breaks, and names as long as a file system allows; folders that are not UTF-8."""
    targets = np.arange(len(ANY_NAMES)).repeat(2)
    page = page_of(tmp_path, targets, targets, ANY_NAMES, [2] * len(ANY_NAMES), args={"data_dirs": ["/\udcc1"]})
    for name in ("&lt;b&gt;", "$\\frac$", "/\\udcc1", "a\\nb"):
        assert name in page
    assert "<b>" not in page and "<b>" not in card_of(tmp_path) and not capsys.readouterr().out


def test_the_report_is_one_file_without_scripts_or_a_network(tmp_path, monkeypatch):
    monkeypatch.chdir("/")  # the templates are found from any folder
    paths = [str(path) for path in write_images(tmp_path / "<photos>", 4)]
    page = page_of(tmp_path, paths=paths)
    assert page.count('src="data:image/jpeg;base64,') == 4
    for outside in ("http", "<script", "<link", "@import", "url(", 'src="/', "--alpha", "<b>", "<photos>"):
        assert outside not in page, outside
    assert "000.png" in page and "prefers-color-scheme" in page


def test_the_answer_comes_first_beside_the_trivial_classifier(tmp_path):
    page = page_of(tmp_path)
    answer = page[: page.index("<h2>")]
    assert '<div class="value">0.750</div>' in answer and "0.500" in answer and "&lt;dry&gt;" in answer


def test_flags_that_differ_from_the_defaults_are_apart_from_the_rest(tmp_path):
    page = page_of(tmp_path)
    changed = page[page.index("differ from the defaults") : page.index("<summary>")]
    assert "<td>--beta</td><td>0.99</td><td>0.999</td>" in changed and "/a &lt;b&gt;" in changed
    assert "--epochs" not in changed and "<td>--epochs</td><td>100</td>" in page


def test_the_report_has_one_row_per_evaluation_and_a_dash_for_a_class_without_images(tmp_path):
    classes = ["<dry>", "주름"]
    lacking = full_metrics(np.array([0, 0]), np.eye(2)[[0, 0]], classes, [30, 7]) | {"loss": 0.1}
    posthoc = {"tau": 0.5, "temperature": 1.25, "test": lacking}
    results = {"val": lacking, "test": lacking, "tta": {"test": lacking}, "posthoc": posthoc}
    page = page_of(tmp_path, (0, 0), (0, 0), results=results)
    for title in (
        "validation",
        "test",
        "test with test-time augmentation",
        "test with logit adjustment (tau 0.5, temperature 1.25)",
    ):
        assert page.count(f'<td>{title}</td><td>1.000 <span class="unit">[') == 1
    row = page[page.index("<td>주름</td><td><span") :]
    assert row[: row.index("</tr>")].endswith("<td>0</td>" + "<td>-</td>" * 5)
    assert "Not shown to be better" in page  # one class only: always answering with it is as good


def test_ordered_grades_are_plotted_and_the_share_within_one_grade_is_named(tmp_path):
    grades = [0, 0, 1, 1, 2, 2]
    page = page_of(tmp_path, grades, [0, 2, 1, 1, 2, 2], ("1", "2", "3"), (9, 5, 4), args={"ordinal": True})
    assert "grade of the expert" in page and "83.3 % of the predictions are within one grade" in page
    assert "grade of the expert" not in page_of(tmp_path)


def test_near_duplicates_that_the_run_found_are_shown(tmp_path):
    assert "No search" in page_of(tmp_path)
    paths = [str(path) for path in write_images(tmp_path / "photos", 2)]
    found = {"complete": True, "count": 0, "pairs": []}
    write_json(tmp_path / "near_duplicates.json", found)
    assert "No nearly identical photographs were found" in page_of(tmp_path)
    pairs = [[["train", paths[0]], ["test", paths[1]]]] * 30
    write_json(tmp_path / "near_duplicates.json", found | {"count": 30, "pairs": pairs})
    page = page_of(tmp_path)
    assert "30 pairs of nearly identical photographs" in page and "The first 12 are shown" in page
    assert page.count("data:image") == 24


def test_a_run_of_a_version_with_fewer_flags_has_a_report(tmp_path, capsys):
    page_of(tmp_path)
    write_json(tmp_path / "args.json", {"data_dirs": ["/a"], "image_size": 32, "epochs": 4, "train_loss": "ce"})
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not capsys.readouterr().out and "<td>--epochs</td><td>4</td><td>100</td>" in page


def test_a_run_that_is_not_finished_has_a_report_of_what_there_is(tmp_path):
    write_json(tmp_path / "args.json", ARGS)
    rows = [EPOCH | {"epoch": epoch, "val_balanced_acc": value} for epoch, value in enumerate((0.4, 0.725, 0.5))]
    write_history(tmp_path / "history.csv", rows)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "not finished" in page and "<polyline" in page and "--beta" in page
    assert "best epoch so far (1)" in page and '<div class="value">0.725</div>' in page and "best epoch 1<" in page
    assert not (tmp_path / "MODEL_CARD.md").exists()


# ------------------------------------------------------------------------------------------------------- what fails


def test_a_report_that_fails_is_one_line(tmp_path, capsys):
    write_report(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: report.html: not written (") and "args.json" in line


@pytest.mark.parametrize("damage", ["history.csv", "results.json", "test_predictions.csv", "near_duplicates.json"])
def test_damaged_files_cost_the_page_and_nothing_else(tmp_path, capsys, damage):
    page_of(tmp_path)
    (tmp_path / damage).write_text("epoch,[1\n0,", encoding="utf-8")
    write_report(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert 1 <= len(lines) <= 2 and all(line.startswith("warning: ") for line in lines)


@pytest.mark.parametrize("damage", ["near_duplicates.json", "environment.json", "test_predictions.csv"])
def test_damaged_files_of_a_section_cost_that_section(tmp_path, capsys, damage):
    page_of(tmp_path)
    (tmp_path / "report.html").unlink()
    (tmp_path / damage).write_text('xx,{"', encoding="utf-8")
    assert write_report(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert line.startswith("warning: ") and damage in line and "Confusion matrix" in page
    assert ("Photographs of the test" in page) == (damage != "test_predictions.csv")


def test_a_full_disk_is_a_line_per_file(tmp_path, capsys, monkeypatch):
    page_of(tmp_path)

    def fail(path, mode="w"):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(pages, "atomic_write", fail)
    write_report(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("No space left on device" in line for line in lines)


# ------------------------------------------------------------------------------------------------------------ values


def test_the_trivial_classifier_is_that_of_scikit_learn():
    targets, train = np.array([0, 0, 1, 2, 2, 2]), np.repeat([0, 1, 2], [50, 20, 5])
    test = full_metrics(targets, np.eye(3)[targets], list("abc"), [50, 20, 5], resamples=4)
    trivial = trivial_metrics({"samples_per_cls": [50, 20, 5], "classes": list("abc"), "test": test})
    answers = DummyClassifier(strategy="most_frequent").fit(train[:, None], train).predict(targets[:, None])
    assert trivial["class"] == "a" and trivial["acc"] == np.mean(answers == targets)
    assert trivial["balanced_acc"] == pytest.approx(balanced_accuracy_score(targets, answers))
    assert trivial["macro_f1"] == pytest.approx(f1_score(targets, answers, average="macro"))


def test_the_reliability_bins_add_up_to_the_calibration_error():
    rng = np.random.default_rng(0)
    probabilities, targets = rng.dirichlet(np.ones(4), 500), rng.integers(0, 4, 500)
    bins = reliability_bins(targets, probabilities)
    gaps = sum(number * abs(confidence - right) for confidence, right, number in bins)
    metrics = full_metrics(targets, probabilities, list("abcd"), [1] * 4, resamples=4)
    assert sum(number for *_, number in bins) == 500
    assert gaps / 500 == pytest.approx(metrics["ece"], abs=1e-6)


def test_precision_recall_curves_have_the_average_precision_of_scikit_learn(monkeypatch):
    """The area under the curve, whose precision at a recall is the best at this recall or more, is a little more."""
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 3, 3000)
    probabilities = rng.dirichlet(np.ones(3), 3000) + 0.3 * np.eye(3)[targets]
    test = full_metrics(targets, probabilities, ["<b>", "b", "c"], [9] * 3, resamples=4)
    drawn = []
    monkeypatch.setattr(pages, "line_chart", lambda title, curves, *args, **options: drawn.append(curves[0]))
    rows = pages.precision_recall_charts(targets, probabilities, {"classes": ["<b>", "b", "c"], "test": test})
    for c, ((name, average_precision, share, _), curve) in enumerate(zip(rows, drawn, strict=True)):
        expected = average_precision_score(targets == c, probabilities[:, c])
        assert name == ["<b>", "b", "c"][c] and average_precision == pytest.approx(expected)
        assert share == np.mean(targets == c) and np.trapezoid(curve.ys, curve.xs) == pytest.approx(expected, abs=0.02)


def test_the_most_confused_classes_are_those_with_the_largest_share():
    matrix = [[90, 10, 0], [3, 3, 0], [0, 1, 4]]
    assert most_confused(matrix, list("abc")) == [
        ["b", "a", 3, "50%"], ["c", "b", 1, "20%"], ["a", "b", 10, "10%"],
    ]  # fmt: skip


@pytest.mark.parametrize("flags", [{}, {"drw_epoch": 4}, {"crt_epochs": 3}, {"drw_epoch": 2, "crt_epochs": 3}])
def test_changes_of_the_stage_are_marked_where_the_stages_start(flags):
    args = ARGS | {"train_loss": "cb", "epochs": 10, "num_workers": 0, **flags}
    index = index_of([6, 2])
    criterion = build_loss_from_flags(Namespace(**args), index.counts())
    stages = plan_stages(Namespace(**args), index, criterion, torch.device("cpu"))
    assert stage_changes(args) == [stage.start for stage in stages[1:]]


def test_curves_are_drawn_for_each_epoch_with_the_best_one_marked():
    history = [EPOCH | {"epoch": epoch} for epoch in range(3)]
    loss, metrics, rate = pages.curve_charts(history, 1, [2])
    assert "best epoch 1" in loss and "balanced accuracy" in metrics and "learning rate" in rate
    assert loss.count("<polyline") == 2 and metrics.count("<polyline") == 4
    assert type(loss) is type(line_chart("t", [], "epoch"))


# -------------------------------------------------------------------------------------------------------- model card


def test_the_model_card_has_the_headings_and_the_numbers_of_the_run(tmp_path):
    write_json(
        tmp_path / "environment.json", {"command": "python main.py --x '<y>'", "device": "cpu", "cpu": "some CPU"}
    )
    page_of(tmp_path, (0, 0, 1, 1), (0, 1, 1, 1), ("a|b *c*", "주름"))
    card = card_of(tmp_path)
    headings = [line for line in card.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Model details", "## Intended use", "## Data", "## Metrics", "## Limits", "## How to use",
    ]  # fmt: skip
    recall = read_json(tmp_path / "results.json")["test"]["per_class"]["a|b *c*"]["recall_ci"]
    row = rf"| a\|b \*c\* | 30 | 2 | 0.500 [{recall[0]:.3f}, {recall[1]:.3f}] |"
    assert row in card and "    python main.py --x '<y>'" in card
    assert "Fewer than 20 training images: 주름" in card and "Fewer than 10 test images" in card
    assert f"python predict.py {tmp_path.name}/best_model.pth --images" in card and str(tmp_path) not in card
    assert "None" not in card and os.linesep * 4 not in card


def test_the_model_card_of_an_evaluation_names_the_checkpoint_that_was_evaluated(tmp_path):
    page_of(tmp_path, args={"eval_only": True, "resume": "/runs/x/best_model.pth"})
    card = card_of(tmp_path)
    assert "python predict.py /runs/x/best_model.pth" in card and "in `/runs/x/best_model.pth`" in card
    (tmp_path / "내 <run>").mkdir()
    page_of(tmp_path / "내 <run>")
    assert "predict.py '내 <run>/best_model.pth' --images" in card_of(tmp_path / "내 <run>")
