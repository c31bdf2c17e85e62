"""Labels from a table in whole runs of main.py: splits, subjects, predictions, resuming, another test set, folds."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY_FLAGS, differences, run_main, write_images

import predict
from metrics import format_with_interval
from model import load_checkpoint
from run.files import read_rows

FLAGS = [*TINY_FLAGS, "--amp", "off"]
COLORS = {"dry": (200, 80, 80), "oily": (80, 200, 80), "mixed": (80, 80, 200)}


def run_predict(*flags):
    return predict.main([*map(str, flags), "--device", "cpu"])


def write_photos(folder, count=16, seed=0):
    """A flat folder, and a table with two photographs per person. -> (folder of the photographs, table)"""
    rows = []
    for number, (label, color) in enumerate(COLORS.items()):
        for i, path in enumerate(write_images(folder / label, count, color, seed)):
            path = path.rename(folder / f"{label}_{i:02d}.png")
            rows.append([path.stem, f"p{number}_{i // 2}", label, 20 + i, "FM"[i % 2]])
        (folder / label).rmdir()
    with open(folder / "table.csv", "w", encoding="cp949", newline="") as file:
        csv.writer(file).writerows([["img_id", "patient_id", "diagnosis", "age", "성별"], *rows])
    return folder, folder / "table.csv"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Folder of a finished run with a table, and what it printed."""
    import io
    from contextlib import redirect_stdout

    from thin_main import thin_resnet50

    import resnet_custom

    folder, table = data
    run_dir, out = tmp_path_factory.mktemp("runs") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr(resnet_custom, "resnet50", thin_resnet50)
        assert run_main("--data_dirs", folder, "--labels", table, *FLAGS, "--epochs", 1, "--run_dir", run_dir) == 0
    return run_dir, out.getvalue()


def subjects_of_splits(run_dir, table_of):
    splits = json.loads((run_dir / "splits.json").read_text())
    return [{table_of[path.rpartition("/")[2].removesuffix(".png")] for path in paths} for paths in splits.values()]


def test_a_table_gives_labels_subjects_and_columns(run, data):
    run_dir, out = run
    assert "table.csv is read as CP949" in out
    assert "--image_column img_id, --subject_column patient_id, --label_column diagnosis" in out
    assert "file names look grouped" not in out
    (line,) = [line for line in out.splitlines() if line.lstrip().startswith("subjects")]
    assert sum(map(int, line.split()[1:])) == 24
    with open(data[1], encoding="cp949", newline="") as file:
        table = {row["img_id"]: row for row in csv.DictReader(file)}
    subjects = subjects_of_splits(run_dir, {name: row["patient_id"] for name, row in table.items()})
    assert sum(map(len, subjects)) == len(set.union(*subjects)) == 24
    for row in read_rows(run_dir / "test_predictions.csv") + read_rows(run_dir / "val_predictions.csv"):
        known = table[row["path"].rpartition("/")[2].removesuffix(".png")]
        assert row["label"] == known["diagnosis"]
        assert [row[name] for name in ("patient_id", "age", "성별")] == [
            known[name] for name in ("patient_id", "age", "성별")
        ]
    assert json.loads((run_dir / "results.json").read_text())["subject_column"] == "patient_id"
    report, card = ((run_dir / name).read_text(encoding="utf-8") for name in ("report.html", "MODEL_CARD.md"))
    assert "which draws whole subjects" in report and "in one split (`--subject_column`)" in card


def test_two_labels_of_a_photograph_are_found_and_a_resumed_run_needs_no_table(tmp_path, thin_network, capsys):
    folder, table = write_photos(tmp_path / "photos", seed=3)
    shutil.copy(folder / "dry_00.png", folder / "other.png")
    with open(table, "a", encoding="cp949") as file:
        file.write("other,p0_0,oily,20,F\n")
    run_dir = tmp_path / "run"
    flags = ["--data_dirs", folder, "--labels", table, *FLAGS, "--epochs", 1, "--run_dir", run_dir]
    assert run_main(*flags) == 0
    out = capsys.readouterr().out
    assert f"nearly identical, with two labels: {folder}/dry_00.png (dry) and {folder}/other.png (oily)" in out
    found = json.loads((run_dir / "near_duplicates.json").read_text())
    assert found["count"] == 0 and len(found["other_class"]) == 1  # of one person, so they are in one split

    before = read_rows(run_dir / "test_predictions.csv")
    table.unlink()
    shutil.move(folder, tmp_path / "moved")
    checkpoint = run_dir / "last_model.pth"
    assert run_main("--resume", checkpoint, "--merge", "dry,oily=x") == 2
    assert "--merge: cannot change in a resumed run" in capsys.readouterr().err
    assert run_main("--resume", checkpoint, "--data_dirs", tmp_path / "moved", "--epochs", 2) == 0
    columns = ("label", "patient_id", "age", "성별")
    after = read_rows(run_dir / "test_predictions.csv")
    assert [[row[name] for name in columns] for row in after] == [[row[name] for name in columns] for row in before]
    assert load_checkpoint(checkpoint)["table"]["subject_column"] == "patient_id"


