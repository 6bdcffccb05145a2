"""Architectures, encoders, weights and options by name: what smp and timm know, and the sentence for what they do not."""

import inspect
from functools import cache
from typing import Any

from cps_ray.config.plugins import is_import_path, load_plugin
from cps_ray.config.train import NetworkConfig
from cps_ray.engine.deeplab import ARCHITECTURE, check_deeplab
from cps_ray.errors import ConfigError
from cps_ray.text import did_you_mean, first_line


def check_names(config: NetworkConfig) -> None:
    """Raises ConfigError with a near name where there is no such architecture, encoder or weights."""
    import segmentation_models_pytorch as smp

    architectures = [*(name.lower() for name in smp.MODEL_ARCHITECTURES_MAPPING), ARCHITECTURE]
    if is_import_path(config.architecture):
        load_plugin("model.architecture", config.architecture)
    elif config.architecture.lower() not in architectures:
        raise ConfigError(_unknown("model.architecture", config.architecture, architectures))
    elif config.architecture == ARCHITECTURE:
        check_deeplab(config.encoder)
    else:
        _check_options(config)
    if is_import_path(config.encoder):
        register_encoder(config.encoder)
        if config.weights != "none":
            raise ConfigError(
                f"model.weights: must be none for the encoder {config.encoder}; give its weights as model.weights_file."
            )
    if config.encoder.startswith("tu-"):
        import timm

        name = config.encoder.removeprefix("tu-")
        if not timm.is_model(name.split(".")[0]):
            raise ConfigError(_unknown("model.encoder", config.encoder, [f"tu-{m}" for m in timm.list_models()]))
        _check_timm_weights(config)
        return
    encoders = smp.encoders.get_encoder_names()
    if config.encoder not in encoders:
        raise ConfigError(_unknown("model.encoder", config.encoder, encoders))
    tags = list(smp.encoders.encoders[config.encoder].get("pretrained_settings", {}))
    if config.weights != "none" and config.weights not in tags:
        raise ConfigError(_unknown("model.weights", config.weights, ["none", *tags]))


@cache
def register_encoder(path: str) -> None:
    """Makes the encoder at an import path known to smp, under that name, after a trial of it. Raises ConfigError."""
    import segmentation_models_pytorch as smp
    import torch

    encoder = load_plugin("model.encoder", path)
    try:
        built = encoder(depth=5, output_stride=32).eval()
        with torch.no_grad():
            maps = [tuple(each.shape) for each in built(torch.zeros(1, 3, 64, 64))]
        wanted = [(1, channels, 64 >> level, 64 >> level) for level, channels in enumerate(built.out_channels)]
        problem = "" if maps == wanted and len(maps) == 6 else f"maps an image of 64x64 px to {maps}"
    except Exception as err:  # plug-ins raise what they like
        problem = f"fails with {type(err).__name__}: {first_line(err).rstrip('.')}"
    if problem:
        raise ConfigError(
            f"model.encoder: {path}: {problem}. An encoder is an nn.Module and smp's EncoderMixin, made as ENCODER(depth=, output_stride=): it "
            "maps images (B, 3, H, W) to themselves and 5 maps, each half the size of the one before, of `out_channels` channels."
        )
    smp.encoders.encoders[path] = {"encoder": encoder, "pretrained_settings": {}, "params": {}}


def _check_options(config: NetworkConfig) -> None:
    """Raises ConfigError for an option that nobody reads: smp passes what it does not know to the encoder, and only timm's look at it."""
    import segmentation_models_pytorch as smp

    architectures = {name.lower(): network for name, network in smp.MODEL_ARCHITECTURES_MAPPING.items()}
    known = list(inspect.signature(architectures[config.architecture.lower()].__init__).parameters)
    for name in config.options if not config.encoder.startswith("tu-") else ():
        if name not in known:
            raise ConfigError(
                f"model.options: {config.architecture} has no option {name!r}.{did_you_mean(name, known)}"
            )


def _check_timm_weights(config: NetworkConfig) -> None:
    """Raises ConfigError for weights that timm does not have: smp would take the default ones for any name."""
    cfg = timm_cfg(config)
    if config.weights == "none":
        return
    own_tag = cfg.tag if cfg is not None else None
    if config.architecture != ARCHITECTURE and config.weights not in ("imagenet", own_tag):
        raise ConfigError(
            f"model.weights: must be none, imagenet or the tag of the tu- encoder, but got {config.weights!r}. "
            "Other weights of timm are a tag of the encoder, such as tu-resnet50.a1_in1k."
        )
    if cfg is None or not cfg.has_weights:
        tags = _timm_tags(config.encoder.removeprefix("tu-").split(".")[0])
        hint = f" There are {', '.join(f'{config.encoder}.{tag}' for tag in tags[:3])}." if tags else ""
        raise ConfigError(
            f"model.weights: timm has no weights of {config.encoder}; choose none or a weights_file.{hint}"
        )


def timm_cfg(config: NetworkConfig) -> Any:
    """Returns timm's record of a `tu-` encoder's weights (mean, std, input_size, has_weights, ...); None for other encoders, and
    for models that timm has no record of. Raises ConfigError for a tag that timm does not know."""
    if not config.encoder.startswith("tu-"):
        return None
    import timm

    name = config.encoder.removeprefix("tu-")
    if config.architecture == ARCHITECTURE and config.weights not in ("none", "imagenet"):
        name = f"{name.split('.')[0]}.{config.weights}"  # as `build_deeplab` names it
    try:
        return timm.models.get_pretrained_cfg(name)
    except RuntimeError as err:
        model, _, tag = name.partition(".")
        setting = "model.encoder" if "." in config.encoder else "model.weights"
        raise ConfigError(_unknown(setting, tag, _timm_tags(model))) from err


def _timm_tags(model: str) -> list[str]:
    import timm

    return [name.partition(".")[2] for name in timm.list_pretrained(f"{model}.*")]


def _unknown(place: str, name: str, known: list[str]) -> str:
    hint = did_you_mean(name, known) or f" Known are {', '.join(known[:8])}, ..."
    return f"{place}: segmentation-models-pytorch knows no {name!r}.{hint}"
