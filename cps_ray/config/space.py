"""The search space in terms of the standard library: draw a point, apply it to a training. Knows no Optuna.

Imports `schema`, `sweep` and `train`.
"""

import math
import random
from collections.abc import Mapping, Sequence
from decimal import Decimal
from graphlib import TopologicalSorter
from typing import Any, Protocol

from cps_ray.config.schema import Where, locate, parse, put
from cps_ray.config.sweep import ChoiceParam, FloatParam, Param, Scalar
from cps_ray.config.train import TrainConfig


class Suggest(Protocol):
    """What proposes values; an Optuna trial is one."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A real number in [low, high]."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """A whole number in [low, high]."""

    def suggest_categorical(self, name: str, choices: Sequence[Scalar]) -> Any:
        """One of `choices`."""


class RandomSuggest:
    """Suggests at random; the same seed gives the same values."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Uniform, or uniform in the logarithm, in [low, high]; with `step`, on low + k * step."""
        if step is not None:
            first, every = Decimal(str(low)), Decimal(str(step))
            return float(first + self._random.randint(0, int((Decimal(str(high)) - first) / every)) * every)
        if log:
            return min(max(math.exp(self._random.uniform(math.log(low), math.log(high))), low), high)
        return self._random.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Uniform, or uniform in the logarithm, in [low, high]; without `log`, on low + k * step."""
        if log:
            drawn = math.exp(self._random.uniform(math.log(low - 0.5), math.log(high + 0.5)))
            return min(max(round(drawn), low), high)
        return self._random.randrange(low, high + 1, step)

    def suggest_categorical(self, name: str, choices: Sequence[Scalar]) -> Any:
        """One of `choices`, each as likely."""
        return self._random.choice(choices)


def draw(space: Mapping[str, Param], suggest: Suggest) -> dict[str, Scalar]:
    """One point: dotted name -> value. A parameter whose `when` does not hold is left out, and so are those it rules."""
    point: dict[str, Scalar] = {}
    for name in TopologicalSorter({name: param.when or {} for name, param in space.items()}).static_order():
        if active(space[name], point):
            point[name] = _suggested(name, space[name], suggest)
    return point


def active(param: Param, point: Mapping[str, Scalar]) -> bool:
    """Whether every parameter that `when` names is in the point, with a value that it lists."""
    return all(name in point and point[name] in listed(value) for name, value in (param.when or {}).items())


def listed(value: Scalar | list[Scalar]) -> list[Scalar]:
    """One value or several, as `when` takes them, as a list."""
    return value if isinstance(value, list) else [value]


def preview(space: Mapping[str, Param], n: int, seed: int) -> list[dict[str, Scalar]]:
    """`n` random points, a function of `seed`."""
    suggest = RandomSuggest(seed)
    return [draw(space, suggest) for _ in range(n)]


def apply(train: TrainConfig, changes: Mapping[str, Any], where: str) -> TrainConfig:
    """The training with these settings (dotted name -> value) changed, validated again.

    A mapping changes the settings it names inside a section, and replaces a free mapping such as `model.options`.
    Relative paths in `changes` are relative to the working directory. ConfigError, beginning with `where`, if the
    result is no valid training.
    """
    return apply_at(train, changes, lambda loc: where)


def apply_at(train: TrainConfig, changes: Mapping[str, Any], where: Where) -> TrainConfig:
    """`apply`, with the place of each setting in `where`."""
    raw = train.dump()
    for name, value in changes.items():
        loc = locate(TrainConfig, raw, name)
        raw = put(TrainConfig, raw, loc, value, where=where(loc))
    return parse(TrainConfig, raw, where=where)


def _suggested(name: str, param: Param, suggest: Suggest) -> Scalar:
    if isinstance(param, ChoiceParam):
        value: Scalar = suggest.suggest_categorical(name, param.values)
        return value
    if isinstance(param, FloatParam):
        return suggest.suggest_float(name, param.low, param.high, step=param.step, log=param.log)
    return suggest.suggest_int(name, param.low, param.high, step=param.step or 1, log=param.log)
