"""The same steps for every remedy, the statistics of the comparison, and whole ablations of the thin network."""

import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY_FLAGS, read_rows, start_with_thin_trials, stop_while_training
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score

import ablate
from ablate import Run, compare, holm, markdown, plan_runs, read_run, read_runs, resampled_figures
from files import write_predictions

pytestmark = pytest.mark.usefixtures("thin_trials")
TINY = [*TINY_FLAGS[:5], "--lr", "1e-3"]
REMEDIES = """
plain: --train_loss ce
oversampled: --train_loss ce --use_augmentation
deferred: --train_loss ldam --drw_epoch 0.8E
"""


def plan(tmp_path, data_dir, grid, *flags, epochs=10):
    args = SimpleNamespace(epochs=epochs, seeds=[4, 5])
    return plan_runs(args, ["--data_dirs", str(data_dir), *TINY, *flags], grid, tmp_path)


def value(run, flag):
    return run.flags[len(run.flags) - run.flags[::-1].index(flag)]


def test_every_remedy_gets_the_same_steps_and_the_same_warm_up(tmp_path, data_dir):
    """22 training images are 3 batches of 8; oversampled to 3 x 12 they are 5."""
    grid = {
        "plain": "--train_loss ce",
        "oversampled": "--train_loss ce --use_augmentation",
        "deferred": "--train_loss ldam --drw_epoch 0.8E",
        "late": "--train_loss cb --use_augmentation --drw_epoch 0.5E",
        "larger batches": "--batch_size 16",
    }
    runs, num_images = plan(tmp_path, data_dir, grid)
    assert num_images == 35
    assert [(run.remedy, run.seed) for run in runs] == [(name, seed) for seed in (4, 5) for name in grid]
    assert [value(run, "--epochs") for run in runs[:5]] == ["10", "6", "10", "8", "15"]  # 30, 30, 30, 32, 30 steps
    assert [value(run, "--warmup_epochs") for run in runs[:5]] == ["1", "0.6", "1", "1", "1.5"]  # 3 steps
    assert value(runs[2], "--drw_epoch") == "8" and value(runs[3], "--drw_epoch") == "4"
    assert value(runs[7], "--seed") == "5" and runs[7].folder.name == "deferred_seed5"


def test_resampled_figures_are_those_of_scikit_learn(tmp_path):
    rng = np.random.default_rng(0)
    targets, predictions = rng.integers(3, size=(2, 300))
    test = read_run(finished_run(tmp_path / "a", "a", 0, targets, np.eye(3)[predictions]))
    figures = resampled_figures({"a": [test.predictions["raw"]]}, [test])["a"]
    assert figures["balanced_acc"][0] == pytest.approx(balanced_accuracy_score(targets, predictions))
    assert figures["macro_f1"][0] == pytest.approx(f1_score(targets, predictions, average="macro"))
    # stratified: the recall of n images with probability p has the variance p (1 - p) / n
    recalls = [np.mean(predictions[targets == c] == c) for c in range(3)]
    variance = sum(p * (1 - p) / (targets == c).sum() for c, p in enumerate(recalls)) / 9
    assert figures["balanced_acc"][1:].std() == pytest.approx(variance**0.5, rel=0.05)
    assert figures["balanced_acc"].shape == (1 + ablate.RESAMPLES, 1)


@pytest.mark.parametrize("path, group_regex", [("{number}.png", None), ("{seed}/{number}_{seed}.png", r"^(\d+)_")])
def test_the_same_images_or_persons_of_several_seeds_tell_no_more_than_those_of_one(tmp_path, path, group_regex):
    targets = np.repeat([0, 1, 2], [40, 20, 15])
    probabilities = probabilities_of(np.random.default_rng(0), targets, 1.0)
    about = {"path": path, "group_regex": group_regex}
    runs = [finished_run(tmp_path / f"{seed}", "a", seed, targets, probabilities, **about) for seed in range(6)]
    one, six = (np.ptp(compare(read_runs(chosen), "a")[0]["balanced_acc_ci"]) for chosen in (runs[:1], runs))
    assert six == pytest.approx(one, rel=0.1)


def test_seeds_that_differ_widen_the_interval_as_the_t_test_has_it_but_for_its_quantile(tmp_path):
    """Without noise of images the standard error is that of the mean over the seeds."""
    targets, runs, rng = np.repeat([0, 1, 2], 4000), [], np.random.default_rng(0)
    accuracies = (0.5, 0.6, 0.9, 0.7)
    for seed, accuracy in enumerate(accuracies):
        right = rng.random(len(targets)) < accuracy
        probabilities = np.eye(3)[np.where(right, targets, (targets + 1) % 3)] * 0.9 + 0.03
        runs.append(finished_run(tmp_path / f"{seed}", "a", seed, targets, probabilities))
    (row, *_) = compare(read_runs(runs), "a")
    standard_error = np.std(accuracies, ddof=1) / 2
    assert np.ptp(row["balanced_acc_ci"]) == pytest.approx(2 * 1.96 * standard_error, rel=0.08)


