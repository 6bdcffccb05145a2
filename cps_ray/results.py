"""The folder of a sweep: names of its files, and what they say, while it runs and afterwards. Knows neither Ray, Optuna nor torch.

    sweep = cps_ray.open_sweep("runs/quickstart")
    print(sweep.verdict)
    sweep.trials.to_pandas().sort_values("score")

Files are only read, each time anew: a sweep may be looked at while it runs, by those who must not write to its folder, too.
"""

import fcntl
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cps_ray.config import yaml_reader
from cps_ray.config.reader import load_train
from cps_ray.config.sweep import BEST_ARM, ObjectiveConfig, measured_network
from cps_ray.config.train import ENSEMBLE, TrainConfig
from cps_ray.errors import ConfigError
from cps_ray.files import read_json, read_lines
from cps_ray.model.description import MODEL_FOLDER
from cps_ray.model.intervals import Difference, in_words
from cps_ray.runs import CONFIG_FILE, METRICS_FILE, read_metrics
from cps_ray.text import display_path, on_one_line, shell_path, show_params

SWEEP_FILE = "sweep.yaml"
STUDY_FILE = "study.db"
LOCK_FILE = ".lock"
BEGUN_FILE = ".begun.json"
SUMMARY_FILE = "summary.json"
TRIALS_FILE = "trials.jsonl"
TRIALS_FOLDER = "trials"
FINAL_FOLDER = "final"
BASELINES_FOLDER = "baselines"
FOLDS_FOLDER = "folds"
BEST_FILE = "best.yaml"

COMPLETE, PRUNED, COLLAPSED, FAILED, RUNNING = STATES = ("complete", "pruned", "collapsed", "failed", "running")
INTERRUPTED = "interrupted"
"""State of a trial, and of a sweep, that no process works on any more, though it has not ended."""
TRIAL_COLUMNS: Mapping[str, type] = {
    "number": int,
    "state": str,
    "failure": str,
    "score": float,
    "score_best": float,
    "step_best": int,
    "score_last": float,
    "steps": int,
    "seconds": float,
    "accumulate": int,
}
"""Columns of the table of trials; those of the parameters follow."""
_HISTORY_COLUMNS: Mapping[str, type] = {"run": str, "step": int}
_RUNS_AT_ONCE = 100
HEADLINE = "test/miou"
"""Score by which arms are compared, if the objective does not name another network than a."""

Row = dict[str, Any]


def open_sweep(folder: str | Path) -> "SweepResults":
    """Returns the results of the sweep in `folder`, so far. Raises ConfigError if there is no sweep."""
    folder = Path(folder)
    if not ((folder / SWEEP_FILE).is_file() and (folder / STUDY_FILE).is_file()):
        raise ConfigError(f"{folder}: must be the folder of a sweep (with {SWEEP_FILE} and {STUDY_FILE}), but is not.")
    return SweepResults(folder)


