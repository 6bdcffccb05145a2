"""Early stopping in memory is that of Optuna's pruners, also across resumes, whatever is killed between two writes."""

import math
import random
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.search.study import SweepStudy

_TRIALS = 30
_STEPS = 27
Trial = tuple[str, dict[str, Any], dict[int, float]]


@pytest.fixture
def sweep(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    # Three evaluations between any two rungs of asha at 3, 9 and 27 steps.
    monkeypatch.setattr("cps_ray.search.study.apply", lambda train, changes, where: train)
    train = {**tiny.dump(), "schedule": {"steps": _STEPS, "eval_every": 1}}
    return {
        "version": 1,
        "name": "s",
        "output": str(tmp_path),
        "train": train,
        "budget": {"trials": _TRIALS},
        "sampler": {"type": "qmc"},
        "search_space": {"cps.weight": {"type": "float", "low": 0.1, "high": 10.0}},
    }


class Reference(optuna.pruners.BasePruner):
    """Optuna's own pruner on Optuna's own study, without collapsed trials."""

    def __init__(self, kind: str) -> None:
        self._study = optuna.create_study(study_name="trial", direction="maximize", pruner=self)
        self._brackets = optuna.pruners.HyperbandPruner(min_resource=3, max_resource=_STEPS, reduction_factor=3)
        self._brackets._try_initialization(self._study)
        self._is_hyperband = kind == "hyperband"
        asha = optuna.pruners.SuccessiveHalvingPruner(min_resource=3, reduction_factor=3)
        self._pruner = asha if kind == "asha" else optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2)
        self._live: dict[int, optuna.Trial] = {}

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        others = [t for t in self._study.trials if "collapsed" not in t.user_attrs]
        pruner = self._pruner
        if self._is_hyperband:  # its own view of a bracket would show it the collapsed ones again
            bracket = self._brackets._get_bracket_id(self._study, trial)
            others = [t for t in others if self._brackets._get_bracket_id(self._study, t) == bracket]
            pruner = self._brackets._pruners[bracket]
        view: Any = type("View", (), {"get_trials": lambda _, deepcopy, states=None: _in(others, states)})()
        view.direction, view._storage = study.direction, study._storage
        return bool(pruner.prune(view, trial))

    def stops(self, number: int, step: int, value: float) -> bool:
        while number not in self._live:
            trial = self._study.ask()
            self._live[trial.number] = trial
        self._live[number].report(value, step)
        return step < _STEPS and self._live[number].should_prune()

    def tell(self, number: int, state: str, value: float | None) -> None:
        if state == "collapsed":
            self._live[number].set_user_attr("collapsed", True)
        states = {"failed": TrialState.FAIL, "pruned": TrialState.PRUNED}
        value = 0.0 if state == "collapsed" else value
        self._study.tell(number, None if state in states else value, states.get(state))


def _in(trials: list[FrozenTrial], states: Any) -> list[FrozenTrial]:
    return [trial for trial in trials if states is None or trial.state in states]


def search(config: SweepConfig, folder: Path, seed: int, restarts: float) -> list[Trial]:
    """Runs a whole search of trials that take turns, and compares every decision with Optuna's. `restarts`: how often it is killed."""
    folder.mkdir()
    study, reference = SweepStudy(config, folder), Reference(config.early_stopping.type)
    turns, kills = random.Random(seed), random.Random(seed)
    curves: dict[int, dict[int, float]] = {}
    while True:
        while len(curves) < 5 and (found := study.ask()) is not None:
            curves[found[0]] = {}
        if not curves:
            break
        if kills.random() < restarts:
            study = SweepStudy(config, folder)
            for _ in curves:
                found = study.ask()
                assert found is not None
                number, curve = found[0], curves[found[0]]
                for step in range(1, kills.randint(0, len(curve)) + 1):
                    study.report(number, step, curve[step])
                    assert not study.should_prune(number), "it went on here before"
        number = turns.choice(sorted(curves))
        curve = curves[number]
        for step in range(1, len(curve) + 1):  # what a restart has not repeated
            if step not in study._live[number].reported:
                study.report(number, step, curve[step])
        step = len(curve) + 1
        draws = random.Random(f"{seed} {number} {step}")
        # Coarse, so that there are ties; quality differs, so that there is something to stop.
        value = round(random.Random(number).random() + 0.3 * draws.random(), 1)
        curve[step] = math.nan if draws.random() < 0.02 else value
        study.report(number, step, curve[step])
        counted = study._live[number].curve[step]
        stops = study.should_prune(number)
        assert stops == reference.stops(number, step, counted), f"trial {number}, step {step}"
        end = draws.random()
        if stops or step == _STEPS or end < 0.02:
            failure = "x" if end < 0.02 and not stops else None
            state = study.tell(number, failure=failure, collapsed=end < 0.01)
            reference.tell(number, state, study.trial(number).value)
            del curves[number]
    return [
        (trial.state, trial.params, dict(study.study.trials[trial.number].intermediate_values))
        for trial in study.trials
    ]


