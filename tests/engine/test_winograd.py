import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cps_ray.engine import winograd as module
from cps_ray.engine.winograd import pays, winograd

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view(y.shape)
    return [*torch.autograd.grad((y * weights).sum(), inputs)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize(
    ("cells", "dilation"), [((8, 12), 1), ((9, 6), 1), ((1, 3), 1), ((16, 16), 2), ((11, 21), 3), ((4, 5), 6)]
)
def test_it_is_torchs_convolution(
    monkeypatch: pytest.MonkeyPatch, cells: tuple[int, int], dilation: int, narrow: bool, layout: torch.memory_format
) -> None:
    """Also where it does not pay, and whatever part of the output channels is computed at a time."""
    monkeypatch.setattr(module, "_narrow", lambda _: narrow)
    monkeypatch.setattr(module, "_PART", 3)
    torch.manual_seed(0)
    x = torch.randn(2, 5, *cells, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(7, 5, 3, 3, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    found = winograd(x, weight, dilation)
    wanted = F.conv2d(x, weight, padding=dilation, dilation=dilation)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for mine, torchs in zip(gradients(found, [x, weight]), gradients(wanted, [x, weight]), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-12, atol=1e-12)


def test_float32_rounds_little_worse_than_torchs() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 256, 16, 16).relu(), torch.randn(256, 256, 3, 3)
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    exact = F.conv2d(leaves[0], leaves[1], padding=1)
    wanted = [exact, *gradients(exact, leaves)]

    def errors(convolve: object) -> list[float]:
        own = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = convolve(*own)  # type: ignore[operator]
        return [
            float((found - right).norm() / right.norm())
            for found, right in zip([y, *gradients(y, own)], wanted, strict=True)
        ]

    mine, torchs = errors(winograd), errors(lambda x, w: F.conv2d(x, w, padding=1))
    assert max(mine) < 3e-6
    assert max(mine) < 6 * max(torchs), (mine, torchs)


@pytest.mark.parametrize(
    ("cells", "weights", "dilation", "wanted"),
    [
        ((8, 512, 16, 16), (512, 512, 3, 3), 2, True),
        ((8, 160, 64, 64), (160, 160, 3, 3), 1, True),
        ((8, 48, 64, 64), (48, 48, 3, 3), 1, False),  # too few channels
        ((8, 160, 64, 64), (19, 160, 3, 3), 1, False),
        ((8, 64, 64, 64), (64, 64, 3, 3), 1, not module._AVX512),
        ((1, 512, 16, 16), (512, 512, 3, 3), 2, False),  # too few tiles for the work on the weights
        ((8, 512, 16, 16), (512, 512, 3, 3), 8, False),  # 2x2 cells in tiles of 4x4
        ((8, 512, 5, 5), (512, 512, 3, 3), 1, False),
    ],
)
def test_where_it_pays(cells: tuple[int, ...], weights: tuple[int, ...], dilation: int, wanted: bool) -> None:
    assert pays(torch.Size(cells), torch.Size(weights), dilation) is wanted
