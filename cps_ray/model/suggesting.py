"""Which images to label next: those that a model is least sure of where it matters, and that differ from each other.

The score of an image is the mean over its pixels of w(y) d: d is 1 where the networks give a pixel different classes and 0 where they
agree (query by committee, Seung, Opper and Sompolinsky, COLT 1992); of a model of one network, d is the entropy of its probabilities,
divided by log C. y is the predicted class, and

    w(c) = r(c) (2 - IoU(c)),    r(c) = 1 / (C f(c)), from 1/4 to 4

with f(c) the fraction of class c in the labelled masks and IoU(c) on the validation split (1/2 where it was not measured): mistakes in
rare and badly learnt classes count more. Of the best tenth of images or so, those are taken that lie farthest from each other and from the
labelled ones (greedy k-center: Sener and Savarese, Active learning for convolutional neural networks: a core-set approach, ICLR 2018):
by the cosine distance of the last features of network a's encoder, averaged over the image. Nothing is drawn at random.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cps_ray.config.train import ENSEMBLE
from cps_ray.datasets.images import decode_image
from cps_ray.datasets.loader import image_batches
from cps_ray.datasets.prepare.checks import MAX_NEAR_BITS
from cps_ray.datasets.shards import Index
from cps_ray.engine.inference import entropy
from cps_ray.model.drafting import Draft
from cps_ray.model.model import Model

# I images, C classes, D features; N images of a batch, R rows of a strip, W pixels.
OnImages = Callable[[int], None]
"""Called with the number of images that are done."""
_BATCH_PX = 2**19
"""Most pixels whose probabilities are in memory at once, if they are of several images."""
_CROPS_AT_ONCE = 8
_LARGEST_WEIGHT = 4.0
"""Largest weight of a rare class; its reciprocal is the smallest of a common one."""
_MORE = 10
"""Images among which each suggested one is chosen at most ..."""
_LEAST_MORE = 2
"""... and at least. Between these bounds a quarter of all candidates: else the score would decide nothing in a small data set."""
_LABELED_COMPARED = 1000
"""Labelled images, spread over all, that suggestions must lie far from."""


@dataclass(frozen=True, slots=True)
class ImageScores:
    """Scores of I images."""

    rows: NDArray[np.int64]
    score: NDArray[np.float64]
    disagreement: NDArray[np.float64] | None
    """Fraction of pixels for which not all networks give the same class; None for a single network."""
    entropy: NDArray[np.float64]
    fraction: NDArray[np.float64]
    """(I, C) of pixels predicted as each class."""


def class_weights(pixels_C: NDArray[np.int64], ious: Sequence[float | None]) -> NDArray[np.float64]:
    """Returns w(c) of labelled masks with so many pixels of each class; see above."""
    fraction_C = pixels_C / max(1, pixels_C.sum())
    rarity_C = 1 / np.maximum(len(pixels_C) * fraction_C, 1e-12)
    iou_C = np.array([0.5 if iou is None else iou for iou in ious])
    return np.asarray(np.clip(rarity_C, 1 / _LARGEST_WEIGHT, _LARGEST_WEIGHT) * (2 - iou_C))


def validation_ious(metrics: Any, classes: Sequence[str]) -> list[float | None]:
    """Returns the IoU of each class on the validation split, from a model's metrics.json. Never on the test split, which chooses nothing."""
    found = metrics if isinstance(metrics, Mapping) else {}
    values = [found.get(f"val/iou/{name}") for name in classes]
    return [float(value) if isinstance(value, int | float) else None for value in values]


@torch.inference_mode()
def score_images(
    model: Model,
    index: Index,
    rows: NDArray[np.int64],
    weights: NDArray[np.float64],
    on_images: OnImages = lambda images: None,
) -> ImageScores:
    """Predicts the images in these rows by all networks, and scores them. No mask is read."""
    names = [*model.description.networks]
    several, num_classes = len(names) > 1, len(model.classes)
    whole = ENSEMBLE if several else names[0]
    weight_C = torch.from_numpy(weights).float().to(model.device)
    place = {index.ids[row]: number for number, row in enumerate(rows.tolist())}
    sums = np.zeros((len(rows), 3))  # of the weighted doubt, of disagreement, of entropy
    counts = np.zeros((len(rows), num_classes), np.int64)
    for batch in image_batches(index, rows, size_px=_BATCH_PX):
        members = [place[image_id] for image_id in batch.ids]
        image, each = batch.image.to(model.device), {}
        for name, found in model.strips(image, all_networks=True):
            each[name] = found.labels
            if name != whole:
                continue
            first_NRW = each[names[0]]
            differ_NRW = torch.zeros_like(first_NRW, dtype=torch.bool)
            for other in names[1:]:
                differ_NRW |= each[other] != first_NRW
            entropy_NRW = entropy(found.prob / len(names) if several else found.prob)
            doubt_NRW = differ_NRW.float() if several else entropy_NRW
            weighted_NRW = doubt_NRW * weight_C[found.labels.long()]
            sums[members] += (
                torch.stack([x.flatten(1).double().sum(1) for x in (weighted_NRW, differ_NRW, entropy_NRW)], 1)
                .cpu()
                .numpy()
            )
            counts[members] += _class_counts(found.labels, num_classes)
            each.clear()
        on_images(len(members))
    area = np.maximum(counts.sum(1), 1)[:, None]
    score, disagreement, mean_entropy = (sums / area).T
    return ImageScores(rows, score, disagreement if several else None, mean_entropy, counts / area)


