import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cps_ray.engine.deeplab import DeepLab, build_deeplab, check_deeplab
from cps_ray.errors import ConfigError

# What the paper's code does at stride 16, and the same at stride 8: stride of a stage's first block, dilation per block.
STAGES = {
    16: {"layer1": (1, [1] * 3), "layer2": (2, [1] * 4), "layer3": (2, [1] * 6), "layer4": (1, [2, 4, 8])},
    8: {"layer1": (1, [1] * 3), "layer2": (2, [1] * 4), "layer3": (1, [2] * 6), "layer4": (1, [4, 8, 16])},
}
RATES = {16: [6, 12, 18], 8: [12, 24, 36]}


def built(output_stride: int = 16, seed: int = 0, encoder: str = "tu-resnet50s", classes: int = 21) -> DeepLab:
    torch.manual_seed(seed)
    network = build_deeplab(encoder, None, classes, output_stride=output_stride)
    assert isinstance(network, DeepLab)
    return network


def test_it_has_the_papers_parameters_in_the_layout_of_timms_files() -> None:
    with torch.device("meta"):
        network = built()
    assert sum(p.numel() for p in network.parameters()) == 40_475_957
    state = network.encoder.state_dict()
    shapes = {
        "conv1.0.weight": (64, 3, 3, 3),
        "conv1.1.running_mean": (64,),
        "conv1.3.weight": (64, 64, 3, 3),
        "conv1.6.weight": (128, 64, 3, 3),
        "bn1.weight": (128,),
        "layer1.0.conv1.weight": (64, 128, 1, 1),
        "layer1.0.downsample.0.weight": (256, 128, 1, 1),
        "layer3.5.bn2.weight": (256,),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    assert not [key for key in state if not key.startswith(("conv1.", "bn1.", "layer"))]
    assert tuple(network.segmentation_head[0].weight.shape) == (21, 256, 1, 1)


@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize("encoder", ["tu-test_resnet", "tu-resnet18d"])
def test_strides_and_shapes(output_stride: int, encoder: str) -> None:
    network = built(output_stride, encoder=encoder, classes=3).eval()
    image_B3HW = torch.zeros(1, 3, 64, 96)
    with torch.no_grad():
        fine_BChw, coarse_BChw = network.encoder(image_B3HW)
        assert network(image_B3HW).shape == (1, 3, 16, 24)
    assert fine_BChw.shape[-2:] == (16, 24)
    assert coarse_BChw.shape[-2:] == (64 // output_stride, 96 // output_stride)


@pytest.mark.parametrize("output_stride", [16, 8])
def test_dilations(output_stride: int) -> None:
    with torch.device("meta"):
        network = built(output_stride)
    for stage, (_, dilations) in STAGES[output_stride].items():
        convs = [block.conv2 for block in network.encoder[stage]]
        assert [conv.dilation for conv in convs] == [conv.padding for conv in convs] == [(d, d) for d in dilations]
    branches = network.decoder.aspp.branches
    assert [conv.kernel_size for conv in branches] == [(1, 1), (3, 3), (3, 3), (3, 3)]
    assert [conv.dilation[0] for conv in branches] == [1, *RATES[output_stride]]


@pytest.mark.parametrize("output_stride", [16, 8])
def test_forward_is_the_described_one(output_stride: int) -> None:
    network = built(output_stride).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # as drawn, they hide their place and switch whole blocks off
            nn.init.uniform_(module.weight, 0.3, 0.9)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    image_B3HW = torch.randn(1, 3, 32, 320, dtype=torch.float64)  # wide: the largest rates reach over 18 and 36 cells
    with torch.no_grad():
        torch.testing.assert_close(
            network(image_B3HW), described(network.state_dict(), image_B3HW, output_stride), rtol=1e-9, atol=1e-9
        )


def described(state: dict[str, Tensor], x: Tensor, output_stride: int) -> Tensor:
    """The description of the network once more, by functions of its state alone."""

    def conv(name: str, x: Tensor, **options: int) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)

    def leaky(x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.01)

    x = norm("encoder.conv1.1", conv("encoder.conv1.0", x, stride=2, padding=1)).relu()
    x = norm("encoder.conv1.4", conv("encoder.conv1.3", x, padding=1)).relu()
    x = norm("encoder.bn1", conv("encoder.conv1.6", x, padding=1)).relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage, (first_stride, dilations) in STAGES[output_stride].items():
        for number, dilation in enumerate(dilations):
            block, stride = f"encoder.{stage}.{number}", first_stride if number == 0 else 1
            out = norm(f"{block}.bn1", conv(f"{block}.conv1", x)).relu()
            out = conv(f"{block}.conv2", out, stride=stride, padding=dilation, dilation=dilation)
            out = norm(f"{block}.bn3", conv(f"{block}.conv3", norm(f"{block}.bn2", out).relu()))
            if number == 0:
                x = norm(f"{block}.downsample.1", conv(f"{block}.downsample.0", x, stride=stride))
            x = (out + x).relu()
        if stage == "layer1":
            fine = x
    aspp = "decoder.aspp"
    local = [conv(f"{aspp}.branches.0", x)]
    for number, rate in enumerate(RATES[output_stride]):
        local.append(conv(f"{aspp}.branches.{number + 1}", x, padding=rate, dilation=rate))
    merged = conv(f"{aspp}.merge.2", leaky(norm(f"{aspp}.merge.0", torch.cat(local, 1))))
    whole = conv(f"{aspp}.globally.1", x.mean((2, 3), keepdim=True))
    whole = conv(f"{aspp}.globally.4", leaky(norm(f"{aspp}.globally.2", whole)))
    x = leaky(norm(f"{aspp}.last.0", merged + whole))
    x = F.interpolate(x, size=fine.shape[-2:], mode="bilinear", align_corners=True)
    fine = norm("decoder.reduce.1", conv("decoder.reduce.0", fine)).relu()
    x = torch.cat([x, fine], 1)
    x = norm("decoder.fuse.1", conv("decoder.fuse.0", x, padding=1)).relu()
    x = norm("decoder.fuse.4", conv("decoder.fuse.3", x, padding=1)).relu()
    return conv("segmentation_head.0", x)


def test_initialisation() -> None:
    first, other = built(seed=0), built(seed=1)
    convs = [m for part in (first.decoder, first.segmentation_head) for m in part.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 11
    for conv in convs:
        expected = (2 / conv.weight[0].numel()) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.05)
        # normal, not uniform: uniform values end at 1.73 standard deviations
        assert conv.weight.abs().max().item() > 2.5 * expected
    assert [conv for conv in convs if conv.bias is not None] == [convs[-1]]
    bias = first.segmentation_head[0].bias
    assert 0 < bias.abs().max().item() <= 256**-0.5  # PyTorch's default
    for norm in (m for m in first.decoder.modules() if isinstance(m, nn.BatchNorm2d)):
        assert norm.weight.eq(1).all()
        assert norm.bias.eq(0).all()
    pairs = zip(first.parameters(), other.parameters(), strict=True)
    assert all(not torch.equal(p, q) for p, q in pairs if p.dim() == 4)


def test_every_parameter_learns_in_training_mode() -> None:
    network = built(encoder="tu-test_resnet", classes=3).train()
    network(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None]


@pytest.mark.parametrize(
    ("encoder", "hint"),
    [
        ("tu-resnet50ss", "Did you mean tu-resnet50s?"),
        ("resnet50s", "Did you mean tu-resnet50s?"),
        ("tu-convnext_atto", "got 'tu-convnext_atto'."),
    ],
)
def test_other_encoders_are_refused(encoder: str, hint: str) -> None:
    for refuse in (check_deeplab, lambda name: build_deeplab(name, None, 2)):
        with pytest.raises(ConfigError, match=r"model\.encoder: deeplabv3plus-cps takes a timm ResNet") as caught:
            refuse(encoder)
        assert hint in str(caught.value)


def test_timm_tags_belong_to_the_name() -> None:
    check_deeplab("tu-resnet50s.gluon_in1k")


@pytest.mark.parametrize("output_stride", [32, "16"])
def test_other_output_strides_are_refused(output_stride: object) -> None:
    with pytest.raises(ValueError, match="output_stride must be 16 or 8, but got"):
        build_deeplab("tu-resnet50s", None, 2, output_stride=output_stride)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("encoder", "weights", "asked"),
    [
        ("tu-test_resnet", None, ("test_resnet", False)),
        ("tu-test_resnet", "imagenet", ("test_resnet", True)),
        ("tu-test_resnet.r160_in1k", "imagenet", ("test_resnet.r160_in1k", True)),
        ("tu-test_resnet", "r160_in1k", ("test_resnet.r160_in1k", True)),
    ],
)
def test_weights_are_asked_of_timm(
    monkeypatch: pytest.MonkeyPatch, encoder: str, weights: str | None, asked: tuple[str, bool]
) -> None:
    import timm

    seen: list[tuple[str, bool]] = []
    create = timm.create_model

    def offline(name: str, pretrained: bool, **options: int) -> nn.Module:
        seen.append((name, pretrained))
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    build_deeplab(encoder, weights, 2)
    assert seen == [asked]


def test_importing_it_loads_no_model_library() -> None:
    code = "import sys, cps_ray.engine.deeplab; print([m for m in ('timm', 'segmentation_models_pytorch') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
