"""`bench methods`: compares methods and switches at equal steps over seeds, by the engine alone; no score selects anything."""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.table import Table

from cps_ray.bench import wide
from cps_ray.config.reader import load_sweep, load_train, parse_train
from cps_ray.config.space import apply
from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import scalar
from cps_ray.datasets.loader import eval_batches, hidden_batches, train_batches, train_data
from cps_ray.datasets.open import open_data
from cps_ray.engine.cpu.threads import tune_cpu
from cps_ray.engine.evaluation import evaluate, evaluate_hidden, summarise
from cps_ray.engine.loop import fit
from cps_ray.engine.networks import padding_color
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state
from cps_ray.errors import ConfigError, DivergedError

Changes = dict[str, Any]
Figures = dict[str, Any]

_CUTMIX = {"method": "cps", "cps.mix": "cutmix", "cps.images": "unlabeled"}
VARIANTS: dict[str, Changes] = {
    "supervised": {"method": "supervised"},
    "mean teacher": {"method": "mean_teacher", "ema.decay": 0.99},
    "fixmatch": {"method": "fixmatch"},
    "cps": {"method": "cps", "cps.mix": "none", "cps.images": "unlabeled"},
    "cps on all images": {"method": "cps", "cps.mix": "none", "cps.images": "all"},
    "cps + cutmix": _CUTMIX,
    "  cutmix_partner: self": {**_CUTMIX, "cps.cutmix_partner": "self"},
    "  teacher_bn: eval": {**_CUTMIX, "cps.teacher_bn": "eval"},
    "  images: all": {**_CUTMIX, "cps.images": "all"},
    "  forwards: separate": {**_CUTMIX, "cps.forwards": "separate"},
    "  backbone_init: shared": {**_CUTMIX, "model.backbone_init": "shared"},
    "  all as in the paper's code": {
        **_CUTMIX,
        "cps.cutmix_partner": "self",
        "cps.forwards": "separate",
        "model.backbone_init": "shared",
    },
    "  networks: 3": {**_CUTMIX, "model.networks": 3},
    "  ema.decay: 0.99": {**_CUTMIX, "ema.decay": 0.99},
}
"""Name -> changes to the training in the file. The indented ones are `cps + cutmix` with further changes."""


def variants(config: TrainConfig, names: list[str] | None) -> dict[str, TrainConfig]:
    """Returns the training in each of the named variants (None: in all). Raises ConfigError for an unknown name."""
    known_names = [name.strip() for name in VARIANTS]
    unknown = [name for name in names or [] if name not in known_names]
    if unknown:
        raise ConfigError(f"--only {unknown[0]!r}: must be one of {', '.join(known_names)}.")
    return {
        name: apply(config, changes, name)
        for name, changes in VARIANTS.items()
        if names is None or name.strip() in names
    }


def train_and_evaluate(raw: dict[str, Any], split: str, threads: int) -> Figures:
    """Trains to the last step. Returns the seconds of all steps, the last losses, and the scores of the last networks on `split`.

    A training that diverges returns the reason, under `failed`.
    """
    config = parse_train(raw, "bench")
    device = torch.device("cuda" if config.resources.gpus_per_worker > 0 and torch.cuda.is_available() else "cpu")
    tune_cpu(threads)
    shards, ranks = open_data(config.data), Ranks(device=device)
    data = train_data(shards, config)
    state = build_state(config, len(shards.classes), ranks)
    last: Figures = {}
    begin = time.perf_counter()
    try:
        fit(
            config,
            state,
            train_batches(data, config, threads=threads, fill=padding_color(config.model)),
            lambda _: {},
            lambda metrics, _: not last.update(metrics),  # update returns None, so this is True: continue
        )
    except DivergedError as err:
        return {"failed": str(err)}
    seconds = time.perf_counter() - begin
    counts = evaluate(
        config.evaluation,
        state.evaluated,
        eval_batches(shards, split, threads=threads),
        len(shards.classes),
        ranks,
        slices=config.data.slices,
        precision=config.compute.autocast,
    )
    scores = summarise(counts, shards.classes, split)
    hidden = evaluate_hidden(
        config.evaluation,
        state.evaluated,
        hidden_batches(data, config.evaluation.hidden_images),
        len(shards.classes),
        ranks,
        config.compute.autocast,
    )
    return {"seconds": seconds, **last, **hidden, **scores}


