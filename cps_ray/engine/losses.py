"""The supervised loss, and hard labels of one network as targets of the other (Chen et al., CVPR 2021, eq. 1-4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cps_ray.config.train import LossConfig
from cps_ray.engine.batch import IGNORE

# B images, C classes, H W pixels. A tensor's name ends in its dims.


def pseudo_labels(logits_BCHW: Tensor, confidence: float) -> Tensor:
    """Hard labels of a network for its peer: int64 (B, H, W); IGNORE where its probability is below `confidence`.

    No gradient flows through them.
    """
    logits = logits_BCHW.detach()
    label_BHW = logits.argmax(dim=1)
    if confidence <= 0.0:
        return label_BHW
    # softmax(max) without the whole softmax: exp(max - logsumexp).
    certainty_BHW = (logits.amax(dim=1).float() - logits.float().logsumexp(dim=1)).exp()
    return label_BHW.masked_fill(certainty_BHW < confidence, IGNORE)


def cross_pseudo_loss(logits_BCHW: Tensor, peer_labels_BHW: Tensor) -> Tensor:
    """Cross-entropy against the peer's hard labels, scalar float32.

    The mean is over all pixels; an unsure (IGNORE) pixel counts as zero loss, as in FixMatch. The divisor is then the
    same on every rank and micro-batch, so the value does not depend on how a batch is split.
    """
    total = F.cross_entropy(logits_BCHW.float(), peer_labels_BHW, ignore_index=IGNORE, reduction="sum")
    return total / peer_labels_BHW.numel()


def supervised_loss(loss: LossConfig, logits_BCHW: Tensor, mask_BHW: Tensor, valid_pixels: Tensor) -> Tensor:
    """Scalar float32. `ce`: the sum over this part's pixels divided by `valid_pixels`, the (scalar) pixels that count in
    the whole global batch divided by the number of parts. `ohem`: the mean over this part's hard pixels.
    """
    target = mask_BHW.long()
    if loss.supervised == "ohem":
        return ohem(logits_BCHW, target, loss.ohem_threshold, loss.ohem_min_kept)
    total = F.cross_entropy(logits_BCHW.float(), target, ignore_index=IGNORE, reduction="sum")
    return total / valid_pixels.clamp(min=1)


def ohem(logits_BCHW: Tensor, target_BHW: Tensor, threshold: float, min_kept: int) -> Tensor:
    """Online hard example mining (Shrivastava et al., CVPR 2016), in the form of the CPS reference.

    Mean cross-entropy of the pixels whose true class has a probability of at most max(threshold, the min_kept-th
    smallest one); all valid pixels if there are fewer than min_kept.
    """
    loss_BHW = F.cross_entropy(logits_BCHW.float(), target_BHW, ignore_index=IGNORE, reduction="none")
    pixel_loss = loss_BHW[target_BHW != IGNORE]
    if pixel_loss.numel() == 0:
        return loss_BHW.sum()
    if pixel_loss.numel() > min_kept:
        # probability = exp(-loss): the smallest probabilities are the largest losses, so select on the loss itself.
        hardest = pixel_loss.detach().topk(min_kept, sorted=True).values[-1]
        limit = torch.minimum(hardest, -torch.log(torch.as_tensor(threshold, device=hardest.device)))
        pixel_loss = pixel_loss[pixel_loss.detach() >= limit]
    return pixel_loss.mean()
