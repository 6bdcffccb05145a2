"""How images are evaluated: in windows, at scales, mirrored; each network, slices of a split, and all networks together."""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cps_ray.config.train import ENSEMBLE, NETWORK_NAMES, EvaluationConfig, TrainConfig
from cps_ray.engine.batch import IGNORE, EvalBatch
from cps_ray.engine.dense import upsample
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
from cps_ray.engine.state import autocast
from cps_ray.engine.telemetry import Metrics

# N images, C classes, H W pixels, h w pixels of a window, B windows, P a pair of networks.
_WHOLE_SPLIT_SCORES = {"iou_micro": micro_iou, "pixel_accuracy": pixel_accuracy, "class_accuracy": class_accuracy}
"""Further scores of network a, for the whole split only."""
_CROPS_AT_ONCE = 8
"""Crops whose pixels an image has at most to be evaluated in one piece by default: a training step holds about as many."""
_CHUNK_PX = {"cpu": 2**15, "cuda": 2**21}
"""Pixels whose probabilities are computed at once: on CPUs by caches, on GPUs launches and waiting cost more."""


@torch.inference_mode()
def predict(config: TrainConfig, network: Segmenter, image_N3HW: Tensor) -> Tensor:
    """Scores of images of any one size, uint8 on the network's device -> float32 (N, C, H, W); the network is in eval mode.

    Logits or probabilities, as `evaluation.sum` says, averaged over windows, scales and flips. Images are resized without
    antialiasing, as training views are, to round(side * scale), not rounded to integers; their scores bilinearly back.
    """
    evaluation = config.evaluation
    height, width = image_N3HW.shape[-2:]
    views = len(evaluation.scales) * (2 if evaluation.flip else 1)
    total_NCHW: Tensor | None = None
    for scale in evaluation.scales:
        scaled = _resized(image_N3HW, (max(1, round(height * scale)), max(1, round(width * scale))))
        for mirrored in (False, True) if evaluation.flip else (False,):
            scores = _sliding(config, network, scaled.flip(-1) if mirrored else scaled)
            scores = _resized(scores.flip(-1) if mirrored else scores, (height, width))
            if views == 1:
                return scores  # the usual case needs no second tensor of this size
            total_NCHW = torch.zeros_like(scores) if total_NCHW is None else total_NCHW
            total_NCHW += scores
    assert total_NCHW is not None
    return total_NCHW.div_(views)


