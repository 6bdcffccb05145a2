"""Photos predicted by the workers of a cluster, through Ray Data: chunks go out, records come back, files go where all see them."""

import json
import logging
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cps_ray.engine.cpu.threads import tune_cpu
from cps_ray.errors import ResourceError
from cps_ray.model.model import load_model
from cps_ray.model.photos import Photo
from cps_ray.model.predicting import OutputOptions, Record, predict_chunks
from cps_ray.on_ray.failures import reason

_MOST_CHUNKS = 16
"""Most chunks that a worker gets at once: it reads and writes beside computing only within these."""
_JOBS_PER_WORKER = 4
"""Jobs are made smaller until each worker gets so many, so that all end at about the same time."""
_THREADS = 2
"""Threads of a worker that read and write."""


@dataclass(frozen=True, slots=True)
class WorkerModel:
    """The model as a worker loads it: arguments of `load_model`."""

    folder: str
    device: str
    network: str
    plugins: bool


def workers_device(wanted: str | None) -> str:
    """Returns the device of the workers on the connected cluster: what is wanted, else GPUs where there are any."""
    import ray

    return wanted or ("cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu")


class _Predictor:
    """A worker: loads the model once, and predicts one job after the other."""

    def __init__(self, model: WorkerModel, out: Path, options: OutputOptions) -> None:
        if model.device == "cpu":
            tune_cpu(1)
        self._model = load_model(model.folder, device=model.device, network=model.network, plugins=model.plugins)
        self._out, self._options = out, options

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (job,) = batch["item"]
        done = predict_chunks(self._model, pickle.loads(job), self._out, self._options, _THREADS)
        return {"records": [json.dumps([record for records in done for record in records])]}


def predict_on_cluster(
    model: WorkerModel, chunks: Sequence[Sequence[Photo]], out: Path, options: OutputOptions
) -> Iterator[list[Record]]:
    """Does what `predict_chunks` does, on one worker per CPU, or per GPU, of the connected cluster. Every node must see all paths.

    Raises ResourceError if the cluster gives up on it.
    """
    import ray

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    on_gpus = model.device != "cpu"
    workers = max(1, int(ray.cluster_resources().get("GPU" if on_gpus else "CPU", 1)))
    size = max(1, min(_MOST_CHUNKS, len(chunks) // (_JOBS_PER_WORKER * workers)))
    # Each process has its own working directory.
    whole = [[replace(photo, path=os.path.abspath(photo.path)) for photo in chunk] for chunk in chunks]
    jobs = [pickle.dumps(whole[first : first + size]) for first in range(0, len(whole), size)]
    if not jobs:
        return
    records = ray.data.from_items(jobs, override_num_blocks=len(jobs)).map_batches(
        _Predictor,
        fn_constructor_kwargs={"model": model, "out": out, "options": options},
        batch_size=1,
        num_cpus=1,
        num_gpus=1 if on_gpus else 0,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(jobs))),
    )
    try:
        for row in records.iter_rows():
            yield json.loads(row["records"])
    except ray.exceptions.RayError as err:
        raise ResourceError(f"a worker has failed ({reason(err)}); what was done is kept, run the same again.") from err
