"""All shards of a data set: hands out the jobs, gathers the findings, and puts the folder in place at once or not at all."""

import fcntl
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cps_ray import __version__
from cps_ray.datasets.prepare import checks
from cps_ray.datasets.prepare.findings import Finding, summary_lines
from cps_ray.datasets.prepare.items import FromFiles, MakeItem, Source
from cps_ray.datasets.prepare.writing import ShardJob, ShardReport, cut_into_jobs, finished_report, write_shard
from cps_ray.datasets.shards import (
    INDEX_SCHEMA,
    MANIFEST,
    Index,
    LeftOut,
    MadeBy,
    Manifest,
    ShardFile,
    Split,
    index_of,
    sha256,
)
from cps_ray.errors import DataError

RunJobs = Callable[[Callable[[ShardJob], ShardReport], Sequence[ShardJob]], Iterator[ShardReport]]
"""Does all jobs, somewhere, and yields their reports in any order."""
OnProgress = Callable[[int, bool], None]
"""Called with the number of images that are done, and whether they were done by an earlier call."""
_LOCK = ".lock"


class BadDataError(DataError):
    """Raw files cannot be used; `findings` holds every finding, fatal ones first."""

    def __init__(self, out: Path, findings: Sequence[Finding]) -> None:
        self.findings = tuple(sorted(findings, key=lambda finding: not finding.fatal))
        fatal = [finding for finding in findings if finding.fatal]
        skip = "" if any(finding.whole_split for finding in fatal) else ", or leave them out with --skip-bad"
        super().__init__(
            f"{out}: not written, as {len(fatal)} {'files' if len(fatal) > 1 else 'file'} cannot be used. Fix what is "
            f"listed and run the same command again (finished work is kept){skip}."
        )


@dataclass(frozen=True)
class DataSetPlan:
    """A data set to be written."""

    splits: Mapping[str, Sequence[Source]]
    make_item: MakeItem
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    """(r, g, b) in 0..255 per class."""
    made_by: str
    """The raw format and its settings, in words, for the manifest."""
    findings: tuple[Finding, ...] = ()
    """What was found before any file was read."""
    notes: tuple[str, ...] = ()
    """What was decided by looking at the files, for the manifest."""


