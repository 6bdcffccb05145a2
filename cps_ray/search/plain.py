"""Searches as Optuna's documentation shows them, without this package's study: what `bench search` compares it with."""

from collections.abc import Callable, Mapping

import optuna

from cps_ray.config.space import draw
from cps_ray.config.sweep import Param, Value

PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    "median": optuna.pruners.MedianPruner,  # the one that a study has unless it is told otherwise
    "successive halving": optuna.pruners.SuccessiveHalvingPruner,
    "no": optuna.pruners.NopPruner,
}
"""Optuna's rules of early stopping, with the settings that they have by themselves."""


def plain_tpe(space: Mapping[str, Param], seed: int, pruner: str) -> "PlainSearch":
    """Returns a search by Optuna's TPE that stops trials by one of PRUNERS."""
    return PlainSearch(space, optuna.samplers.TPESampler(seed=seed), PRUNERS[pruner]())


def plain_random(space: Mapping[str, Param], seed: int) -> "PlainSearch":
    """Returns a search at random that stops no trial."""
    return PlainSearch(space, optuna.samplers.RandomSampler(seed=seed), optuna.pruners.NopPruner())


class PlainSearch:
    """A loop with Optuna alone, as its documentation shows it."""

    def __init__(
        self, space: Mapping[str, Param], sampler: optuna.samplers.BaseSampler, pruner: optuna.pruners.BasePruner
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
        self._trials: dict[int, optuna.Trial] = {}
        self._last: dict[int, float] = {}
        self._pruned: set[int] = set()

    def ask(self) -> tuple[int, dict[str, Value]]:
        """Begins a trial: its number and its point."""
        trial = self._study.ask()
        self._trials[trial.number] = trial
        return trial.number, draw(self._space, trial)

    def report(self, number: int, step: int, value: float) -> bool:
        """Reports an evaluation; False if the trial is to be stopped."""
        self._trials[number].report(value, step)
        self._last[number] = value
        if self._trials[number].should_prune():
            self._pruned.add(number)
        return number not in self._pruned

    def tell(self, number: int, *, failed: bool) -> None:
        """Ends a trial."""
        if failed or number in self._pruned:
            state = optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.PRUNED
            self._study.tell(self._trials[number], state=state)
        else:
            self._study.tell(self._trials[number], self._last[number])
