"""Shards: what goes in comes out, any row alone, and damage is told."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from cps_ray.datasets.shards import Item, Manifest, decode_image, decode_mask, encode_mask, open_shards, read_rows
from cps_ray.datasets.shards import write_shards as write
from cps_ray.errors import DataError

CLASSES = ("grass", "stone", "water")
PALETTE = ((0, 200, 0), (90, 90, 90), (0, 0, 200))


def png(pixels: NDArray[Any]) -> bytes:
    return bytes(cv2.imencode(".png", pixels)[1])


def item(name: str, seed: int = 0, size: tuple[int, int] = (6, 8), values: Sequence[int] | None = (0, 2, 255)) -> Item:
    """A random image; its mask holds exactly `values`."""
    rng = np.random.default_rng((seed, *name.encode()))
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    if values is None:
        return Item(name, png(image), None)
    mask = np.resize(np.array(values, np.uint8), size)
    return Item(name, png(image), encode_mask(mask))


def write_shards(out: Path, splits: dict[str, list[Item]], rows_per_shard: int = 2) -> Manifest:
    return write(out, splits, classes=CLASSES, palette=PALETTE, made_by="a test", rows_per_shard=rows_per_shard)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train = [item("a"), item("b", values=None), item("c", values=(1,)), item("d", size=(4, 4)), item("e")]
    write_shards(tmp_path / "shards", {"train": train, "val": [item("v")]})
    return tmp_path / "shards"


def test_index_describes_every_row(folder: Path) -> None:
    index = open_shards(folder).index("train")
    assert len(index) == 5
    assert index.ids == ("a", "b", "c", "d", "e")
    assert [Path(file).name for file in index.files] == [f"train-0000{k}.parquet" for k in range(3)]
    assert index.file.tolist() == [0, 0, 1, 1, 2]
    assert index.row.tolist() == [0, 1, 0, 1, 0]
    assert index.height.tolist() == [6, 6, 6, 4, 6]
    assert index.width.tolist() == [8, 8, 8, 4, 8]
    assert index.labeled.tolist() == [True, False, True, True, True]
    assert index.presence.tolist() == [
        [True, False, True],
        [False, False, False],
        [False, True, False],
        [True, False, True],
        [True, False, True],
    ]


def test_rows_come_in_the_order_asked_bytes_as_they_went_in(folder: Path) -> None:
    index = open_shards(folder).index("train")
    found = read_rows(index.files, [(2, 0), (0, 1), (1, 1), (0, 0), (2, 0)])
    assert [entry.id for entry in found] == ["e", "b", "d", "a", "e"]
    for entry, wanted in zip(
        found, [item("e"), item("b", values=None), item("d", size=(4, 4)), item("a")], strict=False
    ):
        assert (entry.image, entry.mask) == (wanted.image, wanted.mask)


def test_masks_are_left_out_on_demand(folder: Path) -> None:
    index = open_shards(folder).index("train")
    assert read_rows(index.files, [(0, 0)], masks=False)[0].mask is None


def test_manifest_counts(folder: Path) -> None:
    manifest = open_shards(folder).manifest
    assert (manifest.classes, manifest.palette, manifest.made_by.format) == (CLASSES, PALETTE, "a test")
    train = manifest.splits["train"]
    assert (train.images, train.masks) == (5, 4)
    assert train.class_images == (3, 1, 3)
    pixels = sum(np.bincount(decode_mask(m).ravel(), minlength=256) for i in "ace" if (m := item(i).mask) is not None)
    assert train.class_pixels[1] == 48
    assert train.class_pixels[0] == pixels[0] * 2 // 3 + 6  # a and e have one mask; d has 4x4 px


def test_same_items_same_bytes(folder: Path, tmp_path: Path) -> None:
    train = [item("a"), item("b", values=None), item("c", values=(1,)), item("d", size=(4, 4)), item("e")]
    write_shards(tmp_path / "again", {"train": train, "val": [item("v")]})
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_decoding_is_rgb() -> None:
    blue_in_bgr = np.zeros((2, 3, 3), np.uint8)
    blue_in_bgr[..., 0] = 250
    assert decode_image(png(blue_in_bgr))[0, 0].tolist() == [0, 0, 250]


def test_one_image_is_one_row_group_without_compression(folder: Path) -> None:
    import pyarrow.parquet as pq

    meta = pq.ParquetFile(folder / "train-00000.parquet").metadata
    assert meta.num_row_groups == 2
    assert {meta.row_group(0).column(k).compression for k in range(meta.num_columns)} == {"UNCOMPRESSED"}
    assert not any("DICT" in str(meta.row_group(0).column(k).encodings) for k in range(meta.num_columns))


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ({"train": [Item("x", b"no image", None)]}, r"train item 'x': image cannot be decoded \(8 bytes"),
        ({"train": [Item("x", b"", None)]}, r"train item 'x': image cannot be decoded \(0 bytes"),
        (
            {"train": [Item("x", b"version https://git-lfs.github.com/spec/v1\n", None)]},
            "Git LFS pointer.*git lfs pull",
        ),
        (
            {"train": [Item("x", item("x").image, item("y", size=(8, 6)).mask)]},
            "train item 'x'.*image is 8x6 px and the mask 6x8 px; export both",
        ),
        ({"train": [item("x", values=(0, 3, 9))]}, r"mask ids must be in 0..2 or 255 \(ignore\), but got \[3, 9\]"),
        (
            {"train": [Item("x", item("x").image, item("x").image)]},
            r"mask must have one channel of uint8, .*\(6, 8, 3\)",
        ),
        ({"train": [item("x")], "val": [item("x", seed=1)]}, "val item 'x': ids must be unique, but train has it"),
        (
            {"train": [item("x")], "val": [Item("y", item("x").image, None)]},
            "val item 'y': train holds the very same image",
        ),
        ({"train": [item("x")], "val": []}, "split 'val': it must have at least one image"),
    ],
)
def test_bad_items_are_named_and_leave_nothing_behind(tmp_path: Path, splits: dict[str, list[Item]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        write_shards(tmp_path / "shards", splits)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_jpeg_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = bytes(cv2.imencode(".jpg", noise)[1])
    with pytest.raises(DataError, match="train item 'x': image cannot be decoded"):
        write_shards(tmp_path / "shards", {"train": [Item("x", data[: len(data) // 2], None)]})


def test_an_existing_folder_is_refused_and_kept(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(DataError, match="already exists; remove it or name another"):
        write_shards(folder, {"train": [item("a")]})
    assert (folder / "manifest.json").read_bytes() == before


def test_missing_shards_say_how_to_make_them(tmp_path: Path) -> None:
    said = r"shards: no shards here \(manifest.json is missing\). Make them: "
    with pytest.raises(DataError, match=said + "make data"):
        open_shards(tmp_path / "shards", "make data")
    with pytest.raises(DataError, match=said + "python -m cps_ray.prepare"):
        open_shards(tmp_path / "shards")


def test_unknown_split_lists_those_there(folder: Path) -> None:
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        open_shards(folder).index("test")


def test_a_foreign_manifest_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(DataError, match=r"manifest.json: version is wrong .*; prepare the data set again"):
        open_shards(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "train-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"train-00001.parquet: cannot be read"):
        open_shards(folder).index("train")


def test_a_flipped_byte_is_found(folder: Path) -> None:
    path = folder / "train-00000.parquet"
    data, image = path.read_bytes(), item("a").image
    at = data.index(image) + len(image) // 2
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    files = open_shards(folder).index("train").files
    said = r"train-00000.parquet: row 0 \(a\): image checksum does not match; the file is damaged, prepare again"
    with pytest.raises(DataError, match=said):
        read_rows(files, [(0, 1), (0, 0)])
    assert [entry.id for entry in read_rows(files, [(0, 1)])] == ["b"]
    assert [entry.id for entry in read_rows(files, [(0, 0)], verify=False)] == ["a"]


def test_a_cut_file_is_found(folder: Path) -> None:
    path = folder / "train-00000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-00000.parquet: cannot be read"):
        open_shards(folder).index("train")
