"""What is wrong with a data set as a whole: one image in two splits, classes that no mask shows, masks that are empty."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from cps_ray.datasets.images import ValueRange
from cps_ray.datasets.prepare.findings import Finding
from cps_ray.datasets.prepare.masks import MaskReader, color_text
from cps_ray.datasets.shards import Index
from cps_ray.engine.batch import IGNORE
from cps_ray.text import first_few

SAME_IMAGE = "one image in two splits"
MAX_NEAR_BITS = 6
"""Largest number of differing bits between the perceptual hashes of two images that look alike. Copies of CamVid images at
JPEG quality 50, at 0.37 of their size or a fifth brighter differ in at most 8 bits, 3 on average; of its pairs of images
from different splits none differs in fewer than 7."""
_MAX_SMOOTH_FRACTION = 0.2
"""Largest fraction of smooth edges in sharp masks. CamVid's masks have 0.01; resized by linear interpolation, 0.43."""
_MAX_IGNORED_FRACTION = 0.5
_ROWS_AT_ONCE = 256
_EVALUATED = ("test", "val")
"""Splits that models are evaluated on, in the order in which they keep an image that others hold too."""


def same_images(indexes: Mapping[str, Index]) -> list[tuple[str, str, str, str]]:
    """Finds images that two splits hold, byte for byte: (split that should lose it, id there, split that keeps it, id there)."""
    owners: dict[bytes, tuple[str, str]] = {}
    duplicates = []
    # The split that comes first keeps an image: test, then val, then the others by name.
    for split in sorted(
        indexes, key=lambda name: (_EVALUATED.index(name) if name in _EVALUATED else len(_EVALUATED), name)
    ):
        locations = indexes[split].locations
        for key, checksum in zip(locations.ids, locations.image_sha256, strict=True):
            owner = owners.setdefault(checksum.tobytes(), (split, key))
            if owner[0] != split:
                duplicates.append((split, key, *owner))
    return duplicates


def same_image_findings(duplicates: Iterable[tuple[str, str, str, str]]) -> list[Finding]:
    """Returns one fatal finding per entry of `same_images`; `where` is SPLIT/ID."""
    rule = "an image must be in one split, or scores are too good"
    return [
        Finding(
            SAME_IMAGE,
            f"{split}/{key}",
            f"{rule}, but {owner}/{owner_key} is the very same",
            f"take it out of {split}",
        )
        for split, key, owner, owner_key in duplicates
    ]


def check_prepared(indexes: Mapping[str, Index], classes: Sequence[str]) -> list[Finding]:
    """Runs every check that the indexes of a prepared data set allow. Only one image in two splits is fatal."""
    findings = same_image_findings(same_images(indexes))
    for name, index in indexes.items():
        findings += _check_repeats(name, index) + _check_classes(name, index, classes) + _check_masks(name, index)
    for first, second in combinations(indexes, 2):
        findings += _check_near(first, indexes[first], second, indexes[second])
    return findings


def _check_repeats(split: str, index: Index) -> list[Finding]:
    first_ids: dict[bytes, str] = {}
    pairs = []
    for key, checksum in zip(index.ids, index.locations.image_sha256, strict=True):
        first_id = first_ids.setdefault(checksum.tobytes(), key)
        if first_id != key:
            pairs.append(f"{first_id} = {key}")
    if not pairs:
        return []
    found = f"{len(pairs)} images should be in the split once, but are there again ({first_few(pairs)})"
    return [Finding("images repeat", split, found, "drop the copies unless they are meant", fatal=False)]


def near_pairs(first: Index, second: Index) -> list[tuple[int, int, int]]:
    """Finds images that look alike but are not equal: (row of first, row of second, bits in which their hashes differ)."""
    near: list[tuple[int, int, int]] = []
    # In blocks: all pairs at once would take 8 bytes each, 400 MB for 10 000 images against 5 000.
    for start in range(0, len(first), _ROWS_AT_ONCE):
        hashes = first.perceptual_hash[start : start + _ROWS_AT_ONCE]
        bits: NDArray[np.uint8] = np.bitwise_count(hashes[:, None] ^ second.perceptual_hash[None])
        rows, columns = np.nonzero(bits <= MAX_NEAR_BITS)
        near += [(start + int(r), int(c), int(bits[r, c])) for r, c in zip(rows, columns, strict=True)]
    a, b = first.locations.image_sha256, second.locations.image_sha256
    return [(r, c, bits) for r, c, bits in near if not np.array_equal(a[r], b[c])]


def _check_near(first_name: str, first: Index, second_name: str, second: Index) -> list[Finding]:
    pairs = near_pairs(first, second)
    if not pairs:
        return []
    names = [f"{first.ids[r]} ~ {second.ids[c]}" for r, c, _ in sorted(pairs, key=lambda pair: pair[2])]
    found = f"images of two splits should differ, but {len(pairs)} pairs look nearly the same ({first_few(names)})"
    remedy = "look at them; frames of one video belong in one split"
    return [Finding("near duplicates", f"{first_name} and {second_name}", found, remedy, fatal=False)]


def absent_classes(pixels: NDArray[np.int64], classes: Sequence[str]) -> list[str]:
    """Returns the classes that no mask shows; `pixels` (N, C) counts the pixels per mask and class."""
    return [label for label, count in zip(classes, pixels.sum(axis=0), strict=True) if not count]


