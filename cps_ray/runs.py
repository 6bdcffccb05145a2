"""The folder of one training: names of its files, its records, its checkpoints. Knows neither Ray nor Optuna.

    config.yaml           the training, complete
    metrics.jsonl         one line per evaluation
    log.txt, error.txt    what the workers logged; why the training failed, if it did
    checkpoint_*/         state.pt (weights, optimizers, step) and meta.json (step, metrics, size of state.pt)

Of the checkpoints the best one and the latest are kept; each is whole, or not there. torch is imported only where weights are read or
written: what lists runs and reads their records starts in milliseconds.
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from cps_ray.config.plugins import Sink
from cps_ray.config.train import TrainConfig
from cps_ray.errors import CheckpointError
from cps_ray.files import replaced_folder, write_text, write_whole
from cps_ray.text import on_one_line

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "log.txt"
ERROR_FILE = "error.txt"
STATE_FILE = "state.pt"
META_FILE = "meta.json"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the records of a run so far, one per evaluation; a line cut short by a crash is left out."""
    try:
        lines = (run_dir / METRICS_FILE).read_text().splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # only the last line can be cut, and nothing follows it
    return records


class RecordReader:
    """Reads a run's records as they come, each line once."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / METRICS_FILE
        self._file, self._at = 0, 0

    def read(self, up_to: float = math.inf) -> list[dict[str, Any]]:
        """Returns the records since the last call, up to that of step `up_to`; from the first one on if workers that were started again
        have cut the file."""
        try:
            with self._path.open("rb") as file:
                state = os.fstat(file.fileno())
                if state.st_ino != self._file:
                    self._file, self._at = state.st_ino, 0
                if state.st_size == self._at:
                    return []
                file.seek(self._at)
                records = []
                for line in file:
                    try:
                        record = json.loads(line)
                    except ValueError:
                        break  # in the making, or damaged: workers that start write the file anew
                    if record["step"] > up_to:
                        break
                    records.append(record)
                    self._at += len(line)
                return records
        except FileNotFoundError:
            return []


class Records(Sink):
    """Writes METRICS_FILE, a line per evaluation."""

    def __init__(self, config: TrainConfig, run_dir: Path, step: int) -> None:
        """Drops the records after `step`."""
        self._file = run_dir / METRICS_FILE
        # A crash may have come between the record and the checkpoint: those steps are trained, and recorded, again.
        keep = {line["step"]: line for line in read_metrics(run_dir) if line["step"] <= step}
        for _, meta in checkpoints(run_dir):  # they have a record of their own, should its line be damaged
            if meta["step"] <= step:
                keep.setdefault(meta["step"], meta["metrics"])
        write_text(self._file, "".join(json.dumps(keep[at]) + "\n" for at in sorted(keep)))

    def write(self, metrics: dict[str, float]) -> None:
        """Appends a line."""
        with self._file.open("a") as file:
            file.write(json.dumps(metrics) + "\n")


def save_checkpoint(run_dir: Path, snapshot: dict[str, Any], metrics: dict[str, Any], metric: str) -> None:
    """Keeps a snapshot of the training's state with its metrics, and of the others only the one with the highest `metric`.

    Raises OSError when the disk is full; what was kept before is then still there.
    """
    folder = run_dir / f"checkpoint_{snapshot['step']:08d}"
    with replaced_folder(folder) as unfinished:
        write_checkpoint(unfinished, snapshot, metrics)
    best = best_checkpoint(run_dir, metric)
    for other, _ in checkpoints(run_dir):
        if other != folder and (best is None or other != best[0]):
            shutil.rmtree(other, ignore_errors=True)


def write_checkpoint(folder: Path, snapshot: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Writes a snapshot of the training's state and its metrics into an existing folder."""
    import torch

    path = folder / STATE_FILE
    # Into an open file: of a path torch would raise a RuntimeError without a number when the disk is full.
    with path.open("wb") as file:
        torch.save(snapshot, file)
        file.flush()
        os.fsync(file.fileno())  # else a node that loses its power may keep the folder's new name and not what is in it
    # The size tells a whole checkpoint from one that a damaged disk has cut short.
    meta = {"step": snapshot["step"], "metrics": metrics, "bytes": path.stat().st_size}
    write_whole(folder / META_FILE, lambda path: path.write_text(json.dumps(meta)))


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Returns the snapshot of a checkpoint, on the CPU, read without unpickling code. Raises CheckpointError."""
    import torch

    path = folder / STATE_FILE
    try:
        snapshot: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # a damaged file raises one of many types
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {on_one_line(err, 200)}") from err
    return snapshot


def checkpoints(run_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Returns (folder, meta) of every whole checkpoint of a run, by step. `meta` has `step` and `metrics`."""
    found = []
    for path in run_dir.glob(f"checkpoint_*/{META_FILE}"):
        try:
            meta = json.loads(path.read_text())
            is_whole = (path.parent / STATE_FILE).stat().st_size == meta["bytes"]
        except (OSError, ValueError):
            continue  # damaged, or dropped a moment ago
        if is_whole:
            found.append((path.parent, meta))
    return sorted(found, key=lambda entry: entry[1]["step"])


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Returns the folder of the last whole checkpoint, from which a training continues; None if there is none."""
    found = checkpoints(run_dir)
    return found[-1][0] if found else None


def best_checkpoint(run_dir: Path, metric: str) -> tuple[Path, dict[str, Any]] | None:
    """Returns the checkpoint with the highest value of `metric`, the earlier one at a tie; None if there is none."""
    return max(checkpoints(run_dir), key=lambda entry: entry[1]["metrics"][metric], default=None)


def drop_checkpoints(run_dir: Path) -> None:
    """Frees the disk of a run that nobody will continue."""
    for path in (*run_dir.glob("checkpoint_*"), *run_dir.glob(".checkpoint_*")):  # the latter was left by a kill
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
