"""What a sweep leaves on disk, derived from the study and the runs' folders each time: tables, history, summary, events."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from optuna.trial import FrozenTrial, TrialState

from cps_ray.config.sweep import ChoiceParam, Param, SweepConfig
from cps_ray.on_ray.trainer import METRICS_FILE, read_metrics
from cps_ray.search.study import Search

EVENTS_FILE = "events.jsonl"
SUMMARY_FILE = "summary.json"
TRIALS_FOLDER = "trials"
FINAL_FOLDER = "final"
_STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}

Event = dict[str, Any]


class Events:
    """What happens, as it happens: a line in events.jsonl, and a call to whoever listens."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / EVENTS_FILE
        self.listeners: list[Callable[[Event], None]] = []

    def __call__(self, kind: str, **facts: Any) -> None:
        event = {"time": round(time.time(), 3), "event": kind, **facts}
        with self._path.open("a") as file:
            file.write(json.dumps(event) + "\n")
        for listen in self.listeners:
            listen(event)


def trial_folder(root: Path, number: int) -> Path:
    """`trials/0007`: numbered as in the study."""
    return root / TRIALS_FOLDER / f"{number:04d}"


def state_name(trial: FrozenTrial) -> str:
    """complete, pruned, failed or running."""
    return _STATES.get(trial.state, "running")


def trial_rows(search: Search, config: SweepConfig) -> list[dict[str, Any]]:
    """One plain dict per trial: number, state, reason, best and last score, steps, seconds, params."""
    rows = []
    for trial in search.trials:
        curve = trial.intermediate_values
        sign = 1.0 if config.objective.mode == "max" else -1.0
        best_step = max(curve, key=lambda step: sign * curve[step]) if curve else None
        started, ended = trial.user_attrs.get("started"), trial.user_attrs.get("ended")
        rows.append(
            {
                "number": trial.number,
                "state": state_name(trial),
                "failure": trial.user_attrs.get("failure"),
                "score": trial.value if trial.state == TrialState.COMPLETE else None,
                "score_best": None if best_step is None else curve[best_step],
                "step_best": best_step,
                "score_last": trial.user_attrs.get("score_last"),
                "steps": max(curve, default=0),
                "seconds": round(ended - started, 1) if started and ended else None,
                **{
                    f"params.{name}": _cell(trial.params.get(name), param)
                    for name, param in config.search_space.items()
                },
            }
        )
    return rows


def _cell(value: Any, param: Param) -> Any:
    """A column has one type: the values of a mixed choice, such as [true, batchnorm], are written as text."""
    mixed = isinstance(param, ChoiceParam) and len({type(one) for one in param.values}) > 1
    return str(value) if mixed and value is not None else value


def write_tables(root: Path, search: Search, config: SweepConfig) -> None:
    """trials.parquet, trials.csv, history.parquet: whole and new each time."""
    rows = trial_rows(search, config)
    if rows:
        table = pa.Table.from_pylist(rows)
        _replace(root / "trials.parquet", lambda path: pq.write_table(table, path))
        _replace(root / "trials.csv", lambda path: pyarrow.csv.write_csv(table, path))
    history: list[dict[str, Any]] = []
    for folder in sorted([*root.glob(f"{TRIALS_FOLDER}/*"), *root.glob(f"{FINAL_FOLDER}/*")]):
        history += [{"run": folder.name, **record} for record in read_metrics(folder / METRICS_FILE)]
    if history:
        names = list(dict.fromkeys(name for record in history for name in record))
        columns = {name: [record.get(name) for record in history] for name in names}
        _replace(root / "history.parquet", lambda path: pq.write_table(pa.table(columns), path))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """All of it or nothing."""
    _replace(path, lambda temporary: temporary.write_text(text))


def write_json(path: Path, value: Any) -> None:
    """Indented, all of it or nothing."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "n": len(values), "values": list(values)}


def write_summary(root: Path, search: Search, config: SweepConfig, status: str, **facts: Any) -> dict[str, Any]:
    """summary.json: how it stands, for scripts. `facts` are added; earlier final results are kept."""
    earlier = read_json(root / SUMMARY_FILE) or {}
    best = search.best()
    summary: dict[str, Any] = {
        "name": config.name,
        "status": status,
        "trials": {"budget": config.budget.trials, **search.counts()},
        "objective": config.objective.metric,
        "best": None
        if best is None
        else {
            "trial": best.number,
            "value": best.value,
            "step": max(best.intermediate_values, key=lambda s: (best.intermediate_values[s] == best.value, -s)),
            "params": best.params,
        },
        # Of another best trial, it would say nothing about this one.
        "final": earlier.get("final") if best and (earlier.get("best") or {}).get("trial") == best.number else None,
        "seeds": {
            "train": config.train.seed,
            "labeled_split": config.train.data.split_seed,
            "sampler": config.sampler.seed,
            "final": list(config.final.seeds),
        },
        "made_with": environment(),
        **facts,
    }
    write_json(root / SUMMARY_FILE, summary)
    return summary


def read_json(path: Path) -> Any:
    """None if there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def environment() -> Mapping[str, Any]:
    """Versions, machine and commit."""
    packages = ("cps-ray", "torch", "ray", "optuna", "segmentation-models-pytorch", "albumentations", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Of the source tree this package is run from, if it is one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() or None
