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
    """One worker's shard of the global batch of one step. RGB, uint8 all the way; the network normalises on its device."""

    labeled_image: Tensor
    """uint8 (L, 3, H, W) in 0..255."""
    labeled_mask: Tensor
    """uint8 (L, H, W): train ids 0..C-1, or IGNORE."""
    unlabeled_image: Tensor | None
    """uint8 (U, 3, H, W); None for `method: supervised`."""
    unlabeled_second: Tensor | None = None
    """uint8 (U, 3, H, W): another view of each, where the method asks for one: the same place after a strong change of
    colour (mean_teacher, fixmatch), or another place (cps with `cutmix_partner: self`)."""

    def map(self, change: Callable[[Tensor], Tensor], *, mask: Callable[[Tensor], Tensor] | None = None) -> Batch:
        """Returns a batch with `change` applied to all images, and `mask` (the same if None) to the masks."""

        def optional(image: Tensor | None) -> Tensor | None:
            return None if image is None else change(image)

        return Batch(
            change(self.labeled_image),
            (mask or change)(self.labeled_mask),
            optional(self.unlabeled_image),
            optional(self.unlabeled_second),
        )


@dataclass(frozen=True, slots=True)
class EvalBatch:
    """Whole images of one size with their masks, for an evaluation."""

    ids: tuple[str, ...]
    image: Tensor
    """uint8 (N, 3, H, W)."""
    mask: Tensor
    """uint8 (N, H, W): train ids 0..C-1, or IGNORE."""
