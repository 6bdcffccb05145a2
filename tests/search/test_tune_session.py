"""What a session makes of what Tune and the trainings say, without Ray: the pool only notes what it is told."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import changed

from cps_ray.config.sweep import FailuresConfig
from cps_ray.config.train import TrainConfig
from cps_ray.errors import DiskError
from cps_ray.on_ray.failures import COLLAPSED, CRASHED, DISK_FULL, OUT_OF_MEMORY
from cps_ray.runs import ERROR_FILE, METRICS_FILE, Records
from cps_ray.search.tune_session import TrainingJob, TuneSession


class Pool:
    """Stands for the actor's handle: a call is noted."""

    def __init__(self) -> None:
        self.stopped: list[str] = []
        self.stop = self

    def remote(self, folder: str) -> None:
        self.stopped.append(Path(folder).name)


class HeardPhase:
    """A phase of given trainings; notes what it is told, and ends a training at step `limit`."""

    def __init__(self, jobs: list[TrainingJob], limit: int = 99) -> None:
        self._jobs, self._limit = jobs, limit
        self.heard: list[Any] = []
        self.error: Exception | None = None

    def ask(self) -> TrainingJob | None:
        return self._jobs.pop(0) if self._jobs else None

    def report(self, job: TrainingJob, metrics: dict[str, Any]) -> bool:
        if self.error is not None:
            raise self.error
        self.heard.append((job.name, metrics["step"]))
        return metrics["step"] < self._limit

    def halve(self, job: TrainingJob) -> None:
        self.heard.append((job.name, "halved", job.config.compute.accumulate))

    def tell(self, job: TrainingJob, failure: str | None, *, collapsed: bool) -> None:
        self.heard.append((job.name, failure, collapsed))


def session_of(
    phase: HeardPhase, folder: Path, at_once: int = 2, **failures: Any
) -> tuple[TuneSession, Pool, list[str]]:
    pool, said = Pool(), []
    session = TuneSession(
        phase,
        folder / "tune",
        pool,
        sweep="s",
        at_once=lambda: at_once,
        failures=FailuresConfig.model_validate(failures),
        resume="RESUME",
        say=said.append,
    )
    return session, pool, said


def job(tiny: TrainConfig, folder: Path, name: str) -> TrainingJob:
    return TrainingJob(name, folder / name, tiny, "val/b/miou")


def record(folder: Path, *steps: int) -> None:
    with (folder / METRICS_FILE).open("a") as file:
        file.writelines(json.dumps({"step": step, "val/miou": 0.5}) + "\n" for step in steps)


def test_a_training_is_asked_for_with_its_resources_and_limits(tiny: TrainConfig, tmp_path: Path) -> None:
    session, _, _ = session_of(
        HeardPhase([job(tiny, tmp_path, "0000")]), tmp_path, retries=3, trial_timeout="2h", first_report_timeout="5m"
    )
    (tmp_path / "0000").mkdir()
    (tmp_path / "0000" / ERROR_FILE).write_text("of an earlier try")
    begun = session.suggest("id")
    assert begun is not None
    training = begun["training"]
    assert (training.folder, training.metric, training.sweep) == (str(tmp_path / "0000"), "val/b/miou", "s")
    assert (training.retries, training.most_s, training.first_report_s) == (3, 7200.0, 300.0)
    assert (training.shape.workers, training.shape.cpus, training.shape.gpus) == (1, tiny.resources.cpus_per_worker, 0)
    assert not (tmp_path / "0000" / ERROR_FILE).exists()
    assert session.suggest("other") == {}, "not now: the first may have to begin once more"


def test_no_more_begin_than_the_cluster_holds(tiny: TrainConfig, tmp_path: Path) -> None:
    jobs = [job(tiny, tmp_path, name) for name in ("0000", "0001")]
    session, _, _ = session_of(HeardPhase(jobs), tmp_path, at_once=1)
    assert session.suggest("a")
    assert session.suggest("b") == {}, "not now"
    session.end("a", {}, error=False)
    assert session.suggest("b")
    session.stop()
    assert session.suggest("c") is None


def test_each_evaluation_is_passed_on_once_and_the_answer_goes_to_the_workers(
    tiny: TrainConfig, tmp_path: Path
) -> None:
    phase = HeardPhase([job(tiny, tmp_path, "0000")], limit=6)
    session, pool, _ = session_of(phase, tmp_path)
    session.suggest("id")
    record(tmp_path / "0000", 2)
    assert session.hear("id", {})
    assert phase.heard == [], "its checkpoint is in the making: nobody may tidy the folder"
    assert session.hear("id", {"reported": 2})
    record(tmp_path / "0000", 4)
    with (tmp_path / "0000" / METRICS_FILE).open("a") as file:
        file.write('{"step": 6, "val')  # a line in the making
    assert session.hear("id", {"reported": 2})
    assert phase.heard == [("0000", 2)]
    assert session.hear("id", {"reported": 4})
    assert session.hear("id", {"reported": 4})
    assert phase.heard == [("0000", 2), ("0000", 4)]
    # The workers were started again: they have cut the file, and write a step once more.
    (tmp_path / "0000" / "new").write_text('{"step": 2, "val/miou": 0.5}\n{"step": 4, "val/miou": 0.5, "longer": 1}\n')
    (tmp_path / "0000" / "new").rename(tmp_path / "0000" / METRICS_FILE)
    assert session.hear("id", {"reported": 4})
    record(tmp_path / "0000", 6, 8)
    assert not session.hear("id", {"reported": 6})
    assert pool.stopped == ["0000"]
    session.end("id", {}, error=False)
    assert phase.heard[2:] == [("0000", 6), ("0000", None, False)], "what came after the decision does not count"


