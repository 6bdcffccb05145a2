"""What an upgrade of Ray has taken away from us, by name: see cps_ray/on_ray/ray_internals.py and the settings that are read by Ray alone."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest
import ray
from ray._private import worker
from ray.data import DataContext
from ray.train.v2._internal import constants
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import TrainController, state
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.tune.execution.tune_controller import TuneController

from cps_ray.on_ray.cluster import WORKER_ENV
from cps_ray.on_ray.ray_internals import ControllerWatch, paced, shorten_messages
from cps_ray.search import tune_session

HELP = f"Ray {ray.__version__} has changed what cps_ray/on_ray/ray_internals.py uses"


def test_the_controllers_hooks_are_called_as_we_define_them() -> None:
    for hook in ("after_controller_start", "after_controller_state_update"):
        theirs, ours = (inspect.signature(getattr(cls, hook, None)) for cls in (ControllerCallback, ControllerWatch))
        assert list(theirs.parameters) == list(ours.parameters), f"{HELP}: ControllerCallback.{hook}"
    source = inspect.getsource(TrainController)
    for hook in ("after_controller_start", "after_controller_state_update"):
        assert f'"{hook}"' in source, f"{HELP}: TrainController no longer calls {hook}"
    assert inspect.iscoroutinefunction(TrainController.abort), f"{HELP}: TrainController.abort"


@pytest.mark.parametrize("name", ["RestartingState", "ReschedulingState"])
def test_workers_that_are_started_again_say_why(name: str) -> None:
    heard: list[tuple[str, bool]] = []
    watch = ControllerWatch(lambda _: None, lambda error, is_waiting: heard.append((str(error), is_waiting)))
    restarting = getattr(state, name)
    watch.after_controller_state_update(None, restarting(WorkerGroupError("boom", {})))
    watch.after_controller_state_update(None, restarting(ControllerError(WorkerGroupStartupTimeoutError(1))))
    watch.after_controller_state_update(None, state.RunningState())
    watch.after_controller_state_update(None, state.ErroredState(WorkerGroupError("the end", {})))
    assert [is_waiting for _, is_waiting in heard] == [False, True], HELP
    assert "boom" in heard[0][0]


def test_ray_data_takes_a_callback_that_slows_it_down() -> None:
    assert hasattr(DataContext(), "custom_execution_callback_classes"), HELP
    base = paced(0.0).__mro__[1]
    assert hasattr(base, "on_execution_step"), f"{HELP}: {base.__name__}.on_execution_step"


@pytest.mark.parametrize("name", [*WORKER_ENV, *tune_session._TUNE_ENV])
def test_settings_that_ray_reads_from_the_environment_are_still_read(name: str) -> None:
    train = {value for value in vars(constants).values() if isinstance(value, str)}
    if name in train:
        return
    folder = Path(ray.__file__).parent
    modules = ("tune/constants.py", "tune/tune.py", "tune/utils/callback.py", "tune/execution/tune_controller.py")
    places = (
        *modules,
        "data/context.py",
        "train/constants.py",
        "tune/execution/placement_groups.py",
        "tune/experimental/output.py",
    )
    for place in places:
        if (folder / place).exists() and name in (folder / place).read_text():
            return
    pytest.fail(f"{HELP}: nothing reads {name}")


def test_tune_keeps_a_trials_process_for_the_next_trial() -> None:
    assert "reuse_actors" in inspect.signature(TuneController).parameters, HELP
    assert import_module("ray.tune").Trainable.reset_config, HELP


def test_of_rays_messages_to_the_driver_the_first_line_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "print_to_stdstream(" in inspect.getsource(worker.listen_error_messages), HELP
    for _ in range(2):  # by the second connection, too
        shorten_messages()
    worker.print_to_stdstream(
        {"lines": ["a node was lost\nits log\nand more"], "pid": "raylet", "is_err": False}, False
    )
    printed = capsys.readouterr().out
    assert "a node was lost" in printed
    assert "its log" not in printed
