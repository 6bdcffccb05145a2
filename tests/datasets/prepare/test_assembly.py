"""A data set as a whole: put in place at once or not at all, the same bytes every time, and all findings reported together."""

import fcntl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from trees import READER, encoded, pair, plan, save, scene

from cps_ray.datasets.prepare import writing
from cps_ray.datasets.prepare.assembly import BadDataError, one_by_one, write_shards
from cps_ray.datasets.prepare.findings import Finding, summary_lines
from cps_ray.datasets.prepare.items import FromFiles, Source
from cps_ray.datasets.prepare.writing import ShardJob, ShardReport
from cps_ray.datasets.shards import open_shards
from cps_ray.errors import DataError

Splits = dict[str, list[Source]]


@pytest.fixture
def splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Splits:
    """Five images in three shards for train, and two images for val."""
    monkeypatch.setattr(writing, "_SHARD_IMAGES", 2)
    raw = tmp_path / "raw"
    return {
        "train": [pair(raw, f"t{n}", masked=n != 1) for n in range(5)],
        "val": [pair(raw, f"v{n}") for n in range(2)],
    }


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep/er/shards"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def backwards(do: Callable[[ShardJob], ShardReport], jobs: Sequence[ShardJob]) -> Iterator[ShardReport]:
    """Runs the jobs another way: one by one, the last first."""
    return (do(job) for job in reversed(jobs))


