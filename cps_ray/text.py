"""Words for messages: the near name, the first line of an error, a short list. Imports the standard library only."""

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

_NAMED = 3


def nearest(name: str, known: Iterable[str]) -> str:
    """The name that was probably meant, or nothing. `lr` means `optim.lr`: the sections may be what is lacking."""
    names = list(known)
    near = [other for other in names if other.endswith(f".{name}")] or difflib.get_close_matches(name, names, n=1)
    return near[0] if near else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean X?`, or nothing."""
    near = nearest(name, known)
    return f" Did you mean {near}?" if near else ""


def first_line(err: BaseException) -> str:
    """The first line of an error's text; the error's type where it has none."""
    return (str(err).splitlines() or [type(err).__name__])[0]


def on_one_line(err: BaseException, length: int = 300) -> str:
    """An error's whole text with line breaks as spaces, cut to `length` characters."""
    return " ".join(str(err).split())[:length]


def first_few(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def display_path(path: Path) -> str:
    """A path for people: relative to the working directory, if that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)
