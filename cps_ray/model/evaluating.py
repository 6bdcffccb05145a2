"""How well a model predicts images whose masks are known: counts per image, scores, and which images it fails on."""

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cps_ray.config.train import ENSEMBLE
from cps_ray.datasets.raster import open_raster, turned
from cps_ray.engine.batch import IGNORE, EvalBatch
from cps_ray.engine.evaluation import calibration_sums
from cps_ray.engine.metrics import (
    calibration_error,
    class_accuracy,
    class_counts,
    confusion,
    iou,
    mean_iou,
    micro_iou,
    pixel_accuracy,
)
from cps_ray.errors import DataError
from cps_ray.model.examples import Example
from cps_ray.model.model import Model
from cps_ray.text import first_few

# I images, C classes, G groups of images.
Counts = NDArray[np.int64]


@dataclass(slots=True)
class ModelScores:
    """What a model's predictions count up to, image by image."""

    network: str
    classes: tuple[str, ...]
    ids: list[str] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)
    """(3, C) of each image: pixels of each class that are found, that are true, and that are predicted."""
    matrix: Counts = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    """(C, C): pixels per true class and predicted class."""
    others: dict[str, Counts] = field(default_factory=dict)
    """The same of each network that an ensemble is made of."""
    calibration: torch.Tensor | None = None
    worst: list[tuple[float, Example]] = field(default_factory=list)
    """The images with the lowest mean IoU, the lowest first, with it."""

    def metrics(self) -> dict[str, Any]:
        """Returns mIoU, IoU, precision and recall per class, accuracies and calibration error, all in 0..1; None where nothing was counted."""
        matrix_CC = torch.from_numpy(self.matrix)
        hit, true, predicted = (each.double() for each in (matrix_CC.diagonal(), matrix_CC.sum(1), matrix_CC.sum(0)))
        per_class = {
            "iou": iou(matrix_CC),
            "recall": hit / true,
            "precision": hit / predicted,
            "fraction": true / true.sum(),
        }
        return {
            "miou": _or_none(mean_iou(matrix_CC)),
            "iou_micro": _or_none(micro_iou(matrix_CC)),
            "pixel_accuracy": _or_none(pixel_accuracy(matrix_CC)),
            "class_accuracy": _or_none(class_accuracy(matrix_CC)),
            "ece": None if self.calibration is None else _or_none(calibration_error(self.calibration)),
            "classes": {
                name: {key: _or_none(float(values[n])) for key, values in per_class.items()}
                for n, name in enumerate(self.classes)
            },
        }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def image_ious(counts_I3C: NDArray[Any]) -> NDArray[np.float64]:
    """Returns the mean IoU, as `metrics.mean_iou` does, of (..., 3, C) found, true and predicted pixels; nan where nothing was counted."""
    hit, true, predicted = np.moveaxis(counts_I3C.astype(np.float64), -2, 0)
    union = true + predicted - hit
    total = np.divide(hit, union, out=np.zeros_like(hit), where=union > 0).sum(-1)
    number = (union > 0).sum(-1)
    return np.asarray(np.divide(total, number, out=np.full(np.shape(number), np.nan), where=number > 0))


@torch.inference_mode()
def evaluate_model(model: Model, batches: Iterable[EvalBatch], num_worst: int = 0) -> ModelScores:
    """Predicts every image and counts its pixels; keeps the `num_worst` images with the lowest mean IoU. Raises DataError for masks of more classes."""
    num_classes, whole = len(model.classes), model.network == ENSEMBLE
    scores = ModelScores(model.network, model.classes, matrix=np.zeros((num_classes, num_classes), np.int64))
    worst: list[tuple[float, int, Example]] = []
    for batch in batches:
        image, target_NHW = batch.image.to(model.device), batch.mask.to(model.device)
        matrices = np.zeros((len(batch.ids), num_classes, num_classes), np.int64)
        labels, first_row = [], 0
        for name, found in model.strips(image, all_networks=whole):
            rows = found.labels.shape[1]
            target_NRW = target_NHW[:, first_row : first_row + rows]
            matrices_NCC = confusion(found.labels, target_NRW, num_classes).cpu().numpy()
            if name != model.network:
                scores.others[name] = scores.others.get(name, 0) + matrices_NCC.sum(0)
                continue
            matrices += matrices_NCC
            sums = calibration_sums(found, target_NRW).cpu()
            scores.calibration = sums if scores.calibration is None else scores.calibration + sums
            labels.append(found.labels.cpu().numpy())
            first_row += rows
        scores.matrix += matrices.sum(0)
        counts_N3C = class_counts(torch.from_numpy(matrices)).numpy()
        for number, (image_id, counts) in enumerate(zip(batch.ids, counts_N3C, strict=True)):
            scores.ids.append(image_id)
            scores.counts.append(counts)
            value = float(image_ious(counts))
            # A heap with the best of the worst on top, which gives way to a worse one.
            if num_worst and not math.isnan(value) and (len(worst) < num_worst or -value > worst[0][0]):
                pixels = np.ascontiguousarray(batch.image[number].permute(1, 2, 0).numpy())
                predicted = np.concatenate([each[number] for each in labels])
                example = (image_id, pixels, batch.mask[number].numpy(), predicted)
                push = heapq.heappush if len(worst) < num_worst else heapq.heapreplace
                push(worst, (-value, len(scores.ids), example))
    scores.worst = [(-value, example) for value, _, example in sorted(worst, reverse=True)]
    return scores


