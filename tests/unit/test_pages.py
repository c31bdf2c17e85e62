"""Plots and the report page of a run."""

import numpy as np
import pytest
from PIL import Image

from metrics import full_metrics
from pages import plot_confusion_matrix, plot_curves, write_report
from run.files import HISTORY_COLUMNS


@pytest.mark.parametrize("num_classes", [2, 7, 40])
def test_a_confusion_matrix_is_drawn_for_any_number_of_classes(tmp_path, num_classes):
    names = [f"등급 {c}" for c in range(num_classes)]
    plot_confusion_matrix(tmp_path / "c.png", np.diag(range(num_classes)), names, "test")
    with Image.open(tmp_path / "c.png") as image:
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(10**7)) > 20


def test_curves_are_drawn_from_numbers_and_from_a_history_file(tmp_path):
    rows = [dict.fromkeys(HISTORY_COLUMNS, str(0.1 * epoch)) | {"epoch": str(epoch)} for epoch in range(3)]
    rows.append(dict.fromkeys(HISTORY_COLUMNS, 0.3) | {"epoch": 3})
    plot_curves(tmp_path / "curves.png", rows, best_epoch=2, changes=[1, 3])
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > image.size[1] > 300


def test_letters_that_no_font_has_are_reported_in_one_line(tmp_path, capsys):
    plot_confusion_matrix(tmp_path / "c.png", np.eye(2), ["\ue000", "\ue001"], "private letters, in no font")
    (line,) = capsys.readouterr().out.splitlines()
    assert "c.png" in line and "font" in line


def test_any_class_name_is_drawn_and_shown(tmp_path):
    """Mathematical text, markup, line breaks, names as long as a file system allows, and names that are not UTF-8."""
    names = ["$\\frac$", "$", "<b>", "a\nb", "a,b", "x" * 255, "\udcc1\udcd6", "{}", "%s", "\\", "_^", "🙂", "=1"]
    plot_confusion_matrix(tmp_path / "confusion_matrix.png", np.eye(len(names), dtype=int), names, "test")
    with Image.open(tmp_path / "confusion_matrix.png") as image:
        assert min(image.size) > 300
    targets = np.arange(len(names)).repeat(2)
    test = full_metrics(targets, np.eye(len(names))[targets], names, [2] * len(names)) | {"loss": 0.5}
    results = {"evaluated_epoch": 3, "test": test, "classes": names, "samples_per_cls": [2] * len(names)}
    write_report(tmp_path, {"data_dirs": ["/\udcc1"]}, results)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in ("&lt;b&gt;", "$\\frac$", "\\udcc1\\udcd6", "/\\udcc1"):
        assert name in page
    assert "<b>" not in page


def page_of(run_dir, **more_results):
    """`report.html` of two classes, the first of them half right. -> its text"""
    targets, classes = np.array([0, 0, 1, 1]), ["<dry>", "주름"]
    test = full_metrics(targets, np.eye(2)[[0, 1, 1, 1]], classes, [30, 7]) | {"loss": 0.5}
    results = {"evaluated_epoch": 3, "test": test, "classes": classes, "samples_per_cls": [30, 7]}
    plot_confusion_matrix(run_dir / "confusion_matrix.png", test["confusion_matrix"], ["a", "b"], "test")
    write_report(run_dir, {"beta": 0.999, "data_dirs": ["/a <b>"], "alpha": None}, {**results, **more_results})
    return (run_dir / "report.html").read_text(encoding="utf-8")


def test_the_report_is_one_file_with_metrics_plots_and_flags(tmp_path):
    page = page_of(tmp_path)
    assert "<td>&lt;dry&gt;</td><td>30</td><td>2</td><td>0.500 [0.000,\u00a01.000]</td>" in page
    assert "<td>0.750 [" in page and "data:image/png;base64," in page and "&lt;b&gt;" in page
    assert "http" not in page and "--alpha" not in page


def test_the_report_has_one_row_per_evaluation_and_a_dash_for_a_class_without_images(tmp_path):
    classes = ["<dry>", "주름"]
    lacking = full_metrics(np.array([0, 0]), np.eye(2)[[0, 0]], classes, [30, 7]) | {"loss": 0.1}
    posthoc = {"tau": 0.5, "temperature": 1.25, "test": lacking}
    page = page_of(tmp_path, val=lacking, test=lacking, tta={"test": lacking}, posthoc=posthoc)
    for title in (
        "validation",
        "test",
        "test with the mirror image",
        "test with logit adjustment (tau 0.5, temperature 1.25)",
    ):
        assert page.count(f"<td>{title}</td><td>1.000 [") == 1
    assert "<td>주름</td><td>7</td><td>0</td><td>-</td>" in page
