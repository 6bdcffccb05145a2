"""What a Ray Train worker does: wire data, state and reports together, and call the engine's loop, once or again and again."""

import gc
import logging
import os
import re
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from cps_ray.config.plugins import Sink, load_sink
from cps_ray.config.reader import load_train, parse_train
from cps_ray.config.train import NETWORK_NAMES, TrainConfig
from cps_ray.datasets.loader import (
    TrainData,
    evaluated_images,
    hidden_batches,
    image_batches,
    train_batches,
    train_data,
)
from cps_ray.datasets.open import open_data
from cps_ray.datasets.shards import Index
from cps_ray.engine.cpu.threads import held_bytes, release_memory, tune_cpu
from cps_ray.engine.evaluation import evaluate, evaluate_hidden, summarise
from cps_ray.engine.loop import fit
from cps_ray.engine.normalisation import normalisation, padding_color
from cps_ray.engine.ranks import Ranks, join
from cps_ray.engine.state import TrainState, build_state
from cps_ray.engine.telemetry import Metrics, collapse, vanishing
from cps_ray.errors import ConfigError, DataError, DivergedError
from cps_ray.files import write_text
from cps_ray.on_ray.failures import COLLAPSED, kind_of, reason
from cps_ray.on_ray.gauges import TrainGauges
from cps_ray.on_ray.stream import make_plan, stream
from cps_ray.on_ray.worker_groups import END, Training
from cps_ray.runs import (
    CONFIG_FILE,
    ERROR_FILE,
    LOG_FILE,
    Records,
    latest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)

T = TypeVar("T")

_THREADS_S = 20.0
"""How long the threads of a training that has ended may take to end."""
_MOST_THREADS = 8
"""Beyond, threads wait for the interpreter lock: an image holds it for a tenth of its time."""


Judge = Callable[[int], bool]
"""Takes the step of an evaluation that is on record, checkpoint and all; False ends the training. Rank 0 alone asks it."""


def work(train: dict[str, Any], sha256: str, run_dir: str, sweep: str, metric: str) -> dict[str, str]:
    """Trains as `trainer.train_loop` says, in each worker.

    `train`: as `TrainConfig.dump` gives it, paths absolute. `sha256`: the driver's hash of it. `run_dir`: where rank 0 writes its records, on storage that the driver sees.
    `sweep`: the tag of the training's metrics. `metric`: that by which the best checkpoint is kept.
    """
    with _run_log(Path(run_dir)) as log:
        try:
            _train(parse_train(train, "train"), sha256, Path(run_dir), sweep, metric, log, lambda step: True)
        except DivergedError as err:
            # Returned, not raised: Ray Train would take it for a crash and try again.
            log.error("%s", err)
            return {"diverged": str(err)}
        except Exception:
            log.error("failed\n%s", traceback.format_exc())
            raise
    return {}


def serve(pool: Any, group: str) -> None:
    """Takes one training after the other from `pool`, the actor of `WorkerGroups`, until it says END."""
    from ray import train
    from ray.train import collective

    rank = train.get_context().get_world_rank()
    workers: str = collective.broadcast_from_rank_zero(uuid.uuid4().hex if rank == 0 else None)
    # Rank 0 alone asks, so that all ranks train the same.
    ask = partial(_next_training, pool, group, workers)
    while (found := collective.broadcast_from_rank_zero(ask() if rank == 0 else None)) != END:
        _serve(pool, group, workers, found, rank)


def _next_training(pool: Any, group: str, workers: str) -> Training | str:
    import ray

    while True:
        found: Training | str | None = ray.get(pool.take.remote(group, workers, held_bytes()))
        if found == END:
            return END
        if isinstance(found, Training) and ray.get(pool.started.remote(group, found.folder, workers)):
            return found


def _serve(pool: Any, group: str, workers: str, training: Training, rank: int) -> None:
    """Trains once, and says how it ended. Raises what failed: the processes of a failed training serve no other."""
    import ray

    folder = training.folder

    def finished(failure: str | None, kind: str) -> None:
        ray.get(pool.finished.remote(group, folder, failure, kind, workers))

    # Into the actor's own log, which the dashboard shows: so it says which trainings it has served.
    print(f"{training.sweep} {Path(folder).name}: rank {rank}, log in {Path(folder) / LOG_FILE}", flush=True)
    try:
        with _run_log(Path(folder)) as log:
            try:
                config = load_train(Path(folder) / CONFIG_FILE)
                judge = lambda step: ray.get(pool.report.remote(group, folder, step, workers))  # noqa: E731
                if rank == 0:
                    (Path(folder) / ERROR_FILE).unlink(missing_ok=True)  # of an earlier try
                _train(config, training.sha256, Path(folder), training.sweep, training.metric, log, judge)
            except Exception as err:
                diverged = isinstance(err, DivergedError)
                text = f"{err}\n" if diverged else traceback.format_exc()
                with suppress(OSError):  # the disk may be what has failed
                    log.error("%s", err if diverged else f"failed\n{text}")
                    write_text(Path(folder) / ERROR_FILE, text)
                raise
    except DivergedError as err:
        if rank == 0:
            finished(str(err), COLLAPSED)
    except Exception as err:
        finished(reason(err), kind_of(err))
        raise
    else:
        if rank == 0:
            finished(None, "")
    clean_up()  # after that: should it fail, the training is over all the same, and its processes serve no other


