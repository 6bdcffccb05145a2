"""Sources become one shard, the unit of parallel work: any process may do any job, in any order, and repeatedly.

A shard is complete when its report lies beside it; both appear whole or not at all. A report names what its shard was made
from, so that work that was killed continues where it was, and a raw file that changed is read again.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cps_ray import __version__
from cps_ray.datasets.prepare.findings import BadItemError, Finding
from cps_ray.datasets.prepare.items import Item, MakeItem, Source
from cps_ray.datasets.shards import SHARD_SCHEMA, sha256
from cps_ray.files import write_text, write_whole

_SHARD_BYTES = 64 * 2**20
_SHARD_IMAGES = 512
"""Limits of one shard: what one task does, and what a kill costs. Reading does not depend on them: see `ImageLocations`."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to be written."""

    folder: str
    split: str
    number: int
    """Position of the shard in its split, from 0."""
    sources: tuple[Source, ...]
    make_item: MakeItem
    source_keys: tuple[str, ...]
    """See `source_key`; computed before any file is read: a file that changes meanwhile is read again next time."""
    known: Mapping[str, "WrittenRow"] = field(default_factory=dict)
    """Key of a source -> where an earlier call has written it."""
    threads: int = 1
    """Images that are read at once."""

    @property
    def key(self) -> str:
        """Checksum of what the shard is made from."""
        return hashlib.sha256("".join((self.split, *self.source_keys)).encode()).hexdigest()

    @property
    def path(self) -> Path:
        """Path of the shard until the folder is whole; its report has the same name with the suffix .json.

        It names what the shard is made from, so no shard is overwritten by one of other images, which may need it.
        """
        return Path(self.folder) / f"{self.split}-{self.number:05d}.{self.key[:16]}.parquet"


@dataclass(frozen=True)
class WrittenRow:
    """An image in a shard that an earlier call has written."""

    path: str
    row: dict[str, Any]
    """See `ShardReport.rows`."""


@dataclass(frozen=True)
class ShardReport:
    """What a job did: one row per image written, and what was found."""

    key: str
    """See `ShardJob.key`."""
    split: str
    number: int
    images: int
    """Number of images read, also those that cannot be used."""
    rows: list[dict[str, Any]]
    """Rows of INDEX_SCHEMA without `file`, checksums in hex; and what checks of the data set need: see `_row`."""
    path: str
    """Path of the shard."""
    bytes: int
    """Size of the shard; 0 without rows."""
    sha256: str
    """Checksum of the shard in hex; empty without rows."""
    findings: tuple[Finding, ...]
    """Images and masks that cannot be used."""

    @property
    def final_name(self) -> str:
        """Name of the shard once the folder is whole."""
        return f"{self.split}-{self.number:05d}.parquet"


def source_key(source: Source, make_item: MakeItem) -> str:
    """Returns a checksum of what an image is made from: version, settings, id, and the files' sizes and times."""
    states = tuple(map(_file_state, source.paths))
    return hashlib.sha256(repr((__version__, make_item, source, states)).encode()).hexdigest()[:32]


def cut_into_jobs(
    folder: Path, split: str, sources: Sequence[Source], make_item: MakeItem, threads: int = 1
) -> list[ShardJob]:
    """Returns the jobs of a split. Where shards end depends on the sources alone, so the same input gives the same bytes."""
    batches: list[list[Source]] = []
    batch_bytes = 0
    for source in sources:
        source_bytes = source.num_bytes + sum(_file_state(path)[1] for path in source.paths)
        if not batches or batch_bytes + source_bytes > _SHARD_BYTES or len(batches[-1]) == _SHARD_IMAGES:
            batches.append([])
            batch_bytes = 0
        batches[-1].append(source)
        batch_bytes += source_bytes
    return [make_job(folder, split, number, batch, make_item, threads) for number, batch in enumerate(batches)]


def make_job(
    folder: Path, split: str, number: int, sources: Sequence[Source], make_item: MakeItem, threads: int
) -> ShardJob:
    """Returns the job of these sources."""
    keys = tuple(source_key(source, make_item) for source in sources)
    return ShardJob(str(folder), split, number, tuple(sources), make_item, keys, threads=threads)


def _file_state(path: str | None) -> tuple[str, int, int]:
    """Returns (path, bytes, modification time in ns) of a file; zeros where there is none."""
    if not path:
        return "", 0, 0
    try:
        status = os.stat(path)
    except OSError:
        return path, 0, 0
    return path, status.st_size, status.st_mtime_ns


def finished_reports(folder: Path) -> dict[str, ShardReport]:
    """Returns key -> report of every shard that is complete in the folder."""
    reports = {}
    for path in sorted(folder.glob("*.json")):
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            findings = tuple(Finding(**finding) for finding in fields.pop("findings"))
            report = ShardReport(**fields, findings=findings)
        except (OSError, ValueError, TypeError, KeyError):
            continue
        # The second path: a kill came while the shards got their names.
        for shard in (report.path, str(folder / report.final_name)):
            # The size shows whether a shard was cut off; other damage shows when images are read and compared with checksums.
            if not report.rows or _file_state(shard)[1] == report.bytes:
                reports[report.key] = replace(report, path=shard)
                break
    return reports


