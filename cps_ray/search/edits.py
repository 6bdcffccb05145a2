"""Which settings of a sweep may change between its sessions. Loads neither torch nor Ray, so that a wrong one is refused at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cps_ray.config.reader import read_sweep
from cps_ray.config.schema import Where, as_yaml, dotted, first_sentences, parse
from cps_ray.config.sweep import FinalConfig, SweepConfig
from cps_ray.config.yaml_reader import Loc
from cps_ray.errors import ConfigError
from cps_ray.files import read_json, write_json
from cps_ray.results import BEGUN_FILE, SWEEP_FILE

_MAY_CHANGE = {"output", "budget", "concurrency", "failures", "baselines", "final"}
"""Sections that leave trials comparable with those before. `output` only says where sweep folders begin."""
_FINGERPRINT = "data.fingerprint"
_ABSENT = object()


def write_begun(root: Path, config: SweepConfig, address: str | None) -> None:
    """Records what a session begins with: the sweep, and the cluster that it was told to join."""
    write_json(
        root / BEGUN_FILE, {"address": address, "sweep": config.model_dump(mode="json", context={"base": str(root)})}
    )


def read_begun(root: Path) -> SweepConfig:
    """Returns the sweep with which its last session began; what sweep.yaml says where an earlier version has recorded nothing."""
    path = root / BEGUN_FILE
    try:
        begun = read_json(path)
        raw = begun and begun["sweep"]
    except (ValueError, TypeError, KeyError) as err:
        raise ConfigError(
            f"{path}: cannot be read, so nobody knows whether {SWEEP_FILE} is still what the sweep began with. Delete it if it is."
        ) from err
    return (
        parse(SweepConfig, raw, base=root, where=lambda loc: str(path))
        if raw
        else read_sweep(root / SWEEP_FILE, begun=True)[0]
    )


def edited(begun: SweepConfig, config: SweepConfig, where: Where, *, other_data: bool) -> SweepConfig:
    """Returns `config` as the sweep goes on with it: with the fingerprints of the data that it began with, where it names none.

    `where`: as `read_sweep` returns it. `other_data`: whether the sweep goes on with the data as they are now.
    Raises ConfigError, with a line for each, for settings that would make new trials others than those before.
    """
    same_data = _with_fingerprints_of(begun, config)
    faults = [
        f"{where(loc)}: {dotted(loc)}: {text} Put it back, or begin another sweep from this file with --name."
        for loc, text in _changes(begun.model_dump(mode="json"), same_data.model_dump(mode="json"))
    ]
    faults += [
        f"{where(('final', name))}: final.{name}: {text} Put it back, or begin another sweep from this file with --name."
        for name, text in _changed_folds(begun.final, config.final)
    ]
    if faults:
        raise ConfigError(first_sentences(faults))
    return (config if other_data else same_data).model_copy(update={"output": begun.output})


def _changed_folds(old: FinalConfig, new: FinalConfig) -> Iterator[tuple[str, str]]:
    """Yields what of `final` must not differ and does: with folds, trials are trained on other images."""
    for name in ("folds", "nested", "group_by") if old.folds or new.folds else ():
        before, now = getattr(old, name), getattr(new, name)
        if before != now:
            yield name, f"must stay {as_yaml(before)}, since trials depend on the folds, but is {as_yaml(now)}."


def _with_fingerprints_of(begun: SweepConfig, config: SweepConfig) -> SweepConfig:
    data = config.train.data
    fingerprint = data.fingerprint or begun.train.data.fingerprint
    baselines = {}
    for name, changes in config.baselines.items():
        before = begun.baselines.get(name, {})
        is_same = before == {_FINGERPRINT: before.get(_FINGERPRINT), **changes}
        baselines[name] = before if is_same else changes
    train = config.train.model_copy(update={"data": data.model_copy(update={"fingerprint": fingerprint})})
    return config.model_copy(update={"train": train, "baselines": baselines})


def _changes(old: Any, new: Any, loc: Loc = ()) -> Iterator[tuple[Loc, str]]:
    """Yields the settings that must not differ and do, each with what is wrong."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old | new:
            if loc or name not in _MAY_CHANGE:
                yield from _changes(old.get(name, _ABSENT), new.get(name, _ABSENT), (*loc, name))
    elif old is _ABSENT:
        yield loc, "is new: the trials of this sweep began without it."
    elif new is _ABSENT:
        yield loc, "is gone: the trials of this sweep began with it."
    elif old != new and not _is_wider(loc, old, new):
        yield loc, f"must stay {as_yaml(old)}, as this sweep began, but is {as_yaml(new)}."


def _is_wider(loc: Loc, old: Any, new: Any) -> bool:
    """Whether this is a bound of the search space that keeps every value of before, which Optuna goes on from."""
    if len(loc) != 3 or loc[0] != "search_space":
        return False
    return bool((loc[2] == "low" and new < old) or (loc[2] == "high" and new > old))