def clean_up() -> None:
    """Leaves nothing of a training in this process, so that the next one is like a first one. Raises RuntimeError if a thread of it
    does not end."""
    deadline = time.monotonic() + _THREADS_S
    for thread in threading.enumerate():
        if thread.name.startswith(("batches", "decode", "stream")):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise RuntimeError(
                    f"thread {thread.name} of a training that has ended is still there after {_THREADS_S:g} s"
                )
    if "torch._dynamo" in sys.modules:  # else it would be imported, which takes seconds
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    release_memory()


def _train(
    config: TrainConfig, sha256: str, folder: Path, sweep: str, metric: str, log: logging.Logger, judge: Judge
) -> None:
    from ray import train
    from ray.train.torch import get_device

    context = train.get_context()
    ranks = join(config, context.get_world_rank(), context.get_world_size(), get_device())
    check_same(config, sha256, ranks, log)
    if ranks.device.type == "cpu":
        tune_cpu(max(1, round(config.resources.cpus_per_worker)))
    shards = open_data(config.data)
    data, evaluated = train_data(shards, config), evaluated_images(shards, config, "val")
    state = build_state(config, len(shards.classes), ranks)
    # All ranks the same: the first one's latest, which the others may not see yet on shared storage.
    checkpoint = _shared(ranks, latest_checkpoint(folder))
    if checkpoint is not None:
        state.load(read_checkpoint(checkpoint), source=checkpoint)
    weighed = data.weigh(config)
    _log_start(log, weighed, data, state, shards.classes)
    report = WorkerReport(config, folder, sweep, metric, state, log, judge)
    try:
        # The answer to the checkpoint's report may have been lost with the process that waited for it.
        if checkpoint is not None and not report.goes_on(state):
            return
        unlabeled = None
        if config.semi_supervised:
            unlabeled = stream(make_plan(data, config, ranks.batch_shard, ranks.num_batch_shards, state.step))
        batches = train_batches(
            data,
            config,
            batch_shard=ranks.batch_shard,
            num_batch_shards=ranks.num_batch_shards,
            start_step=state.step,
            unlabeled=unlabeled,
            threads=decode_threads(context.get_local_world_size()),
            fill=padding_color(config.model),
        )
        with closing(batches):
            validated = partial(validate, config, shards.classes, data, evaluated)
            fit(weighed, state, batches, validated, report, shards.classes)
    finally:
        report.close()


def check_same(config: TrainConfig, sha256: str, ranks: Ranks, log: logging.Logger) -> None:
    """Puts on record that every rank has the training that the driver wrote; ConfigError on all ranks if one has not. A collective."""
    differs = torch.zeros(ranks.world, dtype=torch.int64, device=ranks.device)
    differs[ranks.rank] = config.sha256 != sha256
    wrong = ranks.sum(differs).nonzero().flatten().tolist()
    if wrong:
        raise ConfigError(
            f"every rank must train what the driver wrote (sha256 {sha256}), but rank(s) {', '.join(map(str, wrong))} of {ranks.world} "
            f"read another {CONFIG_FILE} (rank {ranks.rank}: {config.sha256}). Is the folder the same on all nodes, and nobody else writes there?"
        )
    if ranks.rank == 0:
        log.info("config sha256 %s, on all %d rank(s) as the driver wrote it", sha256, ranks.world)


def _shared(ranks: Ranks, value: T) -> T:
    """Returns rank 0's value. A collective."""
    from ray.train import collective

    return value if ranks.world == 1 else collective.broadcast_from_rank_zero(value if ranks.rank == 0 else None)


def validate(
    config: TrainConfig, classes: Sequence[str], data: TrainData, evaluated: Index, state: TrainState
) -> Metrics:
    """Evaluates every image of `evaluated`, val or what takes its place, each once over all ranks; and, if there are hidden masks, what
    `evaluate_hidden` says of some of them."""
    ranks = state.ranks
    # Ranks of one batch shard pass the same images: their networks are evaluated together.
    mine: dict[str, int] = {
        "batch_shard": ranks.batch_shard,
        "num_batch_shards": ranks.num_batch_shards,
        "threads": decode_threads(),
    }
    batches = image_batches(evaluated, np.arange(len(evaluated)), masks=True, **mine)
    counts = evaluate(config, state.evaluated, batches, len(classes), ranks)
    hidden = hidden_batches(data, config.evaluation.hidden_images, **mine)
    pseudo = evaluate_hidden(config, state.evaluated, hidden, classes, ranks)
    return summarise(counts, classes, "val") | pseudo


