"""Dilated depthwise convolutions beside torch's: values and gradients, which layers are replaced, and the switch."""

import copy

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from support import changed
from torch import Tensor, nn

from cps_ray.config.train import TrainConfig
from cps_ray.engine.cpu import depthwise
from cps_ray.engine.cpu.depthwise import dilated_depthwise, use_cpu_kernels
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state


def conv(inputs: int, outputs: int, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **{"bias": False, **options})  # type: ignore[arg-type]


PHASES = [  # cells, kernel, dilation
    ((12, 18), 3, 2),
    ((11, 7), 3, 2),
    ((16, 21), 5, 3),
    ((37, 40), 3, 12),
    ((8, 10), 5, 2),  # phases of 4x5 are padded to the kernel
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


LAYERS = {
    "_DilatedDepthwise": [
        conv(4, 4, padding=2, dilation=2, groups=4),
        conv(4, 4, 5, padding=6, dilation=3, groups=4),
    ],
    "Conv2d": [
        conv(4, 8, padding=1),
        conv(8, 8, padding=2, dilation=2),
        conv(4, 4, padding=1, groups=4),
        conv(4, 8, padding=2, dilation=2, groups=4),
        conv(8, 8, padding="same", dilation=2, groups=8),
        conv(8, 8, padding=(1, 2), dilation=(1, 2), groups=8),
        conv(8, 8, padding=(2, 3), dilation=(2, 3), groups=8),
        conv(8, 8, padding=2, dilation=2, groups=8, bias=True),
        conv(8, 8, padding=1, dilation=2, groups=8),
        conv(8, 8, padding=2, dilation=2, groups=8, stride=2),
        conv(8, 8, padding=2, dilation=2, groups=8, padding_mode="reflect"),
    ],
}


@pytest.mark.parametrize(("name", "layer"), [(name, layer) for name, layers in LAYERS.items() for layer in layers])
def test_layers_that_are_covered(name: str, layer: nn.Conv2d) -> None:
    ours = copy.deepcopy(layer)
    use_cpu_kernels(ours)
    assert type(ours).__name__ == name
    image = torch.randn(2, layer.in_channels, 16, 16)
    torch.testing.assert_close(ours(image), layer(image))


def network_gradients(network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    out = network(image)
    (out * torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("architecture", "encoder", "side"),
    [
        ("deeplabv3plus", "resnet18", 128),
        ("unet", "tu-mobilenetv3_small_100", 64),
        ("deeplabv3plus", "mobilenet_v2", 96),
    ],
)
def test_a_network_with_cpu_kernels_is_the_same_function(
    architecture: str, encoder: str, side: int, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    options = {"decoder_aspp_dropout": 0.0} if architecture == "deeplabv3plus" else {}
    plain = smp.create_model(architecture, encoder, encoder_weights=None, classes=5, **options)
    plain = plain.double().to(memory_format=layout)  # in double precision, so that no ReLU turns on a last bit
    ours = copy.deepcopy(plain)
    use_cpu_kernels(ours)
    image = torch.randn(4, 3, side, side, dtype=torch.float64).contiguous(memory_format=layout)
    wanted, found = network_gradients(plain, image), network_gradients(ours, image)
    assert list(found) == list(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-9)
    for (name, mine), (other, torchs) in zip(ours.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(mine, torchs)  # running statistics


def test_the_switch_leaves_torchs_own_layers(tiny: TrainConfig) -> None:
    def layers(*, cpu_kernels: bool) -> set[str]:
        config = changed(tiny, compute__cpu_kernels=cpu_kernels)
        return {type(m).__name__ for net in build_state(config, 7, Ranks()).networks.values() for m in net.modules()}

    assert layers(cpu_kernels=True) - layers(cpu_kernels=False) == {"_DilatedDepthwise"}
