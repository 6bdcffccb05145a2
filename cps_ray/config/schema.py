"""Settings by their dotted names: which exist, how to change one, and the sentence for one that is wrong.

Imports `errors`, `text`, `plugins` and `yaml_reader`.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, to_json

from cps_ray.config.plugins import IMPORT_PATH
from cps_ray.config.yaml_reader import Loc
from cps_ray.errors import ConfigError
from cps_ray.text import nearest

M = TypeVar("M", bound=BaseModel)
Where = Callable[[Loc], str]
"""Function from a setting to where a person wrote it, such as `FILE:LINE`; the text may be empty."""

_MAX_SENTENCES = 10

_RENAMED = {
    "cps.on": "is called cps.images now.",
    "data.groups": "is called data.slices now.",
    "data.split_seed": "is called data.subset_seed now.",
    "objective.mode": "is gone: every metric is better when it is higher. Remove the line.",
}
"""Setting of earlier versions -> what became of it. There are no aliases: a file with an old name is refused."""
_RENAMED_VALUES = {"placement: split": "one_network_per_worker"}
"""`setting: value` of earlier versions -> the value's name now."""

_MUST_BE = {
    "int_type": "a whole number",
    "int_parsing_size": "a whole number of at most 64 bits",
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
    "greater_than": "greater than {gt:.12g}",
    "greater_than_equal": "at least {ge:.12g}",
    "less_than": "less than {lt:.12g}",
    "less_than_equal": "at most {le:.12g}",
    "literal_error": "{expected}",
    "union_tag_invalid": "one of {expected_tags}",
    "string_pattern_mismatch": "text that fits {pattern}",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} or fewer",
}
"""Type of an error of pydantic -> what follows "must be"; fields in braces come from the error's context."""


def parse(model: type[M], raw: Any, *, base: Path | None = None, where: Where = lambda loc: "") -> M:
    """Returns `raw` as a `model`. Paths in it are relative to `base` (None: the working directory).

    Text and booleans are not converted to numbers, nor numbers to text. Raises ConfigError with one sentence per fault, each
    beginning with `where(loc)`.
    """
    try:
        # As JSON, because strict Python input would refuse a list for a tuple and text for a path.
        text = to_json(raw, inf_nan_mode="constants")
        return model.model_validate_json(text, strict=True, context={"base": base})
    except ValidationError as err:
        faults: dict[Loc, list[ErrorDetails]] = {}
        for error in err.errors(include_url=False):
            faults.setdefault(_written_loc(raw, error), []).append(error)
        faults = _without_misspelt(model, _innermost(faults))
        sentences = (_sentence(model, loc, errors, where) for loc, errors in faults.items())
        raise ConfigError(first_sentences(sentences)) from err


def first_sentences(sentences: Iterable[str]) -> str:
    """Returns the first ten different sentences, one a line, and a line with the number of further ones."""
    lines = list(dict.fromkeys(sentences))
    rest = [f"... and {len(lines) - _MAX_SENTENCES} more."] if len(lines) > _MAX_SENTENCES else []
    return "\n".join(lines[:_MAX_SENTENCES] + rest)


def dotted(loc: Loc) -> str:
    """Returns `enqueue[0].optim.lr` for `("enqueue", 0, "optim.lr")`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def as_yaml(value: Any) -> str:
    """Returns a value for an error message, much as YAML writes it, in 60 characters at most; a mapping is not shown."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, Mapping):
        return "a mapping"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def renaming(loc: Loc) -> str:
    """Returns what became of a setting that had this name once, or "". `loc` may begin with further sections."""
    names = ".".join(map(str, loc)).split(".")
    return _RENAMED.get(".".join(names[-2:]), "")


def settings(model: type[BaseModel]) -> Iterator[str]:
    """Yields the dotted names of all settings of a model, but not those of its sections."""
    for name, field in model.model_fields.items():
        sections = _models(_options(field.annotation))
        yield from (f"{name}.{inner}" for section in sections for inner in settings(section))
        if not sections:
            yield name


def locate(model: type[BaseModel], raw: Any, name: str) -> Loc:
    """Returns the keys that a dotted name stands for, whether or not they exist.

    Keys of a free mapping may hold dots (`search_space.optim.lr.low`): the longest key found in `raw` is taken. A key that
    is not found is all the rest of the name, or one word where the mapping holds mappings (`baselines.supervised.method`).
    """
    options: list[Any] = [model]
    loc: Loc = ()
    parts = name.split(".")
    while parts:
        length = 1 if _models(options) else _key_length(options, raw, parts)
        key = ".".join(parts[:length])
        options, raw, parts = _inside(options, key), raw.get(key) if isinstance(raw, dict) else None, parts[length:]
        loc = (*loc, key)
    return loc


