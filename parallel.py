"""A training in several processes computes what a single one would: batch norm and dropout of the whole batch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from run.ranks import num_ranks, rank, share_of, statistics_group


class _SumOverRanks(torch.autograd.Function):
    """The sum of the tensors of all ranks. Its gradient is the sum of their gradients: all depend on each tensor."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=statistics_group())
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _SumOverRanks.forward(ctx, gradient)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all ranks, on any device; torch's own `SyncBatchNorm` refuses those of a CPU.

    images: (N, C, H, W), N may differ between ranks and be 0 -> as images. In training, mean and variance are those of
    the whole batch (Ioffe & Szegedy 2015, algorithm 1), combined from the ranks' (Chan et al. 1979, eq. 2.1).
    """

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        values = images.to(torch.promote_types(images.dtype, torch.float32))
        if len(images):
            variance, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
        else:  # zeros that take part in the backward pass, in which all ranks exchange gradients
            variance = mean = values.sum(dim=(0, 2, 3))
        # a row for each rank, of which the others are 0: the sum over ranks gathers them in one exchange
        rows = values.new_zeros(num_ranks(), 2 * self.num_features + 1)
        rows[rank()] = torch.cat([mean, variance, values.new_full((1,), values.numel() / self.num_features)])
        means, variances, counts = _SumOverRanks.apply(rows).split([self.num_features, self.num_features, 1], dim=1)
        total = counts.sum()
        common_mean = (counts / total * means).sum(dim=0)
        common_variance = (counts / total * (variances + (means - common_mean).square())).sum(dim=0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(common_mean, self.momentum)
            self.running_var.lerp_(common_variance * (total / (total - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(common_variance + self.eps)
        shift = self.bias - common_mean * scale
        return torch.addcmul(shift[:, None, None], values, scale[:, None, None]).to(images.dtype)


class SharedDropout(nn.Dropout):
    """Each rank's rows of the dropout mask of the whole batch, which all ranks draw alike.

    total: rows of the whole batch, set before each batch.
    """

    total = 0

    def forward(self, features: Tensor) -> Tensor:
        if not self.training or not self.p:
            return features
        start, stop = share_of(self.total)
        everything = torch.ones(self.total, *features.shape[1:], dtype=features.dtype, device=features.device)
        return features * F.dropout(everything, self.p)[start:stop]


def prepare(model: nn.Module, device: torch.device, sync_bn: bool) -> None:
    """Change, in place, what a `Model` computes from a whole batch."""
    model.dropout = SharedDropout(model.dropout.p)
    if not sync_bn:
        return
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model, statistics_group())
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d  # with the same parameters, buffers and settings


def average_gradients(model: nn.Module) -> DistributedDataParallel:
    """-> `model` as all ranks train it: in each backward pass, gradients become their mean over the ranks.

    Weights, and before each forward pass the running statistics of batch norm, are set to those of the first rank.
    To be called again when other parameters need gradients.
    """
    return DistributedDataParallel(
        model,
        gradient_as_bucket_view=True,
        # otherwise the first step rearranges the gradients, and then sums over ranks are rounded in another way: a
        # resumed training would differ from one that was not interrupted
        find_unused_parameters=True,
    )
