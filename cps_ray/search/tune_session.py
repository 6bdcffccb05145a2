"""One Ray Tune session: runs the trainings that a phase hands out, some at once, and passes on what they report.

Tune places, watches, restarts and stops trials. What to train, what to make of the reports and what is on record are the
`Phase`'s business; nothing of Tune's own state is ever needed again.
"""

import threading
import time
from collections.abc import Callable
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
from cps_ray.on_ray.trainer import DEFAULT_METRIC
from cps_ray.runs import CONFIG_FILE, read_metrics
from cps_ray.search.tune_trial import COLLAPSED, FAILURE, TuneTrial

_DRIVER_BYTES = 256 * 2**20
"""A trial itself holds memory only: CPUs would be booked twice, as its workers have their own placement group."""
_TICK_S = 0.2


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """One training to run."""

    name: str
    folder: Path
    config: TrainConfig
    metric: str = DEFAULT_METRIC
    """Metric by which its best checkpoint is kept."""


class Phase(Protocol):
    """Where trainings come from, and who takes what they report. Called from one thread."""

    def ask(self) -> TrainingJob | None:
        """Returns the next training; None: there is no more."""

    def report(self, job: TrainingJob, metrics: Metrics) -> bool:
        """Takes one evaluation; False stops the training."""

    def tell(self, job: TrainingJob, failure: str | None, *, collapsed: bool) -> None:
        """Takes the end of a training: finished or stopped by `report`, or failed: by itself (`collapsed`), or by a crash."""


class TuneSession:
    """Runs a phase to its end, or to `stop`."""

    def __init__(self, phase: Phase, folder: Path, *, sweep: str, at_once: int, retries: int) -> None:
        """`folder`: for Ray's own files, safe to delete afterwards."""
        self._phase = phase
        self._folder = folder
        self._sweep, self._at_once, self._retries = sweep, at_once, retries
        self._jobs: dict[str, TrainingJob] = {}
        self._last_step: dict[str, int] = {}
        self._stopped: set[str] = set()
        self._error: BaseException | None = None
        self.stopping = False

    def stop(self) -> None:
        """Ends the session soon: no new trainings, and the running ones are taken down, resumable."""
        self.stopping = True

    def run(self, tick: Callable[[], None]) -> None:
        """Blocks until the session has ended; calls `tick()` a few times a second, in this thread.

        Tune runs in a thread of its own, so that signals and the display stay ours.
        """
        thread = threading.Thread(target=self._fit, name="tune", daemon=True)
        thread.start()
        while thread.is_alive():
            tick()
            # Not join() alone: Python runs signal handlers in the main thread only, and only when it comes back from a wait.
            thread.join(_TICK_S)
        tick()  # what ended between the last tick and the end of the thread
        if self._error is not None:
            raise self._error

    def _fit(self) -> None:
        try:
            trial = tune.with_parameters(TuneTrial, sweep=self._sweep, retries=self._retries)
            tuner = tune.Tuner(
                tune.with_resources(trial, tune.PlacementGroupFactory([{"memory": _DRIVER_BYTES}])),
                tune_config=tune.TuneConfig(
                    num_samples=-1,  # until the searcher has no more
                    max_concurrent_trials=self._at_once,
                    search_alg=_PhaseSearcher(self),
                    scheduler=_ReportingScheduler(self),
                    trial_name_creator=_name,
                    trial_dirname_creator=_name,
                ),
                run_config=tune.RunConfig(
                    # The trainable's registered name is the cluster's, so two sweeps must differ in it.
                    name=f"{self._sweep}-{time.strftime('%Y%m%d-%H%M%S')}",
                    storage_path=str(self._folder.absolute()),
                    verbose=0,
                    stop=_SessionStopper(self),
                    # Restarts of the trial's own process; the training in it has as many of its own.
                    failure_config=tune.FailureConfig(max_failures=self._retries),
                ),
            )
            tuner.fit()
        except BaseException as err:  # carried to the thread that waits in `run`
            self._error = err

    # What the adapters below call, all in Tune's thread: so a phase needs no locks.

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Begins the next training: its config for Tune names the folder that holds its real one. None: there is no more."""
        job = None if self.stopping else self._phase.ask()
        if job is None:
            return None
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / CONFIG_FILE).write_text(
            dump_yaml(job.config.dump(str(job.folder)), f"Training {job.name} of {self._sweep}.")
        )
        self._jobs[trial_id] = job
        return {"folder": str(job.folder), "metric": job.metric}

    def pass_on_reports(self, trial_id: str) -> bool:
        """Passes on what the run has recorded since the last call; False: stop it."""
        if trial_id in self._stopped:
            # It may have evaluated once more before Tune took it down; its phase has already decided.
            return False
        job = self._jobs[trial_id]
        for metrics in read_metrics(job.folder):
            if metrics["step"] <= self._last_step.get(trial_id, 0):
                continue
            self._last_step[trial_id] = metrics["step"]
            if not self._phase.report(job, metrics):
                self._stopped.add(trial_id)
                return False
        return True

    def end(self, trial_id: str, result: dict[str, Any] | None, *, error: bool) -> None:
        """Passes on the last reports, and how the training ended."""
        self.pass_on_reports(trial_id)
        last: dict[str, Any] = {FAILURE: "the process that ran the trial died"} if error else result or {}
        self._phase.tell(self._jobs.pop(trial_id), last.get(FAILURE), collapsed=last.get(COLLAPSED, False))


def _name(trial: Any) -> str:
    """0007, in Tune's words as in ours."""
    return Path(trial.config["folder"]).name


class _NotPickled:
    """Tune pickles what it is given into its own files; those are never read again, so nothing goes in."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _PhaseSearcher(_NotPickled, Searcher):  # type: ignore[misc]
    """Tune's source of trials. Not Ray's OptunaSearch: that one tells trials which were stopped early as COMPLETE, with the value they had by
    then, and so misleads the sampler.
    """

    def __init__(self, session: TuneSession) -> None:
        super().__init__()
        self._session = session

    def suggest(self, trial_id: str) -> Any:
        return self._session.suggest(trial_id) or Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._session.end(trial_id, result, error=error)

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()  # Tune wants a file there. The study is the state.

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("A sweep resumes from its study, never from Tune's files.")


class _ReportingScheduler(_NotPickled, FIFOScheduler):  # type: ignore[misc]
    """Stops trials as the phase says. A trial's beat comes as its result, and is the moment to look at its records."""

    def __init__(self, session: TuneSession) -> None:
        super().__init__()
        self._session = session

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        goes_on = self._session.pass_on_reports(trial.trial_id)
        decision: str = TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP
        return decision


class _SessionStopper(_NotPickled, Stopper):  # type: ignore[misc]
    """Ends all trials at once when the session is to stop."""

    def __init__(self, session: TuneSession) -> None:
        self._session = session

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._session.stopping