def run(args: argparse.Namespace) -> int:
    """Trains what is not in the JSON file yet, records each run as it ends, and prints the table."""
    config = _training(args.file, args.set)
    shards = open_data(config.data)
    if not shards.index(args.split).labeled.any():
        raise ConfigError(
            f"--split {args.split}: must have masks to be evaluated on, but {config.data.shards} has none there."
        )
    trainings = variants(config, args.only)
    results: dict[str, Figures] = {}
    if args.json is not None and args.json.exists():
        results = _recorded_runs(args.json, args.split, config)
    for key, figures in _run_all(args, trainings, results):
        results[key] = figures
        if args.json is not None:
            record = {
                "config": config.dump(),
                "split": args.split,
                "jobs": args.jobs,
                "torch": torch.__version__,
                "runs": results,
            }
            args.json.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{key}: {figures.get('failed') or round(100 * figures[f'{args.split}/miou'], 2)}", flush=True)
    _print_table(args, trainings, results)
    return 0


def _recorded_runs(path: Path, split: str, config: TrainConfig) -> dict[str, Figures]:
    """Returns the runs on record. Raises ConfigError if they are of another training or split, and cannot be compared."""
    try:
        record = json.loads(path.read_text())
        recorded = parse_train(record["config"], str(path)).dump()
        runs: dict[str, Figures] = record["runs"]
        evaluated = record["split"]
    except (ValueError, KeyError, TypeError, ConfigError) as err:
        raise ConfigError(f"--json {path}: must be a record of `bench methods`, or not exist yet: {err}") from err
    wanted = config.dump()
    for section in wanted:
        if recorded[section] != wanted[section]:
            raise ConfigError(
                f"--json {path}: its runs must be of the same training, but `{section}` was {recorded[section]} there and is "
                f"{wanted[section]} here. Name another file."
            )
    if evaluated != split:
        raise ConfigError(f"--json {path}: its runs were evaluated on {evaluated}, not on {split}. Name another file.")
    return runs


def _training(file: Path, overrides: list[str]) -> TrainConfig:
    """Reads the training of the file. It is evaluated once, at the end, so that only steps are timed and no score selects a model."""
    try:
        config = load_train(file)
    except ConfigError as err:
        if "this is a sweep" not in str(err):
            raise
        config = load_sweep(file).train
    changes = {}
    for text in overrides:
        name, _, value = text.partition("=")
        changes[name] = scalar(value, f"--set {text}")
    steps = changes.get("schedule.steps", config.schedule.steps)
    return apply(config, {**changes, "schedule.eval_every": steps}, "--set")


def _run_all(
    args: argparse.Namespace, trainings: dict[str, TrainConfig], results: dict[str, Figures]
) -> Iterator[tuple[str, Figures]]:
    """Trains what `results` lacks and yields (key, figures) as runs end: seed by seed, so that all variants advance alike."""
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    spawn = multiprocessing.get_context("spawn")
    keys: dict[Future[Figures], str] = {}
    # A process per training, so that none begins with the memory or the thread settings of another.
    with ProcessPoolExecutor(args.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        for seed in args.seeds:
            for name, config in trainings.items():
                key = f"{name.strip()} seed {seed}"
                if key not in results:
                    raw = apply(config, {"seed": seed}, key).dump()
                    keys[pool.submit(train_and_evaluate, raw, args.split, threads)] = key
        for future in as_completed(keys):
            yield keys[future], future.result()


def _print_table(args: argparse.Namespace, trainings: dict[str, TrainConfig], results: dict[str, Figures]) -> None:
    columns = {
        "mIoU %": (f"{args.split}/miou", 100.0),
        "ensemble": (f"{args.split}/ensemble/miou", 100.0),
        "pseudo labels": ("pseudo/miou", 100.0),
        "agreement": ("pseudo/agreement", 100.0),
        "seconds": ("seconds", 1.0),
    }
    table = Table("", *columns, "seeds", title=f"{args.file.name}, evaluated on {args.split}: mean and sd over seeds")
    for name in trainings:
        runs = [results[key] for seed in args.seeds if (key := f"{name.strip()} seed {seed}") in results]
        ended = [run for run in runs if "failed" not in run]
        cells = [_cell([scale * run[metric] for run in ended if metric in run]) for metric, scale in columns.values()]
        failed = f", {len(runs) - len(ended)} failed" if len(runs) > len(ended) else ""
        table.add_row(name, *cells, f"{len(ended)}{failed}")
    wide().print(table)


def _cell(values: list[float]) -> str:
    """Returns the mean and, of several values, the standard deviation."""
    if not values:
        return ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
