"""Pseudo labels: made, sure enough or not, mixed with their images, measured."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cps_ray.config.train import MethodConfig, MixConfig, PseudoLabelConfig
from cps_ray.engine.batch import IGNORE, Batch
from cps_ray.engine.dense import certainty, confidence_by_class, hard_labels
from cps_ray.engine.mixing import classmix_masks, cutmix_masks, paste
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.selection import surest
from cps_ray.engine.state import TrainState

# L labelled images, U unlabelled images; C classes, H W pixels, h w cells of coarse logits. A tensor's name ends in its dims.

Seen = tuple[Tensor, list[Tensor], Tensor]
"""A view (U, 3, H, W), its labels by each network, uint8 (U, H, W), and where it is padding, bool (U, H, W)."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The part of a worker's batch that passes the networks at once, and what its losses need to know of the whole."""

    batch: Batch
    index: int
    """Number of the micro-batch in its step."""
    valid_pixels: Tensor
    """Labelled pixels of the global batch, divided by the number of micro-batches in it: scalar."""
    observe: bool
    """Whether pseudo labels are to be measured in this step."""
    measured: dict[str, Tensor] = field(default_factory=dict)
    """Sums over pixels, float64: `labels` (256, 256), by the labels of networks a and b, or (256,) of one network;
    `confidence` (2, C), summed probability and number by likeliest class, of all networks."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the crops in px."""
        return self.batch.labeled_mask.shape[-2], self.batch.labeled_mask.shape[-1]


def pseudo_labels(micro: MicroBatch, coarse_BChw: Tensor, padding_BHW: Tensor, confidence: float = 0.0) -> Tensor:
    """Hard labels: uint8 (B, H, W), IGNORE where the probability is below `confidence`. Bytes, so they carry no gradient."""
    if micro.observe:
        sums = confidence_by_class(coarse_BChw, ~padding_BHW)
        micro.measured["confidence"] = micro.measured.get("confidence", 0.0) + sums
    return hard_labels(coarse_BChw, micro.size, confidence)


def sure_labels(
    settings: PseudoLabelConfig, ranks: Ranks, micro: MicroBatch, coarse_BChw: Tensor, padding_BHW: Tensor
) -> Tensor:
    """Hard labels: uint8 (B, H, W), IGNORE where they are not sure enough for `confidence` or for `class_fraction`."""
    labels = pseudo_labels(micro, coarse_BChw, padding_BHW, settings.confidence)
    if settings.class_fraction == 1.0:
        return labels
    counted = counted_pixels(settings, padding_BHW)  # not `~padding_BHW`, which is known in some steps only
    probability = certainty(coarse_BChw, micro.size)
    sure = surest(labels, probability, counted, settings.class_fraction, coarse_BChw.shape[1], ranks)
    return labels.masked_fill_(~sure, IGNORE)


def count_labels(micro: MicroBatch, labels: Sequence[Tensor], padding_BHW: Tensor) -> None:
    """Records how many pixels have each label, or each pair of labels of networks a and b, padding left out."""
    if micro.observe:
        cells, shape = labels[0].flatten().long(), [256]
        if len(labels) > 1:
            cells, shape = cells * 256 + labels[1].flatten(), [256, 256]
        # Not bincount, which waits for a GPU.
        counts = torch.zeros(256 ** len(shape), dtype=torch.float64, device=cells.device)
        counts.scatter_add_(0, cells, (~padding_BHW).flatten().double())
        micro.measured["labels"] = counts.view(shape)


def paddings(settings: MethodConfig, micro: MicroBatch, everywhere: bool = False) -> tuple[Tensor, Tensor]:
    """Where the unlabelled views, and with `everywhere` the labelled ones, are padding: bool (U, H, W) and (L, H, W), else (0, H, W).

    All false where neither the loss nor the telemetry asks.
    """
    batch = micro.batch
    assert batch.unlabeled_image is not None
    labeled = batch.labeled_image if everywhere else batch.labeled_image[:0]
    return (
        padding_of_view(settings, micro, batch.unlabeled_image, batch.unlabeled_box),
        padding_of_view(settings, micro, labeled, batch.labeled_box),
    )


