"""Losses on masks. Cross-entropies are targets and their weights for `dense.cross_entropy`; all others are functions, by autograd."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cps_ray.config.plugins import is_import_path, load_plugin
from cps_ray.config.train import WITHOUT_CLASS_WEIGHTS, LossConfig
from cps_ray.engine.batch import IGNORE
from cps_ray.engine.dense import cross_entropy, pixel_cross_entropy, upsample
from cps_ray.errors import ConfigError
from cps_ray.text import first_line

# B images, C classes, H W pixels, h w cells of coarse logits. A tensor's name ends in its dims.

_BY_PIXEL = ("ce", "ohem")
_OF_SMP = {"dice": "DiceLoss", "focal": "FocalLoss", "lovasz": "LovaszLoss"}
LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits float32 (B, C, H, W), target int64 (B, H, W) with IGNORE where nothing counts) -> scalar, a mean over what counts.

It sees the images that pass a network at once; the losses of workers and micro-batches are averaged, as those of `ohem` are. It is not
called where no pixel counts.
"""
_CONTRACT = (
    "A loss is a function (logits, target) -> scalar with gradient: logits float32 (B, C, H, W), target int64 (B, H, W) with "
    f"{IGNORE} where nothing counts; a parameter `class_weights`, float32 (C,), may follow."
)


class Term(NamedTuple):
    """A target for `cross_entropy`, and what multiplies the cross-entropy of its pixels."""

    target: Tensor
    """(B, H, W), IGNORE where nothing counts."""
    weight: Tensor | float
    """Scalar."""
    class_weights: Tensor | None = None
    """float32 (C,), by the target's class."""


@functools.lru_cache
def class_weights_on(device: torch.device, weights: tuple[float, ...] | float | None) -> Tensor | None:
    """Returns weights of classes as float32 (C,)."""
    assert not isinstance(weights, float), "a power, which `TrainConfig.weighed` turns into weights"
    return None if weights is None else torch.tensor(weights, dtype=torch.float32, device=device)


def weighed_pixels(loss: LossConfig, mask_BHW: Tensor) -> Tensor:
    """Number of labelled pixels, or with class weights the sum of their weights: scalar."""
    known = mask_BHW != IGNORE
    weight_C = class_weights_on(mask_BHW.device, loss.class_weights)
    return known.sum() if weight_C is None else (weight_C[mask_BHW.long().masked_fill(~known, 0)] * known).sum()


