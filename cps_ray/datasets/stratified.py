"""Draws of images in which every class is seen as early as can be, and then about as often as in all images."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_CANDIDATES = 16
"""Random images of which `next_pick` takes the best."""
_RARE_CANDIDATES = 4
"""The same, of images that show the rarest class. Few, so that another seed draws another image of those that show most classes."""


def next_pick(
    remaining: Sequence[int],
    counts: NDArray[np.float64],
    sizes: NDArray[np.float64],
    shown: NDArray[np.float64],
    size: float,
    fraction: NDArray[np.float64],
) -> int:
    """Returns the position in `remaining` of what a draw takes next; `remaining` (indices of groups of images) is in random order.

    `counts` (N, C): images of each group that show each class; `sizes` (N,): images of each group; `shown` (C,) and `size`: the
    same of what has been drawn; `fraction` (C,): fraction of all images that show a class. While the draw lacks classes, it takes a
    group that shows the rarest of them, and of four such the one that shows most of them. Then it takes the one of 16 that
    brings the fraction of images per class nearest to the whole set's; rare classes weigh as much as common ones.
    """
    missing = (shown == 0) & (fraction > 0)
    if missing.any():
        shows = counts[remaining] > 0
        missing &= shows.any(axis=0)
    if missing.any():
        rarest = missing & (fraction == fraction[missing].min())
        positions = np.flatnonzero(shows[:, rarest].any(axis=1))[:_RARE_CANDIDATES]
        return int(positions[np.argmax(shows[positions][:, missing].sum(axis=1))])
    # The order is random already, so the head of the list is a random sample.
    candidates = list(remaining[:_CANDIDATES])
    weight = np.divide(1.0, fraction, out=np.zeros_like(fraction), where=fraction > 0)
    # Images that would show each class, minus those expected. Squared over the expected number and summed, this is the
    # chi-squared statistic, up to a factor that is the same for all candidates of one size.
    gap = shown + counts[candidates] - (size + sizes[candidates])[:, None] * fraction
    return int(np.argmin((weight * gap**2).sum(axis=1)))
