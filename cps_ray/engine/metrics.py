"""IoU from a summed confusion matrix: exact over batches and ranks, whatever their sizes."""

import torch
from torch import Tensor

from cps_ray.engine.batch import IGNORE

# N images, C classes, H W pixels.


def confusion(prediction_NHW: Tensor, target_NHW: Tensor, num_classes: int) -> Tensor:
    """Pixels per (image, true class, predicted class): int64 (N, C, C). IGNORE pixels are left out."""
    images = target_NHW.shape[0]
    cells = num_classes * num_classes
    keep = target_NHW != IGNORE
    image = torch.arange(images, device=target_NHW.device).view(-1, 1, 1).expand_as(target_NHW)[keep]
    cell = target_NHW[keep].long() * num_classes + prediction_NHW[keep].long()
    return torch.bincount(image * cells + cell, minlength=images * cells).view(images, num_classes, num_classes)


def iou(confusion_CC: Tensor) -> Tensor:
    """Intersection over union per class: float64 (C,) in 0..1; nan where a class is neither true nor predicted."""
    matrix = confusion_CC.double()
    hit = matrix.diagonal()
    return hit / (matrix.sum(0) + matrix.sum(1) - hit)


def mean_iou(confusion_CC: Tensor) -> float:
    """Mean IoU over the classes that are true or predicted somewhere, in 0..1."""
    return float(iou(confusion_CC).nanmean())
