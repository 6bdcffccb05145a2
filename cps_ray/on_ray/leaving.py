"""Leaving in time when the process is told to end, whatever Ray is doing."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PATIENCE_S = 7.0
"""How long an orderly end may take. Slurm, Kubernetes and closing terminals send SIGTERM to every process at once: then Ray's have ended
before ours, which would wait for them for a minute and die."""


def leave_in_time(code: int, say: Callable[[], None]) -> None:
    """Ends this process and all that it has started with this exit code if it is still there in `PATIENCE_S` seconds, after `say`."""
    timer = threading.Timer(PATIENCE_S, _leave, (code, say))
    timer.daemon = True
    timer.start()


def _leave(code: int, say: Callable[[], None]) -> None:
    try:
        with suppress(Exception):  # what cannot be said now must not keep us
            say()
        for pid in _descendants(os.getpid()):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    finally:
        os._exit(code)


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *_descendants(child)]
    return found
