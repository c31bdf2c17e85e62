"""main.py end to end, on tiny images: what a run leaves, resuming, evaluating, and every kind of bad input."""

import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    TINY_COUNTS,
    TINY_FLAGS,
    history_but_times,
    read_rows,
    run_main,
    same,
    start_main,
    wait_for,
    write_checkpoint,
    write_class_folders,
    write_images,
)
from sklearn.metrics import balanced_accuracy_score, f1_score

import demo
import main
import report
from dataset_double import AUGMENTATIONS
from files import HISTORY_COLUMNS
from flags import build_parser
from model import CHECKPOINT_TYPES, load_checkpoint

ROOT = Path(main.__file__).parent
THIN_MAIN = ROOT / "tests" / "thin_main.py"
pytestmark = pytest.mark.usefixtures("thin_network")  # the processes that are started have the whole ResNet-50


def weights(path):
    return load_checkpoint(path)["model_state_dict"]


# ----------------------------------------------------------------------------------------------- a run's files


def test_a_run_leaves_the_files_it_promises(finished_run):
    assert {path.name for path in finished_run.glob("[!.]*")} == {
        "args.json", "splits.json", "history.csv", "last_model.pth", "best_model.pth", "previous_model.pth",
        "val_predictions.csv",
        "test_predictions.csv", "results.json", "curves.png", "confusion_matrix.png", "report.html",
    }  # fmt: skip


def test_history_has_a_row_an_epoch(finished_run):
    rows = read_rows(finished_run / "history.csv")
    assert tuple(rows[0]) == HISTORY_COLUMNS
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())


def test_splits_are_disjoint_stratified_and_the_counts_are_of_the_originals(finished_run):
    splits = json.loads((finished_run / "splits.json").read_text())
    assert {part: len(paths) for part, paths in splits.items()} == {"train": 21, "val": 7, "test": 7}
    assert len({path for paths in splits.values() for path in paths}) == 35
    results = json.loads((finished_run / "results.json").read_text())
    assert results["classes"] == ["0", "2", "10"]
    assert results["samples_per_cls"] == [12, 6, 3]  # though augmentation made 12 of each


