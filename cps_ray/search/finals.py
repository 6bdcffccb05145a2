"""After the search: the best configuration and the baselines over seeds, judged once on the test split.

A baseline is the best configuration with the baseline's changes: same network, learning rate and steps. What differs in
the result is then the change itself, not the search.
"""

import shutil
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cps_ray.config.reader import load_train
from cps_ray.config.space import apply
from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.engine.telemetry import Metrics
from cps_ray.on_ray.judge import Verdict, judge_all
from cps_ray.on_ray.trainer import (
    CONFIG_FILE,
    METRICS_FILE,
    Objective,
    best_checkpoint,
    checkpoints,
    read_metrics,
)
from cps_ray.search.records import FINAL_FOLDER, Events, spread
from cps_ray.search.session import Job

OWN = "best"
"""The group of the best configuration itself, beside the baselines' names."""
_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class FinalRun:
    """One training of a group."""

    group: str
    seed: int
    job: Job


def plan_finals(root: Path, config: SweepConfig, best: TrainConfig) -> list[FinalRun]:
    """The best configuration over the seeds, then each baseline over the same seeds."""
    if config.final.retrain == "none":
        return []
    groups: Mapping[str, Mapping[str, Any]] = {OWN: {}, **config.baselines}
    runs = []
    for group, changes in groups.items():
        for seed in config.final.seeds:
            name = f"{group}-seed{seed}"
            changed = apply(best, {**config.final.set, **changes, "seed": seed}, f"final run {name}")
            runs.append(FinalRun(group, seed, Job(name, root / FINAL_FOLDER / name, changed)))
    return runs


def drop_stale(runs: list[FinalRun]) -> None:
    """Removes final runs of an earlier best configuration, left by a sweep that was extended since."""
    for run in runs:
        config = run.job.folder / CONFIG_FILE
        if config.exists() and load_train(config) != run.job.config:
            shutil.rmtree(run.job.folder)


def is_done(job: Job) -> bool:
    """Whether the run's last checkpoint, which is always kept, is of its last step."""
    found = checkpoints(job.folder)
    return bool(found) and found[-1][1]["step"] >= job.config.schedule.steps


class FinalWork:
    """The final runs as the work of a session: those that are not done yet."""

    def __init__(self, runs: list[FinalRun], objective: Objective, events: Events) -> None:
        self._waiting = deque(run.job for run in runs if not is_done(run.job))
        self._objective, self._events = objective, events
        self.failed: dict[str, str] = {}

    def next(self) -> Job | None:
        if not self._waiting:
            return None
        job = self._waiting.popleft()
        self._events("started", run=job.name, steps=job.config.schedule.steps)
        return job

    def report(self, job: Job, metrics: Metrics) -> bool:
        value = metrics[self._objective.metric]
        self._events("report", run=job.name, step=metrics["step"], steps=job.config.schedule.steps, value=value)
        return True

    def finish(self, job: Job, failure: str | None) -> None:
        if failure is not None:
            self.failed[job.name] = failure
            self._events("failed", run=job.name, failure=failure)
        else:
            records = read_metrics(job.folder / METRICS_FILE)
            best = self._objective.best([record[self._objective.metric] for record in records])
            self._events("finished", run=job.name, value=best)


@dataclass(frozen=True, slots=True)
class Judged:
    """A final run, its best checkpoint by validation, and what that did on the test split."""

    run: FinalRun
    checkpoint: Path
    step: int
    validation: float
    verdict: Verdict

    def row(self, metric: str) -> dict[str, Any]:
        """For seeds.csv."""
        scores = {name: value for name, value in self.verdict.metrics.items() if name.endswith("miou")}
        return {"group": self.run.group, "seed": self.run.seed, "step": self.step, metric: self.validation, **scores}


def judge_finals(runs: list[FinalRun], objective: Objective) -> list[Judged]:
    """Each run's best checkpoint, chosen on the validation split, on the test split."""
    chosen = [(run, best_checkpoint(run.job.folder, objective)) for run in runs]
    there = [(run, found) for run, found in chosen if found is not None]
    verdicts = judge_all([(run.job.config, found[0]) for run, found in there], "test", _EXAMPLES)
    return [
        Judged(run, folder, meta["step"], meta["metrics"][objective.metric], verdict)
        for (run, (folder, meta)), verdict in zip(there, verdicts, strict=True)
    ]


def compare(judged: list[Judged]) -> dict[str, Any]:
    """Per group and metric the mean and standard deviation over seeds; `gain`: best minus each baseline, in mIoU points."""
    groups: dict[str, list[Judged]] = {}
    for one in judged:
        groups.setdefault(one.run.group, []).append(one)
    table: dict[str, Any] = {}
    for group, members in groups.items():
        names = sorted(set.intersection(*(set(one.verdict.metrics) for one in members)))
        table[group] = {name: spread([one.verdict.metrics[name] for one in members]) for name in names}
    gains = {}
    if OWN in table:
        own = table[OWN]["test/miou"]["mean"]
        gains = {group: 100 * (own - row["test/miou"]["mean"]) for group, row in table.items() if group != OWN}
    return {"groups": table, "gain": gains}
