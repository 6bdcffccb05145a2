"""The contract between whoever makes batches and the engine: fields, dtypes, ranges. Imports torch only."""

from dataclasses import dataclass

from torch import Tensor

IGNORE = 255
"""Mask value of pixels that count in no loss and in no metric."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One worker's share of one optimizer step. RGB, uint8 all the way; the network normalises on its device."""

    labeled_image: Tensor
    """uint8 (L, 3, H, W) in 0..255."""
    labeled_mask: Tensor
    """uint8 (L, H, W): train ids 0..C-1, or IGNORE."""
    unlabeled_image: Tensor | None
    """uint8 (U, 3, H, W); None for `method: supervised`."""
    unlabeled_second: Tensor | None = None
    """uint8 (U, 3, H, W): another view of each, where the method asks for one: the same place after a strong change of
    colour (mean_teacher, fixmatch), or another place (cps with `cutmix_partner: self`)."""


@dataclass(frozen=True, slots=True)
class EvalBatch:
    """Whole images of one size with their masks, for an evaluation."""

    ids: tuple[str, ...]
    image: Tensor
    """uint8 (N, 3, H, W)."""
    mask: Tensor
    """uint8 (N, H, W): train ids 0..C-1, or IGNORE."""
