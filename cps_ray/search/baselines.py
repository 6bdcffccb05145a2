"""The search of a baseline: what the best configuration had, the baseline has, too, in a study of its own.

It begins with the values of the best configuration, so that a baseline which was searched is never worse on val than one which was not.
"""

import shutil
from collections.abc import Mapping
from functools import reduce
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from cps_ray.config.schema import locate, parse
from cps_ray.config.space import active, apply
from cps_ray.config.sweep import BudgetConfig, Param, SweepConfig
from cps_ray.config.train import METHOD_SETTINGS, TrainConfig
from cps_ray.errors import ConfigError
from cps_ray.results import BASELINES_FOLDER
from cps_ray.search.objective import own_metric
from cps_ray.search.study import SweepStudy

_BASE = "base"
"""Attribute of a baseline's study: the training that its trials vary."""


def searched(config: SweepConfig) -> list[str]:
    """Returns the names of the baselines that are searched."""
    return [name for name in config.baselines if config.baseline(name).search]


def baseline_folder(root: Path, name: str) -> Path:
    """Folder of a baseline's trials and tables."""
    return root / BASELINES_FOLDER / name


def baseline_sweep(
    config: SweepConfig, name: str, best: TrainConfig, point: Mapping[str, Any], trials: int
) -> SweepConfig:
    """Returns the search of a baseline as a sweep of its own. `best`: the best configuration, drawn as `point`; `trials`: how many the sweep
    has begun."""
    baseline = config.baseline(name)
    base = apply(best, config.changes(name), f"baseline {name}")
    objective = config.objective.model_copy(update={"metric": own_metric(config.objective.metric, base)})
    return config.model_copy(
        update={
            "name": f"{config.name}/{name}",
            "train": base,
            "objective": objective,
            "budget": BudgetConfig(trials=baseline.trials or trials),
            "search_space": _space(config.search_space, baseline.search, point),
            "enqueue": [],
            "warm_start": [],
            "baselines": {},
            # With folds, it is evaluated on the first one, as the sweep's own is.
            "final": config.final.model_copy(update={"retrain": "none", "top": 1, "curve": ()}),
        }
    )


def _space(space: Mapping[str, Param], names: tuple[str, ...], point: Mapping[str, Any]) -> dict[str, Param]:
    """Returns the parameters of these names. Of what a parameter depends on and is not searched itself, the point's value holds: it is always
    drawn then, or never."""
    found: dict[str, Param] = {}
    for name in TopologicalSorter({name: param.when or {} for name, param in space.items()}).static_order():
        if name not in names:
            continue
        conditions = space[name].when or {}
        fixed = {other: value for other, value in conditions.items() if other not in found}
        left = {other: value for other, value in conditions.items() if other in found}
        # One that is searched itself and was left out has no value.
        known = {other: value for other, value in point.items() if other not in names}
        if active(space[name].model_copy(update={"when": fixed}), known):
            found[name] = space[name].model_copy(update={"when": left or None})
    return found


def open_study(root: Path, sweep: SweepConfig, name: str) -> SweepStudy:
    """Opens the study of a baseline's search in the sweep's own study.db. One that varied another training, of an earlier best configuration, is
    begun anew, without its trials."""
    folder = baseline_folder(root, name)
    study = SweepStudy(sweep, root, home=folder)
    if not is_of(study, root, sweep):
        # First the trials: without a study they would be taken for a loss of it.
        shutil.rmtree(folder, ignore_errors=True)
        study.delete()
        study = SweepStudy(sweep, root, home=folder)
    if study.fact(_BASE) is None:
        # Paths count from the sweep folder, which may be moved together with its data.
        study.note(_BASE, {"train": sweep.train.dump(str(root)), "searched": sorted(sweep.search_space)})
    return study


def is_of(study: SweepStudy, root: Path, sweep: SweepConfig) -> bool:
    """Whether the trials of a baseline's study are of this search; also if there are none."""
    noted = study.fact(_BASE)
    if noted is None:
        return True
    try:
        before = parse(TrainConfig, noted["train"], base=root)
    except ConfigError:  # of an earlier version
        return False
    return noted["searched"] == sorted(sweep.search_space) and _base(before, sweep) == _base(sweep.train, sweep)


def _base(train: TrainConfig, sweep: SweepConfig) -> dict[str, Any]:
    """Returns what makes trials of a baseline comparable: their training, but for what is searched, and for sections of methods that it does
    not use."""
    found = train.dump()
    unused = set(METHOD_SETTINGS) - {"method", "custom", train.method}
    for name in (*unused, *sweep.search_space):
        *sections, last = map(str, locate(TrainConfig, found, name))
        reduce(lambda section, key: section[key] or {}, sections, found).pop(last, None)
    return found