def test_holm_corrects_for_the_number_of_tests():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])


def finished_run(folder, remedy, seed, targets, probabilities, tau=0.0, path="{seed}/{number}.png", group_regex=None):
    """A folder with what `compare` reads. -> Run."""
    folder.mkdir(parents=True)
    classes = ["a", "b", "c"]
    is_right = probabilities.argmax(axis=1) == targets
    recall = {name: {"recall": float(is_right[targets == c].mean())} for c, name in enumerate(classes)}
    results = {
        "classes": classes,
        "samples_per_cls": [400, 150, 50],
        "posthoc": {"tau": tau, "temperature": 1.0, "test": {"balanced_acc": 0.5}},
        "test": {"per_class": recall},
        "val": {"balanced_acc": 0.5},
    }
    (folder / "args.json").write_text(json.dumps({"group_regex": group_regex}))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "history.csv").write_text("epoch,seconds\n0,30\n1,90\n")
    paths = [path.format(seed=seed, number=number) for number in range(len(targets))]
    write_predictions(folder / "test_predictions.csv", paths, targets, probabilities, classes)
    return Run(remedy, seed, [], folder)


def probabilities_of(rng, targets, strength):
    scores = rng.normal(size=(len(targets), 3)) + strength * np.eye(3)[targets]
    return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)


def test_differences_are_paired_and_tested_against_the_baseline(tmp_path):
    rng = np.random.default_rng(0)
    runs = []
    for seed in (0, 1):
        targets = np.repeat([0, 1, 2], [400, 150, 50])
        weak = probabilities_of(rng, targets, 1.0)
        chosen = {"weak": weak, "the same": weak, "as good": probabilities_of(rng, targets, 1.0)}
        chosen["strong"] = probabilities_of(rng, targets, 2.0)
        for name, probabilities in chosen.items():
            runs.append(finished_run(tmp_path / f"{name}{seed}", name, seed, targets, probabilities, tau=1.0))
    table = {row["remedy"]: row for row in compare(read_runs(runs), "weak")}
    assert list(table) == ["weak", "weak, logit adjustment post hoc", "the same", "as good", "strong"]
    assert table["the same"]["balanced_acc_difference"] == 0 and table["the same"]["balanced_acc_p"] == 1
    low, high = table["as good"]["balanced_acc_difference_ci"]
    assert low < 0 < high and table["as good"]["balanced_acc_p"] > 0.05
    strong = table["strong"]
    assert strong["balanced_acc_difference_ci"][0] > 0.05 and strong["balanced_acc_p"] <= 8 / ablate.RESAMPLES
    means = [balanced_accuracy_score(*read_targets_and_predictions(run)) for run in runs if run.remedy == "strong"]
    assert strong["balanced_acc"] == pytest.approx(np.mean(means))
    assert strong["balanced_acc_agreeing"] == 2
    assert strong["balanced_acc_std"] == pytest.approx(np.std(means, ddof=1))
    assert strong["minutes"] == 2.0 and list(strong["recalls"]) == ["c", "b", "a"]
    # tau 1 takes the shares out of the scores, which had none in them: the rare classes are overrated
    assert table["weak, logit adjustment post hoc"]["balanced_acc"] != table["weak"]["balanced_acc"]
    text = markdown(list(table.values()), "weak", [0, 1])
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def read_targets_and_predictions(run):
    rows = read_rows(run.folder / "test_predictions.csv")
    return [row["label"] for row in rows], [row["prediction"] for row in rows]


def test_runs_on_other_images_are_not_compared(tmp_path):
    targets = np.repeat([0, 1, 2], 10)
    probabilities = probabilities_of(np.random.default_rng(0), targets, 1.0)
    one = finished_run(tmp_path / "one", "one", 0, targets, probabilities)
    other = finished_run(tmp_path / "other", "other", 1, targets, probabilities)
    other.seed = 0
    with pytest.raises(ablate.UserError, match="not tested on the same images"):
        read_runs([one, other])


# ----------------------------------------------------------------------------------------------------- whole ablations


def run_ablate(tmp_path, data_dir, *flags):
    (tmp_path / "grid.yaml").write_text(REMEDIES)
    common = ["--data_dirs", data_dir, *TINY, "--grid", tmp_path / "grid.yaml", "--ablate_dir", tmp_path / "out"]
    return ablate.main_ablate([*map(str, common), "--epochs", "3", *map(str, flags)])


