"""Work that is cut into jobs, spread over the CPUs of a cluster."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from cps_ray.errors import ResourceError
from cps_ray.text import first_line

J = TypeVar("J")
R = TypeVar("R")

_QUEUED = 2
"""Jobs handed out per CPU: enough that none waits for the driver, few enough to stop soon."""


def on_cluster(run: Callable[[J], R], jobs: Sequence[J]) -> Iterator[R]:
    """Runs every job on one CPU somewhere in the connected cluster, and yields the results as they come.

    A job whose node dies is run again elsewhere, so `run` must stand being repeated; an exception of a job is raised here,
    ResourceError where the cluster gave up on one. Jobs read and write files under the paths they name, which every node
    must see.
    """
    import ray

    task: Any = ray.remote(num_cpus=1)(run)
    limit = max(1, int(_QUEUED * ray.cluster_resources().get("CPU", 1)))
    waiting: list[Any] = []
    rest = iter(jobs)
    try:
        while True:
            for job in rest:  # an iterator: each round goes on where the last one stopped
                waiting.append(task.remote(job))
                if len(waiting) >= limit:
                    break
            if not waiting:
                return
            done, waiting = ray.wait(waiting, num_returns=1)
            for reference in done:
                try:
                    yield ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error  # the job's own exception; Ray's wrapper has where it was raised
                except ray.exceptions.RayError as error:
                    raise ResourceError(
                        f"a task was lost ({first_line(error)}); what was done is kept, run the same again."
                    ) from None
    finally:
        # Also where the caller stops early or a job has failed: the rest would go on for minutes.
        for reference in waiting:
            ray.cancel(reference)
