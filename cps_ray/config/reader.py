"""Reads the files that people write into frozen configs. Imports the rest of `config`.

    load_sweep(Path("sweeps/quickstart.yaml"), ["budget.trials=2"]).train.optim.lr

Overrides are `NAME=VALUE` as in `--set`: a dotted name from the root of the file, and a YAML value. Flags of their own, such as
`--name`, come as `{"name": "1_16"}`: what was typed is the value, and no YAML. A relative path in the file is relative to the file;
one in an override or a flag is relative to the working directory.

A training, or `train:` in a sweep, may begin from a shipped one, `preset: reference/voc`; settings beside it change that one.
Shipped sweeps go by their names, too: `load_sweep(Path("quickstart"))`.
"""

import json
import operator
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any, get_origin

from pydantic import BaseModel

from cps_ray.config import yaml_reader
from cps_ray.config.checks import describe, faults
from cps_ray.config.schema import M, Where, absolute, as_yaml, dotted, first_sentences, locate, parse, put, types_at
from cps_ray.config.sweep import BaselineConfig, SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import Document, Loc
from cps_ray.errors import ConfigError
from cps_ray.text import did_you_mean, nearest

__all__ = [
    "load_sweep",
    "load_train",
    "parse",
    "parse_train",
    "presets",
    "read_sweep",
    "read_train",
    "shipped",
    "sweep_file",
    "sweeps",
    "value_at",
]

_PRESET = "preset"
_PRESETS = Path(__file__).with_name("presets")
_SWEEPS = "sweeps"


def shipped(folder: str) -> Path:
    """Returns a folder of files that come with cps_ray: an installed package holds it, in a checkout it lies beside the package."""
    package = Path(__file__).parents[1]
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def sweeps() -> list[str]:
    """Returns the names of the shipped sweeps, such as `quickstart`."""
    return sorted(path.stem for path in shipped(_SWEEPS).glob("*.yaml"))


def presets() -> list[str]:
    """Returns the names of the shipped trainings, such as `reference/voc`."""
    return sorted(path.relative_to(_PRESETS).with_suffix("").as_posix() for path in _PRESETS.rglob("*.yaml"))


def parse_train(raw: dict[str, Any], where: str, base: Path | None = None) -> TrainConfig:
    """Returns a training from a plain dict, such as `TrainConfig.dump` gives; paths are relative to `base`.

    Raises ConfigError, whose message begins with `where`.
    """
    return parse(TrainConfig, raw, base=base, where=lambda loc: where)


