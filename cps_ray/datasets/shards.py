"""Shards, the on-disk form of every data set, and their only reader.

A shard is a Parquet file of encoded images and masks, one row an image. Beside the shards lie `manifest.json` and one index
per split, a Parquet file too: all that is known of each image, and at which byte of which shard it is. So reading an image
reads its own bytes and nothing else, whatever the size of shards and row groups, and a pass in random order is as fast as
one in file order. Image bytes stay as they came (JPEG, PNG); masks are grey PNGs of train ids 0..C-1, or 255 where a pixel
counts in no loss and no metric.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from cps_ray.config.section import Section
from cps_ray.errors import DataError

MANIFEST = "manifest.json"
SHARD_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("mask", pa.binary()),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
    ]
)
# `*_at` and `*_bytes`: where in its Parquet file an encoded image or mask begins, and how long it is, in bytes.
INDEX_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("file", pa.int32(), nullable=False),
        pa.field("image_at", pa.int64(), nullable=False),
        pa.field("image_bytes", pa.int64(), nullable=False),
        pa.field("image_sha256", pa.binary(32), nullable=False),
        pa.field("mask_at", pa.int64()),
        pa.field("mask_bytes", pa.int64()),
        pa.field("mask_sha256", pa.binary(32)),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("classes", pa.list_(pa.uint8()), nullable=False),
        pa.field("pixels", pa.list_(pa.int64()), nullable=False),
        pa.field("perceptual_hash", pa.uint64(), nullable=False),
        pa.field("pixels_sha256", pa.binary(32), nullable=False),
        pa.field("train_ids_sha256", pa.binary(32)),
    ]
)


class MadeBy(Section):
    """Where the shards come from."""

    cps_ray: str
    """Version of this package."""
    format: str
    """The raw format and its settings, in words."""


class ShardFile(Section):
    """One Parquet file of images."""

    name: str
    images: int
    bytes: int
    sha256: str


class Split(Section):
    """One split, as the manifest lists it."""

    images: int
    masks: int
    files: tuple[ShardFile, ...]
    index: str
    """Name of the index file."""
    index_sha256: str
    class_pixels: tuple[int, ...]
    """Number of pixels of each class, over all masks."""
    class_images: tuple[int, ...]
    """Number of masks that show each class."""
    sha256: str
    """Checksum of the ids and checksums of all rows: two equal values are the same data in the same order."""
    fingerprint: str
    """Checksum of ids, pixels and train ids; see `fingerprint`."""


class Tiles(Section):
    """How training images were cut: ids end in `_yTOP_xLEFT`, the first pixel of the tile in the upright image."""

    size_px: int
    """Height and width of a tile, unless the image is smaller."""
    overlap_px: int
    """Pixels that neighbours share at least; those at the right and lower end may share more."""


class LeftOut(Section):
    """A file that `prepare --skip-bad` left out."""

    file: str
    why: str


class Manifest(Section):
    """Content of `manifest.json`."""

    version: Literal[3]
    made_by: MadeBy
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    """(r, g, b) in 0..255 per class."""
    splits: dict[str, Split]
    bands: tuple[int, ...] | None = None
    """Numbers, from 1, of the bands of the raw images that became red, green and blue. None: they were grey or RGB."""
    value_range: tuple[float, float] | tuple[tuple[float, float], ...] | None = None
    """Values, of all bands or of each, that became black and white in raw images of more than 8 bits. None: all of their range."""
    tiles: Tiles | None = None
    """None: images are whole."""
    notes: tuple[str, ...] = ()
    """What was decided, and what was found to be odd, when the raw files were read."""
    left_out: tuple[LeftOut, ...] = ()
    sha256: str = ""
    """Checksum of all of the above; empty: not checked, for those who edit the file by hand."""

    def signed(self) -> Self:
        """Returns the same manifest with its checksum."""
        return self.model_copy(update={"sha256": _checksum(self.model_dump(mode="json"))})


def _checksum(content: dict[str, Any]) -> str:
    """Returns the SHA-256 of a manifest as JSON, without its own checksum: of its content, not of spaces and the order of keys."""
    text = json.dumps({key: value for key, value in content.items() if key != "sha256"}, sort_keys=True)
    return sha256(text.encode()).hex()


@dataclass(frozen=True, slots=True)
class Encoded:
    """The bytes of one image as they were read, and those of its mask if it has one and masks were asked for."""

    id: str
    image: bytes
    mask: bytes | None


def sha256(*parts: bytes | NDArray[np.uint8]) -> bytes:
    """Returns the SHA-256 checksum of bytes, one part after the other: 32 bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class ImageLocations:
    """Where N images lie: all that reading them takes. Small, and can be pickled and sent to any process."""

    files: tuple[str, ...]
    """Absolute paths of the shards."""
    ids: tuple[str, ...]
    file: NDArray[np.int32]
    """(N,) index into `files`."""
    image: NDArray[np.int64]
    """(N, 2) offset of the first byte in the file, number of bytes."""
    image_sha256: NDArray[np.uint8]
    """(N, 32) checksums of the encoded images."""
    mask: NDArray[np.int64]
    """(N, 2) the same for masks; 0 bytes without one."""
    mask_sha256: NDArray[np.uint8]
    """(N, 32) checksums of the encoded masks."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray[np.int64]) -> "ImageLocations":
        """Returns the locations of these rows, in their order."""
        return ImageLocations(
            files=self.files,
            ids=tuple(self.ids[row] for row in rows),
            file=self.file[rows],
            image=self.image[rows],
            image_sha256=self.image_sha256[rows],
            mask=self.mask[rows],
            mask_sha256=self.mask_sha256[rows],
        )

    def read(self, rows: Sequence[int], *, masks: bool = True) -> list[Encoded]:
        """Reads encoded images, in the order of `rows`; opens every file once, and compares checksums.

        `masks=False` reads no mask at all. DataError if a file is missing or damaged.
        """
        # Descriptors live for this call alone, so the object holds no open file: any process and any thread can use it.
        opened: dict[int, int] = {}
        try:
            return [self._read(int(row), masks, opened) for row in rows]
        finally:
            for descriptor in opened.values():
                os.close(descriptor)

    def _read(self, row: int, masks: bool, opened: dict[int, int]) -> Encoded:
        file = int(self.file[row])
        if file not in opened:
            try:
                opened[file] = os.open(self.files[file], os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{self.files[file]}: cannot be read ({error.strerror}); prepare again.") from None
        image = self._read_bytes(opened[file], row, "image", self.image, self.image_sha256)
        has_mask = masks and self.mask[row, 1] > 0
        mask = self._read_bytes(opened[file], row, "mask", self.mask, self.mask_sha256) if has_mask else None
        return Encoded(self.ids[row], image, mask)

    def _read_bytes(
        self, descriptor: int, row: int, kind: str, spans: NDArray[np.int64], checksums: NDArray[np.uint8]
    ) -> bytes:
        first, count = map(int, spans[row])
        try:
            # Reads at an offset without moving one: no seek, and no state in the descriptor.
            data = os.pread(descriptor, count, first)
        except OSError as error:
            raise DataError(f"{self.files[self.file[row]]}: cannot be read ({error.strerror}).") from None
        if len(data) < count or sha256(data) != checksums[row].tobytes():
            raise DataError(
                f"{self.files[self.file[row]]}: the {kind} of {self.ids[row]} (bytes {first} to {first + count}) does not "
                "match its checksum; the file is damaged, prepare again."
            )
        return data


@dataclass(frozen=True, slots=True)
class Index:
    """What is known of the N images of one split without decoding them; C classes."""

    locations: ImageLocations
    height: NDArray[np.int32]
    """(N,) in px."""
    width: NDArray[np.int32]
    """(N,) in px."""
    pixels: NDArray[np.int64]
    """(N, C) number of pixels of each class; zeros without a mask."""
    perceptual_hash: NDArray[np.uint64]
    """(N,) hashes of the images' pixels; see `images.perceptual_hash`."""
    pixels_sha256: NDArray[np.uint8]
    """(N, 32) checksums of the decoded images."""
    train_ids_sha256: NDArray[np.uint8]
    """(N, 32) checksums of the decoded masks; zeros without one."""

    def __len__(self) -> int:
        return len(self.locations)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the images, N of them."""
        return self.locations.ids

    @property
    def labeled(self) -> NDArray[np.bool_]:
        """Whether each image has a mask: (N,)."""
        return self.locations.mask[:, 1] > 0

    @property
    def presence(self) -> NDArray[np.bool_]:
        """Whether each image's mask shows each class: (N, C); all False without a mask."""
        return self.pixels > 0

    def take(self, rows: NDArray[np.int64]) -> "Index":
        """Returns the index of these rows, in their order."""
        _, *columns = (field.name for field in fields(self))
        return Index(self.locations.take(rows), *(getattr(self, name)[rows] for name in columns))


