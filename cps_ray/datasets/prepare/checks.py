"""What is wrong with a data set as a whole: one image in two splits, classes that nothing shows, masks of nothing."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from cps_ray.datasets.prepare.findings import Finding, first_few
from cps_ray.datasets.prepare.masks import MaskReader
from cps_ray.datasets.shards import Index
from cps_ray.engine.batch import IGNORE

SAME_IMAGE = "one image in two splits"
_NEAR_BITS = 6
"""Copies of CamVid images at JPEG quality 50, at 0.37 of their size or a fifth brighter differ in at most 8 bits, 3 on
average; of its pairs of images from different splits none differs in fewer than 7."""
_SOFT_STEPS = 0.2
"""CamVid's masks: 0.01; resized by linear interpolation: 0.43."""
_MOSTLY = 0.5
_ROWS_AT_ONCE = 256
_EVALUATED = ("test", "val")
"""Splits that keep an image which others hold too."""


def same_images(indexes: Mapping[str, Index]) -> list[tuple[str, str, str, str]]:
    """Images that two splits hold, byte for byte: (split that should lose it, its id, split that keeps it, its id)."""
    kept: dict[bytes, tuple[str, str]] = {}
    found = []
    for split in sorted(
        indexes, key=lambda name: (_EVALUATED.index(name) if name in _EVALUATED else len(_EVALUATED), name)
    ):
        locations = indexes[split].locations
        for key, checksum in zip(locations.ids, locations.image_sha256, strict=True):
            other = kept.setdefault(checksum.tobytes(), (split, key))
            if other[0] != split:
                found.append((split, key, *other))
    return found


def one_split_each(same: Iterable[tuple[str, str, str, str]]) -> list[Finding]:
    """One finding per image of `same_images`; `where` is SPLIT/ID."""
    twice = "an image must be in one split, or scores are too good"
    return [
        Finding(
            SAME_IMAGE, f"{split}/{key}", f"{twice}, but {other}/{theirs} is the very same", f"take it out of {split}"
        )
        for split, key, other, theirs in same
    ]


def whole(indexes: Mapping[str, Index], classes: Sequence[str]) -> list[Finding]:
    """Every check of a prepared data set. Only one image in two splits is fatal."""
    findings = one_split_each(same_images(indexes))
    for name, index in indexes.items():
        findings += _repeated(name, index) + _classes(name, index, classes) + _masks(name, index)
    for first, second in combinations(indexes, 2):
        findings += _near(first, indexes[first], second, indexes[second])
    return findings


def _repeated(split: str, index: Index) -> list[Finding]:
    seen: dict[bytes, str] = {}
    pairs = []
    for key, checksum in zip(index.ids, index.locations.image_sha256, strict=True):
        other = seen.setdefault(checksum.tobytes(), key)
        if other != key:
            pairs.append(f"{other} = {key}")
    if not pairs:
        return []
    found = f"{len(pairs)} images should be in the split once, but are there again ({first_few(pairs)})"
    return [Finding("images repeat", split, found, "drop the copies unless they are meant", fatal=False)]


def near_pairs(first: Index, second: Index) -> list[tuple[int, int, int]]:
    """Images that look alike: (row of first, row of second, bits in which their perceptual hashes differ), not equal ones."""
    found: list[tuple[int, int, int]] = []
    for start in range(0, len(first), _ROWS_AT_ONCE):
        part = first.perceptual_hash[start : start + _ROWS_AT_ONCE]
        bits: NDArray[np.uint8] = np.bitwise_count(part[:, None] ^ second.perceptual_hash[None])
        rows, columns = np.nonzero(bits <= _NEAR_BITS)
        found += [(start + int(r), int(c), int(bits[r, c])) for r, c in zip(rows, columns, strict=True)]
    a, b = first.locations.image_sha256, second.locations.image_sha256
    return [(r, c, bits) for r, c, bits in found if not np.array_equal(a[r], b[c])]


