"""All shards of a data set: hands out the jobs, gathers the findings, and puts the folder in place at once or not at all."""

import fcntl
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from cps_ray.datasets.prepare.writing import (
    ShardJob,
    ShardReport,
    WrittenRow,
    cut_into_jobs,
    finished_reports,
    make_job,
    write_shard,
)
from cps_ray.datasets.shards import (
    INDEX_SCHEMA,
    MANIFEST,
    Index,
    LeftOut,
    MadeBy,
    Manifest,
    ShardFile,
    Split,
    Tiles,
    fingerprint,
    index_of,
    sha256,
)
from cps_ray.errors import DataError

RunJobs = Callable[[Callable[[ShardJob], ShardReport], Sequence[ShardJob]], Iterator[ShardReport]]
"""Does all jobs, somewhere, and yields their reports in any order."""
OnProgress = Callable[[int, bool], None]
"""Called with the number of images that are done, and whether they were done by an earlier call."""
_LOCK = ".lock"
_CHECKSUMS = ("image_sha256", "mask_sha256", "pixels_sha256", "train_ids_sha256")
"""Columns that a report has in hex."""
_MANY = 0.1
"""Fraction of a split's images; where more are left out, it is said."""


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
    photos_stay: frozenset[str] = frozenset()
    """Splits in which an image whose mask is left out stays, as an unlabelled one."""
    tiles: Tiles | None = None
    """How training images are cut, where `splits` holds tiles."""


def one_by_one(do: Callable[[ShardJob], ShardReport], jobs: Sequence[ShardJob]) -> Iterator[ShardReport]:
    """Does the jobs in this process; each reads its images in threads."""
    return map(do, jobs)


def write_shards(
    out: Path,
    plan: DataSetPlan,
    *,
    run: RunJobs = one_by_one,
    threads: int | None = None,
    skip_bad: bool = False,
    wait: bool = False,
    on_progress: OnProgress = lambda images, before: None,
) -> Manifest:
    """Checks all splits and writes them into the new folder `out`, which appears whole or not at all.

    Until it is whole, it grows in a folder beside `out`, where the same call continues after a kill. Raises BadDataError if
    files cannot be used, unless `skip_bad` leaves them out; DataError if `out` exists or cannot be written, if a split ends
    up empty, or if another process writes the same folder, unless `wait` lets that one finish first. `threads`: how many images a
    job reads at once; None: as many as there are CPUs.
    """
    ids = Counter(source.id for sources in plan.splits.values() for source in sources)
    repeated = [key for key, count in ids.items() if count > 1]
    if repeated:
        raise DataError(f"ids must be unique over all splits, but {repeated[0]!r} is not; give splits a `prefix`.")
    with _unfinished_folder(out, wait) as folder:
        jobs = [
            job
            for name, sources in plan.splits.items()
            for job in cut_into_jobs(folder, name, sources, plan.make_item, threads or os.cpu_count() or 1)
        ]
        reports, indexes = _run_jobs(folder, jobs, plan, run, on_progress)
        left_out: list[Finding] = []
        if skip_bad:
            # A mask that is left out may leave its photo; which images are in two splits shows only when all are read.
            left_out, jobs = _without_bad(folder, jobs, reports, indexes, plan)
            if left_out:
                # The shards that lose something are written again, from what is there: these images have been counted.
                reports, indexes = _run_jobs(folder, jobs, plan, run, lambda images, before: None)
        findings = [*plan.findings, *_name_files(_gather_findings(reports, indexes, plan), plan.splits)]
        fatal = [finding for finding in findings if finding.fatal]
        if any(finding.whole_split or not skip_bad for finding in fatal):
            raise BadDataError(out, findings)
        left_out = [*fatal, *left_out]
        findings += _many_left_out(plan, indexes, left_out)
        empty = [name for name, index in indexes.items() if not len(index)]
        if empty:
            raise DataError(f"{out}: every split must have images that can be used, but {empty[0]!r} has none.")
        manifest = _write_indexes(folder, plan, reports, indexes, findings, left_out)
        _put_in_place(folder, out, manifest, reports)
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


