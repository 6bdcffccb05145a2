"""Files that people write -> frozen configs. Imports the rest of `config`.

    load_sweep(Path("sweeps/quickstart.yaml"), ["budget.trials=2"]).train.optim.lr

Overrides are `NAME=VALUE` as in `--set`: a dotted name from the root of the file, and a YAML value. A relative path in
the file is relative to the file; a relative path in an override is relative to the working directory.

A training, or `train:` in a sweep, may name a shipped one, `preset: reference/voc`: what stands beside it changes that.
"""

import operator
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cps_ray.config import yaml_reader
from cps_ray.config.checks import described, faults
from cps_ray.config.schema import M, Where, absolute, locate, parse, place, put, several, show
from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import Document, Loc
from cps_ray.errors import ConfigError
from cps_ray.text import did_you_mean, nearest

__all__ = ["load_sweep", "load_train", "parse", "parse_train", "presets"]

_PRESET = "preset"
_PRESETS = Path(__file__).with_name("presets")


def presets() -> list[str]:
    """Names of the shipped trainings, such as `reference/voc`."""
    return sorted(path.relative_to(_PRESETS).with_suffix("").as_posix() for path in _PRESETS.rglob("*.yaml"))


def parse_train(raw: dict[str, Any], where: str, base: Path | None = None) -> TrainConfig:
    """A training from a plain dict, such as `TrainConfig.dump` gives. ConfigError begins with `where`."""
    return parse(TrainConfig, raw, base=base, where=lambda loc: where)


def load_train(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A training file; where there is none, the preset of that name, with paths relative to the working directory.

    ConfigError: `FILE:LINE: setting: what must hold`, or `--set ...` in place of FILE:LINE.
    """
    if path.exists():
        return _load(TrainConfig, yaml_reader.load(path), path.parent, overrides)[0]
    name = path.as_posix()
    preset = _preset(name, f"{path}: no such file, and")
    return _load(TrainConfig, replace(preset, path=Path(name)), Path(), overrides)[0]


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """A sweep file, with its search space, points, baselines and final changes tried on its training.

    ConfigError: `FILE:LINE: setting: what must hold`, or `--set ...` in place of FILE:LINE.
    """
    sweep, where = _load(SweepConfig, yaml_reader.load(path), path.parent, overrides)
    sweep = _anchored(sweep, path.parent)
    found = faults(sweep)
    if found:
        raise ConfigError(several(f"{where(loc)}: {described((loc, text))}" for loc, text in found))
    return sweep


def _load(model: type[M], document: Document, base: Path, overrides: Sequence[str]) -> tuple[M, Where]:
    _refuse_other_kind(model, document.data, document.path)
    raw = _on_preset(document, ("train",) if model is SweepConfig else ())
    changed: dict[Loc, str] = {}
    for text in overrides:
        loc, value = _override(model, raw, text)
        raw = put(model, raw, loc, value, where=f"--set {text}")
        changed[loc] = text

    def where(loc: Loc) -> str:
        # A fault of a whole section is blamed on the override inside it: the file alone was probably right.
        by = [text for at, text in changed.items() if loc and all(map(operator.eq, at, loc))]
        return f"--set {by[-1]}" if by else document.where(loc)

    return parse(model, raw, base=base, where=where), where


def _on_preset(document: Document, at: Loc) -> Any:
    """What the file says, its training at `at` put on the preset that it names, if it does."""
    raw: Any = document.data
    train = raw.get(at[0]) if at else raw
    if not isinstance(train, dict):
        return raw
    for key in train:
        if key != _PRESET and key not in TrainConfig.model_fields and nearest(str(key), [_PRESET]):
            # Else all that the preset would have said were missing, and the typo not among the first faults.
            raise ConfigError(
                f"{document.where((*at, key))}: {place((*at, key))}: no such setting. Did you mean {_PRESET}?"
            )
    if _PRESET not in train:
        return raw
    own = {key: value for key, value in train.items() if key != _PRESET}
    loc = (*at, _PRESET)
    preset = _preset(train[_PRESET], f"{document.where(loc)}: {place(loc)}:")
    merged = put(TrainConfig, preset.data, (), own, where=document.where(at))
    return {**raw, at[0]: merged} if at else merged


def _preset(name: Any, where: str) -> Document:
    """The shipped file. ConfigError, beginning with `where`: there is none of that name."""
    known = presets()
    if name not in known:
        near = did_you_mean(str(name), known) or f" There are {', '.join(known)}."
        raise ConfigError(f"{where} there is no preset {show(name)}.{near}")
    return yaml_reader.load(_PRESETS / f"{name}.yaml")


def _refuse_other_kind(model: type[M], raw: dict[str, Any], path: Path) -> None:
    """A sweep given as a training, or the reverse, would only be a list of wrong keys."""
    is_sweep = "train" in raw and "search_space" in raw
    if model is TrainConfig and is_sweep:
        raise ConfigError(f"{path}: this is a sweep, not a training. Run it: python -m cps_ray.sweep {path}")
    if model is SweepConfig and not is_sweep and (_PRESET in raw or {"data", "model", "optim"} <= set(raw)):
        raise ConfigError(f"{path}: this is a training, not a sweep. Run it: python -m cps_ray.train {path}")


def _override(model: type[M], raw: Any, text: str) -> tuple[Loc, Any]:
    name, equals, value = text.partition("=")
    if not equals or not all(name.split(".")):
        raise ConfigError(f"--set {text}: must be NAME=VALUE, such as --set train.optim.lr=0.01.")
    loc = locate(model, raw, name)
    if loc in ((_PRESET,), ("train", _PRESET)):
        # The file may hold just what differs from its own preset: on another one it would mean something else.
        raise ConfigError(f"--set {text}: a preset is named in the file, as `preset: {value}`, and not by --set.")
    return loc, absolute(model, loc, yaml_reader.scalar(value, f"--set {text}"), Path.cwd())


def _anchored(sweep: SweepConfig, base: Path) -> SweepConfig:
    """Paths among the changes made absolute, as the schema does for settings: nobody knows the file later on."""

    def anchored(changes: dict[str, Any]) -> dict[str, Any]:
        return {name: absolute(TrainConfig, locate(TrainConfig, {}, name), v, base) for name, v in changes.items()}

    baselines = {name: anchored(changes) for name, changes in sweep.baselines.items()}
    final = sweep.final.model_copy(update={"set": anchored(sweep.final.set)})
    return sweep.model_copy(update={"baselines": baselines, "final": final})