def file_batches(model: Model, pairs: Sequence[tuple[str, Path, Path]], threads: int = 2) -> Iterator[EvalBatch]:
    """Yields (id, image, mask) files one by one: images as the model reads them, masks of one channel with train ids or IGNORE.

    Raises DataError, which names the file, for masks of another size or with other values.
    """

    def read(pair: tuple[str, Path, Path]) -> EvalBatch:
        image_id, image_path, mask_path = pair
        pixels = torch.from_numpy(np.array(model.to_rgb(image_path)))
        mask = torch.from_numpy(read_labels(mask_path, model))
        if mask.shape != pixels.shape[:2]:
            sizes = (f"{size[1]}x{size[0]}" for size in (mask.shape, pixels.shape))
            raise DataError(
                f"{mask_path}: a mask must be as large as its image, but is {next(sizes)} px for {next(sizes)} px."
            )
        return EvalBatch((image_id,), pixels.permute(2, 0, 1)[None], mask[None])

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        pending = []
        for pair in pairs:
            pending.append(pool.submit(read, pair))
            if len(pending) > 2 * threads:  # no more in memory
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()


def read_labels(path: Path, model: Model) -> NDArray[np.uint8]:
    """Returns a mask file of train ids, as `cps-ray predict` writes them, upright: uint8 (H, W). Raises DataError for any other."""
    try:
        raster = open_raster(path.read_bytes(), path.name)
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror or err}.") from err
    except DataError as err:
        raise DataError(f"{path}: {err}") from err
    values, count = np.asarray(raster.samples), len(model.classes)
    found = np.unique(values) if values.shape[2] == 1 and values.dtype.kind == "u" and not raster.lossy else None
    wrong = [] if found is None else [f"also {value}" for value in found if value >= count and value != IGNORE]
    if found is not None and raster.palette is not None and not wrong:
        # Labels of another order have the same numbers, but the colours of other classes.
        class_of = {color: name for name, color in zip(model.classes, model.palette, strict=True)}
        colors = {int(value): tuple(raster.palette[value].tolist()) for value in found if value < count}
        wrong = [
            f"{model.classes[value]} in the colour of {class_of[color]}"
            for value, color in colors.items()
            if class_of.get(color, model.classes[value]) != model.classes[value] and model.palette[value] != color
        ]
    if found is None or wrong:
        raise DataError(
            f"{path}: a mask must hold positions of the model's {count} classes, 0 to {count - 1}, or {IGNORE}, "
            f"but holds {first_few(wrong) or raster.words}. `cps-ray prepare` reads masks of all kinds into shards."
        )
    return np.array(turned(values[..., 0], raster.orientation), np.uint8)


def pair_files(images: Mapping[str, Path], masks: Mapping[str, Path]) -> list[tuple[str, Path, Path]]:
    """Returns (id, image, mask) of files by their ids. Raises DataError for a mask without an image, or if nothing fits."""
    alone = [name for name in masks if name not in images]
    if alone or not masks:
        names = f"{len(alone)} have none: {first_few(sorted(alone))}" if alone else "there are no masks"
        raise DataError(f"every mask must have an image of the same name, but {names}.")
    return [(name, images[name], masks[name]) for name in sorted(masks)]


def paired_difference(
    ours: Sequence[Counts],
    theirs: Sequence[Counts],
    groups: Sequence[str] | None = None,
    *,
    draws: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns how much better `ours` predicts the same images than `theirs`, in mIoU, with a 95 % interval.

    Counts per image (3, C), in the same order. A paired bootstrap over images (Efron and Tibshirani 1993, ch. 8): both models are scored on
    the same images, drawn with replacement, and the interval is that of the 2.5th to the 97.5th percentile of the differences. `groups`: of
    each image; a group is drawn as a whole. No interval (None) with fewer than two groups.
    """
    both = np.stack([np.stack(ours), np.stack(theirs)], axis=1)  # (I, 2, 3, C)
    per_image = image_ious(both)
    gain_of = per_image[:, 0] - per_image[:, 1]
    if groups is not None:
        _, number = np.unique(np.asarray(groups), return_inverse=True)
        summed = np.zeros((number.max() + 1, *both.shape[1:]), np.int64)
        np.add.at(summed, number, both)
        both = summed
    flat = both.reshape(len(both), -1).astype(np.float64)
    total = image_ious(both.sum(0))
    found: dict[str, Any] = {
        "gain": float(total[0] - total[1]),
        "low": None,
        "high": None,
        "better": int((gain_of > 0).sum()),
        "worse": int((gain_of < 0).sum()),
        "images": len(gain_of),
        "groups": len(both),
    }
    if len(both) > 1:
        rng, differences = np.random.default_rng(seed), []
        for first in range(0, draws, 500):
            times = rng.multinomial(len(both), np.full(len(both), 1 / len(both)), size=min(500, draws - first))
            drawn = image_ious((times @ flat).reshape(len(times), *both.shape[1:]))
            differences.append(drawn[:, 0] - drawn[:, 1])
        found["low"], found["high"] = (float(each) for each in np.percentile(np.concatenate(differences), [2.5, 97.5]))
    return found


def difference_in_words(found: Mapping[str, Any]) -> str:
    """Returns a line such as `better by 1.2 points of mIoU (95 % interval 0.4 to 2.0; better on 61 of 80 images)`."""
    points = 100 * found["gain"]
    images = f"better on {found['better']}, worse on {found['worse']} of {found['images']} images"
    if found["low"] is None:
        return f"{points:+.1f} points of mIoU; {images}; one image, or one group, gives no interval"
    low, high = 100 * found["low"], 100 * found["high"]
    interval = f"(95 % interval {low:+.1f} to {high:+.1f}; {images})"
    if low > 0 or high < 0:
        return f"{'better' if low > 0 else 'worse'} by {abs(points):.1f} points of mIoU {interval}"
    return f"not distinguishable: {points:+.1f} points of mIoU {interval}"
