"""The search phase of a sweep: its trials, proposed by the study, stopped while they run, kept or dropped."""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cps_ray.config.space import apply
from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.engine.telemetry import Metrics
from cps_ray.on_ray.gauges import SweepGauges
from cps_ray.results import BEST_FILE, COLLAPSED, COMPLETE, FAILED, RUNNING, trial_folder
from cps_ray.runs import drop_checkpoints
from cps_ray.search.disk import on_disk
from cps_ray.search.export import write_best
from cps_ray.search.records import Events, append_trial, write_summary, write_tables
from cps_ray.search.study import SweepStudy, SweepTrial, drawn
from cps_ray.search.tune_session import TrainingJob
from cps_ray.text import shell_path, show_params

_TABLES_COST = 0.02
"""Fraction of the time that writing tables may take, as they grow: they are whole and new each time."""


@dataclass(slots=True)
class SearchPhase:
    """Trials as a phase of a session. Of all their checkpoints only the best trial's stay."""

    study: SweepStudy
    config: SweepConfig
    root: Path
    events: Events
    gauges: SweepGauges | None
    prefix: str = ""
    """What stands before the numbers of its trials, in the names of its runs."""
    limit: str | None = None
    """Why the failure limits stopped the sweep."""
    started: float = field(default_factory=time.monotonic)
    _tables_due: float = 0.0
    """Time of the monotonic clock from which on tables are written again."""
    _ended: deque[int] = field(default_factory=lambda: deque(maxlen=16))
    """Trials that ended last: a stopped one may still have been writing when its turn came."""

    def __post_init__(self) -> None:
        self.tidy()  # what an earlier session left

    @property
    def seconds(self) -> float:
        """Wall time of the search, earlier sessions included."""
        return self.study.seconds_before + time.monotonic() - self.started

    @property
    def out_of_time(self) -> bool:
        """Whether the budget of wall time is used up."""
        limit = self.config.budget.time
        return limit is not None and self.seconds > limit

    def ask(self) -> TrainingJob | None:
        """Returns the study's next trial, or None when a budget or a failure limit is reached."""
        # The session is stopped for these, too, a moment later: until then nothing new begins.
        if self.limit or self.out_of_time:
            return None
        found = self.study.ask()
        if found is None:
            return None
        number, config = found
        name = f"{self.prefix}{number:04d}"
        job = TrainingJob(name, trial_folder(self.root, number), config, self.config.objective.metric)
        trial = self.study.trial(number)
        append_trial(self.root, trial, self.config)  # who looks on has the drawn values from there
        self.events("started", run=job.name, params=trial.params, steps=config.schedule.steps)
        self._publish()
        return job

    def report(self, job: TrainingJob, metrics: Metrics) -> bool:
        """Reports an evaluation to the study; False if the trial is to be stopped early."""
        number, value = self._number(job), metrics[self.config.objective.metric]
        self.events("report", run=job.name, step=metrics["step"], steps=job.config.schedule.steps, value=value)
        self.study.report(number, metrics["step"], value)
        return not self.study.should_prune(number)

    def halve(self, job: TrainingJob) -> None:
        """Takes note that a training is begun again with more micro-batches a step."""
        self.study.halve(self._number(job), job.config.compute.accumulate)

    def tell(self, job: TrainingJob, failure: str | None, *, collapsed: bool) -> None:
        """Ends a trial in the study, and brings best.yaml, trials.jsonl and summary up to date; tables when it is their time."""
        number = self._number(job)
        before, was_stalled = self.study.best(), self.study.is_stalled  # only `tell` changes them
        state = self.study.tell(number, failure=failure, collapsed=collapsed)
        trial, best = self.study.trial(number), self.study.best()
        append_trial(self.root, trial, self.config)
        if state in (FAILED, COLLAPSED):
            self.events(state, run=job.name, failure=failure or "no finite value was reported")
            self._check_limits(failure or "")
        else:
            kind = "finished" if state == COMPLETE else "pruned"
            self.events(kind, run=job.name, step=trial.steps, value=trial.value)
        self._ended.append(number)
        if best is not None and best is not before:
            self.events("best", run=job.name, value=best.score)
            # At once, not at the end: whoever kills a sweep after three days has the best of three days.
            self._write_best()
            if before is not None:
                self._ended.append(before.number)
        if self.study.is_stalled and not was_stalled:
            patience = self.config.budget.patience
            self.events("notice", text=f"{patience} trials have ended without a better value: no further one begins")
        self._drop_checkpoints(self._ended)
        self._write_tables_if_due()
        write_summary(self.root, self.study, self.config, RUNNING)
        self._publish()

    def end_cut_trials(self) -> None:
        """Ends the trials that a limit has cut short, each with its curve: a resumed sweep does not take them up again."""
        for number in self.study.live:
            self.study.tell(number, failure=None, cut="failures" if self.limit else "budget.time")
        self.tidy()

    def tidy(self) -> None:
        """Frees the disk of all ended trials but the best."""
        self._drop_checkpoints(trial.number for trial in self.study.trials if trial.state != RUNNING)

    def _drop_checkpoints(self, ended: Iterable[int]) -> None:
        best = self.study.best()
        for number in ended:
            if best is None or number != best.number:
                drop_checkpoints(trial_folder(self.root, number))

    def _write_tables_if_due(self) -> None:
        begin = time.monotonic()
        if begin < self._tables_due:
            return
        write_tables(self.root, self.study, self.config)
        end = time.monotonic()
        self._tables_due = end + (end - begin) / _TABLES_COST

    def _write_best(self) -> None:
        with on_disk(self.root / BEST_FILE):
            write_best(self.root, best_config(self.study, self.config), best_header(self.root, self.study, self.config))

    def _check_limits(self, failure: str) -> None:
        limits = self.config.failures
        total, in_a_row = self.study.failures()
        where = f"Last: {failure.removesuffix('.')}. Details: {self.root / 'trials'}/*/error.txt"
        # In a row first: it is the sharper sign that the sweep itself is wrong.
        if in_a_row >= limits.max_consecutive:
            self.limit = f"{in_a_row} trials in a row failed or collapsed (failures.max_consecutive). {where}"
        elif total >= limits.max_failed:
            self.limit = f"{total} trials failed or collapsed (failures.max_failed). {where}"

    def _publish(self) -> None:
        if self.gauges is not None:
            best = self.study.best()
            self.gauges.set(self.study.counts(), None if best is None else best.score)

    def _number(self, job: TrainingJob) -> int:
        return int(job.name.removeprefix(self.prefix))


def best_config(study: SweepStudy, config: SweepConfig) -> TrainConfig:
    """Returns the best trial's training. There must be a complete trial."""
    best = study.best()
    assert best is not None
    return trial_config(best, config)


def trial_config(trial: SweepTrial, config: SweepConfig) -> TrainConfig:
    """Returns a trial's training, with folds on all of them."""
    return apply(config.train, {**drawn(trial), **config.fold(None)}, f"trial {trial.number}")


def best_header(root: Path, study: SweepStudy, config: SweepConfig) -> str:
    """Returns the comment on top of best.yaml. There must be a complete trial."""
    best = study.best()
    assert best is not None
    return (
        f"Best of sweep {config.name}: trial {best.number}, {config.objective.metric} {best.score:.4f} at step {best.step}.\n"
        f"{show_params(best.params)}\n"
        f"Train it again: python -m cps_ray.train {shell_path(root / 'best.yaml')}"
    )
