"""main.py end to end on tiny images: the files of a run, resuming, evaluation, and invalid input."""

import json
import os
import shlex
from multiprocessing import popen_fork
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    PATIENCE,
    THIN_MAIN,
    TINY_COUNTS,
    TINY_FLAGS,
    differences,
    history_but_times,
    run_main,
    same,
    start_main,
    wait_for,
    write_checkpoint,
    write_class_folders,
    write_images,
)
from sklearn.metrics import balanced_accuracy_score, f1_score

import images.demo
import report
from model import CHECKPOINT_TYPES, Model, load_checkpoint
from run.files import HISTORY_COLUMNS, read_predictions, read_rows
from run.saver import Saver

pytestmark = pytest.mark.usefixtures("thin_network")  # processes that a test starts use the full ResNet-50


def weights(path):
    return load_checkpoint(path)["model_state_dict"]


# ---------------------------------------------------------------------------------------------- files of a run


def test_a_run_writes_the_documented_files(finished_run):
    assert {path.name for path in finished_run.glob("[!.]*")} == {
        "args.json", "splits.json", "history.csv", "last_model.pth", "best_model.pth", "previous_model.pth",
        "val_predictions.csv",
        "test_predictions.csv", "results.json", "curves.png", "confusion_matrix.png", "report.html", "MODEL_CARD.md",
        "log.txt", "environment.json", "near_duplicates.json",
    }  # fmt: skip


def test_history_has_one_row_per_epoch(finished_run):
    rows = read_rows(finished_run / "history.csv")
    assert tuple(rows[0]) == HISTORY_COLUMNS
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())


def test_splits_are_disjoint_and_stratified_and_counts_are_of_original_images(finished_run):
    splits = json.loads((finished_run / "splits.json").read_text())
    assert {split: len(paths) for split, paths in splits.items()} == {"train": 21, "val": 7, "test": 7}
    assert len({path for paths in splits.values() for path in paths}) == 35
    results = json.loads((finished_run / "results.json").read_text())
    assert results["classes"] == ["0", "2", "10"]
    assert results["samples_per_cls"] == [12, 6, 3]  # although augmentation makes 12 of each


def test_results_are_those_of_scikit_learn_for_the_predictions(finished_run):
    results = json.loads((finished_run / "results.json").read_text())
    for split in ("val", "test"):
        rows = read_rows(finished_run / f"{split}_predictions.csv")
        labels, predictions = [row["label"] for row in rows], [row["prediction"] for row in rows]
        metrics = results[split]
        names = {"acc", "balanced_acc", "macro_f1", "nll", "ece", "few_shot_acc"}  # all classes have few images
        assert set(metrics) == {"loss", "per_class", "confusion_matrix"} | names | {f"{name}_ci" for name in names}
        for variant in ("posthoc", "posthoc_macro_f1", "posthoc_exact"):
            assert set(results[variant][split]) - {"tau", "temperature"} == set(metrics)
        assert metrics["balanced_acc"] == pytest.approx(balanced_accuracy_score(labels, predictions))
        assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))
        assert metrics["acc"] == pytest.approx(np.mean([int(row["correct"]) for row in rows]))
        for row in rows:
            probabilities = [float(row[f"prob_{name}"]) for name in results["classes"]]
            assert sum(probabilities) == pytest.approx(1, abs=1e-5)
            assert results["classes"][int(np.argmax(probabilities))] == row["prediction"]
            assert Path(row["path"]).parent.name == row["label"]


def test_the_model_of_the_best_epoch_is_tested(finished_run):
    rows = read_rows(finished_run / "history.csv")
    results = json.loads((finished_run / "results.json").read_text())
    best = load_checkpoint(finished_run / "best_model.pth")
    assert results["best_epoch"] == best["epoch"] == best["best_epoch"]
    values = [float(row["val_balanced_acc"]) for row in rows]
    assert values[best["epoch"]] == max(values) == best["best_metric"] == results["val"]["balanced_acc"]


