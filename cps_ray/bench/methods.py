"""`bench methods`: compares methods and switches at equal steps over draws of labelled images and seeds, by the engine alone; no
score selects anything."""

import argparse
import json
import multiprocessing
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from cps_ray.bench import wide
from cps_ray.bench.comparison import Comparison, Figures, further_table, is_drawn, table
from cps_ray.bench.comparison_picture import along_picture, gains_picture
from cps_ray.bench.labels import ShuffledLabels, TrueMasks, with_true_masks
from cps_ray.config.reader import load_sweep, load_train, parse_train, sweeps, value_at
from cps_ray.config.schema import absolute, locate, relative
from cps_ray.config.space import apply
from cps_ray.config.train import TrainConfig
from cps_ray.datasets.loader import check_data, eval_batches, hidden_batches, train_batches, train_data
from cps_ray.datasets.open import open_data
from cps_ray.datasets.shards import Shards
from cps_ray.datasets.subsets import labeled_subset
from cps_ray.engine.batch import Batch
from cps_ray.engine.cpu.threads import tune_cpu
from cps_ray.engine.evaluation import evaluate, evaluate_hidden, summarise
from cps_ray.engine.loop import fit
from cps_ray.engine.normalisation import padding_color
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state
from cps_ray.errors import ConfigError, DivergedError
from cps_ray.files import write_json
from cps_ray.search.records import environment
from cps_ray.text import nearest

Changes = dict[str, Any]
T = TypeVar("T")

