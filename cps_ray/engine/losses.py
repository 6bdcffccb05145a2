"""Losses as what they are here: targets and their weights for `dense.cross_entropy`."""

import functools
import math
from typing import NamedTuple, assert_never

import torch
from torch import Tensor

from cps_ray.config.train import LossConfig
from cps_ray.engine.batch import IGNORE
from cps_ray.engine.dense import pixel_cross_entropy

# B images, C classes, H W pixels, h w cells of coarse logits. A tensor's name ends in its dims.


class Term(NamedTuple):
    """A target for `cross_entropy`, and what multiplies the cross-entropy of its pixels."""

    target: Tensor
    """(B, H, W), IGNORE where nothing counts."""
    weight: Tensor | float
    """Scalar."""
    class_weights: Tensor | None = None
    """float32 (C,), by the target's class."""


@functools.lru_cache
def class_weights_on(device: torch.device, weights: tuple[float, ...] | None) -> Tensor | None:
    """Returns weights of classes as float32 (C,)."""
    return None if weights is None else torch.tensor(weights, dtype=torch.float32, device=device)


def weighed_pixels(loss: LossConfig, mask_BHW: Tensor) -> Tensor:
    """Number of labelled pixels, or with class weights the sum of their weights: scalar."""
    known = mask_BHW != IGNORE
    weight_C = class_weights_on(mask_BHW.device, loss.class_weights)
    return known.sum() if weight_C is None else (weight_C[mask_BHW.long().masked_fill(~known, 0)] * known).sum()


def supervised_term(loss: LossConfig, coarse_BChw: Tensor, mask_BHW: Tensor, valid_pixels: Tensor) -> Term:
    """`ce`: every labelled pixel, divided by `valid_pixels`, the (scalar) `weighed_pixels` of the whole global batch
    divided by the number of micro-batches in it. `ohem`: the mean over this micro-batch's hard pixels.
    """
    weight_C = class_weights_on(mask_BHW.device, loss.class_weights)
    if loss.supervised == "ohem":
        target = hard_pixels(coarse_BChw, mask_BHW, loss.ohem_threshold, loss.ohem_min_kept)
        return Term(target, _reciprocal(weighed_pixels(loss, target)), weight_C)
    if loss.supervised == "ce":
        return Term(mask_BHW, _reciprocal(valid_pixels), weight_C)
    assert_never(loss.supervised)


def _reciprocal(pixels: Tensor) -> Tensor:
    return torch.where(pixels > 0, 1.0 / pixels, 0.0)  # no pixel: no loss, and no nan


def hard_pixels(coarse_BChw: Tensor, mask_BHW: Tensor, threshold: float, min_kept: int) -> Tensor:
    """Returns the mask with IGNORE on easy pixels: online hard example mining (Shrivastava et al., CVPR 2016), in the form of the CPS
    reference.

    Kept are the pixels whose true class has a probability of at most max(threshold, the min_kept-th smallest one);
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
    return mask_BHW.masked_fill(~kept_BHW, IGNORE)
