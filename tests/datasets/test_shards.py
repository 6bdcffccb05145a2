"""Shards: what goes in comes out, one image at a time if need be, and a flipped byte is found."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from trees import CLASSES, COLORS, pair, patches, plan

from cps_ray.datasets.images import decode_mask
from cps_ray.datasets.prepare import writing
from cps_ray.datasets.prepare.assembly import write_shards
from cps_ray.datasets.shards import Encoded, open_shards
from cps_ray.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of shards with five images of `train` in three files, b without a mask, d of another size, and one of `val`."""
    monkeypatch.setattr(writing, "_SHARD_IMAGES", 2)
    raw = tmp_path / "raw"
    train = [
        pair(raw, "a", values=(0, 2, 255)),
        pair(raw, "b", masked=False),
        pair(raw, "c", values=(1,)),
        pair(raw, "d", size=(8, 16)),
        pair(raw, "e", values=(0, 255)),
    ]
    write_shards(tmp_path / "shards", plan({"train": train, "val": [pair(raw, "v")]}))
    return tmp_path / "shards"


def everything(folder: Path) -> tuple[object, list[Encoded]]:
    """Returns all that a training can see of a shard folder: manifest and indexes, and every image."""
    shards = open_shards(folder)
    indexes = [shards.index(split) for split in shards.manifest.splits]
    description = [
        shards.manifest,
        *((index.height.tolist(), index.width.tolist(), index.pixels.tolist()) for index in indexes),
    ]
    return description, [encoded for index in indexes for encoded in index.locations.read(range(len(index)))]


def test_the_index_describes_every_image(folder: Path) -> None:
    index = open_shards(folder).index("train")
    assert len(index) == 5
    assert index.ids == ("a", "b", "c", "d", "e")
    assert [Path(file).name for file in index.locations.files] == [f"train-0000{number}.parquet" for number in range(3)]
    assert index.locations.file.tolist() == [0, 0, 1, 1, 2]
    assert index.height.tolist() == [24, 24, 24, 8, 24]
    assert index.width.tolist() == [32, 32, 32, 16, 32]
    assert index.labeled.tolist() == [True, False, True, True, True]
    assert index.presence.astype(int).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert index.pixels[2].tolist() == [0, 24 * 32, 0]


def test_images_come_in_the_order_asked_bytes_as_they_were(folder: Path) -> None:
    locations = open_shards(folder).index("train").locations
    images = locations.read([4, 1, 3, 0, 4])
    assert [encoded.id for encoded in images] == ["e", "b", "d", "a", "e"]
    for encoded in images:
        assert encoded.image == (folder.parent / f"raw/{encoded.id}.png").read_bytes()
    assert images[1].mask is None
    assert images[3].mask is not None
    assert np.array_equal(decode_mask(images[3].mask), patches("a", (0, 2, 255)))


def test_locations_of_some_rows_can_be_pickled(folder: Path) -> None:
    locations = open_shards(folder).index("train").locations
    pickled = pickle.loads(pickle.dumps(locations.take(np.array([3, 0]))))
    assert pickled.ids == ("d", "a")
    assert pickled.read([0, 1]) == locations.read([3, 0])


def test_masks_are_left_out_on_demand(folder: Path) -> None:
    assert open_shards(folder).index("train").locations.read([0], masks=False)[0].mask is None


def test_the_manifest_counts(folder: Path) -> None:
    manifest = open_shards(folder).manifest
    assert (manifest.classes, manifest.palette, manifest.made_by.format) == (CLASSES, COLORS, "a test")
    train = manifest.splits["train"]
    assert (train.images, train.masks) == (5, 4)
    assert [file.images for file in train.files] == [2, 2, 1]
    assert [file.bytes for file in train.files] == [(folder / file.name).stat().st_size for file in train.files]
    assert train.class_images == (3, 2, 2)
    masks = [patches("a", (0, 2, 255)), patches("c", (1,)), patches("d", (0, 1, 2), (8, 16)), patches("e", (0, 255))]
    counts = np.bincount(np.concatenate([mask.ravel() for mask in masks]), minlength=256)
    assert train.class_pixels == tuple(counts[:3].tolist())


