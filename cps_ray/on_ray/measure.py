"""What benchmarks measure on a cluster: the stream in a worker with nobody training on it, and how soon trainings begin."""

import os
import time
from pathlib import Path
from typing import Any

from cps_ray.config.reader import parse_train
from cps_ray.config.space import apply
from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.on_ray.trainer import DEFAULT_METRIC
from cps_ray.runs import CONFIG_FILE

_PATIENCE_S = 600.0


def measure_starts(config: TrainConfig, work: Path, *, rounds: int, again: int) -> dict[str, list[float]]:
    """Trains on a cluster of its own, in worker groups that are started one after the other, 1 + `again` times in each.

    Returns seconds to the first evaluation, `cold` of the first training in a group, `warm` of the others, and `held`: megabytes that the
    first group's workers hold after each.
    """
    import ray

    from cps_ray.on_ray.cluster import connected
    from cps_ray.on_ray.trainer import worker_groups
    from cps_ray.on_ray.worker_groups import GroupShape, Training

    found: dict[str, list[float]] = {"cold": [], "warm": [], "held": []}
    with connected(None):
        for number in range(rounds):
            with worker_groups(work / f"tune-{number}") as pool:
                for seed in range(again + 1):
                    folder = work / f"group-{number}-{seed}"
                    folder.mkdir()
                    (folder / CONFIG_FILE).write_text(
                        dump_yaml(apply(config, {"seed": seed}, "bench").dump(str(folder)))
                    )
                    begin = time.perf_counter()
                    ray.get(
                        pool.begin.remote(
                            Training(str(folder), DEFAULT_METRIC, config.sha256, GroupShape.of(config.resources))
                        )
                    )
                    news = ray.get(pool.wait.remote(str(folder), 0, _PATIENCE_S))
                    found["warm" if seed else "cold"].append(time.perf_counter() - begin)
                    while news["outcome"] is None:
                        news = ray.get(pool.wait.remote(str(folder), 1, _PATIENCE_S))
                    if number == 0:
                        time.sleep(0.5)  # it gives memory back when it has ended
                        found["held"].append(largest_mb("RayTrainWorker"))
    return found


def largest_mb(title: str) -> int:
    """Returns the resident megabytes of the largest process with this title."""
    found = [0]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if title in path.read_text():
                found.append(resident_mb(int(path.parent.name)))
        except OSError:
            continue
    return max(found)


def resident_mb(pid: int) -> int:
    """Returns the resident megabytes of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


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
