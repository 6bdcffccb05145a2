"""Draws of images in which every class is seen as early as can be, and then about as often as in all images; folds; and groups of images
that stay together."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cps_ray.errors import DataError

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


def even_folds(counts: NDArray[np.float64], sizes: NDArray[np.float64], count: int, seed: int) -> NDArray[np.int64]:
    """Returns the fold of every group, int64 (N,): rare classes first, each where it is rarest so far and there is most room. `counts`
    and `sizes` as `next_pick` has them."""
    rng = np.random.default_rng((seed, count))
    total = counts.sum(axis=0)
    shows = counts > 0
    # Images of the rarest class that a group shows; a group that shows none comes last.
    rarity = np.where(shows, total, np.inf).min(axis=1)
    order = sorted(rng.permutation(len(sizes)).tolist(), key=lambda group: (rarity[group], -sizes[group]))
    shown, held, room = np.zeros((count, len(total))), np.zeros(count), np.ceil(sizes.sum() / count)
    folds = np.zeros(len(sizes), np.int64)
    for group in order:
        rarest = np.where(shows[group], total, np.inf).argmin()
        full = held + sizes[group] > max(room, held.min() + sizes[group])
        at = int(np.lexsort((held, shown[:, rarest] * shows[group, rarest], full))[0])
        folds[group] = at
        shown[at] += counts[group]
        held[at] += sizes[group]
    return folds


def group_images(names: Mapping[str, str], group_by: str | None, alike: Iterable[Sequence[str]]) -> dict[str, str]:
    """Returns the group of each image, under the id of one of its images: of those that `group_by` or `alike`, lists of ids, put together.

    `names`: id -> what `group_by` is searched in. Raises DataError if it matches none.
    """
    parent = {key: key for key in names}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = key = parent[parent[key]]
        return key

    def join(keys: Sequence[str]) -> None:
        for key in keys[1:]:
            parent[root(key)] = root(keys[0])

    if group_by is not None:
        named: dict[str, list[str]] = defaultdict(list)
        for key, name in names.items():
            match = re.search(group_by, name)
            if match:
                named[(match[1] if match.re.groups and match[1] is not None else match[0])].append(key)
        if not named:
            example = next(iter(names.values()))
            raise DataError(f"group_by {group_by!r} must match ids, but matches none; they look like {example!r}.")
        alike = [*named.values(), *alike]
    for keys in alike:
        join(keys)
    return {key: root(key) for key in parent}
