"""What a data set holds in numbers, from its index alone: no image is decoded."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cps_ray.datasets.shards import Index

Size = tuple[int, int]
"""(height, width) in px."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of a split, or of some of its images. C classes."""

    images: int
    masks: int
    bytes: int
    """Of images and masks as they are stored."""
    sizes: Mapping[Size, int]
    """Images of each size, the most frequent first."""
    pixels: NDArray[np.int64]
    """(C,) over all masks."""
    shown: NDArray[np.int64]
    """(C,) masks that show the class."""
    together: NDArray[np.float64]
    """(C, C) of the masks that show class a, the share in [0, 1] that shows b too; 0 where none shows a."""
    ignored: float
    """Fraction of the masks' pixels that counts nowhere; 0 without masks."""

    @property
    def unlabeled(self) -> int:
        """Images without a mask."""
        return self.images - self.masks

    @property
    def frequency(self) -> NDArray[np.float64]:
        """(C,) share of the counted pixels; zeros without any."""
        return np.asarray(self.pixels / max(1, int(self.pixels.sum())))

    def extremes(self) -> tuple[Size, Size, Size]:
        """The size of the smallest image, of the median one and of the largest, by area."""
        ordered = sorted(self.sizes, key=lambda size: (size[0] * size[1], size))
        ends = np.cumsum([self.sizes[size] for size in ordered])
        median = ordered[int(np.searchsorted(ends, (self.images + 1) // 2))]
        return ordered[0], median, ordered[-1]


def statistics(index: Index, rows: NDArray[np.int64]) -> Statistics:
    """Of these rows of an index, each counted once; at least one."""
    locations = index.locations
    masked = rows[index.labeled[rows]]
    pixels, presence = index.pixels[masked], index.presence[masked].astype(np.float64)
    shown = presence.sum(axis=0)
    area = (index.height[masked].astype(np.int64) * index.width[masked]).sum()
    sizes = Counter(zip(index.height[rows].tolist(), index.width[rows].tolist(), strict=True))
    return Statistics(
        images=len(rows),
        masks=len(masked),
        bytes=int(locations.image[rows, 1].sum() + locations.mask[rows, 1].sum()),
        sizes=dict(sizes.most_common()),
        pixels=pixels.sum(axis=0),
        shown=shown.astype(np.int64),
        together=presence.T @ presence / np.maximum(shown, 1)[:, None],
        ignored=float(1 - pixels.sum() / area) if area else 0.0,
    )


def size_text(size: Size) -> str:
    """480x360: width and height in px."""
    return f"{size[1]}x{size[0]}"


def percent(share: float) -> str:
    """A share in [0, 1] as per cent, without the sign; rare things keep two digits, and only nothing is `-`."""
    hundredth = 100 * share
    if not hundredth:
        return "-"
    if hundredth >= 0.1:
        return f"{hundredth:.2f}"
    return f"{hundredth:.2g}" if hundredth >= 1e-4 else "<0.0001"
