"""Helpers that tests import."""

from typing import Any

from cps_ray.config.space import apply
from cps_ray.config.train import TrainConfig


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """`changed(tiny, cps__weight=2.0)`: dotted names with __ for the dot."""
    return apply(config, {name.replace("__", "."): value for name, value in changes.items()}, "test")
