"""Ray Train runs: one training in its folder, and a worker group that serves one training after the other."""

import asyncio
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cps_ray.config.train import TrainConfig
from cps_ray.on_ray.failures import reason
from cps_ray.on_ray.worker_groups import Group, GroupShape, WorkerGroups

DEFAULT_METRIC = "val/miou"
"""Metric by which a training that is no trial keeps its best checkpoint."""
_CLOSE_S = 4.0


def train_loop(settings: dict[str, Any]) -> dict[str, str]:
    """Runs in each worker. Continues from the folder's latest checkpoint, if there is one.

    Returns {"diverged": why} when the loss was not finite or the networks collapsed: trying again would only find the same, so it is no
    crash.
    """
    # Not above: the run's controller loads this module as well, and would load what only workers need (albumentations, the loader:
    # more than a second of CPU).
    from cps_ray.on_ray.worker import work

    return work(**settings)


def serve_loop(settings: dict[str, Any]) -> None:
    """Runs in each worker of a group: one training after the other, until there is none for a while."""
    from cps_ray.on_ray.worker import serve

    serve(**settings)


def make_trainer(
    config: TrainConfig, run_dir: Path, *, sweep: str = "", metric: str = DEFAULT_METRIC, retries: int = 3
) -> Any:
    """A TorchTrainer whose checkpoints and records lie in `run_dir`; it continues from there if it is not empty.

    It keeps the checkpoint with the highest `metric` and the latest. A crash or a lost node restarts the workers up to `retries` times.
    `sweep` is the tag of the training's metrics.
    """
    from cps_ray.on_ray.ray_internals import shorten_messages

    shorten_messages()
    run_dir = run_dir.absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    # Plain values only: a worker parses the config again, so both sides need not agree on classes.
    settings = {
        "train": config.dump(),
        "sha256": config.sha256,
        "run_dir": str(run_dir),
        "sweep": sweep,
        "metric": metric,
    }
    # Without a limit for the controller, a run that can never start retries for ever.
    return _trainer(train_loop, settings, GroupShape.of(config.resources), run_dir, retries, 3)


@contextmanager
def worker_groups(storage: Path) -> Iterator[Any]:
    """Gives the actor that hands out trainings, `WorkerGroups`; at the end all groups are gone. `storage`: for Ray's own files."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cps_ray.on_ray.ray_internals import shorten_messages

    shorten_messages()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # As actor of this process it ends with it, whatever happens, and its groups with it.
    pool = (
        ray.remote(_WorkerGroupsActor)
        .options(num_cpus=0, scheduling_strategy=here, max_restarts=-1)
        .remote(str(storage))
    )
    try:
        yield pool
    finally:
        close_groups(pool)
        shutil.rmtree(storage, ignore_errors=True)


def prepare_groups(pool: Any, config: TrainConfig, count: int) -> None:
    """Starts groups for `count` trainings like this one, which come in a moment."""
    pool.prepare.remote(GroupShape.of(config.resources), count)


def close_groups(pool: Any) -> None:
    """Ends all worker groups: what they take of the cluster is free then. Trainings that are wanted later start new ones."""
    import ray

    # Whoever has ended by now, the cluster itself perhaps, needs no closing.
    with suppress(ray.exceptions.RayError):
        ray.get(pool.close.remote(_CLOSE_S), timeout=2 * _CLOSE_S)


class _WorkerGroupsActor(WorkerGroups):
    def __init__(self, storage: str) -> None:
        import ray

        self._pool = ray.get_runtime_context().current_actor
        self._storage = Path(storage)
        super().__init__(self._start_group)

    def _start_group(self, group: Group) -> None:
        from cps_ray.on_ray.ray_internals import ControllerWatch

        pool, name, loop = self._pool, group.name, asyncio.get_running_loop()
        watch = ControllerWatch(
            lambda controller: pool.controller_started.remote(name, controller),
            lambda error, is_waiting: pool.group_failed.remote(name, reason(error), is_waiting=is_waiting),
        )
        trainer = _trainer(
            serve_loop, {"pool": pool, "group": name}, group.shape, self._storage / name, -1, -1, [watch]
        )

        def fit() -> None:
            failure: str | None = None
            try:
                trainer.fit()
            except BaseException as err:  # whatever it was, it is this group's end
                failure = reason(err)
            loop.call_soon_threadsafe(self.group_ended, group, failure)

        threading.Thread(target=fit, name=name, daemon=True).start()


def _trainer(
    loop: Any,
    settings: dict[str, Any],
    shape: GroupShape,
    folder: Path,
    retries: int,
    starts: int,
    callbacks: Sequence[Any] = (),
) -> Any:
    from ray import train
    from ray.train.torch import TorchTrainer

    gpus = {"GPU": shape.gpus} if shape.gpus > 0 else {}
    return TorchTrainer(
        loop,
        train_loop_config=settings,
        scaling_config=train.ScalingConfig(
            num_workers=shape.workers, use_gpu=shape.gpus > 0, resources_per_worker={"CPU": shape.cpus, **gpus}
        ),
        run_config=train.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            callbacks=list(callbacks),
            failure_config=train.FailureConfig(max_failures=retries, controller_failure_limit=starts),
        ),
    )
