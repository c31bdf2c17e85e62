"""One epoch of training and one pass of evaluation, on whatever device; they share their batches and forward pass."""

import bisect
import ctypes
import itertools
import math
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from dataset_double import augment_batch
from files import UserError, progress_bar

CHECK_EVERY = 10  # steps between looks at the loss
PROGRESSIVE_SHARES = (1 / 2, 3 / 4, 1)  # of the image size, each for a third of the epochs
NETWORK_STRIDE = 16  # of the ResNet-50 with last-stage stride 1
SMALLEST_SIZE = 32  # at 16 px its last features would be one pixel, and batch norm fail on a last batch of one image


def resolve_amp(amp, device):
    """`--amp` -> the dtype of autocast, or None for float32.

    auto: bfloat16 where the device computes it natively, float16 on older GPUs, else float32.
    """
    if amp != "auto":
        return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and _cpu_computes_bf16():
        return torch.bfloat16
    return None


def _cpu_computes_bf16():
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def keep_freed_memory():
    """Have the C library keep freed memory for the next step, instead of giving it back to the system.

    On a CPU each step allocates gigabytes of activations anew, and every 4 kB of them would cost a page fault: a tenth
    to a quarter of the time of a step. Costs up to a quarter more memory, as it is less tightly packed.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_max, 0)  # large pieces too come from the memory that is kept


def lr_lambda(cycles):
    """Factor on the learning rate at a step: linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017).

    cycles: [(steps of warm-up, steps in all)], one after the other.
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


def progressive_size(epoch, epochs, image_size):
    """Side of the training images at an epoch: half, three quarters and the whole of `image_size`, a third each.

    Rounded up to a multiple of the network's stride; the last epoch always sees the whole size.
    """
    thirds_to_come = 3 * (epochs - 1 - epoch) // epochs
    share = PROGRESSIVE_SHARES[-1 - thirds_to_come]
    side = math.ceil(image_size * share / NETWORK_STRIDE) * NETWORK_STRIDE
    return min(max(side, SMALLEST_SIZE), image_size)


def resize(images, size):
    """(N, 3, H, W) uint8 -> (N, 3, size, size) uint8, antialiased."""
    if images.shape[-1] == size:
        return images
    resized = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.round_().to(torch.uint8)


class DeviceBatches:
    """The batches of a loader, brought to `device`: (images (N, 3, H, W) uint8, targets (N,) int64).

    Where they come with parameters of augmentation, they are augmented there. On a GPU each batch is copied and
    augmented on a stream of its own while the one before it is computed on.
    """

    def __init__(self, loader, device):
        self.loader, self.device = loader, device
        self._waited, self._gaps = 0.0, []

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        if self.device.type == "cuda":
            yield from self._copied_ahead()
            return
        started = time.perf_counter()
        for batch in self.loader:
            self._waited += time.perf_counter() - started
            yield self._to_device(batch)
            started = time.perf_counter()

    def seconds_waited(self):
        """For how long the device has had no batch to compute on. A GPU is let finish first."""
        if self._gaps:
            torch.cuda.synchronize(self.device)
            self._waited += sum(end.elapsed_time(begin) for end, begin in self._gaps) / 1e3
            self._gaps = []
        return self._waited

    def _to_device(self, batch):
        images, targets, *parameters = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        return augment_batch(images, *parameters) if parameters else images, targets

    def _copied_ahead(self):
        stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        end_of_step = _time_on(current)
        copied = None
        for batch in itertools.chain(self.loader, [None]):
            former = copied
            if batch is not None:
                with torch.cuda.stream(stream):
                    copied = self._to_device(batch), stream.record_event()
            if former is not None:
                tensors, arrived = former
                current.wait_event(arrived)
                for tensor in tensors:  # else the allocator could give its memory away while it is computed on
                    tensor.record_stream(current)
                self._gaps.append((end_of_step, _time_on(current)))
                yield tensors
                end_of_step = _time_on(current)


def _time_on(stream):
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


@contextmanager
def _naming_failures():
    """Say in one line what of the machine failed, and which flag helps."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(
                "--batch_size: the GPU's memory is too small; with half of it and twice the --grad_accum the steps "
                f"stay the same ({reason})"
            ) from error
        if "DataLoader worker" in reason:
            raise UserError(
                f"--num_workers: a loader worker has died, perhaps of too little memory ({reason}); go on from the "
                "last checkpoint with fewer"
            ) from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):  # named without importing them
            raise UserError(f"--compile: torch.compile does not work here ({reason}); leave it out") from error
        raise


class Mixer:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of torchvision; where both are on, one of them a batch.

    images: (N, 3, H, W) float -> (mixed images, share): image i is `share` of itself, the rest of image i - 1.
    """

    def __init__(self, mixup_alpha, cutmix_alpha):
        kinds = {v2.MixUp: mixup_alpha, v2.CutMix: cutmix_alpha}
        self.transform = v2.RandomChoice([kind(alpha=alpha) for kind, alpha in kinds.items() if alpha])

    def __call__(self, images):
        # each image a class of its own: so the shares can be read off, and any loss be mixed
        mixed, shares = self.transform(images, torch.eye(len(images)))
        return mixed, shares[0, 0].item()


