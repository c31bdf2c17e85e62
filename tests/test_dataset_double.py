import os
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_class_folders, write_images
from PIL import Image

from dataset_double import (
    AUGMENTATIONS,
    AugmentedSkinDataset,
    ClassSampler,
    DoubleSkinDataset,
    EpochSampler,
    ImageIndex,
    augment,
    augment_batch,
    check_doubles,
    check_every_class_in_every_part,
    check_every_folder_is_used,
    check_fractions,
    draw_parameters,
    fold_splits,
    index_folders,
    make_loader,
    natural_key,
    read_all,
    restore_split,
    stratified_split,
)
from files import UserError
from image_cache import ImageCache, read_image


def index_of(counts):
    """An index of images that need not exist. counts: images a class."""
    targets = np.repeat(np.arange(len(counts)), counts)
    return ImageIndex(
        [f"/nowhere/{t}/{i}.jpg" for i, t in enumerate(targets)], targets, [str(c) for c in range(len(counts))]
    )


# ------------------------------------------------------------------------------------------------ class folders


def test_classes_sort_naturally():
    names = ["10", "2", "grade 10", "1", "grade 9", "주름", "0"]
    assert sorted(names, key=natural_key) == ["0", "1", "2", "10", "grade 9", "grade 10", "주름"]


def test_several_folders_are_merged_class_by_class(tmp_path):
    write_class_folders(tmp_path / "a", {"0": 2, "10": 3})
    write_class_folders(tmp_path / "b", {"10": 1, "2": 4})
    index = index_folders([tmp_path / "a", tmp_path / "b"])
    assert index.classes == ["0", "2", "10"]
    assert index.counts().tolist() == [2, 4, 4]
    assert all(index.classes[t] == path.split(os.sep)[-2] for path, t in zip(index.paths, index.targets, strict=True))


def test_nested_folders_odd_names_and_every_ending_are_found(tmp_path):
    names = ["왼쪽 볼/사진 1.JPG", "a [b] (c)/x.jpeg", "x.png", "y.Bmp", "z.webp", "q.tif", "r.TIFF"]
    for name in names:
        path = tmp_path / "1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    write_images(tmp_path / "0", 1)
    (tmp_path / "1" / "notes.txt").write_text("no image")
    (tmp_path / "1" / "._x.jpg").write_text("left by macOS")
    (tmp_path / ".cache").mkdir()
    index = index_folders([tmp_path])
    found = {
        os.path.relpath(path, tmp_path / "1") for path, t in zip(index.paths, index.targets, strict=True) if t == 1
    }
    assert found == set(names)
    assert all(read_image(path, 8).shape == (8, 8, 3) for path in index.paths)


def test_a_class_name_is_the_same_however_its_hangul_is_composed(tmp_path):
    composed, decomposed = "주름", "\u110c\u116e\u1105\u1173\u11b7"
    write_images(tmp_path / "a" / composed, 1)
    write_images(tmp_path / "a" / "0", 1)
    write_images(tmp_path / "b" / decomposed, 2)
    assert index_folders([tmp_path / "a", tmp_path / "b"]).counts().tolist() == [1, 3]


def test_a_link_that_leads_back_ends(tmp_path):
    write_class_folders(tmp_path, {"0": 2, "1": 2})
    (tmp_path / "0" / "loop").symlink_to(tmp_path / "0", target_is_directory=True)
    assert len(index_folders([tmp_path])) == 4


def test_the_order_of_files_does_not_depend_on_the_file_system(tmp_path):
    write_class_folders(tmp_path, {"0": 9, "1": 2})
    os.rename(tmp_path / "0" / "004.png", tmp_path / "0" / "moved")
    os.rename(tmp_path / "0" / "moved", tmp_path / "0" / "004.png")
    paths = list(index_folders([tmp_path]).paths)
    assert paths == sorted(paths)


@pytest.mark.parametrize(
    "layout, message",
    [
        ({}, "no folder"),
        ({"x/a.txt": 0}, "left out|no image"),
        ({"a.png": 1}, "holds images, not class folders"),
        ({"0/a.png": 1, "1/b.txt": 1}, "class '1' has no image"),
        ({"0/a.png": 1}, "only one class, '0'"),
        ({"note.txt": 1}, "holds no class folders"),
    ],
)
def test_folders_that_are_no_class_folders_are_refused(tmp_path, layout, message):
    for name in layout:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"--data_dirs: .*({message})"):
        index_folders([tmp_path / "data"])


