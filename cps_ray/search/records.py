"""What a sweep leaves on disk, derived from the study and the runs' folders: trials, tables, history, summary, events."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet as pq

from cps_ray.config.space import scalar
from cps_ray.config.sweep import ChoiceParam, Param, SweepConfig
from cps_ray.files import read_json, write_json, write_text, write_whole
from cps_ray.results import SUMMARY_FILE, TRIAL_COLUMNS, TRIALS_FILE, history_table, table_of
from cps_ray.search.disk import on_disk
from cps_ray.search.study import SweepStudy, SweepTrial

EVENTS_FILE = "events.jsonl"

Event = dict[str, Any]


class Events:
    """What happens, as it happens: a line in events.jsonl, and a call to each subscriber."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / EVENTS_FILE
        self.subscribers: list[Callable[[Event], None]] = []

    def __call__(self, kind: str, **facts: Any) -> None:
        event = {"time": round(time.time(), 3), "event": kind, **facts}
        # Opened for each line: it is on disk before anybody acts on it, and nothing is lost with the process.
        _append(self._path, event)
        for notify in self.subscribers:
            notify(event)


def _append(path: Path, row: dict[str, Any]) -> None:
    with on_disk(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def trial_row(trial: SweepTrial, config: SweepConfig) -> dict[str, Any]:
    """Returns a trial as a row of the tables: TRIAL_COLUMNS, then its params."""
    return {
        **{name: getattr(trial, name) for name in TRIAL_COLUMNS},
        **{f"params.{name}": _cell(trial.params, name, param) for name, param in config.search_space.items()},
    }


def _cell(params: Mapping[str, Any], name: str, param: Param) -> Any:
    """Returns a value as its column holds it: None where the parameter was not drawn. Of a mixed choice, such as [true, batchnorm], and of
    one with lists or null, as text, since a column has one type."""
    if name not in params:
        return None
    kinds = {type(one) for one in param.values} if isinstance(param, ChoiceParam) else set()
    value = "null" if params[name] is None else scalar(params[name])
    return str(value) if len(kinds) > 1 else value


def append_trial(root: Path, trial: SweepTrial, config: SweepConfig) -> None:
    """Adds a trial to trials.jsonl as it is now: when it begins and when it ends. The last line of a trial holds."""
    _append(root / TRIALS_FILE, trial_row(trial, config))


def write_tables(root: Path, study: SweepStudy, config: SweepConfig) -> None:
    """Writes trials.jsonl, trials.parquet, trials.csv and history.parquet, whole and new each time: derived, they cannot drift from the study."""
    rows = [trial_row(trial, config) for trial in study.trials]
    with on_disk(root / TRIALS_FILE):
        write_text(root / TRIALS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
    if rows:
        table = table_of(rows, TRIAL_COLUMNS)
        _write(root / "trials.parquet", lambda path: pq.write_table(table, path))
        _write(root / "trials.csv", lambda path: pyarrow.csv.write_csv(table, path))
    history = history_table(root)
    if history.num_rows:
        _write(root / "history.parquet", lambda path: pq.write_table(history, path))


def _write(path: Path, write: Callable[[Path], None]) -> None:
    with on_disk(path):
        write_whole(path, write)


def write_summary(root: Path, study: SweepStudy, config: SweepConfig, status: str, **facts: Any) -> dict[str, Any]:
    """Writes summary.json, how a sweep stands, for scripts; returns it. `facts` are added; earlier final results are kept."""
    earlier = read_json(root / SUMMARY_FILE) or {}
    best = study.best()
    summary: dict[str, Any] = {
        "name": config.name,
        "status": status,
        "trials": {"budget": config.budget.trials, **study.counts()},
        "objective": config.objective.metric,
        "best": None
        if best is None
        else {
            "trial": best.number,
            "value": best.score,
            "step": best.step,
            "params": best.params,
        },
        # Final results of another best trial would say nothing about this one.
        "final": earlier.get("final") if best and (earlier.get("best") or {}).get("trial") == best.number else None,
        "seeds": {
            "train": config.train.seed,
            "subset": config.train.data.subset_seed,
            "sampler": config.sampler.seed,
            "final": list(config.final.seeds),
        },
        "made_with": environment(),
        **facts,
    }
    with on_disk(root / SUMMARY_FILE):
        write_json(root / SUMMARY_FILE, summary)
    return summary


@cache
def environment() -> Mapping[str, Any]:
    """Returns versions, machine and commit."""
    packages = ("cps-ray", "torch", "ray", "optuna", "segmentation-models-pytorch", "albumentations", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Commit of the source tree that this package is run from, if it is one."""
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
