"""What a sweep leaves on disk, derived from the study and the runs' folders each time: tables, history, summary, events."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet as pq
from optuna.trial import TrialState

from cps_ray.config.sweep import ChoiceParam, ObjectiveConfig, Param, SweepConfig
from cps_ray.files import read_json, write_json, write_whole
from cps_ray.results import SUMMARY_FILE, TRIAL_COLUMNS, TRIALS_FILE, history_table, table_of
from cps_ray.search.study import SweepStudy, state_name

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
        with self._path.open("a") as file:
            file.write(json.dumps(event) + "\n")
        for notify in self.subscribers:
            notify(event)


def trial_rows(study: SweepStudy, config: SweepConfig) -> list[dict[str, Any]]:
    """Returns one plain dict per trial: number, state, failure (also why it collapsed), scores, steps, seconds, params."""
    rows = []
    for trial in study.trials:
        curve = trial.intermediate_values
        # The best evaluation whatever `objective.select` says: for people; `score` is what the search compares.
        best_step = ObjectiveConfig(select="best").step(curve)
        started, ended = trial.user_attrs.get("started"), trial.user_attrs.get("ended")
        rows.append(
            {
                "number": trial.number,
                "state": state_name(trial),
                "failure": trial.user_attrs.get("failure"),
                # Optuna gives a pruned trial its last intermediate value, which compares with nothing.
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
    """Returns a value as its column holds it: of a mixed choice, such as [true, batchnorm], as text, since a column has one type."""
    mixed = isinstance(param, ChoiceParam) and len({type(one) for one in param.values}) > 1
    return str(value) if mixed and value is not None else value


def write_tables(root: Path, study: SweepStudy, config: SweepConfig) -> None:
    """Writes trials.parquet, trials.csv and history.parquet, whole and new each time: derived, they cannot drift from the study."""
    write_trials(root, study, config)
    history = history_table(root)
    if history.num_rows:
        write_whole(root / "history.parquet", lambda path: pq.write_table(history, path))


def write_trials(root: Path, study: SweepStudy, config: SweepConfig) -> None:
    """Writes trials.parquet and trials.csv, once there is a trial."""
    table = table_of(trial_rows(study, config), TRIAL_COLUMNS)
    if table.num_rows:
        write_whole(root / TRIALS_FILE, lambda path: pq.write_table(table, path))
        write_whole(root / "trials.csv", lambda path: pyarrow.csv.write_csv(table, path))


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
            "value": best.value,
            "step": config.objective.step(best.intermediate_values),
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
    write_json(root / SUMMARY_FILE, summary)
    return summary


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
