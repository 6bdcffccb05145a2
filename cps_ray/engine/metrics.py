"""Scores from integer sums, of a confusion matrix or of calibration bins: exact over batches and ranks, whatever their sizes. All
are nan where nothing was counted."""

import torch
from torch import Tensor

# N images, C classes, H W pixels, P pixels in a row.
_LABELS = 256
"""Values that a mask may have."""
CALIBRATION_BINS = 15
"""Bins of equal width of the probability of a predicted class, as in Guo et al. (ICML 2017)."""
_UNIT = 2.0**-24
"""What summed confidences are multiples of: the resolution of float32 below 1."""


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


def class_counts(confusion_CC: Tensor) -> Tensor:
    """Returns the pixels of each class that are found, that are true, and that are predicted: (..., 3, C) of (..., C, C)."""
    return torch.stack([confusion_CC.diagonal(dim1=-2, dim2=-1), confusion_CC.sum(-1), confusion_CC.sum(-2)], dim=-2)


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


def calibration(confidence_P: Tensor, hit_P: Tensor, counted_P: Tensor) -> Tensor:
    """Sums per bin of confidence: pixels, hits, and confidence in units of 2^-24: int64 (3, CALIBRATION_BINS).

    `confidence_P`: probability of the predicted class, 0..1; `hit_P`: whether that class is true; `counted_P`: whether the pixel
    counts at all. Bin m holds confidences in ((m - 1)/15, m/15] (Guo et al., ICML 2017, section 2).
    """
    # nan, of a network that has diverged, is no confidence at all.
    confidence_P = confidence_P.nan_to_num(0.0)
    # Bin 0 takes what does not count: cheaper than picking the others.
    bin_P = (confidence_P * CALIBRATION_BINS).ceil_().clamp_(1, CALIBRATION_BINS).long().mul_(counted_P)
    pixels_M2 = torch.bincount(bin_P * 2 + hit_P, minlength=2 * CALIBRATION_BINS + 2).view(-1, 2)[1:]
    # Whole numbers below 2^53 add up without rounding, in any order.
    units_M = torch.bincount(bin_P, (confidence_P / _UNIT).round_().double(), CALIBRATION_BINS + 1)[1:]
    return torch.stack([pixels_M2.sum(dim=1), pixels_M2[:, 1], units_M.long()])


def calibration_error(sums: Tensor) -> float:
    """Expected calibration error (Guo et al., ICML 2017, eq. 5), in 0..1, from what `calibration` gives: the difference of accuracy and
    mean confidence, averaged over bins by their pixels. 0 is best."""
    pixels_M, hits_M, units_M = sums.double()
    return float((hits_M - units_M * _UNIT).abs().sum() / pixels_M.sum())
