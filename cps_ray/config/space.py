"""Draws points from the search space and applies them to a training. Independent of Optuna, whose trials fit `Suggest`.

Imports `schema`, `sweep` and `train`.
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from graphlib import TopologicalSorter
from typing import Any, Protocol

from cps_ray.config.schema import Where, locate, parse, put
from cps_ray.config.sweep import ChoiceParam, FloatParam, Param, Scalar
from cps_ray.config.train import TrainConfig


class Suggest(Protocol):
    """Proposes values; an Optuna trial does."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Returns a real number in [low, high]."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Returns a whole number in [low, high]."""

    def suggest_categorical(self, name: str, choices: Sequence[Scalar]) -> Any:
        """Returns one of `choices`."""


class RandomSuggest:
    """Suggests at random; the same seed gives the same values."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Returns a number in [low, high], uniform or (`log`) uniform in its logarithm; with `step`, one of low + k * step."""
        if step is not None:
            # In decimals, so that 0.15 is drawn and not 0.15000000000000002.
            first, spacing = Decimal(str(low)), Decimal(str(step))
            return float(first + self._random.randint(0, int((Decimal(str(high)) - first) / spacing)) * spacing)
        if log:
            return min(max(math.exp(self._random.uniform(math.log(low), math.log(high))), low), high)
        return self._random.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Returns a number in [low, high], uniform or (`log`) uniform in its logarithm; without `log`, one of low + k * step."""
        if log:
            # Half a number beyond both ends, so that the lowest and the highest number are not drawn too rarely.
            drawn = math.exp(self._random.uniform(math.log(low - 0.5), math.log(high + 0.5)))
            return min(max(round(drawn), low), high)
        return self._random.randrange(low, high + 1, step)

    def suggest_categorical(self, name: str, choices: Sequence[Scalar]) -> Any:
        """Returns one of `choices`, all equally likely."""
        return self._random.choice(choices)


def draw(space: Mapping[str, Param], suggest: Suggest) -> dict[str, Scalar]:
    """Returns one point: dotted name -> value. A parameter whose `when` does not hold is left out, and so are those that need it."""
    point: dict[str, Scalar] = {}
    # A parameter comes after those that its `when` names, wherever the file lists it.
    for name in TopologicalSorter({name: param.when or {} for name, param in space.items()}).static_order():
        if active(space[name], point):
            point[name] = _suggest_value(name, space[name], suggest)
    return point


def combinations(space: Mapping[str, Param], chosen: Callable[[str], bool]) -> list[dict[str, Scalar]]:
    """Returns the points of the parameters whose names are `chosen`, and of those that their `when` needs: every combination of
    choices, ranges by their ends."""
    needed = {name for name in space if chosen(name)}
    while missing := {other for name in needed for other in space[name].when or {}} - needed:
        needed |= missing
    points: list[dict[str, Scalar]] = [{}]
    for name in TopologicalSorter({name: space[name].when or {} for name in space if name in needed}).static_order():
        values = _telling_values(space, name)
        points = [
            new
            for point in points
            for new in ([{**point, name: value} for value in values] if active(space[name], point) else [point])
        ]
    return points


def _telling_values(space: Mapping[str, Param], name: str) -> Iterable[Scalar]:
    """Returns the choices; of a range, its ends and the values on which others depend."""
    param = space[name]
    if isinstance(param, ChoiceParam):
        return param.values
    asked = (value for other in space.values() for value in listed((other.when or {}).get(name, [])))
    return dict.fromkeys((param.low, param.high, *asked))


def active(param: Param, point: Mapping[str, Scalar]) -> bool:
    """Tells whether every parameter that `when` names is in the point, with a value that `when` lists."""
    return all(name in point and point[name] in listed(value) for name, value in (param.when or {}).items())


def listed(value: Scalar | list[Scalar]) -> list[Scalar]:
    """Returns a list of one value or of several, as `when` takes them."""
    return value if isinstance(value, list) else [value]


def preview(space: Mapping[str, Param], num_points: int, seed: int) -> list[dict[str, Scalar]]:
    """Returns random points, the same ones for the same `seed`."""
    suggest = RandomSuggest(seed)
    return [draw(space, suggest) for _ in range(num_points)]


def apply(train: TrainConfig, changes: Mapping[str, Any], where: str) -> TrainConfig:
    """Returns the training with these settings (dotted name -> value) changed, and validates it again.

    A mapping changes the settings that it names inside a section, and replaces a free mapping such as `model.options`.
    Relative paths in `changes` are relative to the working directory. Raises ConfigError, beginning with `where`, if the
    result is no valid training.
    """
    return apply_at(train, changes, lambda loc: where)


def apply_at(train: TrainConfig, changes: Mapping[str, Any], where: Where) -> TrainConfig:
    """Does what `apply` does; `where` gives the beginning of the message for each setting."""
    raw = train.dump()
    for name, value in changes.items():
        loc = locate(TrainConfig, raw, name)
        raw = put(TrainConfig, raw, loc, value, where=where(loc))
    return parse(TrainConfig, raw, where=where)


def _suggest_value(name: str, param: Param, suggest: Suggest) -> Scalar:
    if isinstance(param, ChoiceParam):
        value: Scalar = suggest.suggest_categorical(name, param.values)
        return value
    if isinstance(param, FloatParam):
        return suggest.suggest_float(name, param.low, param.high, step=param.step, log=param.log)
    return suggest.suggest_int(name, param.low, param.high, step=param.step or 1, log=param.log)