def test_the_checkpoint_is_tested_on_a_new_table(run, data, tmp_path, thin_network, capsys):
    flags = ["--eval_only", "--resume", run[0] / "best_model.pth"]
    assert run_main(*flags, "--run_dir", tmp_path / "same") == 0  # reads no table
    assert (tmp_path / "same" / "test_predictions.csv").read_bytes() == (run[0] / "test_predictions.csv").read_bytes()
    same, trained = (json.loads((path / "results.json").read_text()) for path in (tmp_path / "same", run[0]))
    assert same["test"] == trained["test"] and same["subject_column"] == "patient_id"
    folder = tmp_path / "clinic"
    write_images(folder / "deep", 6, COLORS["dry"], 5)
    rows = ["file;grade;person_id", *(f"{i:03d}.png;{['dry', 'oily', '?'][i % 3]};{i}" for i in range(6))]
    (tmp_path / "new.csv").write_text("\n".join(rows))
    flags += ["--test_dirs", folder, "--labels", tmp_path / "new.csv"]
    assert run_main(*flags, "--run_dir", tmp_path / "refused") == 2
    assert "class '?'" in capsys.readouterr().err and not (tmp_path / "refused").exists()
    assert run_main(*flags, "--drop", "?", "--run_dir", tmp_path / "new") == 0
    rows = read_rows(tmp_path / "new" / "test_predictions.csv")
    assert [row["label"] for row in rows] == ["dry", "oily"] * 2 and [row["person_id"] for row in rows] == list("0134")
    assert "val_predictions.csv" in {path.name for path in (tmp_path / "new").iterdir()}
    assert run_main(*flags[:3], "--labels", data[1]) == 2
    assert "--labels: name the folder of its images with --test_dirs" in capsys.readouterr().err
    assert run_main(*flags, "--val_dirs", folder) == 2
    assert "--labels: name the folder of its images with --test_dirs; omit other" in capsys.readouterr().err


def test_published_splits_merged_classes_and_folders(data, tmp_path, thin_network, capsys):
    folder, _ = data
    names = ["train"] * 10 + ["valid"] * 3 + ["test"] * 3
    rows = ["image,label,split", *(f"{label}_{i:02d},{label},{names[i]}" for label in COLORS for i in range(16))]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    flags = [*FLAGS, "--epochs", 1, "--merge", "oily,mixed=not dry"]
    run_dir = tmp_path / "run"
    assert run_main("--data_dirs", folder, "--labels", tmp_path / "t.csv", *flags, "--run_dir", run_dir) == 0
    out = capsys.readouterr().out
    assert "splits of the table: train 30, val 9, test 9" in out
    assert any("not dry" in line and line.endswith("(oily + mixed)") for line in out.splitlines())
    splits = json.loads((run_dir / "splits.json").read_text())
    assert {path[-6:-4] for path in splits["test"]} == {"13", "14", "15"}
    assert load_checkpoint(run_dir / "last_model.pth")["classes"] == ["dry", "not dry"]


def test_folders_are_merged_and_dropped_in_a_run_that_is_resumed(data_dir, tmp_path, thin_network, capsys):
    flags = ["--data_dirs", data_dir, *FLAGS, "--merge", "2,10=wrinkled", "--run_dir", tmp_path / "run"]
    assert run_main(*flags, "--epochs", 1) == 0
    assert "(2 + 10)" in capsys.readouterr().out
    assert run_main("--resume", tmp_path / "run" / "last_model.pth", "--epochs", 2) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["classes"] == ["0", "wrinkled"] and results["samples_per_cls"] == [12, 9]
    assert "subject_column" not in results