def joined(indexes: Sequence[Index]) -> Index:
    """Returns the images of several splits of one data set, one split after the other. DataError if two have an id in common."""
    every = [index.locations for index in indexes]
    ids = [image_id for each in every for image_id in each.ids]
    if len({*ids}) < len(ids):
        repeated = next(key for key, count in Counter(ids).items() if count > 1)
        raise DataError(f"ids must be unique over all splits, but {repeated!r} is not; prepare the data set again.")
    first_file = np.cumsum([0, *(len(each.files) for each in every)])
    locations = ImageLocations(
        files=tuple(file for each in every for file in each.files),
        ids=tuple(ids),
        file=np.concatenate([each.file + np.int32(first) for each, first in zip(every, first_file, strict=False)]),
        **{
            name: np.concatenate([getattr(each, name) for each in every])
            for name in ("image", "image_sha256", "mask", "mask_sha256")
        },
    )
    _, *columns = (field.name for field in fields(Index))
    return Index(locations, *(np.concatenate([getattr(each, name) for each in indexes]) for name in columns))


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
        """Reads the index of a split. DataError if there is no such split, or its index is missing or damaged."""
        if split not in self.manifest.splits:
            raise DataError(f"{self.folder}: no split {split!r}; it has {', '.join(self.manifest.splits)}.")
        entry = self.manifest.splits[split]
        path = self.folder / entry.index
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); prepare the data set again.") from None
        if sha256(data).hex() != entry.index_sha256:
            raise DataError(f"{path}: does not match its checksum in {MANIFEST}; it is damaged, prepare again.")
        files = tuple(str(self.folder / file.name) for file in entry.files)
        # Parses the bytes that were checked, and does not open the file again.
        return index_of(pq.read_table(io.BytesIO(data)), files, len(self.classes))


