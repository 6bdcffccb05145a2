"""Early stopping: decides from what all trials have reported so far. Kept in memory, a few numbers per trial, and rebuilt from the study.

The rules are those of Optuna's SuccessiveHalvingPruner, HyperbandPruner and MedianPruner, which read the whole study at every report. Values are the
study's intermediate values, higher is better.
"""

import math
import zlib
from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping
from itertools import accumulate
from typing import Protocol, assert_never

from cps_ray.config.sweep import EarlyStoppingConfig

_FEWEST = 4
"""Complete trials from which on `median` stops any."""


class StoppingRule(Protocol):
    """What a sweep's `early_stopping` names."""

    def add(self, number: int, curve: Mapping[int, float], step: int) -> bool:
        """Takes the evaluation at `step`, the last one of a trial's curve (step -> value); True if the trial is to be stopped there."""

    def end(self, number: int, curve: Mapping[int, float], *, complete: bool, collapsed: bool) -> None:
        """Takes the curve of a trial that has ended. A collapsed one counts no more: one that was good until it diverged would set a bar
        that trials which end well may miss."""


class _Asha:
    """Rungs lie at grace * reduction^k steps; a trial that is not among the best 1/reduction of those that came to its rung is stopped."""

    def __init__(self, grace: int, reduction: int) -> None:
        self._grace, self._reduction = grace, reduction
        self._rungs: dict[int, array[float]] = {}
        """Step of a rung -> values of the trials that came to it, sorted."""

    def _is_rung(self, step: int) -> bool:
        times, rest = divmod(step, self._grace)
        while times and times % self._reduction == 0:
            times //= self._reduction
        return times == 1 and rest == 0

    def add(self, number: int, curve: Mapping[int, float], step: int) -> bool:
        if not self._is_rung(step):
            return False
        value = curve[step]
        if math.isnan(value):
            return True
        rung = self._rungs.setdefault(step, array("d"))
        insort(rung, value)
        # Trials cannot wait: of the first reduction - 1 the best so far goes on.
        num_promoted = max(1, len(rung) // self._reduction)
        return value < rung[-num_promoted]

    def end(self, number: int, curve: Mapping[int, float], *, complete: bool, collapsed: bool) -> None:
        if not collapsed:
            return
        for step, value in curve.items():
            rung = self._rungs.get(step)  # at the last step nobody is stopped, so it has none
            if rung is not None and not math.isnan(value):
                del rung[bisect_left(rung, value)]


class _Hyperband:
    """Each trial is of one of several brackets: `_Asha` with first rungs at grace, grace * reduction, ... steps. The earlier these lie, the
    more trials a bracket takes, so that all cost about as much."""

    def __init__(self, grace: int, reduction: int, steps: int) -> None:
        self._brackets: list[_Asha] = []
        while grace * reduction ** len(self._brackets) <= steps:
            self._brackets.append(_Asha(grace * reduction ** len(self._brackets), reduction))
        count = len(self._brackets)
        self._sizes = [math.ceil(count * reduction**further / (further + 1)) for further in range(count - 1, -1, -1)]

    def _of(self, number: int) -> _Asha:
        # A hash, and not the numbers in turn: which trials run at once must not decide which are compared.
        place = zlib.crc32(f"trial_{number}".encode()) % sum(self._sizes)
        return self._brackets[bisect_right(list(accumulate(self._sizes)), place)]

    def add(self, number: int, curve: Mapping[int, float], step: int) -> bool:
        return self._of(number).add(number, curve, step)

    def end(self, number: int, curve: Mapping[int, float], *, complete: bool, collapsed: bool) -> None:
        self._of(number).end(number, curve, complete=complete, collapsed=collapsed)


class _Median:
    """A trial is stopped whose best value is below the median of what complete trials had at that step."""

    def __init__(self, grace: int) -> None:
        self._grace = grace
        self._num_complete = 0
        self._values: dict[int, array[float]] = {}
        """Step -> values of complete trials there, sorted."""

    def add(self, number: int, curve: Mapping[int, float], step: int) -> bool:
        if self._num_complete < _FEWEST or step < self._grace - 1:
            return False
        values = [value for value in curve.values() if not math.isnan(value)]
        there = self._values.get(step)
        if not values:
            return True
        if not there:
            return False
        low, high = there[(len(there) - 1) // 2], there[len(there) // 2]
        return max(values) < high - (high - low) / 2

    def end(self, number: int, curve: Mapping[int, float], *, complete: bool, collapsed: bool) -> None:
        if not complete:
            return
        self._num_complete += 1
        for step, value in curve.items():
            if not math.isnan(value):
                insort(self._values.setdefault(step, array("d")), value)


class _Never:
    def add(self, number: int, curve: Mapping[int, float], step: int) -> bool:
        return False

    def end(self, number: int, curve: Mapping[int, float], *, complete: bool, collapsed: bool) -> None:
        pass


def stopping_rule(config: EarlyStoppingConfig, steps: int) -> StoppingRule:
    """Returns the rule for trials of `steps` steps. It has seen none yet."""
    if config.type == "asha":
        return _Asha(config.grace, config.reduction)
    if config.type == "hyperband":
        return _Hyperband(config.grace, config.reduction, steps)
    if config.type == "median":
        return _Median(config.grace)
    if config.type == "none":
        return _Never()
    assert_never(config.type)