def test_other_classes_than_those_of_the_training_are_refused(tmp_path):
    write_class_folders(tmp_path, {"0": 1, "7": 1})
    with pytest.raises(UserError, match=r"--val_dirs: class '7' .* none of the classes 0, 1"):
        index_folders([tmp_path], ["0", "1"], "--val_dirs")
    with pytest.raises(UserError, match="--test_dirs: class '2' has no image"):
        index_folders([tmp_path], ["0", "2", "7"], "--test_dirs")
    assert index_folders([tmp_path], ["0", "2", "7"], "--test_dirs", allow_missing=True).counts().tolist() == [1, 0, 1]


def test_an_image_given_twice_is_refused_also_through_a_link(tmp_path):
    write_class_folders(tmp_path / "a", {"0": 1, "1": 1})
    (tmp_path / "b").symlink_to(tmp_path / "a")
    index = index_folders([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UserError, match=r"--test_dirs: .*there twice"):
        check_doubles(index.paths, "--test_dirs")


# ----------------------------------------------------------------------------------------------- broken files


@pytest.fixture
def broken_folder(tmp_path):
    write_class_folders(tmp_path, {"0": 6, "1": 6})
    whole = write_images(tmp_path / "0", 1, suffix=".jpg", size=(200, 200))[0]
    (tmp_path / "0" / "cut.jpg").write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "0" / "text.jpg").write_text("this is no photograph")
    (tmp_path / "1" / "empty.png").write_bytes(b"")
    return tmp_path


def test_broken_files_are_listed_with_the_reason_and_stop_the_run(broken_folder, capsys):
    with pytest.raises(UserError, match=r"and 2 more .*--skip_broken"):
        read_all({"data": index_folders([broken_folder])}, ImageCache(None, 32), skip_broken=False)
    listed = capsys.readouterr().out
    for name, reason in [("cut.jpg", "truncated"), ("text.jpg", "cannot identify"), ("empty.png", "empty file")]:
        assert any(name in line and reason in line for line in listed.splitlines())


def test_broken_files_are_left_out_only_on_demand(broken_folder):
    index = read_all({"data": index_folders([broken_folder])}, ImageCache(None, 32), skip_broken=True)["data"]
    assert index.counts().tolist() == [7, 6]
    assert not any(name in path for path in index.paths for name in ("cut", "text", "empty"))


def test_a_part_of_broken_images_only_is_refused_even_on_demand(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "x.png").write_bytes(b"")
    index = ImageIndex([str(tmp_path / "0" / "x.png")], np.array([0]), ["0", "1"])
    with pytest.raises(UserError, match=r"x\.png"):
        read_all({"test": index}, ImageCache(None, 32), skip_broken=True)


def test_a_file_that_cannot_be_read_in_training_is_named_not_replaced(broken_folder):
    index = index_folders([broken_folder])
    position = next(i for i, path in enumerate(index.paths) if "text.jpg" in path)
    with pytest.raises(UserError, match=r"text\.jpg cannot be read"):
        DoubleSkinDataset(index, 8)[position]


# --------------------------------------------------------------------------------------------------------- splits


def test_split_is_stratified_disjoint_and_complete():
    index = index_of([1000, 200, 40, 10])
    parts = stratified_split(index, [0.6, 0.2, 0.2], seed=1)
    assert {part: list(one.counts()) for part, one in parts.items()} == {
        "test": [200, 40, 8, 2], "val": [200, 40, 8, 2], "train": [600, 120, 24, 6]
    }  # fmt: skip
    paths = [path for one in parts.values() for path in one.paths]
    assert sorted(paths) == sorted(index.paths)


def test_groups_stay_together_and_class_shares_are_kept_nearly():
    index = index_of([600, 200, 60])
    groups = np.arange(len(index)) // 4
    parts = stratified_split(index, [0.6, 0.2, 0.2], seed=1, groups=groups)
    number_of = dict(zip(index.paths, groups.tolist(), strict=True))
    of_part = [{number_of[path] for path in part.paths} for part in parts.values()]
    assert sum(map(len, of_part)) == len(set.union(*of_part)) == 215
    assert sum(map(len, parts.values())) == 860
    np.testing.assert_allclose(parts["test"].counts() / index.counts(), 0.2, atol=0.05)
    np.testing.assert_allclose(parts["val"].counts() / index.counts(), 0.2, atol=0.05)