@pytest.mark.parametrize(
    ("last", "error", "told"),
    [
        ({"done": True}, False, (None, False)),
        ({"failure": "the loss is not finite", "kind": COLLAPSED}, False, ("the loss is not finite", True)),
        ({"failure": "KeyError: 7", "kind": CRASHED}, False, ("KeyError: 7", False)),
        ({"failure": "CUDA out of memory", "kind": OUT_OF_MEMORY}, False, ("CUDA out of memory", False)),
        (None, True, ("the trial's process died again and again", False)),
    ],
)
def test_how_a_training_ended_is_told_and_written(
    tiny: TrainConfig, tmp_path: Path, last: Any, error: bool, told: tuple[str | None, bool]
) -> None:
    phase = HeardPhase([job(tiny, tmp_path, "0000")])
    session, _, _ = session_of(phase, tmp_path)
    session.suggest("id")
    session.end("id", last, error=error)
    assert phase.heard == [("0000", *told)]
    written = tmp_path / "0000" / ERROR_FILE
    assert (written.read_text() if written.exists() else None) == (told[0] and f"{told[0]}\n")


def test_out_of_memory_is_tried_again_in_smaller_parts_until_there_are_none(tiny: TrainConfig, tmp_path: Path) -> None:
    tiny = changed(tiny, data__labeled_batch=4, data__unlabeled_batch=4)
    phase = HeardPhase([job(tiny, tmp_path, "0000"), job(tiny, tmp_path, "0001")])
    session, _, said = session_of(phase, tmp_path, on_oom="halve")
    failed = {"failure": "CUDA out of memory", "kind": OUT_OF_MEMORY}
    for accumulate in (2, 4):
        session.suggest("id")
        session.end("id", failed, error=False)
        assert phase.heard.pop() == ("0000", "halved", accumulate)
    session.suggest("id")
    assert "accumulate: 4" in (tmp_path / "0000" / "config.yaml").read_text()
    session.end("id", failed, error=False)
    assert phase.heard == [("0000", "CUDA out of memory", False)], "four images: not in eight parts"
    assert said == [f"0000: CUDA out of memory. Once more with compute.accumulate {n}" for n in (2, 4)]


def test_a_full_disk_ends_the_session_and_fails_no_trial(tiny: TrainConfig, tmp_path: Path) -> None:
    phase = HeardPhase([job(tiny, tmp_path, "0000")])
    session, _, _ = session_of(phase, tmp_path)
    session.suggest("id")
    session.end("id", {"failure": "OSError: [Errno 28] No space left on device", "kind": DISK_FULL}, error=False)
    assert phase.heard == []
    assert session.stopping
    assert isinstance(session._error, DiskError)
    assert "No space left on device. Free space, then: RESUME" in str(session._error)


def test_an_error_of_the_phase_is_the_sessions_not_tunes(tiny: TrainConfig, tmp_path: Path) -> None:
    phase = HeardPhase([job(tiny, tmp_path, "0000"), job(tiny, tmp_path, "0001")])
    session, pool, _ = session_of(phase, tmp_path)
    session.suggest("id")
    phase.error = DiskError("study.db: the disk is full")
    record(tmp_path / "0000", 2)
    assert session.hear("id", {"reported": 2}), "it is taken down with the session, not judged"
    assert session.stopping
    assert session._error is phase.error
    assert session.suggest("next") is None
    assert pool.stopped == []


def test_what_is_waited_for_is_said_once(tiny: TrainConfig, tmp_path: Path) -> None:
    session, _, said = session_of(HeardPhase([job(tiny, tmp_path, name) for name in ("0000", "0001")]), tmp_path)
    session.suggest("a")
    session.suggest("b")
    for trial, notice in (("a", None), ("a", "no room"), ("b", "no room"), ("a", "no room"), ("b", "0001: boom")):
        assert session.hear(trial, {"notice": notice})
    assert said == ["no room", "0001: boom"]


def test_the_last_training_that_runs_may_begin_once_more(tiny: TrainConfig, tmp_path: Path) -> None:
    session, _, _ = session_of(HeardPhase([job(tiny, tmp_path, "0000")]), tmp_path, on_oom="halve")
    session.suggest("a")
    assert session.suggest("b") == {}, "not over: Tune asks no more once it has heard so"
    session.end("a", {"failure": "CUDA out of memory", "kind": OUT_OF_MEMORY}, error=False)
    again = session.suggest("b")
    assert again
    assert again["training"].folder == str(tmp_path / "0000")
    session.end("b", {}, error=False)
    assert session.suggest("c") is None


def test_a_damaged_record_ends_the_reading_until_workers_have_written_the_file_anew(
    tiny: TrainConfig, tmp_path: Path
) -> None:
    phase = HeardPhase([job(tiny, tmp_path, "0000")])
    session, _, _ = session_of(phase, tmp_path)
    session.suggest("id")
    record(tmp_path / "0000", 2)
    with (tmp_path / "0000" / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "va{"step": 6}\n')
    record(tmp_path / "0000", 8)
    assert session.hear("id", {"reported": 8})
    assert phase.heard == [("0000", 2)]
    Records(tiny, tmp_path / "0000", 2)
    record(tmp_path / "0000", 4)
    assert session.hear("id", {"reported": 8})
    assert phase.heard == [("0000", 2), ("0000", 4)]