def moving_average(decay):
    """For `AveragedModel`: the exponential moving average, whose decay rises to `decay` as (1 + t) / (10 + t).

    With `decay` from the first step t on, what is averaged would for hundreds of steps be the initial weights.
    """

    def update(averaged, current, steps):
        get_ema_multi_avg_fn(min(decay, (1 + int(steps)) / (10 + int(steps))))(averaged, current, steps)

    return update


@dataclass
class Engine:
    """A model with all that is needed to train and evaluate it on `device`, in `amp_dtype` (None: float32)."""

    model: torch.nn.Module
    criterion: torch.nn.Module
    device: torch.device
    amp_dtype: torch.dtype | None = None
    optimizer: torch.optim.Optimizer | None = None
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    clip_grad: float = 0.0  # largest norm of the gradient; 0: not clipped
    grad_accum: int = 1  # batches a step of the optimizer
    compile: bool = False
    mixer: Mixer | None = None
    ema: float = 0.0  # decay of the average of the weights that is evaluated instead of them; 0: none

    def __post_init__(self):
        self.model.to(self.device, memory_format=torch.channels_last)
        self.criterion.to(self.device)
        self.average = None
        if self.ema:
            self.average = AveragedModel(self.model, multi_avg_fn=moving_average(self.ema), use_buffers=True)
        if self.compile:
            self.model.compile()
        # scales the loss under float16 only, whose small gradients would vanish; elsewhere it does nothing
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)

    @property
    def evaluated(self):
        """The model that is evaluated and kept: the averaged one where there is one."""
        return self.average.module if self.average else self.model

    def forward(self, model, images):
        """images: (N, 3, H, W) on this device, as `Model` takes them -> logits: (N, C) float32."""
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            return model(images).float()

    def retrain_head(self, anew):
        """Classifier re-training (Kang et al. 2020): only the head is trained from now on, on what was evaluated."""
        if anew:
            if self.average:
                self.model.load_state_dict(self.average.module.state_dict())
                self.average.n_averaged.zero_()
            self.model.head.reset_parameters()
            for parameter in self.model.head.parameters():
                self.optimizer.state.pop(parameter, None)
        self.model.freeze_backbone()

    def load_initial_weights(self, state_dict, classes, own_classes):
        """See `Model`."""
        self.model.load_initial_weights(state_dict, classes, own_classes)
        if self.average:
            self.average.module.load_state_dict(self.model.state_dict())

    def check_weights(self):
        """Raise UserError if a weight is not finite any more: a step can do that behind a loss that was finite."""
        if not torch.nn.utils.get_total_norm(p.detach() for p in self.model.parameters()).isfinite():
            raise UserError(
                "the weights are not finite any more: the training has diverged; resume from the last checkpoint with "
                "a smaller --learning_rate"
            )

    @_naming_failures()
    def train_one_epoch(self, loader, figures, image_size=None, after_step=None):
        """-> {"train_loss", "train_acc", "images_per_second", "learning_rate" (of the last step), "input_wait"}.

        figures: the epoch's `RunningFigures`, new ones or of a part of the epoch that was trained before. image_size:
        side that the images are resized to; None: as they come. after_step: called after each step of the optimizer;
        it may raise to leave the epoch there. input_wait: the share of the time, 0..1, spent waiting for images.
        Raises UserError, naming epoch and step, when the loss is not finite.
        """
        self.model.train()
        batches = DeviceBatches(loader, self.device)
        seconds_before = figures.seconds
        started = time.perf_counter()
        bar = progress_bar(batches, f"epoch {figures.epoch}")
        for group in groups_of(bar, self.grad_accum):
            self._step(group, figures, image_size)
            figures.seconds = seconds_before + time.perf_counter() - started
            if figures.unchecked >= CHECK_EVERY:
                mean_loss = figures.check()
                rate = figures.images / figures.seconds
                bar.set_postfix_str(f"loss {mean_loss:.4f}, lr {figures.learning_rate:.2e}, {rate:.0f} images/s")
            if after_step:
                after_step()
        mean_loss = figures.check(last=True)
        seconds = time.perf_counter() - started
        figures.seconds = seconds_before + seconds
        return {
            "train_loss": mean_loss,
            "train_acc": figures.correct.item() / figures.images,
            "images_per_second": figures.images / figures.seconds,
            "learning_rate": figures.learning_rate,
            "input_wait": batches.seconds_waited() / seconds,
        }

    def _step(self, batches, figures, image_size):
        """One step of the optimizer with the mean gradient over all images of `batches`. Never makes a GPU wait."""
        figures.learning_rate = self.optimizer.param_groups[0]["lr"]
        figures.steps += 1
        group_size = sum(len(targets) for _, targets in batches)
        self.optimizer.zero_grad(set_to_none=True)
        for images, targets in batches:
            logits, loss = self._logits_and_loss(resize(images, image_size) if image_size else images, targets)
            self.scaler.scale(loss * (len(targets) / group_size)).backward()
            figures.add(loss, logits, targets)
        if self.clip_grad:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if self.average:
            self.average.update_parameters(self.model)

    def _logits_and_loss(self, images, targets):
        if self.mixer is None:
            logits = self.forward(self.model, images)
            return logits, self.criterion(logits, targets)
        images, share = self.mixer(self.model.normalise(images))
        logits = self.forward(self.model, images)
        others = targets.roll(1)
        return logits, share * self.criterion(logits, targets) + (1 - share) * self.criterion(logits, others)

    @torch.inference_mode()
    def loss_of(self, logits, targets):
        """(N, C), (N,) -> the mean loss, a plain number."""
        return self.criterion(logits.to(self.device), targets.to(self.device)).item()

    @_naming_failures()
    @torch.inference_mode()
    def evaluate(self, loader, name, after_batch=None, mirrored=False):
        """Every image once -> (mean loss, probabilities (N, C) float32 array, targets (N,) int64 array).

        after_batch: called after each batch; it may raise to leave. mirrored: test-time augmentation, the mean logits
        of each image and its mirror image.
        """
        model = self.evaluated.eval()
        batches = []
        for images, targets in progress_bar(DeviceBatches(loader, self.device), name):
            logits = self.forward(model, images)
            if mirrored:
                logits = (logits + self.forward(model, images.flip(-1))) / 2
            batches.append((logits, targets))
            if after_batch:
                after_batch()
        logits = torch.cat([logits for logits, _ in batches])
        targets = torch.cat([targets for _, targets in batches])
        loss = self.loss_of(logits, targets)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss on the images of {name} is {loss}: the model has diverged, or its file is damaged"
            )
        return loss, torch.softmax(logits, dim=1).cpu().numpy(), targets.cpu().numpy().astype(np.int64)