def _without_bad(
    folder: Path,
    jobs: Sequence[ShardJob],
    reports: Mapping[str, list[ShardReport]],
    indexes: Mapping[str, Index],
    plan: DataSetPlan,
) -> tuple[list[Finding], list[ShardJob]]:
    """Returns what else is left out, and the jobs without it; a job that loses nothing stays as it is."""
    duplicates = checks.same_images(indexes)
    left_out = _name_files(checks.same_image_findings(duplicates), plan.splits)
    dropped = {(split, key) for split, key, _, _ in duplicates}
    bad = {
        (name, finding.image_id): finding
        for name in plan.photos_stay
        for report in reports[name]
        for finding in report.findings
    }
    remaining = []
    for job in jobs:
        sources = []
        for source in job.sources:
            if (job.split, source.id) in dropped:
                continue
            finding = bad.get((job.split, source.id))
            if finding is not None and finding.where != source.image:  # the mask is at fault
                left_out.append(finding)
                source = replace(source, masks=(), field_of_view=None)
            sources.append(source)
        changed = tuple(sources) != job.sources
        remaining.append(
            make_job(folder, job.split, job.number, sources, job.make_item, job.threads) if changed else job
        )
    return left_out, remaining


def _many_left_out(plan: DataSetPlan, indexes: Mapping[str, Index], left_out: Sequence[Finding]) -> list[Finding]:
    """Warns of splits that lost more than a tenth of their images, or of their masks."""
    findings = []
    lost_before = Counter(finding.split for finding in plan.findings if finding.fatal)
    for name, index in indexes.items():
        sources = plan.splits[name]
        planned = len(sources) + lost_before[name]
        masks = sum(bool(source.masks) for source in sources)
        lost, lost_masks = planned - len(index), masks - int(index.labeled.sum())
        if lost > _MANY * planned or lost_masks > _MANY * masks:
            found = f"no more than a tenth should be left out, but {lost} of {planned} images and {lost_masks} of {masks} masks are"
            findings.append(Finding("many are left out", name, found, "see `left_out` in the manifest", fatal=False))
    return findings


def _run_jobs(
    folder: Path, jobs: Sequence[ShardJob], plan: DataSetPlan, run: RunJobs, on_progress: OnProgress
) -> tuple[dict[str, list[ShardReport]], dict[str, Index]]:
    """Does the jobs that are not yet done; returns the reports of all by split, in order, and the index of each split."""
    earlier = finished_reports(folder)
    known = {row["source_key"]: WrittenRow(report.path, row) for report in earlier.values() for row in report.rows}
    reports: dict[tuple[str, int], ShardReport] = {}
    to_do = []
    for job in jobs:
        if job.key in earlier:
            # Where shards move up because one before them is new, the number is another; the content is not.
            reports[job.split, job.number] = replace(earlier[job.key], number=job.number)
            on_progress(len(job.sources), True)
        else:
            to_do.append(replace(job, known={key: known[key] for key in job.source_keys if key in known}))
    for report in run(write_shard, to_do):
        reports[report.split, report.number] = report
        on_progress(report.images, False)
    # In the order of the jobs, whatever the order in which they ended: the same input gives the same bytes.
    by_split = {name: [reports[job.split, job.number] for job in jobs if job.split == name] for name in plan.splits}
    indexes = {
        name: index_of(_index_table(split_reports), _written_paths(split_reports), len(plan.classes))
        for name, split_reports in by_split.items()
    }
    return by_split, indexes


def _written_paths(reports: Iterable[ShardReport]) -> tuple[str, ...]:
    """Paths of the shards that were written; a job of which no image can be used writes none."""
    return tuple(report.path for report in reports if report.rows)


