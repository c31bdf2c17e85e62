"""Prediction with the thin network of a finished run."""

import os
import tracemalloc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import TINY_COUNTS, changed_checkpoint, write_images
from PIL import Image

import inference
from engine import Engine
from flags import build_parser
from images.photographs import find_photographs
from inference import Prediction, find_checkpoints, load
from metrics import summary_metrics
from model import load_checkpoint
from predict import Truth
from predict import build_parser as build_predict_parser
from run.cli import UserError
from run.files import read_json, read_predictions, read_rows, write_json
from run.folder import FOLDS_FILE

CLASSES = list(TINY_COUNTS)
pytestmark = pytest.mark.usefixtures("thin_network")


@pytest.fixture
def grade(finished_run):
    return load(finished_run, "cpu")


@pytest.fixture
def photographs(tmp_path):
    return list(map(str, write_images(tmp_path / "photographs", 5)))


def probabilities_in(predictions):
    return np.array([p.probabilities for p in predictions])


# -------------------------------------------------------------------------------------------- as the run's own test


@pytest.mark.parametrize("split", ["val", "test"])
def test_predictions_equal_those_of_the_run_digit_for_digit(finished_run, grade, split):
    rows = read_rows(finished_run / f"{split}_predictions.csv")
    predictions = grade([row["path"] for row in rows])
    assert grade.batch_size == 16  # twice --batch_size, as in the evaluation of the run
    assert [p.prediction for p in predictions] == [row["prediction"] for row in rows]
    written = [dict(zip(grade.columns, grade.row(p), strict=True)) for p in predictions]
    for name in CLASSES:
        assert [row[f"prob_{name}"] for row in written] == [row[f"prob_{name}"] for row in rows]
    assert [p.probability for p in predictions] == probabilities_in(predictions).max(axis=1).tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_hardly_matters(finished_run, grade, batch_size):
    paths = read_predictions(finished_run / "test_predictions.csv", CLASSES)[0]
    other = load(finished_run, "cpu", batch_size=batch_size)(paths)
    assert probabilities_in(other) == pytest.approx(probabilities_in(grade(paths)), abs=1e-4)


def test_the_mirror_image_and_the_adjustment_give_the_metrics_of_the_run(finished_run):
    results = read_json(finished_run / "results.json")
    paths, targets, _ = read_predictions(finished_run / "test_predictions.csv", CLASSES)
    adjusted = probabilities_in(load(finished_run, "cpu", adjusted=True)(paths))
    assert summary_metrics(targets, adjusted)["macro_f1"] == pytest.approx(results["posthoc"]["test"]["macro_f1"])
    grade = load(finished_run, "cpu", tta=True)
    arrays = [np.asarray(Image.open(path)) for path in paths]
    both = grade.probabilities_of([*arrays, *(array[:, ::-1] for array in arrays)])
    assert both[: len(paths)] == pytest.approx(both[len(paths) :], abs=1e-3)
    assert probabilities_in(grade(paths)) == pytest.approx(both[: len(paths)], abs=1e-5)


def test_turned_photographs_get_the_same_answer_after_a_training_at_any_angle(finished_run, photographs, tmp_path):
    flags = {**load_checkpoint(finished_run / "best_model.pth")["args"], "augment_all": True, "rotation": 180.0}
    arrays = [np.asarray(Image.open(path).resize((32, 32))) for path in photographs]
    for rotation, is_same in ((15.0, False), (180.0, True)):
        path = changed_checkpoint(finished_run, tmp_path / f"{rotation}.pth", args=flags | {"rotation": rotation})
        grade = load(path, "cpu", tta=True)
        upright, turned = (grade.probabilities_of(images) for images in (arrays, [np.rot90(image) for image in arrays]))
        assert np.allclose(upright, turned, atol=1e-3) == is_same


