"""The contract between whoever makes batches and the engine: fields, dtypes, ranges. Imports nothing at run time.

Data preparation needs IGNORE and no torch, so tensors are named here for the type checker alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = 255
"""Mask value of pixels that count in no loss and in no metric."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One worker's shard of the global batch of one step. RGB, uint8 all the way; the network normalises on its device.

    A box is where a crop shows its image: int32 (N, 4), the first and the last row + 1, the first and the last column + 1, in px. The
    rest of the crop is padding. None: there is none.
    """

    labeled_image: Tensor
    """uint8 (L, 3, H, W) in 0..255."""
    labeled_mask: Tensor
    """uint8 (L, H, W): train ids 0..C-1, or IGNORE."""
    unlabeled_image: Tensor | None
    """uint8 (U, 3, H, W); None for `method: supervised`."""
    unlabeled_second: Tensor | None = None
    """uint8 (U, 3, H, W): another view of each, if `TrainConfig.unlabeled_views` asks for one: the same place after a strong change
    of colour, or another place."""
    unlabeled_third: Tensor | None = None
    """uint8 (U, 3, H, W): the same place after another strong change of colour."""
    labeled_box: Tensor | None = None
    unlabeled_box: Tensor | None = None
    """Box of `unlabeled_image`, and of every view of the same place."""
    second_box: Tensor | None = None
    """Box of `unlabeled_second`, where that is another place."""

    def map(self, change: Callable[[Tensor], Tensor], *, other: Callable[[Tensor], Tensor] | None = None) -> Batch:
        """Returns a batch with `change` applied to all images, and `other` (the same if None) to masks and boxes."""
        other = other or change

        def apply(to: Callable[[Tensor], Tensor], tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else to(tensor)

        return Batch(
            change(self.labeled_image),
            other(self.labeled_mask),
            apply(change, self.unlabeled_image),
            apply(change, self.unlabeled_second),
            apply(change, self.unlabeled_third),
            apply(other, self.labeled_box),
            apply(other, self.unlabeled_box),
            apply(other, self.second_box),
        )


@dataclass(frozen=True, slots=True)
class EvalBatch:
    """Whole images of one size with their masks, for an evaluation."""

    ids: tuple[str, ...]
    image: Tensor
    """uint8 (N, 3, H, W)."""
    mask: Tensor
    """uint8 (N, H, W): train ids 0..C-1, or IGNORE."""
