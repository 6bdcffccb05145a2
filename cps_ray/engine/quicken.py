"""Layers as a CPU computes them fastest: docs/step.md has the milliseconds. GPUs do not need this.

Layers keep their weights and their names, and their results to float tolerance.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cps_ray.engine.depthwise import dilated_depthwise
from cps_ray.engine.winograd import pays, winograd


def quicken(network: nn.Module) -> None:
    """Lets wide 3x3 convolutions and dilated depthwise ones that keep the map's size be computed by our own code, keeps tensors
    channels_last where torch loses that, and overwrites what a batch norm made for the ReLU behind it."""
    for layer in network.modules():
        if type(layer) is nn.Conv2d and _keeps_size(layer):
            if layer.groups == 1 and layer.kernel_size == (3, 3):
                layer.__class__ = _Wide
            elif layer.groups == layer.in_channels == layer.out_channels and layer.dilation[0] > 1:
                layer.__class__ = _DilatedDepthwise
        elif type(layer) is nn.Upsample:
            layer.register_forward_hook(_gradient_last)
        elif type(layer).__name__ == "ASPPPooling":  # smp's, which takes seconds to import
            layer.register_forward_hook(_last)
        elif isinstance(layer, nn.Sequential):
            for norm, act in pairwise(layer):
                if isinstance(norm, nn.BatchNorm2d) and type(act) is nn.ReLU:
                    act.inplace = True


def _keeps_size(conv: nn.Conv2d) -> bool:
    same = all(
        size % 2 == 1 and padding == step * (size // 2)
        # `padding` may be a word, which is then not covered.
        for size, padding, step in zip(conv.kernel_size, conv.padding, conv.dilation, strict=False)
    )
    even = conv.dilation[0] == conv.dilation[1] and conv.stride == (1, 1)
    return same and even and conv.padding_mode == "zeros" and conv.bias is None


class _DilatedDepthwise(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return dilated_depthwise(input, self.weight, self.dilation[0])


class _Wide(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type) or not pays(input.shape, self.weight.shape, self.dilation[0]):
            return super().forward(input)
        return winograd(input, self.weight, self.dilation[0])


def _gradient_last(_: nn.Module, inputs: Any, out: Tensor) -> None:
    """What is upsampled is then concatenated, so that its gradient comes as a slice: torch's backward is 10 times slower on it."""
    if out.requires_grad and _is_last(inputs[0]):
        out.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))  # type: ignore[no-untyped-call]


def _last(_: nn.Module, inputs: Any, out: Tensor) -> Tensor:
    """Upsampling a single cell gives a map whose channels lie first; what it is concatenated with would be copied, there and back."""
    return out.contiguous(memory_format=torch.channels_last) if _is_last(inputs[0]) else out


def _is_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
