"""The search phase without a cluster: what it writes as trials begin and end, and when."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from support import changed

import cps_ray
from cps_ray.config import space
from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.search import records, search_phase, sweep_folder
from cps_ray.search.records import Events, write_tables
from cps_ray.search.search_phase import SearchPhase
from cps_ray.search.study import SweepStudy
from cps_ray.search.tune_session import TrainingJob


@pytest.fixture
def phase(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SearchPhase:
    for name in ("study", "search_phase"):
        monkeypatch.setattr(f"cps_ray.search.{name}.apply", lambda train, changes, where: train)
    config = SweepConfig.model_validate(
        {
            "version": 1,
            "name": "s",
            "output": str(tmp_path),
            "train": tiny.dump(),
            "budget": {"trials": 30},
            "sampler": {"type": "random"},
            "early_stopping": {"type": "asha", "grace": 2, "reduction": 2},
            "search_space": {"cps.weight": {"type": "float", "low": 0.1, "high": 10.0}},
        }
    )
    sweep_folder.write_resolved(tmp_path, config)
    return reopened(tmp_path, config)


def reopened(root: Path, config: SweepConfig) -> SearchPhase:
    gauges: Any = SimpleNamespace(set=lambda *_: None)
    return SearchPhase(SweepStudy(config, root), config, root, Events(root), gauges)


def begin(phase: SearchPhase) -> TrainingJob:
    job = phase.ask()
    assert job is not None
    (job.folder / "checkpoint_1").mkdir(parents=True, exist_ok=True)
    return job


def end(phase: SearchPhase, job: TrainingJob, *values: float) -> None:
    lines = [{"step": 2 * n, "val/miou": value} for n, value in enumerate(values, 1)]
    (job.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for line in lines:
        phase.report(job, line)
    phase.tell(job, None, collapsed=False)


def test_each_beginning_and_each_end_is_a_line_that_who_looks_on_reads(phase: SearchPhase) -> None:
    phase._tables_due = math.inf  # tables, once written, leave one line of each trial
    for value in (0.5, 0.6):
        end(phase, begin(phase), value, value, value)
    begin(phase)
    lines = (phase.root / "trials.jsonl").read_text().splitlines()
    assert [(row["number"], row["state"]) for row in map(json.loads, lines)] == [
        (0, "running"),
        (0, "complete"),
        (1, "running"),
        (1, "complete"),
        (2, "running"),
    ]
    rows = cps_ray.open_sweep(phase.root).trials.to_pylist()  # as if the driver had been killed just now
    assert [row["state"] for row in rows] == ["complete", "complete", "interrupted"]
    drawn = [trial.params["cps.weight"] for trial in phase.study.study.trials]
    assert [row["params.cps.weight"] for row in rows] == drawn
    with (phase.root / "trials.jsonl").open("a") as file:
        file.write('{"number": 2, "state": "comp')  # the driver, or the disk, ended here
    assert cps_ray.open_sweep(phase.root).trials.to_pylist() == rows
    write_tables(phase.root, phase.study, phase.config)  # as a resume does
    assert len((phase.root / "trials.jsonl").read_text().splitlines()) == 3
    assert cps_ray.open_sweep(phase.root).trials.to_pylist() == rows


def test_tables_take_at_most_a_fiftieth_of_the_time(phase: SearchPhase, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    written: list[float] = []

    def write(*_: object) -> None:
        nonlocal now
        written.append(now)
        now += 0.5

    monkeypatch.setattr(search_phase, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(search_phase, "write_tables", write)
    for _ in range(20):
        end(phase, begin(phase), 0.5, 0.5, 0.5)
        now += 5.0
    assert written == [100.0, 125.5, 151.0, 176.5]
    assert phase.study.counts()["complete"] == 20


def test_a_trial_costs_no_look_at_all_others(phase: SearchPhase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optuna copies every trial that is asked for with these: at each report, that grew with the sweep."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("all trials are read")

    monkeypatch.setattr(optuna.Study, "get_trials", refuse)
    monkeypatch.setattr(optuna.storages.RDBStorage, "get_all_trials", refuse)
    monkeypatch.setattr(SearchPhase, "tidy", refuse)
    for value in (0.5, 0.6, 0.1):
        end(phase, begin(phase), value)
    assert phase.study.failures() == (0, 0)


def kept(phase: SearchPhase) -> list[str]:
    return sorted(path.parent.name for path in phase.root.glob("trials/*/checkpoint_1"))


def test_of_ended_trials_the_best_ones_checkpoints_stay(phase: SearchPhase) -> None:
    for value, best in ((0.5, "0000"), (0.7, "0001"), (0.6, "0001"), (0.9, "0003")):
        end(phase, begin(phase), value, value, value)
        assert kept(phase) == [best]
    late = phase.root / "trials" / "0002" / "checkpoint_1"
    late.mkdir()  # a stopped trial was still writing
    running = begin(phase)
    end(phase, begin(phase), 0.1)
    assert kept(phase) == ["0003", running.name]
    for number in range(3):  # however long ago they ended
        (phase.root / "trials" / f"{number:04d}" / "checkpoint_1").mkdir()
    assert kept(reopened(phase.root, phase.config)) == ["0003", running.name]


def test_summary_asks_git_once(phase: SearchPhase, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("cps_ray.search.records._commit", lambda: asked.append(1))
    records.environment.cache_clear()
    for value in (0.5, 0.6):
        end(phase, begin(phase), value, value, value)
    records.environment.cache_clear()  # it holds no commit
    assert len(asked) == 1


def test_a_trial_that_was_halved_stays_so_when_it_is_resumed_and_in_the_best_training(
    phase: SearchPhase, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("study", "search_phase"):
        monkeypatch.setattr(f"cps_ray.search.{name}.apply", space.apply)  # the real one again
    begun = begin(phase)
    assert begun.config.compute.accumulate == 1
    phase.halve(replace(begun, config=changed(begun.config, compute__accumulate=2)))
    phase = reopened(phase.root, phase.config)
    resumed = begin(phase)
    assert (resumed.name, resumed.config.compute.accumulate) == (begun.name, 2)
    end(phase, resumed, 0.1, 0.2, 0.3)
    assert search_phase.best_config(phase.study, phase.config).compute.accumulate == 2
    assert cps_ray.open_sweep(phase.root).trials["accumulate"].to_pylist() == [2]
    other = begin(phase)
    assert other.config.compute.accumulate == 1, "another trial has its own memory"


def test_the_end_of_patience_is_said_once(phase: SearchPhase) -> None:
    budget = phase.config.budget.model_copy(update={"patience": 2})
    phase = reopened(phase.root, phase.config.model_copy(update={"budget": budget}))
    running = begin(phase)
    end(phase, begin(phase), 0.5, 0.5, 0.5)
    end(phase, begin(phase), 0.4, 0.4, 0.4)
    end(phase, begin(phase), 0.1)
    assert phase.ask() is None
    end(phase, running, 0.3, 0.3, 0.3)
    events = [json.loads(line) for line in (phase.root / "events.jsonl").read_text().splitlines()]
    notices = [event["text"] for event in events if event["event"] == "notice"]
    assert notices == ["2 trials have ended without a better value: no further one begins"]
    assert phase.study.why_no_more
