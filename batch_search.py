"""`--batch_size auto`: the largest batch that fits into the memory of the GPU, and the learning rate for it."""

import argparse
import gc
from collections.abc import Sequence

import torch

from engine import Engine, RunningMetrics, build_engine
from flag_queries import scaled_learning_rate
from flags import BATCH_SIZE
from images.augment import IDENTITY
from run.cli import UserError
from run.machine import (
    OutOfMemory,
    name_hardware_errors,
    out_of_memory_reason,
    random_state,
    restore_random_state,
)
from run.ranks import alone, gather, num_ranks
from schedule import Stage, build_optimizer

SEARCHED = ("cuda",)  # kinds of devices whose memory runs out; that of a CPU or of MPS swaps to the disk instead
SMALLEST, LARGEST = 4, 1024  # images per batch: where the search starts, and where it ends at the latest
MIN_STEPS = 50  # optimizer steps that an epoch has at least, unless it has fewer with batches of BATCH_SIZE
TRIAL_STEPS = 2  # the second one has the state of the optimizer from its beginning
HEADROOM = 0.1  # share of the memory that stays free: for fragments, and for what torch.compile needs


def resolve_batch_size(
    args: argparse.Namespace, device: torch.device, criterion: torch.nn.Module, samples_per_cls: Sequence[int]
) -> None:
    """Replace `--batch_size auto` in `args` by a number, and the learning rate by that for it; print one line.

    A number is left as it is. Of several ranks, which search for themselves, the one with the least memory decides.
    samples_per_cls: (C,) counts of the original training images; with the same counts, all methods of oversampling have
    the same upper limit. Raises UserError if not even SMALLEST images fit.
    """
    if args.batch_size != "auto":
        return
    if device.type in SEARCHED:
        limit = batch_limit(sum(samples_per_cls), args.grad_accum)
        share = max(SMALLEST, limit // num_ranks())
        with alone():
            size = largest_batch(args, device, criterion, len(samples_per_cls), share)
        args.batch_size = num_ranks() * min(gather(size))
        why = _why_not_more(2 * args.batch_size, limit)
    else:
        args.batch_size = max(1, BATCH_SIZE // num_ranks()) * num_ranks()
        why = f"there is nothing to search on {device.type}: its memory swaps"
    rate = args.learning_rate
    args.learning_rate = scaled_learning_rate(rate, args.batch_size)
    print(
        f"--batch_size auto: {args.batch_size} images ({why}), "
        f"learning rate {rate:.3g} x sqrt({args.batch_size} / {BATCH_SIZE}) = {args.learning_rate:.3g}"
    )


def batch_limit(num_images: int, grad_accum: int) -> int:
    """-> upper limit of the images per batch, with which an epoch of `num_images` has at least MIN_STEPS steps.

    Never below the default, BATCH_SIZE: the limit concerns small data sets, which would be trained in very few steps.
    """
    return min(LARGEST, max(BATCH_SIZE, num_images // (MIN_STEPS * grad_accum)))


def _why_not_more(doubled, limit):
    if doubled <= limit:
        return f"{doubled} do not fit"
    return "more are not tried" if doubled > LARGEST else f"{doubled} leave fewer than {MIN_STEPS} steps per epoch"


def largest_batch(
    args: argparse.Namespace, device: torch.device, criterion: torch.nn.Module, num_classes: int, limit: int
) -> int:
    """-> the largest power of two, from SMALLEST to `limit`, whose training steps fit into the memory of `device`.

    It is tried with an engine and random images of its own, in the precision and image size of `args`, without
    torch.compile, from SMALLEST upward: TRIAL_STEPS optimizer steps, then an evaluation of twice as many images.
    HEADROOM of the memory stays free. Afterward, the random state is that of before and the memory is free again.
    Raises UserError if not even SMALLEST images fit, and any error other than of memory as it is.
    """
    state = random_state(device)
    try:
        return _search(args, device, criterion, num_classes, limit)
    finally:
        _free_memory()
        restore_random_state(state, device)


def _search(args, device, criterion, num_classes, limit):
    # a learning rate of 0: the weights are random, and no step may make them diverge
    tried = {"compile": False, "crt_epochs": 0, "learning_rate": 0.0, "grad_accum": min(args.grad_accum, 2)}
    trial_args = argparse.Namespace(**{**vars(args), **tried})
    engine = build_engine(trial_args, device, criterion, num_classes)
    stage = Stage(0, args.epochs, range(TRIAL_STEPS * engine.grad_accum), criterion)
    engine.optimizer, engine.scheduler = build_optimizer(engine.model, trial_args, [stage])
    size = SMALLEST
    if reason := _why_it_does_not_fit(engine, size, args, num_classes):
        raise UserError(
            f"--batch_size auto: not even {size} images fit into the memory of the GPU ({reason}); reduce --image_size "
            "or name a smaller --batch_size"
        )
    while 2 * size <= limit and not _why_it_does_not_fit(engine, 2 * size, args, num_classes):
        size *= 2
    return size


def _why_it_does_not_fit(engine, size, args, num_classes):
    """-> the line that says so, empty if `size` images fit."""
    reason = ""
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    try:
        with name_hardware_errors():
            _try_batch(engine, size, args, num_classes)
    except OutOfMemory as error:
        reason = out_of_memory_reason(error.__cause__)
    # only now: as long as there is an exception, its traceback keeps the tensors of all frames
    if reason:
        engine.optimizer.zero_grad(set_to_none=True)
        _free_memory()
    elif engine.device.type == "cuda" and not _leaves_headroom(engine.device):
        reason = f"less than {HEADROOM:.0%} of it is left"
    return reason


def _leaves_headroom(device):
    """Whether a GPU had HEADROOM of the memory that this process can have left, when most of it was in use."""
    available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return torch.cuda.max_memory_allocated(device) <= (1 - HEADROOM) * available


def _try_batch(engine: Engine, size, args, num_classes):
    """Train and evaluate on random images as the training of `args` does with batches of `size` images."""
    images = torch.randint(0, 256, (SMALLEST, 3, args.image_size, args.image_size), dtype=torch.uint8)
    images = images.repeat(size // SMALLEST, 1, 1, 1)
    # augmented on the device like copies, which needs a little more memory than originals
    batch = images, torch.arange(size) % num_classes, torch.tensor(IDENTITY).repeat(size, 1)
    # further batches of a step have the gradients of the first two, and wait on the device until it is their turn
    waiting = (args.grad_accum - engine.grad_accum) * size
    held = torch.empty((waiting, *images.shape[1:]), dtype=torch.uint8, device=engine.device)
    engine.train_one_epoch([batch] * TRIAL_STEPS * engine.grad_accum, RunningMetrics(0, engine.device))
    del held
    with torch.inference_mode():
        engine.forward(engine.evaluated.eval(), images.repeat(2, 1, 1, 1).to(engine.device))


def _free_memory():
    gc.collect()
    torch.cuda.empty_cache()
