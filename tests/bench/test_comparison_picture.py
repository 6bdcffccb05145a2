"""Pictures of a comparison: what they show of which run."""

import numpy as np
import pytest
from support import changed

from cps_ray.bench.comparison import Comparison, Figures
from cps_ray.bench.comparison_picture import along_picture, gains_picture
from cps_ray.config.train import TrainConfig
from cps_ray.errors import ConfigError

_GAIN, _LOSS = (38, 109, 176), (200, 82, 20)


@pytest.fixture
def comparison(tiny: TrainConfig) -> Comparison:
    weights = {f"weight {weight:g}": changed(tiny, cps__weight=weight) for weight in (0.1, 0.3, 1.0)}
    trainings = {"supervised": changed(tiny, method="supervised"), **weights}
    return Comparison(trainings, "supervised", "test", [(draw, 1) for draw in range(3)])


def runs_of(comparison: Comparison, scores: dict[str, float]) -> dict[str, Figures]:
    return {
        comparison.key(name, pair): {
            "test/miou": score + 0.01 * pair[0],
            "test/iou/sky": 0.9,
            "test/iou/sign": 0.1 * score,
        }
        for name, score in scores.items()
        for pair in comparison.pairs
    }


def pixels(picture: object, color: tuple[int, int, int], left: int = 0) -> int:
    found = np.asarray(picture)[:, left:]
    return int((found == np.array(color)).all(axis=-1).sum())


def test_gains_are_blue_and_losses_orange(comparison: Comparison) -> None:
    ours = runs_of(comparison, {"supervised": 0.4, "weight 0.1": 0.45})
    better, worse = (
        gains_picture(comparison, runs) for runs in (ours, ours | runs_of(comparison, {"weight 0.1": 0.3}))
    )
    assert better.size == worse.size
    assert pixels(better, _GAIN) > 0 == pixels(better, _LOSS)
    assert pixels(worse, _LOSS) > 0
    wider = gains_picture(comparison, ours | runs_of(comparison, {"weight 0.3": 0.3}))
    assert wider.width > better.width, "each variant that was trained has a panel"


def test_the_line_along_a_setting_goes_through_its_means(comparison: Comparison) -> None:
    runs = runs_of(comparison, {"supervised": 0.4, "weight 0.1": 0.3, "weight 0.3": 0.45, "weight 1": 0.3})
    picture = np.asarray(along_picture(comparison, runs, "cps.weight"))
    rows, columns = np.nonzero((picture == np.array(_GAIN)).all(axis=-1))
    peak, ends = columns[rows.argmin()], (columns.min(), columns.max())
    assert peak == pytest.approx(sum(ends) / 2, abs=12), "0.3 lies half-way between 0.1 and 1 on a logarithmic axis"
    assert pixels(picture, _LOSS) > 0, "the control"


def test_without_any_gain_there_is_a_picture(comparison: Comparison) -> None:
    runs = runs_of(comparison, {"supervised": 0.4, "weight 0.1": 0.4})
    assert gains_picture(comparison, runs).height > 0


def test_along_needs_two_values(comparison: Comparison) -> None:
    comparison = Comparison(
        {name: changed(each, compute__channels_last=True) for name, each in comparison.trainings.items()},
        "supervised",
        "test",
        comparison.pairs,
    )
    runs = runs_of(comparison, {"supervised": 0.4, "weight 0.1": 0.3, "weight 0.3": 0.45})
    for key in ("cps.mix", "optim.lr", "no.such", "compute.channels_last"):
        with pytest.raises(ConfigError, match=f"--along {key}: needs two variants"):
            along_picture(comparison, runs, key)
