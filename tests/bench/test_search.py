"""`bench search` on made-up curves."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import changed

from cps_ray.bench import search
from cps_ray.bench.__main__ import main
from cps_ray.bench.search import Grid, Point, Recorded, replay
from cps_ray.config.space import apply
from cps_ray.config.sweep import SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.errors import ConfigError

STEPS, EVERY = 40, 10


@pytest.fixture
def sweep(tiny: TrainConfig, tmp_path: Path) -> SweepConfig:
    train = changed(tiny, schedule__steps=STEPS, schedule__eval_every=EVERY)
    return SweepConfig.model_validate(
        {
            "version": 1,
            "name": "s",
            "output": str(tmp_path),
            "train": train.dump(),
            "budget": {"trials": 3, "patience": 1},
            "sampler": {"startup_trials": 3},
            "early_stopping": {"type": "asha", "grace": 20, "reduction": 2},
            "search_space": {
                "cps.weight": {"type": "float", "low": 0.1, "high": 10.0, "log": True},
                "cps.mix": {"type": "choice", "values": ["none", "cutmix"]},
            },
        }
    )


def made_up(config: TrainConfig) -> dict[int, float]:
    """Best at a weight of 10 with cutmix; what is worse is so from the start. At 0.1 without, it diverges."""
    quality = 0.6 - 0.1 * abs(math.log10(config.cps.weight) - 1.0) - 0.05 * (config.cps.mix == "none")
    last = 20 if config.cps.mix == "none" and config.cps.weight < 0.2 else STEPS
    return {step: quality * step / STEPS for step in range(EVERY, last + 1, EVERY)}


@pytest.fixture
def grid(sweep: SweepConfig) -> Grid:
    points = search.points_of(sweep.search_space, 3)
    return Grid(sweep, [Recorded(point, made_up(apply(sweep.train, point, ""))) for point in points])


def test_the_grid_covers_the_space(grid: Grid) -> None:
    weights = [one.point["cps.weight"] for one in grid.trainings]
    assert weights == pytest.approx([0.1, 0.1, 1.0, 1.0, 10.0, 10.0])
    assert grid.best == pytest.approx(0.6)
    assert grid.steps == 5 * STEPS + 20
    near = grid.nearest({"cps.weight": 2.9, "cps.mix": "none"}).point  # in the logarithm 1 is nearer than 10
    assert (near["cps.weight"], near["cps.mix"]) == (pytest.approx(1.0), "none")


class Script:
    """Asks for points in turn, and stops those that it is told to."""

    def __init__(self, points: list[Point], stopped: dict[int, int]) -> None:
        self.points, self.stopped = points, stopped
        self.ended: dict[int, bool] = {}

    def ask(self) -> tuple[int, Point]:
        self.count = getattr(self, "count", -1) + 1
        return self.count, self.points[self.count]

    def report(self, number: int, step: int, value: float) -> bool:
        return self.stopped.get(number) != step

    def tell(self, number: int, *, failed: bool) -> None:
        self.ended[number] = failed


# One after the other: 20 steps and the one that finds no evaluation any more, 20 until it is stopped, 40. Two at once: the fourth has come to
# step 20 when the third one ends.
@pytest.mark.parametrize(("at_once", "steps"), [(1, 30 + 20 + 40), (2, 30 + 20 + 40 + 20)])
def test_the_cost_is_that_of_all_steps_until_a_good_training_ends(grid: Grid, at_once: int, steps: int) -> None:
    points: list[Point] = [
        {"cps.weight": 0.1, "cps.mix": "none"},
        {"cps.weight": 1.0, "cps.mix": "cutmix"},
        {"cps.weight": 9.0, "cps.mix": "cutmix"},
        {"cps.weight": 1.0, "cps.mix": "none"},
    ]
    script = Script(points, {1: 20})
    fraction = replay(script, grid, at_once)
    assert fraction == pytest.approx(steps / grid.steps)
    assert script.ended == {0: True, 1: False, 2: False}


def test_what_is_not_found_costs_the_whole_grid(grid: Grid) -> None:
    assert replay(Script([{"cps.weight": 1.0, "cps.mix": "none"}] * 9, {}), grid, 1) == 1.0


def test_searches_are_replayed_from_a_record(
    sweep: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(search, "load_sweep", lambda file, overrides: sweep)
    trained: list[dict[str, Any]] = []

    def train(raw: dict[str, Any], metric: str, threads: int) -> dict[int, float]:
        trained.append(raw)
        if len(trained) == 3:
            raise ConfigError("lost")
        return made_up(TrainConfig.model_validate(raw))

    monkeypatch.setattr(search, "train", train)
    # Without processes, which would import torch once more.
    monkeypatch.setattr(search, "in_processes", lambda _, calls: ((key, call()) for key, call in calls.items()))
    file, out = tmp_path / "grid.json", tmp_path / "out.json"
    words = ["search", "--record", str(file), "--points", "3"]
    assert main(words) == 2
    assert main(["search", str(file)]) == 2
    assert "4 of 6 trainings are missing. Go on with: " in capsys.readouterr().err
    assert main(words) == 0
    assert len(trained) == 3 + 4
    assert main([*words[:-1], "2"]) == 2
    assert "holds trainings of another points" in capsys.readouterr().err
    assert str(tmp_path) not in file.read_text()
    assert main(["search", str(file), "--set", "early_stopping.grace=10"]) == 2
    assert "--set changes what is recorded" in capsys.readouterr().err
    picture = tmp_path / "out.png"
    assert main(["search", str(file), "--seeds", "2", "--json", str(out), "--png", str(picture)]) == 0
    assert "not found" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [row["at_once"] for row in found["searches"]] == [1] * 7 + [2] * 7
    names = [row["search"] for row in found["searches"][:7]]
    assert [name.split(", ")[1] for name in names[:3]] == ["asha", "median", "none"]
    assert names[3:] == [
        *(f"Optuna: TPE, {each} pruner" for each in ("median", "successive halving", "no")),
        "random, no pruner",
    ]
    with Image.open(picture) as image:
        colors = {color for _, color in image.convert("RGB").getcolors(2**16)}
    assert {(38, 109, 176), (200, 82, 20)} <= colors, "dots and means"
    for row in found["searches"]:
        assert len(row["fractions"]) == 2
        assert all(0.0 < fraction <= 1.0 for fraction in row["fractions"])
    assert main(["search"]) == 2
