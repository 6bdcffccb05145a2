from pathlib import Path

import numpy as np
import pytest

from cps_ray.config.train import DataConfig
from cps_ray.datasets.lists import write_list
from cps_ray.datasets.shards import ImageLocations, Index
from cps_ray.datasets.subsets import labeled_subset, stratified_order
from cps_ray.errors import DataError


def index_of(count: int, classes: int = 5, masked: int | None = None, seed: int = 0) -> Index:
    """Classes of falling frequency, the last in 4 % of the images."""
    rng = np.random.default_rng(seed)
    presence = rng.random((count, classes)) < np.array([1.0, 0.8, 0.5, 0.2, 0.04])[:classes]
    labeled = np.arange(count) < (count if masked is None else masked)
    pixels = (presence & labeled[:, None]).astype(np.int64)
    masks = np.stack([np.zeros(count, np.int64), labeled.astype(np.int64)], axis=1)
    none, checksums = np.zeros(count, np.int32), np.zeros((count, 32), np.uint8)
    locations = ImageLocations(
        ("f",), tuple(f"img_{n:04d}" for n in range(count)), none, masks, checksums, masks, checksums
    )
    return Index(locations, none, none, pixels, np.zeros(count, np.uint64))


def data(**settings: object) -> DataConfig:
    return DataConfig.model_validate(
        {"shards": "x", "crop_px": (32, 32), "labeled_batch": 1, "unlabeled_batch": 1, **settings}
    )


def test_count_and_share_and_the_rest_is_unlabelled() -> None:
    index = index_of(80)
    for wanted, expected in ((10, 10), (0.125, 10), (0.001, 1), (80, 80)):
        split = labeled_subset(data(labeled=wanted), index)
        assert len(split.labeled) == expected
        assert sorted([*split.labeled, *split.unlabeled]) == list(range(80))


def test_images_without_masks_are_never_labelled() -> None:
    split = labeled_subset(data(labeled=20), index_of(80, masked=20))
    assert split.labeled.tolist() == list(range(20))


def test_draws_are_nested_and_seeded() -> None:
    index = index_of(200)
    longer = stratified_order(index, 0, 40)
    assert stratified_order(index, 0, 15).tolist() == longer[:15].tolist()
    assert stratified_order(index, 1, 40).tolist() != longer.tolist()


def test_class_shares_are_nearer_to_the_whole_than_by_chance() -> None:
    index = index_of(400)
    share = index.presence.mean(axis=0)

    def distance(rows: np.ndarray) -> float:
        return float((np.abs(index.presence[rows].mean(axis=0) - share) / share).sum())

    ours = [distance(stratified_order(index, seed, 25)) for seed in range(10)]
    chance = [distance(np.random.default_rng(seed).choice(400, 25, replace=False)) for seed in range(10)]
    assert np.mean(ours) < 0.5 * np.mean(chance)


def test_lists_of_ids_and_paths(tmp_path: Path) -> None:
    labeled, unlabeled = tmp_path / "l.txt", tmp_path / "u.txt"
    labeled.write_text("img_0003\nleftImg8bit/train/x/img_0001_leftImg8bit.png gtFine/x/img_0001_labels.png\n\n")
    unlabeled.write_text("img_0007.png\timg_0007_mask.png\nimg_0002")
    split = labeled_subset(data(labeled_list=str(labeled), unlabeled_list=str(unlabeled)), index_of(10))
    assert split.labeled.tolist() == [1, 3]
    assert split.unlabeled.tolist() == [2, 7]


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        ("img_0001\nimg_0001", "img_0002", r"l\.txt:2: 'img_0001' is listed twice, first in line 1"),
        ("img_0001", "img_0001", r"u\.txt: no image may be labelled and unlabelled, but 1 are both"),
        ("img_0009", "img_0001", r"l\.txt: every labelled image must have a mask, but 1 have none"),
        ("\n", "img_0001", r"l\.txt: the list must name at least one image"),
        ("imag_1", "img_0001", r"l\.txt:1: 'imag_1' is no image"),
    ],
)
def test_bad_lists(tmp_path: Path, first: str, second: str, sentence: str) -> None:
    (tmp_path / "l.txt").write_text(first)
    (tmp_path / "u.txt").write_text(second)
    config = data(labeled_list=str(tmp_path / "l.txt"), unlabeled_list=str(tmp_path / "u.txt"))
    with pytest.raises(DataError, match=sentence):
        labeled_subset(config, index_of(10, masked=9))


def test_a_name_means_the_lists_beside_the_shards(tmp_path: Path) -> None:
    index = index_of(20)
    write_list(tmp_path / "subsets/1_16/labeled.txt", ["img_0003", "img_0001"])
    assert labeled_subset(data(shards=tmp_path, labeled="1_16"), index).unlabeled.tolist() == [0, 2, *range(4, 20)]
    write_list(tmp_path / "subsets/1_16/unlabeled.txt", ["img_0009"])
    split = labeled_subset(data(shards=tmp_path, labeled="1_16"), index)
    assert split.labeled.tolist() == [1, 3]
    assert split.unlabeled.tolist() == [9]
    with pytest.raises(DataError, match=r"no subset named '1_8' here; there are 1_16\. Bring in published lists"):
        labeled_subset(data(shards=tmp_path, labeled="1_8"), index)


def test_a_named_split_of_images_without_masks_is_refused(tmp_path: Path) -> None:
    write_list(tmp_path / "subsets/x/labeled.txt", ["img_0003", "img_0019"])
    with pytest.raises(
        DataError, match=r"labeled\.txt: every labelled image must have a mask, but 1 have none.*img_0019"
    ):
        labeled_subset(data(shards=tmp_path, labeled="x"), index_of(20, masked=10))
