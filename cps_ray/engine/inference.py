"""How images are predicted: in windows, at scales, mirrored, in strips; what labels scores make, of each network and of all together."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cps_ray.config.train import ENSEMBLE, InferenceConfig
from cps_ray.engine.dense import upsample
from cps_ray.engine.networks import Segmenter
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import autocast

# N images, C classes, H W pixels, R rows of a strip, h w pixels of a window, B windows, P pixels in a row of memory.
_CROPS_AT_ONCE = 8
"""Crops whose pixels an image has at most to be predicted in one piece by default: a training step holds about as many."""
_CHUNK_PX = {"cpu": 2**15, "cuda": 2**21}
"""Pixels whose probabilities are computed at once: on CPUs by caches, on GPUs launches and waiting cost more."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What scores say of the pixels of a strip."""

    labels: Tensor
    """The likeliest class of each pixel: uint8 (N, R, W)."""
    certainty: Tensor
    """The probability of that class: float32 (N, R, W)."""
    prob: Tensor
    """Summed probabilities of so many networks as there are: float32 (N, R, W, C). Of one network only until the next one's are asked for."""


@torch.inference_mode()
def label_strips(
    config: InferenceConfig, networks: Mapping[str, Segmenter], image_N3HW: Tensor, ranks: Ranks | None = None
) -> Iterator[tuple[str, Labels]]:
    """Yields, strip by strip from the top, what each network says, by its name, and what they say together, as ENSEMBLE.

    Images of any one size, uint8 on the networks' device; the networks are in eval mode. The one function that makes labels, of
    predictions as of evaluations. `ranks`: where each of its ranks has one network, all of them call this with the same images, and
    ENSEMBLE is of all ranks' networks.
    """
    together = len(networks) if ranks is None else max(len(networks), ranks.ranks_per_shard)
    each = {name: strips(config, network, image_N3HW) for name, network in networks.items()}
    while True:
        total_NRWC: Tensor | None = None
        # Network by network: the scores of one, C floats a pixel, are the largest tensor here.
        for name, scores in each.items():
            scores_NCRW = next(scores, None)
            if scores_NCRW is None:
                return  # all networks see the same windows, hence have as many strips
            prob_NRWC = scores_NCRW.movedim(1, -1).contiguous()  # in one block of memory, as collectives want it
            del scores_NCRW
            labels = label_pixels(prob_NRWC, logits=config.sum == "logits")
            yield name, labels
            if together > 1:
                total_NRWC = prob_NRWC if total_NRWC is None else total_NRWC.add_(prob_NRWC)
            del prob_NRWC, labels  # else they would lie beside the scores of the next network
        if total_NRWC is not None:
            if ranks is not None:
                total_NRWC = ranks.sum_over_networks(total_NRWC)
            yield ENSEMBLE, label_pixels(total_NRWC, networks=together)


def label_pixels(scores_NRWC: Tensor, *, logits: bool = False, networks: int = 1) -> Labels:
    """Returns the labels of scores in one block of memory: the summed probabilities of so many `networks`, or `logits`, which become
    probabilities in place."""
    shape, chunk = scores_NRWC.shape[:-1], _CHUNK_PX.get(scores_NRWC.device.type, 2**15)
    labels_NRW = scores_NRWC.new_empty(shape, dtype=torch.uint8)
    certainty_NRW = scores_NRWC.new_empty(shape)
    pixels = scores_NRWC.view(-1, scores_NRWC.shape[-1]), labels_NRW.view(-1), certainty_NRW.view(-1)
    # In chunks, since what is computed on the way would be as large as the scores.
    for scores_PC, labels_P, certainty_P in zip(*(torch.split(each, chunk) for each in pixels), strict=True):
        top_P, label_P = scores_PC.max(dim=-1)
        labels_P.copy_(label_P)
        if logits:
            # For few classes several times as fast on a CPU as torch's own, and without a copy.
            scores_PC.sub_(top_P.unsqueeze(-1)).exp_()
            top_P = scores_PC.sum(dim=-1).reciprocal_()  # the likeliest class's exp is 1
            scores_PC.mul_(top_P.unsqueeze(-1))
        torch.div(top_P, networks, out=certainty_P)
    return Labels(labels_NRW, certainty_NRW, scores_NRWC)


def entropy(prob_NRWC: Tensor) -> Tensor:
    """Entropy of each pixel's probabilities, divided by its largest value, log C: float32 (N, R, W) in 0..1."""
    entropy_NRW: Tensor = torch.special.entr(prob_NRWC).sum(dim=-1) / math.log(prob_NRWC.shape[-1])
    return entropy_NRW


