"""The program's centre: read this first. Train, evaluate now and then, report, stop when told to."""

import fnmatch
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cps_ray.config.train import TrainConfig
from cps_ray.engine.batch import Batch, EvalBatch
from cps_ray.engine.metrics import confusion, iou, mean_iou
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.schedules import cps_weight, learning_rate
from cps_ray.engine.state import TrainState, autocast
from cps_ray.engine.step import train_step
from cps_ray.errors import DivergedError

Metrics = dict[str, Any]
Validate = Callable[[TrainState], Metrics]
Report = Callable[[Metrics, TrainState], bool]
"""Takes what was measured at an evaluation; False stops the training."""


def fit(config: TrainConfig, state: TrainState, batches: Iterable[Batch], validate: Validate, report: Report) -> None:
    """Trains from `state.step` to `config.schedule.steps`. `batches` starts at the batch of `state.step`.

    Raises DivergedError, naming the step, when a loss is not finite.
    """
    meter = Meter(state.ranks)
    for batch in meter.timed(batches):
        meter.add(state.step, train_step(config, state, batch))
        if state.step % config.schedule.eval_every == 0:
            metrics = meter.read() | _settings(config, state) | validate(state)
            if not report(metrics | {"step": state.step}, state):
                return
            meter.reset()
        if state.step >= config.schedule.steps:
            return


def evaluate(
    config: TrainConfig, network: nn.Module, batches: Iterable[EvalBatch], num_classes: int, ranks: Ranks
) -> dict[str, Tensor]:
    """Confusion matrices, int64 (C, C), summed over all ranks: of the whole split under "", and of each of `data.groups`.

    Single scale, whole images at their own size, network in evaluation mode. Every rank passes its own images once.
    """
    names = ["", *config.data.groups]
    sums = torch.zeros(len(names), num_classes, num_classes, dtype=torch.int64, device=ranks.device)
    network.eval()
    with torch.inference_mode():
        for batch in batches:
            with autocast(config, ranks.device):
                logits = network(batch.image.to(ranks.device))
            matrices = confusion(logits.argmax(dim=1), batch.mask.to(ranks.device), num_classes)
            sums[0] += matrices.sum(0)
            for place, pattern in enumerate(config.data.groups.values(), start=1):
                member = torch.tensor([fnmatch.fnmatchcase(name, pattern) for name in batch.ids], device=ranks.device)
                sums[place] += matrices[member].sum(0)
    return dict(zip(names, ranks.sum(sums).cpu(), strict=True))


def summarise(confusions: Mapping[str, Tensor], classes: Iterable[str], split: str) -> Metrics:
    """`val/miou`, `val/iou/road`, and per group `val/seq05/miou`: floats in 0..1; a class that is absent has no entry."""
    metrics: Metrics = {}
    for group, matrix in confusions.items():
        prefix = f"{split}/{group}/" if group else f"{split}/"
        if not matrix.any():
            continue
        metrics[f"{prefix}miou"] = mean_iou(matrix)
        per_class = zip(classes, iou(matrix).tolist(), strict=True)
        metrics |= {f"{prefix}iou/{name}": value for name, value in per_class if not math.isnan(value)}
    return metrics


def _settings(config: TrainConfig, state: TrainState) -> Metrics:
    steps = config.schedule.steps
    settings = {"optim/lr": learning_rate(config.optim, state.step - 1, steps)}
    if config.method == "cps":
        settings["cps/weight"] = cps_weight(config.cps, state.step - 1, steps)
    return settings


class Meter:
    """Means of the losses since the last evaluation, and where the time went.

    Sums stay on the device, so that a step never waits for the GPU; a loss that is not finite is remembered by its step.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.reset()

    def reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._images = 0
        self._wait_s = 0.0
        self._started = time.perf_counter()
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=self._ranks.device)

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; the time spent waiting for them is counted."""
        source = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(source, None)
            if batch is None:
                return
            self._wait_s += time.perf_counter() - asked
            self._images += batch.labeled_image.shape[0]
            self._images += 0 if batch.unlabeled_image is None else batch.unlabeled_image.shape[0]
            yield batch

    def add(self, step: int, losses: dict[str, Tensor]) -> None:
        """`losses` of the update from `step` to `step + 1`."""
        self._steps += 1
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        bad = (self._first_bad < 0) & ~torch.isfinite(losses["loss"])
        self._first_bad = torch.where(bad, torch.full_like(self._first_bad, step), self._first_bad)
        # Looking costs nothing on a CPU; on a GPU it would stall every step, and ranks have to stop together.
        if self._ranks.device.type == "cpu" and self._ranks.world == 1:
            self._check()

    def read(self) -> Metrics:
        """Means over steps and ranks: `train/loss`, ..., `time/images_per_s` (all ranks), `time/data_wait` (share 0..1).

        A collective: every rank calls it.
        """
        self._check()
        elapsed = time.perf_counter() - self._started
        names = sorted(self._sums)
        values = [self._sums[name].double() / self._steps for name in names]
        clock = [self._images / elapsed, self._wait_s / elapsed]
        rows = torch.stack([*values, *torch.tensor(clock, dtype=torch.float64, device=self._ranks.device)])
        *means, images, wait = self._ranks.sum(rows).tolist()
        world = self._ranks.world
        metrics: Metrics = {f"train/{name}": mean / world for name, mean in zip(names, means, strict=True)}
        return metrics | {"time/images_per_s": images, "time/data_wait": wait / world}

    def _check(self) -> None:
        step = int(self._ranks.max(self._first_bad))
        if step >= 0:
            raise DivergedError(
                f"the loss is not finite at step {step}. Lower optim.lr or cps.weight, or set optim.clip_norm."
            )