def test_the_posthoc_adjustment_is_stored_in_the_best_model_and_reused(copied_run, tmp_path):
    results = json.loads((copied_run / "results.json").read_text())
    best = load_checkpoint(copied_run / "best_model.pth")
    for name in ("posthoc", "posthoc_macro_f1"):
        assert best[name] == {value: results[name][value] for value in ("tau", "temperature")}
    assert results["posthoc_macro_f1"]["val"]["macro_f1"] >= results["val"]["macro_f1"]
    write_checkpoint(copied_run / "best_model.pth", {**best, "posthoc": {"tau": 0.5, "temperature": 2.0}})
    flags = ["--eval_only", "--tta", "--ordinal", "--run_dir", tmp_path / "eval"]
    assert run_main("--resume", copied_run / "best_model.pth", *flags) == 0
    evaluated = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert (evaluated["posthoc"]["tau"], evaluated["posthoc"]["temperature"]) == (0.5, 2.0)
    assert evaluated["posthoc_exact"]["test"]["macro_f1"] == results["posthoc_exact"]["test"]["macro_f1"]
    assert evaluated["posthoc_macro_f1"]["tau"] == results["posthoc_macro_f1"]["tau"]
    assert evaluated["test"]["balanced_acc"] == results["test"]["balanced_acc"]
    assert "quadratic_kappa" in evaluated["test"] and set(evaluated["tta"]["test"]) == set(evaluated["test"])


def test_the_outputs_for_the_validation_images_are_stored_in_the_best_model(finished_run):
    best = load_checkpoint(finished_run / "best_model.pth")
    paths, targets, probabilities = read_predictions(finished_run / "val_predictions.csv", best["classes"])
    assert paths.tolist() == best["splits"]["val"]
    assert best["val_outputs"]["targets"].tolist() == targets.tolist()
    assert best["val_outputs"]["probabilities"].numpy() == pytest.approx(probabilities, rel=1e-6)
    assert load_checkpoint(finished_run / "last_model.pth")["val_outputs"] is None


