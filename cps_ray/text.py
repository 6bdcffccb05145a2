"""Pieces of messages: the name that was meant, an error on one line, a short list, a path. Imports the standard library only."""

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

_MAX_NAMES = 3


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


def first_few(names: Sequence[str]) -> str:
    """Returns `a, b, c and 2 more`: three names at most."""
    return ", ".join(names[:_MAX_NAMES]) + (f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else "")


def display_path(path: Path) -> str:
    """Returns a path for people: relative to the working directory, if that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)
