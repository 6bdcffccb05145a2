"""Losses and labels for every pixel, computed a few images at a time from the coarse logits that a network makes.

Logits at full resolution are the largest tensors of a step: C floats for each pixel, several times over with their softmax and
gradients. Here they exist for one chunk of images only, forward and backward in one go; what is kept is the gradient by
the coarse logits, 16 times smaller (19 classes at 512x512: 1.2 MB an image and network, instead of 20 MB several times over).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cps_ray.engine.batch import IGNORE

# B images, C classes, H W pixels, h w cells of the coarse logits. A tensor's name ends in its dims.
STRIDE = 32
"""Sides of what a network sees are multiples of this: every smp encoder divides the image by at most so much."""
_CHUNK_PX = {"cpu": 2**18, "cuda": 2**20}
"""Pixels at once. On CPUs the fewer the faster, by caches, until calls cost more than work; on GPUs launches cost more."""

Rule = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""(logits (B, C, H, W) float32, which it may overwrite, targets ...) -> (loss, gradient by the logits, its terms (K,))."""


def padded(size: tuple[int, int], divisor: int = STRIDE) -> tuple[int, int]:
    """(height, width) in px with each side a multiple of `divisor`."""
    # Not -(-side // divisor): where this becomes part of an ONNX graph, a division rounds toward zero.
    height, width = ((side + divisor - 1) // divisor * divisor for side in size)
    return height, width


def upsample(coarse_BChw: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits of a padded image at any resolution -> (B, C, H, W) of the image of `size` in its upper left corner."""
    full = padded(size)
    if coarse_BChw.shape[-2:] != full:
        coarse_BChw = F.interpolate(coarse_BChw, full, mode="bilinear", align_corners=True)
    return coarse_BChw[..., : size[0], : size[1]]


def _upsample_transposed(grad_BCHW: Tensor, coarse_shape: torch.Size) -> Tensor:
    """Returns the gradient by the coarse logits from that by the result of `upsample`."""
    height, width = grad_BCHW.shape[-2:]
    full = padded((height, width))
    if (height, width) != full:  # `upsample` has cut the padding off: no gradient comes from there
        grad_BCHW = F.pad(grad_BCHW, (0, full[1] - width, 0, full[0] - height))
    if coarse_shape[-2:] == full:
        return grad_BCHW
    return torch.ops.aten.upsample_bilinear2d_backward(grad_BCHW, list(full), list(coarse_shape), True)  # type: ignore[no-any-return]


def _chunks(images: int, size: tuple[int, int], device: torch.device) -> Iterator[slice]:
    per_chunk = max(1, _CHUNK_PX.get(device.type, 2**18) // (size[0] * size[1]))
    return (slice(first, min(first + per_chunk, images)) for first in range(0, images, per_chunk))


def _full(coarse_BChw: Tensor, size: tuple[int, int]) -> Tensor:
    """Float32 logits of a chunk, in memory of their own, classes last in memory: sums over classes are then the fastest."""
    coarse = coarse_BChw.detach().float()
    logits = upsample(coarse.contiguous(memory_format=torch.channels_last), size)
    # Rules overwrite what they get. Where there was nothing to convert or to upsample, it is still the network's own output.
    return logits.clone() if logits.data_ptr() == coarse_BChw.data_ptr() else logits


class _Dense(torch.autograd.Function):
    """Computes the summed loss and, in the same pass, its gradient by the coarse logits; returns the terms too, without gradient."""

    @staticmethod
    def forward(
        ctx: Any, coarse_BChw: Tensor, size: tuple[int, int], rule: Rule, *targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Computes what `backward` needs as well: full-resolution logits do not outlive this pass."""
        losses, grads, terms = [], [], []
        for chunk in _chunks(coarse_BChw.shape[0], size, coarse_BChw.device):
            coarse = coarse_BChw[chunk]
            loss, grad_BCHW, terms_K = rule(_full(coarse, size), *(target[chunk] for target in targets))
            losses.append(loss)
            grads.append(_upsample_transposed(grad_BCHW, coarse.shape))
            terms.append(terms_K)
        ctx.save_for_backward(torch.cat(grads))
        ctx.targets, ctx.dtype = len(targets), coarse_BChw.dtype
        summed_K = torch.stack(terms).sum(dim=0)
        ctx.mark_non_differentiable(summed_K)
        return torch.stack(losses).sum(), summed_K

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # The sum is a scalar, so the gradient by the logits, known since the forward pass, is only scaled. Terms have none.
        (grad_BChw,) = ctx.saved_tensors
        return ((grad_BChw * grads[0]).to(ctx.dtype), None, None, *[None] * ctx.targets)


def cross_entropy(
    coarse_BChw: Tensor,
    targets: Sequence[Tensor],
    weights: Sequence[Tensor | float],
    class_weights: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums weight times cross-entropy over K targets and over the pixels that are not IGNORE.

    `targets`: uint8 or int64 (B, H, W) each; `weights`: scalars; `class_weights`: for each target None or float32 (C,), by which
    the cross-entropy of its pixels is multiplied. Returns the sum, scalar float32 with gradient, and the K
    cross-entropies, float32 (K,), without `weights` and without gradient. The same as `F.cross_entropy(upsample(coarse), target, ignore_index=IGNORE, reduction="sum")`
    for each, in less time and a fraction of the memory (docs/step.md): one softmax serves all targets.
    """

    def rule(logits_BCHW: Tensor, *targets_BHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes loss, gradient and terms of a chunk; the gradient overwrites the logits."""
        logits_BCHW -= logits_BCHW.amax(dim=1, keepdim=True)  # exp cannot overflow
        classes, counts, own = [], [], []
        for target, of_classes in zip(targets_BHW, class_weights or [None] * len(targets_BHW), strict=True):
            known = target.unsqueeze(1) != IGNORE
            # Class 0 stands in for IGNORE, which gather would not accept; `known` takes it out again.
            label = target.unsqueeze(1).long().masked_fill_(~known, 0)
            own.append(logits_BCHW.gather(1, label))
            classes.append(label)
            counts.append(known if of_classes is None else known * of_classes[label])
        prob_BCHW = logits_BCHW.exp_()  # in place: probabilities once they are divided by their total, below
        total_B1HW = prob_BCHW.sum(dim=1, keepdim=True)
        log_total = total_B1HW.log()
        terms_K = torch.stack([((log_total - of) * known).sum() for of, known in zip(own, counts, strict=True)])
        # d loss / d logits = sum over targets of weight * (softmax - one-hot), zero where a target is ignored. So the softmax is
        # multiplied once, by the sum of the weights that apply to a pixel, and each target's class is pulled by its own.
        pulls = [(known * weight).to(prob_BCHW.dtype) for known, weight in zip(counts, weights, strict=True)]
        prob_BCHW *= sum(pulls[1:], pulls[0]) / total_B1HW
        for label, pull in zip(classes, pulls, strict=True):
            prob_BCHW.scatter_add_(1, label, -pull)
        loss = sum(
            (term * weight for term, weight in zip(terms_K.unbind(), weights, strict=True)), terms_K.new_zeros(())
        )
        return loss, prob_BCHW, terms_K

    size = (targets[0].shape[-2], targets[0].shape[-1])
    return _Dense.apply(coarse_BChw, size, rule, *targets)  # type: ignore[no-any-return, no-untyped-call]


def pixel_cross_entropy(coarse_BChw: Tensor, target_BHW: Tensor) -> Tensor:
    """Cross-entropy of each pixel, 0 where the target is IGNORE: float32 (B, H, W), without gradient."""
    size = (target_BHW.shape[-2], target_BHW.shape[-1])
    losses = []
    for chunk in _chunks(coarse_BChw.shape[0], size, coarse_BChw.device):
        target = target_BHW[chunk].long()
        losses.append(F.cross_entropy(_full(coarse_BChw[chunk], size), target, ignore_index=IGNORE, reduction="none"))
    return torch.cat(losses)


def squared_difference(
    coarse_BChw: Tensor, teacher_BChw: Tensor, counted_BHW: Tensor, weight: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Returns `weight` times the squared difference of two networks' probabilities, summed over classes and over the pixels of
    `counted_BHW` (bool): scalar float32 with gradient for the first, none for the teacher; and the same without the weight, float32
    (1,) without gradient."""
    size = (counted_BHW.shape[-2], counted_BHW.shape[-1])

    def rule(logits_BCHW: Tensor, teacher: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        prob_BCHW = logits_BCHW.softmax(dim=1)
        difference_BCHW = (prob_BCHW - _full(teacher, size).softmax(dim=1)) * counted.unsqueeze(1)
        term = difference_BCHW.square().sum()
        # The softmax's Jacobian, d prob_i / d logit_j = prob_i (1[i = j] - prob_j), applied to d loss / d prob = 2 weight difference.
        mean_B1HW = (prob_BCHW * difference_BCHW).sum(dim=1, keepdim=True)
        return weight * term, 2.0 * weight * prob_BCHW * (difference_BCHW - mean_B1HW), term.view(1)

    return _Dense.apply(coarse_BChw, size, rule, teacher_BChw.detach(), counted_BHW)  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def hard_labels(coarse_BChw: Tensor, size: tuple[int, int], confidence: float = 0.0) -> Tensor:
    """The likeliest class of each pixel: uint8 (B, H, W); IGNORE where its probability is below `confidence`."""
    labels_BHW = torch.empty(coarse_BChw.shape[0], *size, dtype=torch.uint8, device=coarse_BChw.device)
    for chunk in _chunks(coarse_BChw.shape[0], size, coarse_BChw.device):
        logits_BCHW = _full(coarse_BChw[chunk], size)
        labels_BHW[chunk] = logits_BCHW.argmax(dim=1)
        if confidence > 0.0:
            labels_BHW[chunk].masked_fill_(_certainty(logits_BCHW) < confidence, IGNORE)
    return labels_BHW


def _certainty(logits_BCHW: Tensor) -> Tensor:
    """The likeliest class's probability: (B, H, W). Overwrites the logits."""
    logits_BCHW -= logits_BCHW.amax(
        dim=1, keepdim=True
    )  # the likeliest class's exp is now 1, the numerator of its softmax
    return logits_BCHW.exp_().sum(dim=1).reciprocal()


@torch.no_grad()
def certainty(coarse_BChw: Tensor, size: tuple[int, int]) -> Tensor:
    """Probability of the likeliest class of each pixel: float32 (B, H, W)."""
    chunks = _chunks(coarse_BChw.shape[0], size, coarse_BChw.device)
    return torch.cat([_certainty(_full(coarse_BChw[chunk], size)) for chunk in chunks])


@torch.no_grad()
def confidence_by_class(coarse_BChw: Tensor, counted_BHW: Tensor) -> Tensor:
    """Summed probability, and number, of the pixels at which each class is the likeliest, over the pixels of `counted_BHW` (bool):
    float64 (2, C)."""
    size = (counted_BHW.shape[-2], counted_BHW.shape[-1])
    totals_2C = torch.zeros(2, coarse_BChw.shape[1], dtype=torch.float64, device=coarse_BChw.device)
    for chunk in _chunks(coarse_BChw.shape[0], size, coarse_BChw.device):
        logits_BCHW = _full(coarse_BChw[chunk], size)
        label_P, counted_P = logits_BCHW.argmax(dim=1).flatten(), counted_BHW[chunk].flatten().double()
        # Not bincount, which waits for a GPU.
        totals_2C[0].scatter_add_(0, label_P, _certainty(logits_BCHW).flatten() * counted_P)
        totals_2C[1].scatter_add_(0, label_P, counted_P)
    return totals_2C
