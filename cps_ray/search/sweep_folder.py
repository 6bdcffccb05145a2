"""The sweep folder: begun and checked. What is wrong is found here, before any cluster starts."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path

import numpy as np

from cps_ray.config.schema import Where
from cps_ray.config.space import apply
from cps_ray.config.sweep import FINGERPRINT, SweepConfig
from cps_ray.config.train import HELD_OUT, DataConfig, TrainConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.datasets.loader import check_data, evaluated_images, evaluated_sizes, metrics_of, train_data
from cps_ray.datasets.open import HASHES_FILE, fingerprints, open_data
from cps_ray.datasets.shards import Shards
from cps_ray.engine.evaluation import further_scores
from cps_ray.engine.preflight import Preflight, check_sweep
from cps_ray.errors import ConfigError, DataError
from cps_ray.files import read_json, write_text
from cps_ray.results import (
    BEGUN_FILE,
    LOCK_FILE,
    STUDY_FILE,
    SUMMARY_FILE,
    SWEEP_FILE,
    TRIALS_FILE,
    TRIALS_FOLDER,
    resume_command,
)
from cps_ray.search.edits import write_begun
from cps_ray.search.lock import locked
from cps_ray.search.records import EVENTS_FILE
from cps_ray.search.verdict import groups
from cps_ray.text import did_you_mean

SOURCE_FILE = "sweep.source.yaml"


@contextmanager
def begun(config: SweepConfig, source: Path, *, fresh: bool, address: str | None = None) -> Iterator[Path]:
    """Makes the sweep folder with the resolved sweep and the file as written, and holds it until the block ends.

    Raises ConfigError if the folder holds a sweep or anything else; `fresh` moves it aside instead.
    """
    root = config.output / config.name
    with ExitStack() as held:
        # A lock file alone is left by a sweep that was refused.
        if root.exists() and any(path.name != LOCK_FILE for path in root.iterdir()):
            held.enter_context(locked(root))  # else a running sweep's folder would be moved away under it
            if fresh:
                root.rename(root.with_name(f"{root.name}.bak-{time.strftime('%Y%m%d-%H%M%S')}"))
            else:
                _clear(root)
        root.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(root))  # also where there was a lock: a folder that is moved aside takes it along
        write_session(root, config, address, source)
        yield root


def write_session(root: Path, config: SweepConfig, address: str | None, source: Path | None) -> None:
    """Writes what a session begins with: the sweep, the cluster that it was told to join, and the file as written, if that is new."""
    if source is not None:
        write_text(root / SOURCE_FILE, source.read_text(encoding="utf-8"))
    write_begun(root, config, address)
    write_resolved(root, config)


def _clear(root: Path) -> None:
    """Empties a folder that a sweep was refused in before its first trial; ConfigError if there is more to lose."""
    if not (root / SOURCE_FILE).exists():
        raise ConfigError(
            f"{root}: must be empty or a sweep's, but holds other files. Take another --name or --output."
        )
    # Its first trial's folder: before that, a sweep has cost nothing, and a corrected file may take its place.
    if (root / TRIALS_FOLDER).exists():
        summary = read_json(root / SUMMARY_FILE) or {}
        done = summary.get("trials", {})
        state = f"{summary.get('status', 'unfinished')}, {done.get('complete', 0)}/{done.get('budget', '?')} trials complete"
        raise ConfigError(
            f"{root}: already holds a sweep ({state}). Continue: {resume_command(root)}. "
            "Start again: --name NEW, or --fresh to move it aside."
        )
    for name in (BEGUN_FILE, SOURCE_FILE, SWEEP_FILE, STUDY_FILE, SUMMARY_FILE, TRIALS_FILE, EVENTS_FILE, HASHES_FILE):
        (root / name).unlink(missing_ok=True)


def write_resolved(root: Path, config: SweepConfig) -> None:
    """Writes sweep.yaml: every setting, paths relative to the sweep folder."""
    resolved = config.model_dump(mode="json", context={"base": str(root)})
    write_text(root / SWEEP_FILE, dump_yaml(resolved, f"Every setting of this sweep. Resume: {resume_command(root)}"))


def with_fingerprints(config: SweepConfig) -> SweepConfig:
    """Returns the sweep with the fingerprint of its data, unless it has one, and those of baselines on other data."""
    data = config.train.data
    fingerprint = data.fingerprint or fingerprints(open_data(data))
    baselines = {}
    for name, changes in config.baselines.items():
        other = apply(config.train, config.changes(name), f"baseline {name}").data
        # What it has from `train` is of the data of `train`.
        if other.shards != data.shards and data.fingerprint in (None, other.fingerprint):
            unchecked = other.model_copy(update={"fingerprint": None})
            changes = {**changes, "data.fingerprint": fingerprints(open_data(unchecked))}
        baselines[name] = changes
    checked = data.model_copy(update={"fingerprint": fingerprint})
    train = config.train.model_copy(update={"data": checked})
    return config.model_copy(update={"train": train, "baselines": baselines})


def check(config: SweepConfig, where: Where, hashes_in: Path) -> Shards:
    """Checks everything that can be wrong before a cluster starts: data, networks and metric, of trials and of final runs.

    `where`: as `read_sweep` returns it. `hashes_in`: the folder that may say what the data were, as `open_data` takes it.
    """
    shards = open_data(config.train.data, None, hashes_in=hashes_in, setting=FINGERPRINT)
    # Checking takes time: each data set is checked once, however many trainings have it.
    data: list[tuple[DataConfig, str]] = []
    trials = [
        apply(config.train, config.searched_fold(repeat), "trials") for repeat in range(1, config.num_searches + 1)
    ]
    searched = trials[0]
    best, *baselines = final_training_configs(config) or [searched]
    # Each fold leaves other images: one may lack what another has.
    in_folds = [
        [apply(arm, config.fold(fold), "final runs") for arm in (best, *baselines)]
        for fold in range(config.final.folds or 0)
    ]
    for changed in (*trials, best, *baselines, *chain.from_iterable(in_folds)):
        if (changed.data, changed.method) not in data:
            data.append((changed.data, changed.method))
            check_data(open_data(changed.data, None, hashes_in=hashes_in, setting=FINGERPRINT), changed)
    for name, baseline in zip(config.baselines, baselines, strict=False):
        if baseline.data != best.data:
            _check_same_images(name, baseline, best, where)
    _check_repeats(config, best, where)
    check_sweep(Preflight(len(shards.classes), evaluated_sizes(shards, searched)), config, where)
    further = further_scores(config.train.evaluation, config.train.networks)
    known, metric = metrics_of(shards, searched, "val", further), config.objective.metric
    if metric not in known:
        hint = did_you_mean(metric, known) or f" There are {', '.join(known[:6])}, ..."
        raise ConfigError(f"objective.metric: {metric} is not measured on this val split.{hint}")
    for training in (*trials, *(arms[0] for arms in in_folds)):
        if metric not in metrics_of(shards, training, "val", further):
            assert training.data.folds is not None
            raise ConfigError(
                f"objective.metric: must be measured in each fold, but the {len(evaluated_images(shards, training, 'val'))} images of fold "
                f"{training.data.folds.held_out} of 0 to {training.data.folds.count - 1} have no {metric}. Take another metric, such as val/miou, "
                "or fewer folds."
            )
    return shards


def _check_repeats(config: SweepConfig, best: TrainConfig, where: Where) -> None:
    """Raises ConfigError for draws that draw the same, and for groups of which there are none."""
    if config.final.retrain == "none":
        return
    shards = open_data(best.data, None)
    if config.final.draws:
        one, other = (
            train_data(shards, apply(best, {"data.subset_seed": seed}, "final.draws")).subset.labeled for seed in (1, 2)
        )
        if np.array_equal(one, other):
            raise ConfigError(
                f"{where(('final', 'draws'))}: final.draws: must draw some of the {len(one)} labelled images, but train.data.labeled takes all of them."
            )
    if config.final.group_by is not None and not config.final.folds:
        try:
            groups(config.final.group_by, evaluated_images(shards, best, "test").ids)
        except DataError as err:
            raise ConfigError(f"{where(('final', 'group_by'))}: final.{err}") from err


def _check_same_images(name: str, baseline: TrainConfig, best: TrainConfig, where: Where) -> None:
    """Raises ConfigError if a baseline is evaluated on other images than the best: a gain is that of pairs."""
    split = "test" if best.data.folds is None else HELD_OUT
    theirs, ours = (
        (shards.classes, sorted(evaluated_images(shards, each, split).ids))
        for each in (baseline, best)
        for shards in [open_data(each.data, None)]
    )
    if theirs != ours:
        kind = (
            "held-out images (with folds, all arms share their labelled ones)" if split == HELD_OUT else "test images"
        )
        raise ConfigError(
            f"{where(('baselines', name))}: baselines.{name}: must have the classes and {kind} of the best configuration, since they are compared "
            f"image by image, but {baseline.data.shards} has others."
        )


def final_training_configs(config: SweepConfig) -> list[TrainConfig]:
    """Returns the configs of the final runs, as far as they are known before the search."""
    if config.final.retrain == "none":
        return []
    arms = ({}, *map(config.changes, config.baselines))  # {}: the best one itself, here with the values of `train`
    return [apply(config.train, {**config.final.set, **changes, **config.fold(0)}, "final runs") for changes in arms]
