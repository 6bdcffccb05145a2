"""How trainings fail on a cluster: in which way, and why in one line."""

import errno

from cps_ray.errors import CpsRayError

COLLAPSED, CRASHED, OUT_OF_MEMORY, DISK_FULL, TIMED_OUT = (
    "collapsed",
    "crashed",
    "out of memory",
    "disk full",
    "timed out",
)
"""Kinds of failures. A training is tried again only after a crash: the others would come again."""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_NO_MEMORY = ("can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says in errors of many types."""


def kind_of(err: Exception) -> str:
    """Returns the kind of an exception that has ended a training."""
    if isinstance(err, MemoryError) or any(text in str(err) for text in _NO_MEMORY):
        return OUT_OF_MEMORY
    return DISK_FULL if isinstance(err, OSError) and err.errno in _DISK_ERRORS else CRASHED


def reason(err: BaseException) -> str:
    """Returns one line: the worker's own exception, taken out of Ray's wrappers."""
    failures: dict[int, BaseException] = getattr(err, "worker_failures", None) or {}  # of a TrainingFailedError
    err = next(iter(failures.values()), getattr(err, "controller_failure", err))
    cause = getattr(err, "cause", None)
    if isinstance(cause, BaseException):
        return reason(cause)
    lines = [line.strip() for line in str(err).splitlines() if line.strip()] or [""]
    # The last line of a remote traceback is the exception itself.
    text = lines[-1] if "Traceback" in str(err) else lines[0]
    return text if isinstance(err, CpsRayError) else f"{type(err).__name__}: {text}"
