"""What a sweep must hold beyond its schema: its space, points and baselines fit its training. Imports `space`, `schema`.

Every fault is (place in the sweep, sentence).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from cps_ray.config.schema import locate, place, renamed, settings, show, types_at
from cps_ray.config.space import active, apply, listed
from cps_ray.config.sweep import ChoiceParam, IntParam, Param, Scalar, SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import Loc
from cps_ray.errors import ConfigError
from cps_ray.text import did_you_mean

Fault = tuple[Loc, str]

_NOT_SEARCHED = {
    "seed": "a lucky seed is no better setting; `final.seeds` repeats the best over seeds.",
    "method": "methods are compared by `baselines`.",
    "data": "trials on different data cannot be compared.",
    "schedule": "trials of different length cannot be compared; `final.set` may train longer.",
    "resources": "how a training is spread over the cluster does not make it better.",
    "compute.accumulate": "it saves memory and does not make a training better.",
}
_NOT_FINAL = {
    "seed": "use `final.seeds`.",
    "data": "final runs train on the data of the search.",
}


def faults(sweep: SweepConfig) -> list[Fault]:
    """All faults of a sweep; the values are only tried on `train` once the names and ranges are right."""
    return [*_names(sweep), *_grace(sweep)] or [*_values(sweep), *_points(sweep), *_changes(sweep)]


def _names(sweep: SweepConfig) -> Iterator[Fault]:
    for name, param in sweep.search_space.items():
        loc = ("search_space", name)
        fault = _name(name) or next(_range(name, param), None)
        if fault:
            yield loc, fault
        for other, value in (param.when or {}).items():
            fault = _when(sweep.search_space, name, other, value)
            if fault:
                yield (*loc, "when", other), fault
    try:
        TopologicalSorter({name: param.when or {} for name, param in sweep.search_space.items()}).prepare()
    except CycleError as err:
        ring = list(dict.fromkeys(err.args[1]))
        if len(ring) > 1:
            yield ("search_space", ring[0], "when"), f"{', '.join(ring)} depend on each other in a circle."
    for name in sweep.baselines:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            yield (
                ("baselines", name),
                "names a folder: letters, digits, `.`, `_` and `-`, with a letter or digit first.",
            )


def _name(name: str) -> str:
    reason = _refused(name, _NOT_SEARCHED)
    if reason:
        return f"cannot be searched: {reason}"
    types = types_at(TrainConfig, locate(TrainConfig, {}, name))
    if Path in types:
        return "cannot be searched: it is a path."
    if types:
        return ""
    return renamed((name,)) or f"no such setting in train.{did_you_mean(name, settings(TrainConfig))}"


def _refused(name: str, reasons: Mapping[str, str]) -> str:
    return next((why for prefix, why in reasons.items() if f"{name}.".startswith(f"{prefix}.")), "")


def _range(name: str, param: Param) -> Iterator[str]:
    if isinstance(param, ChoiceParam):
        twice = [value for i, value in enumerate(param.values) if value in param.values[:i]]
        if twice:
            yield f"values lists {show(twice[0])} twice."
        return
    if param.low > param.high:
        yield f"low <= high must hold, but got low={param.low}, high={param.high}."
    if param.log and param.step is not None:
        yield "log: true and step exclude each other; remove one."
    if param.log and param.low <= 0:
        hint = ' For "without CPS" use baselines.' if name == "cps.weight" else ""
        yield f"log: true needs low > 0 (got {param.low:g}).{hint}"
    if param.step is not None and _off_grid(param.high, param.low, param.step):
        yield f"high must be low + k * step, but got low={param.low}, high={param.high}, step={param.step}."


def _off_grid(value: float, low: float, step: float) -> bool:
    return (Decimal(str(value)) - Decimal(str(low))) % Decimal(str(step)) != 0


def _when(space: Mapping[str, Param], name: str, other: str, value: Scalar | list[Scalar]) -> str:
    if other == name:
        return "refers to itself."
    if other not in space:
        return f"when refers to {other}, which is not in search_space.{did_you_mean(other, space)}"
    if not listed(value):
        return "needs at least one value."
    return next((fault for each in listed(value) if (fault := _impossible(space[other], each))), "")


def _impossible(param: Param, value: Scalar) -> str:
    """Why the parameter never takes the value, or nothing."""
    if isinstance(param, ChoiceParam):
        known = any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in param.values)
        return "" if known else f"{show(value)} is not one of {_either(param.values)}."
    kind, called = (int, "a whole number") if isinstance(param, IntParam) else (int | float, "a number")
    if isinstance(value, bool | str) or not isinstance(value, kind):
        return f"must be {called}, but got {show(value)}."
    if not param.low <= value <= param.high:
        return f"{value} is not within {param.low} and {param.high}."
    off = param.step is not None and _off_grid(value, param.low, param.step)
    return f"{value} is not {param.low} + k * {param.step}." if off else ""


def _either(values: Iterable[Scalar]) -> str:
    return ", ".join(each if isinstance(each, str) else show(each) for each in values)


def _grace(sweep: SweepConfig) -> Iterator[Fault]:
    grace, steps = sweep.early_stopping.grace, sweep.train.schedule.steps
    if sweep.early_stopping.type != "none" and grace > steps:
        yield ("early_stopping", "grace"), f"must be at most train.schedule.steps={steps}, but got {grace}."


def _values(sweep: SweepConfig) -> Iterator[Fault]:
    """Bounds and choices, each tried on `train` together with what makes the parameter active."""
    for name, param in sweep.search_space.items():
        extremes = param.values if isinstance(param, ChoiceParam) else [param.low, param.high]
        keys: list[Loc] = [("values", i) for i in range(len(extremes))]
        if not isinstance(param, ChoiceParam):
            keys = [("low",), ("high",)]
        for key, value in zip(keys, extremes, strict=True):
            changes = {**_enabling(sweep.search_space, name), name: value}
            yield from ((("search_space", name, *key), text) for _, text in _tried(sweep.train, changes, ()))


def _enabling(space: Mapping[str, Param], name: str) -> dict[str, Scalar]:
    """The first listed value of every parameter that must be drawn before this one."""
    found: dict[str, Scalar] = {}
    for other, value in (space[name].when or {}).items():
        found |= _enabling(space, other) | {other: listed(value)[0]}
    return found


def _points(sweep: SweepConfig) -> Iterator[Fault]:
    for i, point in enumerate(sweep.enqueue):
        wrong = [fault for name, value in point.items() for fault in _entry(sweep, i, name, value)]
        yield from wrong or _tried(sweep.train, point, ("enqueue", i))


def _entry(sweep: SweepConfig, i: int, name: str, value: Scalar) -> Iterator[Fault]:
    loc: Loc = ("enqueue", i, name)
    if name not in sweep.search_space:
        yield loc, f"is not in search_space.{did_you_mean(name, sweep.search_space)}"
        return
    param = sweep.search_space[name]
    fault = _impossible(param, value)
    if fault:
        yield loc, fault
    if not active(param, sweep.enqueue[i]):
        needed = " and ".join(f"{other} = {_either(listed(value))}" for other, value in (param.when or {}).items())
        yield loc, f"is drawn only where {needed}, which this point does not say."


def _changes(sweep: SweepConfig) -> Iterator[Fault]:
    for name, changes in sweep.baselines.items():
        yield from _tried(sweep.train, changes, ("baselines", name))
    refused = {name: why for name in sweep.final.set if (why := _refused(name, _NOT_FINAL))}
    yield from ((("final", "set", name), f"cannot be changed: {why}") for name, why in refused.items())
    if not refused:
        yield from _tried(sweep.train, sweep.final.set, ("final", "set"))


def _tried(train: TrainConfig, changes: Mapping[str, Any], loc: Loc) -> Iterator[Fault]:
    """The faults of `train` with these changes, below `loc` at the change to blame where there is one."""
    try:
        apply(train, changes, "")
    except ConfigError as err:
        for line in str(err).splitlines():
            blamed = [name for name in changes if line.startswith((f"{name}:", f"{name}.", f"{name}["))][:1]
            yield (*loc, *blamed), line.removeprefix(f"{blamed[0]}: ") if blamed else line


def described(fault: Fault) -> str:
    """`search_space.optim.lrr: no such setting in train.`"""
    return f"{place(fault[0])}: {fault[1]}"