@dataclass(frozen=True, slots=True)
class SweepResults:
    """A sweep folder, read anew at each look. Raises ConfigError for a file that is damaged."""

    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json says, with the `status` (running, interrupted, failed, finished) and the counts of `trials` of this moment."""
        is_held = is_locked(
            self.folder
        )  # first: a trial that ends a moment later is read as one that runs or has ended
        rows = self._rows(is_held)
        recorded = self._recorded()
        status = RUNNING if is_held else recorded.get("status", RUNNING)
        states = [row["state"] for row in rows]
        counts = {state: states.count(state) for state in (*STATES, INTERRUPTED)}
        return {
            "best": None,
            "final": None,
            **recorded,
            "name": self._setting("name"),
            "status": INTERRUPTED if status == RUNNING and not is_held else status,
            "trials": {"budget": self._setting("budget", "trials"), **counts},
            "objective": self._setting("objective", "metric"),
        }

    @property
    def verdict(self) -> str:
        """The sentences that the sweep ended with; before, how far it is, and why it ended if it failed."""
        summary = self.summary
        if summary["status"] == "finished":
            return "\n".join(verdict_lines(self.folder, summary))
        if summary["status"] == FAILED:
            return f"{FAILED}: {summary['reason']}"
        return "\n".join(progress_lines(self.folder, summary))

    @property
    def trials(self) -> pa.Table:
        """A row per trial that was begun, with the columns of trials.parquet; what runs or was cut off has the scores of its evaluations
        so far, and the state running or interrupted."""
        return table_of(self._rows(is_locked(self.folder)), TRIAL_COLUMNS)

    @property
    def history(self) -> pa.Table:
        """A row per evaluation of every run, trials (`run` 0007) and final runs (best-seed1), with all that was measured."""
        return history_table(self.folder)

    @property
    def best(self) -> TrainConfig | None:
        """The best training so far, best.yaml; None before a trial has completed."""
        path = self.folder / BEST_FILE
        return load_train(path) if path.exists() else None

    def _rows(self, is_held: bool) -> list[Row]:
        path = self.folder / TRIALS_FILE
        if not path.exists() and not (self.folder / TRIALS_FOLDER).exists():
            return []  # before the first trial
        try:
            rows = {row["number"]: (row["state"], row) for row in read_lines(path)}  # the last line of a trial holds
        except (OSError, ValueError, TypeError, KeyError) as err:
            raise ConfigError(
                f"{path}: cannot be read: {on_one_line(err, 200).rstrip('.')}. "
                f"It is made from {STUDY_FILE}, and written again by: {resume_command(self.folder)}"
            ) from err
        return [self._so_far(row, is_held) if state == RUNNING else row for _, (state, row) in sorted(rows.items())]

    def _so_far(self, row: Row, is_held: bool) -> Row:
        """Returns the row of a trial that has not ended, with what it has measured since the table was written."""
        metric = self._setting("objective", "metric")
        records = read_metrics(trial_folder(self.folder, row["number"]))
        curve = {record["step"]: record[metric] for record in records if metric in record}
        last = max(curve, default=0)
        step = ObjectiveConfig(select="best").step(curve)
        return {
            **row,
            "state": RUNNING if is_held else INTERRUPTED,
            "score_best": None if step is None else curve[step],
            "step_best": step,
            "score_last": curve.get(last),
            "steps": last,
        }

    def _recorded(self) -> dict[str, Any]:
        path = self.folder / SUMMARY_FILE
        try:
            return dict(read_json(path) or {})
        except (ValueError, TypeError) as err:
            raise ConfigError(
                f"{path}: must be a JSON object, as the sweep wrote it: {on_one_line(err)}. Delete it, then: {resume_command(self.folder)}"
            ) from err

    def _setting(self, *names: str) -> Any:
        """Returns a setting as sweep.yaml has it: checked, its plug-ins would be imported, and torch with them."""
        path = self.folder / SWEEP_FILE
        value: Any = yaml_reader.load(path).data
        try:
            for name in names:
                value = value[name]
        except (KeyError, TypeError) as err:
            raise ConfigError(f"{path}: must hold {'.'.join(names)}, as the sweep wrote it, but does not.") from err
        return value


def trial_folder(root: Path, number: int) -> Path:
    """Folder of a trial: `trials/0007`, numbered as in the study."""
    return root / TRIALS_FOLDER / f"{number:04d}"


def is_locked(root: Path) -> bool:
    """Whether a process works on the sweep."""
    try:
        with (root / LOCK_FILE).open() as file:
            # Shared, and let go of at once: others who look do not see each other, and a sweep that begins just now tries again.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def history_table(root: Path) -> pa.Table:
    """Returns all records of all runs of a sweep. Runs of several methods measure different things: there is a column for each name,
    empty where a run has none."""
    files = [file for part in (TRIALS_FOLDER, FINAL_FOLDER) for file in sorted(root.glob(f"{part}/*/{METRICS_FILE}"))]
    tables = [table_of([], _HISTORY_COLUMNS)]
    # In parts: as Python objects, the records of thousands of trials would take ten times the memory of their table.
    for begin in range(0, len(files), _RUNS_AT_ONCE):
        part = files[begin : begin + _RUNS_AT_ONCE]
        rows = [{"run": file.parent.name, **record} for file in part for record in read_metrics(file.parent)]
        tables.append(table_of(rows, _HISTORY_COLUMNS))
    return pa.concat_tables(tables, promote_options="permissive")


def table_of(rows: list[Row], kinds: Mapping[str, type]) -> pa.Table:
    """Returns rows as a table: columns of `kinds` first, then all others in the order in which they come."""
    names = list(dict.fromkeys([*kinds, *(name for row in rows for name in row)]))
    return pa.Table.from_arrays([_column([row.get(name) for row in rows], kinds.get(name)) for name in names], names)


def _column(values: list[Any], kind: type | None) -> pa.Array:
    """Returns a column of its Python type: `kind`, or that of the values. Not by `pa.array`, which imports pandas to look at a list."""
    kinds = {kind} if kind else {type(value) for value in values if value is not None}
    if not kinds:
        return pa.nulls(len(values))
    valid = _bits([value is not None for value in values])
    if kinds == {bool}:
        return pa.Array.from_buffers(pa.bool_(), len(values), [valid, _bits([bool(value) for value in values])])
    if kinds <= {int, float}:
        arrow, dtype = (pa.int64(), np.int64) if kinds == {int} else (pa.float64(), np.float64)
        numbers = np.array([value or 0 for value in values], dtype)
        return pa.Array.from_buffers(arrow, len(values), [valid, pa.py_buffer(numbers)])
    texts = [b"" if value is None else str(value).encode() for value in values]
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), len(values), [valid, pa.py_buffer(ends), pa.py_buffer(b"".join(texts))])


def _bits(flags: list[bool]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(np.array(flags, np.bool_), bitorder="little"))


def resume_command(root: Path) -> str:
    """Returns the command that resumes a sweep, on the cluster that its last session was told to join. `root`: its folder, or that of a
    further search in it."""
    # No further than there is a sweep: it may lie in a folder of that name itself.
    while not (root / BEGUN_FILE).exists() and root.parent.name in (BASELINES_FOLDER, FOLDS_FOLDER):
        root = root.parent.parent
    address = None
    with suppress(ValueError):  # damaged: `resume` itself says so
        address = (read_json(root / BEGUN_FILE) or {}).get("address")
    there = f" --address {shlex.quote(address)}" if address else ""
    return f"python -m cps_ray.sweep resume {shell_path(root)}{there}"


def progress_lines(root: Path, summary: dict[str, Any]) -> list[str]:
    """Returns how far a sweep is that has not ended, from its summary."""
    status, counts, best = summary["status"], summary["trials"], summary["best"]
    done = sum(counts[state] for state in STATES if state != RUNNING)
    so_far = f", best {summary['objective']} {best['value']:.4f} (trial {best['trial']})" if best else ""
    num_finals = len(list(root.glob(f"{FINAL_FOLDER}/*/{CONFIG_FILE}")))
    finals = f", {num_finals} final run(s) begun" if num_finals else ""
    lines = [f"{status}: {done} of {counts['budget']} trials done{so_far}{finals}."]
    return lines if status == RUNNING else [*lines, f"Resume: {resume_command(root)}"]


def verdict_lines(root: Path, summary: dict[str, Any]) -> list[str]:
    """Returns the end of a sweep in words, from its summary."""
    best = summary["best"]
    lines = [
        f"Best trial {best['trial']}: {summary['objective']} {best['value']:.4f} at step {best['step']}  {show_params(best['params'])}"
    ]
    final = summary.get("final")  # None: `final.retrain: none`, or the sweep has not come so far
    if final:
        lines += _score_lines(final, summary["objective"])
        for seed, classes in final.get("vanished", {}).items():  # a sweep of an earlier version has not recorded them
            which = f"{final.get('repeat', 'seed')} {seed}"
            lines.append(f"Vanished from the pseudo labels (fraction there by that in the masks), {which}: {classes}")
    lines.append(f"Results: {display_path(root)}: {BEST_FILE}, {MODEL_FOLDER}/, trials.csv, summary.json")
    lines.append(f"Predict photos: python -m cps_ray.predict {shell_path(root / MODEL_FOLDER)} PHOTOS OUT")
    # A network learns from its peers' labels: the licence of any one's weights may bind it.
    lines += [each["sentence"] for each in summary.get("weights", [])]
    lines.append(f"Train the best again: python -m cps_ray.train {shell_path(root / BEST_FILE)}")
    return lines


def _score_lines(final: dict[str, Any], objective: str) -> Iterator[str]:
    """Yields a line per arm with the mIoU that is compared, then one with the objective's own test value, where that is another score."""
    headline = final.get("headline", {})  # summaries of earlier versions compare network a
    repeat, found = final.get("repeat", "seed"), final.get("difference", {})  # and know neither folds nor intervals
    title = "mIoU" if repeat == "fold" else "Test mIoU"
    width = 2 + max(map(len, final["arms"]))
    for arm, row in final["arms"].items():
        name = headline.get(arm, HEADLINE)
        network = {"a": "", ENSEMBLE: ", all networks together"}.get(of := measured_network(name), f", network {of}")
        gain = "" if arm == BEST_ARM or arm in found else f"   best is {final['gain'][arm]:+.1f} points"
        yield f"{title}  {arm:<{width}}{_score(row[name], repeat)}{network}{gain}"
    own = objective.replace("val/", "test/", 1)
    for arm, row in final["arms"].items():
        if own in row and own not in headline.values():
            yield f"{own}  {arm:<{width}}{_score(row[own], repeat)}"
    yield from _difference_lines(found)
    for arm, gain in final.get("apart", {}).items():
        yield f"On fold 1, by which the search has chosen and which does not count above, best is {gain:+.1f} points against {arm}."
    yield from final.get("notes", ())
    yield from _curve_lines(final.get("curve") or ())


