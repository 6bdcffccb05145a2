"""A sweep's study: an Optuna study on disk, which is the truth of a sweep. Knows nothing of Ray.

Whatever else is lost, the study says which points were tried, what they reported and how they ended. A trial cut short
is PRUNED with its curve, one that crashed is FAIL, a finished one is COMPLETE with the value that `objective.select` names.
One that collapsed or diverged is COMPLETE with the worst value, and with its reason as the attribute `failure`: Optuna's
samplers learn nothing from FAIL, and would try the same region again.

Trials that a warm start takes from earlier sweeps stand before the sweep's own, for the sampler alone: trial n of the sweep is trial
n + their number of the study.

It is read once, when it is opened; what is asked for while a sweep runs is kept in memory, a few numbers per trial.
"""

import math
import random
import sqlite3
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from cps_ray.config.checks import remarks
from cps_ray.config.schema import Where
from cps_ray.config.space import apply, draw, from_scalars, grid, own_point, scalar, to_scalars
from cps_ray.config.sweep import ChoiceParam, ObjectiveConfig, Param, Scalar, SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.errors import ConfigError, at
from cps_ray.results import COLLAPSED, COMPLETE, FAILED, PRUNED, RUNNING, STATES, STUDY_FILE, TRIALS_FOLDER
from cps_ray.search.disk import BEGIN_ANEW, damaged, on_disk
from cps_ray.search.stopping import stopping_rule
from cps_ray.search.warm_start import WARM, earlier_trials

WORST = 0.0
"""Value of a collapsed trial: every metric that a search maximises lies in 0..1."""
_BEST = ObjectiveConfig(select="best")
_ELECTION = "election"
"""Attribute of the study: see `SweepStudy.elect`."""
ACCUMULATE = "accumulate"
"""Attribute of a trial: see `SweepTrial`."""
_PREPARED = "prepared"
"""Attribute of a study that has all that it begins with."""


@dataclass(slots=True)
class SweepTrial:
    """A trial that was begun: what the tables say of it."""

    number: int
    params: dict[str, Any]
    started: float | None = None
    """Time of the clock, as `ended`."""
    state: str = RUNNING
    """One of STATES."""
    ended: float | None = None
    failure: str | None = None
    step: int | None = None
    """Step of the evaluation that `objective.select` takes."""
    value: float | None = None
    """Value of that evaluation."""
    score_best: float | None = None
    """The best evaluation whatever `objective.select` says: for people."""
    step_best: int | None = None
    score_last: float | None = None
    steps: int = 0
    accumulate: int | None = None
    """Micro-batches of a step, if memory was too small for the sweep's own."""

    def measure(self, curve: dict[int, float], objective: ObjectiveConfig) -> None:
        """Takes the study's curve (step -> value) so far."""
        self.step, self.step_best = objective.step(curve), _BEST.step(curve)
        self.value = None if self.step is None else curve[self.step]
        self.score_best = None if self.step_best is None else curve[self.step_best]
        self.steps = max(curve, default=0)

    @property
    def score(self) -> float | None:
        """What the search compares; None unless the trial is complete or has collapsed: other values compare with nothing."""
        return self.value if self.state == COMPLETE else WORST if self.state == COLLAPSED else None

    @property
    def seconds(self) -> float | None:
        """Wall time from its first beginning to its end."""
        return round(self.ended - self.started, 1) if self.started and self.ended else None


@dataclass(slots=True)
class _Unfinished:
    """What more is known of a trial that has not ended."""

    trial_id: int
    curve: dict[int, float] = field(default_factory=dict)
    """Step -> value, as in the study."""
    stopped_at: int | None = None
    """Step at which it was found to be worse than others."""
    reported: dict[int, float] = field(default_factory=dict)
    """Step -> value, as reported in this session; of a record that was lost since, as in the study."""
    is_to_stop: bool = False


def _is_warm(trial: FrozenTrial) -> bool:
    return WARM in trial.user_attrs


