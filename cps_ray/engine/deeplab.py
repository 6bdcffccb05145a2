"""DeepLabv3+ as in the code of the CPS paper (github.com/charlesCXK/TorchSemiSeg, commit 5e0c29c), on a timm ResNet."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cps_ray.errors import ConfigError
from cps_ray.text import did_you_mean

ARCHITECTURE = "deeplabv3plus-cps"

# B images, C channels; h w cells of a feature map.
_STAGES = ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3", "layer4")
_RATES = (6, 12, 18)  # at stride 16


class Encoder(nn.ModuleDict):
    """A timm ResNet without its classifier: the keys of its state are those of timm's files (and of the authors')."""

    def __init__(self, resnet: nn.Module, output_stride: int) -> None:
        """`resnet` is built for `output_stride`; the 3x3 convs of its unstrided stages get the paper's dilations here.

        Block i of layer4 is dilated 2 * 2^i at stride 16 and 4 * 2^i at stride 8, where layer3 is dilated 2 throughout.
        """
        super().__init__({name: getattr(resnet, name) for name in _STAGES})
        if output_stride == 8:
            _dilate(self["layer3"], 2)
        for number, block in enumerate(self["layer4"].children()):
            _dilate(block, 32 // output_stride * 2**number)

    def forward(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, H, W), float -> features of layer1 (stride 4) and of layer4 (the output stride)."""
        x = image_B3HW
        for name, stage in self.items():
            x = stage(x)
            if name == "layer1":
                fine = x
        return fine, x


class Aspp(nn.Module):
    """Atrous spatial pyramid pooling as in in-place ABN: norms after the concatenation, the global branch is added."""

    def __init__(self, in_channels: int, rates: tuple[int, ...], channels: int = 256) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(in_channels, channels, 1, bias=False)])
        self.branches += [nn.Conv2d(in_channels, channels, 3, padding=r, dilation=r, bias=False) for r in rates]
        merged = channels * len(self.branches)
        self.merge = nn.Sequential(*_norm_leaky(merged), nn.Conv2d(merged, channels, 1, bias=False))
        self.globally = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(in_channels, channels, 1, bias=False),
            *_norm_leaky(channels),
            nn.Conv2d(channels, channels, 1, bias=False),
        )
        self.last = nn.Sequential(*_norm_leaky(channels))

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Features (B, in_channels, h, w) -> (B, channels, h, w). In training mode the global branch's norm needs B > 1."""
        local_BChw = self.merge(torch.cat([branch(x_BChw) for branch in self.branches], dim=1))
        out_BChw: Tensor = self.last(local_BChw + self.globally(x_BChw))
        return out_BChw


class Decoder(nn.Module):
    """ASPP, upsampled to stride 4 and merged with layer1's features."""

    def __init__(self, fine_channels: int, coarse_channels: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.aspp = Aspp(coarse_channels, rates)
        self.reduce = nn.Sequential(*_conv_norm_relu(fine_channels, 48, 1))
        self.fuse = nn.Sequential(*_conv_norm_relu(256 + 48, 256, 3), *_conv_norm_relu(256, 256, 3))

    def forward(self, fine_BChw: Tensor, coarse_BChw: Tensor) -> Tensor:
        """Features at stride 4 and at the output stride -> (B, 256, h, w) at stride 4."""
        # align_corners, as in the released code: else every feature is shifted by up to half a cell.
        coarse_BChw = F.interpolate(self.aspp(coarse_BChw), fine_BChw.shape[-2:], mode="bilinear", align_corners=True)
        out_BChw: Tensor = self.fuse(torch.cat([coarse_BChw, self.reduce(fine_BChw)], dim=1))
        return out_BChw


class DeepLab(nn.Module):
    """Encoder, decoder and a 1x1 classifier."""

    def __init__(self, encoder: Encoder, decoder: Decoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.segmentation_head = nn.Sequential(nn.Conv2d(256, num_classes, 1))
        for module in (*decoder.modules(), *self.segmentation_head):
            if isinstance(module, nn.Conv2d):  # norms start at weight 1, bias 0 by themselves
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W), float, sides multiples of 32 -> coarse logits (B, num_classes, H/4, W/4)."""
        logits_BChw: Tensor = self.segmentation_head(self.decoder(*self.encoder(image_B3HW)))
        return logits_BChw


def check_deeplab(encoder: str) -> None:
    """Raises ConfigError unless `encoder` is `tu-` and the name of a timm ResNet. Builds nothing."""
    import timm

    known = [f"tu-{name}" for name in timm.list_models(module="resnet")]
    name = encoder.split(".")[0]
    if name not in known:
        raise ConfigError(
            f"model.encoder: {ARCHITECTURE} takes a timm ResNet such as tu-resnet50s, but got {encoder!r}."
            f"{did_you_mean(name, known)}"
        )


def build_deeplab(encoder: str, weights: str | None, num_classes: int, output_stride: int = 16) -> nn.Module:
    """The network of the released code: `encoder`, `decoder`, `segmentation_head`; (B, 3, H, W) -> (B, C, H/4, W/4).

    The paper's ResNets are tu-resnet50s and tu-resnet101s. `weights`: None draws them, "imagenet" fetches those that
    timm has for this name, anything else is a tag of timm's. All convs after the encoder are drawn from torch's RNG.
    Raises ConfigError for another encoder, ValueError for an output stride other than 16 or 8; timm's own errors pass.
    """
    import timm

    check_deeplab(encoder)
    if output_stride not in (8, 16):
        raise ValueError(f"output_stride must be 16 or 8, but got {output_stride!r}")
    name = encoder.removeprefix("tu-")
    if weights not in (None, "imagenet"):
        name = f"{name.split('.')[0]}.{weights}"
    # timm takes out the strides, those of the shortcuts included, whatever they are made of.
    resnet = timm.create_model(name, pretrained=weights is not None, output_stride=output_stride)
    channels = {info["module"]: info["num_chs"] for info in resnet.feature_info}
    rates = tuple(rate * 16 // output_stride for rate in _RATES)  # on a map twice as fine they reach as far
    return DeepLab(Encoder(resnet, output_stride), Decoder(channels["layer1"], channels["layer4"], rates), num_classes)


def _dilate(stage: nn.Module, dilation: int) -> None:
    for module in stage.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.dilation = module.padding = (dilation, dilation)


def _norm_leaky(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(channels), nn.LeakyReLU(0.01, inplace=True)


def _conv_norm_relu(in_channels: int, channels: int, kernel: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
