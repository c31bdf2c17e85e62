"""Datasets, samplers and loaders."""

import itertools
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import index_of, write_images
from PIL import Image

from dataset_double import (
    AugmentedSkinDataset,
    ClassSampler,
    DoubleSkinDataset,
    EpochSampler,
    RankBatches,
    eval_loader,
    make_loader,
    train_loader,
)
from flag_checks import parse_flags
from flags import build_parser
from images.augment import augment_batch
from images.cache import ImageCache, read_all
from images.folders import ImageIndex, index_folders
from run import ranks
from run.cli import UserError


def test_a_file_that_cannot_be_read_in_training_is_named_not_replaced(tmp_path):
    (tmp_path / "text.jpg").write_text("not a photograph")
    index = ImageIndex([str(tmp_path / "text.jpg")], np.array([0]), ["0", "1"])
    with pytest.raises(UserError, match=r"text\.jpg cannot be read"):
        DoubleSkinDataset(index, 8)[0]


@pytest.fixture
def originals(data_dir):
    return DoubleSkinDataset(index_folders([data_dir]), 32)


def test_every_original_comes_once_then_copies_until_classes_are_equal(originals):
    augmented = AugmentedSkinDataset(originals)
    assert originals.index.counts().tolist() == [20, 10, 5]
    assert augmented.counts().tolist() == [20, 20, 20]
    for position in (0, 19, 34):
        assert torch.equal(augmented[position][0], originals[position][0])
    copies_of_each = np.bincount(augmented.sources)[originals.index.targets == 2]
    assert copies_of_each.tolist() == [4] * 5


def test_a_class_above_the_target_keeps_its_originals(originals):
    assert AugmentedSkinDataset(originals, 8).counts().tolist() == [20, 10, 8]


def test_copies_differ_between_epochs_and_are_reproduced_within_an_epoch(originals):
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
def test_classes_have_the_shares_of_the_paper_and_their_images_take_turns(sampling, shares):
    train_set = AugmentedSkinDataset(DoubleSkinDataset(index_of([600, 60, 6]), 8), 1)
    sampler = ClassSampler(train_set, sampling, 10, seed=3)
    seen = np.zeros(3)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        positions = np.array(list(sampler))
        assert len(positions) == len(set(positions.tolist())) == 666
        times = np.bincount(positions % 666, minlength=666)
        seen += [times[:600].sum(), times[600:660].sum(), times[660:].sum()]
        for class_times in (times[:600], times[600:660], times[660:]):
            assert class_times.max() - class_times.min() <= 1
        first_times = positions < 666
        assert first_times.sum() == (times > 0).sum()  # a repeated image has another position
    np.testing.assert_allclose(seen / seen.sum(), shares, atol=0.002)


def test_progressive_sampling_goes_from_image_shares_to_balanced_classes():
    train_set = AugmentedSkinDataset(DoubleSkinDataset(index_of([80, 20]), 8), 1)
    sampler = ClassSampler(train_set, "progressive", 4, seed=0)
    assert [sampler.shares(epoch).round(3).tolist() for epoch in (0, 2, 4)] == [[0.8, 0.2], [0.65, 0.35], [0.5, 0.5]]


def test_shares_that_are_no_whole_numbers_of_images_are_exact_on_average():
    sampler = ClassSampler(AugmentedSkinDataset(DoubleSkinDataset(index_of([3, 2]), 8), 1), "balanced", 4, seed=0)
    numbers = []
    for epoch in range(400):
        sampler.set_epoch(epoch)
        numbers.append(sum(position % 5 < 3 for position in sampler))
    assert set(numbers) == {2, 3} and np.mean(numbers) == pytest.approx(2.5, abs=0.1)


def test_draws_depend_on_seed_and_epoch_and_can_start_in_the_middle():
    train_set = AugmentedSkinDataset(DoubleSkinDataset(index_of([80, 20]), 8), 1)

    def draw(epoch, skipped=0, seed=0):
        sampler = ClassSampler(train_set, "balanced", 4, seed)
        sampler.set_epoch(epoch, skipped)
        assert len(sampler) == 100 - skipped
        return list(sampler)

    assert draw(1) == draw(1) != draw(2) and draw(1) != draw(1, seed=5)
    assert draw(1, skipped=30) == draw(1)[30:]


def test_augment_all_augments_the_originals_too(originals):
    every = AugmentedSkinDataset(originals, augment_all=True, methods=["rotation"])
    plain = AugmentedSkinDataset(originals, methods=["rotation"])
    assert torch.equal(plain[0][0], originals[0][0]) and not torch.equal(every[0][0], originals[0][0])
    again = every[len(every)]  # past the end: another copy of the same image
    assert again[1] == every[0][1] and not torch.equal(again[0], every[0][0])


def test_batches_are_the_same_for_any_number_of_workers(originals):
    def batches(num_workers):
        augmented = AugmentedSkinDataset(originals)
        loader = make_loader(augmented, 16, sampler=EpochSampler(augmented, seed=1), num_workers=num_workers)
        seen = []
        for epoch in range(2):  # the same workers serve both epochs
            loader.batch_sampler.sampler.set_epoch(epoch)
            augmented.set_epoch(epoch)
            seen += list(loader)
        return seen

    alone, shared = batches(0), batches(2)
    assert len(alone) == len(shared) == 8
    for (images, targets), (other_images, other_targets) in zip(alone, shared, strict=True):
        assert torch.equal(images, other_images) and torch.equal(targets, other_targets)


