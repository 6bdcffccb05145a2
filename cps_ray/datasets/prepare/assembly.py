"""All shards of a data set: jobs handed out, findings gathered, the whole put in place at once or not at all."""

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
from cps_ray.datasets.prepare.items import FromFiles, Make, Source
from cps_ray.datasets.prepare.writing import ShardJob, ShardReport, cut, finished, write_shard
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
"""Told of images that are done, and whether they were done before."""
_LOCK = ".lock"


class BadDataError(DataError):
    """Raw files cannot be used: every finding, fatal ones first."""

    def __init__(self, out: Path, findings: Sequence[Finding]) -> None:
        self.findings = tuple(sorted(findings, key=lambda finding: not finding.fatal))
        bad = [finding for finding in findings if finding.fatal]
        skip = "" if any(finding.whole for finding in bad) else ", or leave them out with --skip-bad"
        super().__init__(
            f"{out}: not written, as {len(bad)} {'files' if len(bad) > 1 else 'file'} cannot be used. Mend what is listed "
            f"and run the same command again (what was done is kept){skip}."
        )


@dataclass(frozen=True)
class DataSetPlan:
    """A data set to be written."""

    splits: Mapping[str, Sequence[Source]]
    make: Make
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    made_by: str
    findings: tuple[Finding, ...] = ()
    """What was found before any file was read."""
    notes: tuple[str, ...] = ()