def test_a_model_of_published_folders_is_tested_on_a_table(data, tmp_path, thin_network):
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for number, label in enumerate(("dry", "oily")):
            write_images(tmp_path / "published" / split / label, count, COLORS[label], 10 * count + number)
    run_dir = tmp_path / "run"
    assert run_main("--data_dirs", tmp_path / "published", *FLAGS, "--epochs", 1, "--run_dir", run_dir) == 0
    flags = ["--eval_only", "--resume", run_dir / "best_model.pth", "--test_dirs", data[0], "--labels", data[1]]
    assert run_main(*flags, "--drop", "mixed", "--run_dir", tmp_path / "eval") == 0
    splits = json.loads((tmp_path / "eval" / "splits.json").read_text())
    assert {name: len(paths) for name, paths in splits.items()} == {"val": 4, "test": 32}


def test_subjects_of_a_table_in_a_cross_validation(data, tmp_path, thin_network, capsys):
    folder, table = data[0], shutil.copy(data[1], tmp_path)
    flags = ["--data_dirs", folder, "--labels", table, *FLAGS, "--epochs", 1, "--folds", 2]
    assert run_main(*flags, "--run_dir", tmp_path / "cv") == 0
    rows = [row for fold in (0, 1) for row in read_rows(tmp_path / "cv" / f"fold_{fold}" / "test_predictions.csv")]
    assert len(rows) == 48
    of_fold = [
        {row["patient_id"] for row in read_rows(tmp_path / "cv" / f"fold_{fold}" / "test_predictions.csv")}
        for fold in (0, 1)
    ]
    assert not of_fold[0] & of_fold[1]
    pooled = json.loads((tmp_path / "cv" / "folds.json").read_text())["test_pooled"]
    assert "which draws whole subjects" in (tmp_path / "cv" / "report.html").read_text(encoding="utf-8")
    # the interval of images that are independent is another one
    from metrics import full_metrics
    from run.files import read_predictions

    classes = list(pooled["per_class"])
    files = [tmp_path / "cv" / f"fold_{fold}" / "test_predictions.csv" for fold in (0, 1)]
    _, targets, probabilities = map(np.concatenate, zip(*(read_predictions(f, classes) for f in files), strict=True))
    alone = full_metrics(targets, probabilities, classes, [10] * 3)
    assert alone["nll"] == pytest.approx(pooled["nll"]) and alone["nll_ci"] != pooled["nll_ci"]
    # with the subjects of two images exchanged, there are as many images of each class, but in other folds
    text = Path(table).read_text(encoding="cp949")
    assert "dry_00,p0_0," in text and "dry_02,p0_1," in text
    text = text.replace("dry_00,p0_0,", "dry_00,p0_1,").replace("dry_02,p0_1,", "dry_02,p0_0,")
    Path(table).write_text(text, encoding="cp949")
    capsys.readouterr()
    assert run_main(*flags, "--run_dir", tmp_path / "cv", "--auto_resume") == 2
    assert "was started with other settings (table)" in capsys.readouterr().err


