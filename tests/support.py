"""Helpers that tests import."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cps_ray.config.space import apply
from cps_ray.config.train import TrainConfig
from cps_ray.datasets.loader import eval_batches, train_batches, train_data
from cps_ray.datasets.shards import open_shards
from cps_ray.engine.evaluation import evaluate, summarise
from cps_ray.engine.loop import fit
from cps_ray.engine.networks import build_networks
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state
from cps_ray.model.writing import write_model

TINY_DATA = """\
  data:
    shards: SHARDS
    labeled: 6
    crop_px: [32, 48]
    labeled_batch: 4
    unlabeled_batch: 4
"""
"""The `data` of a sweep's training on the embedded data set of the tests."""


SMALL_SWEEP = f"""\
version: 1
name: s
output: runs
train:
{TINY_DATA}
  model: {{encoder: tu-test_efficientnet, options: {{decoder_channels: 16}}}}
  optim: {{lr: 0.01}}
  schedule: {{steps: 4, eval_every: 2}}
  resources: {{cpus_per_worker: 0.5}}
budget: {{trials: 2}}
sampler: {{type: random}}
early_stopping: {{type: none}}
search_space:
  cps.weight: {{type: float, low: 0.5, high: 2.0}}
  cps.mix: {{type: choice, values: [none, cutmix]}}
baselines: {{supervised: {{method: supervised}}}}
final: {{seeds: [1]}}
"""
"""A sweep of two trials; SHARDS is to be replaced."""


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """Returns the config with changes such as `cps__weight=2.0`: names with __ for the dot."""
    return apply(config, {name.replace("__", "."): value for name, value in changes.items()}, "test")


@contextmanager
def double_precision() -> Iterator[None]:
    """Float64 throughout, also for networks that are built inside: the engine asks for single precision in no other way than by torch's default
    and by `x.float()`. The caller's random state stays."""
    single = torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.Tensor.float = single
        torch.set_default_dtype(torch.float32)


def without_a_cluster(config: TrainConfig) -> list[dict[str, float]]:
    """Trains by the engine alone, in this process, and returns what every evaluation reports: the reference for Ray Train."""
    torch.set_num_threads(1)  # as in a worker with half a CPU, so that sums have the same order
    shards = open_shards(config.data.shards)
    state = build_state(config, 7, Ranks())
    reports = []

    def validate(_: object) -> dict[str, float]:
        return summarise(
            evaluate(config, state.evaluated, eval_batches(shards, "val"), 7, Ranks()), shards.classes, "val"
        )

    def report(metrics: dict[str, float], _: object) -> bool:
        reports.append(metrics)
        return True

    data = train_data(shards, config)
    fit(data.weigh(config), state, train_batches(data, config), validate, report)
    return reports


def write_untrained(config: TrainConfig, folder: Path, metrics: dict[str, Any] | None = None) -> Path:
    """Writes the model of a training before its first step, on data with masks of 7 classes, into a new folder, and returns that."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder, config, build_networks(config, 7), open_shards(config.data.shards).manifest, metrics or {})
    return folder