@pytest.mark.parametrize("fractions", [[0.92, 0.04, 0.04], [0.02, 0.49, 0.49]])
def test_groups_keep_small_shares_nearly(fractions):
    index = index_of([600, 300])
    parts = stratified_split(index, fractions, seed=0, groups=np.arange(900) // 3)
    shares = [len(parts[part]) / 900 for part in ("train", "val", "test")]
    assert shares == pytest.approx(fractions, abs=0.02)


@pytest.mark.parametrize("seed", range(10))
def test_a_rare_class_of_few_persons_is_in_each_part_if_it_can_be(seed):
    index, groups = index_of([300, 8]), np.r_[np.arange(300) // 5, 60 + np.arange(8) // 2]  # four persons
    splits = [stratified_split(index, [0.6, 0.2, 0.2], seed, groups=groups)]
    splits += fold_splits(index, 4, [0.6, 0.2, 0.2], seed, groups)
    for parts in splits:
        assert all(part.counts().all() for part in parts.values())
    tested = [path for parts in splits[1:] for path in parts["test"].paths]
    assert sorted(tested) == sorted(index.paths)


@pytest.mark.parametrize("groups", [None, np.arange(100) // 2])
def test_every_image_is_tested_in_one_fold(groups):
    index, tested = index_of([70, 30]), []
    for parts in fold_splits(index, 4, [0.6, 0.2, 0.2], 3, groups):
        assert sorted(path for part in parts.values() for path in part.paths) == sorted(index.paths)
        assert len(parts["val"]) == pytest.approx(19, abs=2)  # a quarter of the rest
        np.testing.assert_allclose(parts["test"].counts(), [17.5, 7.5], atol=2.5)
        tested += parts["test"].paths
    assert sorted(tested) == sorted(index.paths)


def test_more_folds_than_images_of_every_class_are_refused():
    with pytest.raises(UserError, match="too few images for 9 folds"):
        fold_splits(index_of([8, 3]), 9, [0.6, 0.2, 0.2], 0)


def test_split_depends_on_the_seed_alone():
    index = index_of([50, 20])
    first, again, other = (stratified_split(index, [0.6, 0.2, 0.2], seed) for seed in (1, 1, 2))
    assert all(list(first[part].paths) == list(again[part].paths) for part in first)
    assert list(first["test"].paths) != list(other["test"].paths)


def test_a_part_from_elsewhere_leaves_its_share_to_the_others():
    index = index_of([60, 30])
    assert list(stratified_split(index, [0.6, 0.2, 0.2], 0, ["test"])["val"].counts()) == [15, 8]
    assert list(stratified_split(index, [0.6, 0.2, 0.2], 0, ["val", "test"])["train"].counts()) == [60, 30]


@pytest.mark.parametrize("counts", [[100, 2], [100, 1], [100, 3, 1], [3, 2, 2]])
def test_a_class_too_small_for_each_part_is_named_with_its_numbers(counts):
    parts = stratified_split(index_of(counts), [0.6, 0.2, 0.2], 0)
    smallest = str(int(np.argmin(counts)))
    with pytest.raises(UserError, match=rf"class '{smallest}' has too few images \({min(counts)}\)"):
        check_every_class_in_every_part(parts, [0.6, 0.2, 0.2])


@pytest.mark.parametrize("fractions", [[0.6, 0.2, 0.1], [0.5, 0.6, -0.1], [0.8, 0.2, 0.0]])
def test_shares_that_make_no_split_are_refused(fractions):
    with pytest.raises(UserError, match="--split"):
        check_fractions(fractions, [])
    check_fractions([0.8, 0.2, 0.0], ["test"])


# ------------------------------------------------------------------------------------------------- a split, again


@pytest.fixture
def split_of_two_folders(tmp_path):
    """Two folders whose images have the same names, split by hand. -> (split, sizes, former folders)."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        write_class_folders(folder, {"0": 3, "1": 3}, seed)
    index = index_folders(folders)
    parts = {"train": index.subset([0, 4, 7, 11]), "val": index.subset([1, 5, 6, 10]), "test": index.subset([2, 3, 8])}
    split = {part: list(chosen.paths) for part, chosen in parts.items()}
    return split, {part: list(map(os.path.getsize, paths)) for part, paths in split.items()}, list(map(str, folders))


def split_again(split, sizes, former_folders, folders):
    index = index_folders(folders)
    return {part: list(one.paths) for part, one in restore_split(index, split, sizes, folders, former_folders).items()}


def test_a_split_is_found_again_where_it_was(split_of_two_folders):
    split, sizes, folders = split_of_two_folders
    assert split_again(split, sizes, folders, folders) == split


def test_a_split_is_found_again_where_its_folders_lie_now_in_whatever_order(split_of_two_folders, tmp_path):
    split, sizes, former = split_of_two_folders
    moved = [str(tmp_path / "elsewhere" / name) for name in ("a", "b")]
    for folder, new in zip(former, moved, strict=True):
        shutil.move(folder, new)

    def at_new_place(path):
        return path.replace(former[0], moved[0]).replace(former[1], moved[1])

    expected = {part: [at_new_place(path) for path in paths] for part, paths in split.items()}
    assert split_again(split, sizes, former, moved) == expected
    # swapped, the names alone would find the other folder's images: the sizes tell
    assert split_again(split, sizes, former, moved[::-1]) == expected


def test_images_that_are_missing_or_have_changed_are_listed(split_of_two_folders, capsys):
    """Each under its own name, though the other folder has one of the same."""
    split, sizes, folders = split_of_two_folders
    gone, changed = Path(split["train"][0]), Path(split["val"][0])
    gone.unlink()
    changed.write_bytes(changed.read_bytes() + b"more")
    with pytest.raises(UserError, match=r"2 of 11 images .* missing or have changed .*--data_dirs"):
        split_again(split, sizes, folders, folders)
    assert capsys.readouterr().out.splitlines() == [f"missing: {gone}", f"changed: {changed}"]


def test_a_folder_without_an_image_of_the_split_is_refused(split_of_two_folders):
    split, sizes, folders = split_of_two_folders
    parts = restore_split(index_folders(folders), split, sizes, folders, folders)
    check_every_folder_is_used(parts, folders)
    with pytest.raises(UserError, match=r"--data_dirs: no image .* in /other"):
        check_every_folder_is_used(parts, [*folders, "/other"])


# ----------------------------------------------------------------------------------------------------- augmentation


@pytest.fixture
def originals(data_dir):
    return DoubleSkinDataset(index_folders([data_dir]), 32)


def test_every_original_once_then_copies_until_classes_are_equal(originals):
    augmented = AugmentedSkinDataset(originals)
    assert originals.index.counts().tolist() == [20, 10, 5]
    assert augmented.counts().tolist() == [20, 20, 20]
    for position in (0, 19, 34):
        assert torch.equal(augmented[position][0], originals[position][0])
    copies_of_each = np.bincount(augmented.sources)[originals.index.targets == 2]
    assert copies_of_each.tolist() == [4] * 5


def test_a_class_above_the_target_keeps_its_originals(originals):
    assert AugmentedSkinDataset(originals, 8).counts().tolist() == [20, 10, 8]


def test_copies_are_new_each_epoch_and_the_same_again_for_the_same_epoch(originals):
    augmented = AugmentedSkinDataset(originals, seed=3)
    first = augmented[50][0]
    augmented.set_epoch(1)
    second = augmented[50][0]
    augmented.set_epoch(0)
    assert torch.equal(augmented[50][0], first)
    assert not torch.equal(first, second)
    assert not torch.equal(AugmentedSkinDataset(originals, seed=4)[50][0], first)


@pytest.mark.parametrize(
    "sampling, shares",
    [("balanced", [1 / 3] * 3), ("sqrt", np.sqrt([600, 60, 6]) / np.sqrt([600, 60, 6]).sum())],
)
def test_classes_are_drawn_with_the_shares_of_the_paper_and_their_images_in_turn(sampling, shares):
    train_set = AugmentedSkinDataset(DoubleSkinDataset(index_of([600, 60, 6]), 8), 1)
    sampler = ClassSampler(train_set, sampling, 10, seed=3)
    seen = np.zeros(3)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        positions = np.array(list(sampler))
        assert len(positions) == len(set(positions.tolist())) == 666
        times = np.bincount(positions % 666, minlength=666)
        seen += [times[:600].sum(), times[600:660].sum(), times[660:].sum()]
        for of_class in (times[:600], times[600:660], times[660:]):
            assert of_class.max() - of_class.min() <= 1
        first_times = positions < 666
        assert first_times.sum() == (times > 0).sum()  # what comes again is another position, augmented in another way
    np.testing.assert_allclose(seen / seen.sum(), shares, atol=0.002)


def test_progressive_sampling_goes_from_the_images_to_the_classes():
    train_set = AugmentedSkinDataset(DoubleSkinDataset(index_of([80, 20]), 8), 1)
    sampler = ClassSampler(train_set, "progressive", 4, seed=0)
    assert [sampler.shares(epoch).round(3).tolist() for epoch in (0, 2, 4)] == [[0.8, 0.2], [0.65, 0.35], [0.5, 0.5]]


def test_draws_depend_on_seed_and_epoch_and_can_begin_in_the_middle():
    train_set = AugmentedSkinDataset(DoubleSkinDataset(index_of([80, 20]), 8), 1)

    def draw(epoch, skipped=0, seed=0):
        sampler = ClassSampler(train_set, "balanced", 4, seed)
        sampler.set_epoch(epoch, skipped)
        assert len(sampler) == 100 - skipped
        return list(sampler)

    assert draw(1) == draw(1) != draw(2) and draw(1) != draw(1, seed=5)
    assert draw(1, skipped=30) == draw(1)[30:]


def test_all_are_augmented_on_demand(originals):
    every = AugmentedSkinDataset(originals, augment_all=True, methods=["rotation"])
    plain = AugmentedSkinDataset(originals, methods=["rotation"])
    assert torch.equal(plain[0][0], originals[0][0]) and not torch.equal(every[0][0], originals[0][0])
    again = every[len(every)]  # round again: another copy of the same image
    assert again[1] == every[0][1] and not torch.equal(again[0], every[0][0])


def test_batches_are_the_same_for_any_number_of_workers(originals):
    def batches(num_workers):
        augmented = AugmentedSkinDataset(originals)
        loader = make_loader(augmented, 16, sampler=EpochSampler(augmented, seed=1), num_workers=num_workers)
        seen = []
        for epoch in range(2):  # the workers live on into the second epoch
            loader.sampler.set_epoch(epoch)
            augmented.set_epoch(epoch)
            seen += list(loader)
        return seen

    alone, shared = batches(0), batches(2)
    assert len(alone) == len(shared) == 8
    for (images, targets), (other_images, other_targets) in zip(alone, shared, strict=True):
        assert torch.equal(images, other_images) and torch.equal(targets, other_targets)


def test_a_million_positions_cost_megabytes_and_no_time():
    index = ImageIndex([""] * 1010, np.repeat([0, 1], [1000, 10]), ["0", "1"])
    tracemalloc.start()
    started = time.perf_counter()
    augmented = AugmentedSkinDataset(DoubleSkinDataset(index, 224), 500_000)
    seconds = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(augmented) == 1_000_000
    assert augmented.sources.nbytes == 4_000_000
    assert peak < 20e6 and seconds < 2


def augmented(image, method, seed):
    out = np.empty_like(image)
    augment(image, draw_parameters([method], np.random.default_rng(seed)), out)
    return out


def skin(size=64):
    """Smooth as a photograph is, with an edge."""
    y, x = np.mgrid[:size, :size] / size
    grey = 120 + 60 * np.sin(7 * x + 3 * y) + 30 * np.cos(11 * y) + 20 * (x + y > 1)
    return np.stack([grey + 20, 0.8 * grey, 0.7 * grey + 15 * x], axis=-1).clip(0, 255).astype(np.uint8)


def test_flip_alone_mirrors_half_of_the_images_exactly():
    image = np.random.default_rng(0).integers(0, 256, (31, 31, 3), dtype=np.uint8)
    results = [augmented(image, "horizontal_flip", seed) for seed in range(200)]
    flipped = sum(np.array_equal(result, image[:, ::-1]) for result in results)
    assert flipped + sum(np.array_equal(result, image) for result in results) == 200
    assert 70 < flipped < 130


def test_rotation_turns_about_the_centre_and_leaves_no_black_corners():
    image = np.full((65, 65, 3), 200, dtype=np.uint8)
    image[28:37, 28:37] = 90
    turned = augmented(image, "rotation", 1)
    assert turned[32, 32].tolist() == [90] * 3 and turned[[0, 0, -1, -1], [0, -1, 0, -1]].min() == 200
    assert not np.array_equal(turned, image)


def test_scale_changes_the_size_of_a_spot_by_a_tenth_at_most():
    image = np.full((101, 101, 3), 250, dtype=np.uint8)
    image[31:70, 31:70] = 0
    sides = [np.sqrt((augmented(image, "scale", seed)[..., 0] < 125).sum()) for seed in range(60)]
    assert 39 / 1.1 - 1 < min(sides) < 37 and 41 < max(sides) < 39 * 1.1 + 1


def test_shift_moves_a_spot_by_a_twentieth_of_the_side_at_most():
    image = np.zeros((101, 101, 3), dtype=np.uint8)
    image[46:55, 46:55] = 255
    centres = []
    for seed in range(60):
        spot = augmented(image, "shift", seed)[..., 0].astype(float)
        centres.append([(np.indices(spot.shape) * spot).sum((1, 2)) / spot.sum()])
    offsets = np.concatenate(centres) - 50
    assert np.abs(offsets).max() < 5.06 + 0.1 and offsets.max() > 3 and offsets.min() < -3


def test_shear_slants_upright_lines_and_keeps_level_ones():
    upright, level = (np.zeros((65, 65, 3), dtype=np.uint8) for _ in range(2))
    upright[:, 32], level[32] = 255, 255
    offsets = []
    for seed in range(40):
        assert np.array_equal(augmented(level, "shear", seed)[28:37], level[28:37])
        columns = augmented(upright, "shear", seed)[..., 0].argmax(axis=1)
        assert columns[32] == 32 and columns[0] - 32 == 32 - columns[-1]
        offsets.append(columns[0] - 32)
    assert min(offsets) in (-3, -2) and max(offsets) in (2, 3)  # 32 rows at 5 degrees at most are 2.8 columns


def test_color_jitter_keeps_the_geometry():
    image = np.full((16, 16, 3), (180, 130, 110), dtype=np.uint8)
    image[:8] = (90, 65, 55)
    changed = augmented(image, "color_jitter", 2).astype(int)
    assert not np.array_equal(changed, image)
    assert (changed[:8] == changed[0, 0]).all() and (changed[8:] == changed[8, 0]).all()
    assert np.abs(changed - image).max() < 90


def test_a_method_that_is_left_out_changes_nothing_of_the_others():
    every = draw_parameters(AUGMENTATIONS, np.random.default_rng(5))
    without = draw_parameters([name for name in AUGMENTATIONS if name != "shift"], np.random.default_rng(5))
    assert every[2] != 0 and without[2] == without[5] == 0
    assert [every[k] for k in (0, 1, 3, 4, 6, 7, 8)] == [without[k] for k in (0, 1, 3, 4, 6, 7, 8)]


def test_no_method_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    out = np.empty_like(image)
    augment(image, draw_parameters([], np.random.default_rng(0)), out)
    assert np.array_equal(out, image)


def test_a_batch_on_the_device_is_augmented_as_single_images_are():
    """What a GPU does to a batch, here on the CPU's own torch, against what the workers do by OpenCV."""
    image = skin()
    parameters = [draw_parameters(AUGMENTATIONS, np.random.default_rng(seed)) for seed in range(100)]
    expected = np.stack([np.empty_like(image)] * 100)
    for out, of_image in zip(expected, parameters, strict=True):
        augment(image, of_image, out)
    images = torch.from_numpy(np.stack([image] * 100)).permute(0, 3, 1, 2)
    got = augment_batch(images, torch.tensor(parameters)).permute(0, 2, 3, 1).numpy()
    difference = np.abs(got.astype(int) - expected)
    assert difference.mean() < 0.5 and difference.max() <= 4
    assert np.abs(expected.astype(int) - image).mean() > 5


def test_on_the_device_originals_stay_as_they_are_and_copies_get_the_same_parameters(originals):
    here, there = AugmentedSkinDataset(originals), AugmentedSkinDataset(originals, on_device=True)
    positions = [0, 34, 36, 50]
    images, targets = here.__getitems__(positions)
    raw, device_targets, parameters = there.__getitems__(positions)
    assert torch.equal(targets, device_targets)
    on_device = augment_batch(raw, parameters)
    assert torch.equal(on_device[:2], images[:2]) and torch.equal(raw[:2], images[:2])
    assert (on_device[2:].float() - images[2:].float()).abs().mean() < 1


def test_validation_images_are_resized_and_nothing_else(originals):
    image, target = originals[7]
    resized = Image.open(originals.index.paths[7]).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    assert image.dtype == torch.uint8 and image.shape == (3, 32, 32) and target == 0
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(resized))