def sum_of_terms(coarse_BChw: Tensor, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """Returns the weighted sum of cross-entropies, with gradient, and each of them (K,) without weight or gradient."""
    if not terms:
        return coarse_BChw.new_zeros((), dtype=torch.float32), coarse_BChw.new_zeros(0, dtype=torch.float32)
    return cross_entropy(coarse_BChw, *map(list, zip(*terms, strict=True)))


def loss_on_masks(
    loss: LossConfig, coarse_BChw: Tensor, mask_BHW: Tensor, valid_pixels: Tensor, peers: Sequence[Term] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the supervised loss and that of `peers`, further targets for the same logits, with gradient; and, without, the supervised loss
    alone, and each of the peers' cross-entropies (K,) without its weight.

    `valid_pixels`: scalar, see `supervised_term`.
    """
    by_pixel = {name: weight for name, weight in loss.weights.items() if name in _BY_PIXEL}
    own = [
        supervised_term(loss, name, weight, coarse_BChw, mask_BHW, valid_pixels) for name, weight in by_pixel.items()
    ]
    # All targets of the same logits in one pass over them.
    summed, terms_K = sum_of_terms(coarse_BChw, [*own, *peers])
    supervised = sum((value * term.weight for value, term in zip(terms_K, own, strict=False)), summed.new_zeros(()))
    for name, weight in loss.weights.items():
        if name not in _BY_PIXEL:
            function = loss_function(name, loss.class_weights, coarse_BChw.shape[1])
            value = weight * _by_autograd(function, coarse_BChw, mask_BHW)
            summed, supervised = summed + value, supervised + value.detach()
    return summed, supervised, terms_K[len(own) :]


def supervised_term(
    loss: LossConfig, name: str, weight: float, coarse_BChw: Tensor, mask_BHW: Tensor, valid_pixels: Tensor
) -> Term:
    """`ce`: every labelled pixel, divided by `valid_pixels`, the (scalar) `weighed_pixels` of the whole global batch
    divided by the number of micro-batches in it. `ohem`: the mean over this micro-batch's hard pixels.
    """
    weight_C = class_weights_on(mask_BHW.device, loss.class_weights)
    if name == "ohem":
        target = hard_pixels(coarse_BChw, mask_BHW, loss.ohem_threshold, loss.ohem_min_kept)
        return Term(target, weight * _reciprocal(weighed_pixels(loss, target)), weight_C)
    return Term(mask_BHW, weight * _reciprocal(valid_pixels), weight_C)


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


def _by_autograd(function: LossFunction, coarse_BChw: Tensor, mask_BHW: Tensor) -> Tensor:
    logits_BCHW = upsample(coarse_BChw.float(), (mask_BHW.shape[-2], mask_BHW.shape[-1]))
    # Tensors without values, of a trial run, cannot be asked; and a mean over no pixel would be nan. A GPU is waited for here.
    if logits_BCHW.is_meta or not bool((mask_BHW != IGNORE).any()):
        return logits_BCHW.sum() * 0.0
    return function(logits_BCHW, mask_BHW.long())


@functools.lru_cache
def loss_function(name: str, class_weights: tuple[float, ...] | float | None, num_classes: int) -> LossFunction:
    """Returns the loss of smp, or that at an import path after a trial of it. Raises ConfigError, which says what its contract is."""
    if isinstance(class_weights, float):
        class_weights = (1.0,) * num_classes
    if name in _OF_SMP:
        import segmentation_models_pytorch as smp

        weights = {} if class_weights is None or name in WITHOUT_CLASS_WEIGHTS else {"class_weights": [*class_weights]}
        of_smp: LossFunction = getattr(smp.losses, _OF_SMP[name])("multiclass", ignore_index=IGNORE, **weights)
        return of_smp
    plugin = _plugin(name)
    function = plugin if class_weights is None or not _takes_class_weights(plugin) else _weighted(plugin, class_weights)
    problem = _problem(function, num_classes)
    if problem:
        raise ConfigError(f"loss.supervised: {name}: {problem}. {_CONTRACT}")
    return function


def check_losses(loss: LossConfig, num_classes: int | None) -> None:
    """Raises ConfigError for a loss of one's own that is not as it must be. `num_classes`: None where it is not known yet."""
    plugins = [name for name in loss.weights if is_import_path(name)]
    weighted = [name for name in loss.weights if name not in plugins or _takes_class_weights(_plugin(name))]
    if loss.class_weights is not None and not weighted:
        raise ConfigError(f"loss.class_weights: {plugins[0]} has no parameter `class_weights`. {_CONTRACT}")
    for name in plugins:
        _plugin(name) if num_classes is None else loss_function(name, loss.class_weights, num_classes)


def _plugin(name: str) -> Callable[..., Tensor]:
    plugin: Callable[..., Tensor] = load_plugin("loss.supervised", name)
    if not callable(plugin):
        raise ConfigError(f"loss.supervised: {name} cannot be called. {_CONTRACT}")
    return plugin


def _takes_class_weights(plugin: Any) -> bool:
    try:
        return "class_weights" in inspect.signature(plugin).parameters
    except ValueError:  # a builtin, which has none
        return False


def _weighted(plugin: Any, class_weights: tuple[float, ...]) -> LossFunction:
    def function(logits_BCHW: Tensor, target_BHW: Tensor) -> Tensor:
        """Calls the plug-in with the weights on the device of the logits."""
        loss: Tensor = plugin(
            logits_BCHW, target_BHW, class_weights=class_weights_on(logits_BCHW.device, class_weights)
        )
        return loss

    return function


def _problem(function: LossFunction, num_classes: int) -> str:
    """Returns what is wrong with a loss, found out by calling it with two small images; "" if nothing is."""
    draw = torch.Generator().manual_seed(0)
    logits_BCHW = torch.randn(2, num_classes, 8, 8, generator=draw).requires_grad_()
    target_BHW = torch.randint(num_classes, (2, 8, 8), generator=draw)
    target_BHW[:, :2] = IGNORE
    try:
        loss = function(logits_BCHW, target_BHW)
    except Exception as err:  # plug-ins raise what they like
        return f"fails with {type(err).__name__}: {first_line(err).rstrip('.')}"
    if not isinstance(loss, Tensor):
        return f"must return a tensor, but returned {type(loss).__name__}"
    if loss.dim() or not loss.is_floating_point():
        return (
            f"must return a scalar, but returned {str(loss.dtype).removeprefix('torch.')} of shape {tuple(loss.shape)}"
        )
    if not bool(loss.isfinite()):
        return f"must be finite, but is {loss.item()}"
    gradient = torch.autograd.grad(loss, logits_BCHW, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        return "must have a gradient by the logits, but has none"
    if not bool(gradient.isfinite().all()):
        return "its gradient must be finite, but is not"
    if bool(gradient[:, :, :2].any()):
        return f"must leave out pixels whose target is {IGNORE}, but they have a gradient"
    return ""
