"""Scores from a summed confusion matrix: exact over batches and ranks, whatever their sizes. All are nan for an empty matrix."""

import torch
from torch import Tensor

# N images, C classes, H W pixels.
_LABELS = 256
"""Values that a mask may have."""


def confusion(prediction_NHW: Tensor, target_NHW: Tensor, num_classes: int) -> Tensor:
    """Pixels per (image, true class, predicted class): int64 (N, C, C). Targets of C and above, as IGNORE is, are left out.

    Integers of any kind: predictions in 0..C-1, also where they are left out; targets in 0..255.
    """
    images = target_NHW.shape[0]
    # A row for each value that a mask may have: counting the ignored pixels too is far cheaper than picking the others.
    first_N11 = torch.arange(images, dtype=torch.int32, device=target_NHW.device).view(-1, 1, 1) * _LABELS
    cell_NHW = (target_NHW + first_N11).mul_(num_classes).add_(prediction_NHW)
    counts = torch.bincount(cell_NHW.flatten(), minlength=images * _LABELS * num_classes)
    return counts.view(images, _LABELS, num_classes)[:, :num_classes]


def _hits_and_unions(confusion_CC: Tensor) -> tuple[Tensor, Tensor]:
    matrix = confusion_CC.double()
    hit = matrix.diagonal()
    return hit, matrix.sum(0) + matrix.sum(1) - hit


def iou(confusion_CC: Tensor) -> Tensor:
    """Intersection over union per class: float64 (C,) in 0..1; nan where a class is neither true nor predicted."""
    hit, union = _hits_and_unions(confusion_CC)
    return hit / union


def mean_iou(confusion_CC: Tensor) -> float:
    """Mean IoU over the classes that are true or predicted somewhere, in 0..1; each counts the same.

    A class that is nowhere true but predicted counts as 0; one that is neither is left out of the mean.
    """
    return float(iou(confusion_CC).nanmean())


def micro_iou(confusion_CC: Tensor) -> float:
    """Hits over all classes divided by the unions of all classes, in 0..1. Absent classes add nothing to either."""
    hit, union = _hits_and_unions(confusion_CC)
    return float(hit.sum() / union.sum())


def pixel_accuracy(confusion_CC: Tensor) -> float:
    """Fraction of the pixels whose class is found, in 0..1. Absent classes have no pixels, hence no influence."""
    matrix = confusion_CC.double()
    return float(matrix.trace() / matrix.sum())


def class_accuracy(confusion_CC: Tensor) -> float:
    """Mean, over the classes that are true somewhere, of the fraction of their pixels that is found (recall), in 0..1."""
    matrix = confusion_CC.double()
    return float((matrix.diagonal() / matrix.sum(1)).nanmean())
