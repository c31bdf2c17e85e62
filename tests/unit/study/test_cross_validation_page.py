"""label_issues.csv and report.html of a cross-validation."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import write_images, write_run_folder

from run.files import read_rows
from run.folder import FOLDS_FILE
from study import cross_validation_page
from study.cross_validation_page import write_cross_validation

CLASSES = ("정상", "<b>mild</b>", "c")


@pytest.fixture
def cross_validation(tmp_path):
    """Two folds of 30 images, of which each fold has one with a wrong label, which its model doubts."""
    folder = tmp_path / "cv"
    targets = np.array([0, 1, 2] * 5)
    for fold in (0, 1):
        probabilities = np.eye(3)[targets] * 0.7 + 0.1
        probabilities[fold] = 0.02, 0.02, 0.96
        paths = write_images(tmp_path / f"photos{fold}", len(targets))
        flags = {"folds": 2, "fold": fold, "max_megapixels": 100}
        write_run_folder(folder / f"fold_{fold}", targets, probabilities, CLASSES, paths, **flags)
    (folder / FOLDS_FILE).write_text("{}")
    return folder


def test_doubtful_labels_are_listed_and_shown(cross_validation, tmp_path, capsys):
    assert write_cross_validation(cross_validation)
    rows = read_rows(cross_validation / "label_issues.csv")
    assert [row["path"] for row in rows] == [str(tmp_path / f"photos{k}" / f"{k:03d}.png") for k in (0, 1)]
    assert [row["label"] for row in rows] == ["정상", "<b>mild</b>"] and rows[0]["prediction"] == "c"
    assert "2 of 30 labels are doubtful" in capsys.readouterr().out
    page = (cross_validation / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == 2 and "&lt;b&gt;mild&lt;/b&gt;" in page and "<b>mild" not in page
    assert "2 of 2 folds finished: 30 images" in page and "Confusion matrix" in page


def test_folds_that_are_not_finished_are_left_out(cross_validation):
    (cross_validation / "fold_1" / "results.json").unlink()
    write_cross_validation(cross_validation)
    assert len(read_rows(cross_validation / "label_issues.csv")) == 1
    assert "1 of 2 folds finished: 15 images" in (cross_validation / "report.html").read_text()


def test_photographs_are_bounded_and_may_be_missing(cross_validation, monkeypatch):
    monkeypatch.setattr(cross_validation_page, "NUM_THUMBNAILS", 1)
    path = read_first_path(cross_validation)
    path.unlink()
    write_cross_validation(cross_validation)
    page = (cross_validation / "report.html").read_text()
    assert "the first 1 are shown" in page and "cannot be read" in page and "data:image" not in page
    assert len(read_rows(cross_validation / "label_issues.csv")) == 2


def read_first_path(folder):
    return Path(read_rows(folder / "fold_0" / "test_predictions.csv")[0]["path"])


@pytest.mark.parametrize("damage", ["predictions", "results", "folder", "folds.json"])
def test_a_failure_is_a_line_and_nothing_else(cross_validation, capsys, damage):
    if damage == "predictions":
        (cross_validation / "fold_1" / "test_predictions.csv").write_text("path,label\n")
    elif damage == "results":
        (cross_validation / "fold_1" / "results.json").write_text("[]")
    elif damage == "folds.json":
        (cross_validation / "folds.json").write_text("{")
    else:  # the disk takes no file of this name
        (cross_validation / "label_issues.csv").mkdir()
    assert not write_cross_validation(cross_validation)
    assert "warning: " in capsys.readouterr().out


def test_pooled_metrics_are_those_of_the_training_where_it_has_ended(cross_validation):
    write_cross_validation(cross_validation)
    assert "0.933" in (cross_validation / "report.html").read_text()  # 28 of 30 are right
    results = json.loads((cross_validation / "fold_0" / "results.json").read_text())
    pooled = {**results["test"], "acc": 0.123}
    (cross_validation / "folds.json").write_text(json.dumps({"test_pooled": pooled}))
    write_cross_validation(cross_validation)
    assert "0.123" in (cross_validation / "report.html").read_text()
