"""Fixtures for tests of several layers: a tiny data set, a tiny training."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from support import changed, write_untrained

from cps_ray.config.reader import parse_train
from cps_ray.config.train import SyntheticConfig, TrainConfig
from cps_ray.datasets.open import fingerprints
from cps_ray.datasets.prepare.assembly import one_by_one
from cps_ray.datasets.shards import open_shards
from cps_ray.datasets.synthetic import write_synthetic
from cps_ray.on_ray import cluster, jobs

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread for each of two test processes on two cores

SYNTHETIC = {"train": 24, "val": 6, "test": 6, "height_px": 32, "width_px": 48, "seed": 0}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps all tests that start Ray in one process, so that there is one cluster at a time."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fails if groups have no effect: pytest-xdist 3.8 writes them into node ids, which pytest 9.2 undoes."""
    if hasattr(session.config, "workerinput"):
        lost = [i.nodeid for i in session.items if i.get_closest_marker("ray") and not i.nodeid.endswith("@ray")]
        assert not lost, f"this pytest-xdist does not group tests under this pytest: {lost}"


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded data set, tiny, drawn once per test process."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    write_synthetic(folder, SyntheticConfig(**SYNTHETIC))
    return folder


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `prepare` run its jobs in this process: what it reports on bad data does not depend on where jobs run."""
    monkeypatch.setattr(cluster, "connected", lambda *_: nullcontext())
    monkeypatch.setattr(jobs, "on_cluster", one_by_one)


@pytest.fixture(scope="session")
def tiny(shards: Path) -> TrainConfig:
    """Six steps of CPS with CutMix on the tiny data set, without dropout, which is random per worker."""
    return parse_train(
        {
            "data": {
                "shards": str(shards),
                "labeled": 6,
                "crop_px": [32, 48],
                "labeled_batch": 4,
                "unlabeled_batch": 4,
            },
            "model": {
                "encoder": "tu-test_efficientnet",
                "options": {"decoder_channels": 16, "decoder_aspp_dropout": 0.0},
            },
            "optim": {"name": "sgd", "lr": 0.01},
            "schedule": {"steps": 6, "eval_every": 2},
            "cps": {"weight": 1.0, "ramp": 0.5},
        },
        "tiny",
    )


@pytest.fixture(scope="module")
def best(tiny: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of two networks that nobody has trained; it knows the tiny data set as its own."""
    config = changed(tiny, data__fingerprint=fingerprints(open_shards(tiny.data.shards)))
    return write_untrained(config, tmp_path_factory.mktemp("model") / "best", {"val/iou/road": 0.5})