def write_shard(job: ShardJob) -> ShardReport:
    """Does a job: reads, checks and writes its images. Those that cannot be used are left out and reported."""
    pairs = list(zip(job.sources, job.source_keys, strict=True))
    if job.threads > 1:
        with ThreadPoolExecutor(job.threads) as pool:
            made = list(pool.map(partial(_make_row, job), pairs))
    else:
        made = [_make_row(job, pair) for pair in pairs]
    written = [row for row in made if isinstance(row, _Row)]
    findings = tuple(row for row in made if isinstance(row, Finding))
    rows, size, checksum = _write_parquet(job.path, written) if written else ([], 0, "")
    report = ShardReport(
        key=job.key,
        split=job.split,
        number=job.number,
        images=len(job.sources),
        rows=rows,
        path=str(job.path),
        bytes=size,
        sha256=checksum,
        findings=findings,
    )
    # Last, because a report says that the shard beside it is complete.
    write_text(
        job.path.with_suffix(".json"),
        json.dumps({**vars(report), "findings": [asdict(finding) for finding in findings]}),
    )
    return report


@dataclass(frozen=True, slots=True)
class _Row:
    """An image on its way into a shard."""

    image: bytes
    mask: bytes | None
    facts: dict[str, Any]
    """The row of the report without where image and mask lie."""


def _make_row(job: ShardJob, pair: tuple[Source, str]) -> _Row | Finding:
    source, key = pair
    earlier = job.known.get(key)
    if earlier is not None and (row := _copied(earlier)) is not None:
        return row
    try:
        item = job.make_item(source)
    except BadItemError as bad:
        return replace(bad.finding, image_id=source.id)
    except Exception as error:
        error.add_note(f"at {source.image or source.id}")
        raise
    return _Row(item.image, item.mask, _facts(item, key))


def _copied(earlier: WrittenRow) -> _Row | None:
    """Returns the image from an earlier shard; None if that is not what it was."""
    row = earlier.row
    try:
        with open(earlier.path, "rb") as file:
            image = os.pread(file.fileno(), row["image_bytes"], row["image_at"])
            mask = None if row["mask_at"] is None else os.pread(file.fileno(), row["mask_bytes"], row["mask_at"])
    except OSError:
        return None
    if sha256(image).hex() != row["image_sha256"] or (mask is not None and sha256(mask).hex() != row["mask_sha256"]):
        return None
    return _Row(image, mask, {name: value for name, value in row.items() if name not in ("image_at", "mask_at")})


def _write_parquet(path: Path, written: Sequence[_Row]) -> tuple[list[dict[str, Any]], int, str]:
    """Writes the shard; returns its rows for the index, its size in bytes and its checksum in hex."""
    columns: Mapping[str, list[Any]] = {
        "id": [row.facts["id"] for row in written],
        "image": [row.image for row in written],
        "mask": [row.mask for row in written],
        "height": [row.facts["height"] for row in written],
        "width": [row.facts["width"] for row in written],
    }
    # Plain and uncompressed, so that each image lies in the file as it is, to be read without Parquet.
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    table = pa.table(columns, schema=SHARD_SCHEMA)

    def write(temporary: Path) -> tuple[list[int | None], list[int | None], int, str]:
        pq.write_table(table, temporary, version="2.6", **plain)
        # Read back before it is in place: a shard whose bytes cannot be found is never there.
        with temporary.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            image_offsets, mask_offsets = (_value_offsets(data, columns[name]) for name in ("image", "mask"))
            return image_offsets, mask_offsets, len(data), hashlib.sha256(data).hexdigest()

    image_offsets, mask_offsets, size, checksum = write_whole(path, write)
    places = zip(written, image_offsets, mask_offsets, strict=True)
    rows = [row.facts | {"image_at": image_at, "mask_at": mask_at} for row, image_at, mask_at in places]
    return rows, size, checksum


def _value_offsets(data: mmap.mmap, values: Sequence[bytes | None]) -> list[int | None]:
    """Returns the first byte of every value of a column, None where the value is null."""
    offsets: list[int | None] = []
    offset = 0
    for value in values:
        if value is not None:
            # Parquet's plain encoding: values in order, each behind its length in 4 bytes. pyarrow does not say where.
            offset = data.find(len(value).to_bytes(4, "little") + value, offset) + 4
            assert offset >= 4, "Parquet's plain encoding has changed"
        offsets.append(None if value is None else offset)
    return offsets


def _facts(item: Item, key: str) -> dict[str, Any]:
    """Returns the row of an item in its shard's report, as JSON has it, without where image and mask lie."""
    present = np.flatnonzero(item.pixels)
    return {
        "id": item.id,
        "image_bytes": len(item.image),
        "image_sha256": sha256(item.image).hex(),
        "mask_bytes": None if item.mask is None else len(item.mask),
        "mask_sha256": None if item.mask is None else sha256(item.mask).hex(),
        "height": item.size[0],
        "width": item.size[1],
        "classes": present.tolist(),
        "pixels": item.pixels[present].tolist(),
        "perceptual_hash": item.perceptual_hash,
        "pixels_sha256": item.pixels_sha256.hex(),
        "train_ids_sha256": None if item.train_ids_sha256 is None else item.train_ids_sha256.hex(),
        # What follows is no column of the index.
        "source_key": key,
        "values": [list(pair) for pair in item.values.items()],
        "edges": list(item.edges),
        "peak": item.peak,
        "palette": [list(pair) for pair in item.palette.items()],
        "aside": item.aside,
        "shown": list(item.shown),
    }