def test_an_ablation_leaves_a_table_a_text_and_a_plot_and_goes_on_with_more_seeds(tmp_path, data_dir, capsys):
    assert run_ablate(tmp_path, data_dir, "--seeds", 1) == 0
    assert "| deferred |" in capsys.readouterr().out
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("best_model.pth")}
    assert len(trained) == 3 and not list(tmp_path.rglob("last_model.pth"))
    assert run_ablate(tmp_path, data_dir, "--seeds", 1, 2, "--jobs", 2, "--baseline", "oversampled") == 0
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    rows = read_rows(tmp_path / "out" / "ablation.csv")
    assert [(row["remedy"], row["seed"]) for row in rows] == [
        (name, seed) for seed in "12" for name in ("plain", "oversampled", "deferred")
    ]
    for row in rows:
        results = json.loads((tmp_path / "out" / f"{row['remedy']}_seed{row['seed']}" / "results.json").read_text())
        assert float(row["balanced_acc"]) == results["test"]["balanced_acc"]
        assert float(row["posthoc_macro_f1"]) == results["posthoc"]["test"]["macro_f1"]
        assert float(row["recall_10"]) == results["test"]["per_class"]["10"]["recall"]
    table = (tmp_path / "out" / "ablation.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:6]] == [
        "| oversampled", "| plain", "| oversampled, logit adjustment post hoc", "| deferred",
    ]  # fmt: skip
    mean = np.mean([float(row["balanced_acc"]) for row in rows if row["remedy"] == "plain"])
    assert f"| plain | {mean:.3f} [" in table[3]
    with Image.open(tmp_path / "out" / "ablation.png") as image:
        assert image.size[0] > image.size[1] > 150
    assert run_ablate(tmp_path, data_dir, "--seeds", 1, "--gamma", 1) == 2
    assert "plain_seed1 was begun with other flags" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_ablation_that_was_stopped_goes_on_where_it_was(tmp_path, data_dir, number):
    (tmp_path / "grid.yaml").write_text("plain: --train_loss ce")
    flags = ["--data_dirs", data_dir, *TINY, "--grid", tmp_path / "grid.yaml", "--ablate_dir", tmp_path / "out"]
    flags += ["--epochs", 60, "--seeds", 7]
    first = start_with_thin_trials("ablate", *flags)
    history = tmp_path / "out" / "plain_seed7" / "history.csv"
    stop_while_training(first, history, number)
    done = start_with_thin_trials("ablate", *flags)
    _, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert len(history.read_text().splitlines()) == 61
    assert "going on with epoch" in (tmp_path / "out" / "plain_seed7.log").read_text()


def test_a_run_that_fails_is_told_after_the_others(tmp_path, data_dir, capsys):
    (tmp_path / "grid.yaml").write_text("plain: --train_loss ce\nwrong: --train_loss focal --alpha 1 2\n")
    common = ["--data_dirs", data_dir, *TINY, "--grid", tmp_path / "grid.yaml", "--ablate_dir", tmp_path / "out"]
    assert ablate.main_ablate([*map(str, common), "--epochs", "1", "--seeds", "1"]) == 2
    assert "error: wrong: --alpha: 2 figures for 3 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "grid, flags, words",
    [
        ("plain: --train_loss no", [], "plain: argument --train_loss: invalid choice"),
        ("plain: --drw_epoch 2", ["--train_loss", "ce"], "plain: --drw_epoch: there is nothing to defer"),
        ("[1, 2]", [], "--grid: {grid}: a mapping is wanted"),
        ("a: [", [], "--grid: {grid} is no yaml"),
        ("a: --gamma 1\na: --gamma 2", [], "--grid: {grid}: a is there twice"),
        ("plain: --train_loss ce", ["--baseline", "other"], "--baseline: other is none of plain"),
        ("plain: --train_loss ce", ["--seed", "3"], "--seed: is set for each trial"),
        ("plain: --train_loss ce", ["--run_dir=x"], "--run_dir=x: is set for each trial"),
        ("plain: --train_loss ce", ["--folds", "3"], "--folds: is set for each trial"),
        ("plain: --train_loss ce\nPlain: --gamma 1", [], "two runs would have the same folder"),
        ("plain: --train_loss ce", ["--seeds", "3", "3"], "two runs would have the same folder"),
        ("plain: --seed 3", [], "plain: --seed: is set for each trial"),
        ("plain: --split 0.8 0.1 0.1", [], "plain: --split: is set for each trial"),
        ('plain: "--alpha \'1"', [], "plain: No closing quotation"),
        ("plain:", [], "plain: a text of flags is wanted"),
        ("plain: --lr nan", [], "plain: argument --learning_rate/--lr: nan is not above 0"),
    ],
)
def test_a_wrong_grid_or_flag_is_told_before_anything_is_trained(tmp_path, data_dir, capsys, grid, flags, words):
    path = tmp_path / "grid.yaml"
    path.write_text(grid)
    common = ["--grid", path, "--data_dirs", data_dir, *TINY, "--epochs", 4, "--ablate_dir", tmp_path / "out"]
    assert ablate.main_ablate([str(word) for word in (*common, *flags)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and words.format(grid=path) in line
    assert not list(tmp_path.rglob("history.csv"))
