"""Shards, the on-disk form of every data set: Parquet files of encoded images and masks, and `manifest.json`.

The only writer and the only reader of that form. One image is one row and one row group, hence any image can be read
alone. Image bytes stay as they came (JPEG, PNG); masks are grey PNGs of train ids 0..C-1, or 255 where a pixel counts
in no loss and no metric.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from cps_ray import __version__
from cps_ray.config.section import Section
from cps_ray.engine.batch import IGNORE
from cps_ray.errors import DataError

MANIFEST = "manifest.json"

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("mask", pa.binary()),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("classes", pa.list_(pa.uint8()), nullable=False),
        pa.field("image_sha256", pa.string(), nullable=False),
        pa.field("mask_sha256", pa.string()),
    ]
)


class MadeBy(Section):
    """Where the shards come from."""

    cps_ray: str
    """Version of this package."""
    format: str
    """The raw format and its settings, in words."""


class Split(Section):
    """What the manifest says of one split."""

    images: int
    masks: int
    files: tuple[str, ...]
    """Names inside the folder."""
    class_pixels: tuple[int, ...]
    """Per class, over all masks."""
    class_images: tuple[int, ...]
    """Per class, the number of masks that show it."""
    sha256: str
    """Over the ids and checksums of all rows: two equal values are the same data in the same order."""


class Manifest(Section):
    """`manifest.json`."""

    version: Literal[1]
    made_by: MadeBy
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    """(r, g, b) in 0..255 per class."""
    splits: dict[str, Split]


@dataclass(frozen=True, slots=True)
class Item:
    """One image to be written, with its mask if it has one."""

    id: str
    image: bytes
    """JPEG or PNG."""
    mask: bytes | None
    """PNG, one channel, uint8 train ids 0..C-1 or 255."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One image as it was read, with its mask if it has one and masks were asked for."""

    id: str
    image: bytes
    mask: bytes | None


@dataclass(frozen=True, slots=True)
class Index:
    """Every row of one split, without its bytes; sorted by (file, row)."""

    files: tuple[str, ...]
    """Absolute paths."""
    ids: tuple[str, ...]
    file: NDArray[np.int32]
    """(N,) position in `files`."""
    row: NDArray[np.int32]
    """(N,) row in that file."""
    height: NDArray[np.int32]
    """(N,) in px."""
    width: NDArray[np.int32]
    """(N,) in px."""
    labeled: NDArray[np.bool_]
    """(N,) whether there is a mask."""
    presence: NDArray[np.bool_]
    """(N, C) whether the mask shows the class; all False without a mask."""

    def __len__(self) -> int:
        return len(self.ids)


# ---------------------------------------------------------------------------------------------------------- decoding


def _undecodable(data: bytes) -> str:
    if data.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not an image; fetch the files with `git lfs pull`"
    return f"cannot be decoded ({len(data)} bytes, the first are {data[:8]!r}); get the file again"


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Encoded bytes -> uint8 (H, W, 3) RGB, turned as its EXIF orientation says. DataError if they are no image."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if data else None
    if pixels is None:
        raise DataError(f"image {_undecodable(data)}.")
    return np.asarray(pixels, np.uint8)


