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
from cps_ray.model.intervals import Counts, image_ious
from cps_ray.model.model import Model
from cps_ray.text import first_few


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
