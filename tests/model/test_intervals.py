"""The difference of two arms: against t-tests where these are exact, its groups and folds, whether it covers, its words."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from pools import CLASSES, simulate_arm, simulate_images
from scipy import stats

from cps_ray.engine.metrics import class_counts, iou, mean_iou
from cps_ray.model.intervals import Difference, class_ious, difference, image_ious, in_words


def counts_of(iou_TI: np.ndarray) -> list[np.ndarray]:
    """Images of one class with 10 000 true pixels, of which this fraction is found: their IoU, and that of all, is a plain mean."""
    found = np.round(10_000 * iou_TI).astype(np.int64)
    full = np.full_like(found, 10_000)
    return [*np.stack([found, full, found], axis=-1)[..., None]]


def test_scores_are_those_of_the_metrics() -> None:
    matrices = torch.randint(0, 50, (5, 3, 3), generator=torch.Generator().manual_seed(0))
    matrices[0] = 0
    matrices[1:3, 2] = matrices[1:3, :, 2] = 0
    counts = class_counts(matrices).numpy()
    assert image_ious(counts) == pytest.approx([mean_iou(each) for each in matrices], nan_ok=True)
    assert class_ious(counts[1]) == pytest.approx(iou(matrices[1]).numpy(), nan_ok=True)


def test_with_images_alike_it_is_the_t_interval_over_trainings() -> None:
    ours, theirs = np.random.default_rng(0).normal(0.5, 0.02, (2, 4)).round(4)
    found = difference(*(counts_of(np.repeat(each[:, None], 9, axis=1)) for each in (ours, theirs)), ["x"])
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.gain == pytest.approx((ours - theirs).mean())
    assert (found.trainings, found.trainings_covered, found.images, found.groups) == (4, True, 9, 9)


@pytest.mark.parametrize("trainings", [1, 3])
def test_with_trainings_alike_it_is_the_t_interval_over_images(trainings: int) -> None:
    ours, theirs = np.random.default_rng(1).normal(0.5, 0.1, (2, 20)).round(4)
    found = difference(*(counts_of(np.repeat(each[None], trainings, axis=0)) for each in (ours, theirs)), ["x"])
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.trainings_covered == (trainings > 1)
    assert (found.better, found.worse) == ((ours > theirs).sum(), (ours < theirs).sum())
    assert found.classes["x"] == pytest.approx({"gain": found.gain, "low": found.low, "high": found.high})


def test_with_both_it_is_cochran_and_cox_on_an_analysis_of_variance() -> None:
    ours, theirs = np.random.default_rng(7).normal(0.5, 0.1, (2, 3, 20)).round(4)
    gain_TI = ours - theirs + np.linspace(-0.2, 0.2, 20)  # some images are hard for one arm
    found = difference(counts_of(theirs + gain_TI), counts_of(theirs), ["x"])
    of_training, of_image = gain_TI.mean(1, keepdims=True), gain_TI.mean(0)
    of_both = gain_TI - of_training - of_image + gain_TI.mean()
    over_images = (3 * of_image.var(ddof=1) - (of_both**2).sum() / (2 * 19)) / (3 * 20)
    over_trainings = of_training.var(ddof=1) / 3
    quantiles = stats.t.ppf(0.975, [19, 2])
    half = quantiles @ [over_images, over_trainings] / np.sqrt(over_images + over_trainings)
    assert over_images > 0.1 * over_trainings
    assert (found.low, found.high) == pytest.approx((gain_TI.mean() - half, gain_TI.mean() + half), rel=1e-3)


def test_folds_have_the_corrected_t_interval() -> None:
    """Nadeau and Bengio's: the variance of a mean over folds is s^2 (1 / K + 1 / (K - 1)), with K - 1 degrees of freedom."""
    ours, theirs = np.random.default_rng(2).normal(0.5, 0.1, (2, 5, 6)).round(4)
    found = difference(counts_of(ours), counts_of(theirs), ["x"], folds=True)
    of_folds = (ours - theirs).mean(1)
    half = stats.t.ppf(0.975, 4) * of_folds.std(ddof=1) * np.sqrt(1 / 5 + 1 / 4)
    assert found.gain == pytest.approx(of_folds.mean())
    assert (found.low, found.high) == pytest.approx((found.gain - half, found.gain + half))
    assert (found.images, found.groups, found.trainings, found.trainings_covered) == (30, 30, 5, True)
    assert found.better + found.worse == 30