def test_shards_are_parquet_that_anything_reads(folder: Path) -> None:
    table = pq.read_table(folder / "train-00001.parquet")
    assert table["id"].to_pylist() == ["c", "d"]
    assert table["image"][1].as_py() == (folder.parent / "raw/d.png").read_bytes()
    assert table["height"].to_pylist() == [24, 8]


def test_missing_shards_say_how_to_make_them(tmp_path: Path) -> None:
    message = r"shards: no shards here \(manifest.json is missing\). Make them: "
    with pytest.raises(DataError, match=message + "make data"):
        open_shards(tmp_path / "shards", "make data")
    with pytest.raises(DataError, match=message + "python -m cps_ray.prepare"):
        open_shards(tmp_path / "shards")


def test_an_unknown_split_lists_the_known_ones(folder: Path) -> None:
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        open_shards(folder).index("test")


def rewritten(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_manifest_of_another_version_is_refused(folder: Path) -> None:
    rewritten(folder, version=1)
    with pytest.raises(DataError, match=r"manifest.json: version is wrong .*; prepare the data set again"):
        open_shards(folder)


def test_a_manifest_is_edited_on_purpose_or_not_at_all(folder: Path) -> None:
    rewritten(folder)  # other spaces are no change
    open_shards(folder)
    rewritten(folder, classes=["lawn", "stone", "water"])
    with pytest.raises(
        DataError, match="does not match its own checksum; if it was edited by hand, empty its `sha256`"
    ):
        open_shards(folder)
    rewritten(folder, sha256="")
    assert open_shards(folder).classes == ("lawn", "stone", "water")


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "train-00001.parquet").unlink()
    locations = open_shards(folder).index("train").locations
    assert locations.read([0])[0].id == "a"
    with pytest.raises(DataError, match=r"train-00001.parquet: cannot be read \(No such file"):
        locations.read([0, 2])
    (folder / "train.index.parquet").unlink()
    with pytest.raises(DataError, match=r"train.index.parquet: cannot be read \(No such file"):
        open_shards(folder).index("train")


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_flipped_byte_names_the_shard_and_the_image(folder: Path, kind: str) -> None:
    path = folder / "train-00001.parquet"
    locations = open_shards(folder).index("train").locations
    spans = locations.image if kind == "image" else locations.mask
    data = bytearray(path.read_bytes())
    data[int(spans[3, 0] + spans[3, 1] // 2)] ^= 1
    path.write_bytes(data)
    assert [encoded.id for encoded in locations.read([0, 1, 2, 4])] == ["a", "b", "c", "e"]
    with pytest.raises(
        DataError, match=rf"train-00001.parquet: the {kind} of d \(bytes \d+ to \d+\) does not match its"
    ):
        locations.read([3])


def test_a_shard_that_was_cut_short_is_found(folder: Path) -> None:
    path = folder / "train-00000.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"train-00000.parquet: the image of a .* does not match its checksum"):
        open_shards(folder).index("train").locations.read([0])


def test_any_flipped_byte_is_an_error_or_changes_nothing(folder: Path) -> None:
    """Reading gives the same data or a DataError that names the file: never other data."""
    before = everything(folder)
    rng = np.random.default_rng(0)
    paths = sorted(folder.iterdir())
    assert {path.suffix for path in paths} == {".json", ".parquet"}
    errors_in = dict.fromkeys((path.name for path in paths), 0)
    for attempt in range(210):
        path = paths[attempt % len(paths)]
        good = path.read_bytes()
        data = bytearray(good)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            assert everything(folder) == before, f"{path.name} was read with other content"
        except DataError as error:
            errors_in[path.name] += str(path) in str(error)
        path.write_bytes(good)
    attempts = 210 // len(paths)
    assert all(count >= attempts // 2 for count in errors_in.values()), errors_in
    assert errors_in["train.index.parquet"] == attempts, "every byte of an index counts"
    assert errors_in["manifest.json"] >= 0.7 * attempts, "all of a manifest counts but its spaces"


def test_no_image_is_decoded_to_read_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", None)
    assert len(everything(folder)[1]) == 6
