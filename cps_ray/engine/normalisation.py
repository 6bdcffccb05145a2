"""What images are normalised by: mean and standard deviation of the data that an encoder's weights were trained with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cps_ray.config.train import ModelConfig, NetworkConfig
from cps_ray.engine.names import timm_cfg
from cps_ray.errors import CheckpointError
from cps_ray.files import read_json

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation per RGB channel."""


@dataclass(frozen=True, slots=True)
class Normalisation:
    """What images are normalised by, per RGB channel, for values in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    """Where both come from, in words."""

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std} ({self.source})"


def normalisation(config: NetworkConfig) -> Normalisation:
    """Returns the normalisation that the weights were trained with; the settings' own if given, ImageNet's from scratch.

    Hub weights of smp's own encoders bring theirs from the hub: these alone need the network, or a cache. timm's are known here.
    """
    if config.mean is not None and config.std is not None:
        return Normalisation(config.mean, config.std, "model.mean and model.std")
    if config.weights == "none" and config.weights_file is None:
        return Normalisation(*IMAGENET, "ImageNet's, for an encoder without weights")
    own = _of_model_folder(config.weights_file)
    if own is not None:
        return own
    cfg = timm_cfg(config)
    if cfg is not None:
        name = ".".join(filter(None, (cfg.architecture, cfg.tag)))
        file = "" if config.weights_file is None else f", the encoder of {config.weights_file.name}"
        return Normalisation(tuple(cfg.mean), tuple(cfg.std), f"timm's of {name}{file}")
    if config.weights_file is not None:
        file = config.weights_file.name
        return Normalisation(*IMAGENET, f"ImageNet's: {file} does not say; model.mean and model.std would")
    import segmentation_models_pytorch as smp

    params: dict[str, Any] = smp.encoders.get_preprocessing_params(config.encoder, pretrained=config.weights)
    mean, std = params.get("mean") or IMAGENET[0], params.get("std") or IMAGENET[1]
    return Normalisation(tuple(mean), tuple(std), f"smp's of the {config.weights} weights")


def _of_model_folder(file: Path | None) -> Normalisation | None:
    """Returns what model.json says beside weights of ours, a folder such as best/ or its model.safetensors; None for any other file."""
    if file is None:
        return None
    folder = file if file.is_dir() else file.parent
    path = folder / "model.json"
    if not (file.is_dir() or file.name == "model.safetensors") or not path.is_file():
        return None
    try:
        network = read_json(path)["networks"]["a"]
        return Normalisation(tuple(network["mean"]), tuple(network["std"]), f"those of {folder.name}/model.json")
    except (ValueError, KeyError, TypeError) as err:
        raise CheckpointError(f"{path}: must be that of a model, with mean and std of network a, but is not.") from err


def planned_normalisation(config: NetworkConfig) -> str:
    """Returns mean, std and where they come from, in words, for a plan: fetches nothing from the hub."""
    fetched = config.weights != "none" and config.mean is None and not config.encoder.startswith("tu-")
    if fetched:
        return f"mean and std that the hub has beside the {config.weights} weights of {config.encoder}"
    return str(normalisation(config))


def padding_color(config: ModelConfig) -> tuple[int, int, int]:
    """The mean colour of network a, RGB in 0..255: training views are padded with it, and normalisation makes it zero."""
    red, green, blue = (round(255.0 * value) for value in normalisation(config).mean)
    return red, green, blue
