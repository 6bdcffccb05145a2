"""A sweep's study: an Optuna study on disk, which is the truth of a sweep. Knows nothing of Ray.

Whatever else is lost, the study says which points were tried, what they reported and how they ended. A trial cut short
is PRUNED with its curve, one that crashed is FAIL, a finished one is COMPLETE with the value that `objective.select` names.
One that collapsed or diverged is COMPLETE with the worst value, and with its reason as the attribute `failure`: Optuna's
samplers learn nothing from FAIL, and would try the same region again.
"""

import math
import sqlite3
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from cps_ray.config.schema import Where
from cps_ray.config.space import apply, draw
from cps_ray.config.sweep import ChoiceParam, EarlyStoppingConfig, Param, SamplerConfig, SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.errors import ConfigError, at
from cps_ray.results import COLLAPSED, COMPLETE, FAILED, PRUNED, RUNNING, STATES, STUDY_FILE

WORST = 0.0
"""Value of a collapsed trial: every metric that a search maximises lies in 0..1."""


def state_name(trial: FrozenTrial) -> str:
    """Name of a trial's state, one of STATES."""
    if trial.state == TrialState.COMPLETE:
        return COLLAPSED if "failure" in trial.user_attrs else COMPLETE
    return {TrialState.PRUNED: PRUNED, TrialState.FAIL: FAILED}.get(trial.state, RUNNING)


def _sampler(config: SamplerConfig, number: int) -> optuna.samplers.BaseSampler:
    """Returns what proposes trial `number`: one of its own, so that its point does not depend on who was interrupted before it."""
    seed = config.seed + number
    if config.type == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if config.type == "qmc":
        # Not `seed`: the sequence goes on where the study's trials end, and another scrambling would be another sequence.
        first = optuna.samplers.RandomSampler(seed=seed)  # until a trial has ended
        return optuna.samplers.QMCSampler(seed=config.seed, scramble=True, independent_sampler=first)
    if config.type == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=config.startup_trials)
    if config.type == "tpe":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=config.startup_trials)
    assert_never(config.type)


def _pruner(config: EarlyStoppingConfig) -> optuna.pruners.BasePruner:
    if config.type == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=config.grace, reduction_factor=config.reduction)
    if config.type == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=config.grace - 1)
    if config.type == "none":
        return optuna.pruners.NopPruner()
    assert_never(config.type)


def _kind(param: Param) -> str:
    """What trials of one study must have in common of a parameter: Optuna takes other bounds, but neither other choices nor another scale."""
    if isinstance(param, ChoiceParam):
        return f"a choice of {list(param.values)}"
    return f"{param.type}, log" if param.log else param.type


def _kind_drawn(distribution: optuna.distributions.BaseDistribution) -> str:
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return f"a choice of {list(distribution.choices)}"
    name = "int" if isinstance(distribution, optuna.distributions.IntDistribution) else "float"
    return f"{name}, log" if distribution.log else name


class _WithoutCollapsed(optuna.pruners.BasePruner):  # type: ignore[misc]
    """Shows a pruner no collapsed trials: one that was good until it diverged would set a bar that trials which end well may miss."""

    def __init__(self, pruner: optuna.pruners.BasePruner) -> None:
        self._pruner = pruner

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return bool(self._pruner.prune(_StudyWithoutCollapsed(study), trial))


