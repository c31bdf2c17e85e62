"""The report page of a run."""

import numpy as np

from metrics import full_metrics
from pages import write_report
from run.files import write_json, write_predictions

ANY_NAMES = ["$\\frac$", "$", "<b>", "a\nb", "a,b", "x" * 255, "\udcc1\udcd6", "{}", "%s", "\\", "_^", "🙂", "=1"]


def page_of(run_dir, targets=(0, 0, 1, 1), predictions=(0, 1, 1, 1), classes=("<dry>", "주름"), counts=(30, 7), **more):
    """`report.html` of a run; the first of two classes is half right. args, history, ...: files -> its text"""
    targets, probabilities = np.array(targets), np.eye(len(classes))[list(predictions)] * 0.9 + 0.1 / len(classes)
    test = full_metrics(targets, probabilities, classes, counts) | {"loss": 0.5}
    results = {"evaluated_epoch": 3, "best_epoch": 3, "test": test, "classes": list(classes)}
    results |= {"samples_per_cls": list(counts), **more.get("results", {})}
    args = {"beta": 0.999, "data_dirs": ["/a <b>"], "alpha": None, "image_size": 32, "resize": "stretch"}
    write_json(run_dir / "args.json", args | more.get("args", {}))
    write_json(run_dir / "results.json", results)
    paths = [f"/nowhere/{i}.jpg" for i in range(len(targets))]
    write_predictions(run_dir / "test_predictions.csv", paths, targets, probabilities, classes)
    write_report(run_dir)
    return (run_dir / "report.html").read_text(encoding="utf-8")


def test_any_class_name_is_shown(tmp_path):
    """Mathematical text, markup, line breaks, names as long as a file system allows, and names that are not UTF-8."""
    targets = np.arange(len(ANY_NAMES)).repeat(2)
    page = page_of(tmp_path, targets, targets, ANY_NAMES, [2] * len(ANY_NAMES), args={"data_dirs": ["/\udcc1"]})
    for name in ("&lt;b&gt;", "$\\frac$", "\\udcc1\\udcd6", "/\\udcc1", "a\\nb"):
        assert name in page
    assert "<b>" not in page


def test_the_report_is_one_file_with_metrics_and_flags(tmp_path):
    page = page_of(tmp_path)
    assert "<td>&lt;dry&gt;</td><td>30</td><td>2</td><td>0.500 [0.000,\u00a01.000]</td>" in page
    assert "<td>0.750 [" in page and "&lt;b&gt;" in page
    assert "http" not in page and "--alpha" not in page


def test_the_report_has_one_row_per_evaluation_and_a_dash_for_a_class_without_images(tmp_path):
    classes = ["<dry>", "주름"]
    lacking = full_metrics(np.array([0, 0]), np.eye(2)[[0, 0]], classes, [30, 7]) | {"loss": 0.1}
    posthoc = {"tau": 0.5, "temperature": 1.25, "test": lacking}
    results = {"val": lacking, "test": lacking, "tta": {"test": lacking}, "posthoc": posthoc}
    page = page_of(tmp_path, (0, 0), (0, 0), results=results)
    for title in (
        "validation",
        "test",
        "test with the mirror image",
        "test with logit adjustment (tau 0.5, temperature 1.25)",
    ):
        assert page.count(f"<td>{title}</td><td>1.000 [") == 1
    assert "<td>주름</td><td>7</td><td>0</td><td>-</td>" in page


def test_a_report_that_fails_is_one_line(tmp_path, capsys):
    write_report(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: report.html was not written (") and "args.json" in line