def test_the_folder_holds_what_is_needed_and_nothing_else(splits: Splits, out: Path) -> None:
    manifest = write_shards(out, plan(splits, notes=("noted before",)))
    assert sorted(content(out)) == [
        "manifest.json",
        "train-00000.parquet",
        "train-00001.parquet",
        "train-00002.parquet",
        "train.index.parquet",
        "val-00000.parquet",
        "val.index.parquet",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["shards"]
    assert open_shards(out).manifest == manifest.signed()
    assert manifest.notes[0] == "noted before"


def test_the_same_input_gives_the_same_bytes_in_any_order_of_work(splits: Splits, out: Path) -> None:
    write_shards(out, plan(splits))
    write_shards(out.with_name("again"), plan(splits), run=backwards)
    assert content(out) == content(out.with_name("again"))


def test_what_exists_is_refused_and_kept(splits: Splits, out: Path) -> None:
    write_shards(out, plan(splits))
    before = content(out)
    with pytest.raises(DataError, match="already exists; remove it or name another folder"):
        write_shards(out, plan(splits))
    assert content(out) == before


def test_ids_are_unique_over_all_splits(splits: Splits, out: Path) -> None:
    with pytest.raises(DataError, match="ids must be unique over all splits, but 't0' is not; give splits a `prefix`"):
        write_shards(out, plan(splits | {"test": splits["train"][:1]}))
    assert not out.parent.exists()


def test_a_folder_that_cannot_be_written(splits: Splits, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/shards: cannot be written \(.*\); finished work is kept"):
        write_shards(tmp_path / "file/shards", plan(splits))


def test_a_full_disk_keeps_what_was_done(splits: Splits, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(do: Callable[[ShardJob], ShardReport], jobs: Sequence[ShardJob]) -> Iterator[ShardReport]:
        yield do(jobs[0])
        raise OSError(28, "No space left on device")

    with pytest.raises(
        DataError, match=r"shards: cannot be written \(No space left on device\).* the same command continues"
    ):
        write_shards(out, plan(splits), run=full)
    seen: list[tuple[int, bool]] = []
    write_shards(out, plan(splits), on_progress=lambda images, before: seen.append((images, before)))
    assert sorted(seen) == [(1, False), (2, False), (2, False), (2, True)]


def test_one_process_at_a_time_writes_a_folder(splits: Splits, out: Path) -> None:
    growing = out.with_name(".shards.unfinished")
    growing.mkdir(parents=True)
    with (growing / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing it; wait for that, or stop it"):
            write_shards(out, plan(splits))
    write_shards(out, plan(splits))


def test_a_call_that_waited_finds_the_folder_and_leaves_nothing(
    splits: Splits, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process puts its folder in place between the first look and the lock."""
    flock = fcntl.flock

    def overtaken(lock: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        out.mkdir()
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", overtaken)
    with pytest.raises(DataError, match="already exists"):
        write_shards(out, plan(splits), wait=True)
    assert [path.name for path in out.parent.iterdir()] == ["shards"]


def test_leftovers_of_another_try_are_not_taken_along(splits: Splits, out: Path) -> None:
    growing = out.with_name(".shards.unfinished")
    growing.mkdir(parents=True)
    for name in ("train-00009.parquet", "train-00009.json", "old-00000.parquet", "train-00000.parquet.17.tmp"):
        (growing / name).touch()
    write_shards(out, plan(splits))
    assert len(content(out)) == 7


# ------------------------------------------------------------------------------------------------------- bad files


def spoil(splits: Splits) -> list[str]:
    """Spoils an image of the first shard and a mask of the last; returns their paths."""
    image, mask = Path(splits["train"][0].image), Path(splits["train"][4].mask or "")
    image.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    save(mask, scene("no mask at all"))
    return [str(image), str(mask)]


def test_bad_files_are_reported_together_and_nothing_is_put_in_place(splits: Splits, out: Path) -> None:
    paths = spoil(splits)
    unpaired = Finding("no mask", "lonely.png", "must have a mask, but has none", "add it")
    with pytest.raises(
        BadDataError, match=r"3 files cannot be used\. Fix .* \(finished work is kept\), or .* --skip-bad"
    ) as caught:
        write_shards(out, plan(splits, findings=(unpaired,)))
    bad = [finding for finding in caught.value.findings if finding.fatal]
    assert sorted(finding.where for finding in bad) == sorted([*paths, "lonely.png"])
    assert caught.value.findings[: len(bad)] == tuple(bad), "fatal ones first"
    assert not out.exists()


def test_fixed_files_are_read_again_and_no_others(splits: Splits, out: Path) -> None:
    image, mask = spoil(splits)
    with pytest.raises(BadDataError):
        write_shards(out, plan(splits))
    pair(Path(image).parent, "t0")
    pair(Path(mask).parent, "t4")
    seen: list[tuple[int, bool]] = []
    write_shards(out, plan(splits), on_progress=lambda images, before: seen.append((images, before)))
    assert sorted(seen) == [(1, False), (2, False), (2, True), (2, True)]
    write_shards(out.with_name("undisturbed"), plan(splits))
    assert content(out) == content(out.with_name("undisturbed"))


def test_skip_bad_leaves_out_and_lists(splits: Splits, out: Path) -> None:
    paths = spoil(splits)
    manifest = write_shards(out, plan(splits), skip_bad=True)
    assert open_shards(out).index("train").ids == ("t1", "t2", "t3")
    assert [entry.file for entry in manifest.left_out] == paths
    assert "Git LFS pointer" in manifest.left_out[0].why
    assert [file.images for file in manifest.splits["train"].files] == [1, 2], "the third shard has nothing left"


def test_skip_bad_needs_something_left(splits: Splits, out: Path) -> None:
    for source in splits["val"]:
        Path(source.image).write_bytes(b"")
    with pytest.raises(DataError, match="every split must have images that can be used, but 'val' has none"):
        write_shards(out, plan(splits), skip_bad=True)
    assert not out.exists()


def copied(splits: Splits, source: Source, key: str) -> Source:
    path = Path(source.image).with_name(f"{key}.png")
    path.write_bytes(Path(source.image).read_bytes())
    return Source(key, str(path), source.masks)


def test_one_image_in_two_splits_is_refused(splits: Splits, out: Path) -> None:
    splits["train"].append(copied(splits, splits["val"][0], "t5"))
    with pytest.raises(BadDataError) as caught:
        write_shards(out, plan(splits))
    (finding,) = (finding for finding in caught.value.findings if finding.fatal)
    assert finding.where == splits["train"][5].image
    assert "val/v0 is the very same; take it out of train" in finding.line


def test_skip_bad_takes_the_copy_out_of_train_and_writes_only_its_shard_again(splits: Splits, out: Path) -> None:
    splits["train"].insert(2, copied(splits, splits["val"][0], "copy"))
    with pytest.raises(BadDataError):
        write_shards(out, plan(splits))
    growing = out.with_name(".shards.unfinished")
    before = {f"{path.name.partition('.')[0]}.parquet": path.stat().st_ino for path in growing.glob("*.parquet")}
    manifest = write_shards(out, plan(splits), skip_bad=True)
    assert open_shards(out).index("train").ids == ("t0", "t1", "t2", "t3", "t4")
    assert open_shards(out).index("val").ids == ("v0", "v1")
    assert [entry.file for entry in manifest.left_out] == [splits["train"][2].image]
    after = {path.name: path.stat().st_ino for path in out.glob("*-*.parquet")}
    assert {name for name in after if after[name] != before[name]} == {"train-00001.parquet"}


def test_what_spoils_the_whole_split_cannot_be_skipped(tmp_path: Path, out: Path) -> None:
    """Masks of {0, 255}: leaving out the file that the finding names would not make 255 a class."""
    sources = [pair(tmp_path / "raw", key, values=(0, 255)) for key in "ab"]
    data = replace(plan({"train": sources}), make_item=FromFiles(replace(READER, void_by_default=True)))
    with pytest.raises(BadDataError, match=r"\(finished work is kept\)\.$"):
        write_shards(out, data, skip_bad=True)


def test_warnings_are_kept_in_the_manifest(splits: Splits, out: Path) -> None:
    image = Path(splits["train"][0].image)
    near = image.with_name("near.jpg")
    near.write_bytes(encoded(scene("t0"), "JPEG", quality=60))
    splits["val"].append(Source("near", str(near), splits["val"][0].masks))
    (note,) = write_shards(out, plan(splits)).notes
    assert "1 pairs look nearly the same (t0 ~ near)" in note


def test_an_error_of_a_job_stops_the_work(splits: Splits) -> None:
    def broken(job: ShardJob) -> ShardReport:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(one_by_one(broken, [ShardJob("", "train", 0, (), lambda source: source, ())]))  # type: ignore[arg-type, return-value]


def test_files_with_one_problem_are_reported_in_one_line_and_every_warning_in_its_own() -> None:
    sizes = [Finding("sizes differ", f"{key}.png", f"is {key}", "export again") for key in "abc"]
    warnings = [Finding("images repeat", split, f"{split} twice", "drop", fatal=False) for split in ("train", "val")]
    assert summary_lines([*warnings, *sizes]) == [
        "a.png and 2 more: is a; export again.",
        "train: train twice; drop.",
        "val: val twice; drop.",
    ]
