"""Models to take home, made by the engine: of networks that nobody has trained, or hardly."""

from pathlib import Path

import pytest
from support import changed, write_untrained

from cps_ray.config.train import TrainConfig
from cps_ray.datasets.loader import train_batches, train_data
from cps_ray.datasets.open import fingerprints
from cps_ray.datasets.shards import open_shards
from cps_ray.engine.loop import fit
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state
from cps_ray.model.writing import write_model


@pytest.fixture(scope="session")
def pair(tiny: TrainConfig) -> TrainConfig:
    """A training of two networks of different forms."""
    fingerprint = fingerprints(open_shards(tiny.data.shards))
    b = {"encoder": "tu-test_resnet", "options": {"decoder_channels": 16}}
    return changed(tiny, model__b=b, data__fingerprint=fingerprint)


@pytest.fixture(scope="session")
def exported(pair: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of two networks; `network` is a."""
    return write_untrained(pair, tmp_path_factory.mktemp("model") / "best", {"val/miou": 0.5, "step": 6})


@pytest.fixture(scope="session")
def taught(pair: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that has learnt for a moment, so that it predicts several classes."""
    config = changed(pair, optim__name="adamw", optim__lr=0.003, schedule__steps=40, schedule__eval_every=40)
    shards, state = open_shards(config.data.shards), build_state(config, 7, Ranks())
    fit(config, state, train_batches(train_data(shards, config), config), lambda _: {}, lambda _, __: True)
    folder = tmp_path_factory.mktemp("taught") / "best"
    folder.mkdir()
    write_model(folder, config, state.evaluated, shards.manifest, {"val/iou/road": 0.5})
    return folder
