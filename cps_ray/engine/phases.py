"""A dilated convolution as an undilated one."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def in_phases(convolve: Callable[[Tensor], Tensor], x_NCHW: Tensor, dilation: int) -> Tensor:
    """Cells that lie a multiple of the dilation apart make a map of their own, on which the convolution is not dilated.

    (N, C, H, W) -> (N, O, H, W), where `convolve` takes (M, C, h, w) to (M, O, h, w) and pads with zeros.
    """
    if dilation == 1:
        return convolve(x_NCHW)
    (images, channels, height, width), step = x_NCHW.shape, dilation
    tall, wide = -(-height // step), -(-width // step)
    if (tall * step, wide * step) != (height, width):
        x_NCHW = F.pad(x_NCHW, (0, wide * step - width, 0, tall * step - height))
    phases = x_NCHW.permute(0, 2, 3, 1).reshape(images, tall, step, wide, step, channels).permute(0, 2, 4, 1, 3, 5)
    phases = convolve(phases.reshape(-1, tall, wide, channels).permute(0, 3, 1, 2))
    y = phases.permute(0, 2, 3, 1).reshape(images, step, step, tall, wide, -1).permute(0, 3, 1, 4, 2, 5)
    return y.reshape(images, tall * step, wide * step, -1)[:, :height, :width].permute(0, 3, 1, 2)