def test_arrays_are_resized_as_photographs_are(grade, photographs):
    arrays = [np.asarray(Image.open(path)) for path in photographs]
    assert grade.probabilities_of(arrays) == pytest.approx(probabilities_in(grade(photographs)), abs=1e-6)
    assert grade.probabilities_of(arrays, precise=True) == pytest.approx(grade.probabilities_of(arrays), abs=1e-4)


@pytest.mark.parametrize("flag", ["demo", "auto_resume", "eval_only"])
def test_a_run_that_was_started_with_any_flag_can_be_loaded(finished_run, tmp_path, flag):
    flags = {**load_checkpoint(finished_run / "best_model.pth")["args"], flag: True}
    assert load(changed_checkpoint(finished_run, tmp_path / "best.pth", args=flags), "cpu").classes == CLASSES


def test_a_flag_that_is_newer_than_the_checkpoint_has_its_default(finished_run, tmp_path, photographs, grade):
    flags = {k: v for k, v in load_checkpoint(finished_run / "best_model.pth")["args"].items() if k != "resize"}
    old = load(changed_checkpoint(finished_run, tmp_path / "old.pth", args=flags), "cpu")
    assert old.resize == build_parser().get_default("resize")
    assert (probabilities_in(old(photographs)) == probabilities_in(grade(photographs))).all()


# ----------------------------------------------------------------------------------------------------- photographs


def test_an_unreadable_photograph_has_the_reason_in_its_place_and_changes_no_other(grade, photographs):
    expected = probabilities_in(grade(photographs))
    broken, missing = f"{photographs[0]}.broken", f"{photographs[0]}.missing"
    open(broken, "w").close()
    paths = [broken, *photographs[:2], missing, *photographs[2:], broken, broken]
    predictions = grade(paths)
    assert [p.path for p in predictions] == paths
    assert [p.error for p in predictions if p.error] == ["empty file", "No such file or directory"] + 2 * ["empty file"]
    assert predictions[0].prediction is None and predictions[0].probabilities is None
    assert (probabilities_in([p for p in predictions if not p.error]) == expected).all()
    assert all(len(grade.row(p)) == len(grade.columns) for p in predictions)


def test_one_path_and_one_photograph_twice(grade, photographs):
    (single,) = grade(photographs[0])
    twice = grade([photographs[0], photographs[0]])
    assert [p.prediction for p in twice] == [single.prediction] * 2 and grade([]) == []


def test_batches_are_forgotten(finished_run, photographs):
    """Memory does not grow with the number of photographs."""
    batches, seen = load(finished_run, "cpu", batch_size=1).batches(photographs), []
    for batch in batches:
        assert batch.images.shape == (1, 3, 32, 32)
        seen.append(weakref.ref(batch.images))
        del batch
    assert [reference() for reference in seen[:-2]] == [None] * 3


# ------------------------------------------------------------------------------------------------------------ grades


def test_the_expected_grade_is_the_mean_of_the_numbers_that_the_classes_are(finished_run, tmp_path, photographs):
    flags = {**load_checkpoint(finished_run / "best_model.pth")["args"], "ordinal": True}
    for classes, grades in ((CLASSES, [0, 2, 10]), (["0_none", "1_mild", "2_deep"], [0, 1, 2])):
        grade = load(changed_checkpoint(finished_run, tmp_path / "ordinal.pth", args=flags, classes=classes), "cpu")
        assert "expected_grade" in grade.columns and grade.is_ordinal
        for prediction in grade(photographs):
            assert prediction.expected_grade == pytest.approx(float(prediction.probabilities @ grades))


def test_classes_without_order_have_no_expected_grade(grade, photographs):
    assert grade(photographs)[0].expected_grade is None and "expected_grade" not in grade.columns


# --------------------------------------------------------------------------------------------------- several models


