"""Disks that fail below a sweep: full, read-only, a damaged study. One line each, and nothing that has ended is lost."""

import contextlib
import errno
import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.errors import ConfigError, CpsRayError, DiskError
from cps_ray.search.disk import on_disk
from cps_ray.search.records import Events, write_summary, write_tables
from cps_ray.search.search_phase import SearchPhase
from cps_ray.search.study import SweepStudy


@pytest.fixture
def config(tiny: TrainConfig, tmp_path: Path) -> SweepConfig:
    return SweepConfig.model_validate(
        {
            "version": 1,
            "name": "s",
            "output": str(tmp_path),
            "train": tiny.dump(),
            "budget": {"trials": 500},
            "sampler": {"type": "random"},
            "early_stopping": {"type": "none"},
            "search_space": {"cps.weight": {"type": "float", "low": 0.1, "high": 10.0}},
        }
    )


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    ).returncode:
        pytest.skip("no file systems can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Takes all room that is left; returns the file that holds it."""
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))
    return folder / "filler"


def searching(config: SweepConfig, folder: Path) -> SearchPhase:
    gauges: Any = SimpleNamespace(set=lambda *_: None)
    return SearchPhase(SweepStudy(config, folder), config, folder, Events(folder), gauges)


def trials(phase: SearchPhase, count: int) -> None:
    for _ in range(count):
        job = phase.ask()
        assert job is not None
        for step in (2, 4, 6):
            phase.report(job, {"step": step, "val/miou": 0.5})
        phase.tell(job, None, collapsed=False)


def test_a_full_disk_is_one_line_and_a_resume_goes_on_once_there_is_room(config: SweepConfig, small: Path) -> None:
    (small / "ballast").write_bytes(bytes(700_000))
    phase = searching(config, small)
    with pytest.raises(DiskError) as caught:
        trials(phase, 500)
    text = str(caught.value)
    assert text.startswith(f"{small}/")
    assert "must have room to grow, but the disk is full. Free space, then: python -m cps_ray.sweep resume " in text
    assert caught.value.exit_code == 1
    assert phase.study.counts()["complete"] > 3
    done = [trial.params for trial in phase.study.trials if trial.state == "complete"]
    filler = fill(small)
    with pytest.raises(DiskError, match="the disk is full"):
        write_tables(small, phase.study, config)
    with pytest.raises(DiskError, match="the disk is full"):
        write_summary(small, phase.study, config, "running", much="x" * 10_000)
    with pytest.raises(DiskError, match="the disk is full"):
        phase.events("end", much="x" * 10_000)
    filler.unlink()
    (small / "ballast").unlink()
    phase = searching(config, small)
    found = phase.study.trials
    assert [trial.params for trial in found if trial.state == "complete"][: len(done)] == done
    write_tables(small, phase.study, config)
    trials(phase, len(found) - len(done) + 1)  # what was cut off, if any, and another
    assert phase.study.counts()["running"] == 0
    assert phase.study.counts()["complete"] > len(done)


@pytest.mark.parametrize("call", ["open", "ask", "report", "tell", "add_seconds"])
@pytest.mark.parametrize("disk", ["full", "read-only"])
def test_whatever_the_study_writes(config: SweepConfig, small: Path, call: str, disk: str) -> None:
    study = None
    if call != "open":
        study = SweepStudy(config, small)
        study.ask()
    if disk == "full":
        fill(small)
    else:
        if study is not None:
            study._storage.engine.dispose()  # a file that is open for writing keeps the disk writable
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    calls: dict[str, Callable[[], Any]] = {
        "open": lambda: SweepStudy(config, small),
        "ask": lambda: study.ask(),
        "report": lambda: study.report(0, 2, 0.5),
        "tell": lambda: study.tell(0, failure=None, note="x" * 100_000),
        "add_seconds": lambda: study.add_seconds(1.0),
    }
    expected = "the disk is full. Free space" if disk == "full" else r"must be writable, but is not \(.*\). Make it so"
    with pytest.raises(DiskError, match=expected) as caught:
        calls[call]()
    assert str(caught.value).startswith(f"{small / 'study.db'}: ")
    assert "\n" not in str(caught.value)


def cut(keep: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(keep * path.stat().st_size))


def of_another_program(path: Path) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE songs (name TEXT)")


def of_another_sweep(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE studies SET study_name = 'other'")
        connection.commit()


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        *((cut(keep), "is damaged") for keep in (0.001, 0.1, 0.5, 0.99)),
        (cut(0.0), "holds none"),
        (lambda path: path.write_text("a song\n" * 1000), "is damaged"),
        (of_another_program, "holds none"),
        (of_another_sweep, "holds none"),
    ],
)
def test_a_damaged_study_is_refused_and_not_begun_anew(
    config: SweepConfig, tmp_path: Path, damage: Callable[[Path], None], found: str
) -> None:
    SweepStudy(config, tmp_path).ask()
    (tmp_path / "trials" / "0000").mkdir(parents=True)
    damage(tmp_path / "study.db")
    before = (tmp_path / "study.db").read_bytes()
    with pytest.raises(ConfigError, match=found) as caught:
        SweepStudy(config, tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'study.db'}: must ")
    assert "Put back a copy of it" in text
    assert "\n" not in text
    assert (tmp_path / "study.db").read_bytes() == before


def test_a_study_that_is_damaged_while_the_sweep_runs(config: SweepConfig, tmp_path: Path) -> None:
    study = SweepStudy(config, tmp_path)
    study.ask()
    cut(0.3)(tmp_path / "study.db")
    with pytest.raises(CpsRayError, match=r"study\.db: must be the study of this sweep, but is damaged"):
        study.report(0, 2, 0.5)


def test_a_study_in_use_elsewhere_is_no_damage(tmp_path: Path) -> None:
    def locked() -> None:
        with contextlib.closing(sqlite3.connect(tmp_path / "x", timeout=0)) as one:
            one.execute("BEGIN EXCLUSIVE")
            with contextlib.closing(sqlite3.connect(tmp_path / "x", timeout=0)) as other:
                other.execute("BEGIN EXCLUSIVE")

    with pytest.raises(DiskError, match=r"cannot be used now .*database is locked"), on_disk(tmp_path / "study.db"):
        locked()


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for err in (OSError(errno.EMFILE, "Too many open files"), ValueError("x")):
        with pytest.raises(type(err)) as caught, on_disk(tmp_path / "x"):
            raise err
        assert caught.value is err
