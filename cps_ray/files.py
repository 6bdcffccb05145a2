"""Files that are whole or not there at all, whatever kills the process. Imports the standard library only."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def write_whole(path: Path, write: Callable[[Path], T]) -> T:
    """Lets `write` make a temporary file beside `path`, then puts it in place at once. Returns what `write` returned.

    The temporary name is the process's own: two processes may write the same file, and the later one stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    result = write(temporary)
    os.replace(temporary, path)
    return result


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, all of it or nothing."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, all of it or nothing."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Returns what the file holds; None if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