def types_at(model: type[BaseModel], loc: Loc) -> list[Any]:
    """Returns the types and models that the setting at `loc` may have, unions resolved. Empty: there is no such setting."""
    options: list[Any] = [model]
    for part in loc:
        options = _inside(options, part)
    return options


def put(model: type[BaseModel], raw: Any, loc: Loc, value: Any, *, where: str = "") -> Any:
    """Returns a copy of the mapping `raw` with `value` at `loc`; missing sections are made.

    A mapping put onto a section changes only the settings that it names; put onto a free mapping (`model.options`), it
    replaces it. Raises ConfigError, beginning with `where`, if `loc` leads through a value that is not a mapping.
    """
    return _put(raw, loc, value, lambda at: bool(_models(types_at(model, at))), where)


def absolute(model: type[BaseModel], loc: Loc, value: Any, base: Path) -> Any:
    """Returns `value` for the setting at `loc`, with paths in it, which are relative to `base`, made absolute."""
    return _with_paths(model, loc, value, lambda path: os.path.abspath(base / os.path.expanduser(path)))


def relative(model: type[BaseModel], loc: Loc, value: Any, base: Path) -> Any:
    """Returns `value` for the setting at `loc`, with the absolute paths in it made relative to `base`."""
    return _with_paths(model, loc, value, lambda path: os.path.relpath(path, base))


def _with_paths(model: type[BaseModel], loc: Loc, value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_paths(model, (*loc, key), inner, change) for key, inner in value.items()}
    return change(value) if isinstance(value, str) and Path in types_at(model, loc) else value


def _put(node: Any, loc: Loc, value: Any, is_section: Callable[[Loc], bool], where: str, done: Loc = ()) -> Any:
    if not loc:
        if not (isinstance(node, Mapping) and isinstance(value, Mapping) and is_section(done)):
            return value
        for key, inner in value.items():
            node = _put(node, (key,), inner, is_section, where, done)
        return node
    if not isinstance(node, Mapping | None):
        raise ConfigError(f"{where}: {dotted(done)} is {as_yaml(node)} and holds no settings.".removeprefix(": "))
    section = node or {}
    inner = _put(section.get(loc[0]), loc[1:], value, is_section, where, (*done, loc[0]))
    return {**section, loc[0]: inner}


def _options(annotation: Any) -> list[Any]:
    """Returns the members of a union, or the type itself in a list; metadata of `Annotated` is left out."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) is Union or isinstance(annotation, type(int | str)):
        return [option for member in get_args(annotation) for option in _options(member)]
    return [annotation]


def _models(options: Sequence[Any]) -> list[type[BaseModel]]:
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def _inside(options: Sequence[Any], part: str | int) -> list[Any]:
    """Returns the types that a value with one of the types `options` holds at the key or position `part`."""
    inner: list[Any] = []
    for option in options:
        if option in _models([option]):
            field = option.model_fields.get(part)
            inner += _options(field.annotation) if field else []
        elif get_origin(option) is dict:
            inner += _options(get_args(option)[1])
        elif get_origin(option) in (list, tuple) and isinstance(part, int):
            inner += _options(get_args(option)[0])
    return inner


def _key_length(options: Sequence[Any], raw: Any, parts: Sequence[str]) -> int:
    """Returns the number of `parts` that are the next key, in a free mapping whose keys may hold dots."""
    keys = raw if isinstance(raw, dict) else {}
    longest = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in keys), 0)
    nested = any(get_origin(option) is dict for option in _inside(options, ""))  # "": all values have the same type
    return longest or (1 if nested else len(parts))


def _written_loc(raw: Any, error: ErrorDetails) -> Loc:
    """Returns where an error lies in `raw`. The error's own `loc` also has the names of the union members that were tried."""
    loc: Loc = ()
    for part in error["loc"]:
        if (isinstance(raw, Mapping) and part in raw) or (isinstance(raw, list | tuple) and part in range(len(raw))):
            raw, loc = raw[part], (*loc, part)  # type: ignore[index]
    if error["type"] == "missing":
        return (*loc, error["loc"][-1])
    if error["type"].startswith("union_tag"):
        return (*loc, error["ctx"]["discriminator"].strip("'"))
    return loc


