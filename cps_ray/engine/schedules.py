"""Learning rate and CPS weight as functions of the step."""

import math

from cps_ray.config.train import CpsConfig, OptimConfig


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Rate of the update that turns step `step` into `step + 1`."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = min(step / total_steps, 1.0)
    if optim.decay == "poly":
        return optim.lr * math.pow(1.0 - done, optim.power)
    if optim.decay == "cosine":
        return optim.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    return optim.lr


def cps_weight(cps: CpsConfig, step: int, total_steps: int) -> float:
    """Weight of the cross pseudo loss at `step`: 0 at first, `cps.weight` from the end of the ramp on."""
    ramp_steps = cps.ramp * total_steps
    if step >= ramp_steps:
        return cps.weight
    done = step / ramp_steps
    if cps.ramp_shape == "sigmoid":
        return cps.weight * math.exp(-5.0 * (1.0 - done) ** 2)
    return cps.weight * done
