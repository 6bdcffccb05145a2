"""The final phase of a sweep: the best configuration and the baselines over seeds, draws of the labels, or folds, evaluated once on images that
nothing was chosen by.

A baseline is the best configuration with the baseline's changes, and with what a search of its own has found: same network and steps. What
differs in the result is then the change itself. Arms are paired: the n-th training of each has the same seed, labels and fold.
"""

import shutil
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from cps_ray.config.reader import load_train
from cps_ray.config.space import apply
from cps_ray.config.sweep import BEST_ARM, SweepConfig, measured_network
from cps_ray.config.train import HELD_OUT, TrainConfig
from cps_ray.datasets.loader import train_data
from cps_ray.datasets.open import open_data
from cps_ray.engine.metrics import mean_iou
from cps_ray.engine.telemetry import Metrics, vanishing
from cps_ray.on_ray.evaluate_runs import CheckpointScores, evaluate_checkpoints
from cps_ray.results import FINAL_FOLDER
from cps_ray.runs import CONFIG_FILE, ERROR_FILE, best_checkpoint, checkpoints, read_metrics
from cps_ray.search.objective import own_metric
from cps_ray.search.records import Events
from cps_ray.search.tune_session import TrainingJob

_EXAMPLES = 5
ALL = "all"
"""Name of the training on all labels, which is delivered where folds are compared."""


@dataclass(frozen=True, slots=True)
class FinalRun:
    """One training of an arm."""

    arm: str
    repeat: int
    """Its seed, draw or fold."""
    job: TrainingJob
    is_last_step: bool = False
    """Whether its last step counts, not the best by val: where nothing was left to choose by."""
    split: str | None = "test"
    """Images that it is evaluated on; HELD_OUT: its fold. None: on none, since it has all labels."""
    labels: float = 1.0
    """Fraction of the labelled images that it has."""
    images: float = 1.0
    """Fraction of the unlabelled images that it has."""

    @property
    def is_whole(self) -> bool:
        """Whether it has all images that an arm may have."""
        return self.labels == self.images == 1.0


def plan_final_runs(
    root: Path,
    config: SweepConfig,
    best: TrainConfig,
    number: int,
    tuned: Mapping[tuple[str, int], Mapping[str, Any]],
    bests: Mapping[int, TrainConfig] | None = None,
) -> list[FinalRun]:
    """Returns the best configuration over the seeds, draws or folds, then each baseline over the same, then what the curve and the delivered model
    need beside them. `number`: of the trial that `best` is. `tuned`: what the baselines' own searches have found, by name and repeat;
    that of repeat 1 is also of all that have none. `bests`: the best configurations of repeats that have a search of their own."""
    if config.final.retrain == "none":
        return []
    arms: dict[str, Mapping[str, Any]] = {BEST_ARM: {}} | {name: config.changes(name) for name in config.baselines}
    # With several candidates its runs are there already.
    plan = _Plan(root, config, best, candidate(number) if config.final.top > 1 else BEST_ARM, tuned, bests or {})
    runs = [plan.run(arm, changes, repeat) for arm, changes in arms.items() for repeat in config.final.repeats]
    for fraction in sorted({*config.final.curve} - {1.0}):
        for repeat in config.final.repeats:
            # The best one, and the first baseline: each arm more is paid for at every point.
            runs += [plan.run(arm, changes, repeat, labels=fraction) for arm, changes in [*arms.items()][:2]]
            runs += [plan.run(BEST_ARM, {}, repeat, images=fraction)] if best.semi_supervised else []
    return runs + ([plan.on_all_labels()] if config.final.folds else [])


def plan_candidates(root: Path, config: SweepConfig, trials: Mapping[int, TrainConfig]) -> list[FinalRun]:
    """Returns the best trials over the seeds, draws or folds, for `final.top`. `trials`: their trainings by number."""
    return [
        _Plan(root, config, training).run(candidate(number), {}, repeat)
        for number, training in trials.items()
        for repeat in config.final.repeats
    ]


def best_arm_config(config: SweepConfig, best: TrainConfig, run: FinalRun) -> TrainConfig:
    """Returns what a run of the best arm must be a training of, by best.yaml (`best`)."""
    plan = _Plan(Path(), config, best)
    planned = plan.on_all_labels() if run.split is None else plan.run(BEST_ARM, {}, run.repeat)
    return planned.job.config


def candidate(number: int) -> str:
    """Returns the name of a trial among those that are trained again."""
    return f"trial-{number:04d}"


