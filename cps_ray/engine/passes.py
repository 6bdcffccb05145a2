"""Passes of images through the networks: those that learn, and those that make pseudo labels."""

import torch
from torch import Tensor, nn

from cps_ray.config.train import ComputeConfig
from cps_ray.engine.batch import Batch
from cps_ray.engine.features import Perturb
from cps_ray.engine.state import autocast
from cps_ray.errors import ConfigError

# L labelled images, U unlabelled images; C classes, H W pixels, h w cells of coarse logits. A tensor's name ends in its dims.


def weak_view(batch: Batch) -> Tensor:
    """Returns the unlabelled images as they come: (U, 3, H, W)."""
    return _there(batch.unlabeled_image, "unlabelled images: every method but `supervised` needs some")


def second_view(batch: Batch) -> Tensor:
    """Returns the second view of the unlabelled images, which the method's `views` must have declared: (U, 3, H, W)."""
    return _there(batch.unlabeled_second, "a second view of unlabelled images: the method's `views` must name it")


def strong_views(batch: Batch, count: int = 2) -> list[Tensor]:
    """Returns the one or two strong views of the unlabelled images, (U, 3, H, W) each."""
    third = (
        [_there(batch.unlabeled_third, "a third view of unlabelled images: the method's `views` must name it")]
        if count == 2
        else []
    )
    return [second_view(batch), *third]


def _there(view: Tensor | None, what: str) -> Tensor:
    if view is None:
        raise ConfigError(f"method: the batch is without {what}.")
    return view


def forward(compute: ComputeConfig, model: nn.Module, image_B3HW: Tensor, perturb: Perturb | None = None) -> Tensor:
    """Coarse logits (B, C, h, w), with gradient. `perturb` changes the features that the decoder sees, and may change B."""
    with autocast(compute.autocast, image_B3HW.device):
        coarse: Tensor = model(image_B3HW) if perturb is None else model(image_B3HW, perturb=perturb)
    return coarse


def student_logits(compute: ComputeConfig, model: nn.Module, batch: Batch, image_U3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Coarse logits of the labelled images and of these unlabelled ones, in one pass."""
    labeled = batch.labeled_image.shape[0]
    coarse = forward(compute, model, torch.cat([batch.labeled_image, image_U3HW]))
    return coarse[:labeled], coarse[labeled:]


@torch.no_grad()
def teacher_logits(
    compute: ComputeConfig, network: nn.Module, image_U3HW: Tensor, *, batch_statistics: bool = False
) -> Tensor:
    """Coarse logits (U, C, h, w) of a network that does not learn from this pass.

    `batch_statistics`: whether its norms take those of the batch, and update their running ones, as in training.
    """
    mode = network.training
    network.train(batch_statistics)
    coarse = forward(compute, network, image_U3HW)
    network.train(mode)
    return coarse
