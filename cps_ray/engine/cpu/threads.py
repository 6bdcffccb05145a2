"""How a training uses the threads and the memory of a CPU."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_LARGEST_INT = 2**31 - 1


def tune_cpu(threads: int) -> None:
    """Sets the threads of this process's operations, and lets it keep freed memory for the next step.

    glibc maps every large tensor anew and unmaps it when it is freed; a step then spends a fifth of its time on page faults
    (docs/step.md). Without glibc only the threads are set.
    """
    torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # no block comes from mmap, however large ...
        mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)  # ... and none at the heap's end goes back to the system


def release_memory() -> None:
    """Gives freed memory back to the system, and begins anew to measure the most that the process holds (`ru_maxrss`)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def held_bytes() -> int:
    """Bytes of memory that this process holds."""
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE")
