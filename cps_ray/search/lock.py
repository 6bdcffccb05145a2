"""The lock on a sweep folder: one process at a time works on it. Loads neither torch nor Ray, so that a second one is refused at once."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from cps_ray.errors import ConfigError, DiskError
from cps_ray.results import LOCK_FILE

_LOCK_S = 0.2
"""How long a lock is asked for: those who only look at a sweep hold it for microseconds."""
_held: set[tuple[int, int]] = set()
"""Lock files that this process holds, by device and inode."""


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds the sweep folder until the block ends; where this process holds it already, changes nothing. Raises ConfigError if another
    process has it, DiskError where it cannot be written."""
    try:
        file = (root / LOCK_FILE).open("w")
    except OSError as err:
        raise DiskError(
            f"{root}: must be a folder that can be written to, but is not ({err.strerror}). Make it so; `sweep status` only reads it."
        ) from err
    with file:
        status = os.fstat(file.fileno())
        key = (status.st_dev, status.st_ino)
        if key in _held:
            yield
            return
        _lock(file, root)  # the system lets go of it when the process ends, however it does
        _held.add(key)
        try:
            yield
        finally:
            _held.remove(key)


def _lock(file: TextIO, root: Path) -> None:
    until = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as err:
            if time.monotonic() > until:
                raise ConfigError(f"{root}: another process is running this sweep. Wait for it, or stop it.") from err
        time.sleep(0.01)
