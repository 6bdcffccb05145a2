"""How images are judged: in windows, at scales, mirrored; each network, their parts of a split, and all networks together."""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cps_ray.config.train import NETWORK_NAMES, TrainConfig
from cps_ray.engine.batch import IGNORE, EvalBatch
from cps_ray.engine.dense import upsample
from cps_ray.engine.metrics import class_accuracy, confusion, iou, mean_iou, micro_iou, pixel_accuracy
from cps_ray.engine.networks import Segmenter
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import autocast
from cps_ray.engine.telemetry import Metrics

# N images, C classes, H W pixels, h w pixels of a window, B windows, P a pair of networks.
ENSEMBLE = "ensemble"
"""The mean of all networks' probabilities is reported under this name."""
_WHOLE = {"iou_micro": micro_iou, "pixel_accuracy": pixel_accuracy, "class_accuracy": class_accuracy}
"""Further scores of network a, of a whole split only."""


@torch.inference_mode()
def predict(config: TrainConfig, network: Segmenter, image_N3HW: Tensor) -> Tensor:
    """Scores of images of any one size, uint8 on the network's device -> float32 (N, C, H, W); the network is in eval mode.

    Logits or probabilities, as `evaluation.sum` says, averaged over windows, scales and flips. Images are resized without
    antialiasing, as training views are, to round(side * scale), not rounded to integers; their scores bilinearly back.
    """
    settings = config.evaluation
    height, width = image_N3HW.shape[-2:]
    views = len(settings.scales) * (2 if settings.flip else 1)
    total_NCHW: Tensor | None = None
    for scale in settings.scales:
        scaled = _resized(image_N3HW, (max(1, round(height * scale)), max(1, round(width * scale))))
        for mirrored in (False, True) if settings.flip else (False,):
            scores = _sliding(config, network, scaled.flip(-1) if mirrored else scaled)
            scores = _resized(scores.flip(-1) if mirrored else scores, (height, width))
            if views == 1:
                return scores
            total_NCHW = torch.zeros_like(scores) if total_NCHW is None else total_NCHW
            total_NCHW += scores
    assert total_NCHW is not None
    return total_NCHW.div_(views)


