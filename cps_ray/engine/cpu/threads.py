"""How a training uses the threads and the memory of a CPU."""

import ctypes

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
