"""`bench verdict`: whether the interval of a verdict holds what it should. Trains many pairs, then draws few of them and few images again and again."""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from torch import Tensor

from cps_ray.bench import wide
from cps_ray.bench.methods import in_processes, read_changes, threads_of, train_and_evaluate, variants
from cps_ray.config.reader import load_sweep
from cps_ray.config.space import apply
from cps_ray.config.train import TrainConfig
from cps_ray.datasets.loader import check_data
from cps_ray.datasets.open import open_data
from cps_ray.engine.metrics import class_counts
from cps_ray.errors import ConfigError, DivergedError
from cps_ray.files import read_json, write_json, write_whole
from cps_ray.model.intervals import Counts, difference, image_ious

# N trainings of a pool, T that are drawn, I images, C classes, B bootstrap draws.
Figures = dict[str, Any]
Pair = tuple[Counts, Counts]
"""(T, I, 3, C) of one arm and of the other."""
ARMS: dict[str, Figures] = {"cps": {}, "supervised": {"method": "supervised"}}
_TRAININGS, _IMAGES = 3, 60
"""How many are drawn each time: a sweep's seeds, and the images of its test split."""
_RECORD_FILE = "pool.json"
_BOOTSTRAP_DRAWS = 400


def run(args: argparse.Namespace) -> int:
    """Trains what the pool lacks, checks the interval on it, prints the table, writes the JSON."""
    trainings, classes = plan_pool(args)
    missing = {path.stem: (path, training) for path, training in trainings.items() if not path.exists()}
    calls = {
        name: partial(train_and_count, training.dump(), path, threads_of(args.jobs))
        for name, (path, training) in missing.items()
    }
    for number, (name, miou) in enumerate(in_processes(args.jobs, calls), start=1):
        print(f"{name}: test mIoU {100 * miou:.2f} % ({number} of {len(calls)})", flush=True)
    pools = {arm: np.stack([_read(path) for path in trainings if path.stem.startswith(arm)]) for arm in ARMS}
    ours, theirs = pools.values()
    found = {" against ".join(pools): check_coverage(ours, theirs, classes, args.draws)}
    found |= {f"{arm} against {arm}": check_claims(pool, classes, args.draws) for arm, pool in pools.items()}
    title = (
        f"{args.trainings} trainings an arm, each with another {args.vary}, {ours.shape[1]} images; "
        f"{args.draws} draws of {_TRAININGS} trainings and {_IMAGES} images"
    )
    wide().print(table(found, title))
    if args.json is not None:
        counts = {"trainings": len(ours), "images": ours.shape[1], "draws": args.draws}
        write_json(args.json, {"vary": args.vary, **counts, "found": found})
    return 0


def plan_pool(args: argparse.Namespace) -> tuple[dict[Path, TrainConfig], tuple[str, ...]]:
    """Returns the trainings of the pool by their files, pair by pair, and the classes. Raises ConfigError if the folder holds others."""
    folder = args.pool.absolute()
    changes = {
        "data.shards": str(folder / "shards"),
        "data.synthetic.test": 2000,
        "evaluation.networks": "a",
        "evaluation.hidden_images": 0,
        "schedule.steps": args.steps,
        **read_changes(args.set, "--set"),
    }
    arms = variants(load_sweep(Path("quickstart")).train, {arm: {**changes, **own} for arm, own in ARMS.items()})
    for training in arms.values():
        shards = open_data(training.data)
        check_data(shards, training)
    plan = {"vary": args.vary, **{arm: training.dump(str(folder)) for arm, training in arms.items()}}
    record, known = json.loads(json.dumps(plan)), read_json(folder / _RECORD_FILE)
    if known not in (None, record):
        raise ConfigError(
            f"{args.pool}: its trainings must have the settings that are asked for, but {_RECORD_FILE} there has others. "
            "Ask for the same, or name another folder."
        )
    write_json(folder / _RECORD_FILE, record)
    varied = ["seed", "data.subset_seed"] if args.vary == "draw" else ["seed"]
    trainings = {
        folder / f"{arm}-{number}.npz": apply(training, dict.fromkeys(varied, number), arm)
        for number in range(args.trainings)
        for arm, training in arms.items()
    }
    return trainings, shards.classes


def train_and_count(raw: dict[str, Any], path: Path, threads: int) -> float:
    """Trains, and writes the pixel counts of every test image, in the order of their ids. Returns the test mIoU. Raises DivergedError."""
    of_images: dict[str, Counts] = {}

    def count(_: str, ids: Sequence[str], matrices_NCC: Tensor) -> None:
        for image_id, counts_3C in zip(ids, class_counts(matrices_NCC).cpu().numpy(), strict=True):
            of_images[image_id] = of_images.get(image_id, 0) + counts_3C

    figures = train_and_evaluate(raw, "test", threads, on_images=count)
    if "failed" in figures:
        raise DivergedError(f"{path.stem}: {figures['failed']}")
    counts_I3C = np.stack([of_images[image_id] for image_id in sorted(of_images)])
    write_whole(path, partial(_write, counts_I3C))
    return float(figures["test/miou"])


