"""What we use of Ray that it does not promise to keep: all of it is here, and tests/on_ray/test_ray_internals.py says what an upgrade has broken."""

import time
from collections.abc import Callable
from typing import Any

from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback

OnController = Callable[[Any], None]
OnFailure = Callable[[BaseException, bool], None]


class ControllerWatch(ControllerCallback):  # type: ignore[misc]
    """Runs in the controller of a Ray Train run. Ray Train has no public way to end a run from outside, nor to hear of workers that it
    replaces."""

    def __init__(self, on_start: OnController, on_failure: OnFailure) -> None:
        """`on_start` takes the controller's handle, which `abort` ends. `on_failure` takes the error for which workers are started again,
        and whether they only could not be placed yet."""
        self._on_start, self._on_failure = on_start, on_failure

    def after_controller_start(self, train_run_context: Any) -> None:
        """Hands the controller over."""
        import ray

        self._on_start(ray.get_runtime_context().current_actor)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Passes on the error of states that have one: the workers are then started again."""
        error = getattr(current_state, "training_failed_error", None)
        if error is not None and not current_state.is_terminal():
            cause = getattr(error, "controller_failure", error)
            self._on_failure(error, isinstance(cause, WorkerGroupStartupTimeoutError))


def shorten_messages() -> None:
    """Lets Ray print the first line alone of what it has to say to the driver: of a node that was lost, it would print the node's log."""
    from ray._private import worker

    def first_lines(data: dict[str, Any], ignore_prefix: bool) -> None:
        print_all({**data, "lines": [text.split("\n", 1)[0] for text in data["lines"]]}, ignore_prefix)

    print_all = getattr(worker.print_to_stdstream, "all_of_it", worker.print_to_stdstream)
    first_lines.all_of_it = print_all  # type: ignore[attr-defined]
    worker.print_to_stdstream = first_lines


def paced(round_s: float) -> type:
    """Returns a callback for Ray Data's executions: the scheduling loop then waits so many seconds in each round.

    It does not wait by itself while it is held back: it spins, and takes a core and this process's interpreter lock from the training
    (measured on 2 cores: a third of the speed).
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pace(ExecutionCallback):  # type: ignore[misc]
        def on_execution_step(self, executor: object) -> None:
            time.sleep(round_s)

    return Pace
