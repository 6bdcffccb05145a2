"""How predictions are measured: of each network, on slices of a split, and of all networks together."""

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cps_ray.config.train import ENSEMBLE, NETWORK_NAMES, EvaluationConfig, TrainConfig
from cps_ray.engine.batch import IGNORE, EvalBatch
from cps_ray.engine.inference import Labels, label_strips
from cps_ray.engine.metrics import (
    CALIBRATION_BINS,
    calibration,
    calibration_error,
    class_accuracy,
    confusion,
    iou,
    mean_iou,
    micro_iou,
    pixel_accuracy,
)
from cps_ray.engine.networks import Segmenter
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.telemetry import Metrics

# N images, C classes, H W pixels, R rows of a strip, P a pair of networks.
_WHOLE_SPLIT_SCORES = {"iou_micro": micro_iou, "pixel_accuracy": pixel_accuracy, "class_accuracy": class_accuracy}
"""Further scores of network a, for the whole split only."""
_CHUNK_PX = {"cpu": 2**15, "cuda": 2**21}
"""Pixels whose calibration is counted at once, so that they stay in a CPU's caches."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What an evaluation counted, over all ranks, on the CPU. Matrices are int64 (C, C), true class by predicted class."""

    whole_split: Tensor
    """Network a on all images."""
    slices: dict[str, Tensor]
    """Network a on the images of each slice."""
    others: dict[str, Tensor]
    """Each other network, and ENSEMBLE, on all images. Empty where only a is evaluated."""
    agreement: Tensor
    """int64 (2,): pixels on which networks a and b agree, and all pixels at which that was asked. Ignored ones count in neither."""
    calibration: dict[str, Tensor]
    """Each network, and ENSEMBLE where there are others than a, on all images: sums as `metrics.calibration` gives them."""


class Tally:
    """Integer counts by name, added image by image and then over ranks. A name that nobody adds to stays zero."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self._totals = {name: torch.zeros(shape, dtype=torch.int64, device=device) for name, shape in shapes.items()}

    def add(self, name: str, counts: Tensor) -> None:
        """Adds counts of the shape that `name` has."""
        self._totals[name] += counts

    def reduce(self, ranks: Ranks) -> dict[str, Tensor]:
        """Sums by name over all ranks, on the CPU. A collective: every rank calls it with the same names."""
        # In one exchange: an evaluation of many slices would else wait for as many.
        flat = ranks.sum(torch.cat([total.flatten() for total in self._totals.values()])).cpu()
        parts = torch.split(flat, [total.numel() for total in self._totals.values()])
        return {name: part.view(self._totals[name].shape) for name, part in zip(self._totals, parts, strict=True)}


def evaluated_networks(evaluation: EvaluationConfig, networks: Iterable[str]) -> list[str]:
    """Names of those of a training's networks that are evaluated."""
    return ["a"] if evaluation.networks == "a" else [*networks]


@torch.inference_mode()
def evaluate(
    config: TrainConfig,
    networks: Mapping[str, Segmenter],
    batches: Iterable[EvalBatch],
    num_classes: int,
    ranks: Ranks,
    on_images: Callable[[str, Sequence[str], Tensor], None] | None = None,
) -> Counts:
    """Counts every pixel of every image once, for each network as `predict` sees it. A collective: every rank passes its own images.

    `networks`: by name, left in evaluation mode. Where each worker has one network, only this rank's own; the ranks of a
    batch shard then pass the same images, and the one with network a counts for them what all networks predict together.
    Slices (`data.slices`) are counted for network a. `on_images` gets the name of a network or ENSEMBLE, the ids of a batch and their confusion
    matrices (N, C, C), strip by strip: an image may come several times, and its matrices add up.
    """
    slices, inference = config.data.slices, config.inference
    # A rank that has one network still tallies the names of all: the ranks' tallies are summed in one exchange.
    present = NETWORK_NAMES[: ranks.ranks_per_shard] if ranks.ranks_per_shard > 1 else networks
    names = evaluated_networks(config.evaluation, present)
    together = len(names) > 1
    tally = _tally([*names, *([ENSEMBLE] if together else [])], slices, num_classes, ranks.device)
    mine = {name: network.eval() for name, network in networks.items() if name in names}
    for batch in batches if mine else ():
        image, target_NHW = batch.image.to(ranks.device), batch.mask.to(ranks.device)
        first_row = 0
        pair: dict[str, Tensor] = {}
        for name, found in label_strips(inference, mine, image, ranks if together else None):
            rows = found.labels.shape[1]
            target_NRW = target_NHW[:, first_row : first_row + rows]
            counts = name != ENSEMBLE or "a" in mine  # the ensemble is all ranks' together
            if counts:
                matrices_NCC = confusion(found.labels, target_NRW, num_classes)
                tally.add(_network(name), matrices_NCC.sum(0))
                tally.add(_calibration(name), calibration_sums(found, target_NRW))
                if on_images is not None:
                    on_images(name, batch.ids, matrices_NCC)
            if name == "a":
                _count_slices(tally, slices, batch.ids, matrices_NCC)
            if name in ("a", "b"):
                pair[name] = found.labels
            if name == ENSEMBLE:
                # Collectives of the batch shard's ranks: all of them take part, and the one with network a counts.
                pair_PNRW = torch.stack([pair.get(each, torch.zeros_like(found.labels)) for each in "ab"])
                pair_PNRW = ranks.sum_over_networks(pair_PNRW)
                if counts:
                    _count_agreement(tally, pair_PNRW, target_NRW)
            if name == (ENSEMBLE if together else names[-1]):
                first_row += rows
    return _counts(tally.reduce(ranks), slices)


