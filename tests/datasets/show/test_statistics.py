"""Numbers of an index, counted again by hand."""

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
    known = statistics(index, rows)
    stored = index.locations.read(rows.tolist())
    masks = [decode_mask(one.mask) for one in stored if one.mask]
    assert (known.images, known.masks, known.unlabeled) == (4, 4, 0)
    assert known.sizes == Counter({(32, 48): 4})
    assert known.bytes == sum(len(one.image) + len(one.mask or b"") for one in stored)
    for a in range(len(opened.classes)):
        showing = [mask for mask in masks if (mask == a).any()]
        assert known.pixels[a] == sum(int((mask == a).sum()) for mask in masks)
        assert known.shown[a] == len(showing)
        for b in range(len(opened.classes)):
            share = np.mean([(mask == b).any() for mask in showing]) if showing else 0.0
            assert known.together[a, b] == pytest.approx(share)
    assert known.frequency.sum() == pytest.approx(1)
    assert known.ignored == pytest.approx(np.mean([mask == 255 for mask in masks]))


def test_median_size_is_by_area_and_counts_every_image() -> None:
    nothing = np.zeros(0)
    sizes = {(10, 10): 2, (1, 50): 1, (40, 40): 4}
    known = Statistics(7, 0, 0, sizes, nothing.astype(np.int64), nothing.astype(np.int64), nothing, 0.0)
    assert known.extremes() == ((1, 50), (40, 40), (40, 40))


@pytest.mark.parametrize(
    ("share", "said"),
    [(0, "-"), (1, "100.00"), (0.0123, "1.23"), (0.000345, "0.034"), (2e-6, "0.0002"), (1e-9, "<0.0001")],
)
def test_rare_things_are_not_rounded_away(share: float, said: str) -> None:
    assert percent(share) == said
