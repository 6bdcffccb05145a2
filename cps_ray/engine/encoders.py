"""Encoders and their pretrained weights: which there are, how large they are, under which licence. Fetches nothing."""

import fnmatch
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from cps_ray.config.train import NetworkConfig, TrainConfig
from cps_ray.engine.deeplab import ARCHITECTURE as DEEPLAB
from cps_ray.engine.normalisation import IMAGENET
from cps_ray.engine.vit import ARCHITECTURE as DPT
from cps_ray.engine.vit import image_divisor

UNKNOWN = "unknown"
_HUB = "https://huggingface.co"
_TORCHVISION = ("res*", "vgg*", "densenet*", "mobilenet_v2")
_SMP_LICENCES = {
    **dict.fromkeys((f"{glob}/imagenet" for glob in _TORCHVISION), "bsd-3-clause"),
    # facebookresearch/semi-supervised-ImageNet1K-models and WSL-Images
    "*/ssl": "cc-by-nc-4.0",
    "*/swsl": "cc-by-nc-4.0",
    "*/instagram": "cc-by-nc-4.0",
    "mit_b*/imagenet": "nvidia-source-code-license (non-commercial)",  # NVlabs/SegFormer
    "mobileone_s*/imagenet": "mobileone-license",  # apple/ml-mobileone
    "efficientnet-b*/*": "apache-2.0",  # lukemelas/EfficientNet-PyTorch
    "timm-*/*": "apache-2.0",  # timm's own EfficientNets and SKNets
}
"""ENCODER/TAG of smp -> licence of these weights. Those of smp's other encoders come from a server that named none."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What an encoder began with, and whether one may use it."""

    encoder: str
    source: str
    """Tag of the hub weights, name of a local file, or `none`."""
    licence: str | None
    """None: there are no weights, hence no licence. UNKNOWN: whoever uses them has to ask."""
    url: str | None
    """Page that describes the weights."""

    def sentence(self) -> str:
        """Returns the line that a training ends with."""
        if self.licence is None:
            return f"Weights of {self.encoder}: none, trained from scratch"
        if self.url is None:
            return f"Weights of {self.encoder}: {self.source}, licence {self.licence}: ask where they come from"
        return f"Weights of {self.encoder}: {self.source}, licence {self.licence} (see {self.url})"

    def record(self) -> dict[str, Any]:
        """Returns the fields and the sentence, for JSON files."""
        return {**asdict(self), "sentence": self.sentence()}


def weights_of(config: NetworkConfig) -> Weights:
    """Returns what the encoder of this network begins with."""
    if config.weights_file is not None:
        return Weights(config.encoder, config.weights_file.name, UNKNOWN, None)
    if config.weights == "none":
        return Weights(config.encoder, "none", None, None)
    if not config.encoder.startswith("tu-"):
        return _of_smp(config.encoder, config.weights)
    name = config.encoder.removeprefix("tu-")
    if config.architecture == DEEPLAB and config.weights != "imagenet":
        name = f"{name.split('.')[0]}.{config.weights}"  # as `build_deeplab` reads it
    return _of_timm(config.encoder, name)


def weights_of_networks(config: TrainConfig) -> list[Weights]:
    """Returns what the encoders of a training's networks begin with, each once."""
    return list(dict.fromkeys(weights_of(config.model.of(number)) for number in range(config.networks)))


def _of_smp(encoder: str, tag: str) -> Weights:
    import segmentation_models_pytorch as smp

    key = f"{encoder}/{tag}"
    licence = next((known for glob, known in _SMP_LICENCES.items() if fnmatch.fnmatchcase(key, glob)), UNKNOWN)
    settings = smp.encoders.encoders[encoder]["pretrained_settings"][tag]
    return Weights(encoder, tag, licence, f"{_HUB}/{settings['repo_id']}")


