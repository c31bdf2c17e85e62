"""One epoch of training and one pass of evaluation, on any device; they share their batches and forward pass."""

import argparse
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from averaging import MovingAverage
from images.augment import resize
from images.device_batches import DeviceBatches
from model import Model
from run.cli import UserError, progress_bar
from run.machine import memory_format, name_hardware_errors, resolve_amp, set_float32_precision
from run.ranks import gather, num_ranks, share_tensors, sum_over_ranks

CHECK_EVERY = 10  # steps between two checks of the loss


class Mixer:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of torchvision; if both are on, one of them per batch.

    images: (N, 3, H, W) float -> (mixed images, share): `share` of image i is itself, the rest is image i - 1.
    """

    def __init__(self, mixup_alpha: float, cutmix_alpha: float):
        from torchvision.transforms import v2

        kinds = {v2.MixUp: mixup_alpha, v2.CutMix: cutmix_alpha}
        self.transform = v2.RandomChoice([kind(alpha=alpha) for kind, alpha in kinds.items() if alpha])

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, float]:
        # with one class per image, the mixed labels show the shares, and any loss can be mixed
        mixed, shares = self.transform(images, torch.eye(len(images)))
        return mixed, shares[0, 0].item()


class Outputs(NamedTuple):
    """Of an evaluation: mean loss, probabilities (N, C) float32, targets (N,) int64."""

    loss: float
    probabilities: np.ndarray
    targets: np.ndarray


@dataclass
class Engine:
    """A model with all it needs to be trained and evaluated on `device`, in `amp_dtype` (None: float32)."""

    model: torch.nn.Module
    criterion: torch.nn.Module
    device: torch.device
    amp_dtype: torch.dtype | None = None
    optimizer: torch.optim.Optimizer | None = None
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    clip_grad: float = 0.0  # largest norm of the gradient, 0: not clipped
    grad_accum: int = 1  # batches per optimizer step
    # images of a full training batch, for which the model is compiled, and for twice as many in evaluation; other
    # batches, such as the last one of an epoch, run as they are; 0: nothing is compiled
    compiled_batch: int = 0
    mixer: Mixer | None = None
    ema: float = 0.0  # decay of the averaged weights, which are evaluated instead, 0: no average
    sync_bn: bool = True  # with several ranks, batch norm over the images of all of them

    def __post_init__(self):
        self.model.to(self.device, memory_format=memory_format(self.device))
        self.criterion.to(self.device)
        if num_ranks() > 1:
            from parallel import prepare  # not every build of torch has torch.distributed

            prepare(self.model, self.device, self.sync_bn)
        self.average = MovingAverage(self.model, self.ema) if self.ema else None
        if self.compiled_batch:
            self.model.compile(dynamic=False)
            if self.average:
                self.average.model.compile(dynamic=False)
        # scales the loss in float16 only, where small gradients would vanish
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)

    @functools.cached_property
    def trained(self) -> torch.nn.Module:
        """The model as it is called in training: with several ranks, its gradients are averaged over them."""
        if num_ranks() == 1:
            return self.model
        from parallel import average_gradients

        return average_gradients(self.model)

    @property
    def evaluated(self) -> torch.nn.Module:
        """The model that is evaluated and kept: the averaged one if there is one."""
        return self.average.model if self.average else self.model

    def forward(self, model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        """images: (N, 3, H, W) on this device, as `Model` takes them -> logits: (N, C) float32."""
        images = images.contiguous(memory_format=memory_format(self.device))
        is_odd = self.compiled_batch and len(images) != self.compiled_batch * (1 if model.training else 2)
        precision = torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)
        with precision, torch.compiler.set_stance("force_eager") if is_odd else nullcontext():
            return model(images).float()

    def retrain_head(self, reset: bool) -> None:
        """Classifier re-training (Kang et al. 2020): train only the head from now on, on the evaluated backbone.

        reset: start with a new head.
        """
        if reset:
            if self.average:
                self.model.load_state_dict(self.average.model.state_dict())
                self.average.steps = 0
            self.model.head.reset_parameters()
            for parameter in self.model.head.parameters():
                self.optimizer.state.pop(parameter, None)
        self.model.freeze_backbone()
        self.__dict__.pop("trained", None)  # fewer gradients

    def load_initial_weights(
        self, state_dict: dict, weight_classes: Sequence[str] | None, classes: Sequence[str]
    ) -> None:
        """See `Model`."""
        self.model.load_initial_weights(state_dict, weight_classes, classes)
        if self.average:
            self.average.model.load_state_dict(self.model.state_dict())

    def check_weights(self) -> None:
        """Raise UserError if a weight is not finite: a step can cause that although its loss was finite."""
        if not torch.nn.utils.get_total_norm(p.detach() for p in self.model.parameters()).isfinite():
            raise UserError(
                "the weights are not finite any more: the training has diverged; resume from the last checkpoint with "
                "a smaller --learning_rate"
            )

    @name_hardware_errors()
    def train_one_epoch(
        self,
        loader: DataLoader,
        running_metrics: "RunningMetrics",
        image_size: int | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """-> {"train_loss", "train_acc", "images_per_second", "learning_rate" (of the last step), "input_wait"}

        running_metrics: new, or of the part of the epoch that was trained before. image_size: side to which the images
        are resized, None to keep it. after_step: called after each optimizer step, or if a signal ends the wait for a
        batch; it may raise to leave the epoch.
        input_wait: share of the time, 0..1, spent waiting for images. Raises UserError, naming epoch and step, if the
        loss is not finite.
        """
        self.model.train()
        batches = DeviceBatches(loader, self.device, after_step)
        seconds_before = running_metrics.seconds
        started = time.perf_counter()
        bar = progress_bar(batches, f"epoch {running_metrics.epoch}")
        whole_sizes = loader.batch_sampler.sizes() if num_ranks() > 1 else itertools.repeat(None)
        for step_batches in batched(zip(bar, whole_sizes, strict=False), self.grad_accum):
            self._step(step_batches, running_metrics, image_size)
            running_metrics.seconds = seconds_before + time.perf_counter() - started
            if running_metrics.unchecked >= CHECK_EVERY:
                mean_loss = running_metrics.check()
                rate = running_metrics.images / running_metrics.seconds
                bar.set_postfix_str(
                    f"loss {mean_loss:.4f}, lr {running_metrics.learning_rate:.2e}, {rate:.0f} images/s"
                )
            if after_step:
                after_step()
        mean_loss = running_metrics.check(last=True)
        seconds = time.perf_counter() - started
        running_metrics.seconds = seconds_before + seconds
        return {
            "train_loss": mean_loss,
            "train_acc": running_metrics.correct.item() / running_metrics.images,
            "images_per_second": running_metrics.images / running_metrics.seconds,
            "learning_rate": running_metrics.learning_rate,
            "input_wait": batches.seconds_waited() / seconds,
        }

    def _step(self, batches, running_metrics, image_size):
        """One optimizer step with the mean gradient over all images of `batches`. Never waits for a GPU, except
        in float16 with Muon, where the scaler looks for an overflow.

        batches: [((images, targets) of this rank, number of images of all ranks; None: those of this one)].
        """
        running_metrics.learning_rate = self.optimizer.param_groups[0]["lr"]
        running_metrics.steps += 1
        batches = [(images, targets, len(targets) if whole is None else whole) for (images, targets), whole in batches]
        group_size = sum(whole for *_, whole in batches)
        self.optimizer.zero_grad(set_to_none=True)
        for number, (images, targets, whole) in enumerate(batches, start=1):
            is_last = number == len(batches)  # only then are gradients averaged over the ranks
            with nullcontext() if num_ranks() == 1 or is_last else self.trained.no_sync():
                images = resize(images, image_size) if image_size else images
                logits, targets, loss = self._logits_and_loss(images, targets, whole)
                # the mean over the ranks divides by their number
                self.scaler.scale(loss * (len(targets) * num_ranks() / group_size)).backward()
            running_metrics.add(loss, logits, targets, whole)
        if self.clip_grad:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.average:
            self.average.update()

    def _logits_and_loss(self, images, targets, whole):
        """-> logits (N, C), targets (N,), mean loss. With several ranks and a mixer, the first of `images` is the
        partner of the second, and not one of the N. whole: the number of images of all ranks."""
        if num_ranks() > 1:
            self.model.dropout.total = whole
        if self.mixer is None:
            logits = self.forward(self.trained, images)
            return logits, targets, self.criterion(logits, targets) if len(targets) else logits.sum()
        images, share = self.mixer(self.model.normalize(images))
        first = 1 if num_ranks() > 1 else 0
        images, targets, others = images[first:], targets[first:], targets.roll(1)[first:]
        logits = self.forward(self.trained, images)
        if not len(targets):  # of the last batch, other ranks have all images
            return logits, targets, logits.sum()
        return logits, targets, share * self.criterion(logits, targets) + (1 - share) * self.criterion(logits, others)

    @torch.inference_mode()
    def loss_of(self, logits: torch.Tensor, targets: torch.Tensor) -> float:
        """logits: (N, C), targets: (N,) -> mean loss"""
        return self.criterion(logits.to(self.device), targets.to(self.device)).item()

    @name_hardware_errors()
    @torch.inference_mode()
    def evaluate(
        self,
        loader: DataLoader,
        name: str,
        after_batch: Callable[[], None] | None = None,
        views: Callable[[torch.Tensor], list[torch.Tensor]] | None = None,
    ) -> Outputs:
        """Evaluate each image once; on several ranks, each evaluates a part, and all get the outputs of all.

        after_batch: called after each batch; it may raise to leave. views: test-time augmentation, the images of a
        batch -> what is averaged, see `images.augment.views`. Raises UserError if the loss is not finite.
        """
        model, batches = self.evaluated.eval(), []
        share_tensors(model.buffers())  # without sync_bn, each rank has its own statistics
        for images, targets in progress_bar(DeviceBatches(loader, self.device, after_batch), name):
            shown = views(images) if views else [images]
            logits = sum(self.forward(model, view) for view in shown) / len(shown)
            # a copy: with workers, each batch takes an open file and a page of shared memory as long as it is kept
            batches.append((logits, targets.clone()))
            if after_batch:
                after_batch()
        if after_batch:
            for _ in range(max(gather(len(batches))) - len(batches)):  # equally often on all ranks, see `agree`
                after_batch()
        logits, targets = (cat_over_ranks(tensors) for tensors in (zip(*batches, strict=True) if batches else ((), ())))
        loss = self.loss_of(logits, targets)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss on the images of {name} is {loss}: the model has diverged or its file is damaged"
            )
        return Outputs(loss, torch.softmax(logits, dim=1).cpu().numpy(), targets.cpu().numpy().astype(np.int64))


@name_hardware_errors()
def build_engine(
    args: argparse.Namespace, device: torch.device, criterion: torch.nn.Module, num_classes: int
) -> Engine:
    """An engine with a new model, as the flags say."""
    amp_dtype = resolve_amp(args.amp, device)
    set_float32_precision(amp_dtype)
    return Engine(
        Model(num_classes, args.dropout_prob, cosine_head=args.train_loss == "ldam", zero_init=args.zero_init),
        criterion,
        device,
        amp_dtype,
        clip_grad=args.clip_grad,
        grad_accum=args.grad_accum,
        compiled_batch=args.batch_size // num_ranks() if args.compile else 0,
        mixer=Mixer(args.mixup, args.cutmix) if args.mixup or args.cutmix else None,
        ema=0 if args.eval_only else args.ema,
        sync_bn=args.sync_bn,
    )


def cat_over_ranks(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """-> the rows of all ranks' tensors, in the order of the ranks. A rank may have none, but not all."""
    own = torch.cat(tensors) if tensors else None
    if num_ranks() == 1:
        return own
    parts = gather(None if own is None else own.cpu().numpy())
    return torch.from_numpy(np.concatenate([part for part in parts if part is not None]))


