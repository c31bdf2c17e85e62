"""Whole ablations of the thin network, and mistakes in the grid and the flags."""

import json
import signal

import numpy as np
import pytest
from helpers import TINY_FLAGS, start_with_thin_trials, stop_while_training
from PIL import Image

import ablate
from run.files import read_rows

pytestmark = pytest.mark.usefixtures("thin_trials")
TINY = [*TINY_FLAGS[:5], "--lr", "1e-3"]
METHODS = """
plain: --train_loss ce
deferred: --train_loss ldam --drw_epoch 0.8E --use_augmentation
"""


def run_ablate(tmp_path, data_dir, *flags):
    (tmp_path / "grid.yaml").write_text(METHODS)
    common = ["--data_dirs", data_dir, *TINY, "--grid", tmp_path / "grid.yaml", "--ablate_dir", tmp_path / "out"]
    return ablate.main([*map(str, common), "--epochs", "3", *map(str, flags)])


def test_an_ablation_leaves_a_table_a_text_and_a_plot_and_resumes_with_more_seeds(tmp_path, data_dir, capsys):
    assert run_ablate(tmp_path, data_dir, "--seeds", 1) == 0
    assert "| deferred |" in capsys.readouterr().out
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("best_model.pth")}
    assert len(trained) == 2 and not list(tmp_path.rglob("last_model.pth"))
    assert run_ablate(tmp_path, data_dir, "--seeds", 1, 2, "--jobs", 2, "--baseline", "deferred") == 0
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    rows = read_rows(tmp_path / "out" / "ablation.csv")
    assert [(row["method"], row["seed"]) for row in rows] == [
        (name, seed) for seed in "12" for name in ("plain", "deferred")
    ]
    for row in rows:
        results = json.loads((tmp_path / "out" / f"{row['method']}_seed{row['seed']}" / "results.json").read_text())
        assert float(row["balanced_acc"]) == results["test"]["balanced_acc"]
        assert float(row["posthoc_macro_f1"]) == results["posthoc"]["test"]["macro_f1"]
        assert float(row["recall_10"]) == results["test"]["per_class"]["10"]["recall"]
    table = (tmp_path / "out" / "ablation.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:5]] == [
        "| deferred", "| plain", "| deferred, post-hoc logit adjustment",
    ]  # fmt: skip
    mean = np.mean([float(row["balanced_acc"]) for row in rows if row["method"] == "plain"])
    assert f"| plain | {mean:.3f} [" in table[3]
    with Image.open(tmp_path / "out" / "ablation.png") as image:
        assert image.size[0] > image.size[1] > 150
    assert run_ablate(tmp_path, data_dir, "--seeds", 1, "--gamma", 1) == 2
    assert "was started with other settings (flags of plain_seed1)" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_ablation_that_was_stopped_resumes_where_it_was(tmp_path, data_dir, number):
    (tmp_path / "grid.yaml").write_text("plain: --train_loss ce")
    flags = ["--data_dirs", data_dir, *TINY, "--grid", tmp_path / "grid.yaml", "--ablate_dir", tmp_path / "out"]
    flags += ["--epochs", 60, "--seeds", 7]
    first = start_with_thin_trials("ablate", *flags)
    history = tmp_path / "out" / "plain_seed7" / "history.csv"
    stop_while_training(first, history, number)
    assert ablate.main([str(flag) for flag in flags]) == 0
    assert len(history.read_text().splitlines()) == 61
    assert "resuming with epoch" in (tmp_path / "out" / "plain_seed7.log").read_text()


def test_flags_that_do_not_fit_the_images_are_refused_before_anything_is_trained(tmp_path, data_dir, capsys):
    (tmp_path / "grid.yaml").write_text("plain: --train_loss ce\nwrong: --train_loss focal --alpha 1 2\n")
    common = ["--data_dirs", data_dir, *TINY, "--grid", tmp_path / "grid.yaml", "--ablate_dir", tmp_path / "out"]
    assert ablate.main([*map(str, common), "--epochs", "1", "--seeds", "1"]) == 2
    assert "error: wrong: --alpha: 2 values for 3 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "grid, flags, words",
    [
        ("plain: --train_loss no", [], "plain: argument --train_loss: invalid choice"),
        ("plain: --drw_epoch 2", ["--train_loss", "ce"], "plain: --drw_epoch: there is nothing to defer"),
        ("[1, 2]", [], "--grid: {grid}: expected a mapping"),
        ("a: [", [], "--grid: {grid} is not valid YAML"),
        ("a: --gamma 1\na: --gamma 2", [], "--grid: {grid}: a is listed twice"),
        ("plain: --train_loss ce", ["--baseline", "other"], "--baseline: other is not one of plain"),
        ("plain: --train_loss ce", ["--seed", "3"], "--seed: is set separately for each run"),
        ("plain: --train_loss ce", ["--run_dir=x"], "--run_dir=x: is set separately for each run"),
        ("plain: --train_loss ce", ["--folds", "3"], "--folds: is set separately for each run"),
        ("plain: --train_loss ce\nPlain: --gamma 1", [], "two runs would share a folder"),
        ("plain: --train_loss ce", ["--seeds", "3", "3"], "two runs would share a folder"),
        ("plain: --seed 3", [], "plain: --seed: must be the same for all methods"),
        ("plain: --split 0.8 0.1 0.1", [], "plain: --split: must be the same for all methods"),
        ('plain: "--alpha \'1"', [], "plain: No closing quotation"),
        ("plain: --run_dir x", [], "plain: --run_dir: is set separately for each run"),
        ("plain: --drw_epoch 0.8E", ["--epochs", "2"], "plain: 0.8E: is rounded to 2 of 2 epochs"),
        ("plain:", [], "plain: expected a string of flags"),
        ("plain: --lr nan", [], "plain: argument --learning_rate/--lr: must be above 0, not nan"),
    ],
)
def test_a_mistake_in_grid_or_flags_is_named_before_anything_is_trained(tmp_path, data_dir, capsys, grid, flags, words):
    path = tmp_path / "grid.yaml"
    path.write_text(grid)
    common = ["--grid", path, "--data_dirs", data_dir, *TINY, "--epochs", 4, "--ablate_dir", tmp_path / "out"]
    assert ablate.main([str(word) for word in (*common, *flags)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and words.format(grid=path) in line
    assert not list(tmp_path.rglob("history.csv"))