def _state(trial: FrozenTrial) -> str:
    if trial.state == TrialState.COMPLETE:
        return COLLAPSED if trial.user_attrs.get("failure") else COMPLETE
    return {TrialState.PRUNED: PRUNED, TrialState.FAIL: FAILED}.get(trial.state, RUNNING)


class _GridSampler(optuna.samplers.BaseSampler):  # type: ignore[misc]  # mypy does not see into Optuna
    """Completes a trial to the first of the points that are left; where none fits what it has, to the first that does."""

    def __init__(self, points: list[dict[str, Scalar | None]], begun: set[frozenset[Any]]) -> None:
        self._points = sorted(points, key=lambda point: frozenset(point.items()) in begun)  # stable: in their order

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, _: Any) -> Any:
        drawn = trial.params.items()
        return next(point[param_name] for point in self._points if param_name in point and drawn <= point.items())


def _kind(param: Param) -> str:
    """What trials of one study must have in common of a parameter: Optuna takes other bounds, but neither other choices nor another scale."""
    if isinstance(param, ChoiceParam):
        return f"a choice of {[scalar(value) for value in param.values]}"
    return f"{param.type}, log" if param.log else param.type


def _kind_drawn(distribution: optuna.distributions.BaseDistribution) -> str:
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return f"a choice of {list(distribution.choices)}"
    name = "int" if isinstance(distribution, optuna.distributions.IntDistribution) else "float"
    return f"{name}, log" if distribution.log else name


