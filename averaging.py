"""The moving average of the weights (`--ema`)."""

import copy
import itertools

import torch


class MovingAverage:
    """Exponential moving average of a model's weights; at step t, its decay is min(decay, (1 + t) / (10 + t)).

    With `decay` from the first step on, the average would stay close to the initial weights for hundreds of steps.
    Running statistics of batch norm are averaged too; its counters, which are integers, are copied. An update launches
    a few kernels for all weights together, and never waits for a GPU.

    model: the averaged model; steps: the number of steps averaged over.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        """model: on its device already; from now on its weights are only changed in place."""
        self.model, self.decay, self.steps = copy.deepcopy(model), decay, 0
        self._floats, self._integers = ([_tensors(m, kind) for m in (self.model, model)] for kind in (True, False))

    @torch.no_grad()
    def update(self) -> None:
        """Include the present weights of the model. The first step copies them."""
        if self.steps == 0:
            torch._foreach_copy_(*self._floats)
        else:
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(*self._floats, 1 - decay)
        if self._integers[0]:
            torch._foreach_copy_(*self._integers)
        self.steps += 1


def _tensors(model, is_float):
    """-> parameters and buffers of `model` that are, or are not, of a floating-point type"""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point() == is_float]