def test_several_models_predict_the_mean_and_say_how_many_agree(finished_run, tmp_path, photographs):
    state = load_checkpoint(finished_run / "best_model.pth")["model_state_dict"]
    biases = [torch.tensor(bias) for bias in ([9.0, 0, 0], [0, 9.0, 0], [8.0, 0, 0])]
    paths = [
        changed_checkpoint(finished_run, tmp_path / f"{k}.pth", model_state_dict={**state, "head.bias": bias})
        for k, bias in enumerate(biases)
    ]
    grade = load(paths, "cpu")
    single = np.stack([probabilities_in(load(path, "cpu")(photographs)) for path in paths])
    for prediction, rows in zip(grade(photographs), single.transpose(1, 0, 2), strict=True):
        assert prediction.probabilities == pytest.approx(rows.mean(axis=0), abs=1e-6)
        assert prediction.prediction == "0" and prediction.agreement == pytest.approx(2 / 3)
        assert dict(zip(grade.columns, grade.row(prediction), strict=True))["agreement"] == "0.6666667"


def test_models_that_do_not_fit_together_are_an_error(finished_run, tmp_path):
    best = finished_run / "best_model.pth"
    other = changed_checkpoint(finished_run, tmp_path / "other.pth", classes=["a", "b", "c"])
    with pytest.raises(UserError, match=r"other.pth has other classes \(a, b, c\) than .* \(0, 2, 10\)"):
        load([best, other], "cpu")
    larger = {**load_checkpoint(best)["args"], "image_size": 64}
    with pytest.raises(UserError, match=r"was trained with --image_size 64, .* with 32"):
        load([best, changed_checkpoint(finished_run, tmp_path / "larger.pth", args=larger)], "cpu")


