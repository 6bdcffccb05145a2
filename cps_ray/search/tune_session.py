"""One Ray Tune session: runs the trainings that a phase hands out, some at once, and passes on what they report.

Tune starts, watches, restarts and stops trials; worker groups train. What to train, what to make of the reports and what is on record are the
`Phase`'s business; nothing of Tune's own state is ever needed again.
"""

import logging
import math
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from cps_ray.config.space import apply
from cps_ray.config.sweep import FailuresConfig
from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.engine.telemetry import Metrics
from cps_ray.errors import ConfigError, DiskError
from cps_ray.files import write_text
from cps_ray.on_ray.failures import COLLAPSED, CRASHED, DISK_FULL, OUT_OF_MEMORY
from cps_ray.on_ray.trainer import DEFAULT_METRIC
from cps_ray.on_ray.worker_groups import GroupShape, Training
from cps_ray.runs import CONFIG_FILE, ERROR_FILE, RecordReader
from cps_ray.search.tune_trial import TuneTrial

_TICK_S = 0.2
_MOST_RESTARTS = 10
_TUNE_ENV = {
    # Processes of trials that begin together start together.
    "TUNE_MAX_PENDING_TRIALS_PG": "16",
    # Tune would write the states of all trials again and again, for a restore that never comes.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    # A traceback of Ray's for each process of a trial that died: we say it in a line.
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


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

    def halve(self, job: TrainingJob) -> None:
        """Takes note that a training is begun again as this job, with more micro-batches a step: its memory was too small."""

    def tell(self, job: TrainingJob, failure: str | None, *, collapsed: bool) -> None:
        """Takes the end of a training: finished or stopped by `report`, or failed: by itself (`collapsed`), or by a crash."""


class TuneSession:
    """Runs a phase to its end, or to `stop`."""

    def __init__(
        self,
        phase: Phase,
        folder: Path,
        pool: Any,
        *,
        sweep: str,
        at_once: Callable[[], int],
        failures: FailuresConfig,
        resume: str,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`folder`: for Ray's own files, gone afterwards. `pool`: the actor of `WorkerGroups`. `at_once`: how many trainings the cluster
        holds at this moment. `resume`: the command that goes on later. `say` takes a line about what is waited for or tried again."""
        self._phase = phase
        self._folder = folder
        self._pool = pool
        self._sweep, self._at_once, self._failures, self._resume, self._say = sweep, at_once, failures, resume, say
        self._jobs: dict[str, TrainingJob] = {}
        self._again: deque[TrainingJob] = deque()
        self._records: dict[str, RecordReader] = {}
        self._last_step: dict[str, int] = {}
        self._stopped: set[str] = set()
        self._said = ""
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
        # The trainable's registered name is the cluster's, so two sweeps must differ in it.
        name = f"{self._sweep}-{time.strftime('%Y%m%d-%H%M%S')}"
        for variable, value in _TUNE_ENV.items():
            os.environ.setdefault(variable, value)
        # Of Tune's own state, which nobody reads: on a full disk its traceback would come before our line.
        logging.getLogger("ray.tune.execution.experiment_state").setLevel(logging.CRITICAL)
        trainable = tune.with_parameters(TuneTrial, pool=self._pool)
        trainable.__qualname__ = TuneTrial.__name__  # what the dashboard and process titles show
        try:
            tuner = tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    num_samples=-1,  # until the searcher has no more
                    search_alg=_PhaseSearcher(self),
                    scheduler=_ReportingScheduler(self),
                    reuse_actors=True,
                    trial_name_creator=_name,
                    trial_dirname_creator=_name,
                ),
                run_config=tune.RunConfig(
                    name=name,
                    storage_path=str(self._folder.absolute()),
                    verbose=0,
                    stop=_SessionStopper(self),
                    callbacks=[_Recoveries(self)],
                    # Restarts of the trial's own process, which does not train: nothing is lost with it.
                    failure_config=tune.FailureConfig(max_failures=_MOST_RESTARTS),
                ),
            )
            tuner.fit()
        except BaseException as err:  # carried to the thread that waits in `run`
            if self._error is None:
                self._error = err
        finally:
            shutil.rmtree(self._folder / name, ignore_errors=True)

    # What the adapters below call, all in Tune's thread: so a phase needs no locks.

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Begins the next training: its config for Tune names the folder that holds its real one. None: there is no more, {}: not now."""
        with self._carried():
            return self._suggest(trial_id)
        return None

    @contextmanager
    def _carried(self) -> Iterator[None]:
        """Carries an exception to `run`, and ends the session: Tune would wrap it into text, or go on with other trials."""
        try:
            yield
        except Exception as err:
            self._error, self.stopping = self._error or err, True

    def _suggest(self, trial_id: str) -> dict[str, Any] | None:
        if self.stopping:
            return None
        if len(self._jobs) >= self._at_once():
            return {}
        job = self._again.popleft() if self._again else self._phase.ask()
        if job is None:
            # A training that runs may have to begin once more, in smaller parts.
            return {} if self._jobs else None
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / ERROR_FILE).unlink(missing_ok=True)  # of an earlier try
            write_text(
                job.folder / CONFIG_FILE,
                dump_yaml(job.config.dump(str(job.folder)), f"Training {job.name} of {self._sweep}."),
            )
        except OSError as err:  # its folder may lie on another disk than the study
            raise DiskError(f"{job.folder}: cannot be written: {err}. Make it so, then: {self._resume}") from err
        self._jobs[trial_id] = job
        self._records[trial_id] = RecordReader(job.folder)
        limits = self._failures
        training = Training(
            str(job.folder),
            job.metric,
            job.config.sha256,
            GroupShape.of(job.config.resources),
            self._sweep,
            limits.retries,
            limits.first_report_timeout,
            limits.trial_timeout,
        )
        return {"training": training}

    def tell_recovery(self, trial_id: str) -> None:
        """Says that a trial's own process has died, and is started again."""
        self._say(
            f"{self._jobs[trial_id].name}: a process that looks after it died, and is started again: its training goes on"
        )

    def hear(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Takes a beat of a trial; False: stop it."""
        notice = result.get("notice")
        if notice and notice != self._said:  # several trials wait for the same
            self._said = notice
            self._say(notice)
        goes_on = False
        with self._carried():
            # A record is there before its checkpoint. Were the trial stopped by it, its workers would write into a folder that is tidied.
            goes_on = self.pass_on_reports(trial_id, result.get("reported", 0))
        if goes_on or self.stopping:  # at its end it is taken down, resumable
            return True
        self._pool.stop.remote(str(self._jobs[trial_id].folder))
        return False

    def pass_on_reports(self, trial_id: str, up_to: float = math.inf) -> bool:
        """Passes on what the run has recorded since the last call, up to step `up_to`; False: stop it."""
        if trial_id in self._stopped:
            return False  # its phase has already decided
        job = self._jobs[trial_id]
        for metrics in self._records[trial_id].read(up_to):
            if metrics["step"] <= self._last_step.get(trial_id, 0):
                continue
            self._last_step[trial_id] = metrics["step"]
            if not self._phase.report(job, metrics):
                self._stopped.add(trial_id)
                return False
        return True

    def end(self, trial_id: str, result: dict[str, Any] | None, *, error: bool) -> None:
        """Passes on the last reports, and how the training ended."""
        with self._carried():
            self._end(trial_id, result, error=error)

    def _end(self, trial_id: str, result: dict[str, Any] | None, *, error: bool) -> None:
        self.pass_on_reports(trial_id)
        job = self._jobs.pop(trial_id)
        self._records.pop(trial_id)
        self._last_step.pop(trial_id, None)
        self._stopped.discard(trial_id)
        last: dict[str, Any] = (
            {"failure": "the trial's process died again and again", "kind": CRASHED} if error else result or {}
        )
        failure, kind = last.get("failure"), last.get("kind")
        if kind == DISK_FULL:
            # Not the trial's fault, and the next one would meet it, too: it stays as it is, to be resumed.
            raise DiskError(
                f"{job.folder}: its workers cannot write there: {failure}. Free space, then: {self._resume}"
            )
        if failure is not None and not (job.folder / ERROR_FILE).exists():  # its workers could not say it
            with suppress(OSError):  # the study has it, too
                write_text(job.folder / ERROR_FILE, f"{failure}\n")
        smaller = halved(job) if kind == OUT_OF_MEMORY and self._failures.on_oom == "halve" else None
        if smaller is not None:
            self._say(f"{job.name}: {failure}. Once more with compute.accumulate {smaller.config.compute.accumulate}")
            self._phase.halve(smaller)
            self._again.append(smaller)
            return
        self._phase.tell(job, failure, collapsed=kind == COLLAPSED)


def halved(job: TrainingJob) -> TrainingJob | None:
    """Returns the training with half as many images in memory at once, at the same batch; None where they cannot be halved."""
    more = {"compute.accumulate": 2 * job.config.compute.accumulate}
    try:
        return replace(job, config=apply(job.config, more, f"training {job.name}"))
    except ConfigError:
        return None


def _name(trial: Any) -> str:
    """0007, in Tune's words as in ours."""
    return Path(trial.config["training"].folder).name


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
        found = self._session.suggest(trial_id)
        return Searcher.FINISHED if found is None else found or None

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
        goes_on = self._session.hear(trial.trial_id, result)
        decision: str = TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP
        return decision


class _Recoveries(_NotPickled, tune.Callback):  # type: ignore[misc]
    """Says what Tune recovers from."""

    def __init__(self, session: TuneSession) -> None:
        self._session = session

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._session.tell_recovery(trial.trial_id)


class _SessionStopper(_NotPickled, Stopper):  # type: ignore[misc]
    """Ends all trials at once when the session is to stop."""

    def __init__(self, session: TuneSession) -> None:
        self._session = session

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._session.stopping
