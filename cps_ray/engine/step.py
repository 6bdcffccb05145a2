"""One optimizer step of both networks. A function of (config, state, batch): no I/O, no clock."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from cps_ray.config.train import TrainConfig
from cps_ray.engine.batch import IGNORE, Batch
from cps_ray.engine.losses import cross_pseudo_loss, pseudo_labels, supervised_loss
from cps_ray.engine.mixing import cutmix_masks, paste
from cps_ray.engine.schedules import cps_weight, learning_rate
from cps_ray.engine.state import TrainState, autocast

# L labelled images, U unlabelled images, B = L + U; C classes, H W pixels. A tensor's name ends in its dims.


def train_step(config: TrainConfig, state: TrainState, batch: Batch) -> dict[str, Tensor]:
    """Advances `state` by one step on this rank's share of the global batch.

    Returns detached scalars on the device, each this rank's part such that the mean over ranks is the global value:
    `loss`, `sup_a`, and for cps `sup_b`, `cps` (both directions, unweighted), `agreement` (share of equal pseudo labels).
    """
    _start(config, state)
    batch = _to_device(batch, state.ranks.device, config.compute.channels_last)
    parts = config.compute.accumulate
    # Local loss sums are divided by the global count and multiplied by the world size that DDP's mean divides by again.
    valid = state.ranks.sum((batch.labeled_mask != IGNORE).sum()) / (state.ranks.world * parts)
    totals: dict[str, Tensor] = {}
    for part in range(parts):
        with _synchronised(state, last=part == parts - 1):
            losses = _losses(config, state, _part(batch, part, parts), part, valid)
            state.scaler.scale(losses["loss"] / parts).backward()  # type: ignore[no-untyped-call]
        for name, value in losses.items():
            totals[name] = totals.get(name, torch.zeros_like(value, requires_grad=False)) + value.detach() / parts
    _update(config, state)
    state.step += 1
    return totals


def _losses(config: TrainConfig, state: TrainState, batch: Batch, part: int, valid: Tensor) -> dict[str, Tensor]:
    """All loss terms of one micro-batch; `loss` is their weighted sum and carries the gradient."""
    if config.method == "supervised":
        with autocast(config, state.ranks.device):
            logits, _ = state.model(batch.labeled_image)
        sup = supervised_loss(config.loss, logits, batch.labeled_mask, valid)
        return {"loss": sup, "sup_a": sup}

    labeled = batch.labeled_image.shape[0]
    unlabeled_image, targets = _unlabeled(config, state, batch, part)
    with autocast(config, state.ranks.device):
        logits_a, logits_b = state.model(torch.cat([batch.labeled_image, unlabeled_image]))
    sup_a = supervised_loss(config.loss, logits_a[:labeled], batch.labeled_mask, valid)
    sup_b = supervised_loss(config.loss, logits_b[:labeled], batch.labeled_mask, valid)

    cps = config.cps
    under = slice(0 if cps.on == "all" else labeled, None)
    if targets is None:
        label_a, label_b = (pseudo_labels(logits[under], cps.confidence) for logits in (logits_a, logits_b))
    else:
        label_a, label_b = targets
        if cps.on == "all":
            label_a = torch.cat([pseudo_labels(logits_a[:labeled], cps.confidence), label_a])
            label_b = torch.cat([pseudo_labels(logits_b[:labeled], cps.confidence), label_b])
    # Each network learns from the other one's labels.
    cross = cross_pseudo_loss(logits_a[under], label_b) + cross_pseudo_loss(logits_b[under], label_a)
    weight = cps_weight(cps, state.step, config.schedule.steps)
    agreement = (label_a == label_b).float().mean()
    loss = sup_a + sup_b + weight * cross
    return {"loss": loss, "sup_a": sup_a, "sup_b": sup_b, "cps": cross, "agreement": agreement}


def _unlabeled(
    config: TrainConfig, state: TrainState, batch: Batch, part: int
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The unlabelled images to learn on (U, 3, H, W), and with CutMix their pseudo labels by a and b, (U, H, W) each.

    CutMix: labels are predicted on the clean images, then images and labels are mixed alike with their successor in the
    global batch, another image (the reference code pairs two views of one image, which its paper does not intend).
    """
    image = batch.unlabeled_image
    if image is None:
        raise ValueError("method cps needs `unlabeled_image` in every batch.")
    if config.cps.mix == "none":
        return image, None
    label_a, label_b = _teach(config, state, image)
    size, ranks = image.shape[0], state.ranks
    # The images of all ranks' micro-batch `part`, in rank order, are the batch that is rolled.
    first = (part * ranks.world + ranks.rank) * size
    height, width = image.shape[-2:]
    masks = cutmix_masks(config.cps, config.seed, state.step, range(first, first + size), height, width)
    mask = masks.to(image.device, non_blocking=True)
    # One exchange for all three: a label fits a byte.
    bundle = torch.cat([image, label_a.to(torch.uint8).unsqueeze(1), label_b.to(torch.uint8).unsqueeze(1)], dim=1)
    mixed = paste(mask, bundle, ranks.roll(bundle))
    return mixed[:, :3], (mixed[:, 3].long(), mixed[:, 4].long())


@torch.no_grad()
def _teach(config: TrainConfig, state: TrainState, image_U3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Pseudo labels of a and b on clean images: int64 (U, H, W) each."""
    state.pair.train(config.cps.teacher_bn == "train")
    with autocast(config, state.ranks.device):
        logits_a, logits_b = state.pair(image_U3HW)
    state.pair.train()
    return pseudo_labels(logits_a, config.cps.confidence), pseudo_labels(logits_b, config.cps.confidence)


def _start(config: TrainConfig, state: TrainState) -> None:
    # Dropout and its like draw from (seed, step, rank): a resumed training needs no random state (as in EDM2).
    torch.manual_seed((config.seed * 1_000_003 + state.step) * 4099 + state.ranks.rank)
    rate = learning_rate(config.optim, state.step, config.schedule.steps)
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = rate
    state.pair.train()


def _update(config: TrainConfig, state: TrainState) -> None:
    for optimizer in state.optimizers:
        if config.optim.clip_norm is not None:
            state.scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm)
        state.scaler.step(optimizer)
    state.scaler.update()


def _synchronised(state: TrainState, *, last: bool) -> contextlib.AbstractContextManager[Any]:
    """DDP exchanges gradients once per step, with the last micro-batch."""
    if last or state.model is state.pair:
        return contextlib.nullcontext()
    return state.model.no_sync()  # type: ignore[operator, no-any-return]


def _to_device(batch: Batch, device: torch.device, channels_last: bool) -> Batch:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    unlabeled = batch.unlabeled_image
    return Batch(
        batch.labeled_image.to(device, non_blocking=True, memory_format=layout),
        batch.labeled_mask.to(device, non_blocking=True),
        None if unlabeled is None else unlabeled.to(device, non_blocking=True, memory_format=layout),
    )


def _part(batch: Batch, part: int, parts: int) -> Batch:
    if parts == 1:
        return batch
    unlabeled = batch.unlabeled_image
    return Batch(
        batch.labeled_image.chunk(parts)[part],
        batch.labeled_mask.chunk(parts)[part],
        None if unlabeled is None else unlabeled.chunk(parts)[part],
    )
