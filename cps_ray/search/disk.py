"""What can be wrong with the disk below a sweep, in one line: full, read-only, damaged."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from cps_ray.errors import ConfigError, DiskError
from cps_ray.results import resume_command
from cps_ray.text import in_words

_FULL = {errno.ENOSPC, errno.EDQUOT, "SQLITE_FULL"}
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM"}
_DAMAGED = {"SQLITE_NOTADB", "SQLITE_CORRUPT", "SQLITE_ERROR"}
BEGIN_ANEW = "Put back a copy of it; if there is none, begin anew: with --fresh, which moves this folder aside, or with another --name."


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Raises DiskError or ConfigError for what the disk or SQLite refuses inside, where `path`, a file of a sweep folder, is read or written."""
    try:
        yield
    except (OSError, sqlite3.Error, SQLAlchemyError, StorageInternalError) as err:
        reason, resume = _reason(err), resume_command(path.parent)
        if reason in _FULL:
            raise DiskError(
                f"{path}: must have room to grow, but the disk is full. Free space, then: {resume}"
            ) from err
        if reason in _NOT_WRITABLE:
            text = in_words(err)
            raise DiskError(f"{path}: must be writable, but is not ({text}). Make it so, then: {resume}") from err
        if reason in _DAMAGED:
            raise damaged(path, in_words(err)) from err
        if isinstance(err, OSError):
            raise
        raise DiskError(f"{path}: cannot be used now ({in_words(err)}). Then: {resume}") from err


def damaged(path: Path, found: str) -> ConfigError:
    """Returns what to say of a study that SQLite cannot read."""
    return ConfigError(
        f"{path}: must be the study of this sweep, but is damaged ({' '.join(found.split())}). {BEGIN_ANEW}"
    )


def _reason(err: BaseException) -> int | str | None:
    """Returns the number of a system error, or the primary name of SQLite's, such as SQLITE_IOERR: Optuna and SQLAlchemy wrap it."""
    found: BaseException | None = err
    while found is not None and not isinstance(found, OSError | sqlite3.Error):
        found = getattr(found, "orig", None) or found.__cause__ or found.__context__
    if isinstance(found, OSError):
        return found.errno
    name = getattr(found, "sqlite_errorname", "")
    return "_".join(name.split("_")[:2])
