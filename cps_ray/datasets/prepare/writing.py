"""Sources to one shard: the unit of parallel work. Any process may do any job, in any order, again and again.

A shard is complete when its report lies beside it; both appear whole or not at all. A report names what it was made from,
so that work that was killed goes on where it was, and a raw file that changed is read again.
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
from cps_ray.datasets.prepare.items import Item, Make, Source
from cps_ray.datasets.shards import SHARD_SCHEMA, sha256

_SHARD_BYTES = 64 * 2**20
_SHARD_IMAGES = 512
"""Bounds of one shard: what one task does, and what a kill costs. Reading does not depend on them: see `ImageLocations`."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to be written."""

    folder: str
    split: str
    number: int
    sources: tuple[Source, ...]
    make: Make

    @property
    def path(self) -> Path:
        """Of the shard."""
        return Path(self.folder) / f"{self.split}-{self.number:05d}.parquet"

    def key(self) -> str:
        """Tells apart what it is made from: settings, files, their sizes and times."""
        digest = hashlib.sha256(f"{__version__} {self.split} {self.make!r}".encode())
        for source in self.sources:
            digest.update(repr((source.id, *(_state(path) for path in (source.image, source.mask)))).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class ShardReport:
    """What a job did: one line per image, and what was found."""

    key: str
    split: str
    number: int
    images: int
    """Images looked at."""
    rows: list[dict[str, Any]]
    """Of INDEX_SCHEMA without `file`; checksums in hex."""
    bytes: int
    sha256: str
    """Of the shard; both empty without rows."""
    values: dict[int, int]
    """Pixels per raw mask value."""
    steps: tuple[int, int]
    """See `masks.ramps`."""
    peak: int | None
    findings: tuple[Finding, ...]


def cut(folder: Path, split: str, sources: Sequence[Source], make: Make) -> list[ShardJob]:
    """The jobs of a split. Where shards end depends on the sources alone, hence the same input gives the same bytes."""
    jobs: list[ShardJob] = []
    part: list[Source] = []
    size = 0
    for source in sources:
        more = sum(_state(path)[1] for path in (source.image, source.mask))
        if part and (size + more > _SHARD_BYTES or len(part) == _SHARD_IMAGES):
            jobs.append(ShardJob(str(folder), split, len(jobs), tuple(part), make))
            part, size = [], 0
        part.append(source)
        size += more
    if part:
        jobs.append(ShardJob(str(folder), split, len(jobs), tuple(part), make))
    return jobs


def _state(path: str | None) -> tuple[str, int, int]:
    """(path, bytes, time) of a raw file; zeros where there is none."""
    if not path:
        return "", 0, 0
    try:
        found = os.stat(path)
    except OSError:
        return path, 0, 0
    return path, found.st_size, found.st_mtime_ns


def finished(job: ShardJob) -> ShardReport | None:
    """The report of a job that was done before; None if it was not, or was made from something else, or did not last."""
    try:
        known = json.loads(job.path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if known["key"] != job.key() or (known["rows"] and _state(str(job.path))[1] != known["bytes"]):
        return None
    findings = tuple(Finding(**finding) for finding in known.pop("findings"))
    values = {int(value): count for value, count in known.pop("values").items()}
    return ShardReport(**known | {"findings": findings, "values": values, "steps": tuple(known["steps"])})


def write_shard(job: ShardJob) -> ShardReport:
    """Does a job: reads, checks and writes its images; those that cannot be used are left out and reported."""
    key = job.key()
    items: list[Item] = []
    findings: list[Finding] = []
    for source in job.sources:
        try:
            items.append(job.make(source))
        except BadItemError as bad:
            findings.append(bad.finding)
    values: Counter[int] = Counter()
    for item in items:
        values.update(item.values)
    peaks = [item.peak for item in items if item.peak is not None]
    rows, size, checksum = _write(job.path, items) if items else ([], 0, "")
    report = ShardReport(
        key=key,
        split=job.split,
        number=job.number,
        images=len(job.sources),
        rows=rows,
        bytes=size,
        sha256=checksum,
        values=dict(values),
        steps=(sum(item.steps[0] for item in items), sum(item.steps[1] for item in items)),
        peak=max(peaks, default=None),
        findings=tuple(findings),
    )
    _put(job.path.with_suffix(".json"), json.dumps(asdict(report)).encode())
    return report


def _put(path: Path, data: bytes) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    part.write_bytes(data)
    part.replace(path)


def _write(path: Path, items: Sequence[Item]) -> tuple[list[dict[str, Any]], int, str]:
    """The shard's rows for the index, its size and its checksum."""
    columns: Mapping[str, list[Any]] = {
        "id": [item.id for item in items],
        "image": [item.image for item in items],
        "mask": [item.mask for item in items],
        "height": [item.size[0] for item in items],
        "width": [item.size[1] for item in items],
    }
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    # Plain and uncompressed, so that each image lies in the file as it is, to be read without Parquet.
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.table(columns, schema=SHARD_SCHEMA), part, version="2.6", **plain)
    with part.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        images, masks = (_locate(data, columns[name]) for name in ("image", "mask"))
        size, checksum = len(data), hashlib.sha256(data).hexdigest()
    part.replace(path)
    return [_row(item, *at) for item, *at in zip(items, images, masks, strict=True)], size, checksum


def _locate(data: mmap.mmap, values: Sequence[bytes | None]) -> list[int | None]:
    """The first byte of every value of a column. They lie in order, each behind its length."""
    places: list[int | None] = []
    at = 0
    for value in values:
        if value is not None:
            at = data.find(len(value).to_bytes(4, "little") + value, at) + 4
            assert at >= 4, "Parquet's plain encoding has changed"
        places.append(None if value is None else at)
    return places


def _row(item: Item, image_at: int | None, mask_at: int | None) -> dict[str, Any]:
    shown = np.flatnonzero(item.pixels)
    return {
        "id": item.id,
        "image_at": image_at,
        "image_bytes": len(item.image),
        "image_sha256": sha256(item.image).hex(),
        "mask_at": mask_at,
        "mask_bytes": None if item.mask is None else len(item.mask),
        "mask_sha256": None if item.mask is None else sha256(item.mask).hex(),
        "height": item.size[0],
        "width": item.size[1],
        "classes": shown.tolist(),
        "pixels": item.pixels[shown].tolist(),
        "perceptual_hash": item.perceptual_hash,
    }