def test_checkpoints_run_folders_and_cross_validations_are_found(tmp_path, capsys):
    files = [tmp_path / name / "best_model.pth" for name in ("run", "cv/fold_2", "cv/fold_10", "cv/fold_0")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    os.symlink(tmp_path / "run", tmp_path / "again")
    run, second, tenth, first = files
    found = find_checkpoints([str(tmp_path / "cv"), tmp_path / "run", tmp_path / "again", run])
    assert found == [first, second, tenth, run] and not capsys.readouterr().out
    assert find_checkpoints(tmp_path / "run") == [run]
    write_json(tmp_path / "cv" / FOLDS_FILE, {"flags": {"folds": 5}})
    find_checkpoints(tmp_path / "cv")
    assert "only 3 of the 5 folds have a best_model.pth" in capsys.readouterr().out
    for path, problem in ((tmp_path, "holds no best_model.pth"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UserError, match=problem):
            find_checkpoints(path)


@pytest.mark.parametrize("content", [[], {}, {"flags": {"folds": "many"}}])
def test_a_damaged_list_of_folds_is_an_error(tmp_path, content):
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "fold_0" / "best_model.pth").touch()
    write_json(tmp_path / FOLDS_FILE, content)
    with pytest.raises(UserError, match=f"{FOLDS_FILE} is damaged"):
        find_checkpoints(tmp_path)


def test_a_named_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is not a regular file"):
        find_checkpoints(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"args": {"image_size": "large"}}, "has been altered: its --image_size is 'large'"),
        ({"classes": ["0", "2"]}, "does not fit this network"),
        ({"posthoc": None}, "--adjusted: .* has no tau and temperature"),
        ({"epoch": "last"}, "is not a checkpoint of this version"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_an_error(finished_run, tmp_path, changes, problem):
    path = changed_checkpoint(finished_run, tmp_path / "changed.pth", **changes)
    with pytest.raises(UserError, match=problem):
        load(path, "cpu", adjusted=True)


def test_a_model_that_has_diverged_is_an_error(finished_run, tmp_path, photographs):
    state = load_checkpoint(finished_run / "best_model.pth")["model_state_dict"]
    state["head.bias"] = torch.tensor([0, float("nan"), 0])
    with pytest.raises(UserError, match=r"nan.pth has weights that are not finite"):
        load(changed_checkpoint(finished_run, tmp_path / "nan.pth", model_state_dict=state), "cpu")
    state["head.bias"] = torch.full((3,), 3e38)
    state["head.weight"] = torch.full_like(state["head.weight"], 3e38)
    grade = load(changed_checkpoint(finished_run, tmp_path / "large.pth", model_state_dict=state), "cpu")
    with pytest.raises(UserError, match=r"large.pth: the outputs of the model are not finite"):
        grade(photographs)


def test_what_only_a_training_needs_is_not_kept(grade):
    checkpoint = grade.models[0].checkpoint
    assert "optimizer_state_dict" not in checkpoint and "model_state_dict" not in checkpoint
    assert {"classes", "samples_per_cls", "args", "splits"} <= checkpoint.keys()


# --------------------------------------------------------------------------------------------------- prediction sets


def test_sets_are_in_the_order_of_the_classes_and_are_uncertain_unless_they_have_one(finished_run, photographs):
    grade = load(finished_run, "cpu", coverage=0.5)
    for prediction in grade(photographs):
        assert [name for name in CLASSES if name in prediction.prediction_set] == prediction.prediction_set
        assert prediction.uncertain == (len(prediction.prediction_set) != 1)
        row = dict(zip(grade.columns, grade.row(prediction), strict=True))
        assert row["prediction_set"] == "{" + "/".join(prediction.prediction_set) + "}"
        assert row["uncertain"] == int(prediction.uncertain)
    named = replace(prediction, prediction_set=["a/b", "c"])  # the names of classes of a table
    assert dict(zip(grade.columns, grade.row(named), strict=True))["prediction_set"] == r"{a\/b/c}"


def test_sets_do_not_depend_on_where_the_validation_outputs_are(finished_run, copied_run, photographs, capsys):
    """A checkpoint that was written before it held them is served by the file beside it."""
    (copied_run / "best_model.pth").unlink()
    changed_checkpoint(finished_run, copied_run / "best_model.pth", val_outputs=None)
    stored, beside = (load(run, "cpu", coverage=0.5)(photographs) for run in (finished_run, copied_run))
    assert [p.prediction_set for p in stored] == [p.prediction_set for p in beside]
    capsys.readouterr()
    (copied_run / "results.json").unlink()  # linked: the original stays
    assert load(copied_run, "cpu")(photographs)[0].prediction_set is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no prediction sets: ") and "has no outputs for its validation images" in line


@pytest.mark.parametrize("change", ["epoch", "paths", "damaged"])
def test_validation_outputs_of_another_model_do_not_serve(finished_run, copied_run, photographs, capsys, change):
    (copied_run / "best_model.pth").unlink()
    splits = load_checkpoint(finished_run / "best_model.pth")["splits"]
    changes = {"splits": {**splits, "val": splits["val"][::-1]}} if change == "paths" else {}
    changed_checkpoint(finished_run, copied_run / "best_model.pth", val_outputs=None, **changes)
    if change != "paths":
        results = read_json(copied_run / "results.json")
        (copied_run / "results.json").unlink()
        write_json(copied_run / "results.json", {**results, "evaluated_epoch": 7} if change == "epoch" else [])
    prediction = load(copied_run, "cpu")(photographs)[0]
    assert prediction.prediction_set is None and prediction.uncertain is None
    (line,) = capsys.readouterr().out.splitlines()
    assert ("is damaged" if change == "damaged" else "is of another model or of other images") in line


@pytest.mark.parametrize("outputs", [{"targets": None}, {"targets": 99}, {"probabilities": float("nan")}])
def test_damaged_validation_outputs_cost_only_the_sets(finished_run, tmp_path, photographs, capsys, outputs):
    stored = load_checkpoint(finished_run / "best_model.pth")["val_outputs"]
    ((name, value),) = outputs.items()
    damaged = {**stored, name: value if value is None else torch.full_like(stored[name], value)}
    path = changed_checkpoint(finished_run, tmp_path / "damaged.pth", val_outputs=damaged)
    assert load(path, "cpu")(photographs)[0].prediction_set is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no prediction sets: ") and line.endswith("damaged.pth are damaged")


def test_the_coverage_that_is_not_guaranteed_is_not_rounded(finished_run, photographs, capsys):
    load(finished_run, "cpu", coverage=0.9995)(photographs)
    assert "the coverage of 99.95% is not guaranteed" in capsys.readouterr().out


def test_unreadable_photographs_are_predictions_before_one_that_can_be_read(grade, photographs, tmp_path, monkeypatch):
    """Their reasons are not kept until then: there may be a million."""
    monkeypatch.setattr("images.decode_ahead.MAX_UNREADABLE", 5)
    (tmp_path / "empty.png").touch()
    paths = [str(tmp_path / "empty.png")] * 12 + photographs[:1]
    batches = list(grade.batches(paths))
    assert [len(batch.predictions) for batch in batches] == [5, 5, 3]
    assert [p.path for batch in batches for p in batch.predictions] == paths
    assert [bool(p.error) for batch in batches for p in batch.predictions] == 12 * [True] + [False]


def test_no_arrays_have_no_probabilities(grade):
    assert grade.probabilities_of([]).shape == (0, 3)


def test_classes_with_few_validation_images_are_named(grade, photographs, capsys):
    grade(photographs)
    line, of_all = capsys.readouterr().out.splitlines()
    assert "fewer than 9 validation images (0: 4, 2: 2, 10: 1)" in line and "90%" in line
    assert "no class has a guarantee" in of_all


def test_sets_follow_the_adjustment_but_not_the_mirror_image(finished_run, photographs):
    plain, adjusted = (load(finished_run, "cpu", adjusted=value) for value in (False, True))
    assert (plain.prediction_sets._tables[0][0][0] != adjusted.prediction_sets._tables[0][0][0]).any()
    for grade in (plain, adjusted):
        expected, computed_from = probabilities_in(grade(photographs)), []
        grade.tta = True
        grade.prediction_sets = lambda probabilities, seen=computed_from: seen.extend(probabilities) or probabilities[0]
        assert (probabilities_in(grade(photographs)) != expected).any()
        assert np.array_equal(computed_from, [expected])


def test_against_labels_4_bytes_per_photograph_and_class_are_kept(grade, photographs, tmp_path):
    (tmp_path / "t.csv").write_text("image,label\n000.png,0\n")
    flags = ["runs/x", "--images", *photographs, "--labels", str(tmp_path / "t.csv")]
    paths, count = find_photographs(photographs, "--images"), 5000
    truth = Truth(build_predict_parser().parse_args(flags), grade, paths)
    tracemalloc.start()
    try:
        for _ in range(count):
            truth.cells(Prediction(photographs[0], "0", 0.5, np.array([0.5, 0.25, 0.25], np.float32)))
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 1.2 * count * (4 * len(CLASSES) + 8)  # and a pointer to its position in the table


# ------------------------------------------------------------------------------------------------------- the machine


def test_a_gpu_with_too_little_memory_gets_smaller_pieces(grade, photographs, monkeypatch, capsys):
    expected, whole = probabilities_in(grade(photographs)), Engine.forward

    def forward(self, model, images):
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, model, images)

    capsys.readouterr()
    monkeypatch.setattr(Engine, "forward", forward)
    assert probabilities_in(grade(photographs)) == pytest.approx(expected, abs=1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["2", "1"]
    monkeypatch.setattr(Engine, "forward", lambda *_: forward(None, None, [1, 2]))
    with pytest.raises(UserError, match="predict with --device cpu"):
        grade(photographs)


def test_the_memory_of_a_batch_is_bounded(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "MAX_PIXELS", 5 * 32 * 32)
    assert load(finished_run, "cpu").batch_size == 5
