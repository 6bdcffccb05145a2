"""One Ray Tune session: runs the trainings it is handed, some at once, and passes on their news.

Tune places, watches, restarts and stops trials. What to train, what to make of the reports and what is on record are the
`Work`'s business; nothing of Tune's own state is ever needed again.
"""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.engine.telemetry import Metrics
from cps_ray.on_ray.trainer import CONFIG_FILE, METRICS_FILE, Objective, read_metrics
from cps_ray.search.trainable import FAILURE, Trial

_DRIVER_BYTES = 256 * 2**20
"""A trial itself holds memory only: CPUs would be booked twice, as its workers have their own placement group."""


@dataclass(frozen=True, slots=True)
class Job:
    """One training to run."""

    name: str
    folder: Path
    config: TrainConfig


class Work(Protocol):
    """Where trainings come from, and who hears of them. Called from one thread."""

    def next(self) -> Job | None:
        """The next training; None: there is no more."""

    def report(self, job: Job, metrics: Metrics) -> bool:
        """One evaluation; False stops the training."""

    def finish(self, job: Job, failure: str | None) -> None:
        """The training has ended: finished, stopped by `report`, or failed."""


class Session:
    """Runs `work` to its end, or to `stop`."""

    def __init__(
        self, work: Work, folder: Path, *, sweep: str, at_once: int, objective: Objective, retries: int
    ) -> None:
        """`folder`: for Ray's own files, safe to delete afterwards."""
        self._work = work
        self._folder = folder
        self._sweep, self._at_once, self._objective, self._retries = sweep, at_once, objective, retries
        self._jobs: dict[str, Job] = {}
        self._heard: dict[str, int] = {}
        self._stopped: set[str] = set()
        self._error: BaseException | None = None
        self.stopping = False

    def stop(self) -> None:
        """Ends the session soon: no new trainings, and the running ones are taken down, resumable."""
        self.stopping = True

    def run(self, tick: Any) -> None:
        """Blocks until the session has ended; calls `tick()` a few times a second, in this thread.

        Tune runs in a thread of its own, so that signals and the display stay ours.
        """
        thread = threading.Thread(target=self._fit, name="tune", daemon=True)
        thread.start()
        while thread.is_alive():
            tick()
            thread.join(0.2)
        tick()
        if self._error is not None:
            raise self._error

    def _fit(self) -> None:
        try:
            trial = tune.with_parameters(Trial, sweep=self._sweep, objective=self._objective, retries=self._retries)
            tuner = tune.Tuner(
                tune.with_resources(trial, tune.PlacementGroupFactory([{"memory": _DRIVER_BYTES}])),
                tune_config=tune.TuneConfig(
                    num_samples=-1,
                    max_concurrent_trials=self._at_once,
                    search_alg=_Suggest(self),
                    scheduler=_Listen(self),
                    trial_name_creator=_name,
                    trial_dirname_creator=_name,
                ),
                run_config=tune.RunConfig(
                    # The trainable's registered name is the cluster's, so two sweeps must differ in it.
                    name=f"{self._sweep}-{time.strftime('%Y%m%d-%H%M%S')}",
                    storage_path=str(self._folder.absolute()),
                    verbose=0,
                    stop=_Stop(self),
                    failure_config=tune.FailureConfig(max_failures=self._retries),
                ),
            )
            tuner.fit()
        except BaseException as err:  # carried to the thread that waits in `run`
            self._error = err

    # What the adapters below call, all in Tune's thread.

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        job = None if self.stopping else self._work.next()
        if job is None:
            return None
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / CONFIG_FILE).write_text(
            dump_yaml(job.config.dump(str(job.folder)), f"Training {job.name} of {self._sweep}.")
        )
        self._jobs[trial_id] = job
        return {"folder": str(job.folder)}

    def listen(self, trial_id: str) -> bool:
        """Passes on what the run has recorded since; False: stop it."""
        if trial_id in self._stopped:
            return False
        job = self._jobs[trial_id]
        for metrics in read_metrics(job.folder / METRICS_FILE):
            if metrics["step"] <= self._heard.get(trial_id, 0):
                continue
            self._heard[trial_id] = metrics["step"]
            if not self._work.report(job, metrics):
                self._stopped.add(trial_id)
                return False
        return True

    def ended(self, trial_id: str, result: dict[str, Any] | None, *, error: bool) -> None:
        self.listen(trial_id)
        failure = "the process that ran the trial died" if error else (result or {}).get(FAILURE)
        self._work.finish(self._jobs.pop(trial_id), failure)


def _name(trial: Any) -> str:
    """0007, in Tune's words as in ours."""
    return Path(trial.config["folder"]).name


class _Unsaved:
    """Tune pickles what it is given into its own files; those are never read again, so nothing goes in."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Suggest(_Unsaved, Searcher):  # type: ignore[misc]
    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def suggest(self, trial_id: str) -> Any:
        return self._session.suggest(trial_id) or Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._session.ended(trial_id, result, error=error)

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()  # The study is the state.

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("A sweep resumes from its study, never from Tune's files.")


class _Listen(_Unsaved, FIFOScheduler):  # type: ignore[misc]
    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        goes_on = self._session.listen(trial.trial_id)
        decision: str = TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP
        return decision


class _Stop(_Unsaved, Stopper):  # type: ignore[misc]
    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._session.stopping
