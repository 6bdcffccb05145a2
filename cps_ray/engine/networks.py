"""The networks that teach each other: built by segmentation-models-pytorch, initialised differently, uint8 in, logits out."""

import re
from collections.abc import Iterable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cps_ray.config.plugins import is_import_path, load_plugin
from cps_ray.config.train import NETWORK_NAMES, NetworkConfig, OptionValue, TrainConfig
from cps_ray.engine.deeplab import ARCHITECTURE, build_deeplab
from cps_ray.engine.dense import STRIDE, padded, upsample
from cps_ray.engine.features import Perturb, forward_perturbed
from cps_ray.engine.names import check_names
from cps_ray.engine.normalisation import normalisation
from cps_ray.engine.vit import ARCHITECTURE as DPT
from cps_ray.engine.vit import fit_patches, image_divisor, takes_any_size
from cps_ray.engine.weights import load_encoder
from cps_ray.errors import ConfigError
from cps_ray.text import first_line

# B images, C classes, H W pixels, h w cells of coarse logits.
_REFUSALS = (TypeError, ValueError, KeyError, IndexError, RuntimeError, AssertionError, NotImplementedError)
"""What smp and timm raise for options and image sizes that a network does not take."""


class Segmenter(nn.Module):
    """uint8 images of any size -> logits. Normalises on the network's own device, so batches stay small."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: Iterable[float],
        std: Iterable[float],
        *,
        divisor: int = STRIDE,
        freeze_encoder: bool = False,
        filled: str = "",
    ) -> None:
        """`mean`, `std`: per RGB channel, for values in 0..1. They are part of the state, so that a checkpoint is evaluated as it was trained.

        `divisor`: what the sides in px of the network's own input must be multiples of. `freeze_encoder`: `network.encoder`
        does not learn. `filled`: by what file the encoder was filled, in words. The bilinear upsampling at a network's end is taken out of it (it has no weights): losses do it, a few
        images at a time.
        """
        super().__init__()
        self.network = _without_upsampling(network)
        self.divisor = divisor
        self.filled = filled
        self._freeze_encoder = freeze_encoder
        if freeze_encoder:
            # Autograd then keeps none of the encoder's activations: nothing that goes into it needs a gradient.
            self.network.encoder.requires_grad_(False)  # type: ignore[union-attr, operator]
            self.train()
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, 3, 1, 1) * 255.0)
        self.register_buffer("std", torch.tensor(list(std)).view(1, 3, 1, 1) * 255.0)

    def forward(self, image_B3HW: Tensor, perturb: Perturb | None = None) -> Tensor:
        """Images in 0..255, uint8 or float (B, 3, H, W) -> coarse logits (B, C, h, w) of the image padded to multiples of 32.

        `dense.upsample` makes full logits of them. A network whose divisor does not divide 32 sees the image padded further.
        `perturb` changes the features between encoder and decoder, and may change B.
        """
        height, width = image_B3HW.shape[-2:]
        x = (image_B3HW.float() - self.mean) / self.std
        size = padded((height, width))
        seen = size if STRIDE % self.divisor == 0 else padded(size, self.divisor)
        if seen != (height, width):
            x = F.pad(x, (0, seen[1] - width, 0, seen[0] - height))  # zeros are the mean colour
        logits: Tensor = self.network(x) if perturb is None else forward_perturbed(self.network, x, perturb)
        if seen != size:
            # Coarse logits of more than `size` mean nothing to `dense.upsample`, which leaves those of just this size as they are.
            if logits.shape[-2:] != seen:
                logits = F.interpolate(logits, seen, mode="bilinear", align_corners=True)
            logits = logits[..., : size[0], : size[1]]
        return logits

    def train(self, mode: bool = True) -> Self:
        """Sets the mode as torch does, but a frozen encoder stays in evaluation mode: its batch norm keeps its running statistics."""
        super().train(mode)
        if self._freeze_encoder:
            self.network.encoder.eval()  # type: ignore[union-attr, operator]
        return self

    def logits(self, image_B3HW: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, C, H, W)."""
        return upsample(self(image_B3HW), (image_B3HW.shape[-2], image_B3HW.shape[-1]))


def _without_upsampling(network: nn.Module) -> nn.Module:
    head = getattr(network, "segmentation_head", None)
    last = head[1] if isinstance(head, nn.Sequential) and len(head) > 1 else None
    # Any other head keeps its upsampling: `dense.upsample` finds the logits at full size and leaves them.
    if isinstance(last, nn.Upsample) and last.mode == "bilinear" and last.align_corners:
        head[1] = nn.Identity()  # type: ignore[index]
    return network


