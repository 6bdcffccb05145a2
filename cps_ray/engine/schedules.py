"""Learning rate, weights of losses, and decay of the average, as functions of the step."""

import math
from typing import assert_never

from cps_ray.config.train import MethodConfig, OptimConfig


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of the update from step `step` to `step + 1`."""
    if step < optim.warmup_steps:
        # step + 1: the first update already moves, and the last one of the warm-up has the full rate.
        return optim.lr * (step + 1) / optim.warmup_steps
    done = min(step / total_steps, 1.0)  # of the whole training, warm-up included
    if optim.decay == "poly":
        return optim.lr * math.pow(1.0 - done, optim.power)
    if optim.decay == "cosine":
        return optim.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    if optim.decay == "constant":
        return optim.lr
    assert_never(optim.decay)


def started(loss: MethodConfig, step: int, total_steps: int) -> bool:
    """Whether a loss on unlabelled images has begun at `step`."""
    return step >= loss.start * total_steps


def ramped_weight(loss: MethodConfig, step: int, total_steps: int) -> float:
    """Weight of a loss on unlabelled images at `step`: 0 at first, `loss.weight` from the end of the ramp on."""
    if not started(loss, step, total_steps):
        return 0.0
    begun, ramp_steps = step - loss.start * total_steps, loss.ramp * total_steps
    if begun >= ramp_steps:
        return loss.weight
    done = begun / ramp_steps
    if loss.ramp_shape == "sigmoid":
        return loss.weight * math.exp(-5.0 * (1.0 - done) ** 2)
    if loss.ramp_shape == "linear":
        return loss.weight * done
    assert_never(loss.ramp_shape)


def average_decay(decay: float, step: int) -> float:
    """Fraction that averaged weights keep in update number `step`, from 0: at first the average is the plain mean of what it has
    seen (Tarvainen and Valpola, NeurIPS 2017)."""
    return min(decay, 1.0 - 1.0 / (step + 1))
