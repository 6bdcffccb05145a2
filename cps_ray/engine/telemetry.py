"""What is measured of a training between two evaluations, and when it has failed for good."""

import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cps_ray.config.train import PseudoLabelConfig, ScheduleConfig, TrainConfig
from cps_ray.engine.batch import IGNORE, Batch
from cps_ray.engine.ranks import Ranks
from cps_ray.errors import DivergedError

Metrics = dict[str, Any]

PATIENCE = 3
"""Evaluations in a row, in the second half of a training, at which a collapse must show before it ends it."""
_ONE_CLASS = 0.999
"""Fraction of the pseudo labels from which on one class counts as taking all."""
_SHOW_MORE = 0.99
"""Fraction of the commonest class in the masks up to which they show more than such pseudo labels: ten times as much of the others."""
_COUNT_EVERY = 10
"""Batches of which the masks of one are counted."""
_KAPPA_BLIND = 0.9
"""Fraction of the commonest label from which on kappa says nothing: chance alone then agrees nearly everywhere."""
_CHANCE = 0.02
"""Cohen's kappa up to which two networks agree by chance alone."""
_RATIO = "pseudo/frequency_ratio/"
_LOST = 0.5
"""Ratio of a class's fractions of the pseudo labels and of the masks below which it is named."""


class Meter:
    """Means of the losses since the last evaluation, and where the time went.

    Sums stay on the device, so that a step never waits for the GPU; a loss that is not finite is remembered by its step.
    """

    def __init__(self, ranks: Ranks, classes: Sequence[str] = ()) -> None:
        """`classes`: names of all classes, whose pseudo labels are then also reported apart."""
        self._ranks, self._classes = ranks, classes
        self._batches = 0
        self._mask_pixels = torch.zeros(256, dtype=torch.float64)
        """Number by train id. Of all the training, which `reset` does not forget: what masks show does not change."""
        self.reset()

    def reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._images = 0
        self._wait_s = 0.0
        self._started = time.perf_counter()
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=self._ranks.device)

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the same batches; the time spent waiting for them is counted."""
        source = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(source, None)
            if batch is None:
                return
            self._wait_s += time.perf_counter() - asked
            self._images += batch.labeled_image.shape[0]
            self._images += 0 if batch.unlabeled_image is None else batch.unlabeled_image.shape[0]
            if self._batches % _COUNT_EVERY == 0:
                self._mask_pixels += torch.bincount(batch.labeled_mask.flatten(), minlength=256).cpu()
            self._batches += 1
            yield batch

    def add(self, step: int, measured: dict[str, Tensor]) -> None:
        """Takes what `train_step` returned for the update from `step` to `step + 1`."""
        for name, value in measured.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        bad = (self._first_bad < 0) & ~torch.isfinite(measured["loss"])
        self._first_bad = torch.where(bad, torch.full_like(self._first_bad, step), self._first_bad)
        # Looking costs nothing on a CPU; on a GPU it would stall every step, and ranks have to stop together.
        if self._ranks.device.type == "cpu" and self._ranks.world == 1:
            self._check()

    def read(self) -> Metrics:
        """Returns means over steps and ranks since the last reset. A collective: every rank calls it.

        `train/loss` and its terms, `train/grad_norm_a` ...; what `_pseudo` lists; `time/images_per_s`
        (all ranks), `time/data_wait` (fraction 0..1 of the time) and `time/data_wait_s` (seconds, mean over ranks);
        `memory/peak_bytes`, the most that a rank has held (on a GPU its tensors, on a CPU the process); `labeled/top_fraction`, the
        fraction of the commonest class in the masks so far.
        """
        self._check()
        ranks, elapsed = self._ranks, time.perf_counter() - self._started
        counted = [self._sums.pop(name) for name in ("labels", "confidence") if name in self._sums]
        names = sorted(self._sums)
        values = [self._sums[name].double() / self._counts[name] for name in names]
        # Ranks of one batch shard see the same images: each counts its part of them, so that the sum over ranks is right.
        clock = torch.tensor(
            [self._images / ranks.ranks_per_shard / elapsed, self._wait_s, elapsed], dtype=torch.float64
        )
        rows = torch.stack([*values, *clock.to(ranks.device)])  # in one exchange
        *means, images, wait, lasted = ranks.sum(rows).tolist()
        metrics: Metrics = {f"train/{name}": mean / ranks.world for name, mean in zip(names, means, strict=True)}
        in_masks = ranks.sum(self._mask_pixels.to(ranks.device)).cpu()[:IGNORE]
        if in_masks.sum() > 0:
            metrics["labeled/top_fraction"] = float(in_masks.max() / in_masks.sum())
        if counted:
            labels, confidence = (ranks.sum(sums).cpu() for sums in counted)
            metrics |= _pseudo(labels, in_masks, confidence, self._classes)
        peak = ranks.max(torch.tensor(_peak_bytes(ranks.device), device=ranks.device))
        return metrics | {
            "time/images_per_s": images,
            "time/data_wait": wait / lasted,
            "time/data_wait_s": wait / ranks.world,
            "memory/peak_bytes": int(peak),
        }

    def _check(self) -> None:
        step = int(self._ranks.max(self._first_bad))
        if step >= 0:
            raise DivergedError(
                f"the loss is not finite at step {step}. Lower optim.lr or the weight of the unlabelled loss, or set optim.clip_norm."
            )


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB


def _pseudo(labels: Tensor, masks: Tensor, confidence_2C: Tensor, classes: Sequence[str]) -> Metrics:
    """Scores of pseudo labels, from what `MicroBatch.measured` lists. All but `frequency_ratio` are in 0..1.

    `pseudo/confidence`: mean probability of the likeliest class; `pseudo/coverage`: fraction of a's labels that are sure enough to
    count; `pseudo/top_fraction`: that of the commonest label among them; of two networks, where both count, `pseudo/agreement`: fraction
    of equal labels, and `pseudo/kappa`: the same beyond chance (Cohen 1960; 1 is full, 0 is chance). `classes`: as `_by_class`.
    """
    of_a = labels.flatten(start_dim=1).sum(dim=1) if labels.dim() > 1 else labels
    sure = labels[(slice(IGNORE),) * labels.dim()]  # the last row and column are the unsure ones
    metrics = {"pseudo/coverage": float(of_a[:IGNORE].sum() / of_a.sum())}
    if confidence_2C[1].sum() > 0:
        metrics["pseudo/confidence"] = float(confidence_2C[0].sum() / confidence_2C[1].sum())
    if sure.sum() > 0:
        metrics["pseudo/top_fraction"] = float(sure.view(IGNORE, -1).sum(dim=1).max() / sure.sum())
        if sure.dim() > 1:
            metrics |= _agreement(sure)
    of_all = sum(
        (labels.movedim(dim, 0).reshape(256, -1).sum(dim=1) for dim in range(labels.dim())), labels.new_zeros(256)
    )
    return metrics | _by_class(of_all, masks, confidence_2C, classes)


def _agreement(sure: Tensor) -> Metrics:
    """`pseudo/agreement` and `pseudo/kappa` from the pixels that have each pair of labels."""
    fraction_a, fraction_b = sure.sum(dim=1) / sure.sum(), sure.sum(dim=0) / sure.sum()
    agreement, chance = float(sure.diagonal().sum() / sure.sum()), float((fraction_a * fraction_b).sum())
    if chance >= 1.0 - 1e-9:  # both always predict the same class, and chance agrees as often as they do
        return {"pseudo/agreement": agreement}
    return {"pseudo/agreement": agreement, "pseudo/kappa": (agreement - chance) / (1.0 - chance)}


def _by_class(labels: Tensor, masks: Tensor, confidence_2C: Tensor, classes: Sequence[str]) -> Metrics:
    """Scores of the pseudo labels of each class, named by `classes`, from pixels (256,) of the pseudo labels of networks a and b and
    (255,) of the masks so far.

    `pseudo/confidence/road`: mean probability where road is the likeliest; `pseudo/frequency/road`: fraction of the pseudo labels that
    count; `pseudo/frequency_ratio/road`: that divided by the fraction in the masks, where they show the class.
    """
    metrics: Metrics = {}
    pseudo, true = (counts[:IGNORE] / counts[:IGNORE].sum().clamp(min=1) for counts in (labels, masks))
    for label, name in enumerate(classes):
        total, pixels = confidence_2C[:, label].tolist()
        metrics |= {f"pseudo/confidence/{name}": total / pixels} if pixels else {}
        metrics[f"pseudo/frequency/{name}"] = float(pseudo[label])
        if true[label] > 0:
            metrics[f"{_RATIO}{name}"] = float(pseudo[label] / true[label])
    return metrics


def vanishing(metrics: Metrics) -> str | None:
    """Names the classes that the pseudo labels have lost, the rarest first, as `sign (0.12), pedestrian (0.31)`; None if there are none.

    Lost: their fraction of the pseudo labels that count is less than half of that in the masks.
    """
    ratios = {name.removeprefix(_RATIO): value for name, value in metrics.items() if name.startswith(_RATIO)}
    lost = sorted((value, name) for name, value in ratios.items() if value < _LOST)
    return ", ".join(f"{name} ({value:.2f})" for value, name in lost) or None


def collapse(metrics: Metrics) -> str | None:
    """Returns what is wrong with networks that do not tell classes apart; None if nothing is.

    That is worth a line in the log. By itself it ends nothing: of a baseline, or where foreground is rare, it is a result.
    """
    ious = {name.removeprefix("val/iou/"): value for name, value in metrics.items() if name.startswith("val/iou/")}
    found = [name for name, value in ious.items() if value > 0.0]
    takes_all = metrics.get("pseudo/top_fraction", 1.0) >= _ONE_CLASS
    if len(ious) > 1 and len(found) <= 1 and takes_all:
        return f"one class takes all: of {len(ious)} classes in val only {found[0] if found else 'none'} is found"
    # Where nearly all labels are of one class, kappa is near 0 although the networks agree.
    if metrics.get("pseudo/kappa", 1.0) <= _CHANCE and metrics.get("pseudo/top_fraction", 0.0) < _KAPPA_BLIND:
        return f"the networks agree no more than by chance (kappa {metrics['pseudo/kappa']:.3f})"
    return None


def is_kept_up(config: TrainConfig, metrics: Metrics) -> bool:
    """Whether pseudo labels keep a collapse up, so that the masks alone cannot undo it: these labels must be hard, weigh something, be of
    one class nearly everywhere (unsure pixels teach nothing) and by both networks (one that tells classes apart teaches the other one
    again), and the masks must show more.

    So a supervised training is never ended for what it finds, nor one whose masks are of one class themselves. Networks that agree by
    chance are not ended either: one of them may be good, and whether it is, its scores say.
    """
    # Not those of mean_teacher: its squared difference keeps the probabilities of rarer classes alive.
    labels_are_hard = isinstance(config.settings, PseudoLabelConfig)
    they_count = metrics.get(f"{config.method_name}/weight", 0.0) > 0.0
    one_class = metrics.get("pseudo/coverage", 0.0) * metrics.get("pseudo/top_fraction", 0.0) >= _ONE_CLASS
    by_both = metrics.get("pseudo/agreement", 1.0) >= _ONE_CLASS  # not measured of a single network
    masks_show_more = metrics.get("labeled/top_fraction", 1.0) <= _SHOW_MORE
    return labels_are_hard and they_count and one_class and by_both and masks_show_more


def is_lost(schedule: ScheduleConfig, step: int, collapsed: int) -> bool:
    """Whether a collapse that was kept up at `collapsed` evaluations in a row is beyond recovery.

    Only those of the second half count: at first the commonest class takes all, and running statistics lag.
    """
    every, steps = schedule.eval_every, schedule.steps
    # The second operand is the number of evaluations since half-way.
    return min(collapsed, step // every - steps // 2 // every) >= PATIENCE
