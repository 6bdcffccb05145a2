"""Trials of earlier sweeps from which the sampler of a new one learns."""

import sqlite3
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from cps_ray.config.reader import load_sweep
from cps_ray.config.space import draw
from cps_ray.config.sweep import Param, SweepConfig
from cps_ray.errors import ConfigError
from cps_ray.results import STUDY_FILE, SWEEP_FILE
from cps_ray.text import display_path, in_words

WARM = "warm_start"
"""Attribute of a trial that was taken from an earlier sweep: its folder."""


def earlier_trials(config: SweepConfig) -> tuple[list[FrozenTrial], list[str]]:
    """Returns the trials of the sweeps in `warm_start` that have ended and lie in this search space, and lines that say how many were taken,
    how many were not and why, and what else differs. Raises ConfigError for a sweep whose values do not compare with this one's."""
    taken: list[FrozenTrial] = []
    lines = []
    for folder in config.warm_start:
        where = f"warm_start: {display_path(folder)}"
        if not (folder / SWEEP_FILE).is_file():
            raise ConfigError(
                f"{where}: must be the folder of a sweep (with {SWEEP_FILE} and {STUDY_FILE}), but is not."
            )
        earlier = load_sweep(folder / SWEEP_FILE, begun=True)
        if earlier.objective != config.objective:
            raise ConfigError(
                f"{where}: must have the objective {_objective(config)}, but has {_objective(earlier)}: its values do not compare. "
                "Take it out of warm_start."
            )
        reasons: Counter[str] = Counter()
        before = len(taken)
        for trial in _trials(folder, earlier.name, where):
            found = _as_here(trial, config.search_space, folder)
            if isinstance(found, str):
                reasons[found] += 1
            else:
                taken.append(found)
        left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
        lines.append(f"{where}: {len(taken) - before} trials taken; left out: {left_out}.")
        names = _differing(earlier.train.dump(), config.train.dump())
        differing = [name for name in names if name not in config.search_space]
        if differing:
            lines.append(f"warning: {where}: its train differs from this one's in {', '.join(differing)}.")
    return taken, lines


def _differing(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Yields the names of the settings in which two trainings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            yield from _differing(old.get(key), new.get(key), f"{name}.{key}".removeprefix("."))
    elif old != new:
        yield name


def _objective(config: SweepConfig) -> str:
    return f"{config.objective.metric} ({config.objective.select})"


def _trials(folder: Path, name: str, where: str) -> list[FrozenTrial]:
    """Returns the trials of the study in `folder`, which is only read."""
    uri = f"file:{quote(str(folder / STUDY_FILE))}?mode=ro"
    try:
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{STUDY_FILE}",
            engine_kwargs={"creator": lambda: sqlite3.connect(uri, uri=True, check_same_thread=False)},
        )
        study = optuna.load_study(study_name=name, storage=storage)
        trials = study.get_trials(deepcopy=False)
    except (
        Exception
    ) as err:  # SQLite, SQLAlchemy and Optuna each have their own for a damaged file, and JSON's for a damaged line
        raise ConfigError(
            f"{where}: {STUDY_FILE} must be the study of sweep {name}, but cannot be read as one ({in_words(err)}). "
            "Put back a copy of it, or take the folder out of warm_start."
        ) from err
    if study.direction != optuna.study.StudyDirection.MAXIMIZE:
        raise ConfigError(f"{where}: its study must maximise, but minimises. Take it out of warm_start.")
    return [trial for trial in trials if WARM not in trial.user_attrs]


def _as_here(trial: FrozenTrial, space: Mapping[str, Param], folder: Path) -> FrozenTrial | str:
    """Returns the trial as one of this space, or why it is none."""
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
        return "failed" if trial.state == TrialState.FAIL else "not ended"
    if trial.value is None:
        return "without a value"
    fixed = FixedTrial(trial.params)
    outside = "of other parameters or values"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values out of range: they are refused below
            if draw(space, fixed).keys() != trial.params.keys():
                return outside
            return optuna.trial.create_trial(
                state=trial.state,
                value=trial.value,
                params=trial.params,
                distributions=fixed.distributions,
                intermediate_values=trial.intermediate_values,
                user_attrs={WARM: str(folder)},
            )
    except ValueError:
        return outside
