"""A model's confident labels as masks of its unlabelled images: self-training by shards, as pseudo labels that are computed once.

A pixel of an unlabelled training image gets the class that the model predicts where the class's probability reaches the threshold of that
class, and IGNORE elsewhere. Thresholds are one number, numbers by class, or, class by class, what keeps a fraction of the pixels that
are predicted as it, the most certain ones, so that rare classes are kept, too (CBST: Zou, Yu, Kumar and Wang, ECCV 2018).
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cps_ray.datasets.images import ValueRange, decode_mask, encode_mask
from cps_ray.datasets.lists import write_list
from cps_ray.datasets.loader import image_batches
from cps_ray.datasets.prepare.assembly import DataSetPlan, write_shards
from cps_ray.datasets.prepare.items import Item, MaskFile, Source
from cps_ray.datasets.prepare.masks import count_bytes
from cps_ray.datasets.shards import Index, Manifest, Shards, sha256
from cps_ray.datasets.subsets import LABELED_LIST, subset_folder
from cps_ray.engine.batch import IGNORE
from cps_ray.model.data import new_folder
from cps_ray.model.model import Model

# C classes, N images of a batch, R rows of a strip, W pixels.
TRUE_SUBSET = "true-masks"
"""Name of the labelled subset of those training images whose masks people made."""
_OWN_MASK = ""
"""Path of the mask of an image that keeps the one in the shards."""
_BINS = 1000
"""Bins of certainty of which thresholds are made that keep a fraction."""
_BATCH_PX = 2**20
OnImages = Callable[[int], None]
"""Called with the number of images that are done."""


@dataclass(slots=True)
class KeptPixels:
    """Pixels of pseudo labels, by predicted class: int64 (C,) each."""

    predicted: NDArray[np.int64]
    kept: NDArray[np.int64]
    checked: NDArray[np.int64]
    """Kept pixels whose true class is known from a mask that the model has not seen."""
    right: NDArray[np.int64]
    """Those of them that are right."""


@torch.inference_mode()
def keeping_thresholds(
    model: Model, index: Index, rows: NDArray[np.int64], fraction: float, on_images: OnImages = lambda images: None
) -> NDArray[np.float64]:
    """Returns for each class the certainty that `fraction` of the pixels reach that are predicted as it in these images, in thousandths."""
    num_classes = len(model.classes)
    counts = np.zeros((num_classes, _BINS), np.int64)
    for batch in image_batches(index, rows, size_px=_BATCH_PX):
        for _, found in model.strips(batch.image.to(model.device)):
            bins = (found.certainty * _BINS).long().clamp_(max=_BINS - 1)
            both = torch.bincount((found.labels.long() * _BINS + bins).flatten(), minlength=num_classes * _BINS)
            counts += both.view(num_classes, _BINS).cpu().numpy()
        on_images(len(batch.ids))
    # From the most certain bin down, until enough are kept.
    reached = counts[:, ::-1].cumsum(1) >= fraction * counts.sum(1, keepdims=True)
    return np.asarray((_BINS - 1 - reached.argmax(1)) / _BINS)


def write_pseudo_labels(
    out: Path,
    model: Model,
    shards: Shards,
    labeled: NDArray[np.int64],
    thresholds: NDArray[np.float64],
    *,
    rule: str,
    on_images: OnImages = lambda images: None,
) -> tuple[Manifest, KeptPixels]:
    """Writes shards `out`: images and other splits as they are; of the training images, the `labeled` rows keep their masks, and the others
    get pseudo labels, or stay without a mask where no pixel is certain enough.

    The `rule` of the thresholds, in words, goes into the manifest. TRUE_SUBSET beside the shards lists the labelled images. `out`
    appears whole or not at all.
    """
    index = shards.index("train")
    unlabeled = np.setdiff1d(np.arange(len(index)), labeled)
    with new_folder(out) as folder:
        # Below the folder that is removed whatever happens, so that a kill leaves nothing that looks finished.
        masks = folder / "masks"
        masks.mkdir()
        files, kept = _predict(model, index, unlabeled, thresholds, masks, on_images)
        percentages = (f"{name} {percentage(kept.kept[n], kept.predicted[n])}" for n, name in enumerate(model.classes))
        notes = [
            f"pseudo labels: {len(files)} training masks are predicted by network {model.network} of model "
            f"{model.folder.resolve().name} (weights {_weights_checksum(model)}), not made by people, kept where {rule}",
            f"pseudo labels: pixels kept of those predicted as each class: {', '.join(percentages)}",
            f"pseudo labels: masks made by people are those of the labelled subset {TRUE_SUBSET!r}",
        ]
        indexes = {split: shards.index(split) for split in shards.manifest.splits}
        make_item = FromShards(
            str(shards.folder),
            shards.manifest.bands,
            shards.manifest.value_range,
            indexes,
            {image_id: (split, row) for split, each in indexes.items() for row, image_id in enumerate(each.ids)},
        )
        true = {index.ids[row] for row in labeled.tolist()}
        splits = {
            split: [_source(each, row, split != "train" or each.ids[row] in true, files) for row in range(len(each))]
            for split, each in indexes.items()
        }
        made_by = f"{shards.manifest.made_by.format}; pseudo labels"
        plan = DataSetPlan(
            splits,
            make_item,
            shards.classes,
            shards.manifest.palette,
            made_by,
            notes=(*shards.manifest.notes, *notes),
            tiles=shards.manifest.tiles,
        )
        written = folder / "shards"
        manifest = write_shards(written, plan)
        write_list(subset_folder(written, TRUE_SUBSET) / LABELED_LIST, [index.ids[row] for row in labeled.tolist()])
        shutil.rmtree(masks)
        for path in written.iterdir():
            path.rename(folder / path.name)
        written.rmdir()
    return manifest, kept


@dataclass(frozen=True)
class FromShards:
    """Makes items from shards: images as they are, and masks as they are, from a file, or none."""

    folder: str
    bands: tuple[int, ...] | None
    value_range: ValueRange | None
    indexes: Mapping[str, Index] = field(repr=False)
    place: Mapping[str, tuple[str, int]] = field(repr=False)
    """Id -> split and row."""

    def __call__(self, source: Source) -> Item:
        split, row = self.place[source.id]
        index, mask_file = self.indexes[split], source.mask
        (encoded,) = index.locations.read([row], masks=mask_file == _OWN_MASK)
        mask, pixels, checksum = encoded.mask, index.pixels[row], index.train_ids_sha256[row].tobytes()
        if mask_file:  # of pseudo labels
            mask = Path(mask_file).read_bytes()
            train_ids = decode_mask(mask)
            pixels, checksum = count_bytes(train_ids)[: index.pixels.shape[1]], sha256(train_ids)
        return Item(
            source.id,
            encoded.image,
            mask,
            (int(index.height[row]), int(index.width[row])),
            pixels if mask is not None else np.zeros_like(index.pixels[row]),
            int(index.perceptual_hash[row]),
            index.pixels_sha256[row].tobytes(),
            None if mask is None else checksum,
        )


def _source(index: Index, row: int, keeps_mask: bool, files: Mapping[str, str]) -> Source:
    image_id = index.ids[row]
    file = _OWN_MASK if keeps_mask and index.labeled[row] else files.get(image_id)
    masks = () if file is None else (MaskFile(file),)
    return Source(image_id, masks=masks, num_bytes=int(index.locations.image[row, 1] + index.locations.mask[row, 1]))


@torch.inference_mode()
def _predict(
    model: Model,
    index: Index,
    rows: NDArray[np.int64],
    thresholds: NDArray[np.float64],
    folder: Path,
    on_images: OnImages,
) -> tuple[dict[str, str], KeptPixels]:
    """Writes the pseudo labels of these images into a folder; returns id -> file of those with any, and counts of pixels."""
    num_classes = len(model.classes)
    threshold_C = torch.from_numpy(thresholds).float().to(model.device)
    sums, files = np.zeros((4, num_classes), np.int64), dict[str, str]()
    # Masks that the model has not seen tell how good its labels are; they go nowhere else.
    for batch in image_batches(index, rows, masks=True, size_px=_BATCH_PX):
        parts, first_row = [], 0
        for _, found in model.strips(batch.image.to(model.device)):
            target_NRW = batch.mask[:, first_row : first_row + found.labels.shape[1]].to(model.device)
            sure_NRW = found.certainty >= threshold_C[found.labels.long()]
            checked_NRW = sure_NRW & (target_NRW != IGNORE)
            right_NRW = checked_NRW & (target_NRW == found.labels)
            chosen = (torch.ones_like(sure_NRW), sure_NRW, checked_NRW, right_NRW)
            sums += np.stack([_class_counts(found.labels[each], num_classes) for each in chosen])
            parts.append(torch.where(sure_NRW, found.labels, IGNORE).cpu())
            first_row += found.labels.shape[1]
        for image_id, mask in zip(batch.ids, torch.cat(parts, 1).numpy(), strict=True):
            if (mask != IGNORE).any():
                file = folder / f"{len(files)}.png"
                file.write_bytes(encode_mask(mask))
                files[image_id] = str(file)
        on_images(len(batch.ids))
    return files, KeptPixels(*sums)


def _class_counts(labels: Tensor, num_classes: int) -> NDArray[np.int64]:
    return np.asarray(torch.bincount(labels.int(), minlength=num_classes).cpu().numpy())


def _weights_checksum(model: Model) -> str:
    """Returns the first digits of the SHA-256 of the weights that predict."""
    digest = hashlib.sha256()
    for name in model.networks():
        with (model.folder / model.description.networks[name].file).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def percentage(part: int, whole: int) -> str:
    """Returns a fraction as `12.3 %`, or `-` of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"
