"""Muon: its steps for kernels, AdamW's for all else, and its state."""

import warnings

import pytest
import torch

import muon
from muon import Muon, orthogonalize

SHAPES = ((64, 3, 7, 7), (32, 16, 3, 3), (16, 64, 1, 1), (64, 16, 1, 1))
LARGE = (muon.MAX_SIDE + 1, muon.MAX_SIDE + 1, 1, 1)


def parameters_of(*shapes):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    channels_last = [v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for v in values]
    return [torch.nn.Parameter(value) for value in channels_last]


def take_steps(optimizer, parameters, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.contiguous(memory_format=torch.channels_last) if gradient.ndim == 4 else gradient
        optimizer.step()


def test_kernels_take_the_steps_of_torchs_muon_for_matrices():
    """Which computes in bfloat16: the update has an error of about 1 %."""
    kernels = parameters_of(*SHAPES)
    before = [kernel.detach().clone() for kernel in kernels]
    matrices = [torch.nn.Parameter(kernel.detach().flatten(1).clone()) for kernel in kernels]
    lr, weight_decay = 1e-3, 0.5
    ours = Muon(kernels, lr=lr, weight_decay=weight_decay, fused=True)
    decay = weight_decay / muon.RATE_RATIO  # torch multiplies it by the learning rate of the orthogonal steps
    theirs = torch.optim.Muon(matrices, lr=lr * muon.RATE_RATIO, weight_decay=decay, momentum=muon.MOMENTUM)
    for seed in range(4):
        take_steps(ours, kernels, [seed])
        generator = torch.Generator().manual_seed(seed)
        for matrix, kernel in zip(matrices, kernels, strict=True):
            matrix.grad = torch.randn(kernel.shape, generator=generator).flatten(1)
        theirs.step()
    for kernel, matrix, start in zip(kernels, matrices, before, strict=True):
        moved = (matrix.detach().view(kernel.shape) - start).norm()
        assert (kernel.detach() - matrix.detach().view(kernel.shape)).norm() < 0.02 * moved


def test_all_else_takes_the_steps_of_adamw():
    shapes = [(7,), (5, 8), LARGE]
    ours, theirs, kernels = parameters_of(*shapes), parameters_of(*shapes), parameters_of(*SHAPES)
    settings = {"lr": 1e-3, "weight_decay": 0.1, "fused": True}
    take_steps(Muon([*ours, *kernels], **settings), [*ours, *kernels], range(3))
    take_steps(torch.optim.AdamW(theirs, **settings), theirs, range(3))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (30, 30)])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    (result,) = orthogonalize([matrix])
    singular_values = u.T @ result @ vh.T
    values = singular_values.diagonal()
    assert result.shape == shape and values.min() > 0.6 and values.max() < 1.25
    assert (singular_values - values.diag()).abs().max() < 1e-3


def test_rare_directions_count_as_much_as_frequent_ones():
    """A gradient with singular values of 1 and 0.01 has a step of about the same length in both directions."""
    gradient = torch.zeros(2, 5)
    gradient[0, 0], gradient[1, 3] = 1.0, 0.01
    (step,) = orthogonalize([gradient])
    assert 0.6 < step[0, 0] < 1.25 and 0.6 < step[1, 3] < 1.25


@pytest.mark.parametrize("shape", [(64, 576), (64, 64), (256, 64)])
def test_noise_beside_one_strong_direction_is_not_blown_up(shape):
    """The Gram matrix has the squares of the singular values: rounding errors must not count as directions."""
    generator = torch.Generator().manual_seed(0)
    strong = torch.outer(torch.randn(shape[0], generator=generator), torch.randn(shape[1], generator=generator))
    (step,) = orthogonalize([strong + 1e-4 * torch.randn(shape, generator=generator)])
    assert torch.linalg.matrix_norm(step, 2) < 1.25


def test_what_is_orthogonalized_together_is_what_each_alone_would_be():
    matrices = [parameter.detach().flatten(1) for parameter in parameters_of(*SHAPES, (64, 64, 1, 1))]
    for together, matrix in zip(orthogonalize(matrices), matrices, strict=True):
        assert torch.allclose(together, orthogonalize([matrix])[0], atol=1e-4)


def test_a_gradient_of_zeros_leaves_a_kernel_where_it_is():
    (kernel,) = parameters_of((8, 8, 1, 1))
    before = kernel.detach().clone()
    kernel.grad = torch.zeros_like(kernel)
    Muon([kernel], lr=1e-3, weight_decay=0, fused=True).step()
    assert torch.equal(kernel, before)


def test_frozen_kernels_stay():
    frozen, kernel = parameters_of((8, 8, 1, 1), (8, 8, 1, 1))
    before = frozen.detach().clone()
    take_steps(Muon([frozen, kernel], lr=1e-3, weight_decay=0.1, fused=True), [kernel], range(2))
    assert torch.equal(frozen, before) and not torch.equal(kernel, before)


def test_a_saved_state_goes_on_bit_for_bit():
    shapes = [*SHAPES, LARGE, (9,)]
    settings = {"lr": 1e-3, "weight_decay": 0.1, "fused": True}
    whole = parameters_of(*shapes)
    take_steps(Muon(whole, **settings), whole, range(4))
    first = parameters_of(*shapes)
    optimizer = Muon(first, **settings)
    take_steps(optimizer, first, range(2))
    second = [torch.nn.Parameter(parameter.detach().clone()) for parameter in first]
    resumed = Muon(second, **settings)
    resumed.load_state_dict(optimizer.state_dict())
    take_steps(resumed, second, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_an_overflow_of_float16_leaves_weights_and_momentum_as_they_are():
    parameters = parameters_of((8, 8, 1, 1), (8,))
    before = [parameter.detach().clone() for parameter in parameters]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the scheduler must not complain about the first step, which is left out
        optimizer, scaler = Muon(parameters, lr=1e-3, weight_decay=0.1, fused=True), torch.amp.GradScaler("cpu")
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1)
        scaler.scale(parameters[0].sum() * torch.inf + parameters[1].sum()).backward()
        scaler.step(optimizer)
        scheduler.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True)) and not optimizer.state
