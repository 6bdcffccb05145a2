"""Rules of a sweep beyond its schema: its space, points, baselines and final changes fit its training.

Imports `schema`, `space`, `sweep`, `train` and `yaml_reader`.
"""

import importlib.util
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from cps_ray.config.plugins import is_import_path
from cps_ray.config.schema import as_yaml, dotted, locate, renaming, settings, types_at
from cps_ray.config.space import (
    active,
    alternatives,
    apply,
    combinations,
    grid,
    grid_values,
    impossible,
    listed,
    off_grid,
    own_point,
    scalar,
)
from cps_ray.config.sweep import BEST_ARM, ChoiceParam, Param, Scalar, SweepConfig, Value
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
_MOST_POINTS = 10_000
"""Points of a grid, of which all are held in memory."""
_LEARN = ("tpe", "gp")
"""Samplers that learn from any trial; cmaes only from those that it has proposed."""


def faults(sweep: SweepConfig, *, begun: bool = False) -> list[Fault]:
    """Returns the faults of a sweep; of one that has begun without those that only its beginning had to avoid.

    Values are tried on `train` only once all names and ranges are right.
    """
    return [*_name_faults(sweep), *_sampler_faults(sweep)] or [
        *_grace_faults(sweep, begun=begun),
        *_value_faults(sweep),
        *_point_faults(sweep),
        *_change_faults(sweep),
    ]


def remarks(sweep: SweepConfig) -> list[str]:
    """Returns what else is to be known of the search before it begins: where trial 0 stands, and how far a grid goes."""
    own = own_point(sweep.search_space, sweep.train)
    values = ", ".join(f"{name}={alternatives([value])}" for name, value in own.items())
    drawn = [name for name in sweep.search_space if name not in own]
    lines = [f"Trial 0 has the values of train: {values or 'none lies in the search space'}."]
    if own and drawn:
        lines = [f"{lines[0]} The others are drawn where they apply: {', '.join(drawn)}."]
    if sweep.sampler.type == "grid" and (num_points := len(grid(sweep.search_space))) < sweep.budget.trials:
        lines.append(
            f"The grid has {num_points} points: the search ends with them, before budget.trials={sweep.budget.trials}."
        )
    return lines


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
        if name.startswith((f"{BEST_ARM}-", "trial-")):
            yield (
                ("baselines", name),
                "begins as the names of the best one's own runs do; give the baseline another one.",
            )


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
        scalars = [scalar(value) for value in param.values]
        repeated = [value for i, value in enumerate(param.values) if scalars[i] in scalars[:i]]
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
    if param.step is not None and off_grid(param.high, param.low, param.step):
        yield f"high must be low + k * step, but got low={param.low}, high={param.high}, step={param.step}."


def _condition_fault(space: Mapping[str, Param], name: str, other: str, value: Scalar | list[Value] | None) -> str:
    """Returns what is wrong with the condition `when: {other: value}` of `name`, or ""."""
    if other == name:
        return "refers to itself."
    if other not in space:
        return f"when refers to {other}, which is not in search_space.{did_you_mean(other, space)}"
    if not listed(value):
        return "needs at least one value."
    return next((fault for option in listed(value) if (fault := impossible(space[other], option))), "")


def _sampler_faults(sweep: SweepConfig) -> Iterator[Fault]:
    kind, loc = sweep.sampler.type, ("sampler", "type")
    if kind == "cmaes" and importlib.util.find_spec("cmaes") is None:
        yield loc, "cmaes needs the Python package cmaes, which is not installed: pip install 'cps_ray[cmaes]'"
    if sweep.warm_start and sweep.final.nested:
        yield (
            ("warm_start",),
            "brings values that images of all folds have decided, but with final.nested no search may know the fold that is tested. Remove one.",
        )
    if sweep.warm_start and kind not in _LEARN:
        yield ("warm_start",), f"has no effect with sampler.type={kind}: only {' and '.join(_LEARN)} learn from it."
    if kind != "grid":
        return
    endless = [name for name, param in sweep.search_space.items() if not grid_values(param)]
    yield from ((("search_space", name), "needs a step, since sampler.type is grid.") for name in endless)
    size = math.prod(len(grid_values(param)) for param in sweep.search_space.values())
    if size > _MOST_POINTS:
        yield loc, f"grid must have at most {_MOST_POINTS} points, but has up to {size}. Take larger steps, or qmc."