def groups_of(iterable, size):
    """Lists of `size` items, the last one of what is left."""
    iterator = iter(iterable)
    while group := list(itertools.islice(iterator, size)):
        yield group


POSITION = ("images", "batches", "loss", "correct", "seconds", "learning_rate")  # in an epoch, so far


class RunningFigures:
    """Sums over the batches of an epoch, kept on the device.

    Losses are brought over some batches at a time, one look later than they are asked for: a GPU need not stop for it.
    """

    def __init__(self, epoch, device, position=None):
        """position: of an epoch that was left in the middle, as `position()` gave it."""
        position = position or dict.fromkeys(POSITION, 0)
        self.epoch, self.steps = epoch, 0  # steps: of the optimizer, by this process
        self.images, self.seconds, self.learning_rate = (position[k] for k in ("images", "seconds", "learning_rate"))
        self.correct = torch.tensor(position["correct"], device=device)
        self.batches, self.loss = position["batches"], position["loss"]  # that were looked at
        self._unchecked, self._on_the_way = [], None
        self._checked_images = self.images

    def position(self):
        """-> what it takes to go on from here, as {name of POSITION: a plain number}. A GPU is let finish."""
        self.check(last=True)
        return {name: getattr(self, name) for name in POSITION} | {"correct": self.correct.item()}

    @property
    def unchecked(self):
        return len(self._unchecked)

    def add(self, loss, logits, targets):
        self._unchecked.append((loss.detach(), len(targets)))
        self.correct += (logits.detach().argmax(dim=1) == targets).sum()
        self.images += len(targets)

    def check(self, last=False):
        """-> the mean loss up to the look before this one, or of the whole epoch if it is the `last`.

        Raises UserError naming the first batch whose loss is not finite.
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
        copy.copy_(losses, non_blocking=True)
        arrived = torch.cuda.current_stream(losses.device).record_event() if losses.is_cuda else None
        self._on_the_way = copy, arrived, [size for _, size in self._unchecked]
        self._unchecked = []

    def _receive(self):
        if self._on_the_way is None:
            return
        losses, arrived, sizes = self._on_the_way
        if arrived is not None:
            arrived.synchronize()
        self._on_the_way = None
        for loss, size in zip(losses.tolist(), sizes, strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at epoch {self.epoch}, step {self.batches}: the training has diverged; "
                    "resume from the last checkpoint with a smaller --learning_rate"
                )
            self.loss += loss * size
            self._checked_images += size
            self.batches += 1
