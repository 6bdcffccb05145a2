"""Draws points from the search space and applies them to a training. Independent of Optuna, whose trials fit `Suggest`.

Imports `schema`, `sweep` and `train`.
"""

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from graphlib import TopologicalSorter
from typing import Any, Protocol

from cps_ray.config.schema import Where, as_yaml, locate, parse, put
from cps_ray.config.sweep import ChoiceParam, FloatParam, IntParam, Param, Scalar, Value
from cps_ray.config.train import TrainConfig


class Suggest(Protocol):
    """Proposes values; an Optuna trial does."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Returns a real number in [low, high]."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Returns a whole number in [low, high]."""

    def suggest_categorical(self, name: str, choices: Sequence[Scalar | None]) -> Any:
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
            return self._random.choice(_stepped(low, high, step))
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

    def suggest_categorical(self, name: str, choices: Sequence[Scalar | None]) -> Any:
        """Returns one of `choices`, all equally likely."""
        return self._random.choice(choices)


def draw(space: Mapping[str, Param], suggest: Suggest) -> dict[str, Value]:
    """Returns one point: dotted name -> value. A parameter whose `when` does not hold is left out, and so are those that need it."""
    point: dict[str, Value] = {}
    for name in _ordered(space):
        if active(space[name], point):
            point[name] = _suggest_value(name, space[name], suggest)
    return point


def _ordered(space: Mapping[str, Param]) -> Iterable[str]:
    """Returns the names, each after those that its `when` names, wherever the file lists it."""
    return TopologicalSorter({name: param.when or {} for name, param in space.items()}).static_order()


def own_point(space: Mapping[str, Param], train: TrainConfig) -> dict[str, Value]:
    """Returns the values that the training has itself, of those parameters whose ranges or choices hold them. Where a parameter's own
    value does not lie in the space, those that depend on it are left out, too."""
    raw = train.dump()
    point: dict[str, Value] = {}
    for name in _ordered(space):
        section: Any = raw
        *sections, last = locate(TrainConfig, raw, name)
        for key in sections:
            section = section.get(key) if isinstance(section, Mapping) else None
        is_set = isinstance(section, Mapping) and last in section
        if is_set and active(space[name], point) and not impossible(space[name], section[last]):
            point[name] = _option(space[name], section[last])
    return point


def combinations(
    space: Mapping[str, Param],
    chosen: Callable[[str], bool],
    values: Callable[[Mapping[str, Param], str], Iterable[Value]] | None = None,
) -> list[dict[str, Value]]:
    """Returns the points of the parameters whose names are `chosen`, and of those that their `when` needs: every combination of
    choices, ranges by their ends, or of the `values` that are given."""
    needed = {name for name in space if chosen(name)}
    while missing := {other for name in needed for other in space[name].when or {}} - needed:
        needed |= missing
    points: list[dict[str, Value]] = [{}]
    for name in _ordered({name: space[name] for name in space if name in needed}):
        options = list((values or _telling_values)(space, name))
        points = [
            new
            for point in points
            for new in ([{**point, name: value} for value in options] if active(space[name], point) else [point])
        ]
    return points


def _telling_values(space: Mapping[str, Param], name: str) -> Iterable[Value]:
    """Returns the choices; of a range, its ends and the values on which others depend."""
    param = space[name]
    if isinstance(param, ChoiceParam):
        return param.values
    asked = (value for other in space.values() for value in listed((other.when or {}).get(name, [])))
    return dict.fromkeys((param.low, param.high, *asked))  # type: ignore[arg-type]  # what a range has is a number


def grid(space: Mapping[str, Param]) -> list[dict[str, Value]]:
    """Returns every point. Each range must have a step, or be of whole numbers."""
    return combinations(space, lambda name: True, lambda space, name: grid_values(space[name]))


def grid_values(param: Param) -> Sequence[Value]:
    """Returns all values of a parameter; none of a range without a step, which has no end of them."""
    if isinstance(param, ChoiceParam):
        return param.values
    if isinstance(param, IntParam):
        return range(param.low, param.high + 1, param.step or 1)
    return [] if param.step is None else _stepped(param.low, param.high, param.step)


