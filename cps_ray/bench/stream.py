"""`bench stream`: compares the stream in a Ray Train worker with a DataLoader and with bare decoding; pass boundaries; memory."""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from cps_ray.bench import wide
from cps_ray.bench.rivals import Pair, bare, data_loader, pairs_of
from cps_ray.config.reader import parse_train
from cps_ray.config.train import SyntheticConfig, TrainConfig
from cps_ray.datasets.synthetic import CLASSES, PALETTE, draw_scene, write_synthetic

_BATCH = 8
_ENDLESS = 10**7
"""Steps of a training that a measurement always ends before."""
_WARM_UP_S = 4.0
_THREADS = os.cpu_count() or 1

Figures = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """Raw files of a data set, and its shards."""

    name: str
    crop: int
    shards: Path
    labeled: Sequence[Pair]
    unlabeled: Sequence[Pair]


def _training_config(shards: Path, crop: int, labeled: int, *, steps: int = _ENDLESS) -> TrainConfig:
    data = {
        "shards": str(shards),
        "labeled": labeled,
        "crop_px": [crop, crop],
        "labeled_batch": _BATCH,
        "unlabeled_batch": _BATCH,
    }
    schedule = {"steps": steps, "eval_every": steps}
    return parse_train(
        {"data": data, "model": {"encoder": "resnet18"}, "optim": {"lr": 0.1}, "schedule": schedule}, "bench"
    )


# ------------------------------------------------------------------------------------------------------------ data


def _prepare(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "cps_ray.prepare", *arguments], check=True, stdout=subprocess.DEVNULL)


def _draw(folder: Path, count: int, suffix: str) -> None:
    """Draws street scenes of 2048x1024 px in Cityscapes' layout, the first two for val. Scenes that are there are kept."""
    for number in range(count):
        split, name = ("val", f"b_{number:06d}_000019") if number < 2 else ("train", f"a_{number:06d}_000019")
        image = folder / f"leftImg8bit/{split}/x/{name}_leftImg8bit.{suffix}"
        mask = folder / f"gtFine/{split}/x/{name}_gtFine_labelTrainIds.png"
        if mask.exists():  # it is written after the image
            continue
        for path in (image, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        pixels, ids = draw_scene(np.random.default_rng(number), 1024, 2048)
        quality = [cv2.IMWRITE_JPEG_QUALITY, 92] if suffix == "jpg" else []
        cv2.imwrite(str(image), cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), quality)
        cv2.imwrite(str(mask), ids)


