"""Dilated depthwise convolutions on a CPU, several times faster than torch's own: those of every DeepLabv3+'s pyramid.

oneDNN has no fast backward pass for them: docs/step.md has the milliseconds. GPUs do not need this.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# N images, C channels, H W cells of the map; K x K weights for each channel. A tensor's name ends in its dims.
Region = tuple[slice, slice]
"""Rows and columns of a map."""
_MOST_PADDED = 1.7
"""Cells of all phases, by those of the map, up to which phases are faster than taps. Measured: 0.5 of the time at 1.56, 1.3 to 1.8 times as long from
1.8 on."""


def use_cpu_kernels(network: nn.Module) -> None:
    """Lets the dilated depthwise convolutions of a network that keep the map's size be computed here.

    Layers keep their weights and their names, and their results to float tolerance.
    """
    for layer in network.modules():
        # The exact type: a subclass, such as timm's with "same" padding, does more than its settings say.
        if type(layer) is nn.Conv2d and _is_dilated_depthwise(layer) and _keeps_size(layer):
            layer.__class__ = _DilatedDepthwise


class _DilatedDepthwise(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return dilated_depthwise(input, self.weight, self.dilation[0])


def _is_dilated_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels and conv.dilation[0] > 1


def _keeps_size(conv: nn.Conv2d) -> bool:
    same = all(
        size % 2 == 1 and padding == step * (size // 2)
        # `padding` may be a word ("same"), of which zip then makes letters: they equal no number.
        for size, padding, step in zip(conv.kernel_size, conv.padding, conv.dilation, strict=False)
    )
    even = conv.dilation[0] == conv.dilation[1] and conv.stride == (1, 1)
    return same and even and conv.padding_mode == "zeros" and conv.bias is None


def dilated_depthwise(x_NCHW: Tensor, weight_C1KK: Tensor, dilation: int) -> Tensor:
    """The same as `F.conv2d(x, weight, padding=dilation * (K // 2), dilation=dilation, groups=C)` to float tolerance.

    Float (N, C, H, W) of any size -> (N, C, H, W); `weight` (C, 1, K, K) with K odd.
    """
    # Autocast knows torch's own operations by name; ours has to follow it by itself, as a convolution would.
    if torch.is_autocast_enabled(x_NCHW.device.type):
        dtype = torch.get_autocast_dtype(x_NCHW.device.type)
        x_NCHW, weight_C1KK = x_NCHW.to(dtype), weight_C1KK.to(dtype)
    height, width = x_NCHW.shape[-2:]
    tall, wide = _phase(x_NCHW, weight_C1KK, dilation)
    # Where phases would be mostly padding, most weights meet no cell, and taps skip those.
    if tall * wide * dilation**2 <= _MOST_PADDED * height * width:
        return _by_phases(x_NCHW, weight_C1KK, dilation)
    return _ByTaps.apply(x_NCHW, weight_C1KK, dilation)  # type: ignore[no-any-return, no-untyped-call]


def _phase(x_NCHW: Tensor, weight_C1KK: Tensor, dilation: int) -> tuple[int, int]:
    """(height, width) of a phase: at least those of the kernel, since oneDNN is slow on smaller maps."""
    sides = zip(x_NCHW.shape[-2:], weight_C1KK.shape[-2:], strict=True)
    tall, wide = (max(-(-cells // dilation), size) for cells, size in sides)
    return tall, wide


def _by_phases(x_NCHW: Tensor, weight_C1KK: Tensor, dilation: int) -> Tensor:
    """Cells that lie a multiple of the dilation apart make a map of their own, a phase, on which the convolution is not dilated.

    dilation**2 small maps in place of a large one; torch's undilated kernel, forward and backward, is fast on them.
    """
    padding = (weight_C1KK.shape[-2] // 2, weight_C1KK.shape[-1] // 2)
    (images, channels, height, width), step = x_NCHW.shape, dilation
    tall, wide = _phase(x_NCHW, weight_C1KK, dilation)
    if (tall * step, wide * step) != (height, width):
        x_NCHW = F.pad(x_NCHW, (0, wide * step - width, 0, tall * step - height))
    # (N, H, W, C) -> (N, row in phase, phase, column in phase, phase, C) -> phases beside the images; channels stay last in memory.
    phases = x_NCHW.permute(0, 2, 3, 1).reshape(images, tall, step, wide, step, channels).permute(0, 2, 4, 1, 3, 5)
    phases = phases.reshape(-1, tall, wide, channels).permute(0, 3, 1, 2)
    phases = F.conv2d(phases, weight_C1KK, padding=padding, groups=channels)
    y = phases.permute(0, 2, 3, 1).reshape(images, step, step, tall, wide, channels).permute(0, 3, 1, 4, 2, 5)
    return y.reshape(images, tall * step, wide * step, channels)[:, :height, :width].permute(0, 3, 1, 2)


class _ByTaps(torch.autograd.Function):
    """Computes weight by weight, on that part of the map where both ends of its reach lie: small where the dilation is near the
    map's size. With y[p] = sum over taps of w * x[p + shift], the gradients are grad_x[p + shift] += w * grad[p] and
    grad_w = sum over p of grad[p] * x[p + shift]."""

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
        """Returns the gradients by x and by the weights; none by the dilation."""
        (grad_NCHW,), (x_NCHW, weight_C1KK) = grads, ctx.saved_tensors
        grad_x, grad_weight = grad_NCHW * _centre(weight_C1KK), torch.zeros_like(weight_C1KK)
        _centre(grad_weight).copy_((grad_NCHW * x_NCHW).sum(dim=(0, 2, 3))[:, None, None])
        for row, column, (there, here) in _taps(x_NCHW, weight_C1KK, ctx.dilation):
            grad = grad_NCHW[:, :, *there]
            grad_x[:, :, *here].addcmul_(grad, weight_C1KK[:, 0, row, column, None, None])
            grad_weight[:, 0, row, column] = (grad * x_NCHW[:, :, *here]).sum(dim=(0, 2, 3))
        return grad_x, grad_weight, None


def _centre(weight_C1KK: Tensor) -> Tensor:
    """The middle weight of each kernel, whose shift is 0: (C, 1, 1)."""
    row, column = (size // 2 for size in weight_C1KK.shape[-2:])
    return weight_C1KK[:, 0, row, column, None, None]


def _taps(x_NCHW: Tensor, weight_C1KK: Tensor, dilation: int) -> Iterator[tuple[int, int, tuple[Region, Region]]]:
    """(row, column) of each weight off the centre that meets the map anywhere, and the regions that it connects: (to, from)."""
    for row, (to_rows, from_rows) in _spans(x_NCHW.shape[-2], weight_C1KK.shape[-2], dilation):
        for column, (to_columns, from_columns) in _spans(x_NCHW.shape[-1], weight_C1KK.shape[-1], dilation):
            if (to_rows, to_columns) != (from_rows, from_columns):
                yield row, column, ((to_rows, to_columns), (from_rows, from_columns))


def _spans(cells: int, size: int, dilation: int) -> Iterator[tuple[int, tuple[slice, slice]]]:
    """The same along one side: position in the kernel, and where the shifted side overlaps itself: (to, from)."""
    for position in range(size):
        shift = (position - size // 2) * dilation
        if abs(shift) < cells:
            ahead, behind = max(0, shift), max(0, -shift)
            yield position, (slice(behind, cells - ahead), slice(ahead, cells - behind))