def decode_mask(data: bytes) -> NDArray[np.uint8]:
    """PNG bytes -> uint8 (H, W) train ids. DataError if they are no image of one channel of 8 bits."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    if pixels is None:
        raise DataError(f"mask {_undecodable(data)}.")
    if pixels.ndim != 2 or pixels.dtype != np.uint8:
        raise DataError(f"mask must have one channel of uint8, but has shape {pixels.shape} of {pixels.dtype}.")
    return np.asarray(pixels, np.uint8)


def encode_mask(mask: NDArray[np.uint8]) -> bytes:
    """uint8 (H, W) train ids -> PNG bytes."""
    done, data = cv2.imencode(".png", mask)
    assert done
    return bytes(data)


# ----------------------------------------------------------------------------------------------------------- writing


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _histogram(item: Item, size: tuple[int, int], classes: int) -> NDArray[np.int64]:
    """Pixels per class, int64 (C,); zeros without a mask. DataError if the mask does not fit image and classes."""
    if item.mask is None:
        return np.zeros(classes, np.int64)
    mask = decode_mask(item.mask)
    if mask.shape != size:
        raise DataError(
            f"image and mask must have one size, but the image is {size[1]}x{size[0]} px and the mask "
            f"{mask.shape[1]}x{mask.shape[0]} px; export both at one size (masks without interpolation)."
        )
    counts = np.bincount(mask.ravel(), minlength=256)
    strange = [int(value) for value in np.flatnonzero(counts) if value >= classes and value != IGNORE]
    if strange:
        raise DataError(f"mask ids must be in 0..{classes - 1} or {IGNORE} (ignore), but got {strange}; map them.")
    return counts[:classes].astype(np.int64)


def _row(split: str, item: Item, classes: int) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """One checked row of SCHEMA and its pixels per class."""
    try:
        height, width = decode_image(item.image).shape[:2]
        counts = _histogram(item, (height, width), classes)
    except DataError as error:
        raise DataError(f"{split} item {item.id!r}: {error}") from None
    row = {
        "id": item.id,
        "image": item.image,
        "mask": item.mask,
        "height": height,
        "width": width,
        "classes": np.flatnonzero(counts).tolist(),
        "image_sha256": _sha256(item.image),
        "mask_sha256": None if item.mask is None else _sha256(item.mask),
    }
    return row, counts


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _claim(owners: dict[str, str], split: str, row: Mapping[str, Any]) -> None:
    """Records id and content as the split's. DataError where an id is taken, or another split has the same image."""
    if row["id"] in owners:
        raise DataError(f"{split} item {row['id']!r}: ids must be unique, but {owners[row['id']]} has it already.")
    owners[row["id"]] = split
    other = owners.setdefault(f"sha256:{row['image_sha256']}", split)
    if other != split:
        raise DataError(f"{split} item {row['id']!r}: {other} holds the very same image; leave it out of one of them.")


def _write_file(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(
        table, path, row_group_size=1, compression="none", use_dictionary=False, write_statistics=False, version="2.6"
    )


def _write_split(
    folder: Path, split: str, items: Iterable[Item], classes: int, rows_per_shard: int, owners: dict[str, str]
) -> Split:
    files: list[str] = []
    images = masks = 0
    pixels, shown = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    digest = hashlib.sha256()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for batch in _batches(items, rows_per_shard):
            checked = list(pool.map(lambda item: _row(split, item, classes), batch))
            files.append(f"{split}-{len(files):05d}.parquet")
            _write_file(folder / files[-1], [row for row, _ in checked])
            for row, counts in checked:
                _claim(owners, split, row)
                images, masks = images + 1, masks + (row["mask"] is not None)
                pixels += counts
                shown += counts > 0
                digest.update(f"{row['id']}\n{row['image_sha256']}\n{row['mask_sha256']}\n".encode())
    if not images:
        raise DataError(f"split {split!r}: it must have at least one image, but has none.")
    return Split(
        images=images,
        masks=masks,
        files=tuple(files),
        class_pixels=tuple(pixels.tolist()),
        class_images=tuple(shown.tolist()),
        sha256=digest.hexdigest(),
    )


def write_shards(
    out: Path,
    splits: Mapping[str, Iterable[Item]],
    *,
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
    made_by: str,
    rows_per_shard: int = 64,
) -> Manifest:
    """Checks and writes all splits into the new folder `out`: wholly, or not at all.

    Images must decode, masks fit their images and hold train ids 0..C-1 or 255, ids be unique over all splits, and no
    split be empty. DataError otherwise, naming the item, or if `out` exists.
    """
    assert len(classes) == len(palette) <= IGNORE
    if out.exists():
        raise DataError(f"{out}: already exists; remove it or name another folder.")
    unfinished = out.parent / f".{out.name}.{secrets.token_hex(4)}.tmp"
    unfinished.mkdir(parents=True)
    try:
        owners: dict[str, str] = {}
        written = {
            name: _write_split(unfinished, name, items, len(classes), rows_per_shard, owners)
            for name, items in splits.items()
        }
        made = MadeBy(cps_ray=__version__, format=made_by)
        manifest = Manifest(version=1, made_by=made, classes=tuple(classes), palette=tuple(palette), splits=written)
        (unfinished / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        try:
            unfinished.rename(out)
        except OSError as error:
            raise DataError(f"{out}: cannot be put in place ({error.strerror}); was it made meanwhile?") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifest


# ----------------------------------------------------------------------------------------------------------- reading


def _open(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]}); prepare the data set again.") from None