def _index_table(reports: Iterable[ShardReport]) -> pa.Table:
    """Puts the rows of all reports into one table of INDEX_SCHEMA."""
    rows: list[dict[str, Any]] = []
    # `file` counts the shards that `_written_paths` names, so reports without rows have no number.
    for number, report in enumerate(report for report in reports if report.rows):
        for row in report.rows:
            checksums = {k: row[k] and bytes.fromhex(row[k]) for k in _CHECKSUMS}
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
        if isinstance(plan.make_item, FromFiles) and plan.splits[name]:
            rows = [row for report in split_reports for row in report.rows]
            findings += _raw_findings(name, plan.splits[name], rows, plan.make_item)
    if isinstance(plan.make_item, FromFiles):
        shown = {
            name: {label for report in split_reports for row in report.rows for label in row["shown"]}
            for name, split_reports in reports.items()
            if any(row["mask_bytes"] for report in split_reports for row in report.rows)
        }
        findings += checks.check_class_count(shown, plan.classes)
    return findings + checks.check_prepared(indexes, plan.classes)


def _raw_findings(
    name: str, sources: Sequence[Source], rows: Sequence[Mapping[str, Any]], make_item: FromFiles
) -> list[Finding]:
    """Returns what the raw values of a split show."""
    findings: list[Finding] = []
    masks = [source.mask for source in sources if source.mask]
    if masks:
        values: Counter[int] = Counter()
        palettes: dict[int, set[int]] = {}
        for row in rows:
            values.update(dict(row["values"]))
            for index, color in row["palette"]:
                palettes.setdefault(index, set()).add(color)
        edges = np.sum([row["edges"] for row in rows], axis=0) if rows else (0, 0)
        findings += checks.check_mask_values(name, masks[0], values, make_item.reader)
        findings += checks.check_mask_edges(name, masks[0], int(edges[0]), int(edges[1]))
        findings += checks.check_palettes(name, masks[0], palettes, make_item.reader)
    peak = max((row["peak"] for row in rows if row["peak"] is not None), default=None)
    findings += checks.check_image_peak(name, sources[0].image, peak, make_item.value_range)
    findings += checks.check_left_aside(name, Counter(row["aside"] for row in rows if row["aside"]))
    return findings


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
        files = [
            ShardFile(name=report.final_name, images=len(report.rows), bytes=report.bytes, sha256=report.sha256)
            for report in split_reports
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
            fingerprint=fingerprint(index),
        )
    warnings = summary_lines(finding for finding in findings if not finding.fatal)
    return Manifest(
        version=3,
        made_by=MadeBy(cps_ray=__version__, format=plan.made_by),
        classes=plan.classes,
        palette=plan.palette,
        splits=splits,
        bands=getattr(plan.make_item, "bands", None),  # what is drawn has none
        value_range=getattr(plan.make_item, "value_range", None),
        tiles=plan.tiles,
        notes=(*plan.notes, *warnings),
        left_out=tuple(LeftOut(file=finding.where, why=f"{finding.found}; {finding.remedy}") for finding in left_out),
    )


def _put_in_place(folder: Path, out: Path, manifest: Manifest, reports: Mapping[str, Sequence[ShardReport]]) -> None:
    """Gives the shards their names, writes the manifest, removes what it does not name, and renames the folder to `out`."""
    needed = {MANIFEST, _LOCK}  # the lock holds until the folder is in place
    for name, split_reports in reports.items():
        needed.add(manifest.splits[name].index)
        for report in split_reports:
            if report.rows:
                needed.add(report.final_name)
                os.replace(report.path, folder / report.final_name)
    (folder / MANIFEST).write_text(manifest.signed().model_dump_json(indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        if path.name not in needed:
            path.unlink()
    try:
        folder.rename(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be put in place ({error.strerror}); was it made meanwhile?") from None
    (out / _LOCK).unlink()
