"""Searches beside the sweep's own, each in a study of its own.

What the best configuration had, a baseline has, too: its search begins with the values of the best one, so that a baseline which was searched is
never worse on val than one which was not. And with `final.nested` each fold has both searches, made without that fold.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from cps_ray.config.schema import locate, parse
from cps_ray.config.space import active, apply
from cps_ray.config.sweep import BEST_ARM, BudgetConfig, FinalConfig, Param, SweepConfig
from cps_ray.config.train import METHOD_SETTINGS, TrainConfig
from cps_ray.errors import ConfigError
from cps_ray.results import BASELINES_FOLDER, FOLDS_FOLDER
from cps_ray.search.objective import own_metric
from cps_ray.search.search_phase import best_config
from cps_ray.search.study import SweepStudy

_BASE = "base"
"""Attribute of a study: the training that its trials vary."""


@dataclass(frozen=True, slots=True)
class FurtherSearch:
    """A search beside the sweep's own."""

    arm: str
    """What it searches for: a baseline, or the best configuration."""
    repeat: int
    """Which final runs take what it finds: the first, and with it all others but those of folds that have searches of their own."""
    folder: Path
    """Where its trials and tables lie."""
    sweep: SweepConfig

    def __str__(self) -> str:
        what = [] if self.arm == BEST_ARM else [f"baseline {self.arm}"]
        return " in ".join(what + ([f"fold {self.repeat}"] if self.repeat > 1 else []))

    @property
    def prefix(self) -> str:
        """What the names of its trials begin with."""
        return ("" if self.arm == BEST_ARM else f"{self.arm}-") + (f"fold{self.repeat}-" if self.repeat > 1 else "")


def further_searches(root: Path, config: SweepConfig, study: SweepStudy) -> Iterator[FurtherSearch]:
    """Yields the searches that the final runs need beside the sweep's own, `study`, which has a complete trial. Those that begin with what a
    fold's search has found come only if it has found something by the time that they are asked for."""
    if config.final.retrain == "none":
        return
    yield from _of_baselines(root, config, study, 1)
    for repeat in range(2, config.num_searches + 1):
        of_fold = FurtherSearch(
            BEST_ARM, repeat, root / FOLDS_FOLDER / str(repeat), fold_sweep(config, repeat, len(study.trials))
        )
        yield of_fold
        found = SweepStudy(of_fold.sweep, root, home=of_fold.folder)
        if found.best() is not None:
            yield from _of_baselines(of_fold.folder, of_fold.sweep, found, repeat)


def _of_baselines(folder: Path, config: SweepConfig, study: SweepStudy, repeat: int) -> Iterator[FurtherSearch]:
    for name in searched(config):
        best = study.best()
        assert best is not None
        sweep = baseline_sweep(config, name, best_config(study, config), best.params, len(study.trials))
        if sweep.search_space:  # else all of it depends on what the best one has not
            yield FurtherSearch(name, repeat, baseline_folder(folder, name), sweep)


def fold_sweep(config: SweepConfig, repeat: int, trials: int) -> SweepConfig:
    """Returns the sweep's search without the fold that the `repeat`-th final runs are tested on, as a sweep of its own."""
    return config.model_copy(
        update={
            "name": f"{config.name}/{FOLDS_FOLDER}/{repeat}",  # no baseline's search is called so
            "train": apply(config.train, config.searched_fold(repeat), f"fold {repeat}"),
            "budget": BudgetConfig(trials=trials),
            "final": FinalConfig(retrain="none"),
        }
    )


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
            # With folds, it is evaluated on the one that the sweep's own search is evaluated on.
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


def open_study(root: Path, sweep: SweepConfig, folder: Path) -> SweepStudy:
    """Opens the study of a search in the sweep's own study.db; its trials lie in `folder`. One that varied another training, of an earlier best
    configuration, is begun anew, without its trials."""
    study = SweepStudy(sweep, root, home=folder)
    # One that has not begun may have been opened before the best configuration was elected, and would begin with another's values.
    if not is_of(study, root, sweep) or (study.fact(_BASE) is None and not study.trials):
        # First the trials: without a study they would be taken for a loss of it.
        shutil.rmtree(folder, ignore_errors=True)
        study.delete()
        study = SweepStudy(sweep, root, home=folder)
    if study.fact(_BASE) is None:
        # Paths count from the sweep folder, which may be moved together with its data.
        study.note(_BASE, {"train": sweep.train.dump(str(root)), "searched": sorted(sweep.search_space)})
    return study


def is_of(study: SweepStudy, root: Path, sweep: SweepConfig) -> bool:
    """Whether the trials of a study are of this search; also if there are none."""
    noted = study.fact(_BASE)
    if noted is None:
        return True
    try:
        before = parse(TrainConfig, noted["train"], base=root)
    except ConfigError:  # of an earlier version
        return False
    return noted["searched"] == sorted(sweep.search_space) and _base(before, sweep) == _base(sweep.train, sweep)


def _base(train: TrainConfig, sweep: SweepConfig) -> dict[str, Any]:
    """Returns what makes trials of a search comparable: their training, but for what is searched, and for sections of methods that it does
    not use."""
    found = train.dump()
    unused = set(METHOD_SETTINGS) - {"method", "custom", train.method}
    # What the data were is the sweep's business, which may have been told to go on with others. Whole sections last: what is searched may
    # be in one.
    for name in (*sweep.search_space, "data.fingerprint", *unused):
        *sections, last = map(str, locate(TrainConfig, found, name))
        reduce(lambda section, key: section[key] or {}, sections, found).pop(last, None)
    return found
