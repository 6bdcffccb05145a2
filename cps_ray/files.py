"""Files that are complete or not there at all, even if the process is killed. Imports the standard library only."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def write_whole(path: Path, write: Callable[[Path], T]) -> T:
    """Lets `write` make a temporary file beside `path`, then renames it to `path`. Returns what `write` returned.

    The temporary name holds the process id: two processes may write the same file, and the one that ends later wins.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        result = write(temporary)
        os.replace(temporary, path)  # atomic: readers see the old file or the new one
    except BaseException:  # a full disk must not be filled further by what nobody will read
        temporary.unlink(missing_ok=True)
        raise
    return result


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, all of it or nothing; see `write_whole`."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, all of it or nothing; see `write_whole`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Returns the JSON value that the file holds; None if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
