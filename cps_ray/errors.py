"""The exception tree. Imports the standard library only; every layer may raise these, only the commands catch them.

A message names where (file:line or path), what must hold, what was found and how to fix it. A command prints it on stderr
and exits with `exit_code`. Of any other exception it prints one line, too, with the place that `at` has noted.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_AT = "at "


class CpsRayError(Exception):
    """Base of everything that cps_ray raises on purpose."""

    exit_code = 1


class ConfigError(CpsRayError):
    """A setting, a flag or a file that a person wrote is wrong (exit 2). Raised before Ray starts."""

    exit_code = 2


class DataError(CpsRayError):
    """A data set, shard, image, mask, split or labelled subset is missing or wrong (exit 2)."""

    exit_code = 2


class CheckpointError(CpsRayError):
    """A weight file or checkpoint does not fit the network it is loaded into (exit 2)."""

    exit_code = 2


class NoTrialError(CpsRayError):
    """The sweep finished, but no trial completed (exit 3)."""

    exit_code = 3


class FailureLimitError(CpsRayError):
    """The sweep's `failures` limits stopped it (exit 4); what was finished is on disk."""

    exit_code = 4


class FinalRunError(CpsRayError):
    """A final run failed, so that nothing can be compared (exit 1). The search is complete; `resume` trains the rest."""


class ResourceError(CpsRayError):
    """The plan can never be scheduled on this cluster (exit 5)."""

    exit_code = 5


class DiskError(CpsRayError):
    """The sweep's folder cannot be written any more: a full disk, a read-only folder (exit 1). What has ended is kept; `resume` goes on."""


class DivergedError(CpsRayError):
    """Continuing a training is of no use (exit 1; in a sweep its trial has collapsed): its loss is not finite, or its networks have collapsed. The message names the step."""


@contextmanager
def at(where: object) -> Iterator[None]:
    """Notes on an exception that leaves the block which file or thing it was at."""
    try:
        yield
    except Exception as err:
        err.add_note(f"{_AT}{where}")
        raise


def place(err: BaseException) -> str:
    """Returns what `at` has noted, of several blocks the innermost one's; "" if nothing."""
    notes = getattr(err, "__notes__", ())
    return next((note.removeprefix(_AT) for note in notes if note.startswith(_AT)), "")
