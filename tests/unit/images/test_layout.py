"""How a data folder is laid out: splits, and what systems and runs have put there."""

import os
import tempfile
from pathlib import Path

import pytest
from helpers import write_class_folders, write_images

from flag_checks import parse_flags
from images.folders import index_folders
from images.layout import read_entries
from run.cli import UserError
from run.folder import locked

MANY = {"0": 6, "1": 6}


def write_splits(folder, *names):
    """One folder of class folders per name. -> folder"""
    for seed, name in enumerate(names):
        write_class_folders(folder / name, MANY, seed)
    return folder


def parse(*flags):
    return parse_flags([str(flag) for flag in flags])


# ------------------------------------------------------------------------------------------- what is passed over

SYSTEM_ENTRIES = [
    "@eaDir", "@EADIR", "#recycle", "$RECYCLE.BIN", "$Recycle.Bin", "System Volume Information", "__MACOSX",
    "lost+found", ".ipynb_checkpoints", ".Trash-1000", ".AppleDouble", "@Recycle",
]  # fmt: skip


@pytest.mark.parametrize("name", SYSTEM_ENTRIES)
def test_folders_of_systems_are_passed_over_at_any_depth(tmp_path, name, capsys):
    write_class_folders(tmp_path, {"0": 2, "1": 3})
    for place in (tmp_path / name, tmp_path / "0" / name / "IMG_1.JPG", tmp_path / "1" / "left" / name):
        write_images(place, 2)
    assert index_folders([tmp_path]).counts().tolist() == [2, 3]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("--data_dirs: passed over ") and ": 3)" in line


def test_files_of_systems_are_passed_over_and_counted_by_kind(tmp_path, capsys):
    write_class_folders(tmp_path, {"0": 2, "1": 3})
    for name in ("0/Thumbs.db", "1/thumbs.db", "desktop.ini", "0/._000.png", "0/._001.png", "1/.DS_Store", "0/.x.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "0" / "notes.txt").write_bytes(b"")
    assert index_folders([tmp_path]).counts().tolist() == [2, 3]
    passed_over, others = capsys.readouterr().out.splitlines()
    for part in ("._*: 2", "Thumbs.db: 1", "desktop.ini: 1", ".DS_Store: 1", "other hidden: 1"):
        assert part in passed_over
    assert "(.txt: 1)" in others


def test_a_folder_that_a_run_has_only_begun_is_passed_over(tmp_path, capsys):
    write_class_folders(tmp_path, {"0": 2, "1": 2})
    for folder in (tmp_path / "checkpoints_20260101_120000", tmp_path / "0" / "run"):
        folder.mkdir()
        with locked(folder):
            assert read_entries(str(folder), "--data_dirs").written_by == "run folders"
        write_images(folder / "demo_data" / "0", 1)
    assert index_folders([tmp_path]).classes == ["0", "1"]
    assert "run folders: 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "files, kind",
    [
        (["run/args.json", "run/last_model.pth", "run/curves.png"], "run folders"),
        (["run/best_model.pth", "run/curves.png"], "run folders"),
        (["run/args.json", "run/splits.json", "run/confusion_matrix.png"], "run folders"),
        (["runs/a/args.json", "runs/a/results.json", "runs/b/args.json", "runs/b/best_model.pth"], "run folders"),
        (["search/study.db", "search/trial_0007.log", "search/slices.png"], "run folders"),
        (["ablation/ablation.json", "ablation/ablation.png", "ablation/ce_seed0/.lock"], "run folders"),
        (["cv/folds_begun.json", "cv/a.png"], "run folders"),
        (["runs/readme.txt", "runs/sorted/a/.lock"], "run folders"),
        (["cache/64px_v2/index.npz", "cache/64px_v2/ab.pixels", "cache/128px_v3/lock"], "image caches"),
        (["64px_v2/lock", "64px_pad_v3/index.npz"], "image caches"),
        (["wandb/run-20260101_120000-ab/files/media/images/a.png", "wandb/debug.log"], "W&B folders"),
        (["logs/offline-run-20260101_120000-ab/files/media/images/a.png"], "W&B folders"),
    ],
)
def test_what_runs_have_written_is_no_class_and_no_source_of_images(tmp_path, files, kind, capsys):
    for prefix in (tmp_path, tmp_path / "0", tmp_path / "1" / "left"):
        for name in files:
            (prefix / name).parent.mkdir(parents=True, exist_ok=True)
            (prefix / name).write_bytes(b"process 7 on host\n")
    write_class_folders(tmp_path, {"0": 2, "1": 3})
    index = index_folders([tmp_path])
    assert (index.classes, index.counts().tolist()) == (["0", "1"], [2, 3])
    assert kind in capsys.readouterr().out


