"""One optimizer step of all networks. A function of (config, state, batch): no I/O, no clock."""

import contextlib

import torch
from torch import Tensor

from cps_ray.config.train import NETWORK_NAMES, TrainConfig
from cps_ray.engine.batch import Batch
from cps_ray.engine.losses import weighed_pixels
from cps_ray.engine.methods import losses_of_networks
from cps_ray.engine.pseudo_labels import MicroBatch
from cps_ray.engine.schedules import learning_rate
from cps_ray.engine.state import LR_FACTOR, TrainState, update_averages

OBSERVE_EVERY = 10
"""Steps between those in which gradients and pseudo labels are measured, beside the last one before each evaluation: often enough for a
mean, seldom enough to cost little."""


def train_step(config: TrainConfig, state: TrainState, batch: Batch) -> dict[str, Tensor]:
    """Advances `state` by one step on this rank's shard of the global batch.

    Returns detached scalars on the device; the mean over ranks of each is the global value: `loss`, `sup_a`, ... of each
    network, and of cps `cps` (all directions, without its weight), of mean_teacher `consistency`, of fixmatch and
    unimatch `pseudo` (the mean of the strong views) and, where a pass drops features, `pseudo_dropped`.
    Every OBSERVE_EVERY steps, and before each evaluation, also `grad_norm_a`, ..., and what `MicroBatch.measured` lists.
    """
    _begin_step(config, state)
    ranks, accumulate, clip_norm = state.ranks, config.compute.accumulate, config.optim.clip_norm
    batch = _to_device(batch, ranks.device, channels_last=config.compute.channels_last)
    before_evaluation = (state.step + 1) % config.schedule.eval_every == 0
    observe = state.step % OBSERVE_EVERY == 0 or before_evaluation
    # DDP averages gradients over the batch shards. So that the average is the gradient of the global mean, each rank divides
    # its sum over pixels by the global count / number of shards (and of micro-batches), not by its own count.
    pixels = weighed_pixels(config.loss, batch.labeled_mask)
    valid_pixels = ranks.sum_over_shards(pixels) / (ranks.num_batch_shards * accumulate)
    totals = _zero_totals(config, state, norms=observe or clip_norm is not None)
    for index in range(accumulate):
        micro = MicroBatch(_cut(batch, index, accumulate), index, valid_pixels, observe)
        last = index == accumulate - 1
        with _exchange_gradients(state, only_if=last):
            # The method is suspended between networks: when the next one goes forward inside it, this one has gone back, was
            # updated and has dropped its gradients. Targets that must be older than the update were computed before.
            for name, losses in zip(state.networks, losses_of_networks(config, state, micro), strict=True):
                scaler = state.scalers[name]
                scaler.scale(losses["loss"] / accumulate).backward()  # type: ignore[no-untyped-call]
                # With one network per worker a rank knows its own network's losses only: times the number of networks, the
                # mean over ranks is their sum, as it is where each rank has all networks.
                for term, value in losses.items():
                    totals[term] = totals.get(term, 0.0) + value.detach() * ranks.ranks_per_shard / accumulate
                if last:
                    optimizer = state.optimizers[name]
                    if observe or clip_norm is not None:
                        norm = _clip(scaler, optimizer, clip_norm)
                        totals[f"grad_norm_{name}"] = norm * ranks.ranks_per_shard
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad(set_to_none=True)
        for term, value in micro.measured.items():
            totals[term] = totals.get(term, 0.0) + value / accumulate
    if state.averages:
        update_averages(config.ema, state)
    state.step += 1
    return totals


def _begin_step(config: TrainConfig, state: TrainState) -> None:
    # Dropout and its like draw from (seed, step, rank): a resumed training needs no random state (as in EDM2).
    torch.manual_seed((config.seed * 1_000_003 + state.step) * 4099 + state.ranks.rank)
    rate = learning_rate(config.optim, state.step, config.schedule.steps)
    for name, optimizer in state.optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get(LR_FACTOR, 1.0)  # checkpoints of earlier versions have no factor
        state.networks[name].train()  # an evaluation has left them in evaluation mode


def _zero_totals(config: TrainConfig, state: TrainState, *, norms: bool) -> dict[str, Tensor]:
    """Zeros for the terms of every network, also those of other ranks: ranks must report the same names to be averaged."""
    terms = ["sup", "grad_norm"] if norms else ["sup"]
    names = [f"{term}_{name}" for term in terms for name in NETWORK_NAMES[: config.networks]]
    return {name: torch.zeros((), device=state.ranks.device) for name in names}


def _clip(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> Tensor:
    """Clips the gradients of one network to `clip_norm` if it is given; returns their norm before that."""
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm


def _exchange_gradients(state: TrainState, *, only_if: bool) -> contextlib.ExitStack:
    """The context of a micro-batch: DDP exchanges gradients once per step, with the last one."""
    stack = contextlib.ExitStack()
    for name, model in state.models.items():
        if not only_if and model is not state.networks[name]:
            stack.enter_context(model.no_sync())  # type: ignore[operator, arg-type]
    return stack


def _to_device(batch: Batch, device: torch.device, *, channels_last: bool) -> Batch:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def moved(image: Tensor) -> Tensor:
        # Does not wait: the loader has pinned the memory, and what follows is queued behind the copy.
        return image.to(device, non_blocking=True, memory_format=layout)

    return batch.map(moved, other=lambda tensor: tensor.to(device, non_blocking=True))


def _cut(batch: Batch, index: int, count: int) -> Batch:
    """Returns part `index` of `count`: a micro-batch."""
    return batch if count == 1 else batch.map(lambda images: torch.chunk(images, count)[index])
