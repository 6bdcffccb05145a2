"""`bench verdict`: what it finds in simulated pools, and a small pool of its own."""

import json
from pathlib import Path

import numpy as np
import pytest
from pools import CLASSES, simulate_arm, simulate_images

from cps_ray.bench import verdict
from cps_ray.bench.__main__ import main
from cps_ray.bench.verdict import check_claims, check_coverage
from cps_ray.model.intervals import class_ious, image_ious

SIZES = ["data.synthetic.train=24", "data.synthetic.val=6", "data.synthetic.test=12"]


@pytest.mark.parametrize(
    ("of_training", "of_both", "percentiles_hold"),
    [(0.04, 0.3, 0.95), (0.04, 0.0, 0.85), (0.0, 1.0, 1.0)],
    ids=["all effects", "of trainings and images", "of both together"],
)
def test_the_interval_covers_and_tells_no_arm_from_itself(
    of_training: float, of_both: float, percentiles_hold: float
) -> None:
    rng = np.random.default_rng(0)
    images = simulate_images(rng, 1000)
    ours, theirs = (
        simulate_arm(rng, images, rng.normal(odds, of_training, (24, 1)) + np.zeros(7), of_both=of_both)
        for odds in (0.1, 0.0)
    )
    found = check_coverage(ours, theirs, CLASSES, 200)
    assert found["truth"] == pytest.approx((image_ious(ours.sum(1)) - image_ious(theirs.sum(1))).mean())
    assert 0.92 <= found["covered"] <= 0.99
    assert found["classes_covered"] >= 0.9
    assert found["percentile_covered"] <= percentiles_hold, "nothing would be gained beside resampling three trainings"
    same = check_claims(theirs, CLASSES, 200)
    assert same["better"] + same["worse"] <= 0.07
    assert same["hurt"] <= 0.07


def test_a_large_gain_is_found() -> None:
    rng = np.random.default_rng(1)
    images = simulate_images(rng, 500)
    ours, theirs = (simulate_arm(rng, images, np.full((6, 7), odds)) for odds in (1.0, 0.0))
    assert check_coverage(ours, theirs, CLASSES, 20)["better"] == 1.0
    assert check_coverage(theirs, ours, CLASSES, 20)["worse"] == 1.0


def test_a_pool_is_trained_once_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_by_one(_: int, calls: dict) -> list:  # without processes, which would import torch once more
        return [(name, call()) for name, call in calls.items()]

    monkeypatch.setattr(verdict, "in_processes", one_by_one)
    pool, file = tmp_path / "pool", tmp_path / "found.json"
    words = ["verdict", str(pool), "--vary", "draw", "--steps", "1", "--draws", "3", "--json", str(file)]
    words += [word for size in SIZES for word in ("--set", size)]
    assert main([*words, "--trainings", "2"]) == 0
    assert capsys.readouterr().out.startswith("cps-0: test mIoU ")
    with np.load(pool / "cps-0.npz") as arrays:
        assert arrays["counts"].shape == (12, 3, 7)
        assert np.isfinite(class_ious(arrays["counts"].sum(0))).any()
    found = json.loads(file.read_text())
    assert (found["vary"], found["trainings"], found["images"]) == ("draw", 2, 12)
    assert {*found["found"]} == {"cps against supervised", "cps against cps", "supervised against supervised"}
    # A file that is lost is trained again, and gives the same.
    before = (pool / "supervised-1.npz").read_bytes()
    (pool / "supervised-1.npz").unlink()
    assert main([*words, "--trainings", "2"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "test mIoU" in line] == [
        "supervised-1"
    ]
    assert (pool / "supervised-1.npz").read_bytes() == before
    assert json.loads(file.read_text()) == found
    assert main([*words, "--trainings", "2", "--vary", "seed"]) == 2
    assert f"{pool}: its trainings must have the settings that are asked for" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--trainings", "1"])
    assert "a whole number of at least 2" in capsys.readouterr().err
