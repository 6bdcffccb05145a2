"""`bench driver`: what a sweep's driver costs per trial, and whether that grows: real search phase, study and files; trainings that do nothing."""

import argparse
import json
import math
import multiprocessing
import random
import resource
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from cps_ray.bench import wide
from cps_ray.bench.step import process_bytes
from cps_ray.config.sweep import SweepConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.runs import CONFIG_FILE, Records
from cps_ray.search.records import Events, write_summary, write_tables
from cps_ray.search.search_phase import SearchPhase
from cps_ray.search.study import SweepStudy
from cps_ray.search.tune_session import TrainingJob

_AT_ONCE = 4
_REPORTS = 10
_STEPS = 1000
_METRICS = (
    *(f"val/{name}" for name in ("a/miou", "b/miou", "ensemble/miou", "accuracy", "ece", "loss")),
    *(f"val/iou/class{number}" for number in range(11)),
    *(f"train/{name}" for name in ("loss", "supervised", "cps", "grad_norm_a", "grad_norm_b")),
    *(f"pseudo/{name}" for name in ("agreement", "kappa", "confidence", "coverage", "top_fraction")),
    *("time/images_per_s", "time/data_wait", "time/data_wait_s", "memory/peak_bytes"),
)
"""Names beside val/miou of what an evaluation records, about as many as CPS on CamVid has."""

Figures = dict[str, Any]


def _sweep_config(root: Path, trials: int, sampler: str, early_stopping: str) -> SweepConfig:
    train = {
        "data": {
            "shards": str(root / "shards"),
            "labeled": 8,
            "crop_px": [64, 64],
            "labeled_batch": 4,
            "unlabeled_batch": 4,
        },
        "model": {"encoder": "resnet18"},
        "optim": {"lr": 0.1},
        "schedule": {"steps": _STEPS, "eval_every": _STEPS // _REPORTS},
    }
    return SweepConfig.model_validate(
        {
            "version": 1,
            "name": root.name,
            "output": str(root.parent),
            "train": train,
            "budget": {"trials": trials},
            "sampler": {"type": sampler},
            "early_stopping": {"type": early_stopping, "grace": _STEPS // _REPORTS},
            "search_space": {
                "optim.lr": {"type": "float", "low": 0.001, "high": 0.1, "log": True},
                "cps.weight": {"type": "float", "low": 0.1, "high": 10.0},
                "cps.mix": {"type": "choice", "values": ["none", "cutmix"]},
            },
        }
    )


def _cpu_seconds() -> float:
    """CPU seconds that this process and those that it has waited for have taken so far."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class _Clock:
    """CPU seconds inside the blocks that it is asked to time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        begin = _cpu_seconds()
        try:
            yield
        finally:
            self.seconds += _cpu_seconds() - begin

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self():
                return call(*args, **kwargs)

        return timed


class _NoGauges:
    def set(self, *_: object) -> None:
        """Sets nothing: there is no Ray."""


def _run_sweep(root: Path, trials: int, sampler: str, early_stopping: str) -> Figures:
    """Searches with trainings that only write their records, as a worker does; that is not timed."""
    root.mkdir()
    config = _sweep_config(root, trials, sampler, early_stopping)
    at_start, driver, asks = process_bytes("VmRSS"), _Clock(), _Clock()
    with driver():
        study = SweepStudy(config, root)
        write_tables(root, study, config)
        gauges: Any = _NoGauges()
        phase = SearchPhase(study, config, root, Events(root), gauges)
    optuna_study = study.study
    samplers = type(optuna_study.sampler)  # of all trials: each has one of its own
    # What grows with the sampler alone: the draws, and what Optuna reads for them.
    for owner, name in (
        (optuna_study, "ask"),
        (samplers, "infer_relative_search_space"),
        (samplers, "sample_relative"),
        (samplers, "sample_independent"),
    ):
        setattr(owner, name, asks.timed(getattr(owner, name)))
    live: list[tuple[TrainingJob, Records, int]] = []
    while True:
        while len(live) < _AT_ONCE:
            with driver():
                job = phase.ask()
                if job is None:
                    break
                job.folder.mkdir(parents=True)
                (job.folder / CONFIG_FILE).write_text(dump_yaml(job.config.dump(str(job.folder))))
            live.append((job, Records(job.config, job.folder, 0), 0))
        if not live:
            break
        job, records, step = live.pop(0)
        step += _STEPS // _REPORTS
        metrics = _evaluation(job.name, step)
        records.write(metrics)
        with driver():
            if phase.report(job, {**metrics, "step": step}) and step < _STEPS:
                live.append((job, records, step))
            else:
                phase.tell(job, None, collapsed=False)
    with driver():
        phase.end_cut_trials()
        write_tables(root, study, config)
        write_summary(root, study, config, "finished")
    return {
        "trials": trials,
        "states": study.counts(),
        "cpu_s": driver.seconds,
        "ask_cpu_s": asks.seconds,
        "bytes_at_start": at_start,
        "peak_bytes": process_bytes("VmHWM"),
        "files": len([path for path in root.iterdir() if path.is_file()]),
        "files_per_trial": sum(path.is_file() for path in (root / "trials").rglob("*")) / trials,
    }


def _evaluation(name: str, step: int) -> dict[str, float]:
    draws = random.Random(name)
    quality = draws.random() * (1 - math.exp(-3 * step / _STEPS)) + 0.01 * random.Random(f"{name} {step}").random()
    return {"step": step, "val/miou": quality, **{metric: draws.random() for metric in _METRICS}}


def _in_new_process(root: Path, *arguments: Any) -> Figures:
    """Has a peak of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run_sweep, root, *arguments).result()


def run(args: argparse.Namespace) -> int:
    """Runs a sweep of each size, prints a table, writes the JSON; returns 0."""
    table = Table(
        "trials",
        "CPU s",
        "CPU ms per trial",
        "without Optuna's ask",
        "MB at start",
        "peak MB",
        "files",
        "files per trial",
        title=f"driver: sampler {args.sampler}, early stopping {args.early_stopping}, {_REPORTS} reports per trial",
    )
    rows = []
    with tempfile.TemporaryDirectory(prefix="cps-ray-bench-") as work:
        for trials in args.trials:
            found = _in_new_process(Path(work) / f"driver-{trials}", trials, args.sampler, args.early_stopping)
            rows.append(found)
            cpu, own = found["cpu_s"], found["cpu_s"] - found["ask_cpu_s"]
            table.add_row(
                str(trials),
                f"{cpu:.1f}",
                f"{1000 * cpu / trials:.0f}",
                f"{1000 * own / trials:.0f}",
                *(f"{found[name] / 2**20:.0f}" for name in ("bytes_at_start", "peak_bytes")),
                str(found["files"]),
                f"{found['files_per_trial']:.0f}",
            )
    wide().print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0
