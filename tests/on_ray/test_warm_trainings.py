"""Trainings in a warm group are bit for bit those of a cold start, whatever came before them."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from support import changed
from test_end_to_end import descendants

from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.on_ray.cluster import connected
from cps_ray.on_ray.failures import COLLAPSED, CRASHED, OUT_OF_MEMORY
from cps_ray.on_ray.trainer import make_trainer, worker_groups
from cps_ray.on_ray.worker_groups import GroupShape, Training
from cps_ray.runs import CONFIG_FILE, ERROR_FILE, latest_checkpoint, read_checkpoint, read_metrics

pytestmark = pytest.mark.ray

PLUGIN = """
import torch
from torch.nn.functional import cross_entropy

def greedy(logits, target):
    if target.shape[-1] == 48:  # a crop, not what the contract is checked with
        torch.empty(2**50)  # more than there is: as a CUDA device that is full, the allocator refuses
    return cross_entropy(logits, target, ignore_index=255)

def broken(logits, target):
    if target.shape[-1] == 48:
        raise KeyError("no such class")
    return cross_entropy(logits, target, ignore_index=255)
"""


@dataclass
class Trial:
    """What a trial does for a training, without Tune."""

    pool: Any
    root: Path

    def run(
        self, name: str, config: TrainConfig, *, kill_at: int = 0, stop_at: int = 0, retries: int = 1
    ) -> dict[str, Any]:
        """Has it trained; ends it, or kills its workers, at the report of a step. Returns its outcome."""
        folder = self.root / name
        folder.mkdir()
        (folder / CONFIG_FILE).write_text(dump_yaml(config.dump(str(folder))))
        training = Training(str(folder), "val/miou", config.sha256, GroupShape.of(config.resources), "test", retries)
        ray.get(self.pool.begin.remote(training))
        judged = 0
        while True:
            news = ray.get(self.pool.wait.remote(str(folder), judged, 5.0))
            if news["outcome"] is not None:
                outcome: dict[str, Any] = news["outcome"]
                return outcome
            judged = news["reported"]
            if stop_at and judged >= stop_at:
                ray.get(self.pool.stop.remote(str(folder)))
                return {}
            if kill_at and judged >= kill_at:
                kill_at = 0
                for pid in trainers():
                    os.kill(pid, signal.SIGKILL)


def trainers() -> list[int]:
    """Processes that train."""
    return [pid for pid, command in descendants(os.getpid()).items() if "RayTrainWorker" in command]


MASKS_SO_FAR = ("labeled/", "pseudo/frequency_ratio/")
"""What is counted since the workers were started last."""


def deterministic(folder: Path, but: tuple[str, ...] = ()) -> list[dict[str, float]]:
    """All that a training measured and that does not depend on the clock."""
    return [
        {name: value for name, value in record.items() if not name.startswith(("time/", "memory/", *but))}
        for record in read_metrics(folder)
    ]


def assert_equal_bits(one: Path, other: Path, but: tuple[str, ...] = ()) -> None:
    assert deterministic(one, but) == deterministic(other, but), (one.name, other.name)
    checkpoints = [latest_checkpoint(folder) for folder in (one, other)]
    assert checkpoints[0] is not None
    assert checkpoints[1] is not None
    flat = [dict(_leaves(read_checkpoint(path))) for path in checkpoints if path]
    assert flat[0].keys() == flat[1].keys()
    for name, value in flat[0].items():
        same = torch.equal(value, flat[1][name]) if isinstance(value, torch.Tensor) else value == flat[1][name]
        assert same, (one.name, other.name, name)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield name, value
    else:
        for key, inner in items:
            yield from _leaves(inner, f"{name}/{key}")


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fault_plugins.py").write_text(PLUGIN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_warm_is_cold_bit_for_bit_in_any_order(tiny: TrainConfig, tmp_path: Path, plugins: None, workers: int) -> None:
    tiny = changed(tiny, schedule__steps=12, schedule__eval_every=4, resources__cpus_per_worker=0.5)
    tiny = changed(tiny, resources__workers=workers, model__options={"decoder_channels": 16})  # with dropout
    good = {
        "plain": tiny,
        "other encoder": changed(tiny, model__encoder="tu-test_byobnet"),
        "supervised": changed(tiny, method="supervised", seed=5),
        "killed": changed(tiny, seed=6, optim__lr=0.02),
        "averaged": changed(tiny, seed=7, ema__decay=0.9),
        "classmix": changed(tiny, seed=8, cps__mix="classmix"),
    }
    bad = {
        "diverged": (changed(tiny, optim__lr=1e20), COLLAPSED),
        "out of memory": (changed(tiny, loss__supervised="fault_plugins:greedy"), OUT_OF_MEMORY),
        "broken": (changed(tiny, loss__supervised="fault_plugins:broken"), CRASHED),
    }
    with connected(None):
        # There: each of the first ones is followed by one that fails, and one is killed on its way. Back: nothing happens.
        there, back = tmp_path / "there", tmp_path / "back"
        for root, names in ((there, [*good]), (back, [*reversed(good)])):
            root.mkdir()
            faults = [*bad] if root == there else []
            with worker_groups(root / "tune") as pool:
                trial = Trial(pool, root)
                for name in names:
                    kill_at = 8 if name == "killed" and root == there else 0
                    assert trial.run(name, good[name], kill_at=kill_at) == {}
                    if faults:
                        after = faults.pop(0)
                        config, kind = bad[after]
                        assert trial.run(after, config, retries=0)["kind"] == kind
                        assert (root / after / ERROR_FILE).read_text()
                assert trial.run("stopped", tiny, stop_at=4) == {}
            assert not trainers(), "closed: none is left"
        for name in good:
            assert_equal_bits(there / name, back / name, but=MASKS_SO_FAR if name == "killed" else ())
        assert make_trainer(tiny, tmp_path / "cold").fit().return_value == {}
        assert_equal_bits(there / "plain", tmp_path / "cold")
        assert deterministic(there / "stopped") == deterministic(there / "plain")[:1], "not one step more"


@pytest.mark.slow
def test_a_group_without_a_training_gives_its_resources_back(tiny: TrainConfig, tmp_path: Path) -> None:
    with connected(None), worker_groups(tmp_path / "tune") as pool:
        config = changed(tiny, resources__cpus_per_worker=0.5)
        assert Trial(pool, tmp_path).run("one", config) == {}
        taken = ray.available_resources()["CPU"]
        assert trainers()
        deadline = time.monotonic() + 60
        while trainers() and time.monotonic() < deadline:
            time.sleep(1)
        assert not trainers()
        time.sleep(2)
        assert ray.available_resources()["CPU"] > taken
        assert Trial(pool, tmp_path).run("two", config) == {}, "a new group"