def build_networks(config: TrainConfig, num_classes: int) -> dict[str, Segmenter]:
    """All networks of a training by name, on the CPU; initialisation is a function of (config.seed, name) alone.

    Raises ConfigError for names or options smp refuses, CheckpointError for weights that do not fit.
    """
    many = len(NETWORK_NAMES)  # not config.networks: a pair starts as the first two of three with the same seed
    networks = {
        NETWORK_NAMES[number]: build_network(config.model.of(number), num_classes, seed=many * config.seed + number)
        for number in range(config.networks)
    }
    # After all were built: with hub weights they are alike anyway, and from scratch each has drawn its own decoder.
    if config.model.backbone_init == "shared":
        for network in networks.values():
            network.network.encoder.load_state_dict(networks["a"].network.encoder.state_dict())  # type: ignore[union-attr, operator]
    return networks


def build_network(config: NetworkConfig, num_classes: int, *, seed: int) -> Segmenter:
    """One network with its weights; what weights do not cover is drawn from `seed`."""
    check_names(config)
    weights = None if config.weights == "none" else config.weights
    # On the CPU, whatever the device: initial weights are then the same everywhere. The caller's random state stays.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = _create(config, weights, num_classes)
        except _REFUSALS as err:
            raise ConfigError(
                f"model: {config.architecture} with encoder {config.encoder} and options {config.options} "
                f"cannot be built: {_reason(err)}{_hint(err)}"
            ) from err
        except OSError as err:
            raise ConfigError(
                f"model.weights: the {config.weights!r} weights of {config.encoder} could not be fetched from the hub "
                f"({first_line(err)[:200]}). Give a local file as model.weights_file, or weights: none."
            ) from err
    filled = ""
    if config.weights_file is not None:
        filled = load_encoder(network.encoder, config.encoder, config.weights_file)  # type: ignore[arg-type]
    normalised = normalisation(config)
    strides = network.encoder.output_strides if config.architecture.lower() == DPT else ()  # type: ignore[union-attr]
    divisor = image_divisor(strides[-1], len(strides)) if strides else STRIDE  # type: ignore[index, arg-type]
    return Segmenter(
        network, normalised.mean, normalised.std, divisor=divisor, freeze_encoder=config.freeze_encoder, filled=filled
    )


def _create(config: NetworkConfig, weights: str | None, num_classes: int) -> nn.Module:
    if config.architecture == ARCHITECTURE:
        return build_deeplab(config.encoder, weights, num_classes, **config.options)  # type: ignore[arg-type]
    if is_import_path(config.architecture):
        return _plugged_in(config, weights, num_classes)
    import segmentation_models_pytorch as smp  # late: takes seconds, and commands that build nothing load this module, too

    network: nn.Module = smp.create_model(
        config.architecture,
        encoder_name=config.encoder,
        encoder_weights=weights,
        classes=num_classes,
        **create_model_options(config),
    )
    if config.architecture.lower() == DPT:
        fit_patches(network)
    return network


def _plugged_in(config: NetworkConfig, weights: str | None, num_classes: int) -> nn.Module:
    build = load_plugin("model.architecture", config.architecture)
    network = build(encoder_name=config.encoder, encoder_weights=weights, classes=num_classes, **config.options)
    if not (isinstance(network, nn.Module) and isinstance(getattr(network, "encoder", None), nn.Module)):
        raise ConfigError(
            f"model.architecture: {config.architecture} must return an nn.Module with an `encoder`, but returned {type(network).__name__}. "
            "An architecture is called with encoder_name=, encoder_weights=, classes= and the options, and maps normalised images "
            "(B, 3, H, W), float, sides multiples of 32, to logits (B, classes, h, w) of any size."
        )
    return network


def create_model_options(config: NetworkConfig) -> dict[str, OptionValue]:
    """Further arguments of `create_model`: those of the config, and what lets a vision transformer see images of any size."""
    of_one_size = config.architecture.lower() == DPT and config.encoder.startswith("tu-")
    return {**({"dynamic_img_size": True} if of_one_size and takes_any_size(config.encoder) else {}), **config.options}


def _reason(err: BaseException) -> str:
    """Returns the first line of an error; of an argument that nobody takes, without the function of smp's or timm's that was called."""
    unknown = re.search(r"got an unexpected keyword argument '(\w+)'", str(err))
    return f"neither takes an option {unknown[1]!r}." if unknown else first_line(err)


def _hint(err: BaseException) -> str:
    """Returns what to do about an error of smp that does not say it, or ""."""
    plain = "downsampling pattern" in str(err)
    return f" A vision transformer without a pyramid of maps needs architecture: {DPT}." if plain else ""