def _resized(x_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    if x_NCHW.shape[-2:] == size:
        return x_NCHW
    return F.interpolate(x_NCHW.float(), size, mode="bilinear", align_corners=False)


def _forward(config: TrainConfig, network: Segmenter, image_BCHW: Tensor) -> Tensor:
    """Scores of whole images, or of windows: float32 (B, C, H, W), classes last in memory."""
    with autocast(config.compute.autocast, image_BCHW.device):
        coarse = network(image_BCHW)
    # An argmax over classes that lie last in memory is five times as fast on a CPU; upsampling is faster too.
    coarse = coarse.float().contiguous(memory_format=torch.channels_last)
    logits = upsample(coarse, (image_BCHW.shape[-2], image_BCHW.shape[-1]))
    if config.evaluation.sum == "logits":
        return logits
    return logits.movedim(1, -1).softmax(dim=-1).movedim(-1, 1)


def windows(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows that cover a side of `length` px; the last is flush with the far end."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]


def window_of(config: TrainConfig, height: int, width: int) -> tuple[int, int] | None:
    """(height, width) of the windows in which an image of this size passes a network; None: in one piece."""
    window = config.evaluation.window_px
    if window is None:
        crop = config.data.crop_px
        return crop if height * width > _CROPS_AT_ONCE * crop[0] * crop[1] else None
    return None if window == "whole" else window


def _sliding(config: TrainConfig, network: Segmenter, image_N3HW: Tensor) -> Tensor:
    """Mean of the scores over the windows that see a pixel, or the scores of the image in one piece: (N, C, H, W)."""
    evaluation = config.evaluation
    height, width = image_N3HW.shape[-2:]
    window = window_of(config, height, width)
    if window is None:
        return _forward(config, network, image_N3HW)
    h, w = window
    down, across = evaluation.stride_px or (-(-h * 2 // 3), -(-w * 2 // 3))
    image_N3HW, top, left = _centred(image_N3HW, window, network.mean)
    images, _, tall, wide = image_N3HW.shape
    rows, columns = windows(tall, h, down), windows(wide, w, across)
    corners = [(n, y, x) for n in range(images) for y in rows for x in columns]
    total_NCHW: Tensor | None = None
    for first in range(0, len(corners), evaluation.window_batch):
        chunk = corners[first : first + evaluation.window_batch]
        image_B3hw = torch.stack([image_N3HW[n, :, y : y + h, x : x + w] for n, y, x in chunk])
        scores_BChw = _forward(config, network, image_B3hw)
        if total_NCHW is None:  # the number of classes is known from here on
            total_NCHW = scores_BChw.new_zeros(images, tall, wide, scores_BChw.shape[1]).movedim(-1, 1)
        for (n, y, x), scores_Chw in zip(chunk, scores_BChw, strict=True):
            total_NCHW[n, :, y : y + h, x : x + w] += scores_Chw
    assert total_NCHW is not None
    # Windows are a grid: how often a pixel is seen is the product of how often its row and its column are.
    seen_H, seen_W = (_times_seen(*side, total_NCHW) for side in ((tall, rows, h), (wide, columns, w)))
    total_NCHW /= seen_H[:, None] * seen_W
    return total_NCHW[..., top : top + height, left : left + width]


def _centred(image_N3HW: Tensor, window: tuple[int, int], mean: Tensor) -> tuple[Tensor, int, int]:
    """Puts the image amid a field of the mean colour, which the network sees as 0, at least as large as a window; returns its first
    row and column, too.

    As the CPS reference does with VOC; an odd pixel goes below and to the right.
    """
    images, channels, height, width = image_N3HW.shape
    tall, wide = max(height, window[0]), max(width, window[1])
    if (tall, wide) == (height, width):
        return image_N3HW, 0, 0
    top, left = (tall - height) // 2, (wide - width) // 2
    field = mean.expand(images, channels, tall, wide).clone()
    field[..., top : top + height, left : left + width] = image_N3HW
    return field, top, left


def _times_seen(length: int, firsts: Sequence[int], window: int, like: Tensor) -> Tensor:
    seen = like.new_zeros(length)
    for first in firsts:
        seen[first : first + window] += 1
    return seen


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
) -> Counts:
    """Counts every pixel of every image once, for each network as `predict` sees it. A collective: every rank passes its own images.

    `networks`: by name, left in evaluation mode. Where each worker has one network, only this rank's own; the ranks of a
    batch shard then pass the same images, and the one with network a counts for them what all networks predict together.
    Slices (`data.slices`) are counted for network a.
    """
    slices = config.data.slices
    # A rank that has one network still tallies the names of all: the ranks' tallies are summed in one exchange.
    present = NETWORK_NAMES[: ranks.ranks_per_shard] if ranks.ranks_per_shard > 1 else networks
    names = evaluated_networks(config.evaluation, present)
    together = len(names) > 1
    tally = _tally([*names, *([ENSEMBLE] if together else [])], slices, num_classes, ranks.device)
    mine = {name: network.eval() for name, network in networks.items() if name in names}
    for batch in batches if mine else ():
        image, target_NHW = batch.image.to(ranks.device), batch.mask.to(ranks.device)
        total_NHWC: Tensor | None = None
        pair_PNHW = torch.zeros(2, *target_NHW.shape, dtype=torch.uint8, device=ranks.device)
        # Network by network: the scores of one, C floats a pixel, are the largest tensor here.
        for name, network in mine.items():
            # In one block of memory, as collectives want it.
            prob_NHWC = predict(config, network, image).movedim(1, -1).contiguous()
            labels_NHW, sums = _labels(prob_NHWC, target_NHW, logits=config.evaluation.sum == "logits")
            matrices_NCC = confusion(labels_NHW, target_NHW, num_classes)
            tally.add(_network(name), matrices_NCC.sum(0))
            tally.add(_calibration(name), sums)
            if name == "a":
                _count_slices(tally, slices, batch.ids, matrices_NCC)
            if together and name in "ab":
                pair_PNHW["ab".index(name)] = labels_NHW
            if together:
                total_NHWC = prob_NHWC if total_NHWC is None else total_NHWC.add_(prob_NHWC)
            del prob_NHWC  # else it would lie beside the scores of the next network
        if total_NHWC is not None:
            # Collectives of the batch shard's ranks: all of them take part, and the one with network a counts.
            total_NHWC, pair_PNHW = ranks.sum_over_networks(total_NHWC), ranks.sum_over_networks(pair_PNHW)
            if "a" in mine:
                _count_together(tally, total_NHWC, len(names), pair_PNHW, target_NHW)
    return _counts(tally.reduce(ranks), slices)


def _labels(
    scores_NHWC: Tensor, target_NHW: Tensor, *, logits: bool = False, networks: int = 1
) -> tuple[Tensor, Tensor]:
    """Returns the likeliest class of each pixel, uint8 (N, H, W), and the sums of `calibration`.

    The scores, in one block of memory, are the summed probabilities of so many `networks`; or `logits`, which become probabilities
    in place.
    """
    labels_NHW, chunk = torch.empty_like(target_NHW), _CHUNK_PX.get(target_NHW.device.type, 2**15)
    pixels = scores_NHWC.view(-1, scores_NHWC.shape[-1]), target_NHW.reshape(-1), labels_NHW.view(-1)
    sums = []
    # In chunks, as what is computed on the way would be as large as the scores.
    for scores_PC, target_P, labels_P in zip(*(torch.split(each, chunk) for each in pixels), strict=True):
        top_P, label_P = scores_PC.max(dim=-1)
        labels_P.copy_(label_P)
        if logits:
            # For few classes several times as fast on a CPU as torch's own, and without a copy.
            scores_PC.sub_(top_P.unsqueeze(-1)).exp_()
            top_P = scores_PC.sum(dim=-1).reciprocal_()  # the likeliest class's exp is 1
            scores_PC.mul_(top_P.unsqueeze(-1))
        sums.append(calibration(top_P / networks, labels_P == target_P, target_P != IGNORE))
    return labels_NHW, torch.stack(sums).sum(0)


def _count_slices(tally: Tally, slices: Mapping[str, str], ids: Sequence[str], matrices_NCC: Tensor) -> None:
    for name, pattern in slices.items():
        member_N = torch.tensor([fnmatch.fnmatchcase(each, pattern) for each in ids], device=matrices_NCC.device)
        tally.add(_slice(name), matrices_NCC[member_N].sum(0))


def _count_together(tally: Tally, total_NHWC: Tensor, networks: int, pair_PNHW: Tensor, target_NHW: Tensor) -> None:
    """Counts the ensemble, from the summed probabilities of all networks, and where the labels of a and b agree."""
    ensemble_NHW, sums = _labels(total_NHWC, target_NHW, networks=networks)  # the largest sum is the largest mean
    tally.add(_network(ENSEMBLE), confusion(ensemble_NHW, target_NHW, total_NHWC.shape[-1]).sum(0))
    tally.add(_calibration(ENSEMBLE), sums)
    counted_NHW = target_NHW != IGNORE
    agree_NHW = (pair_PNHW[0] == pair_PNHW[1]) & counted_NHW
    tally.add(_AGREEMENT, torch.stack([agree_NHW.sum(), counted_NHW.sum()]))


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