def _near(name: str, first: Index, other: str, second: Index) -> list[Finding]:
    pairs = near_pairs(first, second)
    if not pairs:
        return []
    shown = [f"{first.ids[r]} ~ {second.ids[c]}" for r, c, _ in sorted(pairs, key=lambda pair: pair[2])]
    found = f"images of two splits should differ, but {len(pairs)} pairs look nearly the same ({first_few(shown)})"
    remedy = "look at them; frames of one video belong in one split"
    return [Finding("near duplicates", f"{name} and {other}", found, remedy, fatal=False)]


def absent(rows: NDArray[np.int64], classes: Sequence[str]) -> list[str]:
    """Classes that no mask shows; `rows` (N, C) pixels per mask and class."""
    return [label for label, count in zip(classes, rows.sum(axis=0), strict=True) if not count]


def _classes(split: str, index: Index, classes: Sequence[str]) -> list[Finding]:
    missing = absent(index.pixels[index.labeled], classes) if index.labeled.any() else []
    if not missing:
        return []
    consequence = "is never learnt" if split not in _EVALUATED else "counts in no mean IoU of this split"
    found = f"every class should be seen, but no mask shows {first_few(missing)}: such a class {consequence}"
    return [Finding("class is absent", split, found, "mend the class table, or move images", fatal=False)]


def _masks(split: str, index: Index) -> list[Finding]:
    shown = np.flatnonzero(index.labeled)
    if not shown.size:
        return []
    findings = []
    empty = [index.ids[row] for row in shown if not index.pixels[row].any()]
    if empty:
        found = f"a mask should have pixels that count, but {len(empty)} have none ({first_few(empty)})"
        findings.append(Finding("mask is empty", split, found, "list such images as unlabelled", fatal=False))
    area = (index.height.astype(np.int64) * index.width)[shown].sum()
    ignored = 1 - index.pixels[shown].sum() / area
    if ignored > _MOSTLY:
        found = f"most pixels should count, but {100 * ignored:.0f} % of the masks is ignored"
        findings.append(Finding("most is ignored", split, found, "check `ids` and `ignore_ids`", fatal=False))
    return findings


def of_values(split: str, example: str, values: Mapping[int, int], reader: MaskReader) -> list[Finding]:
    """255 beside a single class, over all masks of a split, is a foreground written as white, not pixels to ignore."""
    others = sorted(value for value in values if value != IGNORE)
    undeclared = reader.coding == "ids" and reader.void_by_default
    if not (undeclared and IGNORE in values and len(others) == 1):
        return []
    found = f"255 means ignore, but the masks of split {split} hold only {others[0]} and 255"
    remedy = "if 255 is a class here, give that class `ids: [255]`; if not, list 255 in `ignore_ids`"
    return [Finding("255 is a class", example, found, remedy, whole=True)]


def of_steps(split: str, example: str, sharp: int, soft: int) -> list[Finding]:
    """Masks whose edges pass through the ids between were resized with interpolation."""
    share = soft / max(1, sharp + soft)
    if share <= _SOFT_STEPS:
        return []
    found = f"edges between classes must be sharp, but {100 * share:.0f} % of those in split {split} pass through ids between"
    remedy = "the masks seem to have been resized with interpolation or smoothed: export them again"
    return [Finding("edges are smooth", example, found, remedy, fatal=False)]


def of_peak(split: str, example: str, peak: int | None, value_range: tuple[float, float] | None) -> list[Finding]:
    """Images of more than 8 bits that use little of their range become nearly black."""
    if peak is None or value_range is not None or peak >= 65535 / 8:
        return []
    found = (
        f"images of 16 bits should use their range, but those of split {split} end at {peak} and will be nearly black"
    )
    remedy = f"say in the recipe what is white: `value_range: [0, {peak}]`"
    return [Finding("images are dark", example, found, remedy, fatal=False)]
