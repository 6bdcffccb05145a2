"""The folder of a training: its records and its checkpoints, whole and broken; read without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cps_ray.config.train import TrainConfig
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state
from cps_ray.errors import CheckpointError
from cps_ray.runs import (
    METRICS_FILE,
    Records,
    best_checkpoint,
    checkpoints,
    drop_checkpoints,
    latest_checkpoint,
    read_checkpoint,
    read_metrics,
    save_checkpoint,
    write_checkpoint,
)


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
    assert best_checkpoint(tmp_path, "val/miou")[1]["step"] == 4
    drop_checkpoints(tmp_path)
    assert best_checkpoint(tmp_path, "val/miou") is None


def test_an_upload_cut_short_is_no_checkpoint(tiny: TrainConfig, tmp_path: Path) -> None:
    save(tiny, tmp_path, 2, 0.1)
    cut = save(tiny, tmp_path, 4, 0.9) / "state.pt"
    cut.write_bytes(cut.read_bytes()[:-10])
    (save(tiny, tmp_path, 6, 0.9) / "meta.json").write_text('{"step": 6, "met')
    assert [meta["step"] for _, meta in checkpoints(tmp_path)] == [2]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "val')
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_a_damaged_checkpoint_is_one_line(tiny: TrainConfig, tmp_path: Path) -> None:
    file = save(tiny, tmp_path, 2, 0.1) / "state.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state\.pt: cannot be read") as caught:
        read_checkpoint(file.parent)
    assert "\n" not in str(caught.value)


def test_records_are_read_without_torch_or_ray() -> None:
    code = "import sys, cps_ray.runs; print(sorted({'ray', 'optuna', 'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_damaged_record_comes_back_from_its_checkpoint(tiny: TrainConfig, tmp_path: Path) -> None:
    records = Records(tiny, tmp_path, 0)
    for step in (2, 4, 6):
        records.write({"step": step, "val/miou": step / 10})
    save_checkpoint(tmp_path, {"step": 4}, {"step": 4, "val/miou": 0.4}, "val/miou")
    whole = (tmp_path / METRICS_FILE).read_text()
    (tmp_path / METRICS_FILE).write_text(whole[:45])  # the second line is cut
    Records(tiny, tmp_path, 4)
    assert [record["step"] for record in read_metrics(tmp_path)] == [2, 4]
    assert read_metrics(tmp_path)[1] == {"step": 4, "val/miou": 0.4}


def test_the_best_and_the_latest_checkpoint_are_kept(tmp_path: Path) -> None:
    for step, miou in ((2, 0.1), (4, 0.9), (6, 0.5), (8, 0.9), (10, 0.2)):
        save_checkpoint(tmp_path, {"step": step}, {"step": step, "val/miou": miou}, "val/miou")
    assert [meta["step"] for _, meta in checkpoints(tmp_path)] == [4, 10], "of equal ones the earlier"
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint_00000010"
    (tmp_path / ".checkpoint_00000012.tmp").mkdir()  # left by a kill
    drop_checkpoints(tmp_path)
    assert not [*tmp_path.glob("*checkpoint_*")]
