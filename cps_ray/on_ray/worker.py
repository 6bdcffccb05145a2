"""What a Ray Train worker does: wire data, state and reports together, and call the engine's loop."""

import logging
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cps_ray.config.plugins import Sink, load_sink
from cps_ray.config.reader import parse_train
from cps_ray.config.train import NETWORK_NAMES, TrainConfig
from cps_ray.datasets.loader import TrainData, eval_batches, hidden_batches, train_batches, train_data
from cps_ray.datasets.open import open_data
from cps_ray.datasets.shards import Shards
from cps_ray.engine.cpu.threads import tune_cpu
from cps_ray.engine.evaluation import evaluate, evaluate_hidden, summarise
from cps_ray.engine.loop import fit
from cps_ray.engine.normalisation import normalisation, padding_color
from cps_ray.engine.ranks import join
from cps_ray.engine.state import TrainState, build_state
from cps_ray.engine.telemetry import Metrics, collapse, vanishing
from cps_ray.errors import DivergedError
from cps_ray.on_ray.gauges import TrainGauges
from cps_ray.on_ray.stream import make_plan, stream
from cps_ray.runs import LOG_FILE, Records, read_checkpoint, write_checkpoint

_MOST_THREADS = 8
"""Beyond, threads wait for the interpreter lock: an image holds it for a tenth of its time."""


def work(train: dict[str, Any], run_dir: str, sweep: str) -> dict[str, str]:
    """Trains as `trainer.train_loop` says, in each worker.

    `train`: as `TrainConfig.dump` gives it, paths absolute. `run_dir`: where rank 0 writes its records, on storage that the driver sees.
    `sweep`: the tag of the training's metrics.
    """
    config = parse_train(train, "train")
    folder = Path(run_dir)
    log = _log(folder)
    try:
        _train(config, folder, sweep, log)
    except DivergedError as err:
        # Returned, not raised: Ray Train would take it for a crash and try again.
        log.error("%s", err)
        return {"diverged": str(err)}
    except Exception:
        log.error("failed\n%s", traceback.format_exc())
        raise
    return {}


def _train(config: TrainConfig, folder: Path, sweep: str, log: logging.Logger) -> None:
    from ray import train
    from ray.train.torch import get_device

    context = train.get_context()
    ranks = join(config, context.get_world_rank(), context.get_world_size(), get_device())
    if ranks.device.type == "cpu":
        tune_cpu(max(1, round(config.resources.cpus_per_worker)))
    shards = open_data(config.data)
    data = train_data(shards, config)
    state = build_state(config, len(shards.classes), ranks)
    checkpoint = train.get_checkpoint()  # the run's latest, also after a restart by Ray Train
    if checkpoint is not None:
        with checkpoint.as_directory() as path:
            state.load(read_checkpoint(Path(path)), source=path)
    _log_start(log, config, data, state)
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
    report = WorkerReport(config, folder, sweep, state, log)
    try:
        fit(config, state, batches, lambda state: validate(config, shards, data, state), report, shards.classes)
    finally:
        report.close()


def validate(config: TrainConfig, shards: Shards, data: TrainData, state: TrainState) -> Metrics:
    """Evaluates every image of `val`, each once over all ranks; and, if there are hidden masks, what
    `evaluate_hidden` says of some of them."""
    ranks, classes = state.ranks, shards.classes
    # Ranks of one batch shard pass the same images: their networks are evaluated together.
    mine: dict[str, int] = {
        "batch_shard": ranks.batch_shard,
        "num_batch_shards": ranks.num_batch_shards,
        "threads": decode_threads(),
    }
    counts = evaluate(config, state.evaluated, eval_batches(shards, "val", **mine), len(classes), ranks)
    hidden = hidden_batches(data, config.evaluation.hidden_images, **mine)
    pseudo = evaluate_hidden(config, state.evaluated, hidden, classes, ranks)
    return summarise(counts, classes, "val") | pseudo


class WorkerReport:
    """The loop's `Report` in a worker: takes an evaluation to the run's sinks and, with a checkpoint, to Ray Train."""

    def __init__(self, config: TrainConfig, folder: Path, sweep: str, state: TrainState, log: logging.Logger) -> None:
        """`state` is at the step from which the training starts or continues."""
        self._log = log
        self._sinks: list[Sink] = []
        self._plugged_in: list[Sink] = []
        if state.ranks.rank == 0:
            self._sinks = [Records(config, folder, state.step), TrainGauges(config, folder, state.step, sweep)]
            self._plugged_in = [load_sink(path)(config, folder, state.step) for path in config.sinks]

    def __call__(self, metrics: Metrics, state: TrainState) -> bool:
        from ray import train

        snapshot = state.snapshot()
        if snapshot is None:
            train.report(metrics)  # every rank has to report, or Ray Train waits for it
            return True
        self._log_evaluation(metrics)
        # The record comes before the checkpoint: what is missing after a crash is trained again, what is double is cut.
        for sink in self._sinks:
            sink.write(metrics)
        for sink in self._plugged_in:
            # A service that does not answer must not end a training of days.
            with self._logged(sink, f"step {metrics['step']}"):
                sink.write(metrics)
        folder = Path(tempfile.mkdtemp(prefix="cps-ray-"))
        try:
            write_checkpoint(folder, snapshot, metrics)
            # Returns when the folder is copied to the run's storage, so it can go.
            train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return True

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


def _log_start(log: logging.Logger, config: TrainConfig, data: TrainData, state: TrainState) -> None:
    ranks = state.ranks
    sizes = (
        f"{name} of {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M" for name, net in state.networks.items()
    )
    log.info(
        "step %d of %d: rank %d of %d on %s, %d labelled and %d unlabelled images, networks %s",
        *(state.step, config.schedule.steps, ranks.rank, ranks.world, ranks.device),
        *(len(data.subset.labeled), len(data.subset.unlabeled), ", ".join(sizes)),
    )
    for name, network in state.networks.items():
        if network.filled:
            log.info("network %s: %s", name, network.filled)
        log.info("network %s: images normalised by %s", name, normalisation(config.model.of(NETWORK_NAMES.index(name))))


def _log(run_dir: Path) -> logging.Logger:
    """The run's log, to which every rank appends."""
    log = logging.getLogger(f"cps_ray.run.{run_dir.name}")
    log.setLevel(logging.INFO)
    log.propagate = False  # the root's handlers are Ray's, and would print every line once more
    if not log.handlers:
        handler = logging.FileHandler(run_dir / LOG_FILE)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
    return log
