"""Which pseudo labels count: a threshold of confidence per class."""

import torch
from torch import Tensor

from cps_ray.engine.batch import IGNORE
from cps_ray.engine.ranks import Ranks

# B images, H W pixels, K classes.
_BINS = 4096
_DIGITS = 7
"""Decimals of 1 - probability that the bins tell apart: what float32 has."""


def surest(
    label_BHW: Tensor, certainty_BHW: Tensor, counted_BHW: Tensor, fraction: float, num_classes: int, ranks: Ranks
) -> Tensor:
    """Whether a pixel is among the surest `fraction` of its class's pixels: bool (B, H, W) (Zou et al., ECCV 2018, class-balanced
    self-training).

    `label_BHW`: uint8, IGNORE counts nowhere; `certainty_BHW`: float32, probability of the label; `counted_BHW`: bool, the pixels of
    which the fraction is taken. Thresholds are those of the pixels of all batch shards, from a histogram: a collective. At least
    the fraction is kept, and as much more as the bin of the threshold holds.
    """
    # Bins of equal width in log(1 - p), because networks are soon so sure that in p most pixels would be in the last bin.
    unsure = (1.0 - certainty_BHW).clamp(min=10.0**-_DIGITS)
    bin_BHW = (-torch.log10(unsure) * (_BINS / _DIGITS)).long().clamp(0, _BINS - 1)
    class_BHW = label_BHW.long().clamp(max=num_classes)  # IGNORE becomes a class of its own, behind the others
    cell_BHW = class_BHW * _BINS + bin_BHW
    histogram = torch.zeros((num_classes + 1) * _BINS, dtype=torch.float64, device=label_BHW.device)
    histogram.scatter_add_(0, cell_BHW.flatten(), counted_BHW.flatten().double())
    count_KN = ranks.sum_over_shards(histogram).view(num_classes + 1, _BINS)
    # Pixels in a bin and in surer ones: they fall from bin to bin, and the threshold is the last bin at which they are enough.
    surer_KN = count_KN.flip(1).cumsum(1).flip(1)
    enough_KN = surer_KN >= fraction * count_KN.sum(dim=1, keepdim=True)
    threshold_K = enough_KN.long().sum(dim=1) - 1
    return (bin_BHW >= threshold_K[class_BHW]) & (label_BHW != IGNORE)
