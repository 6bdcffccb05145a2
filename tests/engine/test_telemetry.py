"""What is measured between evaluations, and how a collapse is detected."""

import pytest
import torch
from support import changed

from cps_ray.config.train import TrainConfig
from cps_ray.engine.batch import IGNORE, Batch
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.telemetry import Meter, collapse, is_kept_up, is_lost, vanishing
from cps_ray.errors import DivergedError


def test_means_are_over_the_steps_that_measured() -> None:
    meter = Meter(Ranks())
    for step, loss in enumerate([1.0, 2.0, 6.0]):
        measured = {"loss": torch.tensor(loss)} | ({"grad_norm_a": torch.tensor(4.0)} if step == 0 else {})
        meter.add(step, measured)
    read = meter.read()
    assert read["train/loss"] == pytest.approx(3.0)
    assert read["train/grad_norm_a"] == pytest.approx(4.0)
    assert read["memory/peak_bytes"] > 2**20
    assert read["time/data_wait_s"] == 0.0


def test_pseudo_labels_are_summed_up() -> None:
    """100 pixels: a and b agree on 30 of class 0 and 20 of class 1, differ on 30; a is unsure of 10, b alone of 10."""
    labels = torch.zeros(256, 256, dtype=torch.float64)
    labels[0, 0], labels[1, 1], labels[0, 1], labels[1, 0] = 30, 20, 20, 10
    labels[IGNORE, 0], labels[1, IGNORE] = 10, 10
    confidence = torch.tensor([[56.0, 66.0], [80.0, 100.0]], dtype=torch.float64)
    meter = Meter(Ranks())
    meter.add(0, {"loss": torch.tensor(0.0), "labels": labels, "confidence": confidence})
    read = meter.read()
    assert read["pseudo/coverage"] == pytest.approx(0.9)
    assert read["pseudo/agreement"] == pytest.approx(50 / 80)
    assert read["pseudo/top_fraction"] == pytest.approx(50 / 80)
    chance = (50 * 40 + 30 * 40) / 80**2
    assert read["pseudo/kappa"] == pytest.approx((50 / 80 - chance) / (1 - chance))
    assert read["pseudo/confidence"] == pytest.approx(122 / 180)
    assert not {name for name in read if name.startswith("train/")} - {"train/loss"}
    assert not {name for name in read if name.startswith("pseudo/") and name.count("/") > 1}


def test_one_network_agrees_with_nobody() -> None:
    labels = torch.zeros(256, dtype=torch.float64)
    labels[0], labels[2], labels[IGNORE] = 60, 30, 10
    meter = Meter(Ranks())
    confidence = torch.tensor([[6.0, 0.0, 2.0], [8.0, 0.0, 4.0]])
    meter.add(0, {"loss": torch.tensor(0.0), "labels": labels, "confidence": confidence})
    read = meter.read()
    pseudo = {name: value for name, value in read.items() if name.startswith("pseudo/")}
    assert pseudo == pytest.approx({"pseudo/coverage": 0.9, "pseudo/top_fraction": 2 / 3, "pseudo/confidence": 8 / 12})


def test_classes_that_vanish_from_the_pseudo_labels_are_named() -> None:
    """Two steps; of the sure labels of both networks, 90 are road, 9 sign, 1 car; of the masks 50, 25, 0, and 25 are of a train."""
    labels = torch.zeros(256, 256, dtype=torch.float64)
    labels[0, 0], labels[0, 1], labels[1, IGNORE], labels[IGNORE, 2] = 41, 8, 1, 1
    mask = torch.tensor([0] * 50 + [1] * 25 + [3] * 25 + [IGNORE] * 20, dtype=torch.uint8).view(1, 10, 12)
    confidence = torch.tensor([[9.0, 2.0, 0.0, 0.0], [10.0, 4.0, 0.0, 0.0]], dtype=torch.float64)
    meter = Meter(Ranks(), ["road", "sign", "car", "train"])
    list(meter.timed([Batch(torch.zeros(1, 3, 10, 12, dtype=torch.uint8), mask, None)]))
    for step in range(2):
        meter.add(step, {"loss": torch.tensor(0.0), "labels": labels, "confidence": confidence})
    read = meter.read()
    found = {name: value for name, value in read.items() if name.startswith("pseudo/") and name.count("/") > 1}
    assert found == pytest.approx(
        {
            "pseudo/confidence/road": 0.9,
            "pseudo/confidence/sign": 0.5,
            "pseudo/frequency/road": 0.90,
            "pseudo/frequency/sign": 0.09,
            "pseudo/frequency/car": 0.01,
            "pseudo/frequency/train": 0.0,
            "pseudo/frequency_ratio/road": 0.9 / 0.5,
            "pseudo/frequency_ratio/sign": 0.09 / 0.25,
            "pseudo/frequency_ratio/train": 0.0,
        }
    )
    assert vanishing(read) == "train (0.00), sign (0.36)"
    assert vanishing({"pseudo/frequency_ratio/road": 0.5, "pseudo/frequency/sign": 0.0}) is None


