"""Batch norm over all ranks that train the same network. On GPUs torch's own; torch has none for CPUs, so gloo workers get the one below.

With it a training gives the same curve on one worker and on many, on CPU as on GPU.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class _SumOverRanks(torch.autograd.Function):
    """Sums over ranks, with gradient: every rank's loss depends on every rank's input, so the gradients are summed, too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone()  # all_reduce overwrites, and autograd forbids that for an input
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _sum(tensor: Tensor, group: Any) -> Tensor:
    return _SumOverRanks.apply(tensor, group)  # type: ignore[no-any-return, no-untyped-call]


def _normalise(norm: nn.BatchNorm2d, x_BCHW: Tensor, group: Any) -> Tensor:
    """Normalises with mean and variance over the images of all ranks; in two passes, for accuracy."""
    if not norm.training:
        return F.batch_norm(x_BCHW, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    x = x_BCHW.float()  # sums of half-precision values would lose small ones
    count = x.numel() / x.shape[1] * dist.get_world_size(group)
    mean_C = _sum(x.sum(dim=(0, 2, 3)), group) / count
    centred = x - mean_C.view(1, -1, 1, 1)
    variance_C = _sum(centred.square().sum(dim=(0, 2, 3)), group) / count
    if norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None:
        with torch.no_grad():
            norm.running_mean.lerp_(mean_C, norm.momentum)
            # Running variance is the unbiased one, as in torch; the batch is normalised by the biased one.
            norm.running_var.lerp_(variance_C * (count / max(count - 1, 1)), norm.momentum)
    out = centred * torch.rsqrt(variance_C + norm.eps).view(1, -1, 1, 1)
    if norm.affine:
        out = out * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    return out.to(x_BCHW.dtype)


class _CpuSyncBatchNorm(nn.BatchNorm2d):
    group: Any = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out = _normalise(self, x_BCHW, self.group)
        # timm's BatchNormAct2d carries its dropout and activation inside the norm.
        for name in ("drop", "act"):
            out = getattr(self, name)(out) if hasattr(self, name) else out
        return out


def synchronise(network: nn.Module, device: torch.device, group: Any) -> nn.Module:
    """Returns the network with batch norms taken over the ranks of a process group (None: all). Parameters and buffers keep
    their names."""
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm  # knows timm's fused norm-and-activation layers

        return convert_sync_batchnorm(network, group)  # type: ignore[no-any-return]
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            # In place: a new module would change the order of parameters, and lose what timm's subclass has beside them.
            module.__class__ = _CpuSyncBatchNorm
            module.group = group
    return network