def _write(counts_I3C: Counts, path: Path) -> None:
    with path.open("wb") as file:  # else numpy would put its own suffix after `.tmp`
        np.savez_compressed(file, counts=counts_I3C)


def _read(path: Path) -> Counts:
    with np.load(path) as arrays:
        return np.asarray(arrays["counts"])


def check_coverage(ours: Counts, theirs: Counts, classes: Sequence[str], draws: int, seed: int = 0) -> Figures:
    """Returns how often the interval of few trainings and images holds the gain of the whole pools, (N, I, 3, C) each."""
    whole, rng = difference(ours, theirs, classes), np.random.default_rng(seed)

    def draw() -> Pair:
        # With replacement, so that what is drawn is independent, and the pools' mean is its true mean.
        trainings, images = rng.integers(len(ours), size=_TRAININGS), rng.integers(ours.shape[1], size=_IMAGES)
        return ours[trainings][:, images], theirs[trainings][:, images]

    truth = {name: each["gain"] or 0.0 for name, each in whole.classes.items()}
    return _check((draw() for _ in range(draws)), classes, whole.gain, truth)


def check_claims(pool: Counts, classes: Sequence[str], draws: int, seed: int = 0) -> Figures:
    """Returns how often one arm is told from itself: its trainings are halved at random, and those of one half compared with the others."""
    rng = np.random.default_rng(seed)

    def draw() -> Pair:
        # Without replacement, so that the halves have nothing in common but their arm.
        ours, theirs = np.array_split(rng.permutation(len(pool)), 2)
        images = rng.integers(pool.shape[1], size=_IMAGES)
        ours, theirs = (half[: min(_TRAININGS, len(pool) // 2)] for half in (ours, theirs))
        return pool[ours][:, images], pool[theirs][:, images]

    return _check((draw() for _ in range(draws)), classes, 0.0, dict.fromkeys(classes, 0.0))


def _check(pairs: Iterable[Pair], classes: Sequence[str], truth: float, of_classes: Mapping[str, float]) -> Figures:
    """Returns the true gain, and fractions of the pairs: intervals that hold it, of ours and of a percentile bootstrap; intervals of classes that
    all hold theirs; claims. `half_width`: median."""
    rng, rows = np.random.default_rng(0), []
    for ours, theirs in pairs:
        found = difference(ours, theirs, classes)
        assert found.low is not None
        assert found.high is not None
        known = {name: (each["low"], each["high"]) for name, each in found.classes.items() if name in of_classes}
        low, high = percentile_interval(ours, theirs, rng)
        rows.append(
            {
                "covered": found.low <= truth <= found.high,
                "half_width": (found.high - found.low) / 2,
                "percentile_covered": low <= truth <= high,
                "classes_covered": all(
                    a is None or b is None or a <= of_classes[n] <= b for n, (a, b) in known.items()
                ),
                "better": found.low > 0,
                "worse": found.high < 0,
                "hurt": any(b is not None and b < 0 for _, b in known.values()),
            }
        )
    half_width = float(np.median([row.pop("half_width") for row in rows]))
    fractions = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return {"truth": truth, "half_width": half_width, **fractions}


def percentile_interval(ours: Counts, theirs: Counts, rng: np.random.Generator) -> tuple[float, float]:
    """Returns the 2.5th and the 97.5th percentile of the gain, of trainings and images that are drawn with replacement: what `difference` is
    compared with."""
    both = np.stack([ours, theirs], axis=2).astype(np.float64)  # (T, I, 2, 3, C)
    num_trainings, num_images = both.shape[:2]
    times_BI = rng.multinomial(num_images, np.full(num_images, 1 / num_images), _BOOTSTRAP_DRAWS).astype(np.float64)
    times_BT = rng.multinomial(num_trainings, np.full(num_trainings, 1 / num_trainings), _BOOTSTRAP_DRAWS)
    flat = times_BI @ both.reshape(num_trainings, num_images, -1)  # (T, B, ...)
    miou_TB2 = image_ious(flat.reshape(num_trainings, _BOOTSTRAP_DRAWS, *both.shape[2:]))
    gain_B = ((miou_TB2[..., 0] - miou_TB2[..., 1]).T * times_BT).sum(1) / num_trainings
    low, high = np.percentile(gain_B, [2.5, 97.5])
    return float(low), float(high)


def table(found: Mapping[str, Figures], title: str) -> Table:
    """Returns the table of what was found, in percent and points."""
    columns = ("interval holds", "percentile bootstrap", "says better", "worse", "all classes hold", "a class hurt")
    shown = Table(
        "",
        "true gain",
        "half width",
        *columns,
        title=title,
        caption="wanted: the interval holds in 92 to 98 % of the draws",
    )
    names = ("covered", "percentile_covered", "better", "worse", "classes_covered", "hurt")
    for row, each in found.items():
        cells = (f"{100 * each[name]:.1f} %" for name in names)
        shown.add_row(row, f"{100 * each['truth']:+.2f}", f"{100 * each['half_width']:.2f}", *cells)
    return shown
