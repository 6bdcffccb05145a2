"""Wide 3x3 convolutions on a CPU by Winograd's algorithm: 36 products where the definition has 144, forward and back.

F(4x4, 3x3) of Lavin and Gray, "Fast algorithms for convolutional neural networks", CVPR 2016: a tile of 4x4 results is got from 6x6
cells by 36 products for each pair of channels, as matrix products over all tiles. Its polynomials are evaluated at points that keep
float32's rounding near that of the definition (Barabasz et al., "Error analysis and improving the accuracy of Winograd
convolution", 2020, choose points for it; these are the best of those that we measured, docs/step.md).
"""

from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from cps_ray.engine.phases import in_phases

# N images, C and O channels in and out, H W cells of the map, h w tiles of it, T = N * h * w; U, V, M are the
# paper's: weights, cells and products where polynomials are given by their values.
_TILE, _REACH = 4, 6
_POINTS = (0.0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)
"""And infinity."""
_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
_NARROW, _WIDE = (160, 160) if _AVX512 else (64, 128)
"""Channels from which it is worth it for the gradient by the weights, and for all. oneDNN is quicker with AVX512, backward most of all."""
_PART = 128
"""Output channels computed at a time."""
_WASTE = 1.6
"""Cells that tiles cover, by the map's: from there on it is not."""
_TILES = 64
"""Of all images together, from which the products outweigh the work on the weights."""


def pays(cells: torch.Size, weights: torch.Size, dilation: int) -> bool:
    """Whether `winograd` is the faster one for maps (N, C, H, W) and weights (O, C, 3, 3), as measured: docs/step.md."""
    images, _, height, width = cells
    tall, wide = (ceil(ceil(side / dilation) / _TILE) for side in (height, width))
    tiles = dilation**2 * tall * wide
    small = images * tiles < _TILES or min(weights[:2]) < _NARROW
    return not small and tiles * _TILE**2 <= _WASTE * height * width


def winograd(x_NCHW: Tensor, weight_OC33: Tensor, dilation: int = 1) -> Tensor:
    """The same as `F.conv2d(x, weight, padding=dilation, dilation=dilation)` to float tolerance.

    Float (N, C, H, W) of any size -> (N, O, H, W), of the same type. Issue 4.
    """
    return in_phases(lambda phases: _Winograd.apply(phases, weight_OC33), x_NCHW, dilation)  # type: ignore[no-untyped-call]


class _Winograd(torch.autograd.Function):
    """Linear in each of its arguments, so that backward consists of the same matrices, transposed. It keeps nothing but the arguments."""

    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, weight_OC33: Tensor) -> Tensor:
        ctx.save_for_backward(x_NCHW, weight_OC33)
        if _narrow(weight_OC33):
            return F.conv2d(x_NCHW, weight_OC33, padding=1)
        *_, height, width = x_NCHW.shape
        _, _, to_results = _transforms(x_NCHW.dtype)
        v_36TC, (images, tall, wide) = _values(x_NCHW)
        y_Nh4w4O = x_NCHW.new_empty(images, tall, _TILE, wide, _TILE, len(weight_OC33))
        for part in _parts(weight_OC33):
            m_36TO = torch.bmm(v_36TC, _weights(weight_OC33[part]).transpose(1, 2))
            y_44NhwO = (to_results @ m_36TO.flatten(1)).view(_TILE, _TILE, images, tall, wide, -1)
            y_Nh4w4O[..., part] = y_44NhwO.permute(2, 3, 0, 4, 1, 5)
        y_NHWO = y_Nh4w4O.view(images, tall * _TILE, wide * _TILE, -1)[:, :height, :width]
        return y_NHWO.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad_NOHW,), (x_NCHW, weight_OC33) = grads, ctx.saved_tensors
        *_, height, width = x_NCHW.shape
        of_cells, of_weights, to_results = _transforms(x_NCHW.dtype)
        v_36TC, (images, tall, wide) = _values(x_NCHW)
        over = (0, 0, 0, wide * _TILE - width, 0, tall * _TILE - height)
        grad_44NhwO = F.pad(grad_NOHW.permute(0, 2, 3, 1), over).view(images, tall, _TILE, wide, _TILE, -1)
        grad_44NhwO = grad_44NhwO.permute(2, 4, 0, 1, 3, 5)
        grad_weight_OC33 = torch.empty_like(weight_OC33)
        grad_v_36TC = None if _narrow(weight_OC33) else torch.zeros_like(v_36TC)
        for part in _parts(weight_OC33):
            grad_m_36TO = (to_results.T @ grad_44NhwO[..., part].reshape(_TILE**2, -1)).view(*v_36TC.shape[:2], -1)
            grad_u_36OC = torch.bmm(grad_m_36TO.transpose(1, 2), v_36TC)
            grad_33OC = (of_weights.T @ grad_u_36OC.flatten(1)).view(3, 3, *grad_u_36OC.shape[1:])
            grad_weight_OC33[part] = grad_33OC.permute(2, 3, 0, 1)
            if grad_v_36TC is not None:
                grad_v_36TC.baddbmm_(grad_m_36TO, _weights(weight_OC33[part]))
        if grad_v_36TC is None:
            grad_NCHW: Tensor = conv2d_input(x_NCHW.shape, weight_OC33, grad_NOHW, padding=1)  # type: ignore[no-untyped-call]
            return grad_NCHW, grad_weight_OC33
        del v_36TC
        grad_66NhwC = (of_cells.T @ grad_v_36TC.flatten(1)).view(_REACH, _REACH, images, tall, wide, -1)
        return _join(grad_66NhwC)[..., 1 : height + 1, 1 : width + 1], grad_weight_OC33


