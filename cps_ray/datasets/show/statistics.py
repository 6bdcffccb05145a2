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
    """Counts over the images of a split, or over some of them. C classes."""

    images: int
    """Number of images, with and without a mask."""
    masks: int
    """Number of masks."""
    bytes: int
    """Size of images and masks as they are stored."""
    sizes: Mapping[Size, int]
    """Number of images of each size, the most frequent size first."""
    pixels: NDArray[np.int64]
    """(C,) number of pixels of each class, over all masks."""
    masks_per_class: NDArray[np.int64]
    """(C,) number of masks that show each class."""
    cooccurrence: NDArray[np.float64]
    """(C, C) fraction of the masks with class a (row) that show class b (column) too; 0 where none shows a."""
    ignored: float
    """Fraction of the masks' pixels that count nowhere; 0 without masks."""

    @property
    def unlabeled(self) -> int:
        """Number of images without a mask."""
        return self.images - self.masks

    @property
    def frequency(self) -> NDArray[np.float64]:
        """Fraction of the counted pixels that each class covers: (C,); zeros without any."""
        return np.asarray(self.pixels / max(1, int(self.pixels.sum())))

    def extremes(self) -> tuple[Size, Size, Size]:
        """Returns the size of the smallest image, of the median one and of the largest, by area."""
        ordered = sorted(self.sizes, key=lambda size: (size[0] * size[1], size))
        # Each size stands for as many images as have it, so the median is looked up in the running count.
        ends = np.cumsum([self.sizes[size] for size in ordered])
        median = ordered[int(np.searchsorted(ends, (self.images + 1) // 2))]
        return ordered[0], median, ordered[-1]


def statistics(index: Index, rows: NDArray[np.int64]) -> Statistics:
    """Counts the images in these rows of an index: at least one, and none twice."""
    locations = index.locations
    masked = rows[index.labeled[rows]]
    pixels, presence = index.pixels[masked], index.presence[masked].astype(np.float64)
    masks_per_class = presence.sum(axis=0)
    area = (index.height[masked].astype(np.int64) * index.width[masked]).sum()
    sizes = Counter(zip(index.height[rows].tolist(), index.width[rows].tolist(), strict=True))
    return Statistics(
        images=len(rows),
        masks=len(masked),
        bytes=int(locations.image[rows, 1].sum() + locations.mask[rows, 1].sum()),
        sizes=dict(sizes.most_common()),
        pixels=pixels.sum(axis=0),
        masks_per_class=masks_per_class.astype(np.int64),
        # Entry (a, b) of the product counts the masks that show both.
        cooccurrence=presence.T @ presence / np.maximum(masks_per_class, 1)[:, None],
        # The index counts the pixels of classes alone: what is missing up to the area is ignored.
        ignored=float(1 - pixels.sum() / area) if area else 0.0,
    )


def size_text(size: Size) -> str:
    """Returns width and height in px, as in 480x360."""
    return f"{size[1]}x{size[0]}"


def percent(fraction: float) -> str:
    """Returns a fraction in [0, 1] as a percentage without the sign; rare things keep two digits, and only nothing is `-`."""
    percentage = 100 * fraction
    if not percentage:
        return "-"
    if percentage >= 0.1:
        return f"{percentage:.2f}"
    return f"{percentage:.2g}" if percentage >= 1e-4 else "<0.0001"
