"""Leaving in time when the process is told to end, or its cluster is gone, whatever Ray is doing."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

PATIENCE_S = 7.0
"""How long an orderly end may take. Slurm, Kubernetes and closing terminals send SIGTERM to every process at once: then Ray's have ended
before ours, which would wait for them for a minute and die."""
HEAD_PATIENCE_S = 45.0
"""How long a cluster's head may be silent. A head that is started again with its state comes back within that; after 60 s Ray ends this process, and
says nothing that helps (`gcs_rpc_server_reconnect_timeout_s`)."""
_LOOK_S = 2.0


def leave_in_time(code: int, say: Callable[[], None]) -> None:
    """Ends this process and all that it has started with this exit code if it is still there in `PATIENCE_S` seconds, after `say`."""
    timer = threading.Timer(PATIENCE_S, _leave, (code, say))
    timer.daemon = True
    timer.start()


@contextmanager
def head_watched(say: Callable[[str], None]) -> Iterator[None]:
    """While inside, looks whether the head of the connected cluster answers. If it has not for `HEAD_PATIENCE_S`, ends this process with
    exit code 1, after `say` with what happened."""
    import ray

    ended = threading.Event()
    arguments = (ray.get_runtime_context().gcs_address, ended, say)
    threading.Thread(target=_watch_head, args=arguments, name="head", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _watch_head(address: str, ended: threading.Event, say: Callable[[str], None]) -> None:
    host, _, port = address.rpartition(":")
    answered = None  # where it never does, as behind a proxy, nothing is known
    while not ended.wait(_LOOK_S):
        try:
            socket.create_connection((host, int(port)), timeout=_LOOK_S).close()
            answered = time.monotonic()
        except OSError:
            if answered is not None and time.monotonic() - answered > HEAD_PATIENCE_S:
                _leave(
                    1,
                    partial(say, f"the head of the Ray cluster, {address}, has not answered for {HEAD_PATIENCE_S:g} s"),
                )


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
