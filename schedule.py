"""The stages of a training: which loss and which images at which epoch, and the learning rate at each step."""

import argparse
import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dataset_double import ClassSampler, train_loader
from flags import CORRECTION, FROM_SCRATCH, RECIPES
from images.folders import ImageIndex
from muon import Muon
from run.cli import UserError
from run.machine import has_fused_optimizer
from utils import CrossEntropy, build_loss

PROGRESSIVE_SHARES = (1 / 2, 3 / 4, 1)  # of the image size, a third of the epochs each
LOSS_WORDS = {
    "CrossEntropy": "cross entropy",
    "LabelSmoothingCrossEntropy": "cross entropy with label smoothing",
    "FocalLoss": "focal loss",
    "CBLoss": "Class-Balanced Focal loss",
    "WeightedCrossEntropy": "cross entropy",
    "LogitAdjustedLoss": "cross entropy of logits adjusted by the class shares",
    "BalancedSoftmaxLoss": "balanced softmax",
    "LDAMLoss": "LDAM loss with wider margins for rarer classes",
    "OrdinalLoss": "cross entropy against neighboring grades too",
}
NETWORK_STRIDE = 16  # of the ResNet-50 with last-stage stride 1
SMALLEST_SIZE = 32  # at 16 px the last features are one pixel, and batch norm fails on a batch of one image


def build_loss_from_flags(
    args: argparse.Namespace, samples_per_cls: Sequence[int], weighted: bool = True
) -> torch.nn.Module:
    """The loss of `--train_loss`. samples_per_cls: (C,) counts of the original training images.

    weighted: see `build_loss`. LDAM has no class weights without `--drw_epoch`, as in its paper.
    """
    alpha = args.alpha[0] if args.alpha and len(args.alpha) == 1 else args.alpha
    if isinstance(alpha, list) and len(alpha) != len(samples_per_cls):
        raise UserError(f"--alpha: {len(alpha)} values for {len(samples_per_cls)} classes; give one, or one per class")
    return build_loss(
        args.train_loss,
        samples_per_cls,
        weighted=weighted and (args.train_loss != "ldam" or args.drw_epoch > 0),
        beta=args.beta,
        gamma=args.gamma,
        alpha=alpha,
        smoothing=args.smoothing,
        cb_form=args.cb_form,
        tau=args.tau,
        max_margin=args.max_margin,
        ordinal_decay=args.ordinal_decay,
    )


@dataclass
class Stage:
    """The epochs from `start` to before `end`, which are trained alike."""

    start: int
    end: int
    loader: torch.utils.data.DataLoader
    criterion: torch.nn.Module
    head_only: bool = False

    def steps(self, grad_accum: int) -> int:
        """Optimizer steps per epoch."""
        return math.ceil(len(self.loader) / grad_accum)


def plan_stages(
    args: argparse.Namespace, index: ImageIndex, criterion: torch.nn.Module, device: torch.device
) -> list[Stage]:
    """The stages in their order: before `--drw_epoch`, the main stage, and the new head of `--crt_epochs`.

    index: the original training images; criterion: the loss of `--train_loss`.
    """
    stages, end = [], args.epochs - args.crt_epochs
    if args.drw_epoch:
        plain_loader = train_loader(index, args, device, use_augmentation=False, sampling="instance")
        stages.append(
            Stage(0, args.drw_epoch, plain_loader, build_loss_from_flags(args, index.counts(), weighted=False))
        )
    loader = train_loader(index, args, device, use_augmentation=args.use_augmentation, sampling=args.sampling)
    stages.append(Stage(args.drw_epoch, end, loader, criterion))
    if args.crt_epochs:
        balanced_loader = train_loader(index, args, device, use_augmentation=False, sampling="balanced")
        stages.append(Stage(end, args.epochs, balanced_loader, CrossEntropy(), head_only=True))
    for stage in stages:
        stage.criterion.to(device)
    return stages


