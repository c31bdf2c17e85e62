"""comparison.html: what it says of which runs, whatever their names and number."""

import ntpath
import re
from pathlib import PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import write_run_folder

import study.comparison_page
from run.cli import UserError
from study.comparison_page import NUM_NAMED, check_own_page, short_names, write_comparison_page
from study.run_records import read_records

TARGETS = np.array([0, 1, 2] * 6)


def answers(num_right):
    return np.eye(3)[np.where(np.arange(len(TARGETS)) < num_right, TARGETS, (TARGETS + 1) % 3)] * 0.8 + 0.1


def page_of(tmp_path, folders):
    path = tmp_path / "comparison.html"
    write_comparison_page(path, read_records(folders))
    return path.read_text(encoding="utf-8")


def test_tables_have_metrics_differing_flags_and_paired_differences(tmp_path):
    folders = [
        write_run_folder(tmp_path / f"g{g}", TARGETS, answers(6 * g), gamma=float(g), beta=0.9) for g in (1, 2, 3)
    ]
    page = page_of(tmp_path, folders)
    assert "Comparison of 3 runs" in page and "--gamma" in page and "--beta" not in page
    assert page.index("1: g3") < page.index("2: g2") < page.index("3: g1")  # the best on validation first
    assert "1.000 [1.000, 1.000]" in page
    assert re.search(r"-0\.333 \[-0\.\d+, -0\.\d+\]", page)
    assert page.count("<svg") == 3 and not re.search(r'(src|href)="(?!data:)', page)


def test_names_in_hangul_with_html_and_very_long_ones_are_text(tmp_path):
    names = ["주름 등급", "<script>alert(1)</script>".replace("/", "_"), "x" * 200]
    classes = ("<b>", "정상 피부", "y" * 300)
    folders = [write_run_folder(tmp_path / name, TARGETS, answers(9), classes, notes=name) for name in names]
    page = page_of(tmp_path, folders)
    assert "주름 등급" in page and "&lt;script&gt;" in page and "<script" not in page


def test_fifty_runs_have_few_colors_and_names(tmp_path):
    folders = [write_run_folder(tmp_path / f"r{k:02d}", TARGETS, answers(k % 19), gamma=k / 50) for k in range(50)]
    page = page_of(tmp_path, folders)
    (chart, *_) = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert chart.count("<polyline") == 50
    assert len(re.findall(r">\d+: r\d+<", chart)) == NUM_NAMED
    assert chart.count('stroke="var(--series-8)" stroke-width="1"') == 50 - NUM_NAMED


def test_runs_that_are_not_finished_have_curves_and_no_test_metrics(tmp_path):
    folders = [write_run_folder(tmp_path / name, TARGETS, answers(9), lr=lr) for name, lr in (("a", 1), ("b", 2))]
    (folders[1] / "results.json").unlink()
    page = page_of(tmp_path, folders)
    assert "3 of 3" in page and "stroke-dasharray" in page and "2: b" in page


def test_runs_of_other_classes_come_with_a_warning(tmp_path):
    folders = [write_run_folder(tmp_path / "a", TARGETS, answers(9))]
    assert "different classes" not in page_of(tmp_path, folders)
    folders.append(write_run_folder(tmp_path / "b", TARGETS, answers(9), classes=("x", "y", "z")))
    assert "different classes" in page_of(tmp_path, folders)


def test_only_its_own_page_is_replaced(tmp_path):
    path = tmp_path / "comparison.html"
    check_own_page(path)  # nothing there
    write_comparison_page(path, read_records([write_run_folder(tmp_path / "a", TARGETS, answers(9))]))
    check_own_page(path)
    path.write_text("<html>my notes</html>")
    with pytest.raises(UserError, match="was not written by"):
        check_own_page(path)
    with pytest.raises(UserError, match="exists and was not"):  # a folder
        check_own_page(tmp_path)


def test_names_in_a_chart_keep_their_ends(tmp_path):
    names = {"checkpoints_20260101_120047": 1.0, "checkpoints_20260101_120048": 2.0}
    folders = [write_run_folder(tmp_path / name, TARGETS, answers(9), gamma=gamma) for name, gamma in names.items()]
    (chart, *_) = re.findall(r"<svg.*?</svg>", page_of(tmp_path, folders), re.DOTALL)
    assert "1: …1_120047" in chart and "2: …1_120048" in chart


def test_short_names_tell_folders_apart(tmp_path):
    folders = [tmp_path / "cv" / "fold_0", tmp_path / "other" / "fold_0", tmp_path / "run"]
    assert list(short_names(folders).values()) == ["cv/fold_0", "other/fold_0", "run"]


def test_folders_on_several_drives_of_windows_keep_their_whole_paths(monkeypatch):
    monkeypatch.setattr(study.comparison_page, "os", SimpleNamespace(path=ntpath))
    folders = [PureWindowsPath(r"C:\runs\a"), PureWindowsPath(r"D:\runs\b")]
    assert list(short_names(folders).values()) == [r"C:\runs\a", r"D:\runs\b"]