def in_threads(do: Callable[[ShardJob], ShardReport], jobs: Sequence[ShardJob]) -> Iterator[ShardReport]:
    """Does the jobs in threads of this process."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(do, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            # Also after an exception of a job: leaving the pool would otherwise wait for all that is queued.
            pool.shutdown(cancel_futures=True)


def write_shards(
    out: Path,
    plan: DataSetPlan,
    *,
    run: RunJobs = in_threads,
    skip_bad: bool = False,
    wait: bool = False,
    on_progress: OnProgress = lambda images, before: None,
) -> Manifest:
    """Checks all splits and writes them into the new folder `out`, which appears whole or not at all.

    Until it is whole, it grows in a folder beside `out`, where the same call continues after a kill. Raises BadDataError if
    files cannot be used, unless `skip_bad` leaves them out; DataError if `out` exists or cannot be written, if a split ends
    up empty, or if another process writes the same folder, unless `wait` lets that one finish first.
    """
    ids = Counter(source.id for sources in plan.splits.values() for source in sources)
    repeated = [key for key, count in ids.items() if count > 1]
    if repeated:
        raise DataError(f"ids must be unique over all splits, but {repeated[0]!r} is not; give splits a `prefix`.")
    with _unfinished_folder(out, wait) as folder:
        jobs = [
            job for name, sources in plan.splits.items() for job in cut_into_jobs(folder, name, sources, plan.make_item)
        ]
        reports, indexes = _run_jobs(folder, jobs, plan, run, on_progress)
        left_out: list[Finding] = []
        if skip_bad and (duplicates := checks.same_images(indexes)):
            # Which images are in two splits shows only when all are read. The shards that lose one are written again, and
            # these images have been counted by `on_progress` already.
            left_out = _name_files(checks.same_image_findings(duplicates), plan.splits)
            jobs = _drop_images(jobs, {(split, key) for split, key, _, _ in duplicates})
            reports, indexes = _run_jobs(folder, jobs, plan, run, lambda images, before: None)
        findings = [*plan.findings, *_name_files(_gather_findings(reports, indexes, plan), plan.splits)]
        fatal = [finding for finding in findings if finding.fatal]
        if any(finding.whole_split or not skip_bad for finding in fatal):
            raise BadDataError(out, findings)
        empty = [name for name, index in indexes.items() if not len(index)]
        if empty:
            raise DataError(f"{out}: every split must have images that can be used, but {empty[0]!r} has none.")
        manifest = _write_indexes(folder, plan, reports, indexes, findings, [*fatal, *left_out])
        _put_in_place(folder, out, manifest)
    return manifest


@contextmanager
def _unfinished_folder(out: Path, wait: bool) -> Iterator[Path]:
    """Makes the folder in which `out` grows, and holds it: one process at a time."""
    exists = DataError(f"{out}: already exists; remove it or name another folder.")
    if out.exists():
        raise exists
    folder = out.parent / f".{out.name}.unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK).open("w") as lock:
            try:
                # Released when the file is closed, also by a kill, so that no lock is ever left behind.
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise DataError(f"{out}: another process is writing it; wait for that, or stop it.") from None
            if out.exists():  # another process has put it in place since the first look
                (folder / _LOCK).unlink(missing_ok=True)
                folder.rmdir()
                raise exists
            yield folder
    except OSError as error:  # also from what the caller writes into the folder: a full disk
        if out.exists():  # the folder went away while another process put it in place
            raise exists from None
        raise DataError(
            f"{out}: cannot be written ({error.strerror or error}); finished work is kept, and the same command continues."
        ) from None


def _drop_images(jobs: Sequence[ShardJob], dropped: Collection[tuple[str, str]]) -> list[ShardJob]:
    """Returns the jobs without some images, given as (split, id). A job that loses none keeps its key, hence its shard."""
    remaining = (tuple(s for s in job.sources if (job.split, s.id) not in dropped) for job in jobs)
    return [replace(job, sources=sources) for job, sources in zip(jobs, remaining, strict=True)]


def _run_jobs(
    folder: Path, jobs: Sequence[ShardJob], plan: DataSetPlan, run: RunJobs, on_progress: OnProgress
) -> tuple[dict[str, list[ShardReport]], dict[str, Index]]:
    """Does the jobs that are not yet done; returns the reports of all by split, in order, and the index of each split."""
    reports: dict[tuple[str, int], ShardReport] = {}
    for job in jobs:
        if (earlier := finished_report(job)) is not None:
            reports[job.split, job.number] = earlier
            on_progress(earlier.images, True)
    for report in run(write_shard, [job for job in jobs if (job.split, job.number) not in reports]):
        reports[report.split, report.number] = report
        on_progress(report.images, False)
    # In the order of the jobs, whatever the order in which they ended: the same input gives the same bytes.
    by_split = {name: [reports[job.split, job.number] for job in jobs if job.split == name] for name in plan.splits}
    indexes = {
        name: index_of(_index_table(split_reports), _shard_paths(folder, split_reports), len(plan.classes))
        for name, split_reports in by_split.items()
    }
    return by_split, indexes


def _shard_paths(folder: Path, reports: Iterable[ShardReport]) -> tuple[str, ...]:
    """Paths of the shards that were written; a job of which no image can be used writes none."""
    return tuple(str(folder / f"{report.split}-{report.number:05d}.parquet") for report in reports if report.rows)


def _index_table(reports: Iterable[ShardReport]) -> pa.Table:
    """Puts the rows of all reports into one table of INDEX_SCHEMA."""
    rows: list[dict[str, Any]] = []
    # `file` counts the shards that `_shard_paths` names, so reports without rows have no number.
    for number, report in enumerate(report for report in reports if report.rows):
        for row in report.rows:
            checksums = {k: row[k] and bytes.fromhex(row[k]) for k in ("image_sha256", "mask_sha256")}
            rows.append(row | checksums | {"file": number})
    return pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)


def _gather_findings(
    reports: Mapping[str, list[ShardReport]], indexes: Mapping[str, Index], plan: DataSetPlan
) -> list[Finding]:
    """Returns the findings of all jobs, and those that only a whole split or all splits together show."""
    findings = [
        finding for split_reports in reports.values() for report in split_reports for finding in report.findings
    ]
    for name, split_reports in reports.items():
        masks = [source.mask for source in plan.splits[name] if source.mask]
        if masks and isinstance(plan.make_item, FromFiles):
            values: Counter[int] = Counter()
            for report in split_reports:
                values.update(report.values)
            edges = np.sum([report.edges for report in split_reports], axis=0)
            findings += checks.check_mask_values(name, masks[0], values, plan.make_item.reader)
            findings += checks.check_mask_edges(name, masks[0], int(edges[0]), int(edges[1]))
        if isinstance(plan.make_item, FromFiles) and plan.splits[name]:
            peak = max((report.peak for report in split_reports if report.peak is not None), default=None)
            findings += checks.check_image_peak(name, plan.splits[name][0].image, peak, plan.make_item.value_range)
    return findings + checks.check_prepared(indexes, plan.classes)


def _name_files(findings: Iterable[Finding], splits: Mapping[str, Sequence[Source]]) -> list[Finding]:
    """Returns the findings with the path of the raw image instead of SPLIT/ID, where one is about one image."""
    paths = {f"{name}/{source.id}": source.image for name, sources in splits.items() for source in sources}
    return [replace(finding, where=paths.get(finding.where) or finding.where) for finding in findings]


def _write_indexes(
    folder: Path,
    plan: DataSetPlan,
    reports: Mapping[str, list[ShardReport]],
    indexes: Mapping[str, Index],
    findings: Sequence[Finding],
    left_out: Sequence[Finding],
) -> Manifest:
    """Writes the index file of every split, and returns the manifest that names all files."""
    splits = {}
    for name, index in indexes.items():
        split_reports = [report for report in reports[name] if report.rows]
        # An Arrow file would do; Parquet is what everything reads.
        buffer = io.BytesIO()
        pq.write_table(_index_table(split_reports), buffer, compression="zstd", version="2.6")
        (folder / f"{name}.index.parquet").write_bytes(buffer.getvalue())
        digest = hashlib.sha256()
        for report in split_reports:
            for row in report.rows:
                digest.update(f"{row['id']}\n{row['image_sha256']}\n{row['mask_sha256']}\n".encode())
        paths = map(Path, _shard_paths(folder, split_reports))
        files = [
            ShardFile(name=path.name, images=len(report.rows), bytes=report.bytes, sha256=report.sha256)
            for path, report in zip(paths, split_reports, strict=True)
        ]
        splits[name] = Split(
            images=len(index),
            masks=int(index.labeled.sum()),
            files=tuple(files),
            index=f"{name}.index.parquet",
            index_sha256=sha256(buffer.getvalue()).hex(),
            class_pixels=tuple(index.pixels.sum(axis=0).tolist()),
            class_images=tuple(index.presence.sum(axis=0).tolist()),
            sha256=digest.hexdigest(),
        )
    warnings = summary_lines(finding for finding in findings if not finding.fatal)
    return Manifest(
        version=2,
        made_by=MadeBy(cps_ray=__version__, format=plan.made_by),
        classes=plan.classes,
        palette=plan.palette,
        splits=splits,
        notes=(*plan.notes, *warnings),
        left_out=tuple(LeftOut(file=finding.where, why=f"{finding.found}; {finding.remedy}") for finding in left_out),
    )


def _put_in_place(folder: Path, out: Path, manifest: Manifest) -> None:
    """Writes the manifest, removes what it does not name, and renames the folder to `out`."""
    (folder / MANIFEST).write_text(manifest.signed().model_dump_json(indent=2) + "\n", encoding="utf-8")
    needed = {MANIFEST, _LOCK}  # the lock holds until the folder is in place
    for split in manifest.splits.values():
        needed |= {split.index, *(file.name for file in split.files)}
    for path in folder.iterdir():
        if path.name not in needed:
            path.unlink()
    try:
        folder.rename(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be put in place ({error.strerror}); was it made meanwhile?") from None
    (out / _LOCK).unlink()