def padding_of_view(settings: MethodConfig, micro: MicroBatch, image_B3HW: Tensor, box_B4: Tensor | None) -> Tensor:
    """Where a view is padding, outside its box: bool (B, H, W). All false where neither the loss nor the telemetry asks."""
    height, width = micro.size
    if box_B4 is None or not len(image_B3HW) or not (micro.observe or settings.padding == "ignore"):
        return torch.zeros(len(image_B3HW), height, width, dtype=torch.bool, device=image_B3HW.device)
    top, bottom, left, right = (edge.view(-1, 1, 1) for edge in box_B4.unbind(dim=1))
    row_H1 = torch.arange(height, device=box_B4.device).view(-1, 1)
    column_W = torch.arange(width, device=box_B4.device)
    return (row_H1 < top) | (row_H1 >= bottom) | (column_W < left) | (column_W >= right)


def counted_pixels(settings: MethodConfig, padding_BHW: Tensor) -> Tensor:
    """Where the loss is taken: bool (B, H, W)."""
    return ~padding_BHW if settings.padding == "ignore" else torch.ones_like(padding_BHW)


def without_padding(settings: MethodConfig, labels: Sequence[Tensor], padding_BHW: Tensor) -> list[Tensor]:
    """Labels (B, H, W) each, with IGNORE in the padding if it is not to count."""
    if settings.padding == "count":
        return list(labels)
    return [label.masked_fill(padding_BHW, IGNORE) for label in labels]


def mean_over_pixels(settings: MethodConfig, state: TrainState, padding_BHW: Tensor) -> Tensor | float:
    """One over the pixels of a batch shard's micro-batch, or over those that are no padding: their mean over the batch shards.

    An unsure (IGNORE) pixel counts as zero loss, as in FixMatch. So the divisor is the same on every rank, and the loss does not depend
    on the number of workers.
    """
    if settings.padding == "count":
        return 1.0 / padding_BHW.numel()
    counted = state.ranks.sum_over_shards((~padding_BHW).sum())
    return state.ranks.num_batch_shards / counted.clamp(min=1)


def with_labels(image_U3HW: Tensor, labels_UHW: Sequence[Tensor], padding_UHW: Tensor) -> Tensor:
    """Images, their padding and their labels as one tensor, uint8 (U, 4 + n, H, W): mixed alike, and exchanged at once."""
    planes = [padding_UHW.to(torch.uint8), *labels_UHW]
    return torch.cat([image_U3HW, *(plane.unsqueeze(1) for plane in planes)], dim=1)


def mixed_views(
    settings: MixConfig,
    seed: int,
    state: TrainState,
    micro: MicroBatch,
    views: Sequence[Tensor],
    labels: list[Tensor],
    padding_UHW: Tensor,
    pasted: Sequence[Tensor] | None = None,
) -> list[Seen]:
    """Mixes each of several views of the same place anew, as `mix` says, with the same view of the next image. `pasted`: the labels of
    what is pasted, if they are others."""
    if settings.mix == "none":
        return [(view, labels, padding_UHW) for view in views]
    seen = []
    for number, view in enumerate(views):
        partner = None if pasted is None else state.ranks.roll(with_labels(view, pasted, padding_UHW))
        own = with_labels(view, labels, padding_UHW)
        seen.append(mix_with_labels(settings, seed, state, micro, own, partner, view=number))
    return seen


def mix_with_labels(
    settings: MixConfig,
    seed: int,
    state: TrainState,
    micro: MicroBatch,
    own: Tensor,
    partner: Tensor | None = None,
    *,
    view: int = 0,
) -> Seen:
    """Mixes images with labels as `_with_labels` makes them, and takes them apart again: images, labels, padding.

    The partner is the next image of the global batch if none is given. Masks are drawn anew for each `view`.
    """
    ranks, (images, _, height, width) = state.ranks, own.shape
    # Masks and successors are those of the images of all batch shards' micro-batch `index`, in order: so they do not depend
    # on the number of workers, and one exchange of a single image gives every rank its last successor.
    first = (micro.index * ranks.num_batch_shards + ranks.batch_shard) * images
    positions = range(first, first + images)
    if partner is None:
        partner = ranks.roll(own)
    if settings.mix == "classmix":
        # All networks see one mixed image, so one network's labels decide what is pasted: a's for one image, b's for the next.
        labels = partner[:, 4:]
        deciding = torch.tensor([at % labels.shape[1] for at in positions], device=own.device)
        label_UHW = labels.gather(1, deciding.view(-1, 1, 1, 1).expand(-1, 1, height, width))[:, 0]
        masks = classmix_masks(label_UHW, seed, state.step, positions, view)
    else:
        masks = cutmix_masks(settings, seed, state.step, positions, height, width, view)
        masks = masks.to(own.device, non_blocking=True)
    mixed = paste(masks, own, partner)
    return mixed[:, :3], list(mixed[:, 4:].unbind(dim=1)), mixed[:, 3].bool()
