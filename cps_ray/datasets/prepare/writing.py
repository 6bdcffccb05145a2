"""Sources become one shard, the unit of parallel work: any process may do any job, in any order, and repeatedly.

A shard is complete when its report lies beside it; both appear whole or not at all. A report names what its shard was made
from, so that work that was killed continues where it was, and a raw file that changed is read again.
"""

import hashlib
import json
import mmap
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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

    @property
    def path(self) -> Path:
        """Path of the shard; its report has the same name with the suffix .json."""
        return Path(self.folder) / f"{self.split}-{self.number:05d}.parquet"

    def key(self) -> str:
        """Returns a checksum of what the shard is made from: version, settings, ids, and the files' sizes and times."""
        digest = hashlib.sha256(f"{__version__} {self.split} {self.make_item!r}".encode())
        for source in self.sources:
            digest.update(repr((source, *map(_file_state, source.paths))).encode())
        return digest.hexdigest()


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
    """Rows of INDEX_SCHEMA without `file`; checksums in hex."""
    bytes: int
    """Size of the shard; 0 without rows."""
    sha256: str
    """Checksum of the shard in hex; empty without rows."""
    values: dict[int, int]
    """Number of pixels per raw mask value."""
    edges: tuple[int, int]
    """Number of (sharp, smooth) edges of all masks; see `masks.count_edges`."""
    peak: int | None
    """Largest value of the images with more than 8 bits; None if there are none."""
    findings: tuple[Finding, ...]
    """Images and masks that cannot be used."""


def cut_into_jobs(folder: Path, split: str, sources: Sequence[Source], make_item: MakeItem) -> list[ShardJob]:
    """Returns the jobs of a split. Where shards end depends on the sources alone, so the same input gives the same bytes."""
    jobs: list[ShardJob] = []
    batch: list[Source] = []
    batch_bytes = 0
    for source in sources:
        source_bytes = sum(_file_state(path)[1] for path in source.paths)
        if batch and (batch_bytes + source_bytes > _SHARD_BYTES or len(batch) == _SHARD_IMAGES):
            jobs.append(ShardJob(str(folder), split, len(jobs), tuple(batch), make_item))
            batch, batch_bytes = [], 0
        batch.append(source)
        batch_bytes += source_bytes
    if batch:
        jobs.append(ShardJob(str(folder), split, len(jobs), tuple(batch), make_item))
    return jobs


def _file_state(path: str | None) -> tuple[str, int, int]:
    """Returns (path, bytes, modification time in ns) of a file; zeros where there is none."""
    if not path:
        return "", 0, 0
    try:
        status = os.stat(path)
    except OSError:
        return path, 0, 0
    return path, status.st_size, status.st_mtime_ns


def finished_report(job: ShardJob) -> ShardReport | None:
    """Returns the report of a job that was done before; None if there is none, its input has changed, or its shard is cut off."""
    try:
        fields = json.loads(job.path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # The size shows whether a shard was cut off; other damage shows when images are read and compared with checksums.
    if fields["key"] != job.key() or (fields["rows"] and _file_state(str(job.path))[1] != fields["bytes"]):
        return None
    findings = tuple(Finding(**finding) for finding in fields.pop("findings"))
    # JSON has neither tuples nor keys that are numbers.
    values = {int(value): count for value, count in fields.pop("values").items()}
    return ShardReport(**fields | {"findings": findings, "values": values, "edges": tuple(fields["edges"])})


def write_shard(job: ShardJob) -> ShardReport:
    """Does a job: reads, checks and writes its images. Those that cannot be used are left out and reported."""
    # Before any file is read: a file that changes meanwhile gives another key next time, and is read again.
    key = job.key()
    items: list[Item] = []
    findings: list[Finding] = []
    for source in job.sources:
        try:
            items.append(job.make_item(source))
        except BadItemError as bad:
            findings.append(bad.finding)
    values: Counter[int] = Counter()
    for item in items:
        values.update(item.values)
    peaks = [item.peak for item in items if item.peak is not None]
    rows, size, checksum = _write_parquet(job.path, items) if items else ([], 0, "")
    report = ShardReport(
        key=key,
        split=job.split,
        number=job.number,
        images=len(job.sources),
        rows=rows,
        bytes=size,
        sha256=checksum,
        values=dict(values),
        edges=(sum(item.edges[0] for item in items), sum(item.edges[1] for item in items)),
        peak=max(peaks, default=None),
        findings=tuple(findings),
    )
    # Last, because a report says that the shard beside it is complete.
    write_text(job.path.with_suffix(".json"), json.dumps(asdict(report)))
    return report


def _write_parquet(path: Path, items: Sequence[Item]) -> tuple[list[dict[str, Any]], int, str]:
    """Writes the shard; returns its rows for the index, its size in bytes and its checksum in hex."""
    columns: Mapping[str, list[Any]] = {
        "id": [item.id for item in items],
        "image": [item.image for item in items],
        "mask": [item.mask for item in items],
        "height": [item.size[0] for item in items],
        "width": [item.size[1] for item in items],
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
    rows = [_index_row(item, *offsets) for item, *offsets in zip(items, image_offsets, mask_offsets, strict=True)]
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


def _index_row(item: Item, image_offset: int | None, mask_offset: int | None) -> dict[str, Any]:
    present = np.flatnonzero(item.pixels)
    return {
        "id": item.id,
        "image_at": image_offset,
        "image_bytes": len(item.image),
        "image_sha256": sha256(item.image).hex(),
        "mask_at": mask_offset,
        "mask_bytes": None if item.mask is None else len(item.mask),
        "mask_sha256": None if item.mask is None else sha256(item.mask).hex(),
        "height": item.size[0],
        "width": item.size[1],
        "classes": present.tolist(),
        "pixels": item.pixels[present].tolist(),
        "perceptual_hash": item.perceptual_hash,
    }
