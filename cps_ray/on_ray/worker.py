"""What a Ray Train worker does: wire data, state and reports together, and call the engine's loop."""

import json
import logging
import os
import shutil
import tempfile
import traceback
from pathlib import Path

from cps_ray.config.reader import parse_train
from cps_ray.config.train import TrainConfig
from cps_ray.datasets.loader import TrainData, eval_batches, hidden_batches, train_batches, train_data
from cps_ray.datasets.shards import Shards
from cps_ray.datasets.synthetic import open_data
from cps_ray.engine.cpu import tune_cpu
from cps_ray.engine.evaluation import evaluate, evaluate_hidden, summarise
from cps_ray.engine.loop import fit
from cps_ray.engine.ranks import Ranks, join
from cps_ray.engine.state import TrainState, build_state, write_checkpoint
from cps_ray.engine.telemetry import Metrics, collapse
from cps_ray.errors import DivergedError
from cps_ray.on_ray.gauges import TrainGauges
from cps_ray.on_ray.stream import make_plan, stream
from cps_ray.on_ray.trainer import METRICS_FILE, WorkerSettings, read_metrics

LOG_FILE = "log.txt"
_MOST_THREADS = 8
"""Beyond, threads wait for the interpreter lock: an image holds it for a tenth of its time."""


def work(job: WorkerSettings) -> dict[str, str]:
    """What `trainer.train_loop` does in each worker."""
    config = parse_train(job.train, "train")
    log = _log(Path(job.run_dir))
    try:
        _train(config, job, log)
    except DivergedError as err:
        log.error("%s", err)
        return {"diverged": str(err)}
    except Exception:
        log.error("failed\n%s", traceback.format_exc())
        raise
    return {}


def _train(config: TrainConfig, job: WorkerSettings, log: logging.Logger) -> None:
    from ray import train
    from ray.train.torch import get_device

    context = train.get_context()
    ranks = join(config, context.get_world_rank(), context.get_world_size(), get_device())
    if ranks.device.type == "cpu":
        tune_cpu(max(1, round(config.resources.cpus_per_worker)))
    shards = open_data(config.data)
    data = train_data(shards, config)
    state = build_state(config, len(shards.classes), ranks)
    checkpoint = train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state.load(Path(folder))
    log.info(
        "step %d of %d: rank %d of %d on %s, %d labelled and %d unlabelled images, networks %s",
        *(state.step, config.schedule.steps, ranks.rank, ranks.world, ranks.device),
        *(len(data.split.labeled), len(data.split.unlabeled)),
        ", ".join(
            f"{name} of {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M" for name, net in state.networks.items()
        ),
    )
    unlabeled = None
    if config.semi_supervised:
        unlabeled = stream(make_plan(data, config, ranks.share, ranks.shares, state.step))
    batches = train_batches(
        data,
        config,
        rank=ranks.share,
        world=ranks.shares,
        start_step=state.step,
        unlabeled=unlabeled,
        threads=decode_threads(context.get_local_world_size()),
    )
    reporter = Reporter(config, job, ranks, state.step, log)
    fit(config, state, batches, lambda state: validate(config, shards, data, state), reporter)


def validate(config: TrainConfig, shards: Shards, data: TrainData, state: TrainState) -> Metrics:
    """Every image of `val`, each once over all ranks; and, if there are hidden masks, `pseudo/miou` on some of them."""
    ranks, classes, threads = state.ranks, shards.classes, decode_threads()
    batches = eval_batches(shards, "val", rank=ranks.share, world=ranks.shares, threads=threads)
    found = summarise(evaluate(config, state.judged, batches, len(classes), ranks), classes, "val")
    hidden = hidden_batches(data, config, rank=ranks.share, world=ranks.shares, threads=threads)
    return found | evaluate_hidden(config, state.judged, hidden, len(classes), ranks)


class Reporter:
    """Takes an evaluation to disk, to Ray's metrics and, with a checkpoint, to Ray Train."""

    def __init__(self, config: TrainConfig, job: WorkerSettings, ranks: Ranks, step: int, log: logging.Logger) -> None:
        self._log = log
        self._file = Path(job.run_dir) / METRICS_FILE
        data = config.data
        per_step = data.labeled_batch + (data.unlabeled_batch if config.semi_supervised else 0)
        self._images = per_step * config.schedule.eval_every
        if ranks.rank == 0:
            self._gauges = TrainGauges(job.sweep, Path(job.run_dir).name)
            # A crash may have come between the record and the checkpoint: those steps are trained again.
            keep = [line for line in read_metrics(self._file) if line["step"] <= step]
            self._file.write_text("".join(json.dumps(line) + "\n" for line in keep))

    def __call__(self, metrics: Metrics, state: TrainState) -> bool:
        from ray import train

        snapshot = state.snapshot()
        if snapshot is None:
            train.report(metrics)
            return True
        self._gauges.set(metrics, self._images)
        self._log.info(
            "step %d: val/miou %.4f, train/loss %.4f, %.1f images/s, waiting for data %.0f %%",
            *(metrics["step"], metrics["val/miou"], metrics["train/loss"]),
            *(metrics["time/images_per_s"], 100 * metrics["time/data_wait"]),
        )
        pseudo = {name.removeprefix("pseudo/"): value for name, value in metrics.items() if name.startswith("pseudo/")}
        if pseudo:
            self._log.info("pseudo labels: %s", ", ".join(f"{name} {value:.3f}" for name, value in pseudo.items()))
        why = collapse(metrics)
        if why:
            self._log.warning("step %d: %s", metrics["step"], why)
        with self._file.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        folder = Path(tempfile.mkdtemp(prefix="cps-ray-"))
        try:
            write_checkpoint(folder, snapshot, metrics)
            train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return True


def decode_threads(workers_here: int = 1) -> int:
    """Decode threads: they work ahead by two steps and then rest, so many do no harm."""
    return max(2, min(_MOST_THREADS, (os.cpu_count() or 1) // workers_here))


def _log(run_dir: Path) -> logging.Logger:
    """Rank-independent: every rank appends to the run's log."""
    log = logging.getLogger(f"cps_ray.run.{run_dir.name}")
    log.setLevel(logging.INFO)
    log.propagate = False
    if not log.handlers:
        handler = logging.FileHandler(run_dir / LOG_FILE)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
    return log
