"""Two workers as one; checkpoints of a run, whole and broken; errors in one line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import changed, without_a_cluster

from cps_ray.config.train import TrainConfig
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state, load_networks, write_checkpoint
from cps_ray.errors import DataError
from cps_ray.on_ray import trainer
from cps_ray.on_ray.cluster import connected
from cps_ray.on_ray.trainer import (
    METRICS_FILE,
    Objective,
    best_checkpoint,
    checkpoints,
    drop_checkpoints,
    make_trainer,
    read_metrics,
    reason,
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


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Double precision, here and in workers. In single, where two classes tie in a pixel, the last bit of a sum turns its label."""

    def doubled(settings: dict[str, Any]) -> dict[str, str]:
        import torch

        from cps_ray.on_ray.trainer import train_loop

        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double
        return train_loop(settings)

    monkeypatch.setattr(trainer, "train_loop", doubled)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.ray
def test_two_workers_train_as_one_in_either_placement(tiny: TrainConfig, tmp_path: Path, in_double: None) -> None:
    config = changed(tiny, schedule__steps=20, schedule__eval_every=1)
    expected = without_a_cluster(config)
    assert len(expected) == 20
    with connected(None):
        for placement in ("replicated", "split"):
            resources = {"workers": 2, "cpus_per_worker": 0.5, "placement": placement}
            folder = tmp_path / placement
            assert make_trainer(changed(config, resources=resources), folder).fit().return_value == {}
            found = read_metrics(folder / METRICS_FILE)
            assert [one["train/loss"] for one in found] == pytest.approx(
                [one["train/loss"] for one in expected], rel=1e-9
            )
            for name in ("val/miou", "val/b/miou", "val/ensemble/miou", "val/agreement", "pseudo/agreement"):
                assert [one[name] for one in found] == pytest.approx([one[name] for one in expected], rel=1e-9), name
            assert found[-1]["pseudo/miou"] > 0.0
            # Whoever trained them: the checkpoint holds both, and loads anywhere.
            checkpoint, _ = best_checkpoint(folder, Objective())
            assert [*load_networks(config, checkpoint, 7)] == ["a", "b"]