def _check_classes(split: str, index: Index, classes: Sequence[str]) -> list[Finding]:
    missing = absent_classes(index.pixels[index.labeled], classes) if index.labeled.any() else []
    if not missing:
        return []
    consequence = "is never learnt" if split not in _EVALUATED else "counts in no mean IoU of this split"
    found = f"every class should be seen, but no mask shows {first_few(missing)}: such a class {consequence}"
    return [Finding("class is absent", split, found, "fix the class table, or move images", fatal=False)]


def _check_masks(split: str, index: Index) -> list[Finding]:
    labeled = np.flatnonzero(index.labeled)
    if not labeled.size:
        return []
    findings = []
    empty = [index.ids[row] for row in labeled if not index.pixels[row].any()]
    if empty:
        found = f"a mask should have pixels that count, but {len(empty)} have none ({first_few(empty)})"
        findings.append(Finding("mask is empty", split, found, "list such images as unlabelled", fatal=False))
    area = (index.height.astype(np.int64) * index.width)[labeled].sum()
    ignored = 1 - index.pixels[labeled].sum() / area
    if ignored > _MAX_IGNORED_FRACTION:
        found = f"most pixels should count, but {100 * ignored:.0f} % of the masks is ignored"
        findings.append(Finding("most is ignored", split, found, "check `ids` and `ignore_ids`", fatal=False))
    return findings


def check_mask_values(split: str, example: str, values: Mapping[int, int], reader: MaskReader) -> list[Finding]:
    """Finds white that is meant as a class: masks that hold 255 and one other value, where 255 means ignore by default.

    `values` counts the pixels per raw value over all masks of the split; `example` is the file that the finding names. The
    finding is fatal for the whole split.
    """
    others = sorted(value for value in values if value != IGNORE)
    undeclared = reader.coding == "ids" and reader.void_by_default
    if not (undeclared and IGNORE in values and len(others) == 1):
        return []
    found = f"255 means ignore, but the masks of split {split} hold only {others[0]} and 255"
    remedy = "if 255 is a class here, give that class `ids: [255]`; if not, list 255 in `ignore_ids`"
    return [Finding("255 is a class", example, found, remedy, whole_split=True)]


def check_mask_edges(split: str, example: str, sharp: int, smooth: int) -> list[Finding]:
    """Warns of masks that were resized with interpolation: too many of their edges pass through the ids between.

    `sharp` and `smooth` are the sums of `masks.count_edges` over the split; `example` is the file that the finding names.
    """
    fraction = smooth / max(1, sharp + smooth)
    if fraction <= _MAX_SMOOTH_FRACTION:
        return []
    found = f"edges between classes must be sharp, but {100 * fraction:.0f} % of those in split {split} pass through ids between"
    remedy = "the masks seem to have been resized with interpolation or smoothed: export them again"
    return [Finding("edges are smooth", example, found, remedy, fatal=False)]


def check_palettes(
    split: str, example: str, palettes: Mapping[int, Collection[int]], reader: MaskReader
) -> list[Finding]:
    """Finds palettes that differ from file to file: the same index is then another class in each, or colours mean nothing.

    `palettes`: index -> its packed colours over all masks of the split that show it. The finding is fatal for the whole split.
    """
    differing = sorted(index for index, colors in palettes.items() if len(colors) > 1)
    if not differing or reader.coding != "ids":
        return []
    colors = " and ".join(color_text(color) for color in sorted(palettes[differing[0]])[:2])
    found = f"palettes must agree, but index {differing[0]} is {colors} in masks of split {split}"
    remedy = "say in the recipe which counts: `mask_coding: colors`, or `mask_coding: indices`"
    return [Finding("palettes differ", example, found, remedy, whole_split=True)]


def check_class_count(shown: Mapping[str, Collection[int]], classes: Sequence[str]) -> list[Finding]:
    """Finds a data set whose masks all show one class: its masks were misread, or there is nothing to learn.

    `shown`: split with masks -> train ids that any of its masks shows.
    """
    seen = sorted(set().union(*shown.values()))
    if not shown or len(seen) > 1:
        return []
    what = f"only {classes[seen[0]]}" if seen else "no class at all"
    found = f"masks must show two classes or more, but all of them show {what}"
    remedy = "look at a mask's values: are its ids, its channel, its `threshold` those that the recipe says?"
    return [Finding("one class", " and ".join(shown), found, remedy, whole_split=True)]


def check_left_aside(split: str, aside: Mapping[str, int]) -> list[Finding]:
    """Says what of the images' files was not read."""
    remedy = "say in the recipe which bands count: `bands: [1, 2, 3]`"
    return [
        Finding("left aside", split, f"{what} was left aside in {count} images", remedy, fatal=False)
        for what, count in aside.items()
    ]


def check_image_peak(split: str, example: str, peak: int | None, value_range: ValueRange | None) -> list[Finding]:
    """Warns of images with more than 8 bits that use so little of their range that they become nearly black.

    `peak` is the largest value in the split, None if every image has 8 bits; `example` is the file that the finding names.
    """
    # Below an eighth of the range, the brightest pixel of all becomes less than 32 of 255.
    if peak is None or value_range is not None or peak >= 65535 / 8:
        return []
    found = (
        f"images of 16 bits should use their range, but those of split {split} end at {peak} and will be nearly black"
    )
    remedy = f"say in the recipe what is white: `value_range: [0, {peak}]`"
    return [Finding("images are dark", example, found, remedy, fatal=False)]
