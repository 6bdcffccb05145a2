"""Whether shards still hold the data that a config was made for: what a fingerprint sees, and what is said of a difference."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trees
from PIL import Image

from cps_ray.config.reader import parse_train
from cps_ray.config.train import DataConfig, SyntheticConfig
from cps_ray.datasets.open import HASHES_FILE, fingerprints, open_data, write_image_hashes
from cps_ray.datasets.prepare import writing
from cps_ray.datasets.prepare.assembly import write_shards
from cps_ray.datasets.prepare.items import FromFiles
from cps_ray.datasets.shards import Shards, open_shards
from cps_ray.errors import ConfigError, DataError

SPLITS = {"train": ["a", "b", "c"], "val": ["d"], "test": ["e"]}


def write_files(raw: Path) -> None:
    for keys in SPLITS.values():
        for key in keys:
            trees.pair(raw, key)


def written(raw: Path, out: Path, *, compressed: bool = True, **more: list[str]) -> Shards:
    """Makes shards of the files in `raw` as they are."""

    def source(key: str) -> trees.Source:
        mask = trees.MaskFile(str(raw / f"{key}_mask.png"))
        return trees.Source(key, str(raw / f"{key}.png"), (mask,))

    plan = trees.plan({split: map(source, keys) for split, keys in {**SPLITS, **more}.items()})
    write_shards(out, replace(plan, make_item=FromFiles(trees.READER, compressed=compressed)))
    return open_shards(out)


def change_a_pixel(path: Path) -> None:
    pixels = np.array(Image.open(path))
    pixels[0, 0] = (pixels[0, 0] + 1) % 3
    trees.save(path, pixels)


def config(shards: Shards, fingerprint: dict[str, str] | None, **more: object) -> DataConfig:
    batch = {"labeled": 2, "crop_px": (8, 8), "labeled_batch": 2, "unlabeled_batch": 2}
    return DataConfig.model_validate({"shards": shards.folder, "fingerprint": fingerprint, **batch, **more})


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_files(tmp_path / "raw")
    return tmp_path / "raw"


@pytest.fixture
def begun(raw: Path, tmp_path: Path) -> dict[str, str]:
    """The fingerprints of a sweep that has begun; its hashes are in `tmp_path`."""
    shards = written(raw, tmp_path / "first")
    write_image_hashes(tmp_path, shards)
    return fingerprints(shards)


def test_encoding_and_size_of_shards_do_not_matter(
    raw: Path, tmp_path: Path, begun: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_SHARD_BYTES", 1)
    other = written(raw, tmp_path / "other", compressed=False)
    assert len(other.manifest.splits["train"].files) == 3
    assert other.manifest.splits["train"].sha256 != open_shards(tmp_path / "first").manifest.splits["train"].sha256
    assert open_data(config(other, begun), None) == other


@pytest.mark.parametrize("file", ["b.png", "b_mask.png"])
def test_one_pixel_is_another_image(raw: Path, tmp_path: Path, begun: dict[str, str], file: str) -> None:
    change_a_pixel(raw / file)
    other = written(raw, tmp_path / "other")
    message = r"other data than in `data\.fingerprint`: train differs in 1 image\(s\): 0 added, 0 gone, 1 changed\.$"
    with pytest.raises(DataError, match=message):
        open_data(config(other, begun), hashes_in=tmp_path)
    with pytest.raises(DataError, match=r"train had 3 images, has 3 and not the same\.$"):
        open_data(config(other, begun))
    assert open_data(config(other, None)) == other
    assert open_data(config(other, begun), ("val", "test")) == other, "only train has changed"


def test_new_training_images_leave_the_other_splits_as_they_were(
    raw: Path, tmp_path: Path, begun: dict[str, str]
) -> None:
    trees.pair(raw, "new1")
    trees.pair(raw, "new2")
    other = written(raw, tmp_path / "other", train=["a", "b", "new1", "new2"])
    found = fingerprints(other)
    assert {split for split in begun if begun[split] != found[split]} == {"train"}
    with pytest.raises(
        DataError, match=r"train differs in 3 image\(s\): 2 added, 1 gone, 0 changed\. Go on .*: --set x=null$"
    ):
        open_data(config(other, begun), hashes_in=tmp_path, setting="x")
    with pytest.raises(DataError, match=r"train had 3 images, has 4\."):
        open_data(config(other, begun))


def test_test_images_are_compared_where_they_are_used(raw: Path, tmp_path: Path, begun: dict[str, str]) -> None:
    change_a_pixel(raw / "e.png")
    other = written(raw, tmp_path / "other")
    assert open_data(config(other, begun)) == other
    with pytest.raises(DataError, match="test had 1 images, has 1 and not the same"):
        open_data(config(other, begun), ("test",))


def test_further_labelled_images_are_compared(raw: Path, tmp_path: Path, begun: dict[str, str]) -> None:
    change_a_pixel(raw / "e.png")
    other = written(raw, tmp_path / "other")
    with pytest.raises(DataError, match="test had 1 images, has 1 and not the same"):
        open_data(config(other, begun, further_labeled=["test"]))


def test_a_split_that_is_gone(raw: Path, tmp_path: Path, begun: dict[str, str]) -> None:
    shards = written(raw, tmp_path / "other")
    with pytest.raises(DataError, match="extra had 1 images and is gone"):
        open_data(config(shards, {**begun, "extra": begun["val"]}), None)


@pytest.mark.parametrize("content", [b"", b"PAR1"])
def test_hashes_that_are_damaged_or_of_other_data_only_shorten_the_message(
    raw: Path, tmp_path: Path, begun: dict[str, str], content: bytes
) -> None:
    change_a_pixel(raw / "b.png")
    other = written(raw, tmp_path / "other")
    write_image_hashes(tmp_path, other)
    with pytest.raises(DataError, match="train had 3 images, has 3"):
        open_data(config(other, begun), hashes_in=tmp_path)
    (tmp_path / HASHES_FILE).write_bytes(content)
    with pytest.raises(DataError, match="train had 3 images, has 3"):
        open_data(config(other, begun), hashes_in=tmp_path)


def test_synthetic_data_are_compared_in_the_same_way(tmp_path: Path, begun: dict[str, str]) -> None:
    synthetic = SyntheticConfig(train=3, val=1, test=1, height_px=32, width_px=32)
    drawn = config(Shards(tmp_path / "drawn", open_shards(tmp_path / "first").manifest), None, synthetic=synthetic)
    found = fingerprints(open_data(drawn))
    assert open_data(drawn.model_copy(update={"fingerprint": found}), None)
    with pytest.raises(DataError, match="train had 3 images, has 3 and not the same"):
        open_data(drawn.model_copy(update={"fingerprint": begun}))


@pytest.mark.parametrize(
    ("fingerprint", "more", "message"),
    [
        ({"tran": "1-" + "0" * 32, "val": "1-" + "0" * 32}, {}, "must have the fingerprint of train, or be null"),
        ({"train": "1-0", "val": "1-" + "0" * 32}, {}, "data.fingerprint.train"),
        (
            {"train": "1-" + "0" * 32},
            {"further_labeled": ["test"]},
            "must have the fingerprint of test, or be null",
        ),
    ],
)
def test_a_fingerprint_that_would_check_nothing_is_refused(
    fingerprint: dict[str, str], more: dict[str, object], message: str
) -> None:
    data = {"shards": "x", "labeled": 2, "crop_px": [8, 8], "labeled_batch": 2, "unlabeled_batch": 2, **more}
    training = {
        "data": {**data, "fingerprint": fingerprint},
        "model": {"encoder": "resnet18"},
        "optim": {"lr": 0.1},
        "schedule": {"steps": 2, "eval_every": 1},
    }
    with pytest.raises(ConfigError, match=message):
        parse_train(training, "")


def test_folds_need_no_fingerprint_of_val(tmp_path: Path) -> None:
    begun = {"train": "1-" + "0" * 32}
    data = {"shards": tmp_path, "labeled": 2, "crop_px": (8, 8), "labeled_batch": 2, "unlabeled_batch": 2}
    assert DataConfig.model_validate({**data, "folds": {"count": 2}, "fingerprint": begun}).fingerprint == begun


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folds": {"count": 1}}, "greater than or equal to 2"),
        ({"folds": {"count": 3, "held_out": 3}}, "`held_out` must be below `count`, 3, but got 3"),
        ({"folds": {"count": 3, "held_out": 0, "aside": 3}}, "`aside` must be below `count`, 3, but got 3"),
        ({"folds": {"count": 3, "held_out": 1, "aside": 1}}, "`aside` must be another fold than `held_out`"),
        ({"folds": {"count": 3, "aside": 1}}, "`aside` must be another fold than `held_out`"),
        ({"folds": {"count": 2, "held_out": 0, "aside": 1}}, "`count` must be at least 3 with `aside`"),
        ({"folds": {"count": 3, "group_by": "("}}, "must be a regular expression, but got '\\('"),
        ({"further_labeled": ["train"]}, "must name splits beside train, each once, but got train"),
        ({"further_labeled": ["val", "val"]}, "must name splits beside train, each once, but got val, val"),
        ({"unlabeled": 0}, "unlabeled"),
    ],
)
def test_wrong_folds_and_further_splits_are_refused(settings: dict[str, object], message: str) -> None:
    data = {"shards": Path("x"), "labeled": 2, "crop_px": (8, 8), "labeled_batch": 2, "unlabeled_batch": 2}
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate({**data, **settings})


def test_val_does_not_go_unchecked_where_the_fingerprint_lacks_it(tmp_path: Path, begun: dict[str, str]) -> None:
    shards = open_shards(tmp_path / "first")
    assert open_data(config(shards, begun))
    with pytest.raises(DataError, match="must have that of val, too, or be null for no check"):
        open_data(config(shards, {"train": begun["train"]}))
    assert open_data(config(shards, None))
