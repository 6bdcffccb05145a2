import copy
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cps_ray.engine.deeplab import build_deeplab
from cps_ray.engine.quicken import quicken

LAST = torch.channels_last


def conv(inputs: int, outputs: int, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **{"bias": False, **options})  # type: ignore[arg-type]


COMPUTED = {
    "_Wide": [
        conv(4, 8, padding=1),
        conv(8, 8, padding=2, dilation=2),
    ],
    "_DilatedDepthwise": [
        conv(4, 4, padding=2, dilation=2, groups=4),
        conv(4, 4, 5, padding=6, dilation=3, groups=4),
    ],
    "Conv2d": [
        conv(4, 4, padding=1, groups=4),
        conv(4, 8, padding=2, dilation=2, groups=4),
        conv(8, 8, 5, padding=2),
        conv(8, 8, 1),
        conv(8, 8),
        conv(8, 8, padding=1, stride=2),
        conv(8, 8, padding=1, bias=True),
        conv(8, 8, padding=1, padding_mode="reflect"),
        conv(8, 8, padding="same"),
        conv(8, 8, padding=(1, 2), dilation=(1, 2)),
        conv(8, 8, padding=1, groups=2),
        conv(8, 8, padding=2, dilation=2, groups=8, bias=True),
        conv(8, 8, padding=1, dilation=2, groups=8),
        conv(8, 8, padding=2, dilation=2, groups=8, stride=2),
        conv(8, 8, padding=2, dilation=2, groups=8, padding_mode="reflect"),
    ],
}


@pytest.mark.parametrize(("name", "layer"), [(name, layer) for name, layers in COMPUTED.items() for layer in layers])
def test_layers_that_are_covered(name: str, layer: nn.Conv2d) -> None:
    quick = copy.deepcopy(layer)
    quicken(quick)
    assert type(quick).__name__ == name
    image = torch.randn(2, layer.in_channels, 16, 16)
    torch.testing.assert_close(quick(image), layer(image))


def test_only_a_relu_behind_a_batch_norm_overwrites_its_input() -> None:
    behind, first, later = nn.ReLU(), nn.ReLU(), nn.ReLU()
    quicken(nn.Sequential(nn.BatchNorm2d(2), behind, nn.Sequential(first, nn.BatchNorm2d(2)), nn.Identity(), later))
    assert [act.inplace for act in (behind, first, later)] == [True, False, False]


def gradients(network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    out = network(image)
    (out * torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize(
    ("architecture", "encoder", "side"),
    [
        ("deeplabv3plus", "resnet18", 128),
        ("unet", "tu-mobilenetv3_small_100", 64),
        ("deeplabv3plus-cps", "tu-resnet18d", 96),
    ],
)
def test_a_quickened_network_is_the_same_function(
    architecture: str, encoder: str, side: int, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    options = {"decoder_aspp_dropout": 0.0} if architecture == "deeplabv3plus" else {}
    plain = (
        build_deeplab(encoder, None, 5)
        if architecture == "deeplabv3plus-cps"
        else smp.create_model(architecture, encoder, encoder_weights=None, classes=5, **options)
    )
    plain = plain.double().to(memory_format=layout)  # in double precision, so that no ReLU turns on a last bit
    quick = copy.deepcopy(plain)
    quicken(quick)
    image = torch.randn(4, 3, side, side, dtype=torch.float64).contiguous(memory_format=layout)
    wanted, found = gradients(plain, image), gradients(quick, image)
    assert list(found) == list(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-9)
    for (name, mine), (other, torchs) in zip(quick.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(mine, torchs)  # running statistics


class Seen(TorchDispatchMode):
    """Whether the first argument of every backward pass of an upsampling had its channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.last: list[bool] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.upsample_bilinear2d_backward.default and args[1][0] > 1 and args[2][-1] > 1:
            self.last.append(args[0].is_contiguous(memory_format=LAST))
        return func(*args, **(kwargs or {}))


def test_maps_stay_channels_last_through_the_pyramid_and_back() -> None:
    network = smp.create_model("deeplabv3plus", "resnet18", encoder_weights=None, classes=5)
    network.segmentation_head = nn.Identity()
    network.to(memory_format=LAST)  # type: ignore[call-overload]
    quicken(network)
    pooled: list[bool] = []
    network.decoder.aspp[0].convs[-1].register_forward_hook(
        lambda *seen: pooled.append(seen[2].is_contiguous(memory_format=LAST))
    )
    with Seen() as seen:
        network(torch.randn(2, 3, 64, 64).contiguous(memory_format=LAST)).sum().backward()
    assert pooled == [True]
    assert seen.last == [True]