def _of_timm(encoder: str, name: str) -> Weights:
    from timm.models import get_pretrained_cfg

    try:
        config = get_pretrained_cfg(name)
    except RuntimeError:  # a tag that this version of timm does not know
        config = None
    if config is None:
        return Weights(encoder, name, UNKNOWN, None)
    url = f"{_HUB}/{config.hf_hub_id}" if config.hf_hub_id else config.origin_url or config.url or None
    return Weights(encoder, config.tag or name, config.license or UNKNOWN, url)


@dataclass(frozen=True, slots=True)
class Size:
    """What an encoder is without its weights."""

    parameters: int
    divisor: int
    """What the sides in px of its input must be multiples of; networks pad images to it."""
    architecture: str | None
    """The only one that takes this encoder; None: all that take encoders with a pyramid of maps."""


def matching(pattern: str) -> list[Weights]:
    """Returns all weights of the encoders that fit a glob pattern, with or without a tag; all that contain it where none fits.

    Encoders without weights are listed once. smp's come first, then timm's as `tu-NAME.TAG`, both in the libraries' order.
    """
    names = [*_known()]
    for glob in (pattern, f"*{pattern}*"):
        fits = [
            name for name in names if fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name.split(".")[0], glob)
        ]
        if fits:
            return [weights for name in fits for weights in _known()[name]]
    return []


@cache
def _known() -> dict[str, tuple[Weights, ...]]:
    """Encoder as one writes it in a config -> its weights."""
    import segmentation_models_pytorch as smp
    import timm

    found: dict[str, tuple[Weights, ...]] = {}
    for name in smp.encoders.get_encoder_names():
        tags = smp.encoders.encoders[name].get("pretrained_settings", {})
        found[name] = tuple(_of_smp(name, tag) for tag in tags) or (Weights(name, "none", None, None),)
    pretrained = timm.list_models(pretrained=True)
    bare = {*timm.list_models()} - {name.split(".")[0] for name in pretrained}
    for name in sorted([*pretrained, *bare]):
        full = f"tu-{name}"
        found[full] = (Weights(full, "none", None, None) if name in bare else _of_timm(full, name),)
    return found


def unusual_normalisation(weights: Weights) -> str:
    """Returns `mean` and `std` in words where they are not ImageNet's, "" where they are, ? where only the hub knows."""
    if weights.licence is None:
        return ""
    if not weights.encoder.startswith("tu-"):
        return "" if any(fnmatch.fnmatchcase(weights.encoder, glob) for glob in _TORCHVISION) else "?"
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(weights.encoder.removeprefix("tu-"))
    if config is None or (tuple(config.mean), tuple(config.std)) == IMAGENET:
        return ""
    mean, std = (" ".join(f"{value:.3g}" for value in dict.fromkeys(each)) for each in (config.mean, config.std))
    return f"{mean}; {std}"


def size_of(encoder: str) -> Size | None:
    """Returns what an encoder is, built with shapes alone; None for a model of timm that gives no maps of features."""
    return _size_of_timm(encoder[3:].split(".")[0]) if encoder.startswith("tu-") else _size_of_smp(encoder)


@cache
def _size_of_timm(name: str) -> Size | None:
    import timm
    import torch

    try:
        with torch.device("meta"):
            model = timm.create_model(name, features_only=True)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, NotImplementedError):
        return None
    parameters, reductions = _count(model), model.feature_info.reduction()
    if reductions[0] == reductions[-1]:  # one grid of tokens throughout
        return Size(parameters, image_divisor(reductions[-1]), DPT)
    return Size(parameters, max(reductions), None)


@cache
def _size_of_smp(encoder: str) -> Size:
    import segmentation_models_pytorch as smp
    import torch

    try:
        with torch.device("meta"):
            model = smp.encoders.get_encoder(encoder)
    except RuntimeError:  # MiT computes with tensors while it is built
        model = smp.encoders.get_encoder(encoder)
    return Size(_count(model), int(model.output_stride), None)


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
