"""Plots of a run."""

import numpy as np
import pytest
from PIL import Image

from plots import plot_confusion_matrix, plot_curves
from run.files import HISTORY_COLUMNS

ANY_NAMES = ["$\\frac$", "$", "<b>", "a\nb", "a,b", "x" * 255, "\udcc1\udcd6", "{}", "%s", "\\", "_^", "🙂", "=1"]


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


def test_any_class_name_is_drawn(tmp_path):
    """Mathematical text, markup, line breaks, names as long as a file system allows, and names that are not UTF-8."""
    plot_confusion_matrix(tmp_path / "confusion_matrix.png", np.eye(len(ANY_NAMES), dtype=int), ANY_NAMES, "test")
    with Image.open(tmp_path / "confusion_matrix.png") as image:
        assert min(image.size) > 300