def _narrow(weight_OC33: Tensor) -> bool:
    return min(weight_OC33.shape[:2]) < _WIDE


def _parts(weight_OC33: Tensor) -> list[slice]:
    """Some output channels at a time: U has four times as many numbers as the weights, and a part of them fits the processor's cache."""
    return [slice(start, start + _PART) for start in range(0, len(weight_OC33), _PART)]


def _values(x_NCHW: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """V (36, T, C), and T's factors: images, rows and columns of tiles."""
    height, width = x_NCHW.shape[-2:]
    right, below = (-side % _TILE + 1 for side in (width, height))
    padded_NHWC = F.pad(x_NCHW.permute(0, 2, 3, 1), (0, 0, 1, right, 1, below))
    tiles_NhwC66 = padded_NHWC.unfold(1, _REACH, _TILE).unfold(2, _REACH, _TILE)
    images, tall, wide, channels = tiles_NhwC66.shape[:4]
    of_cells, _, _ = _transforms(x_NCHW.dtype)
    v_36n = of_cells @ tiles_NhwC66.permute(4, 5, 0, 1, 2, 3).reshape(_REACH**2, -1)
    return v_36n.view(_REACH**2, -1, channels), (images, tall, wide)


def _join(grad_66NhwC: Tensor) -> Tensor:
    """The transpose of cutting a map into tiles: where they overlap, a tile's last two cells with the next one's first, they add up."""
    _, _, images, tall, wide, channels = grad_66NhwC.shape
    grad_Nh4w4C = grad_66NhwC.new_zeros(images, tall + 1, _TILE, wide + 1, _TILE, channels)
    for rows, there in (slice(0, _TILE), 0), (slice(_TILE, _REACH), 1):
        for columns, here in (slice(0, _TILE), 0), (slice(_TILE, _REACH), 1):
            cells = grad_66NhwC[rows, columns].permute(2, 3, 0, 4, 1, 5)
            grad_Nh4w4C[:, there : tall + there, : cells.shape[2], here : wide + here, : cells.shape[4]] += cells
    return grad_Nh4w4C.view(images, (tall + 1) * _TILE, (wide + 1) * _TILE, -1).permute(0, 3, 1, 2)


def _weights(weight_OC33: Tensor) -> Tensor:
    """U (36, O, C)."""
    _, of_weights, _ = _transforms(weight_OC33.dtype)
    return (of_weights @ weight_OC33.permute(2, 3, 0, 1).reshape(9, -1)).view(_REACH**2, *weight_OC33.shape[:2])


def _exact() -> list[Tensor]:
    """V (36) of 6x6 cells, U (36) of 3x3 weights, 4x4 results of M (36), in double precision.

    Polynomials of degree 3 and 2 are multiplied at 6 points; interpolation gives their product. A correlation is the transpose
    of that in the longer one.
    """
    points = torch.tensor(_POINTS, dtype=torch.float64)

    def evaluate(coefficients: int) -> Tensor:
        infinity = torch.eye(coefficients, dtype=torch.float64)[-1:]
        return torch.cat([torch.linalg.vander(points, N=coefficients), infinity])

    return [torch.kron(one, one) for one in (torch.linalg.inv(evaluate(_REACH)).T, evaluate(3), evaluate(_TILE).T)]


_EXACT = _exact()


def _transforms(dtype: torch.dtype) -> list[Tensor]:
    """The matrices V, U and of the results, rounded."""
    return [matrix.to(dtype) for matrix in _EXACT]
