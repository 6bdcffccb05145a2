"""Jobs: cut the same way each time, done whole or not at all, never done twice, even if stopped at any moment."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from trees import READER, pair, plan, save, scene

from cps_ray.datasets.prepare import writing
from cps_ray.datasets.prepare.assembly import write_shards
from cps_ray.datasets.prepare.items import FromFiles, Item, MaskFile, Source
from cps_ray.datasets.prepare.writing import (
    ShardJob,
    ShardReport,
    cut_into_jobs,
    finished_reports,
    make_job,
    write_shard,
)

MAKE_ITEM = FromFiles(READER)


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    return [pair(tmp_path / "raw", f"i{number}", masked=number != 1) for number in range(5)]


@pytest.fixture
def job(tmp_path: Path, sources: list[Source]) -> ShardJob:
    (tmp_path / "out").mkdir()
    return make_job(tmp_path / "out", "train", 3, sources, MAKE_ITEM, 1)


def finished(job: ShardJob) -> ShardReport | None:
    """The report that a later call finds for the same sources, as their files are now."""
    again = make_job(Path(job.folder), job.split, job.number, job.sources, job.make_item, job.threads)
    return finished_reports(Path(job.folder)).get(again.key)


def names(jobs: Sequence[ShardJob]) -> list[list[str]]:
    return [[source.id for source in job.sources] for job in jobs]


def test_shards_are_cut_by_count(sources: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_SHARD_IMAGES", 2)
    jobs = cut_into_jobs(tmp_path, "val", sources, MAKE_ITEM)
    assert names(jobs) == [["i0", "i1"], ["i2", "i3"], ["i4"]]
    assert [job.path.name.partition(".")[0] for job in jobs] == [f"val-0000{number}" for number in range(3)]


def test_shards_are_cut_by_bytes(sources: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard ends before it grows over the limit; an image larger than the limit has a shard of its own."""
    sizes = [sum(os.path.getsize(path) for path in (source.image, source.mask) if path) for source in sources]
    monkeypatch.setattr(writing, "_SHARD_BYTES", sizes[0] + sizes[1])
    assert names(cut_into_jobs(tmp_path, "val", sources, MAKE_ITEM))[0] == ["i0", "i1"]
    monkeypatch.setattr(writing, "_SHARD_BYTES", 1)
    assert names(cut_into_jobs(tmp_path, "val", sources, MAKE_ITEM)) == [[f"i{number}"] for number in range(5)]


def test_a_report_says_what_was_done(job: ShardJob) -> None:
    report = write_shard(job)
    assert (report.split, report.number, report.images) == ("train", 3, 5)
    assert [row["id"] for row in report.rows] == [f"i{number}" for number in range(5)]
    assert [row["mask_at"] is None for row in report.rows] == [False, True, False, False, False]
    assert sum(count for row in report.rows for _, count in row["values"]) == 4 * 24 * 32
    assert report.bytes == job.path.stat().st_size
    name = f"train-00003.{job.key[:16]}"
    assert sorted(path.name for path in job.path.parent.iterdir()) == [f"{name}.json", f"{name}.parquet"]


def test_the_offsets_in_a_report_are_those_of_the_bytes(job: ShardJob) -> None:
    report = write_shard(job)
    data, table = job.path.read_bytes(), pq.read_table(job.path)
    for number, row in enumerate(report.rows):
        for kind in ("image", "mask"):
            wanted = table[kind][number].as_py()
            at = row[f"{kind}_at"]
            assert (None if at is None else data[at : at + row[f"{kind}_bytes"]]) == wanted


def test_equal_images_and_masks_are_found_at_their_offsets(tmp_path: Path) -> None:
    """Bytes that repeat, or are part of others, lead to no wrong offset."""
    (tmp_path / "out").mkdir()
    mask = save(tmp_path / "raw/m.png", np.zeros((24, 32), np.uint8))
    same = [Source(key, str(mask), (MaskFile(str(mask)),)) for key in "abc"]
    report = write_shard(make_job(tmp_path / "out", "train", 0, same, MAKE_ITEM, 1))
    data = Path(report.path).read_bytes()
    for row in report.rows:
        assert data[row["image_at"] :][: row["image_bytes"]] == mask.read_bytes()


def test_what_cannot_be_used_is_left_out_and_reported(job: ShardJob) -> None:
    Path(job.sources[2].image).write_bytes(b"no image")
    report = write_shard(job)
    assert [row["id"] for row in report.rows] == ["i0", "i1", "i3", "i4"]
    assert report.images == 5
    assert [(finding.where, finding.rule) for finding in report.findings] == [
        (job.sources[2].image, "image is unreadable")
    ]


def test_a_job_without_usable_images_writes_no_shard(job: ShardJob) -> None:
    for source in job.sources:
        Path(source.image).write_bytes(b"")
    job = make_job(Path(job.folder), job.split, job.number, job.sources, job.make_item, 1)
    report = write_shard(job)
    assert (report.rows, report.bytes) == ([], 0)
    assert not job.path.exists()
    assert finished(job) == report