_CUTMIX = {"method": "cps", "cps.mix": "cutmix", "cps.images": "unlabeled"}
VARIANTS: dict[str, Changes] = {
    "supervised": {"method": "supervised"},
    "upper bound": {
        "method": "supervised",
        "data.labeled": 1.0,
        "data.labeled_list": None,
        "data.unlabeled_list": None,
    },
    "mean teacher": {"method": "mean_teacher", "ema.decay": 0.99},
    "self-training": {"method": "fixmatch", "fixmatch.view": "weak", "fixmatch.confidence": 0.0},
    "fixmatch": {"method": "fixmatch"},
    "unimatch": {"method": "unimatch"},
    "unimatch v2": {"method": "unimatch", "unimatch.version": "v2", "ema.decay": 0.996},
    "cps": {"method": "cps", "cps.mix": "none", "cps.images": "unlabeled"},
    "cps on all images": {"method": "cps", "cps.mix": "none", "cps.images": "all"},
    "cps + cutmix": _CUTMIX,
    "oracle": {**_CUTMIX, "cps.cutmix_partner": "other"},
    "shuffled control": {**_CUTMIX, "cps.cutmix_partner": "other"},
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
_OTHER_LABELS: dict[str, type[Ranks]] = {"oracle": TrueMasks, "shuffled control": ShuffledLabels}
"""Variants in which networks learn from something else than each other's pseudo labels. No setting says so: only a benchmark may."""


def variants(config: TrainConfig, chosen: Mapping[str, Changes]) -> dict[str, TrainConfig]:
    """Returns the training with the changes of each variant. Raises ConfigError for changes that are no valid training."""
    return {name: _changed(config, changes, name.strip()) for name, changes in chosen.items()}


def _changed(config: TrainConfig, changes: Changes, where: str) -> TrainConfig:
    """Applies changes. The training is evaluated once, at its end: only steps are timed, and no score selects a model."""
    steps = changes.get("schedule.steps", config.schedule.steps)
    return apply(config, {**changes, "schedule.eval_every": steps}, where)


def train_and_evaluate(
    raw: dict[str, Any],
    split: str,
    threads: int,
    ranks_type: type[Ranks] = Ranks,
    on_images: Callable[[str, Sequence[str], torch.Tensor], None] | None = None,
) -> Figures:
    """Trains to the last step. Returns the seconds of all steps, the last losses, and the scores of the last networks on `split`.

    `ranks_type`: what networks learn from in place of each other's pseudo labels. `on_images`: as in `evaluate`. A training that diverges
    returns the reason, under `failed`.
    """
    config = parse_train(raw, "bench")
    device = torch.device("cuda" if config.resources.gpus_per_worker > 0 and torch.cuda.is_available() else "cpu")
    tune_cpu(threads)
    shards, ranks = open_data(config.data), ranks_type(device=device)
    data = train_data(shards, config)
    state = build_state(config, len(shards.classes), ranks)
    batches: Iterator[Batch] = train_batches(data, config, threads=threads, fill=padding_color(config.model))
    if isinstance(ranks, TrueMasks):
        batches = with_true_masks(batches, ranks, data, config)
    last: Figures = {}
    begin = time.perf_counter()
    try:
        fit(
            data.weigh(config),
            state,
            batches,
            lambda _: {},
            lambda metrics, _: not last.update(metrics),  # update returns None, so this is True: continue
        )
    except DivergedError as err:
        return {"failed": str(err)}
    seconds = time.perf_counter() - begin
    classes = shards.classes
    images = eval_batches(shards, split, threads=threads)
    counts = evaluate(config, state.evaluated, images, len(classes), ranks, on_images)
    scores = summarise(counts, classes, split)
    unlabeled = hidden_batches(data, config.evaluation.hidden_images)
    hidden = evaluate_hidden(config, state.evaluated, unlabeled, classes, ranks)
    return {"seconds": seconds, **last, **hidden, **scores}


def run(args: argparse.Namespace) -> int:
    """Trains what is not in the JSON file yet, records each run as it ends, and prints the tables; of a record, prints them alone."""
    if args.along is not None and args.png is None:
        raise ConfigError("--along: is drawn into the file of --png. Name one.")
    if args.file.suffix == ".json":
        comparison, runs = _recorded(args)
        _show(comparison, runs, args)
        return 0
    args.split, args.seeds = args.split or "test", args.seeds or [1, 2, 3]
    config, draws = _training(args)
    chosen = _chosen(args)
    shards = open_data(config.data)
    if not shards.index(args.split).labeled.any():
        raise ConfigError(
            f"--split {args.split}: must have masks to be evaluated on, but {config.data.shards} has none there."
        )
    for name, why in impossible(config, shards).items():
        if name == args.control:
            raise ConfigError(f"--control {name}: {why}")
        if chosen.pop(name, None) is not None:
            print(f"{name} is left out: {why}", flush=True)
    pairs = [(draw, seed) for draw in draws for seed in dict.fromkeys(args.seeds)]
    comparison = Comparison(variants(config, chosen), args.control, args.split, pairs)
    for training in comparison.trainings.values():
        check_data(open_data(training.data), training, evaluated=())  # now, and not after hours
    base = None if args.json is None else str(args.json.parent.absolute())
    record = {
        "config": config.dump(base),
        "data": shards.manifest.sha256,
        "split": args.split,
        "jobs": args.jobs,
        "torch": torch.__version__,
        "variants": {name.strip(): changes for name, changes in chosen.items()},
        "runs": {},
    }
    if args.json is not None and args.json.exists():
        _take_up(args.json, record)

    def save() -> None:
        if args.json is not None:
            portable = _changes_with_paths(record["variants"], relative, args.json.parent.absolute())
            write_json(args.json, {**record, "variants": portable, "comparison": comparison.figures(record["runs"])})

    save()
    commit = environment()["commit"]
    for key, figures in _run_all(comparison, args.jobs, record["runs"]):
        record["runs"][key] = {**figures, "commit": commit}
        save()
        print(f"{key}: {figures.get('failed') or round(100 * figures[f'{args.split}/miou'], 2)}", flush=True)
    _show(comparison, record["runs"], args)
    return 0


def _show(comparison: Comparison, runs: Mapping[str, Figures], args: argparse.Namespace) -> None:
    """Prints the tables, and draws the picture that is asked for."""
    wide().print(table(comparison, runs, args.file.name))
    wide().print(further_table(comparison, runs))
    if args.png is not None:
        picture = gains_picture(comparison, runs) if args.along is None else along_picture(comparison, runs, args.along)
        picture.save(args.png)


def _recorded(args: argparse.Namespace) -> tuple[Comparison, dict[str, Figures]]:
    """Returns what the record holds, of the variants of `--only` and the control. ConfigError if it is none."""
    path: Path = args.file
    flags = ("set", "variant", "draws", "seeds", "split", "json")
    if given := [f"--{flag}" for flag in flags if getattr(args, flag)]:
        raise ConfigError(f"{path}: is a record and is only shown; {given[0]} would change nothing. Remove it.")
    record = _read(path)
    known = record["variants"]
    only = [*known] if args.only is None else list(dict.fromkeys([args.control, *args.only]))
    for name in (*only, args.control):
        if name not in known:
            raise ConfigError(f"{path}: has no variant {name!r}; it has {', '.join(known)}.")
    config = parse_train(record["config"], str(path), path.parent.absolute())
    trainings = variants(config, {name: known[name] for name in only})
    drawn: set[tuple[int, int]] = set()
    seeds: set[int] = set()
    for name, training in trainings.items():
        draw = r" draw (-?\d+)" if is_drawn(training.data) else "()"  # as `Comparison.key` names runs
        for key in record["runs"]:
            if found := re.fullmatch(rf"{re.escape(name)}{draw} seed (-?\d+)", key):
                seeds.add(int(found[2]))
                drawn |= {(int(found[1]), int(found[2]))} if found[1] else set()
    pairs = sorted(drawn or {(config.data.subset_seed, seed) for seed in seeds})
    return Comparison(trainings, args.control, record["split"], pairs), record["runs"]


def _read(path: Path) -> dict[str, Any]:
    """Returns a record. ConfigError if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        parse_train(found["config"], str(path), path.parent.absolute())
        record = {name: found[name] for name in ("config", "data", "split", "variants", "runs")}
        record["variants"] = _changes_with_paths(record["variants"], absolute, path.parent.absolute())
        record["runs"] = dict(record["runs"])
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as err:
        raise ConfigError(f"{path}: must be a record of `bench methods`: {err} Name another file.") from err
    return record


def _changes_with_paths(named: Mapping[str, Changes], change: Callable[..., Any], base: Path) -> dict[str, Changes]:
    """Returns the changes of variants with the paths in them made `relative` to the folder `base`, or `absolute` again."""
    return {
        name: {
            key: change(TrainConfig, locate(TrainConfig, {}, key), value, base) for key, value in dict(changes).items()
        }
        for name, changes in dict(named).items()
    }


def _training(args: argparse.Namespace) -> tuple[TrainConfig, list[int]]:
    """Reads the training of the file. Returns it and the draws of labelled images to train on; each run sets seed and draw."""
    try:
        config = load_train(args.file)
    except ConfigError as err:
        mistyped = not args.file.exists() and nearest(args.file.stem, sweeps())
        if "this is a sweep" not in str(err) and not mistyped:
            raise
        config = load_sweep(args.file).train
    config = _changed(config, read_changes(args.set, "--set"), "--set")
    if args.draws is not None and not is_drawn(config.data):
        raise ConfigError(
            "--draws: `data.labeled` must be a count, or a fraction below 1, of which other images can be drawn, but it is "
            f"{config.data.labeled or config.data.labeled_list}. Set it, such as --set data.labeled=0.125, or leave --draws out."
        )
    draws = [config.data.subset_seed] if args.draws is None else list(range(args.draws))
    return apply(config, {"seed": 0, "data.subset_seed": 0}, "bench"), draws


def read_changes(texts: list[str], where: str) -> Changes:
    """Reads settings written as KEY=VALUE; paths are relative to the working directory. ConfigError, beginning with `where`."""
    changes: Changes = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"{where} {text}: must be KEY=VALUE, such as optim.lr=0.01.")
        # Absolute, so that a record says which file was meant, whatever the working directory is next time.
        at = locate(TrainConfig, {}, name)
        changes[name] = value_at(TrainConfig, at, value, f"{where} {text}")
    return changes


def _chosen(args: argparse.Namespace) -> dict[str, Changes]:
    """Returns the changes of each variant to be trained: of those of `--only`, of the control, and of those of `--variant`."""
    known = [name.strip() for name in VARIANTS]
    unknown = [name for name in args.only or [] if name not in known]
    if unknown:
        raise ConfigError(f"--only {unknown[0]!r}: must be one of {', '.join(known)}.")
    only = known if args.only is None else [*args.only, args.control]
    chosen = {name: changes for name, changes in VARIANTS.items() if name.strip() in only}
    for text in args.variant:
        name, colon, words = text.partition(":")
        name = name.strip()
        if not colon or not name:
            raise ConfigError(
                f"--variant {text!r}: must be 'NAME: KEY=VALUE ...', such as 'half weight: cps.weight=0.5'."
            )
        if name in known or name in chosen:
            raise ConfigError(f"--variant {name}: there is a variant of this name already; take another name.")
        try:
            chosen[name] = read_changes(shlex.split(words), f"--variant {name}:")
        except ValueError as err:  # a quote that does not end
            raise ConfigError(f"--variant {text!r}: cannot be divided into words: {err}.") from err
    if args.control not in {name.strip() for name in chosen}:
        names = [*known, *(name for name in chosen if name.strip() not in known)]
        raise ConfigError(f"--control {args.control!r}: must be one of {', '.join(names)}.")
    return chosen


def impossible(config: TrainConfig, shards: Shards) -> dict[str, str]:
    """Returns the variants that this data cannot have, and why."""
    index = shards.index("train")
    unlabeled = labeled_subset(config.data, index).unlabeled
    without = int((~index.labeled[unlabeled]).sum())
    why: dict[str, str] = {}
    if without:
        masks = f"it needs the masks of all unlabelled images, but {without} of {len(unlabeled)} have none."
        why |= {"upper bound": masks, "oracle": masks}
    if config.data.unlabeled_batch // config.compute.accumulate < 2:
        why["shuffled control"] = (
            "it needs at least two unlabelled images that pass the networks at once, but there is one."
        )
    return why


def _take_up(path: Path, record: dict[str, Any]) -> None:
    """Adds the runs and variants of the file to `record`. Raises ConfigError if they are of other data, another training or another
    split, and cannot be compared."""
    found = _read(path)
    config = parse_train(found["config"], str(path), path.parent.absolute()).dump(str(path.parent.absolute()))
    data, split, named, runs = (found[key] for key in ("data", "split", "variants", "runs"))
    for section, wanted in record["config"].items():
        if config[section] != wanted:
            raise ConfigError(
                f"--json {path}: its runs must be of the same training, but `{section}` was {config[section]} there and is "
                f"{wanted} here. Name another file."
            )
    for name, wanted in record["variants"].items():
        # As JSON: tuples and lists are then one thing.
        if name in named and json.loads(json.dumps(wanted)) != named[name]:
            raise ConfigError(
                f"--json {path}: the runs of {name!r} must have the same changes, but they were {named[name]} there and are "
                f"{wanted} here. Name another file, or the variant otherwise."
            )
    if split != record["split"]:
        raise ConfigError(
            f"--json {path}: its runs were evaluated on {split}, not on {record['split']}. Name another file."
        )
    if data != record["data"]:
        raise ConfigError(
            f"--json {path}: its runs were trained on other shards in the same folder. Name another file."
        )
    record["variants"] = {**named, **record["variants"]}
    record["runs"] = runs


def _run_all(comparison: Comparison, jobs: int, runs: Mapping[str, Figures]) -> Iterator[tuple[str, Figures]]:
    """Trains what `runs` lacks and yields (key, figures) as runs end: pair by pair, so that all variants advance alike."""
    calls: dict[str, Callable[[], Figures]] = {}
    for pair in comparison.pairs:
        for name in comparison.trainings:
            key = comparison.key(name, pair)
            if key not in runs:
                raw, ranks_type = comparison.config(name, pair).dump(), _OTHER_LABELS.get(name, Ranks)
                calls[key] = partial(train_and_evaluate, raw, comparison.split, threads_of(jobs), ranks_type)
    yield from in_processes(jobs, calls)


def threads_of(jobs: int) -> int:
    """Returns how many threads each of `jobs` trainings at once has: its share of the cores, and no more than OMP_NUM_THREADS says. Two
    commands that both take all cores wait for each other's threads: their trainings become ten times slower."""
    return max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // jobs))


def in_processes(jobs: int, calls: Mapping[str, Callable[[], T]]) -> Iterator[tuple[str, T]]:
    """Makes `jobs` of the calls at once, in their order, and yields (key, what it returned) as they end."""
    spawn = multiprocessing.get_context("spawn")
    # A process per call, so that no training begins with the memory or the thread settings of another.
    with ProcessPoolExecutor(jobs, mp_context=spawn, max_tasks_per_child=1, initializer=end_with_parent) as pool:
        keys = {pool.submit(call): key for key, call in calls.items()}
        try:
            for future in as_completed(keys):
                yield keys[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # else an error would wait for all trainings


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone: a killed benchmark leaves no training behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
