"""Dilated depthwise convolutions on a CPU, several times faster than torch's own: those of every DeepLabv3+'s pyramid.

oneDNN has no quick backward pass for them: docs/step.md has the milliseconds. GPUs do not need this.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cps_ray.engine.phases import in_phases

# N images, C channels, H W cells of the map; K x K weights for each channel. A tensor's name ends in its dims.
Place = tuple[slice, slice]
"""Rows and columns of a map."""


def dilated_depthwise(x_NCHW: Tensor, weight_C1KK: Tensor, dilation: int) -> Tensor:
    """The same as `F.conv2d(x, weight, padding=dilation * (K // 2), dilation=dilation, groups=C)` to float tolerance.

    Float (N, C, H, W) of any size -> (N, C, H, W); `weight` (C, 1, K, K) with K odd. Issue 4.
    """
    if torch.is_autocast_enabled(x_NCHW.device.type):  # as it does with convolutions
        dtype = torch.get_autocast_dtype(x_NCHW.device.type)
        x_NCHW, weight_C1KK = x_NCHW.to(dtype), weight_C1KK.to(dtype)
    kernel, cells = weight_C1KK.shape[-2:], x_NCHW.shape[-2:]
    if all(-(-cell // dilation) >= size for cell, size in zip(cells, kernel, strict=True)):
        return _by_phases(x_NCHW, weight_C1KK, dilation)
    return _ByTaps.apply(x_NCHW, weight_C1KK, dilation)  # type: ignore[no-any-return, no-untyped-call]


def _by_phases(x_NCHW: Tensor, weight_C1KK: Tensor, dilation: int) -> Tensor:
    padding = (weight_C1KK.shape[-2] // 2, weight_C1KK.shape[-1] // 2)
    return in_phases(lambda x: F.conv2d(x, weight_C1KK, padding=padding, groups=len(weight_C1KK)), x_NCHW, dilation)


class _ByTaps(torch.autograd.Function):
    """Weight by weight, on that part of the map where both ends of its reach lie: small where the dilation is near the map's size."""

    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, weight_C1KK: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x_NCHW, weight_C1KK)
        ctx.dilation = dilation
        y_NCHW = x_NCHW * _centre(weight_C1KK)
        for row, column, (there, here) in _taps(x_NCHW, weight_C1KK, dilation):
            y_NCHW[:, :, *there].addcmul_(x_NCHW[:, :, *here], weight_C1KK[:, 0, row, column, None, None])
        return y_NCHW

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_NCHW,), (x_NCHW, weight_C1KK) = grads, ctx.saved_tensors
        grad_x, grad_weight = grad_NCHW * _centre(weight_C1KK), torch.zeros_like(weight_C1KK)
        _centre(grad_weight).copy_((grad_NCHW * x_NCHW).sum(dim=(0, 2, 3))[:, None, None])
        for row, column, (there, here) in _taps(x_NCHW, weight_C1KK, ctx.dilation):
            grad = grad_NCHW[:, :, *there]
            grad_x[:, :, *here].addcmul_(grad, weight_C1KK[:, 0, row, column, None, None])
            grad_weight[:, 0, row, column] = (grad * x_NCHW[:, :, *here]).sum(dim=(0, 2, 3))
        return grad_x, grad_weight, None


def _centre(weight_C1KK: Tensor) -> Tensor:
    """The weight that moves nothing: (C, 1, 1)."""
    row, column = (size // 2 for size in weight_C1KK.shape[-2:])
    return weight_C1KK[:, 0, row, column, None, None]


def _taps(x_NCHW: Tensor, weight_C1KK: Tensor, dilation: int) -> Iterator[tuple[int, int, tuple[Place, Place]]]:
    """(row, column) of each weight off the centre that meets the map anywhere, and the cells that it moves: (to, from)."""
    for row, (to_rows, from_rows) in _spans(x_NCHW.shape[-2], weight_C1KK.shape[-2], dilation):
        for column, (to_columns, from_columns) in _spans(x_NCHW.shape[-1], weight_C1KK.shape[-1], dilation):
            if (to_rows, to_columns) != (from_rows, from_columns):
                yield row, column, ((to_rows, to_columns), (from_rows, from_columns))


def _spans(cells: int, size: int, dilation: int) -> Iterator[tuple[int, tuple[slice, slice]]]:
    for place in range(size):
        shift = (place - size // 2) * dilation
        if abs(shift) < cells:
            ahead, behind = max(0, shift), max(0, -shift)
            yield place, (slice(behind, cells - ahead), slice(ahead, cells - behind))