@dataclass(frozen=True, slots=True)
class Shards:
    """An open shard folder."""

    folder: Path
    manifest: Manifest

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by train id."""
        return self.manifest.classes

    def index(self, split: str) -> Index:
        """Every row of the split. DataError if there is no such split or a file is missing or damaged."""
        if split not in self.manifest.splits:
            raise DataError(f"{self.folder}: no split {split!r}; it has {', '.join(self.manifest.splits)}.")
        files = tuple(str(self.folder / name) for name in self.manifest.splits[split].files)
        columns = ["id", "height", "width", "classes", "mask_sha256"]
        tables = [_open(file).read(columns=columns) for file in files]
        rows = pa.concat_tables(tables).combine_chunks()
        sizes = [table.num_rows for table in tables]
        presence = np.zeros((rows.num_rows, len(self.classes)), np.bool_)
        for number, present in enumerate(rows["classes"].to_pylist()):
            presence[number, present] = True
        return Index(
            files=files,
            ids=tuple(rows["id"].to_pylist()),
            file=np.repeat(np.arange(len(files), dtype=np.int32), sizes),
            row=np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
            height=rows["height"].to_numpy(),
            width=rows["width"].to_numpy(),
            labeled=rows["mask_sha256"].is_valid().to_numpy(),
            presence=presence,
        )


def open_shards(folder: Path, prepare: str | None = None) -> Shards:
    """Opens a folder that `write_shards` wrote. `prepare` is how to get it, shown in the DataError if it is missing."""
    folder = folder.absolute()
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        how = prepare or f"python -m cps_ray.prepare FORMAT RAW {folder}"
        raise DataError(f"{folder}: no shards here ({MANIFEST} is missing). Make them: {how}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{path}: {place} is wrong ({first['msg']}); prepare the data set again.") from None
    return Shards(folder, manifest)


def _read_file(path: str, rows: Sequence[int], masks: bool, verify: bool) -> list[Encoded]:
    """The rows of one file, in the order asked."""
    columns = ["id", "image", "image_sha256", *(["mask", "mask_sha256"] if masks else [])]
    with _open(path) as file:
        try:
            table = file.read_row_groups(rows, columns=columns, use_threads=False)
        except (OSError, pa.ArrowException):
            raise DataError(f"{path}: rows {list(rows)} cannot be read; the file is damaged, prepare again.") from None
    found: list[dict[str, Any]] = table.to_pylist()
    for number, entry in zip(rows, found, strict=True):
        for name in ("image", "mask") if verify else ():
            data = entry.get(name)
            if data is not None and _sha256(data) != entry[f"{name}_sha256"]:
                raise DataError(
                    f"{path}: row {number} ({entry['id']}): {name} checksum does not match; "
                    "the file is damaged, prepare again."
                )
    return [Encoded(entry["id"], entry["image"], entry.get("mask")) for entry in found]


def read_rows(
    files: Sequence[str], places: Sequence[tuple[int, int]], *, masks: bool = True, verify: bool = True
) -> list[Encoded]:
    """Encoded images at `places`, (position in files, row) each, in the order asked; every file is opened once.

    `masks=False` reads no mask at all; `verify` compares checksums. DataError if a file is missing or damaged.
    """
    wanted: dict[int, list[int]] = {}
    for file, row in places:
        wanted.setdefault(int(file), []).append(int(row))
    read = {file: iter(_read_file(files[file], rows, masks, verify)) for file, rows in wanted.items()}
    return [next(read[int(file)]) for file, _ in places]
