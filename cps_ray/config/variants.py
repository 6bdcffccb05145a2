"""The trainings that a sweep may run, as far as their shapes differ: trials, final runs and baselines, and where the file says so.

Imports `schema`, `space`, `sweep`, `train` and `yaml_reader`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cps_ray.config.schema import as_yaml
from cps_ray.config.space import apply, combinations
from cps_ray.config.sweep import ChoiceParam, Param, SweepConfig, Value
from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import Loc


@dataclass(frozen=True, slots=True)
class Variant:
    """A training of a sweep: its `train:` with changes."""

    changes: dict[str, Any]
    """Dotted name -> value."""
    written: dict[str, Loc]
    """Name of each change -> where the sweep file has it, the later of two."""
    point: dict[str, Value]
    """Those of the changes that the search has chosen."""
    is_baseline: bool

    def config(self, train: TrainConfig) -> TrainConfig:
        """Returns the training. Raises ConfigError if these changes do not go together."""
        return apply(train, self.changes, "")

    def blame(self, settings: Sequence[str]) -> Loc:
        """Returns where the sweep file has the one of these settings that is to blame: what makes a baseline or a final run differ
        from trials before what the search chooses, and that before the training's own; the first one at a tie."""
        ranks = {"baselines": 3, "final": 2, "search_space": 1}
        locs = [self._loc(name) for name in settings]
        return max(locs, key=lambda loc: ranks.get(str(loc[0]), 0))

    def _loc(self, setting: str) -> Loc:
        for name, loc in self.written.items():
            if setting == name or name.startswith(f"{setting}."):
                return loc
            if setting.startswith(f"{name}."):  # the change is of a whole section
                return (*loc, *setting.removeprefix(f"{name}.").split("."))
        return ("train", *setting.split("."))

    def values(self, settings: Sequence[str]) -> str:
        """Returns `model.encoder=resnet50, model.architecture=unet`: what the search has chosen of these settings; "" if nothing."""
        chosen = {name: value for name, value in self.point.items() if name.startswith(tuple(settings))}
        return ", ".join(
            f"{name}={value if isinstance(value, str) else as_yaml(value)}" for name, value in chosen.items()
        )


def variants(sweep: SweepConfig, chosen: Callable[[str], bool]) -> Iterator[list[Variant]]:
    """Yields, for every combination of the searched settings whose names are `chosen`, the trial, and the final runs if it were the
    best one."""
    for point in combinations(sweep.search_space, chosen):
        searched = {
            name: ("search_space", name, *_key(sweep.search_space[name], value)) for name, value in point.items()
        }
        trial = Variant(dict(point), searched, point, is_baseline=False)
        if sweep.final.retrain == "none":
            yield [trial]
            continue
        final = _changed(trial, sweep.final.set, ("final", "set"))
        baselines = [_changed(final, sweep.changes(name), ("baselines", name)) for name in sweep.baselines]
        yield [trial, final, *baselines]


def _changed(variant: Variant, changes: Mapping[str, Any], at: Loc) -> Variant:
    written = variant.written | {name: (*at, name) for name in changes}
    return Variant({**variant.changes, **changes}, written, variant.point, is_baseline=at[0] == "baselines")


def _key(param: Param, value: Value) -> Loc:
    if isinstance(param, ChoiceParam):
        # In Python 1 == True, but as settings they differ.
        same = (i for i, option in enumerate(param.values) if option == value and type(option) is type(value))
        return ("values", next(same))
    return ("low",) if value == param.low else ("high",)
