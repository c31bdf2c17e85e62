"""Datasets, samplers and loaders. "Double", because the images of two or more folders are merged class by class.

An image is an (H, W, 3) uint8 RGB array; batches are (N, 3, H, W) uint8, which the model normalizes on its device.
"""

import argparse
import functools
import itertools
import mmap
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from flags import AUGMENTATIONS, MAX_ROTATION
from images.augment import IDENTITY, augment, draw_parameters
from images.decode import image_size_limit, limit_image_size, read_image
from images.folders import ImageIndex
from run.cores import num_cores
from run.ranks import num_ranks, num_ranks_here, share_of
from run.workers import affordable_workers, begin_worker


class DoubleSkinDataset(Dataset):
    """Images as they are, only resized: validation and test images, and the originals of the training set.

    [i] -> (image (3, image_size, image_size) uint8, target int); a list of positions -> a batch.
    """

    def __init__(self, index: ImageIndex, image_size: int, resize: str = "stretch"):
        self.index, self.image_size, self.resize = index, image_size, resize

    def read(self, i: int) -> np.ndarray:
        """-> (image_size, image_size, 3) uint8, read-only if it is in the cache."""
        row = self.index.cache_rows[i]
        if row >= 0 and self.index.cache.pixels is not None:
            return self.index.cache.pixels[row]
        return read_image(self.index.paths[i], self.image_size, self.resize)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        images, targets = self.__getitems__([i])
        return images[0], int(targets[0])

    def __getitems__(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """-> (images (N, 3, image_size, image_size) uint8, targets (N,) int64)."""
        batch = np.empty((len(positions), self.image_size, self.image_size, 3), np.uint8)
        for pixels, i in zip(batch, positions, strict=True):
            pixels[:] = self.read(i)
        return to_tensor(batch), torch.from_numpy(self.index.targets[positions])

    def __len__(self) -> int:
        return len(self.index)


class AugmentedSkinDataset(Dataset):
    """The training images once each, then augmented copies until every class has `target_samples_per_class`.

    By default, that is the size of the largest class; a class above it keeps all of its originals. A copy depends only
    on (seed, epoch, position), whatever process draws it. A position costs 4 bytes: images are read only when needed.
    augment_all: augment the originals too. max_rotation: in degrees, to either side.

    [position] -> (image (3, image_size, image_size) uint8, target int); a list of positions -> a batch. Positions past
    the end wrap around to further copies, which `ClassSampler` uses. With `on_device`, images are returned unchanged,
    and after the targets come the parameters (N, 9) for `augment_batch`.
    """

    def __init__(
        self,
        originals: DoubleSkinDataset,
        target_samples_per_class: int | None = None,
        methods: Sequence[str] | None = None,
        seed: int = 42,
        on_device: bool = False,
        augment_all: bool = False,
        max_rotation: float = MAX_ROTATION,
    ):
        self.originals, self.seed, self.on_device, self.augment_all = originals, seed, on_device, augment_all
        self.max_rotation = max_rotation
        self.methods = tuple(AUGMENTATIONS if methods is None else methods)
        counts = originals.index.counts()
        target = counts.max() if target_samples_per_class is None else target_samples_per_class
        order = np.random.default_rng(seed)
        sources = [np.arange(len(originals), dtype=np.int32)]
        for c, count in enumerate(counts):
            members = order.permutation(np.flatnonzero(originals.index.targets == c)).astype(np.int32)
            # resize repeats the members in turn: the numbers of copies per original differ by at most one
            sources.append(np.resize(members, max(0, target - count)))
        self.sources = np.concatenate(sources)
        # shared with loader workers, so that persistent ones see the new epoch; needs no room in /dev/shm
        self.epoch = torch.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=torch.int64, count=1)[0]

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentations of this epoch from now on, also in running loader workers."""
        self.epoch.fill_(epoch)

    def counts(self) -> np.ndarray:
        """-> (C,) int64: positions per class."""
        index = self.originals.index
        return np.bincount(index.targets[self.sources], minlength=len(index.classes))

    def parameters(self, position: int) -> tuple[float, ...]:
        """-> the 9 floats of `draw_parameters`; those of an original change nothing, unless all are augmented."""
        if position < len(self.originals) and not self.augment_all:
            return IDENTITY
        rng = np.random.default_rng((self.seed, int(self.epoch), position))
        return draw_parameters(self.methods, rng, self.max_rotation)

    def __getitem__(self, position: int) -> tuple:
        images, targets, *parameters = self.__getitems__([position])
        return images[0], int(targets[0]), *(p[0] for p in parameters)

    def __getitems__(self, positions: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """-> (images (N, 3, image_size, image_size) uint8, targets (N,) int64[, parameters (N, 9) float32])."""
        sources = self.sources[np.asarray(positions, dtype=np.int64) % len(self.sources)]
        parameters = [self.parameters(position) for position in positions]
        if self.on_device:
            images, targets = self.originals.__getitems__(sources)
            return images, targets, torch.tensor(parameters, dtype=torch.float32).reshape(-1, len(IDENTITY))
        size = self.originals.image_size
        batch = np.empty((len(positions), size, size, 3), np.uint8)
        for pixels, source, image_parameters in zip(batch, sources, parameters, strict=True):
            augment(self.originals.read(source), image_parameters, out=pixels)
        return to_tensor(batch), torch.from_numpy(self.originals.index.targets[sources])

    def __len__(self) -> int:
        return len(self.sources)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 array -> (N, 3, H, W) uint8 tensor in channels-last order, without a copy."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


class EpochSampler(DistributedSampler):
    """Every position once, in an order that depends only on (seed, epoch); an epoch may start in its middle."""

    def __init__(self, dataset: Dataset, seed: int):
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=True, seed=seed)
        self.skipped = 0

    def set_epoch(self, epoch: int, skipped: int = 0) -> None:
        """skipped: how many positions at the beginning of the epoch to leave out, as they were trained on before."""
        super().set_epoch(epoch)
        self.skipped = skipped

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(super().__iter__(), self.skipped, None)

    def __len__(self) -> int:
        return super().__len__() - self.skipped


class ClassSampler(EpochSampler):
    """As many positions per epoch as there are images, with a chosen share of each class (Kang et al. 2020, sec. 4.1).

    The share of a class with n images depends on `sampling`. "balanced": the same for all classes; "sqrt":
    proportional to the square root of n; "progressive": proportional to n in the first epoch, and closer to balanced in
    each of `epochs`. The images of a class take turns, so that their counts differ by at most one; each time an image
    is repeated in an epoch, its position is `len(dataset)` higher.
    """

    def __init__(self, dataset: AugmentedSkinDataset, sampling: str, epochs: int, seed: int):
        super().__init__(dataset, seed)
        self.sampling, self.epochs = sampling, epochs
        index = dataset.originals.index
        self.members = [np.flatnonzero(index.targets == c) for c in range(len(index.classes))]

    def shares(self, epoch: int) -> np.ndarray:
        """-> (C,) float, with sum 1."""
        natural = np.array([len(members) for members in self.members]) / len(self.dataset)
        balanced = np.full(len(natural), 1 / len(natural))
        if self.sampling == "progressive":
            return natural + min(1, epoch / self.epochs) * (balanced - natural)
        return balanced if self.sampling == "balanced" else np.sqrt(natural) / np.sqrt(natural).sum()

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        # rounded up or down at random, so that the shares are exact on average over the epochs
        ends = np.floor(np.cumsum(self.shares(self.epoch)) * len(self.dataset) + rng.random()).astype(int)
        ends[-1] = len(self.dataset)
        positions = []
        for members, number in zip(self.members, np.diff(ends, prepend=0), strict=True):
            rounds = np.arange(number) // len(members)
            positions.append(np.resize(rng.permutation(members), number) + rounds * len(self.dataset))
        yield from rng.permutation(np.concatenate(positions))[self.skipped :].tolist()


class RankBatches(BatchSampler):
    """This rank's part of each batch of an epoch; with a single rank, the whole batch.

    A part may be empty in the last batch. with_partner: on several ranks, each part has one position more in front: the
    image with which a `Mixer` mixes its first one.
    """

    def __init__(self, sampler: EpochSampler, batch_size: int, with_partner: bool = False):
        """batch_size: images of all ranks."""
        super().__init__(sampler, batch_size, drop_last=False)
        self.with_partner = with_partner and num_ranks() > 1

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            start, stop = share_of(len(batch))
            yield batch[start - 1 :][:1] + batch[start:stop] if self.with_partner else batch[start:stop]

    def sizes(self) -> Iterator[int]:
        """The number of images of all ranks in each batch."""
        for start in range(0, len(self.sampler), self.batch_size):
            yield min(self.batch_size, len(self.sampler) - start)


def training_set(
    index: ImageIndex, args: argparse.Namespace, *, use_augmentation: bool, sampling: str, on_device: bool = False
) -> DoubleSkinDataset | AugmentedSkinDataset:
    """The training images of a stage, whose use_augmentation and sampling may differ from `args`."""
    train_set = DoubleSkinDataset(index, args.image_size, args.resize)
    if not (use_augmentation or args.augment_all or sampling != "instance"):
        return train_set
    target = args.target_samples_per_class if use_augmentation else 1  # 1: no copies
    return AugmentedSkinDataset(
        train_set, target, args.augmentation_methods, args.seed, on_device, args.augment_all, args.rotation
    )


def train_loader(
    index: ImageIndex, args: argparse.Namespace, device: torch.device, *, use_augmentation: bool, sampling: str
) -> DataLoader:
    """Batches of `training_set`."""
    on_device = device.type == "cuda"
    train_set = training_set(index, args, use_augmentation=use_augmentation, sampling=sampling, on_device=on_device)
    return _loader(train_set, index, args.batch_size, args, device, train_sampler(train_set, args, sampling))


def train_sampler(train_set: Dataset, args: argparse.Namespace, sampling: str) -> EpochSampler:
    """What draws the positions of each epoch of a stage. train_set: of `training_set`."""
    if sampling == "instance":
        return EpochSampler(train_set, args.seed)
    return ClassSampler(train_set, sampling, args.epochs - args.crt_epochs, args.seed)


def eval_loader(index: ImageIndex, args: argparse.Namespace, device: torch.device) -> DataLoader:
    """Every image in the order of the index, in larger batches, as evaluation needs no memory for gradients."""
    return _loader(DoubleSkinDataset(index, args.image_size, args.resize), index, 2 * args.batch_size, args, device)


def _loader(dataset, index, batch_size, args, device, sampler=None):
    workers, on_gpu = args.num_workers, device.type == "cuda"
    if workers is None:  # a thread copies images from the cache faster than processes
        workers = min(8, max(1, num_cores() // num_ranks_here())) if on_gpu and not index.is_cached else 0
    image_bytes = 3 * args.image_size**2 + 8 + 4 * len(IDENTITY)  # pixels, target, parameters of the augmentation
    # the ranks of a machine share its memory: together they are like one rank with all their workers
    rank_batch = args.batch_size // num_ranks()
    affordable = affordable_workers(workers * num_ranks_here(), image_bytes, rank_batch, args.grad_accum)
    workers = affordable[0 if sampler else 1] // num_ranks_here()
    with_partner = bool(args.mixup or args.cutmix)
    settings = {"seed": args.seed, "num_workers": workers, "pin_memory": on_gpu}
    return make_loader(dataset, batch_size, sampler=sampler, with_partner=with_partner, **settings)


def make_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    sampler: EpochSampler | None = None,
    with_partner: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches as the dataset returns them: (images (N, 3, S, S) uint8, targets (N,) int64[, parameters (N, 9)]).

    batch_size: of all ranks together. sampler: call its `set_epoch` before each epoch; None: this rank's share of the
    images, in the order of the index. with_partner: see `RankBatches`.
    """
    if sampler:
        batches = RankBatches(sampler, batch_size, with_partner)
    else:
        batches = BatchSampler(range(*share_of(len(dataset))), batch_size // num_ranks(), drop_last=False)
    limit_size = functools.partial(limit_image_size, image_size_limit())  # a worker that is not forked starts without
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_identity,  # the datasets return whole batches
        pin_memory=pin_memory,
        # where available: forked workers share the index instead of copying it
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        worker_init_fn=functools.partial(begin_worker, limit_size),
        persistent_workers=num_workers > 0,
        # not torch's global generator: its draws, which dropout uses, would depend on the number of workers
        generator=torch.Generator().manual_seed(seed),
    )


def forks_workers(loader: DataLoader) -> bool:
    """Whether workers are started when its next epoch begins: later epochs have those of the first one."""
    return loader.num_workers > 0 and loader._iterator is None


def _identity(batch):
    return batch
