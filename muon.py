"""Muon: orthogonalized updates for convolution kernels, AdamW for all else."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration; steep at zero, so that few iterations are enough
ITERATIONS = 5
MOMENTUM = 0.95
RATE_RATIO = 10  # of the learning rate of orthogonalized updates to that of AdamW
MAX_SIDE = 256  # the smaller one of a kernel as a matrix; what is larger would cost most, and is left to AdamW


class Muon(torch.optim.AdamW):
    """Momentum with Newton-Schulz orthogonalization (Jordan et al. 2024) for kernels, AdamW for all else.

    A kernel (out, in, height, width) is updated as the matrix (out, height * width * in) if the smaller side of that is
    at most MAX_SIDE. All directions of the update have about the same length, also those that only few images
    contribute to. lr: that of AdamW; weight decay is by lr * weight_decay for kernels too.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, weight_decay: float, fused: bool):
        kernels, others = [], []
        for parameter in parameters:
            is_kernel = parameter.ndim == 4 and min(len(parameter), parameter[0].numel()) <= MAX_SIDE
            (kernels if is_kernel else others).append(parameter)
        super().__init__([{"params": others}, {"params": kernels}], lr=lr, weight_decay=weight_decay, fused=fused)
        # in float16, the scaler unscales the gradients, and leaves out a step that overflows; if that is the first one,
        # the schedule warns that it comes before the optimizer
        self._step_supports_amp_scaling = False
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step\\(\\)` before")

    @torch.no_grad()
    def step(self) -> None:
        """Uses up the gradients of kernels: they are None afterwards."""
        group = self.param_groups[1]
        kernels = [kernel for kernel in group["params"] if kernel.grad is not None]
        if kernels:
            self._step_kernels(kernels, group["lr"], group["weight_decay"])
        super().step()  # of all that still has a gradient

    def _step_kernels(self, kernels: Sequence[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        gradients = [kernel.grad for kernel in kernels]
        for kernel in kernels:
            if not self.state[kernel]:  # AdamW looks for a step when it loads a state
                self.state[kernel] = {"step": torch.zeros(()), "momentum": torch.zeros_like(kernel)}
        momenta = [self.state[kernel]["momentum"] for kernel in kernels]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov
        # channels last, as they are stored: nothing is copied
        matrices = [kernel.permute(0, 2, 3, 1).flatten(1) for kernel in ahead]
        steps = orthogonalize(matrices)
        torch._foreach_mul_(steps, [max(1, m.shape[0] / m.shape[1]) ** 0.5 for m in matrices])
        channels_last = [kernel.permute(0, 2, 3, 1) for kernel in kernels]
        torch._foreach_mul_(channels_last, 1 - lr * weight_decay)
        steps = [step.view(kernel.shape) for step, kernel in zip(steps, channels_last, strict=True)]
        torch._foreach_add_(channels_last, steps, alpha=-RATE_RATIO * lr)
        for kernel in kernels:
            kernel.grad = None


def orthogonalize(matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """matrices: of any shapes, float32. -> for each U S V^T of them about U V^T

    The singular values are from 0.68 to 1.21 if they were at least 0.002 of the norm, and smaller below that.
    Newton-Schulz iteration X <- (a + b XX^T + c (XX^T)^2) X (Jordan et al. 2024) from X / |X|, computed on XX^T or, if
    that is smaller, X^T X; those of the same size in one go, as a GPU would wait for many small ones.
    """
    by_side = defaultdict(list)
    for number, matrix in enumerate(matrices):
        by_side[min(matrix.shape)].append(number)
    results = list(matrices)
    for numbers in by_side.values():
        alike = [matrices[number] for number in numbers]
        products = _product_of_iterations(torch.stack([m @ m.T if _is_wide(m) else m.T @ m for m in alike]))
        for number, product, matrix in zip(numbers, products, alike, strict=True):
            results[number] = product @ matrix if _is_wide(matrix) else matrix @ product
    return results


def _is_wide(matrix):
    return matrix.shape[0] <= matrix.shape[1]


def _product_of_iterations(grams: torch.Tensor) -> torch.Tensor:
    """grams: (N, side, side) XX^T or X^T X -> (N, side, side) what X is multiplied by to become orthogonal"""
    squared_norms = grams.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-14).view(-1, 1, 1)  # 0 if all gradients are
    grams, product = grams / squared_norms, None
    a, b, c = COEFFICIENTS
    for number in range(ITERATIONS):
        factors = torch.baddbmm(grams, grams, grams, beta=b, alpha=c)
        factors.diagonal(dim1=1, dim2=2).add_(a)
        product = factors if product is None else factors @ product
        if number < ITERATIONS - 1:
            grams = factors @ grams @ factors
    return product / squared_norms.sqrt()
