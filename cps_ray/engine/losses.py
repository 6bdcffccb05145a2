"""Losses as what they are here: targets and their weights for `dense.cross_entropy`."""

import math
from typing import assert_never

import torch
from torch import Tensor

from cps_ray.config.train import LossConfig
from cps_ray.engine.batch import IGNORE
from cps_ray.engine.dense import pixel_cross_entropy

# B images, C classes, H W pixels, h w cells of coarse logits. A tensor's name ends in its dims.

Term = tuple[Tensor, Tensor | float]
"""(target (B, H, W) with IGNORE where nothing counts, scalar by which the cross-entropy of every other pixel is multiplied)."""


def supervised_term(loss: LossConfig, coarse_BChw: Tensor, mask_BHW: Tensor, valid_pixels: Tensor) -> Term:
    """`ce`: every labelled pixel, divided by `valid_pixels`, the (scalar) pixels that count in the whole global batch
    divided by the number of micro-batches in it. `ohem`: the mean over this micro-batch's hard pixels.
    """
    if loss.supervised == "ohem":
        return ohem_term(coarse_BChw, mask_BHW, loss.ohem_threshold, loss.ohem_min_kept)
    if loss.supervised == "ce":
        return mask_BHW, 1.0 / valid_pixels.clamp(min=1)
    assert_never(loss.supervised)


def ohem_term(coarse_BChw: Tensor, mask_BHW: Tensor, threshold: float, min_kept: int) -> Term:
    """Online hard example mining (Shrivastava et al., CVPR 2016), in the form of the CPS reference.

    Mean over the pixels whose true class has a probability of at most max(threshold, the min_kept-th smallest one);
    all valid pixels if there are fewer than min_kept.
    """
    # probability = exp(-loss): the smallest probabilities are the largest losses, so select on the loss itself.
    loss_BHW = pixel_cross_entropy(coarse_BChw, mask_BHW)
    valid_BHW = mask_BHW != IGNORE
    ranked = loss_BHW.masked_fill(~valid_BHW, -torch.inf).flatten()
    if ranked.numel() < min_kept:  # topk would refuse
        kept_BHW = valid_BHW
    else:
        hardest = ranked.topk(min_kept, sorted=True).values[-1]  # -inf, hence every pixel, if fewer are valid
        kept_BHW = valid_BHW & (loss_BHW >= hardest.clamp(max=-math.log(threshold)))
    return mask_BHW.masked_fill(~kept_BHW, IGNORE), 1.0 / kept_BHW.sum().clamp(min=1)
