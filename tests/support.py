"""Helpers that tests import."""

from typing import Any

import torch

from cps_ray.config.space import apply
from cps_ray.config.train import TrainConfig
from cps_ray.datasets.loader import eval_batches, train_batches, train_data
from cps_ray.datasets.shards import open_shards
from cps_ray.engine.evaluation import evaluate, summarise
from cps_ray.engine.loop import fit
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """`changed(tiny, cps__weight=2.0)`: dotted names with __ for the dot."""
    return apply(config, {name.replace("__", "."): value for name, value in changes.items()}, "test")


def without_a_cluster(config: TrainConfig) -> list[dict[str, float]]:
    """The same training by the engine alone, in this process: the independent reference."""
    torch.set_num_threads(1)  # as a worker with half a CPU has: sums in the same order
    shards = open_shards(config.data.shards)
    state = build_state(config, 7, Ranks())
    found = []

    def validate(_: object) -> dict[str, float]:
        return summarise(evaluate(config, state.judged, eval_batches(shards, "val"), 7, Ranks()), shards.classes, "val")

    def report(metrics: dict[str, float], _: object) -> bool:
        found.append(metrics)
        return True

    fit(config, state, train_batches(train_data(shards, config), config), validate, report)
    return found
