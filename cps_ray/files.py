"""Files and folders that are complete or not there at all, even if the process is killed. Imports the standard library only."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Gives a new folder to write into, which takes the place of `folder` when the block ends well; else `folder` stays as it was."""
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a kill
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        # A folder cannot replace a full one at once; between these two lines there is none, but never half of one.
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


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


def read_lines(path: Path) -> list[Any]:
    """Returns the JSON value of each line; a last one cut short by a crash is left out. ValueError for any other line that is none."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