class WorkerReport:
    """The loop's `Report` in a worker: takes an evaluation to the run's sinks and checkpoints, and asks whether the training goes on."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        sweep: str,
        metric: str,
        state: TrainState,
        log: logging.Logger,
        judge: Judge,
    ) -> None:
        """`state` is at the step from which the training starts or continues."""
        self._folder, self._metric, self._log, self._judge = folder, metric, log, judge
        self._sinks: list[Sink] = []
        self._plugged_in: list[Sink] = []
        if state.ranks.rank == 0:
            self._sinks = [Records(config, folder, state.step), TrainGauges(config, folder, state.step, sweep)]
            self._plugged_in = [load_sink(path)(config, folder, state.step) for path in config.sinks]

    def __call__(self, metrics: Metrics, state: TrainState) -> bool:
        snapshot = state.snapshot()
        if snapshot is not None:
            self._log_evaluation(metrics)
            # The record comes before the checkpoint: what is missing after a crash is trained again, what is double is cut.
            for sink in self._sinks:
                sink.write(metrics)
            for sink in self._plugged_in:
                # A service that does not answer must not end a training of days.
                with self._logged(sink, f"step {metrics['step']}"):
                    sink.write(metrics)
            save_checkpoint(self._folder, snapshot, metrics, self._metric)
        return self.goes_on(state)

    def goes_on(self, state: TrainState) -> bool:
        """Whether to go on after the state's step, which is on record. A collective."""
        return _shared(state.ranks, state.ranks.rank != 0 or self._judge(state.step))

    def close(self) -> None:
        """Closes all sinks."""
        for sink in (*self._sinks, *self._plugged_in):
            with self._logged(sink, "close"):
                sink.close()

    @contextmanager
    def _logged(self, sink: Sink, at: str) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._log.warning(
                "%s: sink %s failed, the training goes on\n%s", at, type(sink).__name__, traceback.format_exc()
            )

    def _log_evaluation(self, metrics: Metrics) -> None:
        self._log.info(
            "step %d: val/miou %.4f, train/loss %.4f, %.1f images/s, waiting for data %.0f %%",
            *(metrics["step"], metrics["val/miou"], metrics["train/loss"]),
            *(metrics["time/images_per_s"], 100 * metrics["time/data_wait"]),
        )
        # Those of single classes stand in the records.
        pseudo = {name[7:]: value for name, value in metrics.items() if re.fullmatch("pseudo/[^/]*", name)}
        if pseudo:
            self._log.info("pseudo labels: %s", ", ".join(f"{name} {value:.3f}" for name, value in pseudo.items()))
        lost = vanishing(metrics)
        if lost:
            self._log.warning(
                "step %d: pseudo labels hold less than half of the pixels that the masks have of: %s",
                metrics["step"],
                lost,
            )
        why = collapse(metrics)
        if why:
            self._log.warning("step %d: %s", metrics["step"], why)


def decode_threads(workers_here: int = 1) -> int:
    """Number of decode threads: they work ahead by two steps and then rest, so many do no harm."""
    return max(2, min(_MOST_THREADS, (os.cpu_count() or 1) // workers_here))


def _log_start(
    log: logging.Logger, config: TrainConfig, data: TrainData, state: TrainState, classes: Sequence[str]
) -> None:
    ranks = state.ranks
    sizes = (
        f"{name} of {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M" for name, net in state.networks.items()
    )
    log.info(
        "step %d of %d: rank %d of %d on %s, process %d of %s, %d labelled and %d unlabelled images, networks %s",
        *(state.step, config.schedule.steps, ranks.rank, ranks.world, ranks.device, os.getpid(), os.uname().nodename),
        *(len(data.subset.labeled), len(data.subset.unlabeled), ", ".join(sizes)),
    )
    for name, network in state.networks.items():
        if network.filled:
            log.info("network %s: %s", name, network.filled)
        log.info("network %s: images normalised by %s", name, normalisation(config.model.of(NETWORK_NAMES.index(name))))
    for section, weights in config.class_weights.items():
        assert not isinstance(weights, float)
        each = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(classes, weights, strict=True))
        log.info("%s: classes weigh %s", section, each)


@contextmanager
def _run_log(run_dir: Path) -> Iterator[logging.Logger]:
    """The run's log, to which every rank appends."""
    log = logging.getLogger(f"cps_ray.run.{run_dir.name}")
    log.setLevel(logging.INFO)
    log.propagate = False  # the root's handlers are Ray's, and would print every line once more
    if not run_dir.is_dir():
        raise DataError(
            f"{run_dir}: does not exist on node {os.uname().nodename}. Put it on storage that all nodes see (--output), or train on one."
        )
    handler = logging.FileHandler(run_dir / LOG_FILE)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    try:
        yield log
    finally:
        log.removeHandler(handler)
        handler.close()