def _class_counts(labels_NRW: Tensor, num_classes: int) -> NDArray[np.int64]:
    return np.stack([torch.bincount(each.flatten().int(), minlength=num_classes).cpu().numpy() for each in labels_NRW])


def suggest(
    model: Model,
    index: Index,
    scores: ImageScores,
    labeled: NDArray[np.int64],
    count: int,
    on_images: OnImages = lambda images: None,
) -> NDArray[np.int64]:
    """Returns positions in `scores` of at most `count` images to label next, in the order in which they are chosen.

    None looks like another one or like a labelled one: frames of one moment, copies. `labeled`: rows of the labelled images.
    """
    # By the entropy where the networks agree everywhere, then by the order of the index.
    best = np.lexsort((-scores.entropy, -scores.score))
    best = best[~_looks_like(index, scores.rows[best], labeled)]
    best = best[: min(_MORE * count, max(_LEAST_MORE * count, len(scores.rows) // 4))]
    compared = labeled[
        np.unique(np.linspace(0, len(labeled) - 1, min(len(labeled), _LABELED_COMPARED)).round().astype(int))
    ]
    features = _features(model, index, np.concatenate([scores.rows[best], compared]), on_images)
    ours, theirs = features[: len(best)], features[len(best) :]
    distance = 1 - (ours @ theirs.T).max(axis=1, initial=-1.0)
    chosen: list[int] = []
    open_to_choice = np.ones(len(best), np.bool_)
    while len(chosen) < count and open_to_choice.any():
        # The first where many are equally far: the one with the highest score.
        following = int(np.where(open_to_choice, distance, -np.inf).argmax())
        chosen.append(following)
        distance = np.minimum(distance, 1 - ours @ ours[following])
        row = scores.rows[best[following : following + 1]]
        open_to_choice &= ~_looks_like(index, scores.rows[best], row)
        open_to_choice[following] = False
    return best[chosen]


def _looks_like(index: Index, rows: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Returns of each row whether its image looks as one of `others` does."""
    hashes, theirs = index.perceptual_hash[rows], index.perceptual_hash[others]
    near = np.zeros(len(rows), np.bool_)
    for each in theirs:
        near |= np.bitwise_count(hashes ^ each) <= MAX_NEAR_BITS
    return near


@torch.inference_mode()
def _features(model: Model, index: Index, rows: NDArray[np.int64], on_images: OnImages) -> NDArray[np.float64]:
    """Returns the last features of network a's encoder, averaged over each image shrunk or enlarged to a crop, of length 1: (I, D)."""
    segmenter = model.networks("a")["a"]
    seen: list[Tensor] = []
    # A network without an encoder, of a plug-in: its own output.
    encoder = getattr(segmenter.network, "encoder", segmenter.network)
    hook = encoder.register_forward_hook(lambda _module, _images, output: seen.append(_last_map(output)))
    found: dict[str, NDArray[np.float64]] = {}
    try:
        for batch in image_batches(index, np.unique(rows), size_px=_BATCH_PX):
            size = model.description.inference.crop_px
            image = F.interpolate(batch.image.to(model.device).float(), size, mode="bilinear", antialias=True)
            for first in range(0, len(image), _CROPS_AT_ONCE):
                segmenter(image[first : first + _CROPS_AT_ONCE])
                pooled = F.normalize(seen.pop().flatten(2).mean(2).double(), dim=1).cpu().numpy()
                found |= dict(zip(batch.ids[first : first + _CROPS_AT_ONCE], pooled, strict=True))
            on_images(len(batch.ids))
    finally:
        hook.remove()
    return np.stack([found[index.ids[row]] for row in rows])


def _last_map(output: Any) -> Tensor:
    """Returns the last feature map (B, D, h, w) of what an encoder gives, however nested."""
    if isinstance(output, Tensor):
        return output
    maps = [each for each in map(_last_map, (part for part in output if part is not None)) if each.dim() == 4]
    return maps[-1]


def drafts(model: Model, index: Index, rows: NDArray[np.int64]) -> list[Draft]:
    """Returns these images as they are encoded, with the masks that the model predicts."""
    made = []
    for encoded in index.locations.read(rows.tolist(), masks=False):
        made.append(Draft(encoded.id, encoded.image, model.predict(decode_image(encoded.image))))
    return made
