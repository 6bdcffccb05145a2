"""Perturbed features: what stands between a network's encoder and its decoder is changed, in training only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cps_ray.errors import ConfigError

# B images, C channels; h w cells of a feature map, t tokens of a vision transformer.
Perturb = Callable[[Tensor], Tensor]
"""Features (B, C, h, w), or tokens (B, C, t), to others of as many channels. May change B, for all features alike."""


def forward_perturbed(network: nn.Module, x_B3HW: Tensor, perturb: Perturb) -> Tensor:
    """Coarse logits of a network whose decoder sees `perturb` of every feature that its encoder makes.

    Raises ConfigError for a network that has no `encoder`. This pass is never compiled.
    """
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise ConfigError(
            f"model.architecture: perturbed features need a network with an `encoder`, but {type(network).__name__} has none. "
            "Choose another architecture, or `feature_dropout: 0`."
        )
    # A hook, because decoders are called in different ways. `forward` itself, because compiled code would not notice the hook.
    with encoder.register_forward_hook(lambda _module, _images, features: _perturbed(features, perturb)):
        logits: Tensor = network.forward(x_B3HW)
    return logits


def _perturbed(features: Any, perturb: Perturb) -> Any:
    """Perturbs all tensors of an encoder's output, however nested. smp's vision transformers add tokens, (B, t, C) or None."""
    if isinstance(features, Tensor):
        return perturb(features.transpose(1, 2)).transpose(1, 2) if features.dim() == 3 else perturb(features)
    return None if features is None else type(features)([_perturbed(each, perturb) for each in features])


def dropout(probability: float) -> Perturb:
    """Sets whole channels to zero, drawn for each image and feature map, and scales the others up by 1 / (1 - probability)."""
    return lambda features: torch.feature_dropout(features, probability, True)


def beside(perturb: Perturb) -> Perturb:
    """Puts the perturbed features behind the features themselves: (B, ...) -> (2B, ...)."""
    return lambda features: torch.cat([features, perturb(features)])


def complementary_dropout(probability: float) -> Perturb:
    """Divides the channels of each image between its two views, which are the two halves of the batch: (2B, ...) -> (2B, ...).

    What one view sees is zero for the other, and twice as large (UniMatch V2, Yang et al., TPAMI 2025). As in its code,
    B (1 - probability) of the images, rounded down, keep all channels, and maps of as many channels have one mask.
    """
    masks: dict[int, Tensor] = {}
    whole: list[Tensor] = []

    def perturb(features: Tensor) -> Tensor:
        """Draws the masks at the first map of a pass, and uses them for all others of it."""
        images, channels = features.shape[0] // 2, features.shape[1]
        if not whole:
            # An order at random without `randperm`, for which a GPU would be waited for.
            order = torch.rand(images, device=features.device).argsort()
            whole.append((order < int(images * (1.0 - probability))).unsqueeze(1))
        if channels not in masks:
            first = 2.0 * features.new_empty(images, channels).bernoulli_(0.5)
            masks[channels] = torch.cat([torch.where(whole[0], 1.0, mask) for mask in (first, 2.0 - first)])
        return features * masks[channels].view(2 * images, channels, *[1] * (features.dim() - 2))

    return perturb
