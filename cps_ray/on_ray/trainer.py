"""One training as a Ray Train run in its folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cps_ray.config.train import ResourcesConfig, TrainConfig
from cps_ray.errors import CpsRayError

DEFAULT_METRIC = "val/miou"
"""Metric by which a training that is no trial keeps its best checkpoint."""


def train_loop(settings: dict[str, Any]) -> dict[str, str]:
    """Runs in each worker. Continues from the run's latest checkpoint, if there is one.

    Returns {"diverged": why} when the loss was not finite or the networks collapsed: trying again would only find the same, so it is no
    crash.
    """
    # Not above: a trial and the run's controller load this module as well, and would load what only workers need (albumentations,
    # the loader: more than a second of CPU each).
    from cps_ray.on_ray.worker import work

    return work(**settings)


def make_trainer(
    config: TrainConfig,
    run_dir: Path,
    *,
    sweep: str = "",
    metric: str = DEFAULT_METRIC,
    retries: int = 3,
    callbacks: Sequence[Any] = (),
) -> Any:
    """A TorchTrainer whose checkpoints and records lie in `run_dir`; it continues from there if it is not empty.

    It keeps the checkpoint with the highest `metric` and the latest. A crash or a lost node restarts the workers up to `retries` times.
    `sweep` is the tag of the training's metrics.
    """
    from ray import train
    from ray.train.torch import TorchTrainer

    resources = config.resources
    run_dir = run_dir.absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    return TorchTrainer(
        train_loop,
        # Plain values only: a worker parses the config again, so both sides need not agree on classes.
        train_loop_config={"train": config.dump(), "run_dir": str(run_dir), "sweep": sweep},
        scaling_config=train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=_bundle(resources),
        ),
        run_config=train.RunConfig(
            # Ray Train resumes by itself where a run of this name lies in this folder.
            name=run_dir.name,
            storage_path=str(run_dir.parent),
            callbacks=list(callbacks),
            # Without a limit for the controller, a run that can never start retries for ever.
            failure_config=train.FailureConfig(max_failures=retries, controller_failure_limit=3),
            checkpoint_config=train.CheckpointConfig(
                num_to_keep=1,  # beside it Ray always keeps the latest
                checkpoint_score_attribute=metric,
                checkpoint_score_order="max",
            ),
        ),
    )


def _bundle(resources: ResourcesConfig) -> dict[str, float]:
    gpus = {"GPU": resources.gpus_per_worker} if resources.gpus_per_worker > 0 else {}
    return {"CPU": resources.cpus_per_worker, **gpus}


def reason(err: BaseException) -> str:
    """Returns one line: the worker's own exception, taken out of Ray's wrappers."""
    failures: dict[int, BaseException] = getattr(err, "worker_failures", None) or {}  # of a TrainingFailedError
    err = next(iter(failures.values()), err)
    cause = getattr(err, "cause", None)
    if isinstance(cause, BaseException):
        return reason(cause)
    lines = [line.strip() for line in str(err).splitlines() if line.strip()] or [""]
    # The last line of a remote traceback is the exception itself.
    text = lines[-1] if "Traceback" in str(err) else lines[0]
    return text if isinstance(err, CpsRayError) else f"{type(err).__name__}: {text}"
