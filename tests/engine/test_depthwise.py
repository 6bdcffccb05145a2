import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cps_ray.engine import depthwise
from cps_ray.engine.depthwise import dilated_depthwise

PHASES = [  # cells, kernel, dilation
    ((12, 18), 3, 2),
    ((11, 7), 3, 2),
    ((16, 21), 5, 3),
    ((37, 40), 3, 12),
]
TAPS = [
    ((16, 20), 3, 12),
    ((16, 40), 3, 12),  # long enough one way only
    ((5, 6), 3, 4),
    ((8, 8), 5, 3),
    ((6, 9), 3, 7),  # out of reach up and down
    ((4, 5), 3, 36),  # only the centre lands anywhere
    ((1, 1), 3, 2),
]


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view(y.shape)
    return [*torch.autograd.grad((y * weights).sum(), inputs)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("way", "cells", "kernel", "dilation"),
    [*(("_by_phases", *case) for case in PHASES), *(("_ByTaps", *case) for case in TAPS)],
)
def test_it_is_torchs_convolution(
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    cells: tuple[int, int],
    kernel: int,
    dilation: int,
    layout: torch.memory_format,
) -> None:
    other = "_ByTaps" if way == "_by_phases" else "_by_phases"
    monkeypatch.delattr(depthwise, other)  # each case goes the way it is meant for
    torch.manual_seed(0)
    x = torch.randn(2, 6, *cells, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(6, 1, kernel, kernel, dtype=torch.float64).requires_grad_()
    found = dilated_depthwise(x, weight, dilation)
    wanted = F.conv2d(x, weight, padding=dilation * (kernel // 2), dilation=dilation, groups=6)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for mine, torchs in zip(gradients(found, [x, weight]), gradients(wanted, [x, weight]), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("cells", "kernel", "dilation"), [PHASES[0], TAPS[0]])
def test_autocast_rounds_it_as_it_does_torchs(cells: tuple[int, int], kernel: int, dilation: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, *cells, requires_grad=True)
    weight = torch.randn(6, 1, kernel, kernel, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = dilated_depthwise(x, weight, dilation)
        wanted = F.conv2d(x, weight, padding=dilation * (kernel // 2), dilation=dilation, groups=6)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
    for mine, torchs in zip(gradients(found, [x, weight]), gradients(wanted, [x, weight]), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, torchs, rtol=0.05, atol=0.3)
