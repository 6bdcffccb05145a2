"""Statistics of an index equal those counted in the decoded masks."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cps_ray.datasets.images import decode_mask
from cps_ray.datasets.shards import open_shards
from cps_ray.datasets.show.statistics import Statistics, percent, statistics


def test_statistics_are_those_of_the_masks(shards: Path) -> None:
    opened = open_shards(shards)
    index, rows = opened.index("train"), np.array([1, 4, 5, 20])
    counts = statistics(index, rows)
    stored = index.locations.read(rows.tolist())
    masks = [decode_mask(encoded.mask) for encoded in stored if encoded.mask]
    assert (counts.images, counts.masks, counts.unlabeled) == (4, 4, 0)
    assert counts.sizes == Counter({(32, 48): 4})
    assert counts.bytes == sum(len(encoded.image) + len(encoded.mask or b"") for encoded in stored)
    for a in range(len(opened.classes)):
        masks_with_a = [mask for mask in masks if (mask == a).any()]
        assert counts.pixels[a] == sum(int((mask == a).sum()) for mask in masks)
        assert counts.masks_per_class[a] == len(masks_with_a)
        for b in range(len(opened.classes)):
            fraction = np.mean([(mask == b).any() for mask in masks_with_a]) if masks_with_a else 0.0
            assert counts.cooccurrence[a, b] == pytest.approx(fraction)
    assert counts.frequency.sum() == pytest.approx(1)
    assert counts.ignored == pytest.approx(np.mean([mask == 255 for mask in masks]))


def test_median_size_is_by_area_and_counts_every_image() -> None:
    empty = np.zeros(0)
    sizes = {(10, 10): 2, (1, 50): 1, (40, 40): 4}
    counts = Statistics(7, 0, 0, sizes, empty.astype(np.int64), empty.astype(np.int64), empty, 0.0)
    assert counts.extremes() == ((1, 50), (40, 40), (40, 40))


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0, "-"), (1, "100.00"), (0.0123, "1.23"), (0.000345, "0.034"), (2e-6, "0.0002"), (1e-9, "<0.0001")],
)
def test_rare_things_are_not_rounded_away(fraction: float, text: str) -> None:
    assert percent(fraction) == text
