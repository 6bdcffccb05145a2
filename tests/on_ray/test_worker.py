"""What a worker writes into the run's log."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import segmentation_models_pytorch as smp
import torch
from support import changed

from cps_ray.config.train import TrainConfig
from cps_ray.datasets.loader import evaluated_images, train_data
from cps_ray.datasets.shards import open_shards
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state
from cps_ray.on_ray.worker import WorkerReport, _log_start, validate


def test_the_log_names_classes_that_vanish_and_leaves_the_others_to_the_records(
    tiny: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = SimpleNamespace(ranks=Ranks(rank=1))  # rank 0 sets gauges, which start Ray
    report = WorkerReport(tiny, tmp_path, "sweep", "val/miou", state, logging.getLogger("test"), lambda step: True)
    ratios = {"road": 1.2, "sign": 0.123, "car": 0.5, "pole": 0.04}
    metrics = {"step": 20, "val/miou": 0.5, "train/loss": 1.0, "time/images_per_s": 3.0, "time/data_wait": 0.0}
    metrics |= {"pseudo/coverage": 0.9, **{f"pseudo/frequency_ratio/{name}": value for name, value in ratios.items()}}
    with caplog.at_level(logging.INFO):
        report._log_evaluation(metrics)
    assert caplog.messages[1:] == [
        "pseudo labels: coverage 0.900",
        "step 20: pseudo labels hold less than half of the pixels that the masks have of: pole (0.04), sign (0.12)",
    ]


def test_the_log_says_what_a_weights_file_filled(
    tiny: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = smp.encoders.get_encoder(tiny.model.encoder, weights=None)
    torch.save({"model": {**encoder.state_dict(), "head.bias": torch.ones(1)}}, tmp_path / "w.pt")
    config = changed(tiny, model__weights_file=str(tmp_path / "w.pt"))
    data = train_data(open_shards(config.data.shards), config)
    with caplog.at_level(logging.INFO):
        _log_start(logging.getLogger("test"), config, data, build_state(config, 7, Ranks()))
    said = "filled by 80 tensors of w.pt under model.model.; 1 tensor not used: model.head.*"
    assert [line for line in caplog.messages if "filled" in line] == [
        f"network {name}: {tiny.model.encoder} {said}" for name in "ab"
    ]


def test_a_training_is_validated_on_the_fold_that_is_held_out(tiny: TrainConfig) -> None:
    config = changed(tiny, data__folds={"count": 6, "held_out": 1})
    shards = open_shards(config.data.shards)
    data, evaluated = train_data(shards, config), evaluated_images(shards, config, "val")
    config = changed(config, data__slices={"fold": evaluated.ids[0], "val": "val_*"})
    metrics = validate(config, shards.classes, data, evaluated, build_state(config, 7, Ranks()))
    assert metrics["val/miou"] == metrics["val/fold/miou"]
    assert "val/val/miou" not in metrics
