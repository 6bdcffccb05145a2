"""Pieces of messages: the name that was meant, an error on one line, a short list, a path. Imports the standard library only."""

import difflib
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_MAX_NAMES = 3
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters, line ends, and what stands for bytes of a file name that are no UTF-8."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the known name that was probably meant, or "". `lr` means `optim.lr`: sections may have been left out."""
    names = list(known)
    near = [other for other in names if other.endswith(f".{name}")] or difflib.get_close_matches(name, names, n=1)
    return near[0] if near else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean X?`, or "" where no known name is near."""
    near = nearest(name, known)
    return f" Did you mean {near}?" if near else ""


def first_line(err: BaseException) -> str:
    """Returns the first line of an error's text; the name of its type where it has none."""
    return (str(err).splitlines() or [type(err).__name__])[0]


def on_one_line(err: BaseException, length: int = 300) -> str:
    """Returns an error's text with line breaks as spaces, cut to `length` characters."""
    return " ".join(str(err).split())[:length]


def printable(text: str) -> str:
    """Returns a name as it can be printed: what would steer a terminal or end the line stands as an escape, such as `\\x1b`."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def in_words(err: BaseException) -> str:
    """Returns what an exception that nobody expected says, on one line."""
    # Optuna, SQLAlchemy and Ray wrap what has happened; the names are theirs.
    wrapped = getattr(err, "orig", None) or getattr(err, "cause", None)
    if wrapped is None and type(err).__module__.startswith("optuna."):
        wrapped = err.__cause__
    if isinstance(wrapped, BaseException) and wrapped is not err:
        return in_words(wrapped)
    kind, text = type(err).__name__, on_one_line(err)
    if isinstance(err, OSError) and err.strerror:
        files = " -> ".join(
            os.fsdecode(file) for file in (err.filename, err.filename2) if isinstance(file, str | bytes)
        )
        return f"{files}: {err.strerror}" if files else err.strerror
    if isinstance(err, MemoryError):
        return f"out of memory{f' ({text})' if text else ''}"
    if isinstance(err, UnicodeDecodeError):
        return f"not {err.encoding}: {err.reason}, at byte {err.start}"
    if isinstance(err, UnicodeEncodeError):
        return f"{err.object[err.start : err.end]!a} cannot be written in {err.encoding}"
    if isinstance(err, ModuleNotFoundError):
        return f"the Python package {err.name} is missing"
    if isinstance(err, ImportError):
        return f"a Python package cannot be loaded: {text}"
    if type(err).__module__ == "sqlite3":
        return f"the SQLite database cannot be used: {text}"
    return f"{kind}: {text}" if text else kind


def first_few(names: Sequence[str]) -> str:
    """Returns `a, b, c and 2 more`: three names at most."""
    return ", ".join(names[:_MAX_NAMES]) + (f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else "")


def spaced(number: int) -> str:
    """Returns a count with a space before each three digits: `2 000`."""
    return f"{number:,}".replace(",", " ")


def show_params(params: Mapping[str, Any]) -> str:
    """Parameters in one line: `optim.lr 0.0021  cps.weight 1.3`."""
    return "  ".join(f"{name} {_short(value)}" for name, value in params.items())


def _short(value: Any) -> str:
    return "null" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def display_path(path: Path) -> str:
    """Returns a path for people: relative to the working directory, if that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def shell_path(path: Path) -> str:
    """Returns a path as it can be pasted into a command: as `display_path` does, quoted where the shell would take it for more than a name."""
    return shlex.quote(display_path(path))