def test_a_million_positions_take_megabytes_and_little_time():
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


def test_on_the_device_originals_are_unchanged_and_copies_have_the_same_parameters(originals):
    on_cpu, on_gpu = AugmentedSkinDataset(originals), AugmentedSkinDataset(originals, on_device=True)
    positions = [0, 34, 36, 50]
    images, targets = on_cpu.__getitems__(positions)
    raw, device_targets, parameters = on_gpu.__getitems__(positions)
    assert torch.equal(targets, device_targets)
    augmented = augment_batch(raw, parameters)
    assert torch.equal(augmented[:2], images[:2]) and torch.equal(raw[:2], images[:2])
    assert (augmented[2:].float() - images[2:].float()).abs().mean() < 1


def test_validation_images_are_only_resized(originals):
    image, target = originals[7]
    resized = Image.open(originals.index.paths[7]).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    assert image.dtype == torch.uint8 and image.shape == (3, 32, 32) and target == 0
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(resized))


def test_a_stage_decides_on_augmentation_and_sampling_whatever_the_flags_say(originals):
    index, device = originals.index, torch.device("cpu")
    flags = ["--use_augmentation", "--batch_size", "4", "--image_size", "32", "--crt_epochs", "20"]
    args = build_parser().parse_args(flags)
    plain = train_loader(index, args, device, use_augmentation=False, sampling="instance")
    assert isinstance(plain.dataset, DoubleSkinDataset) and type(plain.batch_sampler.sampler) is EpochSampler
    oversampled = train_loader(index, args, device, use_augmentation=True, sampling="instance")
    assert type(oversampled.batch_sampler.sampler) is EpochSampler
    assert oversampled.dataset.counts().tolist() == [20, 20, 20]
    progressive = train_loader(index, args, device, use_augmentation=False, sampling="progressive")
    assert progressive.dataset.counts().tolist() == [20, 10, 5] and progressive.batch_sampler.sampler.epochs == 80
    assert [loader.batch_sampler.batch_size for loader in (plain, oversampled, progressive)] == [4] * 3


def test_evaluation_sees_every_image_in_order_in_larger_batches(originals):
    args = build_parser().parse_args(["--batch_size", "4", "--image_size", "32"])
    batches = list(eval_loader(originals.index, args, torch.device("cpu")))
    assert [len(targets) for _, targets in batches] == [8, 8, 8, 8, 3]
    assert torch.cat([targets for _, targets in batches]).tolist() == originals.index.targets.tolist()


@pytest.mark.parametrize("resize", ["crop", "pad"])
def test_images_outside_the_cache_are_resized_as_those_in_it(tmp_path, resize):
    write_images(tmp_path / "data" / "0", 3, size=(90, 40))
    write_images(tmp_path / "data" / "1", 3, size=(30, 70))
    args, cpu = parse_flags(["--data_dirs", str(tmp_path / "data"), "--resize", resize]), torch.device("cpu")
    args.image_size = 32
    cached, uncached = (
        read_all({"data": index_folders(args.data_dirs)}, ImageCache(folder, 32, resize), False)["data"]
        for folder in (tmp_path / "cache", None)
    )
    for use_augmentation in (False, True):
        loaders = [
            train_loader(index, args, cpu, use_augmentation=use_augmentation, sampling="instance")
            for index in (cached, uncached)
        ]
        assert torch.equal(*(next(iter(loader))[0] for loader in loaders))
    assert torch.equal(*(next(iter(eval_loader(index, args, cpu)))[0] for index in (cached, uncached)))


def test_on_a_gpu_cached_images_need_no_loader_workers(data_dir, tmp_path):
    args, gpu = parse_flags(["--data_dirs", str(data_dir), "--image_size", "32"]), torch.device("cuda")
    uncached = index_folders(args.data_dirs)
    cached = read_all({"data": uncached}, ImageCache(tmp_path / "cache", 32), False)["data"]
    assert eval_loader(cached, args, gpu).num_workers == 0 < eval_loader(uncached, args, gpu).num_workers
    args.num_workers = 1
    assert eval_loader(cached, args, gpu).num_workers == 1


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("number", [1, 2, 6, 20, 23])
def test_the_ranks_share_each_batch_of_an_epoch_and_each_evaluation(number, size, monkeypatch):
    dataset = torch.utils.data.TensorDataset(torch.arange(number))
    parts, evaluated = [], []
    for rank in range(size):
        monkeypatch.setattr(ranks, "_group", SimpleNamespace(rank=rank, size=size))
        sampler = EpochSampler(dataset, seed=3)
        sampler.set_epoch(2, skipped=1)
        batches = RankBatches(sampler, 2 * size, with_partner=True)
        parts.append(list(batches))
        assert len(parts[-1]) == len(batches) == len(list(batches.sizes()))
        evaluated += [int(i) for batch in make_loader(dataset, 4 * size).batch_sampler for i in batch]
    monkeypatch.setattr(ranks, "_group", None)
    assert evaluated == list(range(number))
    wholes = list(RankBatches(sampler, 2 * size))
    for whole, total, *shares in zip(wholes, batches.sizes(), *parts, strict=True):
        with_partners = shares if size > 1 else [[whole[-1], *shares[0]]]  # a single rank needs no partner in front
        assert [i for part in with_partners for i in part[1:]] == whole and len(whole) == total
        for part in with_partners:  # each image follows the one that it is mixed with, and the first the last
            assert all(whole[whole.index(i) - 1] == partner for partner, i in itertools.pairwise(part))