@dataclass(frozen=True, slots=True)
class _Plan:
    """Final runs from the best configuration."""

    root: Path
    config: SweepConfig
    best: TrainConfig
    best_name: str = BEST_ARM
    """Name of the best configuration in its folders' names."""
    tuned: Mapping[tuple[str, int], Mapping[str, Any]] = field(default_factory=dict)
    bests: Mapping[int, TrainConfig] = field(default_factory=dict)

    def run(
        self, arm: str, changes: Mapping[str, Any], repeat: int, *, labels: float = 1.0, images: float = 1.0
    ) -> FinalRun:
        final = self.config.final
        # `final.set` holds for all arms, also for what a baseline's search has found.
        base = self.bests.get(repeat, self.best)
        searched = repeat if repeat in self.bests else 1
        changes = {**self.tuned.get((arm, searched), {}), **final.set, **changes}
        data = apply(base, changes, f"baseline {arm}").data
        part = f"-labels{labels:g}" if labels < 1 else f"-images{images:g}" if images < 1 else ""
        # The seed comes last: a baseline changes the method, never which trainings are compared.
        own: dict[str, Any] = {"seed": repeat}
        if final.draws:
            own["data.subset_seed"] = repeat
        own |= self.config.fold(repeat - 1)
        if labels < 1:
            own["data.labeled"] = fewer(data.labeled, labels)
        if images < 1:
            own["data.unlabeled"] = fewer(1.0 if data.unlabeled is None else data.unlabeled, images)
        is_last_step = bool(final.folds) or "val" in changes.get("data.further_labeled", ())
        split = HELD_OUT if final.folds else "test"
        name = f"{self.best_name if arm == BEST_ARM else arm}{part}-{final.repeat_name}{repeat}"
        return FinalRun(arm, repeat, self._job(name, base, {**changes, **own}), is_last_step, split, labels, images)

    def on_all_labels(self) -> FinalRun:
        changes = {**self.config.final.set, "seed": 1, **self.config.fold(None)}
        return FinalRun(
            BEST_ARM, 1, self._job(f"{self.best_name}-{ALL}", self.best, changes), is_last_step=True, split=None
        )

    def _job(self, name: str, base: TrainConfig, changes: Mapping[str, Any]) -> TrainingJob:
        changed = apply(base, changes, f"final run {name}")
        metric = own_metric(self.config.objective.metric, changed)
        return TrainingJob(name, self.root / FINAL_FOLDER / name, changed, metric)


def fewer(wanted: Any, fraction: float) -> Any:
    """Returns a part of a number, or of a fraction, of images."""
    return wanted * fraction if isinstance(wanted, float) else max(1, round(wanted * fraction))


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
    """A final run, the checkpoint of it that counts, and the scores of that on the images that it is evaluated on."""

    run: FinalRun
    checkpoint: Path
    step: int
    validation: float
    scores: CheckpointScores
    num_labeled: int
    num_unlabeled: int
    """Number of images that it could draw from; 0 for methods without any."""
    vanished: str | None = None
    """Classes that the pseudo labels have lost at that checkpoint, as `vanishing` names them."""

    def row(self) -> dict[str, Any]:
        """Returns a line of seeds.csv, without what it differs in from the arm's other runs."""
        scores = {name: value for name, value in self.scores.metrics.items() if name.endswith(("miou", "/ece"))}
        return {"step": self.step, self.run.job.metric: self.validation, **scores}


def counting_checkpoint(run: FinalRun) -> tuple[Path, dict[str, Any]] | None:
    """Returns the checkpoint of a run that counts, with its meta data; None if there is none."""
    if run.is_last_step:
        return next(reversed(checkpoints(run.job.folder)), None)
    return best_checkpoint(run.job.folder, run.job.metric)


def validation(run: FinalRun) -> float:
    """Returns what the checkpoint of a run that counts has reached on val. The run has ended well."""
    found = counting_checkpoint(run)
    assert found is not None
    return float(found[1]["metrics"][run.job.metric])


def evaluate_final_runs(runs: list[FinalRun]) -> list[EvaluatedRun]:
    """Evaluates the checkpoint of each run that counts, on the test split or on the fold that it has not seen."""
    (split,) = {run.split for run in runs if run.split is not None}
    chosen = [(run, counting_checkpoint(run)) for run in runs if run.split == split]
    there = [(run, found) for run, found in chosen if found is not None]  # for the type checker: each has ended well
    asked = [(run.job.config, found[0], measured_network(run.job.metric)) for run, found in there]
    scores = evaluate_checkpoints(asked, split, _EXAMPLES)
    # Once for all that have the same images: drawing them takes time where they are many.
    sizes = {data: _num_images(config) for data, config in {_data_of(run): run.job.config for run, _ in there}.items()}
    return [
        EvaluatedRun(
            run,
            folder,
            meta["step"],
            meta["metrics"][run.job.metric],
            each,
            *sizes[_data_of(run)],
            vanishing(meta["metrics"]),
        )
        for (run, (folder, meta)), each in zip(there, scores, strict=True)
    ]


def _data_of(run: FinalRun) -> tuple[str, bool]:
    config = run.job.config
    return config.data.model_dump_json(), config.semi_supervised


def _num_images(config: TrainConfig) -> tuple[int, int]:
    """Returns how many labelled and unlabelled images a training has."""
    subset = train_data(open_data(config.data), config).subset
    return len(subset.labeled), len(subset.unlabeled) if config.semi_supervised else 0


def over_folds(evaluated: Sequence[EvaluatedRun]) -> CheckpointScores:
    """Returns the scores of all held-out images together, each predicted by the training that has not seen it; what is not counted in pixels is a mean
    over the folds."""
    each = [one.scores for one in evaluated]
    names = set.intersection(*(set(scores.metrics) for scores in each))
    metrics = {name: fmean(scores.metrics[name] for scores in each) for name in sorted(names)}
    # Each fold may have a configuration of its own, with more or fewer networks.
    networks = [name for name in each[0].confusion if all(name in scores.confusion for scores in each)]
    confusion = {name: np.sum([scores.confusion[name] for scores in each], axis=0) for name in networks}
    for network, matrix in confusion.items():
        part = "" if network == "a" else f"{network}/"
        metrics[f"test/{part}miou"] = mean_iou(torch.from_numpy(matrix))
    return CheckpointScores(metrics, each[0].examples, {name: matrix.tolist() for name, matrix in confusion.items()})
