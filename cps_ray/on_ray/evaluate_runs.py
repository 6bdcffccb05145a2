"""Checkpoints evaluated on a split, or on the fold that they have not seen, as tasks on the cluster."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cps_ray.config.reader import parse_train
from cps_ray.config.train import ENSEMBLE, HELD_OUT, TrainConfig
from cps_ray.datasets.loader import eval_batch, evaluated_images, image_batches
from cps_ray.datasets.open import open_data
from cps_ray.datasets.shards import Index
from cps_ray.engine.cpu.threads import tune_cpu
from cps_ray.engine.evaluation import evaluate, summarise
from cps_ray.engine.inference import label_strips
from cps_ray.engine.metrics import class_counts
from cps_ray.engine.networks import Segmenter
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import load_networks
from cps_ray.engine.telemetry import Metrics
from cps_ray.errors import CpsRayError
from cps_ray.model.examples import Example
from cps_ray.on_ray.failures import reason
from cps_ray.runs import read_checkpoint


@dataclass(frozen=True, slots=True)
class CheckpointScores:
    """Scores of a checkpoint's networks on a split."""

    metrics: Metrics
    """What `summarise` gives: `test/miou`, `test/iou/<class>`, per slice `test/<slice>/miou`, ...: 0..1."""
    examples: list[Example]
    confusion: dict[str, list[list[int]]] = field(default_factory=dict)
    """Network, and ENSEMBLE where there are several -> pixels per true class and predicted class."""
    ids: tuple[str, ...] = ()
    """Ids of the images that were evaluated, in order, so that those of two checkpoints pair."""
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 3, 0), np.int64), compare=False)
    """(I, 3, C) pixels of each image and class that the network shown finds, that are true, and that it predicts."""


def evaluate_checkpoint(
    train: dict[str, Any], checkpoint: str, split: str, num_examples: int = 0, shown: str = "a"
) -> CheckpointScores:
    """Evaluates a checkpoint's networks on every image of a split, and predicts masks of a few images spread over it by the network
    `shown`, or with ENSEMBLE by all together. HELD_OUT: the fold that is held out; its metrics have the names of those of test."""
    config = parse_train(train, "train")
    # Ray sets CUDA_VISIBLE_DEVICES to what the task asked for, so the first visible GPU is this task's.
    device = torch.device("cuda" if config.resources.gpus_per_worker > 0 and torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        tune_cpu(max(1, round(config.resources.cpus_per_worker)))
    # A fold, and what takes the place of val, is of train.
    shards = open_data(config.data, (split,) if config.data.folds is None else (split, "train"))
    evaluated = evaluated_images(shards, config, split)
    networks = load_networks(config, read_checkpoint(Path(checkpoint)), len(shards.classes), source=checkpoint)
    for network in networks.values():
        network.to(device)
    of_images: dict[str, NDArray[np.int64]] = {}

    def count(network: str, ids: Sequence[str], matrices_NCC: torch.Tensor) -> None:  # noqa: N803
        if network == shown:
            for image_id, counts_3C in zip(ids, class_counts(matrices_NCC).cpu().numpy(), strict=True):  # noqa: N806
                of_images[image_id] = of_images.get(image_id, 0) + counts_3C

    batches, ranks = image_batches(evaluated, np.arange(len(evaluated)), masks=True), Ranks(device=device)
    counts = evaluate(config, networks, batches, len(shards.classes), ranks, count)
    showing = networks if shown == ENSEMBLE else {shown: networks[shown]}
    examples = _examples(config, showing, shown, evaluated, num_examples, device)
    matrices = {"a": counts.whole_split, **counts.others}
    confusion = {name: matrix.tolist() for name, matrix in matrices.items()}
    ids = tuple(sorted(of_images))
    per_image = np.array([of_images[each] for each in ids], np.int64)
    metrics = summarise(counts, shards.classes, "test" if split == HELD_OUT else split)
    return CheckpointScores(metrics, examples, confusion, ids, per_image)


def _examples(
    config: TrainConfig, networks: dict[str, Segmenter], shown: str, index: Index, count: int, device: torch.device
) -> list[Example]:
    examples = []
    # The same images for every checkpoint, so that pictures can stand side by side.
    for row in np.linspace(0, len(index) - 1, count).round().astype(int) if count else ():
        batch = eval_batch(index, [int(row)])
        strips = [
            found.labels[0].cpu().numpy()
            for name, found in label_strips(config.inference, networks, batch.image.to(device))
            if name == shown
        ]
        image = batch.image[0].permute(1, 2, 0).numpy()
        examples.append((batch.ids[0], np.ascontiguousarray(image), batch.mask[0].numpy(), np.concatenate(strips)))
    return examples


def evaluate_checkpoints(
    runs: list[tuple[TrainConfig, Path, str]], split: str, num_examples: int = 0
) -> list[CheckpointScores]:
    """Evaluates each (config, checkpoint, network shown), spread over the connected cluster; scores in the same order."""
    import ray

    task = ray.remote(evaluate_checkpoint)  # by reference: workers import this module
    waiting = []
    for config, checkpoint, shown in runs:
        resources = config.resources
        # Never more CPUs than a training had, and at most the one that Ray Data had: it is idle now.
        placed = task.options(num_cpus=min(1.0, resources.cpus_per_worker), num_gpus=resources.gpus_per_worker)
        waiting.append(placed.remote(config.dump(), str(checkpoint), split, num_examples, shown))
    try:
        scores: list[CheckpointScores] = ray.get(waiting)
    except ray.exceptions.RayTaskError as err:
        raise CpsRayError(f"evaluating on {split!r} failed: {reason(err)}") from err
    return scores
