"""One optimizer step of all networks. A function of (config, state, batch): no I/O, no clock."""

import contextlib

import torch
from torch import Tensor

from cps_ray.config.train import NETWORK_NAMES, TrainConfig
from cps_ray.engine.batch import IGNORE, Batch
from cps_ray.engine.methods import METHODS, Micro
from cps_ray.engine.schedules import learning_rate
from cps_ray.engine.state import TrainState, update_averages

OBSERVE_EVERY = 10
"""Steps between those in which gradients and pseudo labels are measured, beside the last one before each evaluation: often enough for a
mean, seldom enough to cost little."""


def train_step(config: TrainConfig, state: TrainState, batch: Batch) -> dict[str, Tensor]:
    """Advances `state` by one step on this rank's share of the global batch.

    Returns detached scalars on the device, each this rank's part such that the mean over ranks is the global value:
    `loss`, `sup_a`, ... of each network, and of cps `cps` (all directions, without its weight), of mean_teacher
    `consistency`, of fixmatch `pseudo`. Every OBSERVE_EVERY steps, and before each evaluation, also `grad_norm_a`, ..., and what `Micro.seen` lists.
    """
    _start(config, state)
    batch = _to_device(batch, state.ranks.device, config.compute.channels_last)
    before_evaluation = (state.step + 1) % config.schedule.eval_every == 0
    observe = state.step % OBSERVE_EVERY == 0 or before_evaluation
    parts, ranks = config.compute.accumulate, state.ranks
    # Local loss sums are divided by the global count and multiplied by the number of shares that DDP's mean divides by again.
    valid = ranks.share_sum((batch.labeled_mask != IGNORE).sum()) / (ranks.shares * parts)
    names = NETWORK_NAMES[: config.networks]
    terms = ["sup", *(["grad_norm"] if observe or config.optim.clip_norm is not None else [])]
    totals = {f"{term}_{name}": torch.zeros((), device=ranks.device) for term in terms for name in names}
    for part in range(parts):
        micro, last = Micro(_part(batch, part, parts), part, valid, observe), part == parts - 1
        with _synchronised(state, last=last):
            for network, losses in zip(state.networks, METHODS[config.method](config, state, micro), strict=True):
                state.scaler.scale(losses["loss"] / parts).backward()  # type: ignore[no-untyped-call]
                # Where networks are split, a rank knows its own one's losses: times their number, the mean over ranks is the sum.
                for name, value in losses.items():
                    totals[name] = totals.get(name, 0.0) + value.detach() * ranks.split / parts
                if last:
                    totals |= _update(config, state, network, observe)
        for name, value in micro.seen.items():
            totals[name] = totals.get(name, 0.0) + value / parts
    state.scaler.update()
    if state.averages:
        update_averages(config, state)
    state.step += 1
    return totals


def _start(config: TrainConfig, state: TrainState) -> None:
    # Dropout and its like draw from (seed, step, rank): a resumed training needs no random state (as in EDM2).
    torch.manual_seed((config.seed * 1_000_003 + state.step) * 4099 + state.ranks.rank)
    rate = learning_rate(config.optim, state.step, config.schedule.steps)
    for name, optimizer in state.optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = rate
        state.networks[name].train()


def _update(config: TrainConfig, state: TrainState, name: str, observe: bool) -> dict[str, Tensor]:
    """Moves a network's weights and drops its gradients before the next one has any; returns their norm, before clipping, where it
    is computed."""
    norms, limit, optimizer = {}, config.optim.clip_norm, state.optimizers[name]
    if observe or limit is not None:
        state.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        norms[f"grad_norm_{name}"] = norm * state.ranks.split
    state.scaler.step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    return norms


def _synchronised(state: TrainState, *, last: bool) -> contextlib.ExitStack:
    """DDP exchanges gradients once per step, with the last micro-batch."""
    stack = contextlib.ExitStack()
    for name, model in state.models.items():
        if not last and model is not state.networks[name]:
            stack.enter_context(model.no_sync())  # type: ignore[operator, arg-type]
    return stack


def _to_device(batch: Batch, device: torch.device, channels_last: bool) -> Batch:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def moved(image: Tensor | None) -> Tensor | None:
        return None if image is None else image.to(device, non_blocking=True, memory_format=layout)

    labeled = batch.labeled_image.to(device, non_blocking=True, memory_format=layout)
    mask = batch.labeled_mask.to(device, non_blocking=True)
    return Batch(labeled, mask, moved(batch.unlabeled_image), moved(batch.unlabeled_second))


def _part(batch: Batch, part: int, parts: int) -> Batch:
    if parts == 1:
        return batch

    def cut(images: Tensor | None) -> Tensor | None:
        return None if images is None else torch.chunk(images, parts)[part]

    labeled, mask = torch.chunk(batch.labeled_image, parts)[part], torch.chunk(batch.labeled_mask, parts)[part]
    return Batch(labeled, mask, cut(batch.unlabeled_image), cut(batch.unlabeled_second))