def test_folds_may_differ_in_size_and_are_scored_together() -> None:
    rng = np.random.default_rng(3)
    images = simulate_images(rng, 17)
    ours, theirs = (simulate_arm(rng, images, np.full((1, 7), odds))[0] for odds in (0.5, 0.0))
    cut = [np.split(each, [5, 9, 13]) for each in (ours, theirs)]
    found = difference(*cut, CLASSES, [f"{number // 2}" for number in range(17)], folds=True)
    assert found.gain == pytest.approx(image_ious(ours.sum(0)) - image_ious(theirs.sum(0)))
    assert (found.images, found.groups, found.trainings) == (17, 9, 4)


def test_the_intervals_of_classes_hold_together() -> None:
    ours, theirs = np.random.default_rng(4).normal(0.5, 0.1, (2, 2, 20)).round(4)
    both = ([np.concatenate([counts_of(each)[n] for n in (0, 1)], axis=-1)[None][0]] for each in (ours, theirs))
    found = difference(*both, ["x", "y"])
    for name, ours_I, theirs_I in zip("xy", ours, theirs, strict=True):
        expected = stats.ttest_rel(ours_I, theirs_I).confidence_interval(1 - 0.05 / 2)
        assert found.classes[name] == pytest.approx(
            {"gain": (ours_I - theirs_I).mean(), "low": expected.low, "high": expected.high}
        )
    # A class that is nowhere has no entry and makes the others' intervals no wider.
    alone = [counts_of(each[:1]) for each in (ours, theirs)]
    beside = [[np.pad(each, ((0, 0), (0, 0), (0, 1))) for each in arm] for arm in alone]
    assert difference(*beside, ["x", "nowhere"]) == difference(*alone, ["x"])


def test_a_class_of_one_image_has_a_gain_but_no_interval() -> None:
    rng = np.random.default_rng(8)
    arms = [simulate_arm(rng, simulate_images(rng, 9), np.zeros((3, 7))) for _ in "ab"]
    for arm in arms:
        arm[:, 1:, :, 6] = 0
        arm[:, 0, :, 6] = 5
    found = difference(*arms, CLASSES)
    assert found.classes["sign"] == {"gain": 0.0, "low": None, "high": None}
    assert found.low is not None
    assert found.classes["car"]["low"] is not None


def test_groups_are_left_out_whole() -> None:
    """Copies of one image in one group say no more than the image itself; taken for images of their own, they would."""
    rng = np.random.default_rng(1)
    images = simulate_images(rng, 12)
    ours, theirs = (simulate_arm(rng, images, np.full((1, 7), odds)) for odds in (0.2, 0.0))
    alone = difference(ours, theirs, CLASSES)
    many = ours.repeat(9, axis=1), theirs.repeat(9, axis=1)
    grouped = difference(*many, CLASSES, [f"{n:02}" for n in range(12) for _ in range(9)])
    apart = difference(*many, CLASSES)
    assert (grouped.images, grouped.groups, apart.groups) == (108, 12, 108)
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high))
    assert apart.high - apart.low < 0.6 * (grouped.high - grouped.low)
    single = difference(*many, CLASSES, ["x"] * 108)
    assert (single.low, single.high, single.groups) == (None, None, 1)
    assert {each["low"] for each in single.classes.values()} == {None}
    assert "gives no interval" in in_words(single)


def test_an_arm_is_not_told_from_itself() -> None:
    rng = np.random.default_rng(5)
    arm = simulate_arm(rng, simulate_images(rng, 9), np.zeros((3, 7)))
    found = difference(arm, arm, CLASSES)
    assert (found.gain, found.low, found.high, found.better, found.worse) == (0, 0, 0, 0, 0)
    assert in_words(found).startswith("not distinguishable: +0.0 points")