def _resized(x_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    if x_NCHW.shape[-2:] == size:
        return x_NCHW
    return F.interpolate(x_NCHW.float(), size, mode="bilinear", align_corners=False)


def _forward(config: TrainConfig, network: Segmenter, image_BCHW: Tensor) -> Tensor:
    """The scores of whole images, or of windows: float32 (B, C, H, W), classes last in memory.

    An argmax over classes is then five times as fast on a CPU, upsampling is faster too.
    """
    with autocast(config, image_BCHW.device):
        coarse = network(image_BCHW)
    coarse = coarse.float().contiguous(memory_format=torch.channels_last)
    logits = upsample(coarse, (image_BCHW.shape[-2], image_BCHW.shape[-1]))
    if config.evaluation.sum == "logits":
        return logits
    return logits.movedim(1, -1).softmax(dim=-1).movedim(-1, 1)


def windows(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows that cover a side of `length` px; the last is flush with the far end."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]


def _sliding(config: TrainConfig, network: Segmenter, image_N3HW: Tensor) -> Tensor:
    """Mean of the scores over the windows that see a pixel; the image in one piece without `window_px`: (N, C, H, W)."""
    settings = config.evaluation
    if settings.window_px is None:
        return _forward(config, network, image_N3HW)
    h, w = settings.window_px
    down, across = settings.stride_px or (-(-h * 2 // 3), -(-w * 2 // 3))
    height, width = image_N3HW.shape[-2:]
    image_N3HW, top, left = _centred(image_N3HW, settings.window_px, network.mean)
    images, _, tall, wide = image_N3HW.shape
    rows, columns = windows(tall, h, down), windows(wide, w, across)
    places = [(n, y, x) for n in range(images) for y in rows for x in columns]
    total_NCHW: Tensor | None = None
    for first in range(0, len(places), settings.window_batch):
        some = places[first : first + settings.window_batch]
        scores_BChw = _forward(
            config, network, torch.stack([image_N3HW[n, :, y : y + h, x : x + w] for n, y, x in some])
        )
        if total_NCHW is None:
            total_NCHW = scores_BChw.new_zeros(images, tall, wide, scores_BChw.shape[1]).movedim(-1, 1)
        for (n, y, x), scores_Chw in zip(some, scores_BChw, strict=True):
            total_NCHW[n, :, y : y + h, x : x + w] += scores_Chw
    assert total_NCHW is not None
    seen_H, seen_W = (_times_seen(*side, total_NCHW) for side in ((tall, rows, h), (wide, columns, w)))
    total_NCHW /= seen_H[:, None] * seen_W
    return total_NCHW[..., top : top + height, left : left + width]


def _centred(image_N3HW: Tensor, window: tuple[int, int], mean: Tensor) -> tuple[Tensor, int, int]:
    """The image amid a field of the mean colour, which the network sees as 0, at least as large as a window; its first row, column.

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

    whole: Tensor
    """Network a on all images."""
    groups: dict[str, Tensor]
    """Network a on the images of each of `data.groups`."""
    others: dict[str, Tensor]
    """Each other network, and ENSEMBLE, on all images. Empty where only a is judged."""
    agreement: Tensor
    """int64 (2,): pixels on which networks a and b agree, and all pixels at which that was asked. Ignored ones count in neither."""


def _judged(config: TrainConfig, networks: Iterable[str], split: int) -> list[str]:
    if config.evaluation.networks == "a":
        return ["a"]
    return [*NETWORK_NAMES[:split]] if split > 1 else [*networks]


@torch.inference_mode()
def evaluate(
    config: TrainConfig, networks: Mapping[str, Segmenter], batches: Iterable[EvalBatch], num_classes: int, ranks: Ranks
) -> Counts:
    """Every pixel of every image once, each network as `predict` sees it. A collective: every rank passes its own images.

    `networks`: by name, left in evaluation mode. Where they are split over ranks, only this rank's own; the ranks of a
    group of peers then pass the same images, and the one with network a counts for them what all networks say together.
    """
    judged = _judged(config, networks, ranks.split)
    mine = {name: network.eval() for name, network in networks.items() if name in judged}
    names = [*config.data.groups, *judged[1:], *([ENSEMBLE] if len(judged) > 1 else [])]
    sums = {
        name: torch.zeros(num_classes, num_classes, dtype=torch.int64, device=ranks.device) for name in ["", *names]
    }
    agreement = torch.zeros(2, dtype=torch.int64, device=ranks.device)
    for batch in batches if mine else ():
        image, target_NHW = batch.image.to(ranks.device), batch.mask.to(ranks.device)
        pair_PNHW = torch.zeros(2, *target_NHW.shape, dtype=torch.uint8, device=ranks.device)
        share_NHWC: Tensor | None = None
        for name, network in mine.items():
            scores_NCHW = predict(config, network, image)
            labels_NHW = scores_NCHW.argmax(dim=1)
            matrices = confusion(labels_NHW, target_NHW, num_classes)
            sums["" if name == "a" else name] += matrices.sum(0)
            if name == "a":
                for group, pattern in config.data.groups.items():
                    member = torch.tensor([fnmatch.fnmatchcase(one, pattern) for one in batch.ids], device=ranks.device)
                    sums[group] += matrices[member].sum(0)
            if len(judged) > 1:
                own_NHWC = _probabilities(config, scores_NCHW)
                share_NHWC = own_NHWC if share_NHWC is None else share_NHWC + own_NHWC
                if name in "ab":
                    pair_PNHW["ab".index(name)] = labels_NHW
        if share_NHWC is not None:
            # The largest sum of probabilities is the largest mean.
            together_NHW = ranks.peer_sum(share_NHWC).argmax(dim=-1)
            a_NHW, b_NHW = ranks.peer_sum(pair_PNHW)
            if "a" in mine:
                sums[ENSEMBLE] += confusion(together_NHW, target_NHW, num_classes).sum(0)
                counted = target_NHW != IGNORE
                agreement += torch.stack([((a_NHW == b_NHW) & counted).sum(), counted.sum()])
    whole, *rest = ranks.sum(torch.stack([*sums.values()])).cpu()
    found = dict(zip(names, rest, strict=True))
    groups = {name: found.pop(name) for name in config.data.groups}
    return Counts(whole, groups, found, ranks.sum(agreement).cpu())


def _probabilities(config: TrainConfig, scores_NCHW: Tensor) -> Tensor:
    """Of averaged scores, in one block of memory as collectives want it: (N, H, W, C)."""
    scores_NHWC = scores_NCHW.movedim(1, -1)
    return scores_NHWC.softmax(dim=-1) if config.evaluation.sum == "logits" else scores_NHWC.contiguous()


def summarise(counts: Counts, classes: Iterable[str], split: str) -> dict[str, Any]:
    """`val/miou`, `val/iou/road`, `val/iou_micro`, ..., per group `val/seq05/miou`, `val/seq05/iou/road`, and `further_scores`.

    Floats in 0..1. What was not shown has no entry: a class that is neither true nor predicted, a group without images.
    """
    names = list(classes)
    scores: dict[str, Any] = {}
    for part, matrix in {"": counts.whole, **counts.groups}.items():
        if matrix.any():
            prefix = f"{split}/{part}/" if part else f"{split}/"
            scores[f"{prefix}miou"] = mean_iou(matrix)
            per_class = zip(names, iou(matrix).tolist(), strict=True)
            scores |= {f"{prefix}iou/{name}": value for name, value in per_class if not math.isnan(value)}
    if counts.whole.any():
        scores |= {f"{split}/{name}": score(counts.whole) for name, score in _WHOLE.items()}
    scores |= {f"{split}/{name}/miou": mean_iou(matrix) for name, matrix in counts.others.items() if matrix.any()}
    agree, asked = counts.agreement.tolist()
    return scores | ({f"{split}/agreement": agree / asked} if asked else {})


def further_scores(config: TrainConfig) -> list[str]:
    """What `summarise` names beside the IoUs of network a: `iou_micro`, ..., and of a pair `b/miou`, `ensemble/miou`, `agreement`."""
    judged = _judged(config, NETWORK_NAMES[: config.networks], 1)
    if len(judged) == 1:
        return [*_WHOLE]
    return [*_WHOLE, *(f"{name}/miou" for name in (*judged[1:], ENSEMBLE)), "agreement"]


def evaluate_hidden(
    config: TrainConfig, networks: Mapping[str, Segmenter], batches: Iterable[EvalBatch], num_classes: int, ranks: Ranks
) -> Metrics:
    """`pseudo/miou`: network a's mIoU on unlabelled images whose masks are known but hidden from it; nothing without such images."""
    plain = config.model_copy(
        update={
            "data": config.data.model_copy(update={"groups": {}}),
            "evaluation": config.evaluation.model_copy(update={"networks": "a"}),
        }
    )
    whole = evaluate(plain, networks, batches, num_classes, ranks).whole
    return {"pseudo/miou": mean_iou(whole)} if whole.any() else {}
