"""What a worker writes into the run's log."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import segmentation_models_pytorch as smp
import torch
from support import changed

from cps_ray.config.reader import load_train, parse_train
from cps_ray.config.train import TrainConfig
from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.datasets.loader import evaluated_images, train_data
from cps_ray.datasets.shards import open_shards
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import build_state
from cps_ray.errors import ConfigError
from cps_ray.on_ray.worker import WorkerReport, _log_start, check_same, validate
from cps_ray.runs import CONFIG_FILE


class Beside(Ranks):
    """Rank 0 beside a rank 1 that has the driver's training."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class BesideAnother(Ranks):
    """Rank 0 beside a rank 1 that has another one."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + torch.tensor([0, 1])


def test_the_hash_is_that_of_the_training_as_it_is_read_from_its_file(tiny: TrainConfig, tmp_path: Path) -> None:
    config = changed(tiny, optim__lr=0.1 + 0.2, data__slices={"ü": "*_0[12]"}, augment__scale=(0.75, 1.5))
    (tmp_path / CONFIG_FILE).write_text(dump_yaml(config.dump(str(tmp_path))))
    read = load_train(tmp_path / CONFIG_FILE)
    assert read.sha256 == config.sha256 == parse_train(config.dump(), "train").sha256
    assert changed(config, optim__lr=0.3).sha256 != config.sha256
    assert config.model_copy(update={"sinks": ("a:b",)}).sha256 == config.sha256


def test_every_rank_has_the_drivers_training_or_none_trains(
    tiny: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("test")
    with caplog.at_level(logging.INFO):
        check_same(tiny, tiny.sha256, Beside(0, 2), log)
    assert caplog.messages == [f"config sha256 {tiny.sha256}, on all 2 rank(s) as the driver wrote it"]
    other = changed(tiny, optim__lr=0.5)
    for config, ranks, wrong in ((other, Beside(0, 2), "0"), (tiny, BesideAnother(0, 2), "1")):
        with pytest.raises(ConfigError, match=f"{tiny.sha256}.* but rank.s. {wrong} of 2 read .* {config.sha256}"):
            check_same(config, tiny.sha256, ranks, log)


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
        _log_start(logging.getLogger("test"), config, data, build_state(config, 7, Ranks()), ())
    said = "filled by 80 tensors of w.pt under model.model.; 1 tensor not used: model.head.*"
    assert [line for line in caplog.messages if "filled" in line] == [
        f"network {name}: {tiny.model.encoder} {said}" for name in "ab"
    ]


def test_the_log_says_what_a_power_makes_classes_weigh(tiny: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    config = changed(tiny, cps__class_weights=0.5)
    shards = open_shards(config.data.shards)
    data = train_data(shards, config)
    weighed = data.weigh(config)
    with caplog.at_level(logging.INFO):
        _log_start(logging.getLogger("test"), weighed, data, build_state(config, 7, Ranks()), shards.classes)
    assert caplog.messages[-1].startswith(
        f"cps: classes weigh {shards.classes[0]} {weighed.cps.class_weights[0]:.3g}, "
    )


def test_a_training_is_validated_on_the_fold_that_is_held_out(tiny: TrainConfig) -> None:
    config = changed(tiny, data__folds={"count": 6, "held_out": 1})
    shards = open_shards(config.data.shards)
    data, evaluated = train_data(shards, config), evaluated_images(shards, config, "val")
    config = changed(config, data__slices={"fold": evaluated.ids[0], "val": "val_*"})
    metrics = validate(config, shards.classes, data, evaluated, build_state(config, 7, Ranks()))
    assert metrics["val/miou"] == metrics["val/fold/miou"]
    assert "val/val/miou" not in metrics
