"""The final phase of a sweep: the best configuration and the baselines over seeds, evaluated once on the test split.

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
from cps_ray.config.sweep import BEST_ARM, SweepConfig, measured_network
from cps_ray.config.train import TrainConfig
from cps_ray.engine.telemetry import Metrics, vanishing
from cps_ray.on_ray.evaluate_runs import CheckpointScores, evaluate_checkpoints
from cps_ray.results import FINAL_FOLDER
from cps_ray.runs import CONFIG_FILE, ERROR_FILE, best_checkpoint, checkpoints, read_metrics
from cps_ray.search.objective import own_metric
from cps_ray.search.records import Events
from cps_ray.search.tune_session import TrainingJob

_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class FinalRun:
    """One training of an arm."""

    arm: str
    seed: int
    job: TrainingJob


def plan_final_runs(root: Path, config: SweepConfig, best: TrainConfig) -> list[FinalRun]:
    """Returns the best configuration over the seeds, then each baseline over the same seeds."""
    if config.final.retrain == "none":
        return []
    arms: Mapping[str, Mapping[str, Any]] = {BEST_ARM: {}, **config.baselines}
    runs = []
    for arm, changes in arms.items():
        for seed in config.final.seeds:
            name = f"{arm}-seed{seed}"
            # The seed comes last: a baseline changes the method, never which seeds are compared.
            changed = apply(best, {**config.final.set, **changes, "seed": seed}, f"final run {name}")
            metric = own_metric(config.objective.metric, changed)
            runs.append(FinalRun(arm, seed, TrainingJob(name, root / FINAL_FOLDER / name, changed, metric)))
    return runs


def drop_stale(runs: list[FinalRun]) -> None:
    """Removes final runs of an earlier best configuration, left by a sweep that was extended since."""
    for run in runs:
        if is_stale(run.job):
            shutil.rmtree(run.job.folder)  # else Ray Train would continue from its checkpoint, with other settings


def is_stale(job: TrainingJob) -> bool:
    """Whether the run's folder holds a training with other settings; smaller micro-batches are none, see `failures.on_oom`."""
    path = job.folder / CONFIG_FILE
    if not path.exists():
        return False
    found = load_train(path)
    if found.compute.accumulate > job.config.compute.accumulate:
        found = found.model_copy(update={"compute": job.config.compute})
    return found != job.config


def is_done(job: TrainingJob) -> bool:
    """Whether the run's last checkpoint, which is always kept, is that of its last step, and it did not fail there."""
    found = checkpoints(job.folder)
    at_end = bool(found) and found[-1][1]["step"] >= job.config.schedule.steps
    return at_end and not (job.folder / ERROR_FILE).exists()


class FinalPhase:
    """Final runs as a phase of a session: those that are not done yet."""

    def __init__(self, runs: list[FinalRun], events: Events) -> None:
        # A run that was cut off is not done: its folder makes it continue from its latest checkpoint.
        self._waiting = deque(run.job for run in runs if not is_done(run.job))
        self._events = events
        self.failed: dict[str, str] = {}
        self.collapsed: dict[str, str] = {}

    def ask(self) -> TrainingJob | None:
        """Returns the next run that is not done, or None."""
        if not self._waiting:
            return None
        job = self._waiting.popleft()
        self._events("started", run=job.name, steps=job.config.schedule.steps)
        return job

    def report(self, job: TrainingJob, metrics: Metrics) -> bool:
        """Shows an evaluation; no final run is stopped."""
        value = metrics[job.metric]
        self._events("report", run=job.name, step=metrics["step"], steps=job.config.schedule.steps, value=value)
        return True  # early stopping would leave an arm without its seeds

    def halve(self, job: TrainingJob) -> None:
        """Takes note of nothing: the run's own config says it."""

    def tell(self, job: TrainingJob, failure: str | None, *, collapsed: bool) -> None:
        """Records how a run ended."""
        if failure is not None:
            # The others go on: they are kept, and a resume has only this one to do.
            (self.collapsed if collapsed else self.failed)[job.name] = failure
            self._events("collapsed" if collapsed else "failed", run=job.name, failure=failure)
        else:
            best = max(record[job.metric] for record in read_metrics(job.folder))
            self._events("finished", run=job.name, value=best)


@dataclass(frozen=True, slots=True)
class EvaluatedRun:
    """A final run, its best checkpoint by validation, and the scores of that on the test split."""

    run: FinalRun
    checkpoint: Path
    step: int
    validation: float
    scores: CheckpointScores
    vanished: str | None = None
    """Classes that the pseudo labels have lost at that checkpoint, as `vanishing` names them."""

    def row(self) -> dict[str, Any]:
        """Returns a line of seeds.csv."""
        scores = {name: value for name, value in self.scores.metrics.items() if name.endswith(("miou", "/ece"))}
        validation = {self.run.job.metric: self.validation}
        return {"arm": self.run.arm, "seed": self.run.seed, "step": self.step, **validation, **scores}


def evaluate_final_runs(runs: list[FinalRun]) -> list[EvaluatedRun]:
    """Evaluates each run's best checkpoint, chosen on the validation split, on the test split."""
    chosen = [(run, best_checkpoint(run.job.folder, run.job.metric)) for run in runs]
    there = [(run, found) for run, found in chosen if found is not None]  # for the type checker: each has ended well
    asked = [(run.job.config, found[0], measured_network(run.job.metric)) for run, found in there]
    scores = evaluate_checkpoints(asked, "test", _EXAMPLES)
    return [
        EvaluatedRun(run, folder, meta["step"], meta["metrics"][run.job.metric], each, vanishing(meta["metrics"]))
        for (run, (folder, meta)), each in zip(there, scores, strict=True)
    ]