def _difference_lines(found: dict[str, Any]) -> Iterator[str]:
    names = {field.name for field in fields(Difference)}
    for arm, each in found.items():
        words = in_words(Difference(**{k: v for k, v in each.items() if k in names}), each["advice"])
        yield f"Best against {arm}{'' if each['tuned'] else ' (baseline not tuned)'}: {words}"


def _curve_lines(curve: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yields, for each arm, what more images would bring."""
    of_arms: dict[str, list[str]] = {}
    for each in curve:
        more, what = each["more"], "labels" if each["what"] == "labels" else "unlabelled images"
        text = f"{more['count']:,} more {what}: about {100 * more['gain']:+.1f} points".replace(",", " ")
        if more["low"] is not None:
            is_0 = more["low"] <= 0 <= more["high"]
            interval = f"{100 * more['low']:+.1f} to {100 * more['high']:+.1f}"
            text += f" ({interval}{': not distinguishable from 0' if is_0 else ''})"
        of_arms.setdefault(each["arm"], []).append(text)
    for arm, texts in of_arms.items():
        yield f"What next, {arm}: {'; '.join(texts)}"


def _score(score: dict[str, Any], repeat: str) -> str:
    """Returns, for example, `61.3 +- 0.4 % over 3 seeds`."""
    deviation = "" if score["sd"] is None else f" +- {100 * score['sd']:.1f}"
    return f"{100 * score['mean']:.1f}{deviation} % over {score['n']} {repeat}{'' if score['n'] == 1 else 's'}"