def load_train(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a training file or, where there is none, the preset of that name; its paths are relative to the working directory.

    Raises ConfigError: `FILE:LINE: setting: what must hold`, or `--set ...` in place of FILE:LINE.
    """
    return read_train(path, overrides)[0]


def read_train(
    path: Path, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> tuple[TrainConfig, Where]:
    """Returns what `load_train` does, and a function from a setting to where it was written, for checks that come later."""
    if path.exists():
        return _load(TrainConfig, yaml_reader.load(path), path.parent, overrides, flags or {})
    name = path.as_posix()
    if name in sweeps():
        _refuse_other_kind(TrainConfig, yaml_reader.load(sweep_file(path)).data, path)
    preset = _preset(name, f"{path}: no such file, and")
    return _load(TrainConfig, replace(preset, path=Path(name)), Path(), overrides, flags or {})


def load_sweep(path: Path, overrides: Sequence[str] = (), *, begun: bool = False) -> SweepConfig:
    """Reads a sweep file or, where there is none, the shipped sweep of that name, as if it lay in `sweeps/` of the working directory.

    Tries its search space, points, baselines and final changes on its training. Raises ConfigError: `FILE:LINE: setting: what
    must hold`, or `--set ...` in place of FILE:LINE.
    """
    return read_sweep(path, overrides, begun=begun)[0]


def read_sweep(
    path: Path, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None, *, begun: bool = False
) -> tuple[SweepConfig, Where]:
    """Returns what `load_sweep` does, and a function from a setting to where it was written, for checks that come later. `begun`: the sweep has,
    perhaps by an earlier version."""
    file = sweep_file(path)
    base = path.parent if file == path else Path(_SWEEPS)
    sweep, where = _load(SweepConfig, replace(yaml_reader.load(file), path=path), base, overrides, flags or {})
    sweep = _with_absolute_changes(sweep, base)
    sweep_faults = faults(sweep, begun=begun)
    if sweep_faults:
        raise ConfigError(first_sentences(f"{where(loc)}: {describe((loc, text))}" for loc, text in sweep_faults))
    return sweep, where


def sweep_file(path: Path) -> Path:
    """Returns the file that is meant: `path` itself or, where there is none, the shipped sweep of that name. Raises ConfigError."""
    name, names = path.as_posix(), sweeps()
    # A folder of that name may well lie there: camvid, with the images.
    if path.is_file() or (path.exists() and name not in names):
        return path
    if name in presets():
        _refuse_other_kind(SweepConfig, _preset(name, "").data, path)
    if name not in names:
        hint = did_you_mean(path.stem, names) or f" There are {', '.join(names)}."
        raise ConfigError(f"{path}: no such file, and there is no sweep {as_yaml(name)}.{hint}")
    return shipped(_SWEEPS) / f"{name}.yaml"


def _load(
    model: type[M], document: Document, base: Path, overrides: Sequence[str], flags: Mapping[str, Any]
) -> tuple[M, Where]:
    """Returns the config, and a function from a setting to where it was written: `FILE:LINE`, `--set NAME=VALUE` or `--name VALUE`."""
    _refuse_other_kind(model, document.data, document.path)
    raw = _on_preset(document, ("train",) if model is SweepConfig else ())
    given_at: dict[Loc, str] = {}
    for text in overrides:
        loc, value = _override(model, raw, text)
        raw = put(model, raw, loc, value, where=f"--set {text}")
        given_at[loc] = f"--set {text}"
    for name, value in flags.items():
        loc = tuple(name.split("."))
        raw = put(model, raw, loc, absolute(model, loc, value, Path.cwd()))
        given_at[loc] = f"--{loc[-1]} {value}"

    def where(loc: Loc) -> str:
        # A fault of a whole section is blamed on the override inside it: the file alone was probably right.
        # `map` ends with the shorter of the two, so either may lie inside the other.
        causes = [text for at, text in given_at.items() if loc and all(map(operator.eq, at, loc))]
        return causes[-1] if causes else document.where(loc)

    return parse(model, raw, base=base, where=where), where


def _on_preset(document: Document, at: Loc) -> Any:
    """Returns the settings of the file. If the training at `at` names a preset, its settings are put onto those of the preset."""
    raw: Any = document.data
    train = raw.get(at[0]) if at else raw
    if not isinstance(train, dict):
        return raw
    for key in train:
        if key != _PRESET and key not in TrainConfig.model_fields and nearest(str(key), [_PRESET]):
            # Otherwise every setting of the preset would be reported missing, and the typo not among the first faults.
            raise ConfigError(
                f"{document.where((*at, key))}: {dotted((*at, key))}: no such setting. Did you mean {_PRESET}?"
            )
    if _PRESET not in train:
        return raw
    own = {key: value for key, value in train.items() if key != _PRESET}
    loc = (*at, _PRESET)
    preset = _preset(train[_PRESET], f"{document.where(loc)}: {dotted(loc)}:")
    merged = put(TrainConfig, preset.data, (), own, where=document.where(at))
    return {**raw, at[0]: merged} if at else merged


def _preset(name: Any, where: str) -> Document:
    """Reads the shipped file of that name. Raises ConfigError, which begins with `where`, if there is none."""
    names = presets()
    if name not in names:
        hint = did_you_mean(str(name), names) or f" There are {', '.join(names)}."
        raise ConfigError(f"{where} there is no preset {as_yaml(name)}.{hint}")
    return yaml_reader.load(_PRESETS / f"{name}.yaml")


def _refuse_other_kind(model: type[M], raw: dict[str, Any], path: Path) -> None:
    """Raises ConfigError for a sweep given as a training, or the reverse: the schema would only list wrong keys."""
    is_sweep = "train" in raw and "search_space" in raw
    if model is TrainConfig and is_sweep:
        raise ConfigError(
            f"{path}: this is a sweep, not a training. Run it: python -m cps_ray.sweep {shlex.quote(str(path))}"
        )
    if model is SweepConfig and not is_sweep and (_PRESET in raw or {"data", "model", "optim"} <= set(raw)):
        raise ConfigError(
            f"{path}: this is a training, not a sweep. Run it: python -m cps_ray.train {shlex.quote(str(path))}"
        )


def _override(model: type[M], raw: Any, text: str) -> tuple[Loc, Any]:
    """Returns the setting and the value of `NAME=VALUE`; a path in the value is made absolute."""
    name, equals, value = text.partition("=")
    if not equals or not all(name.split(".")):
        raise ConfigError(f"--set {text}: must be NAME=VALUE, such as --set train.optim.lr=0.01.")
    loc = locate(model, raw, name)
    if loc in ((_PRESET,), ("train", _PRESET)):
        # A file may hold only what differs from its preset: with another preset it would be another training.
        raise ConfigError(f"--set {text}: a preset is named in the file, as `preset: {value}`, and not by --set.")
    return loc, value_at(model, loc, value, f"--set {text}")


def value_at(model: type[BaseModel], loc: Loc, text: str, where: str) -> Any:
    """Returns what VALUE in NAME=VALUE means for the setting at `loc`; paths are relative to the working directory.

    Raises ConfigError, beginning with `where`, if it is not YAML, or is text that YAML takes for something else: `[v2]`, `a #1`, `12`.
    """
    types = types_at(model, loc)
    quoted = shlex.quote(f"{dotted(loc)}={json.dumps(text, ensure_ascii=False)}")
    hint = f" If it is text, quote it for YAML and for the shell: {quoted}" if {str, Path} & set(types) else ""
    try:
        value = yaml_reader.scalar(text, where)
    except ConfigError as err:
        raise ConfigError(f"{err}{hint}") from err
    plain = text.strip()
    if isinstance(value, str):
        is_other = plain != value and not plain.startswith(("'", '"', "!!"))
    elif value is None:
        is_other = plain.lower() not in ("", "~", "null")
    elif isinstance(value, list | dict):
        is_other = not any(get_origin(option) or hasattr(option, "model_fields") for option in types)
    else:
        is_other = set(types) <= {str, Path, NoneType}
    if hint and is_other:
        raise ConfigError(f"{where}: YAML reads this as {as_yaml(value)}.{hint}")
    return absolute(model, loc, value, Path.cwd())


def _with_absolute_changes(sweep: SweepConfig, base: Path) -> SweepConfig:
    """Makes paths in baselines and final changes absolute, as the schema does for settings: later, the file is not known."""

    def absolute_paths(changes: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            if name in BaselineConfig.model_fields
            else absolute(TrainConfig, locate(TrainConfig, {}, name), value, base)
            for name, value in changes.items()
        }

    baselines = {name: absolute_paths(changes) for name, changes in sweep.baselines.items()}
    final = sweep.final.model_copy(update={"set": absolute_paths(sweep.final.set)})
    return sweep.model_copy(update={"baselines": baselines, "final": final})