def test_folds_are_trained_one_after_another_and_summarized(data_dir, tmp_path, capsys):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--folds", 3, "--run_dir", tmp_path / "cv"]
    assert run_main(*flags) == 0
    summary = json.loads((tmp_path / "cv" / "folds.json").read_text())
    accuracies, tested_paths = [], []
    for fold in range(3):
        results = json.loads((tmp_path / "cv" / f"fold_{fold}" / "results.json").read_text())
        accuracies.append(results["test"]["balanced_acc"])
        tested_paths += [row["path"] for row in read_rows(tmp_path / "cv" / f"fold_{fold}" / "test_predictions.csv")]
    assert len(tested_paths) == len(set(tested_paths)) == 35
    pooled = [row for run in (tmp_path / "cv").glob("fold_?") for row in read_rows(run / "test_predictions.csv")]
    assert summary["test_pooled"]["acc"] == pytest.approx(np.mean([int(row["correct"]) for row in pooled]))
    assert {name: row["support"] for name, row in summary["test_pooled"]["per_class"].items()} == TINY_COUNTS
    assert summary["test_balanced_acc"]["values"] == accuracies
    assert summary["test_balanced_acc"]["mean"] == pytest.approx(np.mean(accuracies))
    assert summary["test_balanced_acc"]["std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert run_main(*flags) == 2 and "already exists" in capsys.readouterr().err
    (tmp_path / "cv" / "label_issues.csv").unlink()  # written again, as is the report
    (tmp_path / "cv" / "report.html").unlink()
    (tmp_path / "cv" / "report.html").mkdir()  # which cannot be written: that costs neither results nor exit status
    assert run_main(*flags, "--auto_resume", "--num_workers", 1) == 0
    out = capsys.readouterr().out
    assert out.count("already finished") == 3 and "warning: report.html: not written" in out
    doubtful = {row["path"] for row in read_rows(tmp_path / "cv" / "label_issues.csv")}
    assert doubtful <= {row["path"] for row in pooled if row["correct"] == "0"}
    assert run_main(*flags, "--auto_resume", "--gamma", 1) == 2
    assert "was started with other settings (gamma: 2.0, now 1.0)" in capsys.readouterr().err
    assert run_main(*flags[:-4], "--run_dir", tmp_path / "cv", "--auto_resume") == 2
    assert "is the folder of a cross-validation" in capsys.readouterr().err
    other_data = write_class_folders(tmp_path / "other", {"0": 6, "2": 6, "10": 6})
    best = tmp_path / "cv" / "fold_0" / "best_model.pth"
    assert run_main("--eval_only", "--resume", best, "--test_dirs", other_data, "--run_dir", tmp_path / "eval") == 0
    write_images(data_dir / "0", 1, suffix=".bmp")
    assert run_main(*flags, "--auto_resume") == 2
    assert "was started with other settings (images: {'0': 20, " in capsys.readouterr().err
    (data_dir / "0" / "000.bmp").unlink()
    runs = [str(tmp_path / "cv" / f"fold_{fold}") for fold in (0, 1, 2, 0)]  # a run that is named twice counts once
    assert report.main([*runs, str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"test_balanced_acc {np.mean(accuracies):.3f} +- " in out and "(3 runs)" in out
    assert f"skipped: {tmp_path} holds no run with a finished epoch" in out
    assert report.main([str(tmp_path)]) == 2
    assert "error: none of the folders holds a run with a finished epoch" in capsys.readouterr().err
    Path(runs[0], "results.json").write_text("{")
    assert report.main(runs) == 2 and "results.json is damaged" in capsys.readouterr().err


def test_a_stopped_cross_validation_resumes_with_the_command_it_prints(data_dir, tmp_path):
    flags = [*TINY_FLAGS, "--folds", 2, "--split", 0.8, 0.2, 0]
    process = start_main("--data_dirs", data_dir, *flags, "--output_dir", tmp_path / "cv", program=THIN_MAIN)
    wait_for(lambda: list(tmp_path.glob("cv_*/fold_0/results.json")))
    process.terminate()
    _, err = process.communicate(timeout=PATIENCE)
    (folder,) = tmp_path.glob("cv_*")
    assert process.returncode == 143 and err.count("resume with: ") == 1
    command = shlex.split(err.partition("resume with: python main.py ")[2])
    assert command[-3:] == ["--run_dir", str(folder), "--auto_resume"]
    assert run_main(*command) == 0 and (folder / "folds.json").exists()


def test_a_class_too_small_for_the_folds_is_an_error_before_training(tmp_path, capsys):
    data = write_class_folders(tmp_path / "data", {"0": 20, "1": 4})
    flags = ["--data_dirs", data, *TINY_FLAGS, "--folds", 5, "--run_dir", tmp_path / "cv"]
    assert run_main(*flags) == 2
    assert "--folds: class '1' has too few images (4)" in capsys.readouterr().err
    assert not (tmp_path / "cv").exists()


def test_a_best_epoch_before_the_deferred_reweighting_is_reported(data_dir, tmp_path, capsys):
    # a learning rate of almost 0: no later epoch is better than the first
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--lr", 1e-12, "--drw_epoch", 1, "--train_loss", "cb", "--ordinal"]
    assert run_main(*flags, "--run_dir", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "the best epoch, 0, is earlier than the stage that --drw_epoch / --crt_epochs starts in epoch 1" in out
    assert "order of the grades: 0 < 2 < 10" in out
    assert run_main("--eval_only", "--resume", tmp_path / "run" / "last_model.pth", "--run_dir", tmp_path / "eval") == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert (results["evaluated_epoch"], results["best_epoch"]) == (1, 0)


def test_classifier_retraining_trains_a_new_head_on_a_frozen_backbone(data_dir, tmp_path):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--train_loss", "focal"]
    assert run_main(*flags, "--epochs", 3, "--crt_epochs", 2, "--run_dir", tmp_path / "long") == 0
    rows = read_rows(tmp_path / "long" / "history.csv")
    # the new head has its own schedule
    assert float(rows[0]["learning_rate"]) < 1e-3 * 0.6 < float(rows[1]["learning_rate"])
    last = weights(tmp_path / "long" / "last_model.pth")
    assert run_main(*flags, "--epochs", 2, "--crt_epochs", 1, "--run_dir", tmp_path / "short") == 0
    shorter = weights(tmp_path / "short" / "last_model.pth")
    assert [name for name in last if not torch.equal(last[name], shorter[name])] == ["head.weight", "head.bias"]


def test_a_checkpoint_contains_everything_needed_to_resume(finished_run):
    last = torch.load(finished_run / "last_model.pth", weights_only=True)
    assert set(last) == set(CHECKPOINT_TYPES)
    assert last["epoch"] == 1 and last["samples_per_cls"] == [12, 6, 3] and last["classes"] == ["0", "2", "10"]
    assert last["args"] == json.loads((finished_run / "args.json").read_text())
    assert last["splits"] == json.loads((finished_run / "splits.json").read_text())


def test_the_demo_creates_its_data_trains_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images.demo, "IMAGES_PER_GRADE", (10, 8, 6, 5, 5))
    assert run_main("--demo", "--epochs", 1, "--image_size", 32, "--run_dir", tmp_path / "demo") == 0
    assert f"results saved to {tmp_path / 'demo'}" in capsys.readouterr().out
    args = json.loads((tmp_path / "demo" / "args.json").read_text())
    assert args["use_augmentation"] and args["train_loss"] == "cb" and not args["pretrained"]
    assert run_main("--resume", tmp_path / "demo" / "last_model.pth", "--epochs", 2) == 0
    assert len(read_rows(tmp_path / "demo" / "history.csv")) == 2


# ------------------------------------------------------------------------------------- reproducibility, resuming


def test_workers_change_no_result_and_are_not_forked_while_a_checkpoint_is_written(
    finished_run, data_dir, tmp_path, monkeypatch
):
    """They would keep its memory and its open file for as long as they live."""
    savers, is_writing, launch = [], [], popen_fork.Popen._launch

    def launch_and_note(popen, process):
        is_writing.append(savers[0]._writing is not None)
        launch(popen, process)

    monkeypatch.setattr(Saver, "__enter__", lambda saver: savers.append(saver) or saver)
    monkeypatch.setattr(popen_fork.Popen, "_launch", launch_and_note)
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--use_augmentation", "--amp", "off", "--num_workers", 2]
    assert run_main(*flags, "--save_every", 1, "--run_dir", tmp_path / "again") == 0
    assert len(is_writing) >= 4 and not any(is_writing)
    assert history_but_times(tmp_path / "again") == history_but_times(finished_run)
    assert same(weights(tmp_path / "again/last_model.pth"), weights(finished_run / "last_model.pth"))


def test_turning_the_cache_off_does_not_change_the_results(finished_run, data_dir, tmp_path, capsys):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--use_augmentation", "--amp", "off", "--no_cache"]
    assert run_main(*flags, "--cache_dir", tmp_path / "cache", "--run_dir", tmp_path / "again") == 0
    assert "35 images are not cached" in capsys.readouterr().out and not (tmp_path / "cache").exists()
    assert history_but_times(tmp_path / "again") == history_but_times(finished_run)
    assert same(weights(tmp_path / "again/last_model.pth"), weights(finished_run / "last_model.pth"))


def test_a_second_run_decodes_no_images(data_dir, tmp_path, capsys):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--cache_dir", tmp_path / "cache", "--run_dir"]
    assert run_main(*flags, tmp_path / "first") == 0
    assert "35 images, 0.1 MB, in " in (out := capsys.readouterr().out) and "(35 newly decoded)" in out
    assert run_main(*flags, tmp_path / "second") == 0
    assert "(0 newly decoded)" in capsys.readouterr().out
    assert history_but_times(tmp_path / "second") == history_but_times(tmp_path / "first")


def test_runs_with_progressive_sizes_and_gradient_accumulation_resume_on_schedule(data_dir, tmp_path, monkeypatch):
    sizes, forward = [], Model.forward

    def recorded_forward(model, images):
        if model.training:
            sizes.append(images.shape[-1])
        return forward(model, images)

    monkeypatch.setattr(Model, "forward", recorded_forward)
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--image_size", 64, "--progressive", "--grad_accum", 2]
    assert run_main(*flags, "--epochs", 3, "--run_dir", tmp_path / "run") == 0
    assert sizes == [32] * 3 + [48] * 3 + [64] * 3  # 21 images: 3 batches and 2 steps per epoch
    last = load_checkpoint(tmp_path / "run" / "last_model.pth")
    assert last["scheduler_state_dict"]["last_epoch"] == 3 * 2
    assert run_main("--resume", tmp_path / "run" / "last_model.pth", "--epochs", 4) == 0
    assert load_checkpoint(tmp_path / "run" / "last_model.pth")["scheduler_state_dict"]["last_epoch"] == 4 * 2
    assert sizes[9:] == [64] * 3


def test_the_log_has_every_part_of_a_run_and_of_its_folds(copied_run, data_dir, tmp_path):
    for name in ("last_model.pth", "previous_model.pth"):  # as after a search or an ablation
        (copied_run / name).unlink()
    assert run_main("--resume", copied_run / "best_model.pth", "--epochs", 3) == 0
    log = (copied_run / "log.txt").read_text(encoding="utf-8")
    assert "imbalance: Class-Balanced" in log and log.count("results saved to") == 2
    advice = "only 1 test image of 10: a recall of one half has the interval 0.05 to 0.95, whatever the model"
    assert advice in log.partition("results saved to")[0]
    assert advice.replace("only", "Only") in (copied_run / "report.html").read_text(encoding="utf-8")
    assert [f"epoch   {epoch} (" in log for epoch in range(4)] == [True, True, True, False]
    hours = json.loads((copied_run / "environment.json").read_text())["hours_trained"]
    assert hours == pytest.approx(
        sum(float(row["seconds"]) for row in read_rows(copied_run / "history.csv")) / 3600, abs=1e-4
    )
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--folds", 2, "--run_dir", tmp_path / "cv"]
    assert run_main(*flags) == 0
    whole = (tmp_path / "cv" / "log.txt").read_text(encoding="utf-8")
    assert "mean and standard deviation of 2 folds" in whole and whole.count("training on cpu") == 2
    assert all((tmp_path / "cv" / f"fold_{i}" / "log.txt").read_text().count("training on cpu") == 1 for i in (0, 1))


def test_patience_ends_a_run_that_does_not_improve_and_it_counts_as_finished(data_dir, tmp_path, capsys):
    """With a learning rate near zero, no epoch is better than the first."""
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--lr", 1e-12, "--epochs", 20, "--patience", 2, "--auto_resume"]
    command = [*flags, "--run_dir", tmp_path / "run"]
    assert run_main(*command) == 0
    out = capsys.readouterr().out
    assert "stopped early: val_balanced_acc has not improved for 2 epochs; the learning rate, planned for 20" in out
    assert " left" in out
    rows = read_rows(tmp_path / "run" / "history.csv")
    values = [float(row["val_balanced_acc"]) for row in rows]
    assert len(rows) == values.index(max(values)) + 3 < 20
    assert run_main(*command) == 0 and "already finished" in capsys.readouterr().out
    assert run_main(*command, "--patience", 3) == 0
    assert len(read_rows(tmp_path / "run" / "history.csv")) > len(rows)


def test_a_finished_run_continues_for_more_epochs_without_duplicate_rows(copied_run, finished_run):
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


def test_batch_size_and_precision_can_be_changed_when_resuming(copied_run):
    flags = ["--batch_size", 4, "--amp", "fp16", "--epochs", 3, "--use_augmentation=false"]
    assert run_main("--resume", copied_run / "last_model.pth", *flags) == 0
    last = load_checkpoint(copied_run / "last_model.pth")
    steps_per_epoch = 6  # 21 original images in batches of 4
    assert last["epoch"] == 2 and last["scheduler_state_dict"]["last_epoch"] == 3 * steps_per_epoch
    assert last["scaler_state_dict"]["scale"] > 0
    assert float(read_rows(copied_run / "history.csv")[-1]["learning_rate"]) < 1e-4  # the end of the cosine


def test_resuming_from_the_best_epoch_removes_later_rows(copied_run):
    best = load_checkpoint(copied_run / "best_model.pth")
    first_epoch = {"epoch": 0, "best_epoch": 0, "history": best["history"][:1]}
    write_checkpoint(copied_run / "best_model.pth", {**best, **first_epoch})
    assert run_main("--resume", copied_run / "best_model.pth", "--wandb_id", "2x3y4z5w", "--wandb_resume", "allow") == 0
    assert [row["epoch"] for row in read_rows(copied_run / "history.csv")] == ["0", "1"]
    assert load_checkpoint(copied_run / "last_model.pth")["wandb_id"] == "2x3y4z5w"


def test_resuming_a_finished_run_only_repeats_its_test(copied_run, finished_run):
    os.unlink(copied_run / "results.json")
    assert run_main("--resume", copied_run / "last_model.pth") == 0
    assert (copied_run / "results.json").read_text() == (finished_run / "results.json").read_text()


@pytest.mark.parametrize("is_missing", [True, False])
def test_a_best_model_lost_in_a_crash_is_restored_from_the_last_model(copied_run, is_missing):
    last = load_checkpoint(copied_run / "last_model.pth")
    write_checkpoint(copied_run / "last_model.pth", {**last, "best_epoch": last["epoch"], "best_metric": 0.99})
    if is_missing:
        os.unlink(copied_run / "best_model.pth")
    assert run_main("--resume", copied_run / "last_model.pth") == 0
    assert load_checkpoint(copied_run / "best_model.pth")["best_metric"] == 0.99


def test_eval_only_reproduces_the_results_of_the_run(copied_run, finished_run):
    assert run_main("--eval_only", "--resume", copied_run / "best_model.pth") == 0
    (folder,) = copied_run.glob("eval_*")
    expected = json.loads((finished_run / "results.json").read_text())
    assert {**json.loads((folder / "results.json").read_text()), "epochs": 2} == expected
    names = ("test_predictions.csv", "val_predictions.csv")
    assert all((folder / name).read_bytes() == (finished_run / name).read_bytes() for name in names)


def test_eval_only_on_other_images_needs_neither_the_original_data_nor_every_class(copied_run, tmp_path, capsys):
    other_data = write_class_folders(tmp_path / "other", {"2": 3, "10": 4}, seed=5)
    checkpoint = load_checkpoint(copied_run / "best_model.pth")
    missing = {split: [path + ".gone" for path in paths] for split, paths in checkpoint["splits"].items()}
    write_checkpoint(tmp_path / "moved.pth", {**checkpoint, "splits": missing})
    out = tmp_path / "out"
    train_image = Path(checkpoint["splits"]["train"][0])
    (other_data / "2" / train_image.name).write_bytes(train_image.read_bytes())
    missing["train"][0] = str(train_image)
    write_checkpoint(tmp_path / "moved.pth", {**checkpoint, "splits": missing})
    flags = ["--eval_only", "--resume", tmp_path / "moved.pth", "--test_dirs", other_data, "--run_dir", out]
    assert run_main(*flags) == 0
    printed = capsys.readouterr().out
    assert "only --test_dirs is evaluated" in printed
    assert "warning: 1 of the 7 images of --test_dirs have the name and size" in printed
    results = json.loads((out / "results.json").read_text())
    assert "val" not in results
    assert [row["support"] for row in results["test"]["per_class"].values()] == [0, 3, 4]
    assert len(read_rows(out / "test_predictions.csv")) == 7


def test_val_dirs_and_test_dirs_replace_splits_of_the_data(data_dir, tmp_path):
    for split in ("val", "test"):
        write_class_folders(tmp_path / split, {"0": 2, "2": 2, "10": 2}, seed=9)
    other_dirs = ["--val_dirs", os.path.relpath(tmp_path / "val"), "--test_dirs", tmp_path / "test"]
    flags = ["--data_dirs", data_dir, *other_dirs, "--epochs", 1]
    assert run_main(*flags, *TINY_FLAGS[:5], "--train_loss", "ce", "--run_dir", tmp_path / "run") == 0
    splits = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert {split: len(paths) for split, paths in splits.items()} == {"train": 35, "val": 6, "test": 6}
    assert run_main("--resume", tmp_path / "run" / "last_model.pth", "--epochs", 2, *other_dirs) == 0


def test_weights_of_a_run_initialize_another_run_with_other_classes(finished_run, tmp_path):
    data = write_class_folders(tmp_path / "data", {"dry": 5, "oily": 5})
    flags = ["--data_dirs", data, "--weights", finished_run / "best_model.pth", "--image_size", 32, "--epochs", 1]
    assert run_main(*flags, "--lr", "1e-9", "--run_dir", tmp_path / "run") == 0
    start, end = weights(finished_run / "best_model.pth"), weights(tmp_path / "run/last_model.pth")
    torch.testing.assert_close(end["backbone.layer4.0.conv2.weight"], start["backbone.layer4.0.conv2.weight"])
    assert end["head.weight"].shape[0] == 2


# ------------------------------------------------------------------------------------------------ invalid input


def check_refused(capsys, tmp_path, flags, *expected):
    """Check for status 2, one `error:` line that contains all of `expected`, and no new files."""
    before = sorted(tmp_path.rglob("*"))
    assert run_main(*flags) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: "), errors
    for text in expected:
        assert str(text) in errors[0]
    assert "Traceback" not in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


INVALID_FLAGS = {
    "two kinds of oversampling": (["--sampling", "sqrt", "--use_augmentation"], "--sampling", "both oversample"),
    "nothing to defer": (["--drw_epoch", 1, "--train_loss", "focal"], "--drw_epoch", "nothing to defer"),
    "deferred past the last epoch": (["--drw_epoch", 2, "--epochs", 2], "--drw_epoch", "use up all 2 epochs"),
    "fold without folds": (["--fold", 1], "--fold", "--folds K"),
    "fold out of range": (["--folds", 3, "--fold", 3], "--fold", "from 0 to K - 1"),
    "invalid regex": (["--group_regex", "("], "--group_regex", "not a regular expression"),
    "regex without a match": (["--group_regex", "^x"], "--group_regex", "does not match the file name of"),
    "no data": ([], "--data_dirs"),
    "unknown loss": (["--train_loss", "hinge"], "--train_loss", "cb"),
    "negative learning rate": (["--learning_rate", "-1"], "--learning_rate", "above 0"),
    "learning rate of nan": (["--lr", "nan"], "--lr"),
    "beta of 1": (["--beta", "1.0"], "--beta", "below 1"),
    "negative gamma": (["--gamma", "-0.5"], "--gamma"),
    "split that does not sum to 1": (["--split", "0.6", "0.2", "0.1"], "--split"),
    "split without a test set": (["--split", "0.8", "0.2", "0"], "--split", "test"),
    "no epochs": (["--epochs", "0"], "--epochs"),
    "fractional batch size": (["--batch_size", "0.5"], "--batch_size"),
    "image size too small": (["--image_size", "8"], "--image_size"),
    "unknown flag": (["--learnign_rate", "0.1"], "--learnign_rate"),
    "unknown augmentation method": (["--augmentation_methods", "mosaic"], "--augmentation_methods"),
    "unknown device": (["--device", "abacus"], "--device"),
    "invalid boolean": (["--use_augmentation=maybe"], "--use_augmentation"),
    "eval_only without a checkpoint": (["--eval_only"], "--resume"),
    "demo with data": (["--demo"], "--demo"),
    "alpha for another number of classes": (["--train_loss", "focal", "--alpha", "1", "2"], "--alpha", "3 classes"),
    "missing checkpoint": (["--resume", "nowhere.pth"], "--resume", "nowhere.pth"),
    "missing weights": (["--weights", "nowhere.pth"], "--weights", "nowhere.pth"),
}


@pytest.mark.parametrize("name", INVALID_FLAGS)
def test_invalid_flags_are_refused(name, capsys, tmp_path, data_dir):
    flags, *expected = INVALID_FLAGS[name]
    data = [] if name == "no data" else ["--data_dirs", data_dir]
    check_refused(capsys, tmp_path, [*data, "--no-pretrained", "--run_dir", tmp_path / "run", *flags], *expected)


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


INVALID_DATA = {
    empty_file: ("x.png", "empty file", "--skip_broken"),
    text_as_jpeg: ("x.jpg", "--skip_broken"),
    truncated_jpeg: ("000.jpg", "truncated"),
    class_without_image: ("--data_dirs", "'3'"),
    one_class_only: ("--data_dirs", "one class"),
    too_few_images: ("--split", "'5'", "(2)"),
}


@pytest.mark.parametrize("damage", INVALID_DATA, ids=lambda function: function.__name__)
def test_invalid_data_is_refused(damage, capsys, tmp_path):
    data = write_class_folders(tmp_path / "data")
    damage(data)
    check_refused(
        capsys, tmp_path, ["--data_dirs", data, "--no-pretrained", "--run_dir", tmp_path / "run"], *INVALID_DATA[damage]
    )


def test_missing_folders_and_folders_without_classes_are_refused(capsys, tmp_path, data_dir):
    flags = ["--no-pretrained", "--run_dir", tmp_path / "run", "--data_dirs"]
    check_refused(capsys, tmp_path, [*flags, tmp_path / "gone"], "--data_dirs", tmp_path / "gone")
    check_refused(capsys, tmp_path, [*flags, data_dir / "0"], "contains images, not class folders")
    (tmp_path / "empty").mkdir()
    check_refused(capsys, tmp_path, [*flags, tmp_path / "empty"], "contains no class folders")
    check_refused(capsys, tmp_path, [*flags, data_dir, "--test_dirs", data_dir], "--test_dirs", "twice")


def test_output_folders_that_exist_or_cannot_be_created_are_refused(capsys, tmp_path, data_dir):
    flags = ["--data_dirs", data_dir, "--no-pretrained"]
    (tmp_path / "file").write_text("")
    check_refused(capsys, tmp_path, [*flags, "--run_dir", tmp_path], "--run_dir", "exists")
    check_refused(capsys, tmp_path, [*flags, "--run_dir", tmp_path / "file" / "run"], "--run_dir", "Not a directory")
    check_refused(capsys, tmp_path, [*flags, "--output_dir", tmp_path / "file" / "run"], "--output_dir")
    check_refused(capsys, tmp_path, [*flags, "--output_dir", "/proc/checkpoints"], "--output_dir", "/proc")


def test_invalid_truncated_and_mismatched_checkpoints_are_refused(capsys, tmp_path, copied_run):
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "truncated.pth").write_bytes((copied_run / "last_model.pth").read_bytes()[:-1000])
    for name, reason in [("text.pth", "damaged"), ("other.pth", "not a checkpoint"), ("truncated.pth", "damaged")]:
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
    other_data = write_class_folders(tmp_path / "other", TINY_COUNTS, seed=7)
    check_refused(capsys, tmp_path, [*resume, "--data_dirs", other_data], "--resume", "of 35 images")


def test_a_best_model_or_a_data_folder_that_does_not_belong_to_the_run_is_refused(
    capsys, tmp_path, copied_run, data_dir
):
    last, best = load_checkpoint(copied_run / "last_model.pth"), load_checkpoint(copied_run / "best_model.pth")
    write_checkpoint(copied_run / "last_model.pth", {**last, "epoch": 2, "best_epoch": 1, "best_metric": 0.9})
    write_checkpoint(copied_run / "best_model.pth", {**best, "best_epoch": 0})
    check_refused(capsys, tmp_path, ["--resume", copied_run / "last_model.pth"], "best_model.pth", "--resume")
    more = write_class_folders(tmp_path / "more", TINY_COUNTS, seed=3)
    flags = ["--resume", copied_run / "best_model.pth", "--data_dirs", data_dir, more]
    check_refused(capsys, tmp_path, flags, "--data_dirs", "no image of the checkpoint's split", more)


def test_diverging_training_is_one_error_line_and_keeps_its_checkpoint(capsys, tmp_path, copied_run):
    before = weights(copied_run / "last_model.pth")
    flags = ["--resume", copied_run / "last_model.pth", "--epochs", 4, "--lr", "1e20", "--clip_grad", 0, "--amp", "off"]
    assert run_main(*flags) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: the loss is") and "epoch 2, step" in error
    assert same(weights(copied_run / "last_model.pth"), before)


# ---------------------------------------------------------------------------------------- errors before training


def test_missing_pretrained_weights_are_an_error_before_the_data_is_read(tmp_path, data_dir):
    """A proxy that refuses every connection simulates a server without internet access."""
    offline = {**os.environ, "TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    process = start_main("--data_dirs", data_dir, "--output_dir", tmp_path / "run", env=offline)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "effective" not in out  # the table of classes, the first output about the data
    (line,) = err.strip().splitlines()
    assert line.startswith("error: --pretrained") and "--weights FILE" in line
    assert not list(tmp_path.glob("run*"))


def test_a_missing_compiler_is_one_error_line(tmp_path, data_dir, capsys, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--compile", "--run_dir", tmp_path / "run"]
    with torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "nowhere"))}):
        assert run_main(*flags) == 2
    err = capsys.readouterr().err
    assert err.strip().splitlines()[-1].startswith("error: --compile: torch.compile does not work here")
    assert "Traceback" not in err and not (tmp_path / "run").exists()