def _checksums(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    # An image without a mask has no mask checksum: 32 zeros keep the rows aligned.
    return np.frombuffer(b"".join(value or bytes(32) for value in column.to_pylist()), np.uint8).reshape(-1, 32)


def index_of(rows: pa.Table, files: tuple[str, ...], classes: int) -> Index:
    """Returns the index with these rows of INDEX_SCHEMA; their `file` is an index into `files`. `classes`: how many there are."""
    pixels = np.zeros((rows.num_rows, classes), np.int64)
    # A row stores only the classes that its mask shows: pairs of a class and its number of pixels.
    for row, (labels, counts) in enumerate(zip(rows["classes"].to_pylist(), rows["pixels"].to_pylist(), strict=True)):
        pixels[row, labels] = counts
    image, mask = (
        np.stack([rows[f"{kind}_{column}"].fill_null(0).to_numpy() for column in ("at", "bytes")], axis=1)
        for kind in ("image", "mask")
    )
    locations = ImageLocations(
        files=files,
        ids=tuple(rows["id"].to_pylist()),
        file=rows["file"].to_numpy(),
        image=image,
        image_sha256=_checksums(rows["image_sha256"]),
        mask=mask,
        mask_sha256=_checksums(rows["mask_sha256"]),
    )
    return Index(
        locations,
        rows["height"].to_numpy(),
        rows["width"].to_numpy(),
        pixels,
        rows["perceptual_hash"].to_numpy(),
        _checksums(rows["pixels_sha256"]),
        _checksums(rows["train_ids_sha256"]),
    )


def image_hashes(index: Index) -> dict[str, bytes]:
    """Returns id -> 8 bytes of each image of a split: of its decoded pixels and the train ids of its mask."""
    rows = zip(index.ids, index.pixels_sha256, index.train_ids_sha256, strict=True)
    return {image_id: sha256(pixels.tobytes(), train_ids.tobytes())[:8] for image_id, pixels, train_ids in rows}


def fingerprint(index: Index) -> str:
    """Returns `IMAGES-HEX` of a split: equal where ids, decoded images and train ids are, in any order, shards and encoding."""
    return fingerprint_of(image_hashes(index))


def fingerprint_of(hashes: Mapping[str, bytes]) -> str:
    """Returns the fingerprint of a split with these `image_hashes`."""
    text = (image_id.encode() + b"\0" + hashes[image_id] for image_id in sorted(hashes))
    return f"{len(hashes)}-{sha256(*text).hex()[:32]}"


def open_shards(folder: Path, prepare: str | None = None) -> Shards:
    """Opens a prepared folder and checks its manifest.

    DataError if there is none, if it is of another version, or damaged. `prepare` is the command that makes the shards; the
    message shows it if they are missing.
    """
    folder = folder.absolute()
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        manifest = Manifest.model_validate_json(text)
    except (FileNotFoundError, NotADirectoryError):
        how = prepare or f"python -m cps_ray.prepare FORMAT RAW {folder}"
        raise DataError(f"{folder}: no shards here ({MANIFEST} is missing). Make them: {how}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{path}: {key} is wrong ({first['msg']}); prepare the data set again.") from None
    # Over the JSON as it stands in the file, before the model fills in defaults.
    if manifest.sha256 not in ("", _checksum(json.loads(text))):
        raise DataError(
            f"{path}: does not match its own checksum; if it was edited by hand, empty its `sha256`, else it is damaged: "
            "prepare the data set again."
        )
    return Shards(folder, manifest)
