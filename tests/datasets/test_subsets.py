"""Labelled subsets: how many images, which, and what is said of lists that do not fit."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from cps_ray.config.train import DataConfig, FoldsConfig
from cps_ray.datasets.lists import write_list
from cps_ray.datasets.shards import ImageLocations, Index
from cps_ray.datasets.subsets import LabeledSubset, drawn_unlabeled, hold_out, labeled_subset, stratified_order
from cps_ray.errors import DataError


def index_of(count: int, classes: int = 5, masked: int | None = None, seed: int = 0) -> Index:
    """Returns an index of images with classes of falling frequency: the last one is in 4 % of them."""
    rng = np.random.default_rng(seed)
    presence = rng.random((count, classes)) < np.array([1.0, 0.8, 0.5, 0.2, 0.04])[:classes]
    labeled = np.arange(count) < (count if masked is None else masked)
    pixels = (presence & labeled[:, None]).astype(np.int64)
    masks = np.stack([np.zeros(count, np.int64), labeled.astype(np.int64)], axis=1)
    zeros, checksums = np.zeros(count, np.int32), np.zeros((count, 32), np.uint8)
    locations = ImageLocations(
        ("f",), tuple(f"img_{n:04d}" for n in range(count)), zeros, masks, checksums, masks, checksums
    )
    return Index(locations, zeros, zeros, pixels, np.zeros(count, np.uint64), *[np.zeros((count, 32), np.uint8)] * 2)


def data(**settings: object) -> DataConfig:
    return DataConfig.model_validate(
        {"shards": "x", "crop_px": (32, 32), "labeled_batch": 1, "unlabeled_batch": 1, **settings}
    )


def test_a_count_or_a_fraction_is_labelled_and_the_rest_is_not() -> None:
    index = index_of(80)
    for wanted, expected in ((10, 10), (0.125, 10), (0.001, 1), (80, 80)):
        subset = labeled_subset(data(labeled=wanted), index)
        assert len(subset.labeled) == expected
        assert sorted([*subset.labeled, *subset.unlabeled]) == list(range(80))


def test_images_without_masks_are_never_labelled() -> None:
    subset = labeled_subset(data(labeled=20), index_of(80, masked=20))
    assert subset.labeled.tolist() == list(range(20))


def test_draws_are_nested_and_seeded() -> None:
    index = index_of(200)
    longer = stratified_order(index, 0, 40)
    assert stratified_order(index, 0, 15).tolist() == longer[:15].tolist()
    assert stratified_order(index, 1, 40).tolist() != longer.tolist()


def test_class_frequencies_are_nearer_to_those_of_all_images_than_by_chance() -> None:
    index = index_of(400)
    frequency = index.presence.mean(axis=0)

    def distance(rows: np.ndarray) -> float:
        return float((np.abs(index.presence[rows].mean(axis=0) - frequency) / frequency).sum())

    stratified = [distance(stratified_order(index, seed, 25)) for seed in range(10)]
    by_chance = [distance(np.random.default_rng(seed).choice(400, 25, replace=False)) for seed in range(10)]
    assert np.mean(stratified) < 0.5 * np.mean(by_chance)


def long_tailed(seed: int, images: int = 300, classes: int = 20) -> Index:
    """Returns an index of images with classes of which the rarest is in one image or two."""
    index = index_of(images, 1)
    presence = np.random.default_rng(seed).random((images, classes)) < 0.9 * 0.72 ** np.arange(classes)
    presence[seed % images, -1] = True
    return dataclasses.replace(index, pixels=presence.astype(np.int64))


def test_a_draw_covers_every_class_as_early_as_it_can() -> None:
    drawn, chance = [], []
    for seed in range(50):
        index = long_tailed(seed)
        order, by_chance = stratified_order(index, seed, 300), np.random.default_rng(seed).permutation(300)
        seen = [np.logical_or.accumulate(index.presence[rows]).sum(axis=1)[:20] for rows in (order, by_chance)]
        # Each image adds a class at least, until none is missing.
        there = int(index.presence.any(axis=0).sum())
        assert (seen[0] >= np.minimum(np.arange(1, 21), there)).all()
        drawn.append(seen[0])
        chance.append(seen[1])
        assert sorted(order) == list(range(300))
    more = np.mean(drawn, axis=0) - np.mean(chance, axis=0)
    assert (more[2:] > 3).all(), "classes shown by three images or more, beyond those that chance shows"


def test_seeds_draw_other_images_also_of_those_that_cover_classes() -> None:
    index = index_of(400)
    assert len({int(stratified_order(index, seed, 1)[0]) for seed in range(20)}) > 5


def test_lists_of_ids_and_paths(tmp_path: Path) -> None:
    labeled, unlabeled = tmp_path / "l.txt", tmp_path / "u.txt"
    labeled.write_text("img_0003\nleftImg8bit/train/x/img_0001_leftImg8bit.png gtFine/x/img_0001_labels.png\n\n")
    unlabeled.write_text("img_0007.png\timg_0007_mask.png\nimg_0002")
    subset = labeled_subset(data(labeled_list=str(labeled), unlabeled_list=str(unlabeled)), index_of(10))
    assert subset.labeled.tolist() == [1, 3]
    assert subset.unlabeled.tolist() == [2, 7]


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "message"),
    [
        ("img_0001\nimg_0001", "img_0002", r"l\.txt:2: 'img_0001' is listed twice, first in line 1"),
        ("img_0001", "img_0001", r"u\.txt: no image may be labelled and unlabelled, but 1 are both"),
        ("img_0009", "img_0001", r"l\.txt: every labelled image must have a mask, but 1 have none"),
        ("\n", "img_0001", r"l\.txt: the list must name at least one image"),
        ("imag_1", "img_0001", r"l\.txt:1: 'imag_1' is no image"),
    ],
)
def test_bad_lists(tmp_path: Path, labeled: str, unlabeled: str, message: str) -> None:
    (tmp_path / "l.txt").write_text(labeled)
    (tmp_path / "u.txt").write_text(unlabeled)
    config = data(labeled_list=str(tmp_path / "l.txt"), unlabeled_list=str(tmp_path / "u.txt"))
    with pytest.raises(DataError, match=message):
        labeled_subset(config, index_of(10, masked=9))


def test_a_name_means_the_lists_beside_the_shards(tmp_path: Path) -> None:
    index = index_of(20)
    write_list(tmp_path / "subsets/1_16/labeled.txt", ["img_0003", "img_0001"])
    assert labeled_subset(data(shards=tmp_path, labeled="1_16"), index).unlabeled.tolist() == [0, 2, *range(4, 20)]
    write_list(tmp_path / "subsets/1_16/unlabeled.txt", ["img_0009"])
    subset = labeled_subset(data(shards=tmp_path, labeled="1_16"), index)
    assert subset.labeled.tolist() == [1, 3]
    assert subset.unlabeled.tolist() == [9]
    with pytest.raises(DataError, match=r"no subset named '1_8' here; there are 1_16\. Bring in published lists"):
        labeled_subset(data(shards=tmp_path, labeled="1_8"), index)


def test_a_named_subset_of_images_without_masks_is_refused(tmp_path: Path) -> None:
    write_list(tmp_path / "subsets/x/labeled.txt", ["img_0003", "img_0019"])
    with pytest.raises(
        DataError, match=r"labeled\.txt: every labelled image must have a mask, but 1 have none.*img_0019"
    ):
        labeled_subset(data(shards=tmp_path, labeled="x"), index_of(20, masked=10))


def different(count: int, masked: int, ids: tuple[str, ...] | None = None) -> tuple[Index, LabeledSubset]:
    """Returns an index of images of which no two are equal, the first `masked` of them with a mask, and all of these labelled."""
    index = index_of(count, masked=masked)
    checksums = np.random.default_rng(1).integers(0, 256, (count, 32), dtype=np.uint8)
    locations = index.locations if ids is None else dataclasses.replace(index.locations, ids=ids)
    rows = np.arange(count)
    changed = dataclasses.replace(index, locations=locations, pixels_sha256=checksums)
    return changed, LabeledSubset(rows[:masked], rows[masked:])


def held(index: Index, subset: LabeledSubset, tiled: bool = False, **folds: object) -> list[LabeledSubset]:
    """Returns what is left and held out in each of the folds."""
    count = int(folds.pop("count", 3))
    return [
        hold_out(subset, index, FoldsConfig.model_validate({"count": count, "held_out": k, **folds}), tiled=tiled)
        for k in range(count)
    ]


def test_every_labelled_image_is_held_out_once_and_classes_are_in_all_folds() -> None:
    index, subset = different(60, 33)
    folds = held(index, subset)
    assert sorted(row for fold in folds for row in fold.held_out) == list(range(33))
    for fold in folds:
        assert len(fold.held_out) == 11
        assert sorted([*fold.labeled, *fold.held_out]) == list(range(33))
        assert fold.unlabeled.tolist() == list(range(33, 60))
        common = index.presence[:33].sum(axis=0) >= 3
        assert index.presence[fold.held_out].any(axis=0)[common].all()
    other = held(index, subset, seed=1)
    assert [fold.held_out.tolist() for fold in other] != [fold.held_out.tolist() for fold in folds]
    everything = hold_out(subset, index, FoldsConfig(count=3), tiled=False)
    assert len(everything.labeled) == 33
    assert not everything.held_out.size


def test_folds_do_not_depend_on_the_order_of_the_shards() -> None:
    index, subset = different(40, 40)
    order = np.random.default_rng(2).permutation(40)
    again = held(index.take(order), subset)
    for fold, other in zip(held(index, subset), again, strict=True):
        assert {index.ids[row] for row in fold.held_out} == {index.ids[order[row]] for row in other.held_out}


def test_groups_are_held_out_whole_and_without_their_unlabelled_images() -> None:
    ids = tuple(f"v{n % 7}_{n:02d}" for n in range(60))
    index, subset = different(60, 30, ids)
    folds = held(index, subset, group_by=r"^(v\d)_")
    assert sorted(row for fold in folds for row in fold.held_out) == list(range(30))
    for fold in folds:
        videos = {ids[row][:2] for row in fold.held_out}
        used = [*fold.labeled, *fold.unlabeled]
        assert {ids[row][:2] for row in used} == {f"v{n}" for n in range(7)} - videos
        assert len(used) == sum(key[:2] not in videos for key in ids)
    with pytest.raises(DataError, match=r"group_by '\^x' must match ids, but matches none; they look like 'v0_00'"):
        held(index, subset, group_by="^x")


@pytest.mark.parametrize("tiled", [False, True])
def test_equal_images_and_tiles_of_one_image_are_in_one_fold(tiled: bool) -> None:
    ids = tuple(f"scene{n // 2:02d}_y0_x{n % 2 * 64}" for n in range(24))
    index, subset = different(24, 20, ids)
    if not tiled:
        index.pixels_sha256[1::2] = index.pixels_sha256[::2]
    for fold in held(index, subset, tiled=tiled):
        scenes = [{ids[row][:7] for row in rows} for rows in (fold.held_out, [*fold.labeled, *fold.unlabeled])]
        assert not scenes[0] & scenes[1]


def test_too_few_groups_for_the_folds_are_refused() -> None:
    index, subset = different(10, 4)
    with pytest.raises(
        DataError, match=r"data\.folds: 5 folds need 5 groups of labelled images, but there are 4; label"
    ):
        held(index, subset, count=5)


def test_draws_of_unlabelled_images_are_nested_and_seeded() -> None:
    rows = np.arange(10, 60)
    found = {count: drawn_unlabeled(data(labeled=1, unlabeled=count), rows, 60).tolist() for count in (5, 20, 50, 0.1)}
    assert found[0.1] == found[5] == sorted(found[5])
    assert {*found[5]} < {*found[20]} < {*found[50]} == {*rows.tolist()}
    assert drawn_unlabeled(data(labeled=1, unlabeled=5, subset_seed=1), rows, 60).tolist() != found[5]
    assert drawn_unlabeled(data(labeled=1), rows, 60).tolist() == rows.tolist()
    fewer = drawn_unlabeled(data(labeled=1, unlabeled=20), rows[5:], 60).tolist()
    assert {*found[20]} - {*range(15)} <= {*fewer}, "other labelled images change as little as can be"
    assert not len(drawn_unlabeled(data(labeled=1, unlabeled=20), rows[:0], 60)), "all are labelled: nothing is drawn"
    with pytest.raises(DataError, match=r"data\.unlabeled must be at most 50, the unlabelled images, but is 51"):
        drawn_unlabeled(data(labeled=1, unlabeled=51), rows, 60)