def calibration_sums(found: Labels, target_NRW: Tensor) -> Tensor:
    """Returns the sums of `calibration` over a strip."""
    chunk = _CHUNK_PX.get(target_NRW.device.type, 2**15)
    flat = (torch.split(each.reshape(-1), chunk) for each in (found.certainty, found.labels, target_NRW))
    # In chunks, since what is computed on the way is several times as large.
    sums = [
        calibration(certainty, label == target, target != IGNORE)
        for certainty, label, target in zip(*flat, strict=True)
    ]
    return torch.stack(sums).sum(0)


def _count_slices(tally: Tally, slices: Mapping[str, str], ids: Sequence[str], matrices_NCC: Tensor) -> None:
    for name, pattern in slices.items():
        member_N = torch.tensor([fnmatch.fnmatchcase(each, pattern) for each in ids], device=matrices_NCC.device)
        tally.add(_slice(name), matrices_NCC[member_N].sum(0))


def _count_agreement(tally: Tally, pair_PNRW: Tensor, target_NRW: Tensor) -> None:
    """Counts where the labels of a and b agree."""
    counted_NRW = target_NRW != IGNORE
    agree_NRW = (pair_PNRW[0] == pair_PNRW[1]) & counted_NRW
    tally.add(_AGREEMENT, torch.stack([agree_NRW.sum(), counted_NRW.sum()]))


def _counts(totals: dict[str, Tensor], slices: Iterable[str]) -> Counts:
    def named(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): total for key, total in totals.items() if key.startswith(prefix)}

    networks = named(_network(""))
    return Counts(
        whole_split=networks.pop("a"),
        slices={name: totals[_slice(name)] for name in slices},
        others=networks,
        agreement=totals[_AGREEMENT],
        calibration=named(_calibration("")),
    )


_AGREEMENT = "agreement"


def _network(name: str) -> str:
    """Key of a network in the tally; slices have keys of another kind, as both are named freely."""
    return f"network {name}"


def _slice(name: str) -> str:
    return f"slice {name}"


def _calibration(name: str) -> str:
    """Key of a network's calibration."""
    return f"calibration {name}"


def _tally(networks: Sequence[str], slices: Iterable[str], num_classes: int, device: torch.device) -> Tally:
    matrices = dict.fromkeys([*map(_network, networks), *map(_slice, slices)], (num_classes, num_classes))
    bins = dict.fromkeys(map(_calibration, networks), (3, CALIBRATION_BINS))
    return Tally({**matrices, **bins, _AGREEMENT: (2,)}, device)


def summarise(counts: Counts, classes: Iterable[str], split: str) -> dict[str, Any]:
    """Returns `val/miou`, `val/iou/road`, `val/iou_micro`, ..., per slice `val/seq05/miou`, `val/seq05/iou/road`, `further_scores`, and
    the calibration errors `val/ece`, `val/b/ece`, `val/ensemble/ece`.

    Floats in 0..1. What was not there has no entry: a class that is neither true nor predicted, a slice without images.
    """
    names = list(classes)
    scores: dict[str, Any] = {}
    for part, matrix in {"": counts.whole_split, **counts.slices}.items():
        if matrix.any():
            prefix = f"{split}/{part}" if part else split
            scores |= {f"{prefix}/miou": mean_iou(matrix), **_ious(matrix, names, prefix)}
    if counts.whole_split.any():
        scores |= {f"{split}/{name}": score(counts.whole_split) for name, score in _WHOLE_SPLIT_SCORES.items()}
    scores |= {f"{split}/{name}/miou": mean_iou(matrix) for name, matrix in counts.others.items() if matrix.any()}
    for name, sums in counts.calibration.items():
        if sums.any():
            scores[f"{split}/ece" if name == "a" else f"{split}/{name}/ece"] = calibration_error(sums)
    agree, asked = counts.agreement.tolist()
    return scores | ({f"{split}/agreement": agree / asked} if asked else {})


def further_scores(evaluation: EvaluationConfig, num_networks: int) -> list[str]:
    """What `summarise` names beside the IoUs of network a and is better the higher it is: `iou_micro`, ..., and of a pair `b/miou`,
    `ensemble/miou`, `agreement`."""
    names = evaluated_networks(evaluation, NETWORK_NAMES[:num_networks])
    if len(names) == 1:
        return [*_WHOLE_SPLIT_SCORES]
    return [*_WHOLE_SPLIT_SCORES, *(f"{name}/miou" for name in (*names[1:], ENSEMBLE)), "agreement"]


def evaluate_hidden(
    config: TrainConfig,
    networks: Mapping[str, Segmenter],
    batches: Iterable[EvalBatch],
    classes: Sequence[str],
    ranks: Ranks,
) -> Metrics:
    """Returns network a's scores on unlabelled images whose masks are known but hidden from it: `pseudo/miou`, and `pseudo/iou/road`, ...
    for all that `classes` names; nothing without such images."""
    only_a = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"networks": "a"})})
    matrix = evaluate(only_a, networks, batches, len(classes), ranks).whole_split
    return {"pseudo/miou": mean_iou(matrix)} | _ious(matrix, classes, "pseudo") if matrix.any() else {}


def _ious(matrix: Tensor, classes: Iterable[str], prefix: str) -> Metrics:
    """IoU of each class that is true or predicted somewhere."""
    per_class = zip(classes, iou(matrix).tolist(), strict=True)
    return {f"{prefix}/iou/{name}": value for name, value in per_class if not math.isnan(value)}