def batched(iterable: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items; the last one may be shorter."""
    iterator = iter(iterable)
    while group := list(itertools.islice(iterator, size)):
        yield group


EPOCH_STATE_KEYS = (
    "images",
    "batches",
    "loss",
    "correct",
    "seconds",
    "learning_rate",
)  # what an epoch has accumulated, and its last learning rate


class RunningMetrics:
    """Loss and accuracy of an epoch so far, summed on the device.

    Losses are copied to the host several batches at a time and read one check later, so that a GPU never has to stop.
    """

    def __init__(self, epoch: int, device: torch.device, epoch_state: dict | None = None):
        """epoch_state: of an interrupted epoch, by the method of this name."""
        epoch_state = epoch_state or dict.fromkeys(EPOCH_STATE_KEYS, 0)
        self.epoch, self.steps = epoch, 0  # optimizer steps of this process
        self.images, self.seconds, self.learning_rate = (epoch_state[k] for k in ("images", "seconds", "learning_rate"))
        self.correct = torch.tensor(epoch_state["correct"], device=device)
        self.batches, self.loss = epoch_state["batches"], epoch_state["loss"]  # of checked batches
        self._unchecked, self._in_flight = [], None
        self._checked_images = self.images

    def epoch_state(self) -> dict[str, float]:
        """-> {name of EPOCH_STATE_KEYS: number}, to resume the epoch from. Waits until a GPU has finished."""
        self.check(last=True)
        return {name: getattr(self, name) for name in EPOCH_STATE_KEYS} | {"correct": self.correct.item()}

    @property
    def unchecked(self) -> int:
        """Batches since the last check."""
        return len(self._unchecked)

    def add(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, whole: int) -> None:
        """Add a batch. loss: scalar; logits: (N, C); targets: (N,); whole: the number of images of all ranks."""
        loss, correct = loss.detach(), (logits.detach().argmax(dim=1) == targets).sum()
        if num_ranks() > 1:
            sums = sum_over_ranks(torch.stack([loss.float() * (len(targets) / whole), correct.float()]))
            loss, correct = sums[0], sums[1].long()
        self._unchecked.append((loss, whole))
        self.correct += correct
        self.images += whole

    def check(self, last: bool = False) -> float:
        """-> mean loss up to the previous check, or of the whole epoch if it is the `last` one.

        Raises UserError, naming the first batch, if a loss is not finite.
        """
        self._receive()
        self._send()
        if last:
            self._receive()
        return self.loss / self._checked_images if self._checked_images else math.nan

    def _send(self):
        if not self._unchecked:
            return
        losses = torch.stack([loss for loss, _ in self._unchecked])
        copy = torch.empty(losses.shape, dtype=losses.dtype, pin_memory=losses.is_cuda)
        copy.copy_(losses, non_blocking=losses.is_cuda)  # elsewhere nothing says when it has arrived
        arrived = torch.cuda.current_stream(losses.device).record_event() if losses.is_cuda else None
        self._in_flight = copy, arrived, [size for _, size in self._unchecked]
        self._unchecked = []

    def _receive(self):
        if self._in_flight is None:
            return
        losses, arrived, sizes = self._in_flight
        if arrived is not None:
            arrived.synchronize()
        self._in_flight = None
        for loss, size in zip(losses.tolist(), sizes, strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at epoch {self.epoch}, step {self.batches}: the training has diverged; "
                    "resume from the last checkpoint with a smaller --learning_rate"
                )
            self.loss += loss * size
            self._checked_images += size
            self.batches += 1
