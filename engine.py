"""One epoch of training and one pass of evaluation, on whatever device; they share their forward pass."""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from files import UserError, progress_bar

CHECK_EVERY = 10  # steps between looks at the loss: each look makes a GPU wait


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


def lr_lambda(warmup_steps, total_steps):
    """Factor on the learning rate at a step: linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017)."""

    def factor(step):
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


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

    def __post_init__(self):
        self.model.to(self.device, memory_format=torch.channels_last)
        self.criterion.to(self.device)
        # scales the loss under float16 only, whose small gradients would vanish; elsewhere it does nothing
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)

    def forward(self, images):
        """images: (N, 3, H, W) uint8 on any device -> logits: (N, C) float32 on this one."""
        images = images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            return self.model(images).float()

    def train_one_epoch(self, loader, epoch):
        """-> {"train_loss", "train_acc", "images_per_second", "learning_rate" (of the last step)}.

        Raises UserError, naming epoch and step, when the loss is not finite.
        """
        self.model.train()
        figures = RunningFigures(epoch, self.device)
        started = time.perf_counter()
        bar = progress_bar(loader, f"epoch {epoch}")
        for step, (images, targets) in enumerate(bar):
            targets = targets.to(self.device, non_blocking=True)
            logits = self.forward(images)
            loss = self.criterion(logits, targets)
            learning_rate = self.optimizer.param_groups[0]["lr"]
            self._update_weights(loss)
            figures.add(loss, logits, targets)
            if (step + 1) % CHECK_EVERY == 0 or step + 1 == len(loader):
                mean_loss = figures.check()
                rate = figures.images / (time.perf_counter() - started)
                bar.set_postfix_str(f"loss {mean_loss:.4f}, lr {learning_rate:.2e}, {rate:.0f} images/s")
        return {
            "train_loss": figures.loss / figures.images,
            "train_acc": figures.correct.item() / figures.images,
            "images_per_second": figures.images / (time.perf_counter() - started),
            "learning_rate": learning_rate,
        }

    def _update_weights(self, loss):
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.clip_grad:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()

    @torch.inference_mode()
    def evaluate(self, loader, name):
        """Every image once -> (mean loss, probabilities (N, C) float32 array, targets (N,) int64 array)."""
        self.model.eval()
        batches = [(self.forward(images), targets) for images, targets in progress_bar(loader, name)]
        logits = torch.cat([logits for logits, _ in batches])
        targets = torch.cat([targets for _, targets in batches])
        loss = self.criterion(logits, targets.to(self.device)).item()
        if not math.isfinite(loss):
            raise UserError(
                f"the loss on the images of {name} is {loss}: the model has diverged, or its file is damaged"
            )
        return loss, torch.softmax(logits, dim=1).cpu().numpy(), targets.numpy().astype(np.int64)


class RunningFigures:
    """Sums over the steps of an epoch, kept on the device; `check` brings the losses over, some steps at a time."""

    def __init__(self, epoch, device):
        self.epoch, self.loss, self.images, self.steps = epoch, 0.0, 0, 0
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self._unchecked = []

    def add(self, loss, logits, targets):
        self._unchecked.append((loss.detach(), len(targets)))
        self.correct += (logits.detach().argmax(dim=1) == targets).sum()
        self.images += len(targets)

    def check(self):
        """-> the mean loss so far. Raises UserError naming the first step since the last check that is not finite."""
        losses = torch.stack([loss for loss, _ in self._unchecked]).tolist()
        for loss, (_, size) in zip(losses, self._unchecked, strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at epoch {self.epoch}, step {self.steps}: the training has diverged; "
                    "resume from the last checkpoint with a smaller --learning_rate"
                )
            self.loss += loss * size
            self.steps += 1
        self._unchecked.clear()
        return self.loss / self.images
