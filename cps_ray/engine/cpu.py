"""How a CPU is used well by a training."""

import ctypes

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_MOST = 2**31 - 1


def tune_cpu(threads: int) -> None:
    """Threads of this process's operations, and memory that is kept for the next step instead of given back.

    glibc maps every large tensor anew and unmaps it when it is freed; a step then spends a fifth of its time on page faults
    (docs/step.md). Without glibc only the threads are set.
    """
    torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _MOST)