def test_a_class_folder_is_not_mistaken_for_one_of_runs(tmp_path):
    """By a file that only has the name of a run's file, or by its own name."""
    write_class_folders(tmp_path, {"0": 1, "1": 1, "64px_v2": 1})
    (tmp_path / "0" / ".lock").write_text("")
    (tmp_path / "1" / "args.json").write_text("{}")
    assert index_folders([tmp_path]).classes == ["0", "1", "64px_v2"]


# ------------------------------------------------------------------------------------------------ links, permissions


def test_a_class_folder_that_is_a_dead_link_is_named(tmp_path):
    write_class_folders(tmp_path, {"0": 1, "1": 1})
    (tmp_path / "2").symlink_to("/mnt/nas/grade2")
    with pytest.raises(UserError, match=f"--val_dirs: {tmp_path / '2'} is a link to /mnt/nas/grade2, .* not exist"):
        index_folders([tmp_path], ["0", "1", "2"], "--val_dirs")


def test_a_data_folder_that_is_a_dead_link_is_named(tmp_path):
    (tmp_path / "data").symlink_to("/mnt/nas/photos")
    with pytest.raises(UserError, match=r"--data_dirs: .*/data is a link to /mnt/nas/photos, which does not exist"):
        parse("--data_dirs", tmp_path / "data")


def test_a_dead_link_below_a_class_folder_is_named_but_a_photograph_is_listed_with_the_broken_ones(tmp_path):
    write_class_folders(tmp_path, {"0": 1, "1": 1})
    (tmp_path / "0" / "a.jpg").symlink_to("/mnt/nas/a.jpg")
    assert index_folders([tmp_path]).counts().tolist() == [2, 1]
    for name in ("left", "right"):
        (tmp_path / "1" / name).symlink_to(f"/mnt/nas/{name}")
    with pytest.raises(UserError, match=r"/1/left is a link to /mnt/nas/left, .*1 other link"):
        index_folders([tmp_path])


def test_a_dead_link_of_a_system_entry_does_not_matter(tmp_path):
    write_class_folders(tmp_path, {"0": 1, "1": 1})
    (tmp_path / "@eaDir").symlink_to("/mnt/nas")
    (tmp_path / "0" / ".thumbs").symlink_to("/mnt/nas")
    assert len(index_folders([tmp_path])) == 2


@pytest.mark.skipif(os.name == "nt", reason="no permissions of this kind")
def test_a_folder_that_cannot_be_read_is_named():
    with tempfile.TemporaryDirectory() as folder:
        path = write_class_folders(Path(folder), {"0": 1, "1": 1}) / "0" / "left"
        path.mkdir(mode=0)
        os.chmod(folder, 0o755)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root can read everything
        try:
            with pytest.raises(UserError, match=f"--data_dirs: {path} cannot be read: Permission denied"):
                index_folders([folder])
        finally:
            os.seteuid(user)


# ------------------------------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "VALID", "testing"), ("TRAIN", "Validation")])
def test_folders_of_splits_are_taken_as_the_splits(tmp_path, names):
    write_splits(tmp_path, *names)
    (tmp_path / "readme.txt").write_text("")
    (tmp_path / "@eaDir").mkdir()
    args = parse("--data_dirs", tmp_path)
    found = [getattr(args, name) for name in ("data_dirs", "val_dirs", "test_dirs")]
    expected = [[str(tmp_path / name)] for name in names]
    assert found == [*expected, None][:3]