def new_optimizer(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer of `--optimizer` for a model that is on its device."""
    kind = {"adamw": torch.optim.AdamW, "muon": Muon}[args.optimizer]
    fused = has_fused_optimizer(next(model.parameters()).device)
    return kind(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=fused)


def build_optimizer(
    model: torch.nn.Module, args: argparse.Namespace, stages: list[Stage]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """-> `new_optimizer`, and its learning rate at each step; `--crt_epochs` have a schedule of their own."""
    optimizer = new_optimizer(model, args)
    steps = [(stage.end - stage.start) * stage.steps(args.grad_accum) for stage in stages]
    joint, separate = (steps[:-1], steps[-1:]) if args.crt_epochs else (steps, [])
    warmup_steps = min(round(args.warmup_epochs * stages[0].steps(args.grad_accum)), sum(joint) // 2)
    factor = lr_lambda([(warmup_steps, sum(joint)), *((0, steps) for steps in separate)])
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def lr_lambda(cycles: Sequence[tuple[int, int]]) -> Callable[[int], float]:
    """Factor on the learning rate at a step: linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017).

    cycles: [(warm-up steps, all steps)], one after the other.
    """
    starts = list(itertools.accumulate((steps for _, steps in cycles[:-1]), initial=0))

    def factor(step):
        number = bisect.bisect_right(starts, step) - 1
        step, (warmup_steps, total_steps) = step - starts[number], cycles[number]
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def steps_before(epoch: int, stages: list[Stage], grad_accum: int) -> int:
    """Optimizer steps in all epochs before `epoch`."""
    return sum(
        (min(epoch, stage.end) - stage.start) * stage.steps(grad_accum) for stage in stages if stage.start < epoch
    )


def progressive_size(epoch: int, epochs: int, image_size: int) -> int:
    """Side of the training images at an epoch: half, three quarters and all of `image_size`, for a third each.

    Rounded up to a multiple of the network's stride; the last epoch always has the full size.
    """
    thirds_to_come = 3 * (epochs - 1 - epoch) // epochs
    share = PROGRESSIVE_SHARES[-1 - thirds_to_come]
    side = math.ceil(image_size * share / NETWORK_STRIDE) * NETWORK_STRIDE
    return min(max(side, SMALLEST_SIZE), image_size)


def print_stages(stages: list[Stage], num_originals: int, args: argparse.Namespace) -> None:
    """Print the flags of `--recipe`, and what each stage does about imbalance in words.

    num_originals: number of training images.
    """
    if args.recipe:
        from_scratch = {} if args.pretrained or args.weights else FROM_SCRATCH[args.recipe]
        names = RECIPES[args.recipe] | dict.fromkeys(CORRECTION) | from_scratch
        print(f"recipe {args.recipe}:", *(f"--{name}={getattr(args, name)}" for name in names))
    for stage in stages:
        when = f", epochs {stage.start} to {stage.end - 1}" if len(stages) > 1 else ""
        dataset, sampler = stage.loader.dataset, stage.loader.batch_sampler.sampler
        words = [loss_in_words(stage.criterion)]
        if stage.head_only:
            words.append("a new head on the frozen backbone")
        if isinstance(sampler, ClassSampler):
            words.append(f"{sampler.sampling} sampling, repeated images augmented")
        elif len(dataset) > num_originals:
            words.append(f"oversampled from {num_originals} to {len(dataset)} images per epoch by augmented copies")
        else:
            words.append("not oversampled")
        words.append("every image augmented" if getattr(dataset, "augment_all", False) else "originals not augmented")
        print(f"imbalance{when}: {'; '.join(words)}")


def loss_in_words(criterion: torch.nn.Module) -> str:
    """-> its name, and the range of its class weights"""
    weights = getattr(criterion, "weights", getattr(criterion, "alpha", torch.ones(1)))
    low, high = weights.min().item(), weights.max().item()
    weighting = f"class weights from {low:.3f} to {high:.3f}" if low < high else "equal class weights"
    return f"{LOSS_WORDS[type(criterion).__name__]}, {weighting}"


def last_stage_start(args: argparse.Namespace) -> int:
    """The first epoch of the last stage of `plan_stages`."""
    return args.epochs - args.crt_epochs if args.crt_epochs else args.drw_epoch


def print_early_end(args: argparse.Namespace, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    share = scheduler.get_last_lr()[0] / args.learning_rate
    print(
        f"stopped early: {args.best_metric} has not improved for {args.patience} epochs; the learning rate, planned "
        f"for {args.epochs} epochs, has come to {share:.0%} of --learning_rate"
    )


def warn_of_early_best(best_epoch: int, stages: list[Stage]) -> None:
    """Print a line if the best model was trained before the last stage."""
    if best_epoch < stages[-1].start:
        print(
            f"warning: the best epoch, {best_epoch}, is earlier than the stage that --drw_epoch / --crt_epochs starts "
            f"in epoch {stages[-1].start}: the saved model was trained without it"
        )