REFUSED = {
    "demo": (["--demo", "--labels", "T"], "--demo: draws its own data; omit --labels"),
    "no table": (["--label_column", "x"], "--label_column / --subject_column / --split_column: name the table"),
    "a missing table": (["--labels", "none.csv"], "none.csv does not exist"),
    "a folder": (["--labels", "."], "is not a regular file"),
    "other folders": (["--labels", "T", "--test_dirs", "."], "--labels: its images are found below --data_dirs"),
    "two kinds of subjects": (
        ["--labels", "T", "--group_regex", "x", "--subject_column", "age"],
        "--group_regex: the subjects are those of --subject_column age",
    ),
    "splits and folds": (["--labels", "T", "--split_column", "s", "--folds", "2"], "omit --split_column"),
    "a malformed merge": (["--merge", "a,b"], "'a,b' is not of the form A,B=NAME"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradicting_flags_are_refused(name, data, tmp_path, capsys):
    flags, message = REFUSED[name]
    flags = [data[1] if flag == "T" else flag for flag in flags]
    folders = [] if name == "demo" else ["--data_dirs", data[0]]
    assert run_main(*folders, *flags, "--run_dir", tmp_path / "run") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and message in errors[0] and not (tmp_path / "run").exists()


def test_a_subject_in_two_published_splits_is_refused(data, tmp_path, capsys, thin_network):
    rows = ["image,label,set,patient_id"]
    rows += [
        f"{label}_{i:02d},{label},{('train', 'val', 'test')[i % 3]},{label}{i}" for label in COLORS for i in range(9)
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows).replace("dry1", "dry0"))
    flags = ["--data_dirs", data[0], "--labels", tmp_path / "t.csv", *FLAGS]
    assert run_main(*flags, "--run_dir", tmp_path / "run") == 2
    assert "--subject_column: subject 'dry0' is in two splits: " in capsys.readouterr().err


def test_a_run_without_a_table_is_not_changed(finished_run):
    assert "other_class" not in json.loads((finished_run / "near_duplicates.json").read_text())
    assert load_checkpoint(finished_run / "last_model.pth")["table"] is None
    assert list(read_rows(finished_run / "test_predictions.csv")[0])[-1] == "prob_10"
    assert not differences(finished_run, finished_run)


def test_predictions_are_compared_with_a_table(run, data, tmp_path, thin_network, capsys):
    folder, table = data
    output = tmp_path / "p.csv"
    paths = [row["path"] for row in read_rows(run[0] / "test_predictions.csv")]
    write_images(tmp_path / "unknown", 1)
    flags = [run[0], "--images", *paths, tmp_path / "unknown", "--labels", table, "--output", output]
    assert run_predict(*flags, "--subgroup_columns", "성별", "age") == 0
    out = capsys.readouterr().out
    results = json.loads((run[0] / "results.json").read_text())["test"]
    interval = format_with_interval(results["balanced_acc"], results["balanced_acc_ci"])
    assert f"{len(paths)} photographs with a label: balanced accuracy {interval}" in out
    assert "balanced accuracy by 성별: " in out and "that no row names: 1\n" in out
    *rows, unknown = read_rows(output)
    trained = read_rows(run[0] / "test_predictions.csv")
    assert [[row[name] for name in ("label", "correct", "age")] for row in rows] == [
        [row[name] for name in ("label", "correct", "age")] for row in trained
    ]
    assert unknown["prediction"] and unknown["label"] == unknown["correct"] == unknown["age"] == ""
    assert {row["column"] for row in read_rows(tmp_path / "p_subgroups.csv")} == {"성별", "age"}
    assert run_predict(*flags, "--subgroup_columns", "sex", "--overwrite") == 2
    assert "--subgroup_columns: there is no column 'sex' " in capsys.readouterr().err
    assert run_predict(run[0], "--images", folder, "--output", tmp_path / "q.csv", "--label_column", "x") == 2
    assert "--label_column: name the table with --labels" in capsys.readouterr().err
    assert run_predict(*flags[:-2], "--output", table, "--overwrite") == 2
    assert "is an input of this command" in capsys.readouterr().err


def test_a_run_reports_subgroups(run, data, tmp_path, thin_network, capsys):
    flags = ["--eval_only", "--resume", run[0] / "best_model.pth", "--subgroup_columns"]
    assert run_main(*flags, "sex", "--run_dir", tmp_path / "no") == 2
    assert "--subgroup_columns: there is no column 'sex' " in capsys.readouterr().err
    folder, table = data
    flags = ["--eval_only", "--resume", run[0] / "best_model.pth", "--test_dirs", folder, "--labels", table]
    assert run_main(*flags, "--subgroup_columns", "성별", "age", "--run_dir", tmp_path / "eval") == 0
    found = json.loads((tmp_path / "eval" / "results.json").read_text())["subgroups"]
    assert [group["images"] for group in found["성별"]["groups"]] == [24, 24] and found["성별"]["gap"]
    assert len(found["age"]["groups"]) == 16 and "acc" not in found["age"]["groups"][0]
    report, card = ((tmp_path / "eval" / name).read_text("utf-8") for name in ("report.html", "MODEL_CARD.md"))
    assert "By 성별" in report and "too few" in report and "Largest gap in balanced accuracy" in report
    assert "Performance was measured separately by 성별 (largest gap" in card
    assert len(read_rows(tmp_path / "eval" / "subgroups.csv")) == 3 + 16