class _StudyWithoutCollapsed:
    """A study of which `get_trials` leaves out collapsed trials."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        return [trial for trial in self._study.get_trials(*args, **kwargs) if state_name(trial) != COLLAPSED]


class SweepStudy:
    """Proposes trials, takes their curves, says which to stop, and keeps how they ended; `ask`, `report`, `should_prune` and `tell`
    mean what they mean in Optuna.

    A trial's intermediate values are what `objective.select` makes of its curve so far: the best, or the last.
    """

    def __init__(self, config: SweepConfig, folder: Path) -> None:
        """Opens the study in `folder`, or begins it with the enqueued points."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Opened by us: in a URL, SQLAlchemy would take %2F or ? in a folder's name for its own, each version in another way.
        connect = partial(sqlite3.connect, folder / STUDY_FILE, check_same_thread=False)
        with warnings.catch_warnings(), at(folder / STUDY_FILE):
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = optuna.storages.RDBStorage(f"sqlite:///{STUDY_FILE}", engine_kwargs={"creator": connect})
            self.study = optuna.create_study(
                storage=storage, study_name=config.name, direction="maximize", load_if_exists=True
            )
            self.study.pruner = _WithoutCollapsed(_pruner(config.early_stopping))
        self._config = config
        self._objective = config.objective
        if not self.study.trials:
            for point in config.enqueue:
                self.study.enqueue_trial(dict(point))
        # Taken now: what this session begins is RUNNING, too, and must not be begun twice.
        self._unfinished = self._running()
        self._live: dict[int, Trial] = {}
        self._curves: dict[int, dict[int, float]] = {}
        self._repeats: set[int] = set()
        """Trials whose last report the study had already."""

    def check_space(self, where: Where) -> None:
        """Raises ConfigError, with where the sweep says so, if the study's trials were drawn from a space that this one cannot go on from."""
        for name, param in self._config.search_space.items():
            drawn = {_kind_drawn(t.distributions[name]) for t in self.study.trials if name in t.distributions}
            if drawn - {_kind(param)}:
                raise ConfigError(
                    f"{where(('search_space', name))}: search_space.{name}: must stay {' or '.join(sorted(drawn))}, as the trials "
                    f"of this sweep were drawn, but is {_kind(param)}. Put it back, or begin another sweep from this file with --name."
                )

    @property
    def live(self) -> list[int]:
        """Numbers of the trials begun or continued here that have not ended yet."""
        return list(self._live)

    @property
    def seconds_before(self) -> float:
        """Wall time that earlier sessions have searched."""
        return float(self.study.user_attrs.get("seconds", 0.0))

    def add_seconds(self, seconds: float) -> None:
        """Adds the wall time of a session that has ended."""
        self.study.set_user_attr("seconds", self.seconds_before + seconds)

    @property
    def trials(self) -> list[FrozenTrial]:
        """Every trial that was begun, in order of its number."""
        # WAITING are enqueued points, which have a number before anybody asks for them.
        return [t for t in self.study.trials if t.state != TrialState.WAITING]

    def counts(self) -> dict[str, int]:
        """Number of trials by state: complete, pruned, collapsed, failed, running."""
        counts = dict.fromkeys(STATES, 0)
        for trial in self.trials:
            counts[state_name(trial)] += 1
        return counts

    def best(self) -> FrozenTrial | None:
        """The complete trial with the best value, the earlier one at a tie; None if none is complete."""
        done = [t for t in self.trials if state_name(t) == COMPLETE]
        return max(done, key=lambda t: t.value or 0.0, default=None)

    def ask(self) -> tuple[int, TrainConfig] | None:
        """Returns number and config of the next trial; None when the budget of trials is used up.

        Trials that an earlier session left unfinished come first, with the numbers and points they had.
        """
        unfinished = next(self._unfinished, None)
        if unfinished is not None:
            # Optuna keeps what a trial has drawn: `draw` below gives the same point again.
            self.study.sampler = _sampler(self._config.sampler, unfinished.number)
            trial = Trial(self.study, unfinished._trial_id)
        elif (number := len(self.trials)) < self._config.budget.trials:
            self.study.sampler = _sampler(self._config.sampler, number)
            trial = self.study.ask()
        else:
            return None
        try:
            changes = draw(self._config.search_space, trial)
            config = apply(self._config.train, changes, f"trial {trial.number}")
        except Exception:
            if unfinished is None:  # it never ran, and nothing is left to continue
                self.study.tell(trial, state=TrialState.FAIL)
            raise
        if unfinished is None:
            trial.set_user_attr("started", time.time())
        self._live[trial.number] = trial
        return trial.number, config

    def report(self, number: int, step: int, value: float) -> None:
        """Takes one evaluation of a trial. A resumed trial may repeat steps that the study has: they change nothing."""
        curve = self._curves.setdefault(number, {})
        curve[step] = value
        if step in self._frozen(number).intermediate_values:
            self._repeats.add(number)
            return
        self._repeats.discard(number)
        # Trials are compared at a step by what `objective.select` makes of them there: with `best`, one noisy evaluation
        # at a rung does not end a trial that was better before.
        self._live[number].report(self._objective.value(curve) if math.isfinite(value) else value, step)

    def should_prune(self, number: int) -> bool:
        """Whether a trial is to be stopped after what it reported last."""
        if number in self._repeats:
            return False  # at this step it was not stopped when it came here first
        if max(self._curves[number]) >= self._config.train.schedule.steps:
            return False  # it ends by itself, and complete
        return bool(self._live[number].should_prune())

    def tell(self, number: int, *, failure: str | None, collapsed: bool = False, **facts: Any) -> str:
        """Ends a trial and returns the name of its state; `facts` are kept with it.

        `failure`: what went wrong, in one line; None if nothing did. `collapsed`: whether that was the training's own result, not a crash.
        """
        curve = self._frozen(number).intermediate_values
        trial = self._live.pop(number)
        reported = self._curves.pop(number, {})
        last = reported[max(reported)] if reported else None
        for name, value in {"failure": failure, "ended": time.time(), "score_last": last, **facts}.items():
            if value is not None:
                trial.set_user_attr(name, value)
        finite = {step: value for step, value in curve.items() if math.isfinite(value)}
        if failure is not None and collapsed:
            self.study.tell(number, WORST)
        elif failure is not None or not finite:
            self.study.tell(number, state=TrialState.FAIL)
        elif max(finite) < self._config.train.schedule.steps:
            # Optuna takes the last intermediate value as a pruned trial's own.
            self.study.tell(number, state=TrialState.PRUNED)
        else:
            self.study.tell(number, self._objective.value(finite))
        return state_name(self._frozen(number))

    def failures(self) -> tuple[int, int]:
        """Number of failed or collapsed trials in all, and in a row at the end of the finished ones."""
        ended = [t for t in self.trials if t.state.is_finished()]
        # By time, not by number: trials that run at once do not end in the order in which they began.
        ended.sort(key=lambda t: t.user_attrs.get("ended", 0.0))
        failed = [state_name(t) in (FAILED, COLLAPSED) for t in ended]
        in_a_row = next((n for n, one in enumerate(reversed(failed)) if not one), len(failed))
        return sum(failed), in_a_row

    def _frozen(self, number: int) -> FrozenTrial:
        return self.study.trials[number]

    def _running(self) -> Iterator[FrozenTrial]:
        return iter([t for t in self.study.trials if t.state == TrialState.RUNNING])
