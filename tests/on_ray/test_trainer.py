"""Checkpoints of a run, whole and broken; errors in one line."""

import json
from pathlib import Path

from cps_ray.config.train import TrainConfig
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state, write_checkpoint
from cps_ray.errors import DataError
from cps_ray.on_ray.trainer import Objective, best_checkpoint, checkpoints, drop_checkpoints, read_metrics, reason


def save(config: TrainConfig, run: Path, step: int, miou: float) -> Path:
    state = build_state(config, 7, Ranks())
    state.step = step
    folder = run / f"checkpoint_{step}"
    folder.mkdir(parents=True)
    write_checkpoint(folder, state.snapshot(), {"val/miou": miou})
    return folder


def test_the_best_is_the_first_of_the_best(tiny: TrainConfig, tmp_path: Path) -> None:
    for step, miou in ((2, 0.1), (4, 0.3), (6, 0.3), (8, 0.2)):
        save(tiny, tmp_path, step, miou)
    assert [meta["step"] for _, meta in checkpoints(tmp_path)] == [2, 4, 6, 8]
    assert best_checkpoint(tmp_path, Objective())[1]["step"] == 4
    assert best_checkpoint(tmp_path, Objective(mode="min"))[1]["step"] == 2
    drop_checkpoints(tmp_path)
    assert best_checkpoint(tmp_path, Objective()) is None


def test_an_upload_cut_short_is_no_checkpoint(tiny: TrainConfig, tmp_path: Path) -> None:
    save(tiny, tmp_path, 2, 0.1)
    cut = save(tiny, tmp_path, 4, 0.9) / "state.pt"
    cut.write_bytes(cut.read_bytes()[:-10])
    (save(tiny, tmp_path, 6, 0.9) / "meta.json").write_text('{"step": 6, "met')
    assert [meta["step"] for _, meta in checkpoints(tmp_path)] == [2]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "val')
    assert read_metrics(path) == [{"step": 1}]


def test_reason_is_the_workers_own_line() -> None:
    class Wrapped(Exception):  # noqa: N818
        def __init__(self, cause: Exception) -> None:
            super().__init__("Traceback ...")
            self.cause = cause

    class Failed(Exception):  # noqa: N818
        def __init__(self) -> None:
            super().__init__("workers failed")
            self.worker_failures = {0: Wrapped(DataError("row 3 is damaged"))}

    assert reason(Failed()) == "row 3 is damaged"
    assert reason(ValueError("no")) == "ValueError: no"
