from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cps_ray.config.sweep import FinalConfig, SweepConfig
from cps_ray.config.train import TrainConfig
from cps_ray.on_ray.evaluate_runs import CheckpointScores
from cps_ray.results import _curve_lines
from cps_ray.search.curve import learning_curve
from cps_ray.search.final_phase import EvaluatedRun, FinalRun
from cps_ray.search.tune_session import TrainingJob


def evaluated(
    config: TrainConfig, arm: str, repeat: int, labels: float, images: float, hits: list[int]
) -> EvaluatedRun:
    """Images of 1000 pixels of one class, of which `hits` are found: an mIoU of their mean."""
    run = FinalRun(arm, repeat, TrainingJob("x", Path(), config), labels=labels, images=images)
    counts = np.array([[[hit], [1000], [hit]] for hit in hits])
    scores = CheckpointScores({}, [], ids=tuple("abcdef"[: len(hits)]), counts=counts)
    return EvaluatedRun(run, Path(), 6, 0.5, scores, round(8 * labels), round(400 * images))


def test_a_logarithm_goes_on_as_one(tiny: TrainConfig) -> None:
    """Per doubling of the labels 4 points in training 1 and 6 in training 2; of the unlabelled images 1 in both."""
    runs = [
        evaluated(tiny, "best", repeat, labels, images, [hits, hits + 9])
        for repeat, slope in ((1, 0.04), (2, 0.06))
        for labels, images in ((1.0, 1.0), (0.5, 1.0), (0.25, 1.0), (1.0, 0.5))
        if (hits := round(1000 * (0.9 + slope * np.log2(labels) + 0.01 * np.log2(images))))
    ]
    labels, images = learning_curve(runs, SweepConfig.model_construct(final=FinalConfig(curve=(0.25, 0.5))))
    assert [point["count"] for point in labels["points"]] == [2, 4, 8]
    assert labels["more"]["count"] == 8
    assert labels["more"]["gain"] == pytest.approx(0.05)
    # Over two trainings, whose gains are 0.04 and 0.06: t of one degree of freedom; images add nothing.
    half = 12.706 * 0.01
    assert (labels["more"]["low"], labels["more"]["high"]) == pytest.approx((0.05 - half, 0.05 + half), abs=2e-4)
    assert images["more"]["gain"] == pytest.approx(0.01)
    assert [*_curve_lines([labels, images])] == [
        "What next, best: 8 more labels: about +5.0 points (-7.7 to +17.7: not distinguishable from 0); "
        "400 more unlabelled images: about +1.0 points (+1.0 to +1.0)"
    ]


def test_a_curve_needs_more_than_one_point(tiny: TrainConfig) -> None:
    whole = evaluated(tiny, "best", 1, 1.0, 1.0, [500, 600])
    other = replace(whole, run=replace(whole.run, arm="plain"))
    assert learning_curve([whole, other], SweepConfig.model_construct(final=FinalConfig())) == []
