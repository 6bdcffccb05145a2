"""One training as a Ray Train run, and where its checkpoints are."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cps_ray.config.train import TrainConfig
from cps_ray.engine.state import META_FILE, STATE_FILE
from cps_ray.engine.telemetry import Metrics
from cps_ray.errors import CpsRayError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
ERROR_FILE = "error.txt"


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What travels to every worker: plain values only."""

    train: dict[str, Any]
    """`TrainConfig.dump()`, paths absolute."""
    run_dir: str
    """Where rank 0 writes its records; on storage that the driver sees."""
    sweep: str
    """Name for the metrics' tags."""

    def plain(self) -> dict[str, Any]:
        """As `train_loop_config`."""
        return asdict(self)


def train_loop(settings: dict[str, Any]) -> dict[str, str]:
    """Entry of each worker. Continues from the run's latest checkpoint, if there is one.

    Returns {"diverged": why} when the loss was not finite: trying again would only find the same, so it is no crash.
    """
    # Not above: a trial and the run's controller read this module as well, and would load what only workers need.
    from cps_ray.on_ray.worker import work

    return work(WorkerSettings(**settings))


@dataclass(frozen=True, slots=True)
class Objective:
    """Which metric ranks a run's checkpoints."""

    metric: str = "val/miou"
    mode: Literal["max", "min"] = "max"

    def best(self, values: Sequence[float]) -> float:
        return max(values) if self.mode == "max" else min(values)


def make_trainer(
    config: TrainConfig,
    run_dir: Path,
    *,
    sweep: str = "",
    objective: Objective | None = None,
    retries: int = 3,
    callbacks: Sequence[Any] = (),
) -> Any:
    """A TorchTrainer whose checkpoints and records lie in `run_dir`; it goes on from there if it is not empty.

    It keeps the best checkpoint and the latest. A crash or a lost node restarts the workers up to `retries` times.
    """
    from ray import train
    from ray.train.torch import TorchTrainer

    objective = objective or Objective()
    resources = config.resources
    run_dir = run_dir.absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    return TorchTrainer(
        train_loop,
        train_loop_config=WorkerSettings(config.dump(), str(run_dir), sweep).plain(),
        scaling_config=train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=_bundle(config),
        ),
        run_config=train.RunConfig(
            name=run_dir.name,
            storage_path=str(run_dir.parent),
            callbacks=list(callbacks),
            # Without a limit a run that can never start retries for ever.
            failure_config=train.FailureConfig(max_failures=retries, controller_failure_limit=3),
            checkpoint_config=train.CheckpointConfig(
                num_to_keep=1,
                checkpoint_score_attribute=objective.metric,
                checkpoint_score_order=objective.mode,
            ),
        ),
    )


def _bundle(config: TrainConfig) -> dict[str, float]:
    resources = config.resources
    gpus = {"GPU": resources.gpus_per_worker} if resources.gpus_per_worker > 0 else {}
    return {"CPU": resources.cpus_per_worker, **gpus}


def read_metrics(path: Path) -> list[Metrics]:
    """The records of a run so far, one per evaluation; a line cut short by a crash is left out."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def checkpoints(run_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, meta) of every whole checkpoint of a run, by step. `meta` has `step` and `metrics`."""
    found = []
    for path in run_dir.glob(f"checkpoint_*/{META_FILE}"):
        try:
            meta = json.loads(path.read_text())
            whole = (path.parent / STATE_FILE).stat().st_size == meta["bytes"]
        except (OSError, ValueError):
            continue  # an upload that a crash has cut short
        if whole:
            found.append((path.parent, meta))
    return sorted(found, key=lambda entry: entry[1]["step"])


def drop_checkpoints(run_dir: Path) -> None:
    """Frees the disk of a run that nobody will go on with."""
    for path in run_dir.glob("checkpoint_*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def best_checkpoint(run_dir: Path, objective: Objective) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint with the best value of the objective, the earlier one at a tie; None if there is none."""
    found = checkpoints(run_dir)
    sign = 1.0 if objective.mode == "max" else -1.0
    return max(found, key=lambda entry: sign * entry[1]["metrics"][objective.metric], default=None)


def reason(err: BaseException) -> str:
    """One line: the worker's own exception, dug out of Ray's wrappers."""
    failures: dict[int, BaseException] = getattr(err, "worker_failures", None) or {}  # of a TrainingFailedError
    err = next(iter(failures.values()), err)
    cause = getattr(err, "cause", None)
    if isinstance(cause, BaseException):
        return reason(cause)
    lines = [line.strip() for line in str(err).splitlines() if line.strip()] or [""]
    # The last line of a remote traceback is the exception itself.
    text = lines[-1] if "Traceback" in str(err) else lines[0]
    return text if isinstance(err, CpsRayError) else f"{type(err).__name__}: {text}"
