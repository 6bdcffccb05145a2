"""Settings by their dotted names: which exist, how to change one, and what to say when one is wrong.

Imports `errors` and `yaml_reader`.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, to_json

from cps_ray.config.yaml_reader import Loc
from cps_ray.errors import ConfigError
from cps_ray.text import did_you_mean, nearest

M = TypeVar("M", bound=BaseModel)
Where = Callable[[Loc], str]
"""Setting -> the place where a person wrote it, such as `FILE:LINE`; may be empty."""

_SHOWN = 3

_RENAMED = {
    "cps.on": "is called cps.images now.",
    "data.groups": "is called data.slices now.",
    "data.split_seed": "is called data.subset_seed now.",
    "objective.mode": "is gone: every metric is better when it is higher. Remove the line.",
}
"""Settings that files of earlier versions have. No alias: an old file says what it means by today's names, or is refused."""
_RENAMED_VALUES = {"placement: split": "one_network_per_worker"}

_MUST_BE = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of settings",
    "model_attributes_type": "a mapping of settings",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "union_tag_invalid": "one of {expected_tags}",
    "string_pattern_mismatch": "text that fits {pattern}",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} or fewer",
}


def parse(model: type[M], raw: Any, *, base: Path | None = None, where: Where = lambda loc: "") -> M:
    """`raw` as a `model`. Paths in it are relative to `base` (None: the working directory).

    A number must be a number and true must be true: text and booleans are not converted. ConfigError: one sentence per
    fault, beginning with `where(loc)`.
    """
    try:
        # As JSON, because strict Python input would refuse a list for a tuple and text for a path.
        text = to_json(raw, inf_nan_mode="constants")
        return model.model_validate_json(text, strict=True, context={"base": base})
    except ValidationError as err:
        faults: dict[Loc, list[ErrorDetails]] = {}
        for error in err.errors(include_url=False):
            faults.setdefault(_written(raw, error), []).append(error)
        sentences = (_sentence(model, loc, errors, where) for loc, errors in _distinct(model, faults).items())
        raise ConfigError(several(sentences)) from err


def several(sentences: Iterable[str]) -> str:
    """The sentences, one a line; of many only the first few."""
    lines = list(dict.fromkeys(sentences))
    rest = [f"... and {len(lines) - _SHOWN} more."] if len(lines) > _SHOWN else []
    return "\n".join(lines[:_SHOWN] + rest)


def place(loc: Loc) -> str:
    """`("enqueue", 0, "optim.lr")` -> `enqueue[0].optim.lr`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def show(value: Any) -> str:
    """A value in an error message, as YAML writes it; long ones are cut."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, Mapping):
        return "a mapping"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def renamed(loc: Loc) -> str:
    """What became of a setting that had this name once, or nothing. `loc` may begin with further sections."""
    names = ".".join(map(str, loc)).split(".")
    return _RENAMED.get(".".join(names[-2:]), "")


def settings(model: type[BaseModel]) -> Iterator[str]:
    """Dotted names of all settings of a model, sections left out."""
    for name, field in model.model_fields.items():
        sections = _models(_options(field.annotation))
        yield from (f"{name}.{inner}" for section in sections for inner in settings(section))
        if not sections:
            yield name


def locate(model: type[BaseModel], raw: Any, name: str) -> Loc:
    """The keys behind a dotted name, whether or not they exist.

    Keys of a free mapping may hold dots (`search_space.optim.lr.low`): the longest key found in `raw` is taken, and a
    new key is all the rest, or one word where the mapping holds mappings (`baselines.supervised.method`).
    """
    options: list[Any] = [model]
    loc: Loc = ()
    parts = name.split(".")
    while parts:
        taken = 1 if _models(options) else _key_words(options, raw, parts)
        key = ".".join(parts[:taken])
        options, raw, parts = _inside(options, key), raw.get(key) if isinstance(raw, dict) else None, parts[taken:]
        loc = (*loc, key)
    return loc


def types_at(model: type[BaseModel], loc: Loc) -> list[Any]:
    """What the setting at `loc` may be: types and models, unions opened. Empty: there is no such setting."""
    options: list[Any] = [model]
    for part in loc:
        options = _inside(options, part)
    return options


def put(model: type[BaseModel], raw: Any, loc: Loc, value: Any, *, where: str = "") -> Any:
    """A copy of the mapping `raw` with `value` at `loc`; missing sections are made.

    A mapping put onto a section changes only the settings it names; put onto a free mapping (`model.options`) it
    replaces it. ConfigError, beginning with `where`: the way to `loc` leads through a value that is not a mapping.
    """
    return _put(raw, loc, value, lambda at: bool(_models(types_at(model, at))), where)


