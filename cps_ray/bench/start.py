"""`bench start`: from the wish to train to the first evaluation: a plain script, a cold worker group, a warm one."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from cps_ray.bench import wide
from cps_ray.config.reader import read_sweep, sweep_file
from cps_ray.config.space import apply
from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.datasets.open import open_data
from cps_ray.on_ray.measure import largest_mb, measure_starts, resident_mb
from cps_ray.runs import CONFIG_FILE

Figures = dict[str, Any]

_PLAIN = """
import sys
from pathlib import Path
import torch
from cps_ray.config.reader import load_train
from cps_ray.datasets.loader import eval_batches, train_batches, train_data
from cps_ray.datasets.open import open_data
from cps_ray.engine.evaluation import evaluate, summarise
from cps_ray.engine.loop import fit
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state

config = load_train(Path(sys.argv[1]))
shards = open_data(config.data)
state = build_state(config, len(shards.classes), Ranks())
validate = lambda state: summarise(
    evaluate(config, state.evaluated, eval_batches(shards, "val"), len(shards.classes), Ranks()), shards.classes, "val")
data = train_data(shards, config)
fit(data.weigh(config), state, train_batches(data, config), validate, lambda metrics, state: False)
"""
"""Trains to its first evaluation by the engine alone, without Ray: what a script of one's own would do."""


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes the JSON."""
    config = _config(args)
    open_data(config.data)  # drawn on first use
    found: Figures = {"plain": []}
    with tempfile.TemporaryDirectory(prefix="cps-ray-bench-") as work:
        plain = Path(work, CONFIG_FILE)
        plain.write_text(dump_yaml(config.dump(work)))
        for _ in range(args.rounds):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", _PLAIN, str(plain)], check=True)
            found["plain"].append(time.perf_counter() - begin)
        found |= measure_starts(config, Path(work), rounds=args.rounds, again=args.warm)
        if args.trials:
            found["sweep"] = _sweep(args, Path(work))
    console = wide()
    console.print(
        f"From the wish to the first evaluation: one step and {len(open_data(config.data).index('val').ids)} images of val, {config.model.encoder}"
    )
    table = Table("start", "median s", "worst s", "of a plain script")
    for name, text in (("plain", "plain script"), ("cold", "cold worker group"), ("warm", "warm worker group")):
        ratio = median(found[name]) / median(found["plain"])
        table.add_row(text, f"{median(found[name]):.2f}", f"{max(found[name]):.2f}", f"{ratio:.2f}")
    console.print(table)
    held = found["held"]
    console.print(f"A worker holds {held[0]} MB after its first training, {held[-1]} MB after {len(held)}.")
    if args.trials:
        sweep = found["sweep"]
        console.print(
            f"Sweep of {args.trials} trials of 20 steps: {sweep['seconds_per_trial']:.2f} s a trial "
            f"({sweep['first_half']:.2f} in the first half, {sweep['second_half']:.2f} in the second), driver {sweep['driver_cpu_s'] / args.trials:.2f} "
            f"CPU s a trial, workers {sweep['workers_mb'][0]} MB early and {sweep['workers_mb'][-1]} MB at the end, driver {sweep['driver_mb'][0]} and "
            f"{sweep['driver_mb'][-1]} MB."
        )
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def _config(args: argparse.Namespace) -> TrainConfig:
    train = read_sweep(sweep_file(args.file), args.set)[0].train
    return apply(train, {"schedule.steps": 1, "schedule.eval_every": 1}, "bench")


def _sweep(args: argparse.Namespace, work: Path) -> Figures:
    """Runs a sweep of short trials as people do, and watches its processes."""
    changes = {
        "budget.trials": args.trials,
        "train.schedule.steps": 20,
        "train.schedule.eval_every": 20,
        "early_stopping": "{type: none}",
        "sampler.type": "random",
        "final.retrain": "none",
    }
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    sets = [word for each in args.set for word in ("--set", each)]
    command = [
        sys.executable,
        "-m",
        "cps_ray.sweep",
        str(args.file),
        "--output",
        str(work),
        "--name",
        "many",
        *sets,
        *words,
    ]
    log = work / "many.log"
    samples: dict[str, list[int]] = {"driver_mb": [], "workers_mb": []}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        cpu = 0.0
        while process.poll() is None:
            time.sleep(5)
            workers = largest_mb("RayTrainWorker")
            if workers and process.poll() is None:
                samples["driver_mb"].append(resident_mb(process.pid))
                samples["workers_mb"].append(workers)
                cpu = _cpu_seconds(process.pid) or cpu
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    events = [json.loads(line) for line in (work / "many" / "events.jsonl").read_text().splitlines()]
    ends = [event["time"] for event in events if event["event"] == "finished"]
    half = len(ends) // 2
    first = next(event["time"] for event in events if event["event"] == "report")
    return {
        "seconds_per_trial": (ends[-1] - first) / (len(ends) - 1),
        "first_half": (ends[half] - ends[0]) / half,
        "second_half": (ends[-1] - ends[half]) / (len(ends) - 1 - half),
        "driver_cpu_s": cpu,
        **{name: [values[len(values) // 5], values[-1]] for name, values in samples.items()},
    }


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