def _grace_faults(sweep: SweepConfig, *, begun: bool) -> Iterator[Fault]:
    loc, grace, steps = ("early_stopping", "grace"), sweep.early_stopping.grace, sweep.train.schedule.steps
    if sweep.early_stopping.type == "none":
        return
    if grace > steps:
        yield loc, f"must be at most train.schedule.steps={steps}, but got {grace}."
        return
    if begun or sweep.train.settings is None:
        return
    section = "custom" if is_import_path(sweep.train.method) else sweep.train.method
    names = {f"{section}.{name}": getattr(sweep.train.settings, name) for name in ("start", "ramp")}
    points = [names | point for point in combinations(sweep.search_space, names.__contains__)]
    # What is no number is refused where values are tried.
    ends = [
        sum(point[name] for name in names)
        for point in points
        if all(isinstance(point[name], int | float) for name in names)
    ]
    ramped = math.ceil(round(min(max(ends, default=0.0), 1.0) * steps, 6))
    if grace < ramped:
        yield (
            loc,
            f"must be at least {ramped}, the step at which the weight of {section} has risen in every trial "
            f"({section}.start + {section}.ramp, of {steps} steps), but got {grace}: before it a trial does not show what it can reach.",
        )


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


def _enabling(space: Mapping[str, Param], name: str) -> dict[str, Value]:
    """Returns the parameters that must be drawn before this one, each with the first value that its condition lists."""
    changes: dict[str, Value] = {}
    # The recursion ends: values are tried only where `_name_faults` has found no circle.
    for other, value in (space[name].when or {}).items():
        changes |= _enabling(space, other) | {other: listed(value)[0]}
    return changes


def _point_faults(sweep: SweepConfig) -> Iterator[Fault]:
    for i, point in enumerate(sweep.enqueue):
        entry_faults = [fault for name, value in point.items() for fault in _entry_faults(sweep, i, name, value)]
        yield from entry_faults or _faults_of_changes(sweep.train, point, ("enqueue", i))


def _entry_faults(sweep: SweepConfig, i: int, name: str, value: Value) -> Iterator[Fault]:
    """Yields faults of one value of the point `enqueue[i]` against the search space."""
    loc: Loc = ("enqueue", i, name)
    if name not in sweep.search_space:
        yield loc, f"is not in search_space.{did_you_mean(name, sweep.search_space)}"
        return
    param = sweep.search_space[name]
    fault = impossible(param, value)
    if fault:
        yield loc, fault
    if not active(param, sweep.enqueue[i]):
        needed = " and ".join(f"{other} = {alternatives(listed(value))}" for other, value in (param.when or {}).items())
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
        yield from (
            (("baselines", name, "search"), f"{each} is searched, but the baseline itself says what it is. Remove one.")
            for each in baseline.search
            if each in sweep.changes(name)
        )
        if sweep.final.folds and baseline.train_on == "labeled+val":
            yield (
                ("baselines", name, "train_on"),
                "has no effect with final.folds, which train on the masks of val anyhow. Remove it.",
            )
    yield from _labeled_faults(sweep)
    refused = {
        name: renaming((name,)) or f"cannot be changed: {why}"
        for name in sweep.final.set
        if (why := _refused(name, _NOT_FINAL))
    }
    yield from ((("final", "set", name), text) for name, text in refused.items())
    if not refused:
        yield from _faults_of_changes(sweep.train, sweep.final.set, ("final", "set"))


def _labeled_faults(sweep: SweepConfig) -> Iterator[Fault]:
    """Yields what `final` asks of labelled images that are no number of them."""
    arms = {"train": sweep.train}
    for name in [*sweep.baselines][:1] if sweep.final.curve else ():
        with suppress(ConfigError):  # said elsewhere
            arms[f"baselines.{name}"] = apply(sweep.train, sweep.changes(name), "")
    for arm, train in arms.items():
        labeled = train.data.labeled
        if labeled is None or isinstance(labeled, str):
            fixed = "a list" if labeled is None else f"the subset {labeled}"
            for name, what in (
                ("draws", "draws the labelled images anew"),
                ("curve", "takes parts of the labelled images"),
            ):
                if getattr(sweep.final, name):
                    yield (
                        ("final", name),
                        f"{what}, so {arm}.data.labeled must be a count or a fraction, but is {fixed}.",
                    )
        elif isinstance(labeled, int) and sweep.final.curve:
            counts = [max(1, round(labeled * part)) for part in {*sweep.final.curve, 1.0}]
            if len(counts) > len({*counts}):
                yield (
                    ("final", "curve"),
                    f"must give different numbers of labels, but of {labeled} gives {sorted(counts)}.",
                )


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