def absolute(model: type[BaseModel], loc: Loc, value: Any, base: Path) -> Any:
    """`value` for the setting at `loc`, with paths in it that are relative to `base` made absolute."""
    if isinstance(value, Mapping):
        return {key: absolute(model, (*loc, key), inner, base) for key, inner in value.items()}
    is_path = isinstance(value, str) and Path in types_at(model, loc)
    return os.path.abspath(base / os.path.expanduser(value)) if is_path else value


def _put(node: Any, loc: Loc, value: Any, is_section: Callable[[Loc], bool], where: str, done: Loc = ()) -> Any:
    if not loc:
        if not (isinstance(node, Mapping) and isinstance(value, Mapping) and is_section(done)):
            return value
        for key, inner in value.items():
            node = _put(node, (key,), inner, is_section, where, done)
        return node
    if not isinstance(node, Mapping | None):
        raise ConfigError(f"{where}: {place(done)} is {show(node)} and holds no settings.".removeprefix(": "))
    known = node or {}
    inner = _put(known.get(loc[0]), loc[1:], value, is_section, where, (*done, loc[0]))
    return {**known, loc[0]: inner}


def _options(annotation: Any) -> list[Any]:
    """The members of a union, itself otherwise; without metadata."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) is Union or isinstance(annotation, type(int | str)):
        return [option for member in get_args(annotation) for option in _options(member)]
    return [annotation]


def _models(options: Sequence[Any]) -> list[type[BaseModel]]:
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def _inside(options: Sequence[Any], part: str | int) -> list[Any]:
    found: list[Any] = []
    for option in options:
        if option in _models([option]):
            field = option.model_fields.get(part)
            found += _options(field.annotation) if field else []
        elif get_origin(option) is dict:
            found += _options(get_args(option)[1])
        elif get_origin(option) in (list, tuple) and isinstance(part, int):
            found += _options(get_args(option)[0])
    return found


def _key_words(options: Sequence[Any], raw: Any, parts: Sequence[str]) -> int:
    known = raw if isinstance(raw, dict) else {}
    longest = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known), 0)
    nested = any(get_origin(option) is dict for option in _inside(options, ""))
    return longest or (1 if nested else len(parts))


def _written(raw: Any, error: ErrorDetails) -> Loc:
    """The place of an error in what was written: pydantic's own has the names of union members in between."""
    loc: Loc = ()
    for part in error["loc"]:
        if (isinstance(raw, Mapping) and part in raw) or (isinstance(raw, list | tuple) and part in range(len(raw))):
            raw, loc = raw[part], (*loc, part)  # type: ignore[index]
    if error["type"] == "missing":
        return (*loc, error["loc"][-1])
    if error["type"].startswith("union_tag"):
        return (*loc, error["ctx"]["discriminator"].strip("'"))
    return loc


def _siblings(model: type[BaseModel], loc: Loc) -> list[str]:
    return [name for section in _models(types_at(model, loc[:-1])) for name in section.model_fields]


def _distinct(model: type[BaseModel], faults: Mapping[Loc, list[ErrorDetails]]) -> dict[Loc, list[ErrorDetails]]:
    """Without the required settings that are missing only because they are misspelt."""
    unknown = [loc for loc, errors in faults.items() if errors[0]["type"] == "extra_forbidden"]
    meant = {(*loc[:-1], nearest(str(loc[-1]), _siblings(model, loc))) for loc in unknown}
    return {loc: errors for loc, errors in faults.items() if errors[0]["type"] != "missing" or loc not in meant}


def _sentence(model: type[BaseModel], loc: Loc, errors: Sequence[ErrorDetails], where: Where) -> str:
    """One fault; a value that fits no member of a union comes with one error for each."""
    kind, text = errors[0]["type"], _text(model, loc, errors)
    rule = re.search(r"`([\w.]+)", text) if kind == "value_error" else None
    # A rule over several settings is broken at their common section, but best looked up at the first one it names.
    written = (*loc, *rule[1].split(".")) if rule else loc
    return ": ".join(part for part in (where(written), place(loc), text) if part)


def _text(model: type[BaseModel], loc: Loc, errors: Sequence[ErrorDetails]) -> str:
    error = errors[0]
    if error["type"] == "extra_forbidden":
        return renamed(loc) or "no such setting." + did_you_mean(str(loc[-1]), _siblings(model, loc))
    if error["type"] in ("missing", "union_tag_not_found"):
        return "is missing."
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    found = error["ctx"]["tag"] if error["type"] == "union_tag_invalid" else error["input"]
    wanted = dict.fromkeys(_wanted(each) for each in errors)
    now = _RENAMED_VALUES.get(f"{loc[-1]}: {found}") if loc else None
    return f"must be {' or '.join(wanted)}, but got {show(found)}." + (f" It is called {now} now." if now else "")


def _wanted(error: ErrorDetails) -> str:
    context = {
        key: value.replace("'", "") if isinstance(value, str) else value for key, value in error.get("ctx", {}).items()
    }
    return _MUST_BE.get(error["type"], f"what it should ({error['msg']})").format(**context)