def _stepped(low: float, high: float, step: float) -> list[float]:
    # In decimals, so that there is 0.15 and not 0.15000000000000002.
    first, spacing = Decimal(str(low)), Decimal(str(step))
    return [float(first + k * spacing) for k in range(int((Decimal(str(high)) - first) / spacing) + 1)]


def active(param: Param, point: Mapping[str, Value]) -> bool:
    """Tells whether every parameter that `when` names is in the point, with a value that `when` lists."""
    return all(name in point and point[name] in listed(value) for name, value in (param.when or {}).items())


def listed(value: Scalar | list[Value] | None) -> list[Value]:
    """Returns a list of one value or of several, as `when` takes them."""
    return value if isinstance(value, list) else [value]


def impossible(param: Param, value: Value) -> str:
    """Returns why the parameter never takes the value, or ""."""
    if isinstance(param, ChoiceParam):
        if any(_is_same(value, option) for option in param.values):
            return ""
        return f"{as_yaml(value)} is not one of {alternatives(param.values)}."
    kind, kind_name = (int, "a whole number") if isinstance(param, IntParam) else (int | float, "a number")
    if isinstance(value, bool | str) or not isinstance(value, kind):
        return f"must be {kind_name}, but got {as_yaml(value)}."
    if not param.low <= value <= param.high:
        return f"{value} is not within {param.low} and {param.high}."
    if param.step is not None and off_grid(value, param.low, param.step):
        return f"{value} is not {param.low} + k * {param.step}."
    return ""


def off_grid(value: float, low: float, step: float) -> bool:
    """Tells whether the value is not low + k * step."""
    # In decimals, because in floats (0.3 - 0.0) % 0.1 is not 0.
    return (Decimal(str(value)) - Decimal(str(low))) % Decimal(str(step)) != 0


def alternatives(values: Iterable[Value]) -> str:
    """Returns the values in a line, as YAML writes them."""
    return ", ".join(value if isinstance(value, str) else as_yaml(value) for value in values)


def _is_same(value: Value, option: Value) -> bool:
    # In Python 1 == True, but as settings they differ.
    return value == option and isinstance(value, bool) == isinstance(option, bool)


def _option(param: Param, value: Value) -> Value:
    """Returns the value as the parameter writes it: `[64, 96]` for `[64.0, 96.0]`. What it does not have stays as it is."""
    options = param.values if isinstance(param, ChoiceParam) else []
    return next((option for option in options if _is_same(value, option)), value)


def scalar(value: Value) -> Scalar | None:
    """Returns what stands for a value where lists are not taken, by Optuna and in columns: a list as its JSON text."""
    return json.dumps(value) if isinstance(value, list) else value


def to_scalars(space: Mapping[str, Param], point: Mapping[str, Value]) -> dict[str, Scalar | None]:
    """Returns a point of the space as Optuna takes it."""
    return {name: scalar(_option(space[name], value)) for name, value in point.items()}


def from_scalars(space: Mapping[str, Param], params: Mapping[str, Any]) -> dict[str, Value]:
    """Returns the point that Optuna has as `params`. What this space does not hold stays as it is."""
    return {name: _from_scalar(space.get(name), value) for name, value in params.items()}


def _from_scalar(param: Param | None, value: Scalar | None) -> Value:
    options = param.values if isinstance(param, ChoiceParam) else []
    return next((option for option in options if isinstance(option, list) and scalar(option) == value), value)


def preview(space: Mapping[str, Param], num_points: int, seed: int) -> list[dict[str, Value]]:
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


def _suggest_value(name: str, param: Param, suggest: Suggest) -> Value:
    if isinstance(param, ChoiceParam):
        return _from_scalar(param, suggest.suggest_categorical(name, [scalar(value) for value in param.values]))
    if isinstance(param, FloatParam):
        return suggest.suggest_float(name, param.low, param.high, step=param.step, log=param.log)
    return suggest.suggest_int(name, param.low, param.high, step=param.step or 1, log=param.log)