def in_threads(do: Callable[[ShardJob], ShardReport], jobs: Sequence[ShardJob]) -> Iterator[ShardReport]:
    """Does the jobs in this process."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = [pool.submit(do, job) for job in jobs]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
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
    """Checks and writes all splits into the new folder `out`: wholly, or not at all.

    Until it is whole, it grows in a folder beside `out`, where the same call goes on after a kill. BadDataError if files cannot
    be used, unless `skip_bad` leaves them out; DataError if `out` exists or cannot be written, a split ends up empty, or
    another process writes the same folder, unless `wait`: then it has its turn first.
    """
    twice = [key for key, count in Counter(s.id for part in plan.splits.values() for s in part).items() if count > 1]
    if twice:
        raise DataError(f"ids must be unique over all splits, but {twice[0]!r} is not; give splits a `prefix`.")
    with _workshop(out, wait) as folder:
        jobs = [job for name, sources in plan.splits.items() for job in cut(folder, name, sources, plan.make)]
        reports, indexes = _run_jobs(folder, jobs, plan, run, on_progress)
        left_out: list[Finding] = []
        if skip_bad and (extra := checks.same_images(indexes)):
            left_out = _paths(checks.one_split_each(extra), plan.splits)
            jobs = _without(jobs, {(split, key) for split, key, _, _ in extra})
            reports, indexes = _run_jobs(folder, jobs, plan, run, lambda images, before: None)
        findings = [*plan.findings, *_paths(_found(reports, indexes, plan), plan.splits)]
        bad = [finding for finding in findings if finding.fatal]
        if any(finding.whole or not skip_bad for finding in bad):
            raise BadDataError(out, findings)
        empty = [name for name, index in indexes.items() if not len(index)]
        if empty:
            raise DataError(f"{out}: every split must have images that can be used, but {empty[0]!r} has none.")
        manifest = _manifest(folder, plan, reports, indexes, findings, [*bad, *left_out])
        _put_in_place(folder, out, manifest)
    return manifest


@contextmanager
def _workshop(out: Path, wait: bool) -> Iterator[Path]:
    """The folder in which `out` grows, held by one process at a time."""
    exists = DataError(f"{out}: already exists; remove it or name another folder.")
    if out.exists():
        raise exists
    folder = out.parent / f".{out.name}.unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise DataError(f"{out}: another process is writing it; wait for that, or stop it.") from None
            if out.exists():  # another process has put it in place since
                (folder / _LOCK).unlink(missing_ok=True)
                folder.rmdir()
                raise exists
            yield folder
    except OSError as error:
        if out.exists():  # the folder went away while another process put it in place
            raise exists from None
        found = f"{out}: cannot be written ({error.strerror or error}); what was done is kept, and the same command goes on."
        raise DataError(found) from None


def _without(jobs: Sequence[ShardJob], dropped: Collection[tuple[str, str]]) -> list[ShardJob]:
    """The same jobs less some images, by (split, id): those that lose none stay as they are, and as they were done."""
    kept = (tuple(s for s in job.sources if (job.split, s.id) not in dropped) for job in jobs)
    return [replace(job, sources=sources) for job, sources in zip(jobs, kept, strict=True)]


def _run_jobs(
    folder: Path, jobs: Sequence[ShardJob], plan: DataSetPlan, run: RunJobs, on_progress: OnProgress
) -> tuple[dict[str, list[ShardReport]], dict[str, Index]]:
    """The reports of all jobs by split, in order, and the indexes they make."""
    reports: dict[tuple[str, int], ShardReport] = {}
    for job in jobs:
        if (known := finished(job)) is not None:
            reports[job.split, job.number] = known
            on_progress(known.images, True)
    for report in run(write_shard, [job for job in jobs if (job.split, job.number) not in reports]):
        reports[report.split, report.number] = report
        on_progress(report.images, False)
    by_split = {name: [reports[job.split, job.number] for job in jobs if job.split == name] for name in plan.splits}
    indexes = {name: index_of(_table(done), _files(folder, done), len(plan.classes)) for name, done in by_split.items()}
    return by_split, indexes


def _files(folder: Path, reports: Iterable[ShardReport]) -> tuple[str, ...]:
    return tuple(str(folder / f"{done.split}-{done.number:05d}.parquet") for done in reports if done.rows)


def _table(reports: Iterable[ShardReport]) -> pa.Table:
    """INDEX_SCHEMA."""
    rows: list[dict[str, Any]] = []
    for number, report in enumerate(done for done in reports if done.rows):
        for row in report.rows:
            checksums = {k: row[k] and bytes.fromhex(row[k]) for k in ("image_sha256", "mask_sha256")}
            rows.append(row | checksums | {"file": number})
    return pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)


def _found(reports: Mapping[str, list[ShardReport]], indexes: Mapping[str, Index], plan: DataSetPlan) -> list[Finding]:
    findings = [finding for done in reports.values() for report in done for finding in report.findings]
    for name, done in reports.items():
        masks = [source.mask for source in plan.splits[name] if source.mask]
        if masks and isinstance(plan.make, FromFiles):
            values: Counter[int] = Counter()
            for report in done:
                values.update(report.values)
            steps = np.sum([report.steps for report in done], axis=0)
            findings += checks.of_values(name, masks[0], values, plan.make.reader)
            findings += checks.of_steps(name, masks[0], int(steps[0]), int(steps[1]))
        if isinstance(plan.make, FromFiles) and plan.splits[name]:
            peak = max((report.peak for report in done if report.peak is not None), default=None)
            findings += checks.of_peak(name, plan.splits[name][0].image, peak, plan.make.value_range)
    return findings + checks.whole(indexes, plan.classes)


def _paths(findings: Iterable[Finding], splits: Mapping[str, Sequence[Source]]) -> list[Finding]:
    """The same, naming raw files instead of ids where a finding is about one image."""
    paths = {f"{name}/{source.id}": source.image for name, part in splits.items() for source in part}
    return [replace(finding, where=paths.get(finding.where) or finding.where) for finding in findings]


def _manifest(
    folder: Path,
    plan: DataSetPlan,
    reports: Mapping[str, list[ShardReport]],
    indexes: Mapping[str, Index],
    findings: Sequence[Finding],
    left_out: Sequence[Finding],
) -> Manifest:
    """Writes the indexes and says all of it."""
    splits = {}
    for name, index in indexes.items():
        done = [report for report in reports[name] if report.rows]
        # An Arrow file would do; Parquet is what everything reads.
        buffer = io.BytesIO()
        pq.write_table(_table(done), buffer, compression="zstd", version="2.6")
        (folder / f"{name}.index.parquet").write_bytes(buffer.getvalue())
        digest = hashlib.sha256()
        for report in done:
            for row in report.rows:
                digest.update(f"{row['id']}\n{row['image_sha256']}\n{row['mask_sha256']}\n".encode())
        paths = map(Path, _files(folder, done))
        files = [
            ShardFile(name=path.name, images=len(report.rows), bytes=report.bytes, sha256=report.sha256)
            for path, report in zip(paths, done, strict=True)
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
    (folder / MANIFEST).write_text(manifest.signed().model_dump_json(indent=2) + "\n", encoding="utf-8")
    wanted = {MANIFEST, _LOCK}  # the lock holds until the folder is in place
    for split in manifest.splits.values():
        wanted |= {split.index, *(file.name for file in split.files)}
    for path in folder.iterdir():
        if path.name not in wanted:
            path.unlink()
    try:
        folder.rename(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be put in place ({error.strerror}); was it made meanwhile?") from None
    (out / _LOCK).unlink()