SAID = Difference(0.064, 0.051, 0.076, 61, 15, 80, 80, 3, True, {"sign": {"gain": 0.1, "low": -0.1, "high": 0.3}})
HURT = {
    "sign": {"gain": -0.12, "low": -0.181, "high": -0.059},
    "car": {"gain": -0.1, "low": None, "high": None},
    "sky": {"gain": -0.1, "low": -0.3, "high": 0.1},
}


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (SAID, "better by 6.4 points (95 % interval 5.1 to 7.6; better on 61 of 80 images)"),
        (
            replace(SAID, gain=-0.064, low=-0.076, high=-0.051),
            "worse by 6.4 points (95 % interval 5.1 to 7.6; worse on 15 of 80 images)",
        ),
        (
            replace(SAID, gain=0.008, low=-0.004),
            "not distinguishable: +0.8 points (95 % interval -0.4 to +7.6; better on 61 of 80 images): take the cheaper",
        ),
        (
            replace(SAID, trainings=1, trainings_covered=False),
            "better by 6.4 points (95 % interval 5.1 to 7.6 for these two trainings alone; better on 61 of 80 images)",
        ),
        (
            replace(SAID, classes=HURT),
            "better by 6.4 points (95 % interval 5.1 to 7.6; better on 61 of 80 images); hurt: sign -12.0 (-18.1 to -5.9)",
        ),
    ],
)
def test_a_difference_in_words(found: Difference, line: str) -> None:
    assert in_words(found, "take the cheaper") == line
    assert in_words(Difference(**json.loads(json.dumps(asdict(found)))), "take the cheaper") == line


GAIN = 0.15
"""What our arm has before theirs, in log odds: about 3 points of mIoU."""


def true_gain(rng: np.random.Generator, sd: float) -> float:
    """Returns the gain on many images, over trainings whose effects are normal with this deviation."""
    images, effects = simulate_images(rng, 2000), sd * stats.norm.ppf((np.arange(20)[:, None] + 0.5) / 20)
    ours, theirs = (simulate_arm(rng, images, odds + effects + np.zeros(7)).sum(1) for odds in (GAIN, 0.0))
    return float((image_ious(ours) - image_ious(theirs)).mean())


def fold_coverage(of_seed: float, of_labels: float, draws: int) -> float:
    """Returns how often the interval of 5 folds of 30 images holds the true gain of trainings on 24 others.

    A training has a random effect of its seed, and the sum of the effects of its labelled images, which folds share. Their deviations, in log odds.
    """
    rng, folds, covered = np.random.default_rng(6), np.arange(30) // 6, 0
    truth = true_gain(rng, float(np.hypot(of_seed, of_labels)))
    for _ in range(draws):
        true, ease = simulate_images(rng, 30)
        arms = []
        for odds in (GAIN, 0.0):
            of_images = rng.normal(0.0, of_labels / np.sqrt(24), 30)
            effects = [
                rng.normal(odds, of_seed) + of_images[folds != fold].sum() + np.zeros((1, 7)) for fold in range(5)
            ]
            arms.append(
                [simulate_arm(rng, (true[folds == k], ease[folds == k]), each)[0] for k, each in enumerate(effects)]
            )
        found = difference(*arms, CLASSES, folds=True)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
    return covered / draws


@pytest.mark.parametrize(
    ("of_seed", "of_labels", "low", "high"),
    [(0.04, 0.0, 0.93, 1.0), (0.04, 0.04, 0.93, 1.0), (0.04, 0.3, 0.65, 0.9)],
    ids=["images alone", "as much as the seed", "far more than the seed"],
)
def test_folds_cover_unless_the_draw_of_the_labels_matters_most(
    of_seed: float, of_labels: float, low: float, high: float
) -> None:
    """The third is the limit: all folds have most of their labels in common, so how they vary cannot show what others would do."""
    assert low <= fold_coverage(of_seed, of_labels, 200) <= high