def whole_names(model: type[BaseModel], loc: Loc, text: str) -> str:
    """Returns a message with the names of settings of the section at `loc`, which stand in backquotes, as those of `model`."""

    def whole(name: re.Match[str]) -> str:
        is_setting = types_at(model, (*loc, *name[0].split(".")))
        return f"{dotted(loc)}.{name[0]}" if loc and is_setting else name[0]

    # What follows a colon is a value: mean_teacher is the name of a method, and of its section.
    return re.sub(r"`[^`]+`", lambda quoted: re.sub(r"(?<!: )\b[a-z]\w*(?:\.\w+)*", whole, quoted[0]), text)


def _meant(model: type[BaseModel], loc: Loc) -> str:
    """Returns the whole name of the setting that was probably meant, or "": one of this name in another section, or of a like name in this."""
    name = str(loc[-1])
    elsewhere = [other for other in settings(model) if other.endswith(f".{name}")]
    near = nearest(name, _siblings(model, loc))
    if near and len(elsewhere) != 1:
        return dotted((*loc[:-1], near))
    return elsewhere[0] if len(elsewhere) == 1 else ""


def _siblings(model: type[BaseModel], loc: Loc) -> list[str]:
    return [name for section in _models(types_at(model, loc[:-1])) for name in section.model_fields]


def _innermost(faults: Mapping[Loc, list[ErrorDetails]]) -> dict[Loc, list[ErrorDetails]]:
    """Returns the faults without those of a value that fits a member of a union but for something inside it."""
    return {
        loc: errors
        for loc, errors in faults.items()
        if not any(len(other) > len(loc) and other[: len(loc)] == loc for other in faults)
    }


def _without_misspelt(
    model: type[BaseModel], faults: Mapping[Loc, list[ErrorDetails]]
) -> dict[Loc, list[ErrorDetails]]:
    """Returns the faults without required settings that are missing only because they are misspelt."""
    unknown = [loc for loc, errors in faults.items() if errors[0]["type"] == "extra_forbidden"]
    meant = {(*loc[:-1], nearest(str(loc[-1]), _siblings(model, loc))) for loc in unknown}
    return {loc: errors for loc, errors in faults.items() if errors[0]["type"] != "missing" or loc not in meant}


def _sentence(model: type[BaseModel], loc: Loc, errors: Sequence[ErrorDetails], where: Where) -> str:
    """Returns the sentence for one fault. A value that fits no member of a union comes with an error for each member."""
    kind, text = errors[0]["type"], _text(model, loc, errors)
    rule = re.search(r"`([\w.]+)", str(errors[0]["ctx"]["error"])) if kind == "value_error" else None
    # pydantic reports a rule over several settings at their common section; the line to look at is that of the first
    # setting in the message.
    named = (*loc, *rule[1].split(".")) if rule else loc
    # A rule over several settings names them all itself.
    named_whole = kind == "value_error" and f"`{dotted(loc)}." in text
    return ": ".join(part for part in (where(named), "" if named_whole else dotted(loc), text) if part)


def _text(model: type[BaseModel], loc: Loc, errors: Sequence[ErrorDetails]) -> str:
    error = errors[0]
    if error["type"] == "extra_forbidden":
        meant = _meant(model, loc)
        return renaming(loc) or "no such setting." + (f" Did you mean {meant}?" if meant else "")
    if error["type"] in ("missing", "union_tag_not_found"):
        return "is missing."
    if error["type"] == "value_error":
        return whole_names(model, loc, str(error["ctx"]["error"]))
    value = error["ctx"]["tag"] if error["type"] == "union_tag_invalid" else error["input"]
    requirements = dict.fromkeys(_requirement(option_error) for option_error in errors)
    new_name = _RENAMED_VALUES.get(f"{loc[-1]}: {value}") if loc else None
    hint = f" It is called {new_name} now." if new_name else ""
    return f"must be {' or '.join(requirements)}, but got {as_yaml(value)}.{hint}"


def _requirement(error: ErrorDetails) -> str:
    """Returns what must hold, such as `at least 0`."""
    if error.get("ctx", {}).get("pattern") == IMPORT_PATH:
        return "a plug-in, MODULE:NAME"
    context = {
        key: value.replace("'", "") if isinstance(value, str) else value for key, value in error.get("ctx", {}).items()
    }
    return _MUST_BE.get(error["type"], f"what it should ({error['msg']})").format(**context)
