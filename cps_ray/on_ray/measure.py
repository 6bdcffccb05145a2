"""The stream inside a Ray Train worker, with nobody training on it: how fast it is, and what it holds."""

import os
import time
from pathlib import Path
from typing import Any

from cps_ray.config.reader import parse_train
from cps_ray.config.train import TrainConfig


def measure_stream(config: TrainConfig, storage: Path, *, warm_s: float, seconds: float | None) -> dict[str, Any]:
    """Consumes the stream of one worker on the connected cluster for `seconds` after `warm_s`, or to its end.

    Returns seconds to the first batch, `step_s` (of every step after the warm-up), images per step, and memory in bytes.
    """
    from ray import train
    from ray.train.torch import TorchTrainer

    settings = {"train": config.dump(), "warm_s": warm_s, "seconds": seconds}
    trainer = TorchTrainer(
        _loop,
        train_loop_config=settings,
        scaling_config=train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1.0}),
        run_config=train.RunConfig(name=f"stream-{time.time_ns()}", storage_path=str(storage.absolute())),
    )
    found: dict[str, Any] = trainer.fit().return_value
    return found


def _loop(settings: dict[str, Any]) -> dict[str, Any]:
    from cps_ray.datasets.loader import train_batches, train_data
    from cps_ray.datasets.shards import open_shards
    from cps_ray.on_ray.stream import make_plan, stream
    from cps_ray.on_ray.worker import decode_threads

    config = parse_train(settings["train"], "train")
    begin = time.perf_counter()
    data = train_data(open_shards(config.data.shards), config)
    unlabeled = stream(make_plan(data, config, batch_shard=0, num_batch_shards=1, start_step=0))
    batches = train_batches(data, config, unlabeled=unlabeled, threads=decode_threads())
    next(batches)
    first = time.perf_counter() - begin
    step_s: list[float] = []
    anonymous: list[int] = []
    last = time.perf_counter()
    warm = last + settings["warm_s"]
    end = float("inf") if settings["seconds"] is None else warm + settings["seconds"]
    for _ in batches:
        now = time.perf_counter()
        if now > warm:
            step_s.append(now - last)
        last = now
        if len(step_s) % 16 == 0:  # reading /proc at every step would show in the step's time
            anonymous.append(_anonymous())
        if now > end:
            break
    shared = os.statvfs("/dev/shm")  # where Ray's object store lies
    return {
        "first_s": first,
        "step_s": step_s,
        "images": config.data.labeled_batch + config.data.unlabeled_batch,
        "worker_bytes": max(anonymous),
        "shared_bytes": (shared.f_blocks - shared.f_bfree) * shared.f_frsize,
    }


def _anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
