"""A trial as Ray Tune sees it: a class trainable that owns one Ray Train run and takes it down cleanly.

It carries no results: the run's records lie in its folder, where the driver reads them. `step` only beats, so that Tune
can stop the trial at any time; `cleanup` aborts the run's controller, so that no placement group or worker is left.
"""

import traceback
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.train.v2._internal.execution.callback import ControllerCallback

from cps_ray.config.reader import load_train
from cps_ray.on_ray.trainer import make_trainer, reason
from cps_ray.runs import CONFIG_FILE, ERROR_FILE

_BEAT_S = 0.5
_ABORT_S = 9
"""How long an abort is waited for: at the end of a session Tune gives `cleanup` about 15 s in all."""
FAILURE = "failure"
"""Key of a last result: why the training failed, in one line."""
COLLAPSED = "collapsed"
"""Key of a last result with FAILURE: whether the training collapsed or diverged, which another try would only repeat; else it crashed."""


class _AnnounceController(ControllerCallback):  # type: ignore[misc]
    """Runs in the controller of the Train run, and gives the trial a handle to abort it by. Ray Train has no public one."""

    def __init__(self, trial: Any) -> None:
        self._trial = trial

    def after_controller_start(self, train_run_context: Any) -> None:
        self._trial.attach.remote(ray.get_runtime_context().current_actor)


class TuneTrial(tune.Trainable):  # type: ignore[misc]
    """Trains the config in `config["folder"]/config.yaml`, continuing from that folder's latest checkpoint; keeps the best by
    `config["metric"]`."""

    def setup(self, config: dict[str, Any], sweep: str = "", retries: int = 1) -> None:
        self._folder, self._metric = Path(config["folder"]), config["metric"]
        self._sweep, self._retries = sweep, retries
        self._run: Future[Any] | None = None
        self._controller: Any = None
        self._aborted = False

    def attach(self, controller: Any) -> None:
        """Takes the handle of the run's controller; called by the controller."""
        self._controller = controller

    def step(self) -> dict[str, Any]:
        """Returns within half a second; the last result has `done`, and FAILURE and COLLAPSED if the training failed."""
        if self._run is None:
            me = ray.get_runtime_context().current_actor
            # In a thread: Tune calls `step` again only when it has returned, and stops a trial only between two calls.
            pool = ThreadPoolExecutor(1, thread_name_prefix="fit")
            self._run = pool.submit(self._fit, [_AnnounceController(me)])
        wait([self._run], timeout=_BEAT_S)
        if not self._run.done():
            return {"beat": 1}
        return {"done": True, **self._run.result()}

    def _fit(self, callbacks: list[Any]) -> dict[str, Any]:
        """Trains. Returns FAILURE and COLLAPSED, and writes all about it to error.txt; nothing if nothing went wrong."""
        error_file = self._folder / ERROR_FILE
        error_file.unlink(missing_ok=True)  # of an earlier try
        try:
            config = load_train(self._folder / CONFIG_FILE)
            trainer = make_trainer(
                config,
                self._folder,
                sweep=self._sweep,
                metric=self._metric,
                retries=self._retries,
                callbacks=callbacks,
            )
            outcome = trainer.fit().return_value
            diverged: str | None = outcome.get("diverged") if outcome else None
            if diverged:
                error_file.write_text(f"{diverged}\n")
            return {FAILURE: diverged, COLLAPSED: True} if diverged else {}
        except Exception as err:  # whatever it was, it is this trial's failure, not the sweep's
            if self._aborted:
                return {}  # `cleanup` has ended the run, and this is how `fit` learns of it
            error_file.write_text(traceback.format_exc())
            return {FAILURE: reason(err), COLLAPSED: False}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Saves nothing: the Train run keeps its own."""
        return {}

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Loads nothing: the Train run finds its own."""

    def cleanup(self) -> None:
        """Aborts the run. Tune waits for this when it stops a trial."""
        if self._run is None or self._run.done() or self._controller is None:
            return
        self._aborted = True
        try:
            ray.get(self._controller.abort.remote(), timeout=_ABORT_S)
        except ray.exceptions.RayActorError:
            pass  # abort ends the actor: expected
        except ray.exceptions.GetTimeoutError:
            # Its placement group goes with it; the checkpoint that it was about to keep is the one that a resume has to do without.
            ray.kill(self._controller)