def test_a_flag_wins_over_a_folder_of_the_same_split(tmp_path):
    write_splits(tmp_path / "d", "train", "val", "valid", "test")
    write_splits(tmp_path / "other", "0")
    args = parse("--data_dirs", tmp_path / "d", "--val_dirs", tmp_path / "other")
    assert args.val_dirs == [str(tmp_path / "other")] and args.test_dirs == [str(tmp_path / "d" / "test")]


def test_several_folders_of_splits_are_merged(tmp_path):
    write_splits(tmp_path / "a", "train", "test")
    write_splits(tmp_path / "b", "Train", "val")
    args = parse("--data_dirs", tmp_path / "a", tmp_path / "b")
    assert args.data_dirs == [str(tmp_path / "a" / "train"), str(tmp_path / "b" / "Train")]
    assert args.val_dirs == [str(tmp_path / "b" / "val")] and args.test_dirs == [str(tmp_path / "a" / "test")]


@pytest.mark.parametrize(
    "folders, flags, message",
    [
        (["d/train", "d/test", "d/normal"], [], r"/d holds splits \(train, test\) and other folders \(normal\)"),
        (["d/train", "d/Val", "d/valid"], [], r"/d holds Val and valid, which are the same split"),
        (["d/train", "d/training"], [], r"/d holds train and training, which are the same split"),
        (["d/val", "d/test"], [], r"/d holds val, test, but no train"),
        (["d/train", "d/val"], ["--folds", "3"], r"--folds: .*/d holds splits .* --data_dirs .*/d/train"),
        (["d/train", "d/val", "e/0"], ["--data_dirs", "d", "e"], r"/d holds splits .*, .*/e does not; .*/d/train"),
        (["d/0", "e/train", "e/test"], ["--test_dirs", "e"], r"--test_dirs: .*/e holds splits; .*/e/test"),
    ],
)
def test_other_layouts_with_folders_of_splits_are_rejected(tmp_path, monkeypatch, folders, flags, message):
    for folder in folders:
        write_splits(tmp_path, folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        parse(*(flags if "--data_dirs" in flags else ["--data_dirs", "d", *flags]))


def test_a_split_that_is_a_dead_link_is_named(tmp_path):
    write_splits(tmp_path, "train", "val")
    (tmp_path / "test").symlink_to("/mnt/nas/test")
    with pytest.raises(UserError, match=f"{tmp_path / 'test'} is a link to /mnt/nas/test, which does not exist"):
        parse("--data_dirs", tmp_path)


def test_runs_beside_the_folders_of_splits_do_not_matter(tmp_path):
    write_splits(tmp_path, "train", "test")
    for name in ("checkpoints_20260101_120000/.lock", "runs/a/.lock", "cache/64px_v2/lock", "wandb/debug.log"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("process 7 on host\n")
    assert parse("--data_dirs", tmp_path).test_dirs == [str(tmp_path / "test")]


def test_the_splits_of_another_folder_win_over_those_of_the_checkpoint(tmp_path):
    """`--resume FILE --data_dirs NEW`: the folder was moved. Without --data_dirs, the checkpoint's folders stay."""
    write_splits(tmp_path / "new", "train", "val")
    inherited = {"data_dirs": ["/old/train"], "val_dirs": ["/old/val"], "test_dirs": ["/old/test"]}
    args = parse_flags(["--data_dirs", str(tmp_path / "new")], inherited, checkpoint_is_known=True)
    assert args.data_dirs == [str(tmp_path / "new" / "train")] and args.val_dirs == [str(tmp_path / "new" / "val")]
    assert args.test_dirs == ["/old/test"]
    assert parse_flags([], inherited, checkpoint_is_known=True).data_dirs == ["/old/train"]


def test_a_run_that_has_begun_with_folders_of_splits_as_classes_keeps_them(tmp_path):
    """As of previous versions; its classes are train and test."""
    write_splits(tmp_path, "train", "test")
    inherited = {"data_dirs": [str(tmp_path)], "val_dirs": None, "test_dirs": None}
    args = parse_flags(["--data_dirs", str(tmp_path)], inherited, checkpoint_is_known=True)
    assert (args.data_dirs, args.test_dirs) == ([str(tmp_path)], None)
