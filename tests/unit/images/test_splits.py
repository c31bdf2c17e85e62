"""Splitting an index, and finding the split of a checkpoint again."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import index_of, write_class_folders

from flags import SPLITS
from images.folders import index_folders
from images.splits import (
    check_classes_in_splits,
    check_folders_used,
    fold_splits,
    paths_by_split,
    restore_split,
    stratified_split,
)
from run.cli import UserError


def test_split_is_stratified_disjoint_and_complete():
    index = index_of([1000, 200, 40, 10])
    splits = stratified_split(index, [0.6, 0.2, 0.2], seed=1)
    assert {split: list(chosen.counts()) for split, chosen in splits.items()} == {
        "test": [200, 40, 8, 2], "val": [200, 40, 8, 2], "train": [600, 120, 24, 6]
    }  # fmt: skip
    paths = [path for chosen in splits.values() for path in chosen.paths]
    assert sorted(paths) == sorted(index.paths)


def test_subjects_stay_together_and_class_shares_are_nearly_kept():
    index = index_of([600, 200, 60])
    subjects = np.arange(len(index)) // 4
    splits = stratified_split(index, [0.6, 0.2, 0.2], seed=1, subjects=subjects)
    subject_of = dict(zip(index.paths, subjects.tolist(), strict=True))
    subjects_of_splits = [{subject_of[path] for path in chosen.paths} for chosen in splits.values()]
    assert sum(map(len, subjects_of_splits)) == len(set.union(*subjects_of_splits)) == 215
    assert sum(map(len, splits.values())) == 860
    np.testing.assert_allclose(splits["test"].counts() / index.counts(), 0.2, atol=0.05)
    np.testing.assert_allclose(splits["val"].counts() / index.counts(), 0.2, atol=0.05)


@pytest.mark.parametrize("shares", [[0.92, 0.04, 0.04], [0.02, 0.49, 0.49]])
def test_small_shares_of_subjects_are_nearly_kept(shares):
    index = index_of([600, 300])
    splits = stratified_split(index, shares, seed=0, subjects=np.arange(900) // 3)
    assert [len(splits[split]) / 900 for split in SPLITS] == pytest.approx(shares, abs=0.02)


@pytest.mark.parametrize("seed", range(10))
def test_a_rare_class_of_few_subjects_is_in_every_split_if_possible(seed):
    # 60 subjects of the first class, 4 of each other one
    index, subjects = index_of([300, 8, 8]), np.r_[np.arange(300) // 5, 60 + np.arange(16) // 2]
    folds = fold_splits(index, 4, [0.6, 0.2, 0.2], seed, subjects)
    for splits in [stratified_split(index, [0.6, 0.2, 0.2], seed, subjects=subjects), *folds]:
        assert all(chosen.counts().all() for chosen in splits.values())
    tested = [path for splits in folds for path in splits["test"].paths]
    assert sorted(tested) == sorted(index.paths)


@pytest.mark.parametrize("seed", range(10))
def test_a_subject_is_moved_to_a_split_that_lacks_its_class(seed):
    """With 3 subjects of each of two classes, what is drawn never has both in every split."""
    index, subjects = index_of([240, 120, 40, 12, 12]), np.arange(424) // 4
    splits = stratified_split(index, [0.6, 0.2, 0.2], seed, subjects=subjects)
    assert all(chosen.counts().all() for chosen in splits.values())
    number = dict(zip(index.paths, subjects.tolist(), strict=True))
    found = [{number[path] for path in chosen.paths} for chosen in splits.values()]
    assert sum(map(len, found)) == len(set.union(*found)) == 106
    assert sorted(path for chosen in splits.values() for path in chosen.paths) == sorted(index.paths)
    assert len(splits["test"]) == pytest.approx(0.2 * 424, abs=9)


@pytest.mark.parametrize("subjects", [None, np.arange(100) // 2])
def test_every_image_is_tested_in_exactly_one_fold(subjects):
    index, tested = index_of([70, 30]), []
    for splits in fold_splits(index, 4, [0.6, 0.2, 0.2], 3, subjects):
        assert sorted(path for chosen in splits.values() for path in chosen.paths) == sorted(index.paths)
        assert len(splits["val"]) == pytest.approx(19, abs=2)  # a quarter of the rest
        np.testing.assert_allclose(splits["test"].counts(), [17.5, 7.5], atol=2.5)
        tested += splits["test"].paths
    assert sorted(tested) == sorted(index.paths)


def test_more_folds_than_images_of_any_class_are_rejected():
    with pytest.raises(UserError, match="too few images for 9 folds"):
        fold_splits(index_of([8, 3]), 9, [0.6, 0.2, 0.2], 0)


def test_a_split_depends_only_on_the_seed():
    index = index_of([50, 20])
    first, again, other = (stratified_split(index, [0.6, 0.2, 0.2], seed) for seed in (1, 1, 2))
    assert all(list(first[split].paths) == list(again[split].paths) for split in first)
    assert list(first["test"].paths) != list(other["test"].paths)


def test_a_split_with_its_own_folders_leaves_its_share_to_the_others():
    index = index_of([60, 30])
    assert list(stratified_split(index, [0.6, 0.2, 0.2], 0, ["test"])["val"].counts()) == [15, 8]
    assert list(stratified_split(index, [0.6, 0.2, 0.2], 0, ["val", "test"])["train"].counts()) == [60, 30]


@pytest.mark.parametrize("counts", [[100, 2], [100, 1], [100, 3, 1], [3, 2, 2]])
def test_a_class_too_small_for_every_split_is_named_with_its_counts(counts):
    splits = stratified_split(index_of(counts), [0.6, 0.2, 0.2], 0)
    smallest = str(int(np.argmin(counts)))
    with pytest.raises(UserError, match=rf"class '{smallest}' has too few images \({min(counts)}\)"):
        check_classes_in_splits(splits, [0.6, 0.2, 0.2])


@pytest.fixture
def split_of_two_folders(tmp_path):
    """Two folders whose images have the same names, split by hand. -> (paths per split, sizes per split, folders)"""
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        write_class_folders(folder, {"0": 3, "1": 3}, seed)
    index = index_folders(folders)
    positions = {"train": [0, 4, 7, 11], "val": [1, 5, 6, 10], "test": [2, 3, 8]}
    paths = {split: list(index.subset(chosen).paths) for split, chosen in positions.items()}
    sizes = {split: list(map(os.path.getsize, split_paths)) for split, split_paths in paths.items()}
    return paths, sizes, list(map(str, folders))


def restored_paths(paths, sizes, previous_folders, folders):
    return paths_by_split(restore_split(index_folders(folders), paths, sizes, folders, previous_folders))


def test_a_split_is_found_again_in_the_same_folders(split_of_two_folders):
    paths, sizes, folders = split_of_two_folders
    assert restored_paths(paths, sizes, folders, folders) == paths


def test_a_split_is_found_again_in_moved_folders_in_any_order(split_of_two_folders, tmp_path):
    paths, sizes, previous = split_of_two_folders
    moved = [str(tmp_path / "elsewhere" / name) for name in ("a", "b")]
    for folder, new in zip(previous, moved, strict=True):
        shutil.move(folder, new)

    def moved_path(path):
        return path.replace(previous[0], moved[0]).replace(previous[1], moved[1])

    expected = {split: [moved_path(path) for path in split_paths] for split, split_paths in paths.items()}
    assert restored_paths(paths, sizes, previous, moved) == expected
    # in swapped order, the names alone would find the other folder's images: the sizes decide
    assert restored_paths(paths, sizes, previous, moved[::-1]) == expected


def test_images_that_are_missing_or_have_changed_are_listed(split_of_two_folders, capsys):
    """Each under its own name, although the other folder has an image of the same name."""
    paths, sizes, folders = split_of_two_folders
    missing, changed = Path(paths["train"][0]), Path(paths["val"][0])
    missing.unlink()
    changed.write_bytes(changed.read_bytes() + b"more")
    with pytest.raises(UserError, match=r"2 of 11 images .* missing or have changed .*--data_dirs"):
        restored_paths(paths, sizes, folders, folders)
    assert capsys.readouterr().out.splitlines() == [f"missing: {missing}", f"changed: {changed}"]


def test_a_folder_without_images_of_the_split_is_rejected(split_of_two_folders):
    paths, sizes, folders = split_of_two_folders
    splits = restore_split(index_folders(folders), paths, sizes, folders, folders)
    check_folders_used(splits, folders)
    with pytest.raises(UserError, match=r"--data_dirs: no image .* in /other"):
        check_folders_used(splits, [*folders, "/other"])