def test_a_finished_job_is_recognised(job: ShardJob) -> None:
    assert finished(job) is None
    report = write_shard(job)
    assert finished(job) == report


def forget_the_shard(job: ShardJob) -> None:
    job.path.unlink()


def cut_the_shard_short(job: ShardJob) -> None:
    job.path.write_bytes(job.path.read_bytes()[:-1])


def tear_the_report(job: ShardJob) -> None:
    path = job.path.with_suffix(".json")
    path.write_text(path.read_text()[:100])


def change_an_image(job: ShardJob) -> None:
    save(Path(job.sources[0].image), scene("another one"))


def touch_a_mask(job: ShardJob) -> None:
    os.utime(job.sources[0].mask or "", ns=(0, 0))


def remove_an_image(job: ShardJob) -> None:
    Path(job.sources[4].image).unlink()


@pytest.mark.parametrize(
    "change",
    [forget_the_shard, cut_the_shard_short, tear_the_report, change_an_image, touch_a_mask, remove_an_image],
)
def test_what_changed_is_done_again(job: ShardJob, change: object) -> None:
    write_shard(job)
    assert callable(change)
    change(job)
    assert finished(job) is None


def test_other_settings_are_another_job(job: ShardJob) -> None:
    write_shard(job)
    others = [
        replace(job, make_item=replace(MAKE_ITEM, scale=0.5)),
        replace(job, make_item=replace(MAKE_ITEM, value_range=(0.0, 1.0))),
        replace(job, make_item=FromFiles(replace(READER, meanings={0: 0, 1: 0, 2: 2, 255: 255}))),
        replace(job, sources=job.sources[:4]),
        replace(job, sources=(replace(job.sources[0], id="other"), *job.sources[1:])),
    ]
    assert [finished(other) for other in others] == [None] * 5


def test_a_job_done_twice_writes_the_same_bytes(job: ShardJob) -> None:
    write_shard(job)
    first = {path.name: path.read_bytes() for path in job.path.parent.iterdir()}
    write_shard(job)
    assert {path.name: path.read_bytes() for path in job.path.parent.iterdir()} == first


# --------------------------------------------------------------------------------------------------------- killed

KILLS = 10
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["cps_ray.datasets.prepare.assembly", "trees"])


@dataclass(frozen=True)
class Slow(FromFiles):
    def __call__(self, source: Source) -> Item:
        time.sleep(0.004)
        return super().__call__(source)


def prepare(raw: Path, out: Path) -> None:
    os.setsid()
    writing._SHARD_IMAGES = 3
    images = sorted(path for path in raw.iterdir() if "mask" not in path.name)
    sources = [
        Source(path.stem, str(path), (MaskFile(str(path.with_name(f"{path.stem}_mask.png"))),)) for path in images
    ]
    write_shards(out, replace(plan({"train": sources[:-10], "val": sources[-10:]}), make_item=Slow(READER)))


def started(raw: Path, out: Path) -> ForkServerProcess:
    """Starts a process that prepares, in a session of its own, so that all of it can be killed at once."""
    process = PROCESSES.Process(target=prepare, args=(raw, out))
    process.start()
    return process


def exit_code(process: ForkServerProcess) -> int | None:
    process.join()
    return process.exitcode


def finished_shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns name -> (inode, time) of every shard whose report is there."""
    reports = folder.glob("*.json") if folder.exists() else []
    found = {report.with_suffix(".parquet").name: report.with_suffix(".parquet").stat() for report in reports}
    return {name: (state.st_ino, state.st_mtime_ns) for name, state in found.items()}


def test_ten_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    """Each run is killed a little after it finished a shard or more; what was finished is never done again."""
    rng = np.random.default_rng(0)
    raw, out, growing = tmp_path / "raw", tmp_path / "shards", tmp_path / ".shards.unfinished"
    for number in range(160):
        pair(raw, f"i{number:03}")
    assert exit_code(started(raw, tmp_path / "undisturbed")) == 0

    known: dict[str, tuple[int, int]] = {}
    reused = 0
    for _ in range(KILLS):
        running = started(raw, out)
        wanted = len(known) + int(rng.integers(1, 4))
        while running.is_alive() and len(finished_shards(growing)) < wanted:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        assert running.pid
        os.killpg(running.pid, signal.SIGKILL)
        assert exit_code(running) == -signal.SIGKILL, "it was killed before it was finished"
        assert not out.exists()
        now = finished_shards(growing)
        assert {name: now[name] for name in known} == known, "finished shards are left as they are"
        reused += bool(known)
        known = now
    assert reused == KILLS - 1
    assert len(known) >= KILLS

    assert exit_code(started(raw, out)) == 0
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "undisturbed").iterdir()}
    assert len(files) == 50 + 4 + 3
    final = {f"{name.partition('.')[0]}.parquet": inode for name, (inode, _) in known.items()}
    assert {name: (out / name).stat().st_ino for name in final} == final
    assert not growing.exists()
    assert json.loads(files["manifest.json"])["splits"]["train"]["images"] == 150