def test_waiting_and_images_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 4.0, 4.5, 10.0, 10.0])
    monkeypatch.setattr("cps_ray.engine.telemetry.time.perf_counter", lambda: next(now))
    image, mask = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 4, 4, dtype=torch.uint8)
    meter = Meter(Ranks())  # at 0 s
    taken = meter.timed([Batch(image, mask, image), Batch(image, mask, None)])
    next(taken), next(taken)  # asked at 1 and 4 s, there at 3 and 4.5 s
    meter.add(0, {"loss": torch.tensor(1.0)})
    read = meter.read()  # at 10 s
    assert read["time/data_wait_s"] == pytest.approx(2.5)
    assert read["time/data_wait"] == pytest.approx(0.25)
    assert read["time/images_per_s"] == pytest.approx(6 / 10)


def test_a_loss_that_is_not_finite_is_named_by_its_first_step() -> None:
    meter = Meter(Ranks())
    meter.add(4, {"loss": torch.tensor(1.0)})
    with pytest.raises(DivergedError, match="not finite at step 5"):
        meter.add(5, {"loss": torch.tensor(float("inf"))})


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"val/iou/road": 0.4, "val/iou/car": 0.0, "pseudo/top_fraction": 0.9995}, "one class takes all"),
        ({"val/iou/road": 0.4, "val/iou/car": 0.0}, "one class takes all"),
        ({"val/iou/road": 0.4, "val/iou/car": 0.0, "pseudo/top_fraction": 0.9}, None),
        ({"val/iou/road": 0.4, "val/iou/car": 0.01, "pseudo/top_fraction": 1.0}, None),
        ({"val/iou/road": 0.4}, None),
        ({"pseudo/kappa": 0.01}, "no more than by chance"),
        ({"pseudo/kappa": 0.1}, None),
        ({"pseudo/kappa": 0.0, "pseudo/top_fraction": 0.95}, None),
        ({}, None),
    ],
)
def test_collapses_are_told_from_late_learning(metrics: dict[str, float], reason: str | None) -> None:
    why = collapse(metrics)
    assert (why is None) if reason is None else (why is not None and reason in why)


KEPT_UP = {
    "pseudo/coverage": 1.0,
    "pseudo/top_fraction": 0.9995,
    "pseudo/agreement": 0.9995,
    "labeled/top_fraction": 0.97,
    "cps/weight": 1.0,
    "fixmatch/weight": 1.0,
    "mean_teacher/weight": 100.0,
}
ONE_NETWORK = {name: value for name, value in KEPT_UP.items() if name != "pseudo/agreement"}


@pytest.mark.parametrize(
    ("method", "metrics", "expected"),
    [
        ("cps", KEPT_UP, True),
        ("fixmatch", ONE_NETWORK, True),  # of one network no agreement is measured
        ("supervised", {"labeled/top_fraction": 0.97}, False),  # no pseudo labels
        ("mean_teacher", ONE_NETWORK, False),  # no hard ones
        ("cps", KEPT_UP | {"cps/weight": 0.0}, False),  # they weigh nothing
        ("cps", KEPT_UP | {"pseudo/top_fraction": 0.99}, False),
        ("cps", KEPT_UP | {"pseudo/agreement": 0.9}, False),  # network b still tells classes apart
        ("fixmatch", ONE_NETWORK | {"pseudo/coverage": 0.9}, False),  # a tenth is unsure, and taught nothing
        ("fixmatch", {"pseudo/coverage": 0.0, "fixmatch/weight": 1.0, "labeled/top_fraction": 0.5}, False),  # all is
        ("cps", KEPT_UP | {"labeled/top_fraction": 0.9995}, False),  # the masks say the same
        ("cps", {name: value for name, value in KEPT_UP.items() if name != "labeled/top_fraction"}, False),
        ("cps", KEPT_UP | {"pseudo/top_fraction": 0.5, "pseudo/agreement": 0.5, "pseudo/kappa": 0.0}, False),
    ],
)
def test_only_hard_labels_of_one_class_keep_a_collapse_up(
    tiny: TrainConfig, method: str, metrics: dict[str, float], expected: bool
) -> None:
    config = changed(tiny, method=method, ema__decay=0.99)
    assert is_kept_up(config, metrics) == expected


def test_masks_are_counted_over_all_the_training() -> None:
    """Every tenth batch: the first has 3 of 4 pixels of class 0 and ignored ones beside, the eleventh 4 of class 5."""
    image = torch.zeros(1, 3, 2, 4, dtype=torch.uint8)
    first, other = (torch.tensor([[row, [IGNORE] * 4]], dtype=torch.uint8) for row in ([0, 0, 0, 1], [5, 5, 5, 5]))
    meter = Meter(Ranks())
    batches = meter.timed([Batch(image, mask, None) for mask in (first, *[other] * 9, other)])
    next(batches)
    assert read_top(meter) == pytest.approx(3 / 4)
    meter.reset()
    list(batches)
    assert read_top(meter) == pytest.approx(4 / 8)


def read_top(meter: Meter) -> float:
    meter.add(0, {"loss": torch.tensor(1.0)})
    return float(meter.read()["labeled/top_fraction"])


def test_a_collapse_is_final_after_three_evaluations_of_the_second_half(tiny: TrainConfig) -> None:
    config = changed(tiny, schedule__steps=20, schedule__eval_every=2)
    assert [is_lost(config.schedule, step, step // 2) for step in (10, 12, 14, 16, 20)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert [is_lost(config.schedule, 20, collapsed) for collapsed in (0, 2, 3)] == [False, False, True]