@torch.inference_mode()
def predict(config: InferenceConfig, network: Segmenter, image_N3HW: Tensor) -> Tensor:
    """Scores of images of any one size, uint8 on the network's device -> float32 (N, C, H, W); the network is in eval mode."""
    found = [*strips(config, network, image_N3HW)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


@torch.inference_mode()
def strips(config: InferenceConfig, network: Segmenter, image_N3HW: Tensor) -> Iterator[Tensor]:
    """Yields the scores of images from top to bottom, in strips as high as windows allow: float32 (N, C, R, W).

    Logits or probabilities, as `sum` says, averaged over windows, scales and flips. Images are resized without
    antialiasing, as training views are, to round(side * scale), not rounded to integers; their scores bilinearly back. What is seen
    at several scales or mirrored is one strip, and so is what passes the network in one piece.
    """
    height, width = image_N3HW.shape[-2:]
    views = [(scale, flip) for scale in config.scales for flip in ((False, True) if config.flip else (False,))]
    if views == [(1.0, False)]:
        yield from _sliding(config, network, image_N3HW)
        return
    total_NCHW: Tensor | None = None
    for scale, mirrored in views:
        scaled = _resized(image_N3HW, (max(1, round(height * scale)), max(1, round(width * scale))))
        scores = torch.cat([*_sliding(config, network, scaled.flip(-1) if mirrored else scaled)], dim=2)
        scores = _resized(scores.flip(-1) if mirrored else scores, (height, width))
        total_NCHW = torch.zeros_like(scores) if total_NCHW is None else total_NCHW
        total_NCHW += scores
    assert total_NCHW is not None
    yield total_NCHW.div_(len(views))


def _resized(x_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    if x_NCHW.shape[-2:] == size:
        return x_NCHW
    return F.interpolate(x_NCHW.float(), size, mode="bilinear", align_corners=False)


def _forward(config: InferenceConfig, network: Segmenter, image_BCHW: Tensor) -> Tensor:
    """Scores of whole images, or of windows: float32 (B, C, H, W), classes last in memory."""
    with autocast(config.autocast, image_BCHW.device):
        coarse = network(image_BCHW)
    # An argmax over classes that lie last in memory is five times as fast on a CPU; upsampling is faster too.
    coarse = coarse.float().contiguous(memory_format=torch.channels_last)
    logits = upsample(coarse, (image_BCHW.shape[-2], image_BCHW.shape[-1]))
    if config.sum == "logits":
        return logits
    return logits.movedim(1, -1).softmax(dim=-1).movedim(-1, 1)


def windows(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows that cover a side of `length` px; the last is flush with the far end."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]


def window_of(config: InferenceConfig, height: int, width: int) -> tuple[int, int] | None:
    """(height, width) of the windows in which an image of this size passes a network; None: in one piece."""
    if config.window_px is None:
        crop = config.crop_px
        return crop if height * width > _CROPS_AT_ONCE * crop[0] * crop[1] else None
    return None if config.window_px == "whole" else config.window_px


def _sliding(config: InferenceConfig, network: Segmenter, image_N3HW: Tensor) -> Iterator[Tensor]:
    """Yields the mean of the scores over the windows that see a pixel, in strips (N, C, R, W), or the scores of the image in one piece."""
    height, width = image_N3HW.shape[-2:]
    window = window_of(config, height, width)
    if window is None:
        yield _forward(config, network, image_N3HW)
        return
    h, w = window
    down, across = config.stride_px or (-(-h * 2 // 3), -(-w * 2 // 3))
    image_N3HW, top, left = _centred(image_N3HW, window, network.mean)
    images, _, tall, wide = image_N3HW.shape
    rows, columns = windows(tall, h, down), windows(wide, w, across)
    # Windows are a grid: how often a pixel is seen is the product of how often its row and its column are.
    seen_H, seen_W = (_times_seen(*side, network.mean.device) for side in ((tall, rows, h), (wide, columns, w)))
    # Row by row, so that what no later window sees is complete, and memory holds a few rows of windows whatever the image's size.
    corners = [(n, y, x) for y in rows for n in range(images) for x in columns]
    sums_NhWC: Tensor | None = None  # of the rows that the present windows see
    for first in range(0, len(corners), config.window_batch):
        chunk = corners[first : first + config.window_batch]
        image_B3hw = torch.stack([image_N3HW[n, :, y : y + h, x : x + w] for n, y, x in chunk])
        scores_BhwC = _forward(config, network, image_B3hw).movedim(1, -1)
        if sums_NhWC is None:
            sums_NhWC = scores_BhwC.new_zeros(images, h, wide, scores_BhwC.shape[-1])
        for number, (n, y, x) in enumerate(chunk, start=first):
            sums_NhWC[n, :, x : x + w] += scores_BhwC[number - first]
            complete = corners[number + 1][1] if number + 1 < len(corners) else tall
            if complete == y:
                continue
            strip_NRWC = sums_NhWC[:, : complete - y] / (seen_H[y:complete, None] * seen_W).unsqueeze(-1)
            # In place: buffers that come and go would leave holes in a heap that keeps what is freed (`tune_cpu`).
            rest = h - (complete - y)
            sums_NhWC[:, :rest] = sums_NhWC[:, complete - y :].clone()
            sums_NhWC[:, rest:] = 0
            # A padded image has one row of windows, hence one strip.
            yield strip_NRWC[:, top : top + height, left : left + width].movedim(-1, 1)
            del strip_NRWC


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


def _times_seen(length: int, firsts: Sequence[int], window: int, device: torch.device) -> Tensor:
    seen = torch.zeros(length, device=device)
    for first in firsts:
        seen[first : first + window] += 1
    return seen
