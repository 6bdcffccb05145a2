"""Checkpoints judged on a split, as tasks on the cluster."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cps_ray.config.reader import parse_train
from cps_ray.config.train import TrainConfig
from cps_ray.datasets.loader import eval_batch, eval_batches
from cps_ray.datasets.synthetic import open_data
from cps_ray.engine.cpu import tune_cpu
from cps_ray.engine.evaluation import evaluate, predict, summarise
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import load_networks
from cps_ray.engine.telemetry import Metrics
from cps_ray.errors import CpsRayError
from cps_ray.on_ray.trainer import reason


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a model did on a split."""

    metrics: Metrics
    """What `summarise` gives: `test/miou`, `test/iou/<class>`, per group `test/<group>/miou`, ...: 0..1."""
    examples: list[tuple[str, NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]]
    """(id, image (H, W, 3), true mask (H, W), predicted mask (H, W)), uint8 each."""


def judge(train: dict[str, Any], checkpoint: str, split: str, num_examples: int = 0) -> Verdict:
    """A checkpoint's networks on every image of a split, and a's masks of a few images spread over it."""
    config = parse_train(train, "train")
    device = torch.device("cuda" if config.resources.gpus_per_worker > 0 and torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        tune_cpu(max(1, round(config.resources.cpus_per_worker)))
    shards = open_data(config.data)
    networks = load_networks(config, Path(checkpoint), len(shards.classes))
    for network in networks.values():
        network.to(device)
    counts = evaluate(config, networks, eval_batches(shards, split), len(shards.classes), Ranks(device=device))
    examples = []
    if num_examples:
        index = shards.index(split)
        rows = np.flatnonzero(index.labeled)
        for place in np.linspace(0, len(rows) - 1, num_examples).round().astype(int):
            batch = eval_batch(index, [int(rows[place])])
            scores = predict(config, networks["a"], batch.image.to(device))
            predicted = scores.argmax(dim=1)[0].to(torch.uint8).cpu().numpy()
            image = batch.image[0].permute(1, 2, 0).numpy()
            examples.append((batch.ids[0], np.ascontiguousarray(image), batch.mask[0].numpy(), predicted))
    return Verdict(summarise(counts, shards.classes, split), examples)


def judge_all(jobs: list[tuple[TrainConfig, Path]], split: str, num_examples: int = 0) -> list[Verdict]:
    """`judge` for each (config, checkpoint), spread over the connected cluster; verdicts in the same order."""
    import ray

    task = ray.remote(judge)
    waiting = []
    for config, checkpoint in jobs:
        resources = config.resources
        # Never more CPUs than a training had, and at most the one that Ray Data had: it is idle now.
        placed = task.options(num_cpus=min(1.0, resources.cpus_per_worker), num_gpus=resources.gpus_per_worker)
        waiting.append(placed.remote(config.dump(), str(checkpoint), split, num_examples))
    try:
        verdicts: list[Verdict] = ray.get(waiting)
    except ray.exceptions.RayTaskError as err:
        raise CpsRayError(f"judging on {split!r} failed: {reason(err)}") from err
    return verdicts
