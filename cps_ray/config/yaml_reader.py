"""Reads and writes YAML as people expect it: 1.2 numbers and booleans, each key once, and the line of every setting.

PyYAML alone reads `1e-3` as text and `on` as true, and silently keeps the last of two equal keys. Imports `errors`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cps_ray.errors import ConfigError

Loc = tuple[str | int, ...]
"""Keys and list positions from the root of a file to a setting."""

_FLOW_CHARS = 80
"""Longest list that is written on one line, in characters."""


def _int(text: str) -> int:
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


# The core schema of YAML 1.2.2, section 10.3.2: (tag, pattern, possible first characters, conversion).
_CORE: tuple[tuple[str, re.Pattern[str], str, Callable[[str], Any]], ...] = (
    ("null", re.compile(r"(?:null|Null|NULL|~|)\Z"), "nN~", lambda text: None),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), "tTfF", lambda text: text.lower() == "true"),
    ("int", re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), "-+0123456789", _int),
    (
        "float",
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
        "-+0123456789.",
        _float,
    ),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core schema; refuses repeated keys, keys that are not text, and tags outside the schema."""

    # Its own table, because add_implicit_resolver would otherwise extend a copy of SafeLoader's, which follows YAML 1.1.
    yaml_implicit_resolvers = {}  # noqa: RUF012
    yaml_constructors = {
        f"tag:yaml.org,2002:{name}": getattr(yaml.SafeLoader, f"construct_yaml_{name}")
        for name in ("str", "seq", "map")
    } | {None: yaml.SafeLoader.construct_undefined}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuses keys that are not text, and keys that are given twice."""
        # Here and not while constructing, where merge keys (<<) have been replaced by the pairs that they stand for.
        node = super().compose_mapping_node(anchor)
        assert node is not None
        first_line: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise yaml.MarkedYAMLError(problem="a key must be text; quote it", problem_mark=key.start_mark)
            if key.value in first_line:
                problem = f"{key.value} is given twice, first in line {first_line[key.value]}; remove one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            first_line[key.value] = key.start_mark.line + 1
        return node


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes whatever YAML 1.1 or 1.2 would not read as text, and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _constructor(tag: str, pattern: re.Pattern[str], convert: Callable[[str], Any]) -> Callable[[_Loader, Any], Any]:
    def construct(loader: _Loader, node: Any) -> Any:
        text = loader.construct_scalar(node)
        if not pattern.match(text):
            raise yaml.MarkedYAMLError(problem=f"{text!r} is no !!{tag}", problem_mark=node.start_mark)
        return convert(text)

    return construct


def _flow_if_short(dumper: _Dumper, data: Any) -> yaml.SequenceNode:
    node = dumper.represent_sequence("tag:yaml.org,2002:seq", data)
    scalars = all(isinstance(item, yaml.ScalarNode) for item in node.value)
    node.flow_style = scalars and sum(len(item.value) + 2 for item in node.value) <= _FLOW_CHARS
    return node


for _tag, _pattern, _first_chars, _convert in _CORE:
    # PyYAML looks a scalar up by its first character; an empty scalar, which is null, is under "".
    _chars = [*_first_chars, ""] if _tag == "null" else list(_first_chars)
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _chars)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _chars)
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _constructor(_tag, _pattern, _convert))
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<\Z"), ["<"])
_Dumper.add_representer(list, _flow_if_short)
_Dumper.add_representer(tuple, _flow_if_short)


@dataclass(frozen=True)
class Document:
    """One YAML file: its data, and the line of each setting."""

    data: dict[str, Any]
    path: Path
    """Path as the user gave it."""
    root: yaml.MappingNode
    """Nodes that `data` was constructed from; they hold the line numbers."""

    def line(self, loc: Loc) -> int:
        """Returns the line, from 1, of the setting at `loc`, or of the innermost section around it that the file holds."""
        node: yaml.Node = self.root
        line = node.start_mark.line
        for part in loc:
            if isinstance(node, yaml.MappingNode):
                # PyYAML has put merged pairs before the mapping's own, so the last pair of a key counts.
                entry = next(((key, value) for key, value in reversed(node.value) if key.value == part), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                entry = (node.value[part], node.value[part])
            else:
                break
            if entry is None:
                break
            line, node = entry[0].start_mark.line, entry[1]
        return line + 1

    def where(self, loc: Loc) -> str:
        """Returns `FILE:LINE` of the setting at `loc`."""
        return f"{self.path}:{self.line(loc)}"


def load(path: Path) -> Document:
    """Reads a file that holds one mapping.

    Raises ConfigError if it is missing, not UTF-8, not YAML or not a mapping, or if it repeats a key.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError as err:
        raise ConfigError(f"{path}: no such file.") from err
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read: {err.strerror}.") from err
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as err:
        line = raw.count(b"\n", 0, err.start) + 1
        raise ConfigError(f"{path}:{line}: must be UTF-8, but holds the byte 0x{raw[err.start]:02x}.") from err
    node, data = _read(text, lambda line: f"{path}:{line}")
    if not isinstance(node, yaml.MappingNode):
        content = "is empty" if node is None else f"holds {data!r:.60}"
        raise ConfigError(f"{path}:1: must hold a mapping of settings, such as `version: 1`, but {content}.")
    return Document(data, path, node)


def scalar(text: str, where: str = "") -> Any:
    """Reads one YAML value, as after `--set name=`. Raises ConfigError, beginning with `where`, if it is not YAML."""
    return _read(text, lambda line: where or repr(text))[1]


def dump_yaml(data: Any, header: str = "") -> str:
    """Returns YAML in block style: keys in their order, short lists as `[64, 96]`, `header` as comment lines at the top."""
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    body = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)
    return comment + body


def _read(text: str, where: Callable[[int], str]) -> tuple[yaml.Node | None, Any]:
    """Returns the node and the value of the only document in `text`; (None, None) if there is none.

    `where` turns a line number into the beginning of an error message.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        # deep: nested values are built at once, and a node that contains itself is an error.
        return node, None if node is None else loader.construct_object(node, deep=True)
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        raise ConfigError(
            f"{where(mark.line + 1 if mark else 1)}: not valid YAML: {err.problem or err.context}."
        ) from err
    except yaml.reader.ReaderError as err:
        line = text.count("\n", 0, err.position) + 1
        raise ConfigError(
            f"{where(line)}: not valid YAML: the character {chr(err.character)!r} is not allowed."
        ) from err