def test_a_trained_model_cannot_switch_to_another_kind_of_head(copied_run, capsys):
    for flags in (["--eval_only"], []):
        assert run_main("--resume", copied_run / "best_model.pth", "--train_loss", "ldam", *flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --train_loss: ldam has its own head")


def test_resize_gives_the_same_bits_with_and_without_the_cache_and_is_kept_when_resumed(
    thin_network, tmp_path, data_dir, capsys
):
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--amp", "off", "--resize", "crop"]
    assert run_main(*flags, "--run_dir", tmp_path / "cached") == 0
    assert run_main(*flags, "--run_dir", tmp_path / "decoded", "--no_cache", "--num_workers", 1) == 0
    assert differences(tmp_path / "cached", tmp_path / "decoded") == []
    assert (
        run_main(*[flag if flag != "crop" else "stretch" for flag in flags], "--run_dir", tmp_path / "stretched") == 0
    )
    assert "history.csv" in differences(tmp_path / "cached", tmp_path / "stretched")
    capsys.readouterr()
    last = tmp_path / "cached" / "last_model.pth"
    assert run_main("--eval_only", "--resume", last, "--run_dir", tmp_path / "eval") == 0
    assert json.loads((tmp_path / "eval" / "args.json").read_text())["resize"] == "crop"
    assert "warning" not in capsys.readouterr().err