class SweepStudy:
    """Proposes trials, takes their curves, says which to stop, and keeps how they ended; `ask`, `report`, `should_prune` and `tell`
    mean what they mean in Optuna.

    A trial's intermediate values are what `objective.select` makes of its curve so far: the best, or the last.
    """

    def __init__(self, config: SweepConfig, folder: Path, home: Path | None = None) -> None:
        """Opens the study in `folder`, or begins it with the enqueued points; `home`: the folder in which its trials' folder lies, if that is another one.
        Raises ConfigError if it is damaged, or not this sweep's."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._config, self._objective = config, config.objective
        self._path = folder / STUDY_FILE
        self._trials: dict[int, SweepTrial] = {}
        self._rule = stopping_rule(config.early_stopping, config.train.schedule.steps)
        self._counts = dict.fromkeys(STATES, 0)
        self._best: SweepTrial | None = None
        self._elected: SweepTrial | None = None
        self._failed_in_a_row = 0
        self._since_best = 0
        """Trials that have ended since the best one did."""
        self._grid: list[dict[str, Scalar | None]] | None = None
        if config.sampler.type == "grid":
            self._grid = [to_scalars(config.search_space, point) for point in grid(config.search_space)]
            random.Random(config.sampler.seed).shuffle(self._grid)
        self.notices: list[str] = []
        """What a person should know of how the study began."""
        self._kinds: dict[str, set[str]] = {}
        """Parameter -> what the trials before this session were drawn from."""
        self._live: dict[int, _Unfinished] = {}
        with warnings.catch_warnings(), at(self._path), on_disk(self._path):
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Opened by us: in a URL, SQLAlchemy would take %2F or ? in a folder's name for its own, each version in another way.
            connect = partial(sqlite3.connect, self._path, check_same_thread=False)
            if ((home or folder) / TRIALS_FOLDER).exists():
                self._check_is_ours(connect)
            self._storage = optuna.storages.RDBStorage(f"sqlite:///{STUDY_FILE}", engine_kwargs={"creator": connect})
            self.study = self._create()
            trials = self._storage.get_all_trials(self.study._study_id, deepcopy=False)
            if _PREPARED not in self.study.user_attrs and all(
                trial.state == TrialState.WAITING or _is_warm(trial) for trial in trials
            ):
                if trials:  # killed in the middle of this
                    optuna.delete_study(study_name=config.name, storage=self._storage)
                    self.study = self._create()
                self._prepare()
                trials = self._storage.get_all_trials(self.study._study_id, deepcopy=False)
            self._seconds = float(self.study.user_attrs.get("seconds", 0.0))
        self._num_warm = sum(map(_is_warm, trials))
        # What an earlier session left unfinished: this one begins with it.
        self._unfinished = iter(self._load(trials[self._num_warm :]))
        self.study.sampler = self._sampler(len(self._trials))
        self._take_election()

    def _create(self) -> optuna.Study:
        return optuna.create_study(
            storage=self._storage, study_name=self._config.name, direction="maximize", load_if_exists=True
        )

    def _prepare(self) -> None:
        """Begins a study: with trials of earlier sweeps, and with the points that are tried first."""
        space = self._config.search_space
        warm, lines = earlier_trials(self._config)
        self.notices = [*lines, *remarks(self._config)]
        self.study.set_metric_names([self._objective.metric])
        self.study.add_trials(warm)
        own = own_point(space, self._config.train)
        for point in ([own] if own else []) + [point for point in self._config.enqueue if point != own]:
            self.study.enqueue_trial(to_scalars(space, point))
        self.study.set_user_attr(_PREPARED, True)

    def _check_is_ours(self, connect: Callable[[], sqlite3.Connection]) -> None:
        """Raises ConfigError for a damaged file, and for an empty one or another study, in which the sweep would silently begin anew."""
        query = "SELECT count(*) FROM trials JOIN studies USING (study_id) WHERE study_name = ?"
        num_trials, state = 0, "ok"
        with closing(connect()) as connection:
            if connection.execute("SELECT * FROM sqlite_master WHERE name = 'trials'").fetchone():
                # Not left to chance: SQLite itself notices a damaged page only when it reads that.
                (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                (num_trials,) = connection.execute(query, (self._config.name,)).fetchone()
        if state != "ok":
            raise damaged(self._path, state)
        if not num_trials:
            raise ConfigError(
                f"{self._path}: must hold the trials of sweep {self._config.name}, of which {TRIALS_FOLDER}/ has some, but holds none. "
                + BEGIN_ANEW
            )

    def _load(self, trials: list[FrozenTrial]) -> list[tuple[int, _Unfinished]]:
        """Takes the study's trials into memory, and returns those that have not ended, by number."""
        # WAITING are enqueued points, which have a number before anybody asks for them.
        begun = [trial for trial in trials if trial.state != TrialState.WAITING]
        unfinished = []
        for trial in begun:
            for name, distribution in trial.distributions.items():
                self._kinds.setdefault(name, set()).add(_kind_drawn(distribution))
            curve, attrs, number = trial.intermediate_values, trial.user_attrs, trial.number - self._num_warm
            params = from_scalars(self._config.search_space, trial.params)
            one = SweepTrial(number, params, attrs.get("started"), accumulate=attrs.get(ACCUMULATE))
            one.measure(curve, self._objective)
            self._trials[number] = one
            self._counts[RUNNING] += 1
            for step in sorted(curve):
                if step < self._config.train.schedule.steps:
                    self._rule.add(number, curve, step)
            if trial.state == TrialState.RUNNING:
                unfinished.append((number, _Unfinished(trial._trial_id, curve, attrs.get("stopped_at"), {**curve})))
        # By time, not by number: trials that run at once do not end in the order in which they began.
        ended = [trial for trial in begun if trial.state.is_finished()]
        for trial in sorted(ended, key=lambda trial: trial.user_attrs.get("ended", 0.0)):
            one = self._trials[trial.number - self._num_warm]
            one.ended, one.failure, one.score_last = (
                trial.user_attrs.get(name) for name in ("ended", "failure", "score_last")
            )
            self._end(one, _state(trial), trial.intermediate_values)
        return unfinished

    def _end(self, trial: SweepTrial, state: str, curve: dict[int, float]) -> None:
        trial.state = state
        self._counts[RUNNING] -= 1
        self._counts[state] += 1
        self._failed_in_a_row = self._failed_in_a_row + 1 if state in (FAILED, COLLAPSED) else 0
        self._rule.end(trial.number, curve, complete=state == COMPLETE, collapsed=state == COLLAPSED)
        before = None if self._best is None else self._best.score
        self._since_best = 0 if before is None else self._since_best + 1
        if state == COMPLETE and before is not None and (trial.score or 0.0) > before:
            self._since_best = 0
        # The earlier one at a tie.
        if state == COMPLETE and (self._best is None or _rank(trial) > _rank(self._best)):
            self._best = trial
        if state == COMPLETE:
            self._elected = None

    def check_space(self, where: Where) -> None:
        """Raises ConfigError, with where the sweep says so, if the study's trials were drawn from a space that this one cannot go on from."""
        for name, param in self._config.search_space.items():
            drawn = self._kinds.get(name, set())
            if drawn - {_kind(param)}:
                raise ConfigError(
                    f"{where(('search_space', name))}: search_space.{name}: must stay {' or '.join(sorted(drawn))}, as the trials "
                    f"of this sweep were drawn, but is {_kind(param)}. Put it back, or begin another sweep from this file with --name."
                )

    @property
    def live(self) -> list[int]:
        """Numbers of the trials begun or continued here that have not ended yet."""
        return list(self._live)

    def fact(self, name: str) -> Any:
        """Returns what `note` has kept under this name; None if nothing."""
        with on_disk(self._path):
            return self.study.user_attrs.get(name)

    def note(self, name: str, fact: Any) -> None:
        """Keeps a fact with the study, as JSON has it."""
        with on_disk(self._path):
            self.study.set_user_attr(name, fact)

    def delete(self) -> None:
        """Takes the study and its trials out of its file."""
        with on_disk(self._path):
            optuna.delete_study(study_name=self._config.name, storage=self._storage)

    @property
    def seconds_before(self) -> float:
        """Wall time that earlier sessions have searched."""
        return self._seconds

    def add_seconds(self, seconds: float) -> None:
        """Adds the wall time of a session that has ended."""
        self._seconds += seconds
        with on_disk(self._path):
            self.study.set_user_attr("seconds", self._seconds)

    @property
    def trials(self) -> list[SweepTrial]:
        """Every trial that was begun, in order of its number."""
        for number in self._live:
            self.trial(number)
        return list(self._trials.values())

    def trial(self, number: int) -> SweepTrial:
        """Returns a trial that was begun, as it is now."""
        trial = self._trials[number]
        if number in self._live:
            trial.measure(self._live[number].curve, self._objective)
        return trial

    def counts(self) -> dict[str, int]:
        """Number of trials by state: complete, pruned, collapsed, failed, running."""
        return dict(self._counts)

    @property
    def config(self) -> SweepConfig:
        """The sweep."""
        return self._config

    @property
    def num_left(self) -> int:
        """Number of trials of the budget that are to be begun or continued: running ones were left by a session that was killed."""
        return self._config.budget.trials - sum(self._counts.values()) + self._counts[RUNNING]

    def best(self) -> SweepTrial | None:
        """The complete trial with the best value, the earlier one at a tie, or the one of the best that `elect` has named; None if none is
        complete."""
        return self._elected or self._best

    def top(self, count: int) -> list[SweepTrial]:
        """Returns the complete trials with the best values, the best one first."""
        return sorted((each for each in self._trials.values() if each.state == COMPLETE), key=_rank, reverse=True)[
            :count
        ]

    @property
    def is_elected(self) -> bool:
        """Whether `elect` has named the best one, and no trial has completed since."""
        return self._elected is not None

    def elect(self, means: Mapping[int, float]) -> None:
        """Names the best of the best trials, by the means of what each reaches when it is trained again: number -> value. Holds until another trial
        completes, or the sweep asks for other ones to be trained again."""
        self.note(
            _ELECTION, {"final": self._election, "means": {str(number): value for number, value in means.items()}}
        )
        self._take_election()

    @property
    def _election(self) -> dict[str, Any]:
        final = self._config.final.model_dump(mode="json", include={"top", "seeds", "draws", "folds", "set"})
        return {**final, "of": [trial.number for trial in self.top(self._config.final.top)]}

    def _take_election(self) -> None:
        found = self.fact(_ELECTION)
        self._elected = None
        if found and found["final"] == self._election:
            self._elected = self._trials[int(max(found["means"], key=lambda number: found["means"][number]))]

    @property
    def is_stalled(self) -> bool:
        """Whether as many trials as `budget.patience` says have ended without a better value than the best one's."""
        patience = self._config.budget.patience
        return patience is not None and self._since_best >= patience

    @property
    def why_no_more(self) -> str:
        """Why no further trial begins, in words; "" if one may, or goes on."""
        if self._counts[RUNNING]:
            return ""
        return self._why_none_begins()

    def _why_none_begins(self) -> str:
        if len(self._trials) >= self._config.budget.trials:
            return f"all {self._config.budget.trials} trials of the budget have begun"
        if self.is_stalled:
            return f"budget.patience: {self._since_best} trials have ended without a better value"
        if self._grid is not None and self._begun().issuperset(frozenset(point.items()) for point in self._grid):
            return f"all {len(self._grid)} points of the grid have begun"
        return ""

    def _begun(self, but: int | None = None) -> set[frozenset[Any]]:
        """Points that were begun, as Optuna has them."""
        space = self._config.search_space
        return {
            frozenset(to_scalars(space, trial.params).items()) for trial in self._trials.values() if trial.number != but
        }

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Returns what proposes trial `number`: one of its own, so that its point does not depend on who was interrupted before it."""
        config = self._config.sampler
        seed, first = config.seed + number, config.startup_trials
        if config.type == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if config.type == "grid":
            assert self._grid is not None
            return _GridSampler(self._grid, self._begun(but=number))
        if config.type == "qmc":
            # Not `seed`: the sequence goes on where the study's trials end, and another scrambling would be another sequence.
            at_random = optuna.samplers.RandomSampler(seed=seed)  # until a trial has ended
            return optuna.samplers.QMCSampler(seed=config.seed, scramble=True, independent_sampler=at_random)
        if config.type == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=first)
        if config.type == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=first, warn_independent_sampling=False)
        if config.type == "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=first)
        assert_never(config.type)

    def ask(self) -> tuple[int, TrainConfig] | None:
        """Returns number and config of the next trial; None when the budget, the grid or the patience is used up.

        Trials that an earlier session left unfinished come first, with the numbers and points they had.
        """
        with on_disk(self._path):
            unfinished = next(self._unfinished, None)
            if unfinished is not None:
                number, live = unfinished
                self.study.sampler = self._sampler(number)
                # Optuna keeps what a trial has drawn: `draw` below gives the same point again.
                trial = Trial(self.study, live.trial_id)
            elif not self._why_none_begins():
                number = len(self._trials)
                self.study.sampler = self._sampler(number)
                trial = self.study.ask()
                live = _Unfinished(trial._trial_id)
                self._trials[number] = SweepTrial(number, {}, time.time())
                self._counts[RUNNING] += 1
            else:
                return None
            try:
                changes = draw(self._config.search_space, trial)
                more = self._trials[number].accumulate  # of an earlier session
                halved = {} if more is None else {"compute.accumulate": more}
                all_changes = {**changes, **halved, **self._config.searched_fold()}
                config = apply(self._config.train, all_changes, f"trial {number}")
            except Exception:
                if unfinished is None:  # it never ran, and nothing is left to continue
                    self.study.tell(number + self._num_warm, state=TrialState.FAIL)
                    self._end(self._trials[number], FAILED, {})
                raise
            if unfinished is None:
                self._storage.set_trial_user_attr(live.trial_id, "started", self._trials[number].started)
        self._trials[number].params = changes
        self._live[number] = live
        return number, config

    def report(self, number: int, step: int, value: float) -> None:
        """Takes one evaluation of a trial. A resumed trial may repeat steps that the study has: they change nothing."""
        live = self._live[number]
        live.reported[step] = value
        live.is_to_stop = step == live.stopped_at
        if step in live.curve:
            return  # what was decided here then, holds
        # Trials are compared at a step by what `objective.select` makes of them there: with `best`, one noisy evaluation
        # at a rung does not end a trial that was better before.
        counted = self._objective.value(live.reported) if math.isfinite(value) else value
        assert counted is not None
        live.curve[step] = counted
        with on_disk(self._path):
            # At its last step it ends by itself, and complete.
            if step < self._config.train.schedule.steps and self._rule.add(number, live.curve, step):
                # Before the report: whenever the driver dies, a step that the study has was decided on.
                self._storage.set_trial_user_attr(live.trial_id, "stopped_at", step)
                live.stopped_at, live.is_to_stop = step, True
            self._storage.set_trial_intermediate_value(live.trial_id, step, counted)

    def should_prune(self, number: int) -> bool:
        """Whether a trial is to be stopped after what it reported last."""
        return self._live[number].is_to_stop

    def halve(self, number: int, accumulate: int) -> None:
        """Takes note that a trial goes on with so many micro-batches a step, since its memory was too small."""
        with on_disk(self._path):
            self._storage.set_trial_user_attr(self._live[number].trial_id, ACCUMULATE, accumulate)
        self.trial(number).accumulate = accumulate

    def tell(self, number: int, *, failure: str | None, collapsed: bool = False, **facts: Any) -> str:
        """Ends a trial and returns the name of its state; `facts` are kept with it.

        `failure`: what went wrong, in one line; None if nothing did. `collapsed`: whether that was the training's own result, not a crash.
        """
        live, trial = self._live[number], self.trial(number)
        last = live.reported[max(live.reported)] if live.reported else None
        trial.ended, trial.failure, trial.score_last = time.time(), failure, last
        finite = {step: value for step, value in live.curve.items() if math.isfinite(value)}
        state = COMPLETE
        if failure is not None and collapsed:
            state = COLLAPSED
        elif failure is not None or not finite:
            state = FAILED
        elif max(finite) < self._config.train.schedule.steps:
            state = PRUNED
        with on_disk(self._path):
            if failure is None and "failure" in self._storage.get_trial(live.trial_id).user_attrs:
                # Of a session that was killed before the trial had ended by it: the trial went on.
                self._storage.set_trial_user_attr(live.trial_id, "failure", None)
            for name, fact in {"failure": failure, "ended": trial.ended, "score_last": last, **facts}.items():
                if fact is not None:
                    self._storage.set_trial_user_attr(live.trial_id, name, fact)
            if state in (COMPLETE, COLLAPSED):
                self.study.tell(number + self._num_warm, trial.value if state == COMPLETE else WORST)
            else:  # Optuna takes the last intermediate value as a pruned trial's own
                self.study.tell(
                    number + self._num_warm, state=TrialState.PRUNED if state == PRUNED else TrialState.FAIL
                )
        del self._live[number]
        self._end(trial, state, live.curve)
        return state

    def failures(self) -> tuple[int, int]:
        """Number of failed or collapsed trials in all, and in a row at the end of the finished ones."""
        return self._counts[FAILED] + self._counts[COLLAPSED], self._failed_in_a_row


def _rank(trial: SweepTrial) -> tuple[float, int]:
    return trial.score or 0.0, -trial.number


def drawn(trial: SweepTrial) -> dict[str, Any]:
    """Returns the changes that make a trial's training: what was drawn, and more micro-batches if its memory was too small."""
    return trial.params | ({} if trial.accumulate is None else {"compute.accumulate": trial.accumulate})
