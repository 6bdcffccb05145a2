"""The pair of segmentation networks: built by segmentation-models-pytorch, initialised differently, uint8 in, logits out."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cps_ray.config.train import ModelConfig, NetworkConfig, TrainConfig
from cps_ray.errors import CheckpointError, ConfigError

# B images, C classes, H W pixels.
_STRIDE = 32  # Every smp encoder divides the image by at most this.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Segmenter(nn.Module):
    """uint8 images of any size -> logits of that size. Normalises on the network's own device, so batches stay small."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Iterable[float], std: Iterable[float]) -> None:
        """`mean`, `std`: per RGB channel, for values in 0..1. Part of the state, so that a checkpoint is judged as it was trained."""
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, 3, 1, 1) * 255.0)
        self.register_buffer("std", torch.tensor(list(std)).view(1, 3, 1, 1) * 255.0)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float logits (B, C, H, W). Sizes that are no multiple of 32 are padded, then cropped."""
        height, width = image_B3HW.shape[-2:]
        x = (image_B3HW.float() - self.mean) / self.std
        padding = (0, -width % _STRIDE, 0, -height % _STRIDE)
        logits: Tensor = self.network(F.pad(x, padding) if any(padding) else x)
        return logits[..., :height, :width]


class Pair(nn.Module):
    """Networks a and b as one module, so that one DDP wrap and one forward serve both. `b` is None when supervised."""

    def __init__(self, a: Segmenter, b: Segmenter | None) -> None:
        super().__init__()
        self.a = a
        self.b = b

    def forward(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 (B, 3, H, W) -> logits (B, C, H, W) of a and of b."""
        return self.a(image_B3HW), None if self.b is None else self.b(image_B3HW)


def build_pair(config: TrainConfig, num_classes: int) -> Pair:
    """Both networks on the CPU; initialisation is a function of (config.seed, a or b) alone.

    Raises ConfigError for names or options smp refuses, CheckpointError for weights that do not fit.
    """
    a = build_network(config.model, num_classes, seed=2 * config.seed)
    if config.method == "supervised":
        return Pair(a, None)
    return Pair(a, build_network(config.model.b or config.model, num_classes, seed=2 * config.seed + 1))


def build_network(config: NetworkConfig, num_classes: int, *, seed: int) -> Segmenter:
    """One network with its weights; what weights do not cover is drawn from `seed`."""
    import segmentation_models_pytorch as smp

    check_names(config)
    weights = None if config.weights == "none" else config.weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = smp.create_model(
                config.architecture,
                encoder_name=config.encoder,
                encoder_weights=weights,
                classes=num_classes,
                **config.options,
            )
        except (TypeError, ValueError, KeyError, RuntimeError, AssertionError, NotImplementedError) as err:
            reason = (str(err).splitlines() or [type(err).__name__])[0]
            raise ConfigError(
                f"model: {config.architecture} with encoder {config.encoder} and options {config.options} "
                f"cannot be built: {reason}"
            ) from err
        except OSError as err:
            raise ConfigError(
                f"model.weights: the {config.weights!r} weights of {config.encoder} could not be fetched from the hub "
                f"({(str(err).splitlines() or [''])[0][:200]}). Give a local file as model.weights_file, or weights: none."
            ) from err
    if config.weights_file is not None:
        load_encoder(network.encoder, config.weights_file)
    mean, std = _normalisation(config, weights)
    return Segmenter(network, mean, std)


def _normalisation(config: NetworkConfig, weights: str | None) -> tuple[Iterable[float], Iterable[float]]:
    """What the weights were trained with; ImageNet's otherwise."""
    if weights is None:
        return _IMAGENET
    import segmentation_models_pytorch as smp

    params: dict[str, Any] = smp.encoders.get_preprocessing_params(config.encoder, pretrained=weights)
    return params.get("mean") or _IMAGENET[0], params.get("std") or _IMAGENET[1]


def load_encoder(encoder: nn.Module, path: Path) -> None:
    """Weights of a local file (.safetensors, or .pt/.pth read without unpickling code) into an encoder; every key must fit."""
    if not path.is_file():
        raise CheckpointError(f"{path}: model.weights_file does not exist. Paths are relative to the config file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # the readers raise a zoo of types for a damaged file
        reason = (str(err).splitlines() or [type(err).__name__])[0][:200]
        raise CheckpointError(f"{path}: cannot be read as weights: {reason}") from err
    try:
        encoder.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as err:
        lines = [line.strip() for line in str(err).splitlines()] or [""]
        detail = " ".join(lines[1:3] if len(lines) > 1 else lines)[:300]
        raise CheckpointError(
            f"{path}: every key must fit the encoder {type(encoder).__name__}, but {detail} "
            "Choose the encoder this file was made for."
        ) from err


def check_names(config: NetworkConfig) -> None:
    """Raises ConfigError with a near name where smp knows no such architecture, encoder or weights."""
    import segmentation_models_pytorch as smp

    architectures = [name.lower() for name in smp.MODEL_ARCHITECTURES_MAPPING]
    if config.architecture.lower() not in architectures:
        raise ConfigError(_unknown("model.architecture", config.architecture, architectures))
    if config.encoder.startswith("tu-"):
        import timm

        name = config.encoder.removeprefix("tu-")
        if not timm.is_model(name.split(".")[0]):
            raise ConfigError(_unknown("model.encoder", config.encoder, [f"tu-{m}" for m in timm.list_models()]))
        return
    encoders = smp.encoders.get_encoder_names()
    if config.encoder not in encoders:
        raise ConfigError(_unknown("model.encoder", config.encoder, encoders))
    tags = list(smp.encoders.encoders[config.encoder].get("pretrained_settings", {}))
    if config.weights != "none" and config.weights not in tags:
        raise ConfigError(_unknown("model.weights", config.weights, ["none", *tags]))


def check_model(config: ModelConfig) -> None:
    """Builds the networks without their hub weights: finds wrong names, options and weight files before any cluster starts."""
    for network in (config, config.b):
        if network is not None:
            check_names(network)
            build_network(network.model_copy(update={"weights": "none"}), num_classes=2, seed=0)


def _unknown(place: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else f" Known are {', '.join(known[:8])}, ..."
    return f"{place}: segmentation-models-pytorch knows no {name!r}.{hint}"
