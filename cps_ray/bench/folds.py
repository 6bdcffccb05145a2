"""`bench folds`: what a verdict by cross-validation says of few masks, and what the same trainings reach on many images.

Sweeps as a user runs them, each on labelled images of its own; then all trainings of their folds, and the models that are delivered,
are evaluated on images that none of them has seen.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from cps_ray.bench import wide
from cps_ray.bench.methods import in_processes, threads_of
from cps_ray.config.reader import load_train, parse_train
from cps_ray.config.space import apply
from cps_ray.config.train import TrainConfig
from cps_ray.datasets.loader import eval_batches
from cps_ray.datasets.open import open_data
from cps_ray.engine.cpu.threads import tune_cpu
from cps_ray.engine.evaluation import evaluate, summarise
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import load_networks
from cps_ray.errors import ConfigError, CpsRayError
from cps_ray.files import read_json, write_json
from cps_ray.results import open_sweep
from cps_ray.runs import CONFIG_FILE, checkpoints, read_checkpoint

Figures = dict[str, Any]
_ARMS = ("best", "supervised-only")
_TRUTH_SEED = 1000
"""Seed of the scenes that the truth is measured on: no set is drawn with it."""


def run(args: argparse.Namespace) -> int:
    """Runs the sweeps that the folder lacks, evaluates their trainings, prints the table; returns 0."""
    folder = args.folder.absolute()
    rows = []
    for number in range(1, args.sets + 1):
        root = folder / f"set-{number}"
        minutes = _sweep(root, args, number)
        rows.append({"set": number, "minutes": minutes, **_said(root), **_true(root, folder, args)})
        wide().print(table(rows[-1:], f"set {number}"))
    wide().print(
        table(rows, f"{args.sets} sets of {_num_masks(args)} masks, {args.folds} folds; truth on {args.images} images")
    )
    if args.json is not None:
        write_json(args.json, {"masks": _num_masks(args), "folds": args.folds, "images": args.images, "sets": rows})
    return 0


def _num_masks(args: argparse.Namespace) -> int:
    return int(args.labeled + 2 * args.held)


def _sweep(root: Path, args: argparse.Namespace, number: int) -> float:
    """Runs a sweep to its end, and returns the minutes that it took, also if that was earlier."""
    record = root.parent / f"{root.name}.json"
    known = read_json(record)
    changes = {
        "name": root.name,
        "train.data.shards": str(root.parent / f"shards-{number}"),
        "train.data.synthetic.val": args.held,
        "train.data.synthetic.test": args.held,
        "train.data.synthetic.seed": number,
        "train.data.labeled": args.labeled,
        "budget.trials": 1,
        "baselines": "{supervised-only: {method: supervised}}",
        "final": f"{{folds: {args.folds}}}",
    }
    words = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    words += [word for each in args.set for word in ("--set", each)]
    if known is not None:
        if known.get("words") != words:
            raise ConfigError(
                f"{root}: must be a sweep with the settings that are asked for, but {record.name} has others. Ask for the same, or name another "
                "folder."
            )
        return float(known["minutes"])
    begin = time.monotonic()
    command = [sys.executable, "-m", "cps_ray.sweep", "quickstart", "--output", str(root.parent), *words]
    if subprocess.run(command).returncode != 0:
        raise CpsRayError(f"{root}: its sweep has failed, see above. Remove the folder, and begin again.")
    minutes = (time.monotonic() - begin) / 60
    write_json(record, {"minutes": minutes, "words": words})
    return minutes


def _said(root: Path) -> Figures:
    """Returns the verdict's gain and interval, and the score that it gives the model that is delivered."""
    final = open_sweep(root).summary["final"]
    found = final["difference"]["supervised-only"]
    return {name: found[name] for name in ("gain", "low", "high")} | {
        "folds_miou": final["arms"]["best"]["test/miou"]["mean"]
    }


def _true(root: Path, folder: Path, args: argparse.Namespace) -> Figures:
    """Returns the gains of the folds' trainings on the images of the truth, their mean, and the delivered model's mIoU."""
    runs = {f"{arm}-fold{fold}": arm for fold in range(1, args.folds + 1) for arm in _ARMS}
    names = [*runs, "best-all"]
    calls = {
        name: partial(
            score, _on_truth(root / "final" / name, folder, args).dump(), root / "final" / name, threads_of(args.jobs)
        )
        for name in names
    }
    mious = dict(in_processes(args.jobs, calls))
    ours, theirs = (np.array([mious[name] for name, of in runs.items() if of == arm]) for arm in _ARMS)
    gains = ours - theirs
    return {
        "true_gain": float(gains.mean()),
        "true_gains": gains.tolist(),
        "true_folds_miou": float(ours.mean()),
        "true_delivered_miou": mious["best-all"],
    }


def _on_truth(run_dir: Path, folder: Path, args: argparse.Namespace) -> TrainConfig:
    """Returns the training's settings with other images to test on: as many as are asked for, of scenes like its own."""
    config = load_train(run_dir / CONFIG_FILE)
    assert config.data.synthetic is not None
    scenes = {
        "data.shards": str(folder / "truth"),
        "data.synthetic.test": args.images,
        "data.synthetic.seed": _TRUTH_SEED,
    }
    return apply(config, {**scenes, "data.folds": None, "data.further_labeled": [], "data.fingerprint": None}, "bench")


def score(raw: Mapping[str, Any], run_dir: Path, threads: int) -> float:
    """Returns the mIoU on test of a training's last checkpoint."""
    config = parse_train(dict(raw), "bench")
    tune_cpu(threads)
    shards, ranks = open_data(config.data), Ranks()
    checkpoint, _ = checkpoints(run_dir)[-1]
    networks = load_networks(config, read_checkpoint(checkpoint), len(shards.classes), source=str(checkpoint))
    only_a = apply(config, {"evaluation.networks": "a"}, "bench")
    counts = evaluate(only_a, networks, eval_batches(shards, "test", threads=threads), len(shards.classes), ranks)
    return float(summarise(counts, shards.classes, "test")["test/miou"])


def _word(row: Figures) -> str:
    return "better" if row["low"] > 0 else "worse" if row["high"] < 0 else "not distinguishable"


def table(rows: list[Figures], title: str) -> Table:
    """Returns the table of what the sweeps said and what is true, in points and percent."""
    columns = (
        "said",
        "interval",
        "true gain",
        "inside",
        "folds' mIoU",
        "theirs in truth",
        "delivered in truth",
        "minutes",
    )
    shown = Table("set", *columns, title=title)
    for row in rows:
        points = {
            name: 100 * row[name]
            for name in ("gain", "low", "high", "true_gain", "folds_miou", "true_folds_miou", "true_delivered_miou")
        }
        shown.add_row(
            str(row["set"]),
            f"{_word(row)}, {points['gain']:+.1f}",
            f"{points['low']:+.1f} to {points['high']:+.1f}",
            f"{points['true_gain']:+.1f}",
            "yes" if row["low"] <= row["true_gain"] <= row["high"] else "no",
            f"{points['folds_miou']:.1f}",
            f"{points['true_folds_miou']:.1f}",
            f"{points['true_delivered_miou']:.1f}",
            f"{row['minutes']:.1f}",
        )
    return shown
