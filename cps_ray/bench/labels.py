"""Controls of `bench methods`: what networks learn from in place of each other's pseudo labels.

CPS passes every pseudo label through `Ranks.exchange`. The classes here answer there with other labels, so that all else of a
step (batch, mixing, loss, weight) is that of CPS.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cps_ray.config.train import TrainConfig
from cps_ray.datasets.augment import TrainView
from cps_ray.datasets.images import decode_image, decode_mask
from cps_ray.datasets.loader import TrainData
from cps_ray.datasets.order import UNLABELED, image_at, positions
from cps_ray.engine.batch import Batch
from cps_ray.engine.ranks import Ranks


@dataclass(frozen=True, slots=True)
class ShuffledLabels(Ranks):
    """Gives every unlabelled image the pseudo labels of the image before it in its micro-batch, and the first one those of the last."""

    def exchange(self, own: list[Tensor]) -> list[Tensor]:
        """Returns the labels (U, H, W) of each network, one image further."""
        return [labels_UHW.roll(1, dims=0) for labels_UHW in own]


@dataclass(frozen=True, slots=True)
class TrueMasks(Ranks):
    """Gives every unlabelled image its true mask, as `with_true_masks` sets it out."""

    masks: deque[Tensor] = field(default_factory=deque)
    """uint8 (H, W) each: those of the unlabelled images of this step, in their order, that have not been asked for yet."""

    def exchange(self, own: list[Tensor]) -> list[Tensor]:
        """Returns the masks (U, H, W) in place of the labels of each network."""
        mask_UHW = torch.stack([self.masks.popleft() for _ in own[0]]).to(own[0].device)
        return [mask_UHW] * len(own)


def with_true_masks(
    batches: Iterable[Batch], ranks: TrueMasks, data: TrainData, config: TrainConfig
) -> Iterator[Batch]:
    """Yields the same batches, all of a step from step 0 on, and sets out the masks of each one's unlabelled images in `ranks`.

    Every unlabelled image must have a mask.
    """
    locations, (height, width), seed = data.unlabeled, config.data.crop_px, config.seed
    view = TrainView(config.augment, config.data.crop_px)
    for step, batch in enumerate(batches):
        assert batch.unlabeled_image is not None
        # None was asked for in a step before `cps.start`.
        assert len(ranks.masks) in (0, len(batch.unlabeled_image)), (
            "the networks asked for the masks of some images only"
        )
        ranks.masks.clear()
        for position, image_3HW in zip(
            positions(step, config.data.unlabeled_batch, 0, 1), batch.unlabeled_image, strict=True
        ):
            (encoded,) = locations.read([image_at(position, len(locations), seed, UNLABELED)])
            assert encoded.mask is not None
            crop_3HW, mask_HW = torch.empty_like(image_3HW), torch.empty((height, width), dtype=torch.uint8)
            # A view is a function of its seed: this is the loader's crop once more, this time with its mask.
            whole, mask = decode_image(encoded.image), decode_mask(encoded.mask)
            view(whole, mask, (seed, UNLABELED, position), view=crop_3HW.numpy(), label=mask_HW.numpy())
            assert torch.equal(crop_3HW, image_3HW), f"step {step}: the mask would be that of another crop"
            ranks.masks.append(mask_HW)
        yield batch