@pytest.mark.parametrize(
    ("kind", "select", "seed"),
    [("asha", "best", 1), ("asha", "last", 2), ("hyperband", "last", 3), ("median", "last", 4)],
)
def test_every_decision_is_optunas_and_a_resumed_study_equals_the_undisturbed_one(
    sweep: dict[str, Any], tmp_path: Path, kind: str, select: str, seed: int
) -> None:
    changes = {"early_stopping": {"type": kind, "grace": 3, "reduction": 3}, "objective": {"select": select}}
    config = SweepConfig.model_validate({**sweep, **changes})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of curves that are all NaN
        undisturbed = search(config, tmp_path / "a", seed, 0.0)
        resumed = search(config, tmp_path / "b", seed, 0.05)
    states = [state for state, *_ in undisturbed]
    assert {"pruned", "complete", "collapsed", "failed"} <= set(states)
    assert repr(resumed) == repr(undisturbed)  # NaN is not equal to itself


@pytest.mark.parametrize("kind", ["asha", "hyperband"])
def test_a_trial_may_collapse_at_its_last_step_where_a_rung_would_be(
    sweep: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    config = SweepConfig.model_validate({**sweep, "early_stopping": {"type": kind, "grace": 3, "reduction": 3}})
    study = SweepStudy(config, tmp_path)
    study.ask()
    for step in range(1, _STEPS + 1):
        study.report(0, step, 0.5)
    assert study.tell(0, failure="one class takes all", collapsed=True) == "collapsed"
    assert SweepStudy(config, tmp_path).trial(0).state == "collapsed"


@pytest.mark.parametrize("killed_at", ["set_trial_user_attr", "set_trial_intermediate_value"])
def test_a_decision_outlives_the_driver(
    sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    """Killed before it is on record, the step is decided on again; killed after it, the trial is stopped although by now it would not be."""
    config = SweepConfig.model_validate({**sweep, "early_stopping": {"type": "asha", "grace": 3, "reduction": 3}})
    study = SweepStudy(config, tmp_path)
    for number in range(3):
        study.ask()
        for step in (1, 2):
            study.report(number, step, 0.5 - 0.1 * number)
    study.report(0, 3, 0.5)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(optuna.storages.RDBStorage, killed_at, die)
        with pytest.raises(KeyboardInterrupt):
            study.report(1, 3, 0.4)
    study = SweepStudy(config, tmp_path)
    for _ in range(3):
        study.ask()
    study.tell(0, failure="one class takes all", collapsed=True)  # it set the bar
    for step in (1, 2):
        study.report(1, step, 0.4)
        assert not study.should_prune(1)
    study.report(1, 3, 0.4)
    assert study.should_prune(1) == (killed_at == "set_trial_intermediate_value")


def test_a_trial_that_was_stopped_is_stopped_again(sweep: dict[str, Any], tmp_path: Path) -> None:
    config = SweepConfig.model_validate({**sweep, "early_stopping": {"type": "asha", "grace": 3, "reduction": 3}})
    study = SweepStudy(config, tmp_path)
    for number in range(2):
        study.ask()
        for step in (1, 2, 3):
            study.report(number, step, 0.5 - 0.1 * number)
    assert study.should_prune(1)
    study = SweepStudy(config, tmp_path)  # killed before `tell`
    for _ in range(2):
        study.ask()
    for step in (1, 2, 3):
        study.report(1, step, 0.4)
        assert study.should_prune(1) == (step == 3)
    assert study.tell(1, failure=None) == "pruned"
