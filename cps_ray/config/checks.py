"""Rules of a sweep beyond its schema: its space, points, baselines and final changes fit its training.

Imports `schema`, `space`, `sweep`, `train` and `yaml_reader`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from cps_ray.config.schema import as_yaml, dotted, locate, renaming, settings, types_at
from cps_ray.config.space import active, apply, listed
from cps_ray.config.sweep import BEST_ARM, ChoiceParam, IntParam, Param, Scalar, SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import Loc
from cps_ray.errors import ConfigError
from cps_ray.text import did_you_mean

Fault = tuple[Loc, str]
"""Setting of the sweep, and a sentence that says what is wrong with it."""

_NOT_SEARCHED = {
    "seed": "a lucky seed is no better setting; `final.seeds` repeats the best over seeds.",
    "method": "methods are compared by `baselines`.",
    "data": "trials on different data cannot be compared.",
    "schedule": "trials of different length cannot be compared; `final.set` may train longer.",
    "resources": "how a training is spread over the cluster does not make it better.",
    "sinks": "where metrics go does not make a training better.",
    "compute.accumulate": "it saves memory and does not make a training better.",
}
"""Setting or section -> why the search must not vary it."""
_NOT_FINAL = {
    "seed": "use `final.seeds`.",
    "data": "final runs train on the data of the search.",
}
"""Setting or section -> why `final.set` must not change it."""


def faults(sweep: SweepConfig) -> list[Fault]:
    """Returns the faults of a sweep. Values are tried on `train` only once all names and ranges are right."""
    return [*_name_faults(sweep), *_grace_faults(sweep)] or [
        *_value_faults(sweep),
        *_point_faults(sweep),
        *_change_faults(sweep),
    ]


def _name_faults(sweep: SweepConfig) -> Iterator[Fault]:
    """Yields faults of the names, ranges and conditions in the search space, and of the names of baselines."""
    for name, param in sweep.search_space.items():
        loc = ("search_space", name)
        fault = _name_fault(name) or next(_range_faults(name, param), None)
        if fault:
            yield loc, fault
        for other, value in (param.when or {}).items():
            fault = _condition_fault(sweep.search_space, name, other, value)
            if fault:
                yield (*loc, "when", other), fault
    try:
        TopologicalSorter({name: param.when or {} for name, param in sweep.search_space.items()}).prepare()
    except CycleError as err:
        cycle = list(dict.fromkeys(err.args[1]))  # graphlib names the first one twice, at both ends
        if len(cycle) > 1:  # one that refers to itself is reported above
            yield ("search_space", cycle[0], "when"), f"{', '.join(cycle)} depend on each other in a circle."
    for name in sweep.baselines:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            yield (
                ("baselines", name),
                "names a folder: letters, digits, `.`, `_` and `-`, with a letter or digit first.",
            )
        if name == BEST_ARM:
            yield ("baselines", name), "is the name of the best configuration itself; give the baseline another one."


def _name_fault(name: str) -> str:
    """Returns why this setting cannot be searched, or ""."""
    # The new name first: whether it can be searched is the next question.
    now = renaming((name,))
    if now:
        return now
    reason = _refused(name, _NOT_SEARCHED)
    if reason:
        return f"cannot be searched: {reason}"
    types = types_at(TrainConfig, locate(TrainConfig, {}, name))
    if Path in types:
        return "cannot be searched: it is a path."
    return "" if types else f"no such setting in train.{did_you_mean(name, settings(TrainConfig))}"


def _refused(name: str, reasons: Mapping[str, str]) -> str:
    """Returns the reason for the setting or for a section that it is in, or ""."""
    return next((why for prefix, why in reasons.items() if f"{name}.".startswith(f"{prefix}.")), "")


def _range_faults(name: str, param: Param) -> Iterator[str]:
    if isinstance(param, ChoiceParam):
        repeated = [value for i, value in enumerate(param.values) if value in param.values[:i]]
        if repeated:
            yield f"values lists {as_yaml(repeated[0])} twice."
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
    # In decimals, because in floats (0.3 - 0.0) % 0.1 is not 0.
    return (Decimal(str(value)) - Decimal(str(low))) % Decimal(str(step)) != 0


def _condition_fault(space: Mapping[str, Param], name: str, other: str, value: Scalar | list[Scalar]) -> str:
    """Returns what is wrong with the condition `when: {other: value}` of `name`, or ""."""
    if other == name:
        return "refers to itself."
    if other not in space:
        return f"when refers to {other}, which is not in search_space.{did_you_mean(other, space)}"
    if not listed(value):
        return "needs at least one value."
    return next((fault for option in listed(value) if (fault := _impossible(space[other], option))), "")


def _impossible(param: Param, value: Scalar) -> str:
    """Returns why the parameter never takes the value, or ""."""
    if isinstance(param, ChoiceParam):
        # In Python 1 == True, but as settings they differ.
        allowed = any(
            value == option and isinstance(value, bool) == isinstance(option, bool) for option in param.values
        )
        return "" if allowed else f"{as_yaml(value)} is not one of {_alternatives(param.values)}."
    kind, kind_name = (int, "a whole number") if isinstance(param, IntParam) else (int | float, "a number")
    if isinstance(value, bool | str) or not isinstance(value, kind):
        return f"must be {kind_name}, but got {as_yaml(value)}."
    if not param.low <= value <= param.high:
        return f"{value} is not within {param.low} and {param.high}."
    if param.step is not None and _off_grid(value, param.low, param.step):
        return f"{value} is not {param.low} + k * {param.step}."
    return ""


def _alternatives(values: Iterable[Scalar]) -> str:
    return ", ".join(value if isinstance(value, str) else as_yaml(value) for value in values)


def _grace_faults(sweep: SweepConfig) -> Iterator[Fault]:
    grace, steps = sweep.early_stopping.grace, sweep.train.schedule.steps
    if sweep.early_stopping.type != "none" and grace > steps:
        yield ("early_stopping", "grace"), f"must be at most train.schedule.steps={steps}, but got {grace}."


def _value_faults(sweep: SweepConfig) -> Iterator[Fault]:
    """Tries bounds and choices on `train`, each together with values that make its parameter active."""
    for name, param in sweep.search_space.items():
        extremes = param.values if isinstance(param, ChoiceParam) else [param.low, param.high]
        keys: list[Loc] = [("values", i) for i in range(len(extremes))]
        if not isinstance(param, ChoiceParam):
            keys = [("low",), ("high",)]
        for key, value in zip(keys, extremes, strict=True):
            changes = {**_enabling(sweep.search_space, name), name: value}
            yield from (
                (("search_space", name, *key), text) for _, text in _faults_of_changes(sweep.train, changes, ())
            )


def _enabling(space: Mapping[str, Param], name: str) -> dict[str, Scalar]:
    """Returns the parameters that must be drawn before this one, each with the first value that its condition lists."""
    changes: dict[str, Scalar] = {}
    # The recursion ends: values are tried only where `_name_faults` has found no circle.
    for other, value in (space[name].when or {}).items():
        changes |= _enabling(space, other) | {other: listed(value)[0]}
    return changes


def _point_faults(sweep: SweepConfig) -> Iterator[Fault]:
    for i, point in enumerate(sweep.enqueue):
        entry_faults = [fault for name, value in point.items() for fault in _entry_faults(sweep, i, name, value)]
        yield from entry_faults or _faults_of_changes(sweep.train, point, ("enqueue", i))


def _entry_faults(sweep: SweepConfig, i: int, name: str, value: Scalar) -> Iterator[Fault]:
    """Yields faults of one value of the point `enqueue[i]` against the search space."""
    loc: Loc = ("enqueue", i, name)
    if name not in sweep.search_space:
        yield loc, f"is not in search_space.{did_you_mean(name, sweep.search_space)}"
        return
    param = sweep.search_space[name]
    fault = _impossible(param, value)
    if fault:
        yield loc, fault
    if not active(param, sweep.enqueue[i]):
        needed = " and ".join(
            f"{other} = {_alternatives(listed(value))}" for other, value in (param.when or {}).items()
        )
        yield loc, f"is drawn only where {needed}, which does not hold in this point."


def _change_faults(sweep: SweepConfig) -> Iterator[Fault]:
    for name in sweep.baselines:
        yield from _faults_of_changes(sweep.train, sweep.changes(name), ("baselines", name))
        try:
            baseline = sweep.baseline(name)
        except ConfigError as err:
            yield from ((("baselines", name), line) for line in str(err).splitlines())
            continue
        yield from (
            (("baselines", name, "search"), f"{each} is not in search_space.{did_you_mean(each, sweep.search_space)}")
            for each in baseline.search
            if each not in sweep.search_space
        )
    refused = {
        name: renaming((name,)) or f"cannot be changed: {why}"
        for name in sweep.final.set
        if (why := _refused(name, _NOT_FINAL))
    }
    yield from ((("final", "set", name), text) for name, text in refused.items())
    if not refused:
        yield from _faults_of_changes(sweep.train, sweep.final.set, ("final", "set"))


def _faults_of_changes(train: TrainConfig, changes: Mapping[str, Any], loc: Loc) -> Iterator[Fault]:
    """Yields the faults of `train` with these changes: at the change below `loc` that caused it, at `loc` where none is named."""
    try:
        apply(train, changes, "")
    except ConfigError as err:
        for line in str(err).splitlines():
            cause = [name for name in changes if line.startswith((f"{name}:", f"{name}.", f"{name}["))][:1]
            yield (*loc, *cause), line.removeprefix(f"{cause[0]}: ") if cause else line


def describe(fault: Fault) -> str:
    """Returns, for example, `search_space.optim.lrr: no such setting in train.`"""
    return f"{dotted(fault[0])}: {fault[1]}"
