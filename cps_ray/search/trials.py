"""The trials of a sweep as the work of a session: drawn by the study, judged while they run, kept or dropped."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from optuna.trial import TrialState

from cps_ray.config.space import apply
from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.engine.telemetry import Metrics
from cps_ray.on_ray.gauges import SweepGauges
from cps_ray.on_ray.trainer import drop_checkpoints
from cps_ray.search.display import show_params
from cps_ray.search.export import write_best
from cps_ray.search.folder import shown
from cps_ray.search.records import Events, trial_folder, write_summary, write_tables
from cps_ray.search.session import Job
from cps_ray.search.study import Search


@dataclass(slots=True)
class SearchWork:
    """The trials as the work of a session. Of all their checkpoints only the best trial's stay."""

    search: Search
    config: SweepConfig
    root: Path
    events: Events
    gauges: SweepGauges
    limit: str | None = None
    """Why the failure limits stopped the sweep."""
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Wall time of the search, earlier sessions included."""
        return self.search.seconds_before + time.monotonic() - self.started

    @property
    def out_of_time(self) -> bool:
        """Whether the budget of wall time is used up."""
        limit = self.config.budget.time
        return limit is not None and self.seconds > limit

    def next(self) -> Job | None:
        if self.limit or self.out_of_time:
            return None
        found = self.search.next()
        if found is None:
            return None
        number, config = found
        job = Job(f"{number:04d}", trial_folder(self.root, number), config)
        params = self.search.study.trials[number].params
        self.events("started", run=job.name, params=params, steps=config.schedule.steps)
        self._publish()
        return job

    def report(self, job: Job, metrics: Metrics) -> bool:
        value = metrics[self.config.objective.metric]
        self.events("report", run=job.name, step=metrics["step"], steps=job.config.schedule.steps, value=value)
        return self.search.report(int(job.name), metrics["step"], value)

    def finish(self, job: Job, failure: str | None) -> None:
        number = int(job.name)
        before = self.search.best()
        state = self.search.finish(number, failure=failure)
        curve = self.search.study.trials[number].intermediate_values
        if state == TrialState.FAIL:
            self.events("failed", run=job.name, failure=failure or "no finite value was reported")
            self._check_limits(failure or "")
        else:
            kind = "finished" if state == TrialState.COMPLETE else "pruned"
            self.events(kind, run=job.name, step=max(curve), value=self.search.value(curve))
        best = self.search.best()
        if best is not None and (before is None or best.number != before.number):
            self.events("best", run=job.name, value=best.value)
            self._write_best()
        self.tidy()
        write_tables(self.root, self.search, self.config)
        write_summary(self.root, self.search, self.config, "running")
        self._publish()

    def cut(self) -> None:
        """A limit has ended the search: gives the trials that it cut short their verdicts."""
        for number in self.search.live:
            self.search.finish(number, failure=None, cut="failures" if self.limit else "budget.time")
        self.tidy()

    def tidy(self) -> None:
        """Frees the disk. Of all ended trials each time: a stopped one may still have been writing when its turn came."""
        best = self.search.best()
        for trial in self.search.trials:
            if trial.state.is_finished() and (best is None or trial.number != best.number):
                drop_checkpoints(trial_folder(self.root, trial.number))

    def _write_best(self) -> None:
        write_best(self.root, best_config(self.search, self.config), best_header(self.root, self.search, self.config))

    def _check_limits(self, failure: str) -> None:
        limits = self.config.failures
        total, in_a_row = self.search.failures()
        where = f"Last: {failure}. Whole text: {self.root / 'trials'}/*/error.txt"
        if in_a_row >= limits.max_consecutive:
            self.limit = f"{in_a_row} trials in a row failed (failures.max_consecutive). {where}"
        elif total >= limits.max_failed:
            self.limit = f"{total} trials failed (failures.max_failed). {where}"

    def _publish(self) -> None:
        best = self.search.best()
        self.gauges.set(self.search.counts(), None if best is None else best.value)


def best_config(search: Search, config: SweepConfig) -> TrainConfig:
    """The best trial's training."""
    best = search.best()
    assert best is not None
    return apply(config.train, best.params, f"trial {best.number}")


def best_header(root: Path, search: Search, config: SweepConfig) -> str:
    """The comment on top of best.yaml."""
    best = search.best()
    assert best is not None
    curve = best.intermediate_values
    step = min(step for step, value in curve.items() if value == best.value)
    return (
        f"Best of sweep {config.name}: trial {best.number}, {config.objective.metric} {best.value:.4f} at step {step}.\n"
        f"{show_params(best.params)}\n"
        f"Train it again: python -m cps_ray.train {shown(root / 'best.yaml')}"
    )
