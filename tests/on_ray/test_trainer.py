"""Two workers as one; errors in one line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import changed, without_a_cluster

from cps_ray.config.train import TrainConfig
from cps_ray.engine.state import load_networks
from cps_ray.errors import DataError
from cps_ray.on_ray import trainer
from cps_ray.on_ray.cluster import connected
from cps_ray.on_ray.failures import reason
from cps_ray.on_ray.trainer import make_trainer
from cps_ray.runs import best_checkpoint, read_checkpoint, read_metrics


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
    config = changed(tiny, schedule__steps=8, schedule__eval_every=2, cps__class_weights=0.5)
    expected = without_a_cluster(config)
    assert len(expected) == 4
    with connected(None):
        for placement in ("replicated", "one_network_per_worker"):
            resources = {"workers": 2, "cpus_per_worker": 0.5, "placement": placement}
            folder = tmp_path / placement
            assert make_trainer(changed(config, resources=resources), folder).fit().return_value == {}
            found = read_metrics(folder)
            assert [one["train/loss"] for one in found] == pytest.approx(
                [one["train/loss"] for one in expected], rel=1e-9
            )
            for name in ("val/miou", "val/b/miou", "val/ensemble/miou", "val/agreement", "pseudo/agreement"):
                assert [one[name] for one in found] == pytest.approx([one[name] for one in expected], rel=1e-9), name
            assert found[-1]["pseudo/miou"] > 0.0
            # Whoever trained them: the checkpoint holds both, and loads anywhere.
            checkpoint, _ = best_checkpoint(folder, "val/miou")
            assert [*load_networks(config, read_checkpoint(checkpoint), 7, source=checkpoint)] == ["a", "b"]