def _wide(work: Path, count: int, suffix: str, *settings: str) -> Workload:
    """Returns wide scenes prepared with the options `settings`; the rivals read the raw files, which have no such options."""
    raw, shards = work / f"wide-{suffix}", work / "-".join((f"wide-{suffix}", *settings, "shards"))
    _draw(raw, count, suffix)
    recipe = work / f"wide-{suffix}.yaml"
    classes = "".join(f"  - {{name: {n}, color: {list(c)}}}\n" for n, c in zip(CLASSES, PALETTE, strict=True))
    splits = "".join(
        f"  {split}: {{images: 'leftImg8bit/{split}/*/{{id}}_leftImg8bit.{suffix}', "
        f"masks: 'gtFine/{split}/*/{{id}}_gtFine_labelTrainIds.png'}}\n"
        for split in ("train", "val")
    )
    recipe.write_text(f"classes:\n{classes}splits:\n{splits}")
    if not shards.exists():
        _prepare("folder", str(raw), str(shards), "--recipe", str(recipe), *settings)
    pairs = pairs_of(raw, f"leftImg8bit/train/x/*.{suffix}", "gtFine/train/x/*.png")
    num_labeled = max(_BATCH, len(pairs) // 4)
    mean_mb = sum(os.path.getsize(image) for image, _ in pairs) / len(pairs) / 2**20
    unlabeled = [(image, None) for image, _ in pairs[num_labeled:]]
    return Workload(
        " ".join((f"2048x1024 {suffix} ({mean_mb:.1f} MB)", *settings)), 800, shards, pairs[:num_labeled], unlabeled
    )


def _camvid(work: Path, raw: Path) -> Workload:
    shards = work / "camvid-shards"
    if not shards.exists():
        _prepare("camvid", str(raw), str(shards))
    pairs = pairs_of(raw, "train/*", "trainannot/*")
    return Workload("CamVid 480x360 jpg", 320, shards, pairs[:46], [(image, None) for image, _ in pairs[46:]])


# ----------------------------------------------------------------------------------------------------------- speed


@contextmanager
def _cluster() -> Any:
    from cps_ray.on_ray.cluster import connected

    with connected(None) as cluster:
        yield cluster


def _in_new_process(measure: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls `measure` in a process of its own, which has nothing in memory that ran before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments, **options).result()


def _measure_stream(config: TrainConfig, work: Path, warm_s: float, seconds: float | None) -> Figures:
    """Measures the stream on a local cluster that ends with it, so that Ray takes nothing from the rivals."""
    from cps_ray.on_ray.measure import measure_stream

    with _cluster():
        figures = measure_stream(config, work / "ray", warm_s=warm_s, seconds=seconds)
    return figures | {"images_per_s": len(figures["step_s"]) * figures["images"] / sum(figures["step_s"])}


def _turn(load: Workload, work: Path, seconds: float) -> dict[str, Figures]:
    """Measures the stream and each rival once."""
    config = _training_config(load.shards, load.crop, len(load.labeled))
    stream = _measure_stream(config, work, _WARM_UP_S, seconds)
    files = (load.labeled, load.unlabeled, load.crop)
    loaders = {
        f"DataLoader, {workers} process{'es' * (workers > 1)}": _in_new_process(
            data_loader, *files, batch=_BATCH, workers=workers, warm_s=_WARM_UP_S, seconds=seconds
        )
        for workers in (1, 2)
    }
    return {"stream": stream} | loaders | {"bare decoding": _in_new_process(bare, *files, seconds, _THREADS)}


def _speed(loads: Sequence[Workload], work: Path, rounds: int, seconds: float, console: Console) -> list[Figures]:
    rows: list[Figures] = []
    for load in loads:
        turns = [_turn(load, work, seconds) for _ in range(rounds)]
        table = Table("", "images/s", "of the stream", "first batch s", title=f"{load.name}, crop {load.crop} px")
        for name in turns[0]:
            rates = [turn[name]["images_per_s"] for turn in turns]
            ratio = median(turn["stream"]["images_per_s"] / turn[name]["images_per_s"] for turn in turns)
            firsts = [turn[name]["first_s"] for turn in turns if "first_s" in turn[name]]
            first = f"{median(firsts):.2f}" if firsts else ""
            rate_range = f"{median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"
            table.add_row(name, rate_range, "" if name == "stream" else f"stream is {ratio:.2f} of it", first)
            rows.append(
                {"data": load.name, "who": name, "images_per_s": rates, "stream_over_it": ratio, "first_s": firsts}
            )
        console.print(table)
    return rows


# -------------------------------------------------------------------------------------------------- passes, memory


def _synthetic(work: Path, train: int, height: int, width: int) -> Path:
    shards = work / f"synthetic-{train}-{height}x{width}"
    if not shards.exists():
        sizes = {"train": train, "val": 2, "test": 2, "height_px": height, "width_px": width, "seed": 0}
        write_synthetic(shards, SyntheticConfig(**sizes))
    return shards


def _passes(work: Path, console: Console) -> Figures:
    """Measures what a pass boundary costs: 46 labelled images beside 3 000 unlabelled ones, four passes over the latter."""
    labeled, unlabeled = 46, 3000
    passes, per_pass = 4, unlabeled // _BATCH
    shards = _synthetic(work, labeled + unlabeled, 96, 128)
    config = _training_config(shards, 96, labeled, steps=passes * per_pass + 1)
    figures = _measure_stream(config, work, 0.0, None)
    step_s = np.array(figures["step_s"][-(passes - 1) * per_pass :])  # the first pass is the warm-up
    steps = np.arange(len(step_s)) + per_pass + 1
    usual = float(np.median(step_s))
    costs = {}
    for name, count in (("unlabelled", unlabeled), ("labelled", labeled)):
        # Steps in which a pass begins. Of unlabelled images, which are prefetched, neighbouring steps may bear the cost. The
        # labelled images begin a pass about every sixth step: with neighbours, hardly any other steps would be left.
        begins = np.flatnonzero((steps * _BATCH) // count > ((steps - 1) * _BATCH) // count)
        near = (
            np.unique(np.clip(begins[:, None] + np.arange(-3, 2), 0, len(step_s) - 1))
            if name == "unlabelled"
            else begins
        )
        usual_steps = np.setdiff1d(np.arange(len(step_s)), near)
        extra = (step_s[near].mean() - step_s[usual_steps].mean()) * len(near) / (passes - 1)
        costs[name] = {"extra_s_per_pass": float(extra), "fraction_of_pass": float(extra / (usual * per_pass))}
    table = Table("boundary of", "extra per pass of 3 000", "fraction of the pass", title="pass boundaries")
    for name, cost in costs.items():
        table.add_row(name, f"{1000 * cost['extra_s_per_pass']:.1f} ms", f"{100 * cost['fraction_of_pass']:.2f} %")
    console.print(table)
    return {"usual_step_s": usual, "images_per_s": figures["images_per_s"]} | costs


def _memory(work: Path, console: Console) -> Figures:
    """Measures memory with 320 and with 3 200 unlabelled images, over equally many steps: one pass over the larger set."""
    table = Table("unlabelled images", "MB of shards", "worker MB", "shared memory MB", title="memory")
    rows = []
    for count in (320, 3200):
        shards = _synthetic(work, 46 + count, 256, 384)
        config = _training_config(shards, 256, 46, steps=3200 // _BATCH + 1)
        figures = _measure_stream(config, work, 0.0, None)
        size = sum(path.stat().st_size for path in shards.iterdir() if path.is_file())
        rows.append(
            {"unlabeled": count, "shards_bytes": size} | {key: figures[key] for key in ("worker_bytes", "shared_bytes")}
        )
        table.add_row(str(count), *(f"{value / 2**20:.0f}" for value in list(rows[-1].values())[1:]))
    ratios = {key: rows[1][key] / rows[0][key] for key in ("worker_bytes", "shared_bytes")}
    table.add_row("ratio", "", *(f"{ratio:.3f}" for ratio in ratios.values()))
    console.print(table)
    return {"rows": rows, "ratios": ratios}


def run(args: argparse.Namespace) -> int:
    """Measures the chosen parts, prints tables, writes the JSON; returns 0."""
    console = wide()
    parts = args.only or ("speed", "passes", "memory")
    figures: Figures = {"cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory(prefix="cps-ray-bench-") as temporary:
        work = (args.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        if "speed" in parts:
            loads = [_camvid(work, args.camvid.absolute())] if args.camvid else []
            kinds = (("png",), ("png", "--uncompressed"), ("jpg",)) if args.wide else ()
            loads += [_wide(work, args.wide, *kind) for kind in kinds]
            figures["speed"] = _speed(loads, work, args.rounds, args.seconds, console)
        if "passes" in parts:
            figures["passes"] = _passes(work, console)
        if "memory" in parts:
            figures["memory"] = _memory(work, console)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0