def test_results_agree_with_the_predictions_by_scikit_learn(finished_run):
    results = json.loads((finished_run / "results.json").read_text())
    for part in ("val", "test"):
        rows = read_rows(finished_run / f"{part}_predictions.csv")
        labels, predictions = [row["label"] for row in rows], [row["prediction"] for row in rows]
        figures = results[part]
        names = {"acc", "balanced_acc", "macro_f1", "nll", "ece", "few_shot_acc"}  # all classes have few images
        assert set(figures) == {"loss", "per_class", "confusion_matrix"} | names | {f"{name}_ci" for name in names}
        assert set(results["posthoc"][part]) == set(figures)
        assert figures["balanced_acc"] == pytest.approx(balanced_accuracy_score(labels, predictions))
        assert figures["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))
        assert figures["acc"] == pytest.approx(np.mean([int(row["correct"]) for row in rows]))
        for row in rows:
            probabilities = [float(row[f"prob_{name}"]) for name in results["classes"]]
            assert sum(probabilities) == pytest.approx(1, abs=1e-5)
            assert results["classes"][int(np.argmax(probabilities))] == row["prediction"]
            assert Path(row["path"]).parent.name == row["label"]


def test_the_best_epoch_decides_what_is_tested(finished_run):
    rows = read_rows(finished_run / "history.csv")
    results = json.loads((finished_run / "results.json").read_text())
    best = load_checkpoint(finished_run / "best_model.pth")
    assert results["best_epoch"] == best["epoch"] == best["best_epoch"]
    metric = [float(row["val_balanced_acc"]) for row in rows]
    assert metric[best["epoch"]] == max(metric) == best["best_metric"] == results["val"]["balanced_acc"]


def test_what_was_fitted_after_training_is_in_the_best_model_and_is_used_from_there(copied_run, tmp_path):
    results = json.loads((copied_run / "results.json").read_text())
    best = load_checkpoint(copied_run / "best_model.pth")
    assert best["posthoc"] == {name: results["posthoc"][name] for name in ("tau", "temperature")}
    write_checkpoint(copied_run / "best_model.pth", {**best, "posthoc": {"tau": 0.5, "temperature": 2.0}})
    flags = ["--eval_only", "--tta", "--ordinal", "--run_dir", tmp_path / "eval"]
    assert run_main("--resume", copied_run / "best_model.pth", *flags) == 0
    evaluated = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert (evaluated["posthoc"]["tau"], evaluated["posthoc"]["temperature"]) == (0.5, 2.0)
    assert evaluated["test"]["balanced_acc"] == results["test"]["balanced_acc"]
    assert "quadratic_kappa" in evaluated["test"] and set(evaluated["tta"]["test"]) == set(evaluated["test"])


def test_folds_are_trained_one_after_the_other_and_summed_up(data_dir, tmp_path, capsys):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--folds", 3, "--run_dir", tmp_path / "cv"]
    assert run_main(*flags) == 0
    spread = json.loads((tmp_path / "cv" / "folds.json").read_text())
    accuracies, tested = [], []
    for fold in range(3):
        results = json.loads((tmp_path / "cv" / f"fold_{fold}" / "results.json").read_text())
        accuracies.append(results["test"]["balanced_acc"])
        tested += [row["path"] for row in read_rows(tmp_path / "cv" / f"fold_{fold}" / "test_predictions.csv")]
    assert len(tested) == len(set(tested)) == 35
    pooled = [row for run in (tmp_path / "cv").glob("fold_?") for row in read_rows(run / "test_predictions.csv")]
    assert spread["test_pooled"]["acc"] == pytest.approx(np.mean([int(row["correct"]) for row in pooled]))
    assert {name: row["support"] for name, row in spread["test_pooled"]["per_class"].items()} == TINY_COUNTS
    assert spread["test_balanced_acc"]["values"] == accuracies
    assert spread["test_balanced_acc"]["mean"] == pytest.approx(np.mean(accuracies))
    assert spread["test_balanced_acc"]["std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert run_main(*flags) == 2 and "exists already" in capsys.readouterr().err
    assert run_main(*flags, "--auto_resume", "--num_workers", 1) == 0
    assert capsys.readouterr().out.count("finished before") == 3
    assert run_main(*flags, "--auto_resume", "--gamma", 1) == 2
    assert "--gamma: the folds in" in capsys.readouterr().err
    assert run_main(*flags[:-4], "--run_dir", tmp_path / "cv", "--auto_resume") == 2
    assert "is the folder of a cross-validation" in capsys.readouterr().err
    other = write_class_folders(tmp_path / "other", {"0": 6, "2": 6, "10": 6})
    best = tmp_path / "cv" / "fold_0" / "best_model.pth"
    assert run_main("--eval_only", "--resume", best, "--test_dirs", other, "--run_dir", tmp_path / "eval") == 0
    write_images(data_dir / "0", 1, suffix=".bmp")
    assert run_main(*flags, "--auto_resume") == 2
    assert "--data_dirs: the folds in" in capsys.readouterr().err
    (data_dir / "0" / "000.bmp").unlink()
    runs = [str(tmp_path / "cv" / f"fold_{fold}") for fold in (0, 1, 2, 0)]  # one twice: it counts once
    assert report.main_report([*runs, str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"test_balanced_acc {np.mean(accuracies):.3f} +- " in out and "(3 runs)" in out
    assert f"passed over: {tmp_path} is not a finished run" in out
    assert report.main_report([str(tmp_path)]) == 2
    assert f"error: {tmp_path}: is not a finished run" in capsys.readouterr().err
    Path(runs[0], "results.json").write_text("{")
    assert report.main_report(runs) == 2 and "results.json: is damaged" in capsys.readouterr().err


def test_a_cross_validation_that_is_stopped_goes_on_by_the_command_that_it_prints(data_dir, tmp_path):
    flags = [*TINY_FLAGS, "--folds", 2, "--split", 0.8, 0.2, 0]
    process = start_main("--data_dirs", data_dir, *flags, "--output_dir", tmp_path / "cv", program=THIN_MAIN)
    wait_for(lambda: list(tmp_path.glob("cv_*/fold_0/results.json")))
    process.terminate()
    _, err = process.communicate(timeout=60)
    (folder,) = tmp_path.glob("cv_*")
    assert process.returncode == 143 and err.count("go on with: ") == 1
    again = shlex.split(err.partition("go on with: python main.py ")[2])
    assert again[-3:] == ["--run_dir", str(folder), "--auto_resume"]
    assert run_main(*again) == 0 and (folder / "folds.json").exists()


def test_a_class_too_small_for_the_last_fold_is_told_before_the_first(tmp_path, capsys):
    data = write_class_folders(tmp_path / "data", {"0": 20, "1": 4})
    flags = ["--data_dirs", data, *TINY_FLAGS, "--folds", 5, "--run_dir", tmp_path / "cv"]
    assert run_main(*flags) == 2
    assert "--folds: class '1' has too few images (4)" in capsys.readouterr().err
    assert not (tmp_path / "cv").exists()


def test_a_best_epoch_that_has_not_seen_what_is_deferred_is_told(data_dir, tmp_path, capsys):
    # learns nothing, so that the first epoch stays the best
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--lr", 1e-12, "--drw_epoch", 1, "--train_loss", "cb", "--ordinal"]
    assert run_main(*flags, "--run_dir", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "the best epoch, 0, is one before --drw_epoch / --crt_epochs take effect, in epoch 1" in out
    assert "grades in their order: 0 < 2 < 10" in out
    assert run_main("--eval_only", "--resume", tmp_path / "run" / "last_model.pth", "--run_dir", tmp_path / "eval") == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert (results["evaluated_epoch"], results["best_epoch"]) == (1, 0)


def test_the_last_epochs_train_a_new_head_on_a_frozen_backbone(data_dir, tmp_path):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--train_loss", "focal"]
    assert run_main(*flags, "--epochs", 3, "--crt_epochs", 2, "--run_dir", tmp_path / "whole") == 0
    rows = read_rows(tmp_path / "whole" / "history.csv")
    assert float(rows[0]["learning_rate"]) < 1e-3 * 0.6 < float(rows[1]["learning_rate"])  # its own schedule
    last = weights(tmp_path / "whole" / "last_model.pth")
    assert run_main(*flags, "--epochs", 2, "--crt_epochs", 1, "--run_dir", tmp_path / "short") == 0
    shorter = weights(tmp_path / "short" / "last_model.pth")
    assert [n for n in last if not torch.equal(last[n], shorter[n])] == ["head.weight", "head.bias"]


def test_a_checkpoint_holds_all_that_resuming_needs(finished_run):
    last = torch.load(finished_run / "last_model.pth", weights_only=True)
    assert set(last) == set(CHECKPOINT_TYPES)
    assert last["epoch"] == 1 and last["samples_per_cls"] == [12, 6, 3] and last["classes"] == ["0", "2", "10"]
    assert last["args"] == json.loads((finished_run / "args.json").read_text())
    assert last["splits"] == json.loads((finished_run / "splits.json").read_text())


def test_the_demo_makes_its_data_trains_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "IMAGES_PER_GRADE", (10, 8, 6, 5, 5))
    assert run_main("--demo", "--epochs", 1, "--image_size", 32, "--run_dir", tmp_path / "demo") == 0
    assert f"results lie in {tmp_path / 'demo'}" in capsys.readouterr().out
    args = json.loads((tmp_path / "demo" / "args.json").read_text())
    assert args["use_augmentation"] and args["train_loss"] == "cb" and not args["pretrained"]
    assert run_main("--resume", tmp_path / "demo" / "last_model.pth", "--epochs", 2) == 0
    assert len(read_rows(tmp_path / "demo" / "history.csv")) == 2


# --------------------------------------------------------------------------------------- same numbers, resuming


def test_same_seed_same_numbers_whatever_the_number_of_workers(finished_run, data_dir, tmp_path):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--use_augmentation", "--amp", "off", "--num_workers", 2]
    assert run_main(*flags, "--run_dir", tmp_path / "again") == 0
    assert history_but_times(tmp_path / "again") == history_but_times(finished_run)
    assert same(weights(tmp_path / "again/last_model.pth"), weights(finished_run / "last_model.pth"))


def test_same_numbers_with_the_cache_off(finished_run, data_dir, tmp_path, capsys):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--use_augmentation", "--amp", "off", "--no_cache"]
    assert run_main(*flags, "--cache_dir", tmp_path / "cache", "--run_dir", tmp_path / "again") == 0
    assert "35 images are not in it" in capsys.readouterr().out and not (tmp_path / "cache").exists()
    assert history_but_times(tmp_path / "again") == history_but_times(finished_run)
    assert same(weights(tmp_path / "again/last_model.pth"), weights(finished_run / "last_model.pth"))


def test_a_second_run_opens_no_image(data_dir, tmp_path, capsys):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--cache_dir", tmp_path / "cache", "--run_dir"]
    assert run_main(*flags, tmp_path / "first") == 0
    assert "35 images, 0.1 MB, in " in (said := capsys.readouterr().out) and "(35 read anew)" in said
    assert run_main(*flags, tmp_path / "second") == 0
    assert "(0 read anew)" in capsys.readouterr().out
    assert history_but_times(tmp_path / "second") == history_but_times(tmp_path / "first")


def test_progressive_and_accumulating_runs_resume_on_their_schedule(data_dir, tmp_path, monkeypatch):
    sizes, forward = [], main.Model.forward

    def recorded(model, images):
        if model.training:
            sizes.append(images.shape[-1])
        return forward(model, images)

    monkeypatch.setattr(main.Model, "forward", recorded)
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--image_size", 64, "--progressive", "--grad_accum", 2]
    assert run_main(*flags, "--epochs", 3, "--run_dir", tmp_path / "run") == 0
    assert sizes == [32] * 3 + [48] * 3 + [64] * 3  # 21 images: 3 batches an epoch, 2 steps
    last = load_checkpoint(tmp_path / "run" / "last_model.pth")
    assert last["scheduler_state_dict"]["last_epoch"] == 3 * 2
    assert run_main("--resume", tmp_path / "run" / "last_model.pth", "--epochs", 4) == 0
    assert load_checkpoint(tmp_path / "run" / "last_model.pth")["scheduler_state_dict"]["last_epoch"] == 4 * 2
    assert sizes[9:] == [64] * 3


def test_a_finished_run_goes_on_for_more_epochs_without_doubled_rows(copied_run, finished_run):
    before = weights(finished_run / "last_model.pth")
    command = ["--resume", copied_run / "last_model.pth", "--epochs", 3, "--lr", "5e-4", "--weight_decay", 0.3]
    assert run_main(*command) == 0
    rows = read_rows(copied_run / "history.csv")
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert rows[:2] == read_rows(finished_run / "history.csv")
    last = load_checkpoint(copied_run / "last_model.pth")
    assert last["epoch"] == 2 and last["args"]["learning_rate"] == 5e-4
    assert last["optimizer_state_dict"]["param_groups"][0]["weight_decay"] == 0.3
    assert not same(before, last["model_state_dict"])
    assert [row["epoch"] for row in read_rows(finished_run / "history.csv")] == ["0", "1"]


def test_flags_that_change_the_steps_of_an_epoch_or_the_precision_win_when_resuming(copied_run):
    flags = ["--batch_size", 4, "--amp", "fp16", "--epochs", 3, "--use_augmentation=false"]
    assert run_main("--resume", copied_run / "last_model.pth", *flags) == 0
    last = load_checkpoint(copied_run / "last_model.pth")
    steps_per_epoch = 6  # 21 originals in batches of 4
    assert last["epoch"] == 2 and last["scheduler_state_dict"]["last_epoch"] == 3 * steps_per_epoch
    assert last["scaler_state_dict"]["scale"] > 0
    assert float(read_rows(copied_run / "history.csv")[-1]["learning_rate"]) < 1e-4  # the cosine's end


def test_resuming_from_the_best_epoch_takes_the_later_rows_back(copied_run):
    best = load_checkpoint(copied_run / "best_model.pth")
    write_checkpoint(copied_run / "best_model.pth", {**best, "epoch": 0, "best_epoch": 0})
    assert run_main("--resume", copied_run / "best_model.pth", "--wandb_id", "2x3y4z5w", "--wandb_resume", "allow") == 0
    assert [row["epoch"] for row in read_rows(copied_run / "history.csv")] == ["0", "1"]
    assert load_checkpoint(copied_run / "last_model.pth")["wandb_id"] == "2x3y4z5w"


def test_resuming_a_finished_run_only_tests_it_again(copied_run, finished_run):
    os.unlink(copied_run / "results.json")
    assert run_main("--resume", copied_run / "last_model.pth") == 0
    assert (copied_run / "results.json").read_text() == (finished_run / "results.json").read_text()


@pytest.mark.parametrize("lost", [True, False])
def test_a_best_model_that_a_crash_kept_back_comes_from_the_last_one(copied_run, lost):
    last = load_checkpoint(copied_run / "last_model.pth")
    write_checkpoint(copied_run / "last_model.pth", {**last, "best_epoch": last["epoch"], "best_metric": 0.99})
    if lost:
        os.unlink(copied_run / "best_model.pth")
    assert run_main("--resume", copied_run / "last_model.pth") == 0
    assert load_checkpoint(copied_run / "best_model.pth")["best_metric"] == 0.99


def test_eval_only_gives_the_figures_of_the_run(copied_run, finished_run):
    assert run_main("--eval_only", "--resume", copied_run / "best_model.pth") == 0
    (folder,) = copied_run.glob("eval_*")
    expected = json.loads((finished_run / "results.json").read_text())
    assert {**json.loads((folder / "results.json").read_text()), "epochs": 2} == expected
    names = ("test_predictions.csv", "val_predictions.csv")
    assert all((folder / name).read_bytes() == (finished_run / name).read_bytes() for name in names)


def test_eval_only_on_other_images_needs_neither_the_own_data_nor_every_class(copied_run, tmp_path, capsys):
    elsewhere = write_class_folders(tmp_path / "other", {"2": 3, "10": 4}, seed=5)
    checkpoint = load_checkpoint(copied_run / "best_model.pth")
    gone = {part: [path + ".gone" for path in paths] for part, paths in checkpoint["splits"].items()}
    write_checkpoint(tmp_path / "moved.pth", {**checkpoint, "splits": gone})
    out = tmp_path / "out"
    seen = Path(checkpoint["splits"]["train"][0])
    (elsewhere / "2" / seen.name).write_bytes(seen.read_bytes())
    gone["train"][0] = str(seen)
    write_checkpoint(tmp_path / "moved.pth", {**checkpoint, "splits": gone})
    flags = ["--eval_only", "--resume", tmp_path / "moved.pth", "--test_dirs", elsewhere, "--run_dir", out]
    assert run_main(*flags) == 0
    printed = capsys.readouterr().out
    assert "only --test_dirs is evaluated" in printed
    assert "warning: 1 of the 7 images of --test_dirs have name and size" in printed
    results = json.loads((out / "results.json").read_text())
    assert "val" not in results
    assert [row["support"] for row in results["test"]["per_class"].values()] == [0, 3, 4]
    assert len(read_rows(out / "test_predictions.csv")) == 7


def test_images_from_elsewhere_take_the_place_of_a_share(data_dir, tmp_path):
    for part in ("val", "test"):
        write_class_folders(tmp_path / part, {"0": 2, "2": 2, "10": 2}, seed=9)
    elsewhere = ["--val_dirs", os.path.relpath(tmp_path / "val"), "--test_dirs", tmp_path / "test"]
    flags = ["--data_dirs", data_dir, *elsewhere, "--epochs", 1]
    assert run_main(*flags, *TINY_FLAGS[:5], "--train_loss", "ce", "--run_dir", tmp_path / "run") == 0
    splits = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert {part: len(paths) for part, paths in splits.items()} == {"train": 35, "val": 6, "test": 6}
    assert run_main("--resume", tmp_path / "run" / "last_model.pth", "--epochs", 2, *elsewhere) == 0


def test_weights_of_a_run_start_another_with_other_classes(finished_run, tmp_path):
    data = write_class_folders(tmp_path / "data", {"dry": 5, "oily": 5})
    flags = ["--data_dirs", data, "--weights", finished_run / "best_model.pth", "--image_size", 32, "--epochs", 1]
    assert run_main(*flags, "--lr", "1e-9", "--run_dir", tmp_path / "run") == 0
    start, end = weights(finished_run / "best_model.pth"), weights(tmp_path / "run/last_model.pth")
    torch.testing.assert_close(end["backbone.layer4.0.conv2.weight"], start["backbone.layer4.0.conv2.weight"])
    assert end["head.weight"].shape[0] == 2


# ------------------------------------------------------------------------------------------------------- flags


def test_a_sweeps_way_of_writing_flags_is_understood():
    parse = build_parser().parse_args
    assert parse(["--use_augmentation=True"]).use_augmentation is True
    assert parse(["--use_augmentation=false", "--pretrained=False"]).use_augmentation is False
    assert parse(["--no-pretrained"]).pretrained is False and parse([]).pretrained is True
    assert parse(["--use_augmentation", "--lr=0.001"]).learning_rate == 1e-3


def test_promised_names_and_defaults():
    defaults = vars(build_parser().parse_args([]))
    promised = {
        "split": [0.6, 0.2, 0.2], "image_size": 224, "batch_size": 32, "epochs": 100, "dropout_prob": 0.3,
        "train_loss": "cb", "beta": 0.999, "gamma": 2.0, "best_metric": "val_balanced_acc", "seed": 42, "amp": "auto",
        "pretrained": True,
        "output_dir": "checkpoints", "use_augmentation": False, "augmentation_methods": list(AUGMENTATIONS),
    }  # fmt: skip
    assert {name: defaults[name] for name in promised} == promised


def test_the_readme_names_every_flag():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    missing = {flag for flag in flags - {"-h", "--help"} if f"`{flag}" not in readme and not flag.startswith("--no-")}
    assert not missing


# ---------------------------------------------------------------------------------------------------- bad input


def check_refused(capsys, tmp_path, flags, *wanted):
    """Status 2, one `error:` line that holds every text of `wanted`, and nothing left behind."""
    before = sorted(tmp_path.rglob("*"))
    assert run_main(*flags) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: "), errors
    for text in wanted:
        assert str(text) in errors[0]
    assert "Traceback" not in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


BAD_FLAGS = {
    "oversampled twice": (["--sampling", "sqrt", "--use_augmentation"], "--sampling", "both oversample"),
    "nothing to defer": (["--drw_epoch", 1, "--train_loss", "focal"], "--drw_epoch", "nothing to defer"),
    "deferred too long": (["--drw_epoch", 2, "--epochs", 2], "--drw_epoch", "of 2 epochs"),
    "fold of none": (["--fold", 1], "--fold", "--folds K"),
    "fold beyond": (["--folds", 3, "--fold", 3], "--fold", "from 0 to K - 1"),
    "no regex": (["--group_regex", "("], "--group_regex", "no regular expression"),
    "regex of nothing": (["--group_regex", "^x"], "--group_regex", "finds nobody in the name of"),
    "no data at all": ([], "--data_dirs"),
    "unknown loss": (["--train_loss", "hinge"], "--train_loss", "cb"),
    "negative learning rate": (["--learning_rate", "-1"], "--learning_rate", "above 0"),
    "learning rate nan": (["--lr", "nan"], "--lr"),
    "beta one": (["--beta", "1.0"], "--beta", "below 1"),
    "negative gamma": (["--gamma", "-0.5"], "--gamma"),
    "split that does not sum to 1": (["--split", "0.6", "0.2", "0.1"], "--split"),
    "split without a test set": (["--split", "0.8", "0.2", "0"], "--split", "test"),
    "no epochs": (["--epochs", "0"], "--epochs"),
    "half a batch": (["--batch_size", "0.5"], "--batch_size"),
    "tiny images": (["--image_size", "8"], "--image_size"),
    "unknown flag": (["--learnign_rate", "0.1"], "--learnign_rate"),
    "unknown method": (["--augmentation_methods", "mosaic"], "--augmentation_methods"),
    "unknown device": (["--device", "abacus"], "--device"),
    "neither true nor false": (["--use_augmentation=maybe"], "--use_augmentation"),
    "eval_only without a checkpoint": (["--eval_only"], "--resume"),
    "demo with data": (["--demo"], "--demo"),
    "alpha for other classes": (["--train_loss", "focal", "--alpha", "1", "2"], "--alpha", "3 classes"),
    "missing checkpoint": (["--resume", "nowhere.pth"], "--resume", "nowhere.pth"),
    "missing weights": (["--weights", "nowhere.pth"], "--weights", "nowhere.pth"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_are_refused(name, capsys, tmp_path, data_dir):
    flags, *wanted = BAD_FLAGS[name]
    data = [] if name == "no data at all" else ["--data_dirs", data_dir]
    check_refused(capsys, tmp_path, [*data, "--no-pretrained", "--run_dir", tmp_path / "run", *flags], *wanted)


def empty_file(data):
    (data / "0" / "x.png").write_bytes(b"")


def text_as_jpeg(data):
    (data / "0" / "x.jpg").write_text("hello")


def truncated_jpeg(data):
    (path,) = write_images(data / "0", 1, suffix=".jpg", size=(300, 300))
    path.write_bytes(path.read_bytes()[:4000])


def class_without_image(data):
    (data / "3").mkdir()


def one_class_only(data):
    for name in ("2", "10"):
        (data / name).rename(data / f".{name}")


def too_few_images(data):
    write_images(data / "5", 2)


BAD_DATA = {
    empty_file: ("x.png", "empty file", "--skip_broken"),
    text_as_jpeg: ("x.jpg", "--skip_broken"),
    truncated_jpeg: ("000.jpg", "truncated"),
    class_without_image: ("--data_dirs", "'3'"),
    one_class_only: ("--data_dirs", "one class"),
    too_few_images: ("--split", "'5'", "(2)"),
}


@pytest.mark.parametrize("spoil", BAD_DATA, ids=lambda function: function.__name__)
def test_bad_data_are_refused(spoil, capsys, tmp_path):
    data = write_class_folders(tmp_path / "data")
    spoil(data)
    check_refused(
        capsys, tmp_path, ["--data_dirs", data, "--no-pretrained", "--run_dir", tmp_path / "run"], *BAD_DATA[spoil]
    )


def test_folders_that_are_not_there_or_no_class_folders_are_refused(capsys, tmp_path, data_dir):
    flags = ["--no-pretrained", "--run_dir", tmp_path / "run", "--data_dirs"]
    check_refused(capsys, tmp_path, [*flags, tmp_path / "gone"], "--data_dirs", tmp_path / "gone")
    check_refused(capsys, tmp_path, [*flags, data_dir / "0"], "holds images, not class folders")
    (tmp_path / "empty").mkdir()
    check_refused(capsys, tmp_path, [*flags, tmp_path / "empty"], "no class folders")
    check_refused(capsys, tmp_path, [*flags, data_dir, "--test_dirs", data_dir], "--test_dirs", "twice")


def test_output_folders_that_exist_or_cannot_be_made_are_refused(capsys, tmp_path, data_dir):
    flags = ["--data_dirs", data_dir, "--no-pretrained"]
    (tmp_path / "file").write_text("")
    check_refused(capsys, tmp_path, [*flags, "--run_dir", tmp_path], "--run_dir", "exists")
    check_refused(capsys, tmp_path, [*flags, "--run_dir", tmp_path / "file" / "run"], "--run_dir", "Not a directory")
    check_refused(capsys, tmp_path, [*flags, "--output_dir", tmp_path / "file" / "run"], "--output_dir")
    check_refused(capsys, tmp_path, [*flags, "--output_dir", "/proc/checkpoints"], "--output_dir", "/proc")


def test_checkpoints_that_are_none_or_cut_short_or_of_other_classes_are_refused(capsys, tmp_path, copied_run):
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes((copied_run / "last_model.pth").read_bytes()[:-1000])
    for name, reason in [("text.pth", "damaged"), ("other.pth", "not a checkpoint"), ("cut.pth", "damaged")]:
        check_refused(capsys, tmp_path, ["--resume", tmp_path / name], "--resume", name, reason)
    data = write_class_folders(tmp_path / "data", {"0": 5, "2": 5, "10": 5, "11": 5})
    resume = ["--resume", copied_run / "last_model.pth"]
    check_refused(capsys, tmp_path, [*resume, "--data_dirs", data], "--data_dirs", "'11'")
    check_refused(capsys, tmp_path, [*resume, "--split", "0.5", "0.3", "0.2"], "--split")
    check_refused(capsys, tmp_path, [*resume, "--run_dir", tmp_path / "elsewhere"], "--run_dir")
    check_refused(capsys, tmp_path, [*resume, "--best_metric", "val_macro_f1"], "--best_metric")
    check_refused(capsys, tmp_path, [*resume, "--weights", "other.pth"], "--weights")
    check_refused(capsys, tmp_path, ["--resume", copied_run / "history.csv"], "--resume", "damaged")
    check_refused(capsys, tmp_path, [*resume, "--demo"], "--demo")
    other = write_class_folders(tmp_path / "other", TINY_COUNTS, seed=7)
    check_refused(capsys, tmp_path, [*resume, "--data_dirs", other], "--resume", "of 35 images")


def test_files_of_another_run_beside_the_checkpoint_are_refused(capsys, tmp_path, copied_run, data_dir):
    last, best = load_checkpoint(copied_run / "last_model.pth"), load_checkpoint(copied_run / "best_model.pth")
    write_checkpoint(copied_run / "last_model.pth", {**last, "epoch": 2, "best_epoch": 1, "best_metric": 0.9})
    write_checkpoint(copied_run / "best_model.pth", {**best, "best_epoch": 0})
    check_refused(capsys, tmp_path, ["--resume", copied_run / "last_model.pth"], "best_model.pth", "--resume")
    more = write_class_folders(tmp_path / "more", TINY_COUNTS, seed=3)
    flags = ["--resume", copied_run / "best_model.pth", "--data_dirs", data_dir, more]
    check_refused(capsys, tmp_path, flags, "--data_dirs", "no image of the checkpoint's split", more)


def test_a_diverging_training_stops_in_one_line_and_keeps_its_checkpoint(capsys, tmp_path, copied_run):
    before = weights(copied_run / "last_model.pth")
    flags = ["--resume", copied_run / "last_model.pth", "--epochs", 4, "--lr", "1e20", "--clip_grad", 0, "--amp", "off"]
    assert run_main(*flags) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: the loss is") and "epoch 2, step" in error
    assert same(weights(copied_run / "last_model.pth"), before)


# ------------------------------------------------------------------------------------- as a user's shell sees it


def test_without_network_and_weights_the_error_comes_before_the_data_are_read(tmp_path, data_dir):
    """A proxy that refuses every connection stands for a server without internet."""
    offline = {**os.environ, "TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    process = start_main("--data_dirs", data_dir, "--output_dir", tmp_path / "run", env=offline)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "effective" not in out  # the table of classes, the first that is printed of the data
    (line,) = err.strip().splitlines()
    assert line.startswith("error: --pretrained") and "--weights FILE" in line
    assert not list(tmp_path.glob("run*"))


def test_a_compiler_that_is_missing_is_said_in_one_line(tmp_path, data_dir, capsys, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--compile", "--run_dir", tmp_path / "run"]
    with torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "nowhere"))}):
        assert run_main(*flags) == 2
    err = capsys.readouterr().err
    assert err.strip().splitlines()[-1].startswith("error: --compile: torch.compile does not work here")
    assert "Traceback" not in err and not (tmp_path / "run").exists()


def test_a_trained_model_cannot_change_to_another_kind_of_head(copied_run, capsys):
    for flags in (["--eval_only"], []):
        assert run_main("--resume", copied_run / "best_model.pth", "--train_loss", "ldam", *flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --train_loss: ldam has a head of its own")
