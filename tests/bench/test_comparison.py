"""`bench methods`: paired differences, their intervals, and what they are computed over."""

import numpy as np
import pytest
from scipy import stats
from support import changed

from cps_ray.bench.comparison import Comparison, PairedDifference, further_table, paired_difference
from cps_ray.config.train import TrainConfig

PAIRS = [(draw, seed) for draw in range(6) for seed in range(3)]


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    scores, control = np.random.default_rng(0).normal(0.3, 0.02, (2, 5)).tolist()
    found = paired_difference(
        {(0, seed): score for seed, score in enumerate(scores)},
        {(0, seed): score for seed, score in enumerate(control)},
        over_draws=False,
    )
    assert found is not None
    expected = stats.ttest_rel(scores, control).confidence_interval(0.95)
    assert found.half_width is not None
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(
        (expected.low, expected.high)
    )
    assert (found.better, found.n) == (sum(a > b for a, b in zip(scores, control, strict=True)), 5)


def test_the_interval_covers_the_true_difference_in_95_of_100_experiments() -> None:
    random, true, experiments = np.random.default_rng(0), 0.4, 4000
    covered = {True: 0, False: 0}
    for _ in range(experiments):
        # What the labelled images of a draw do to a method is common to its seeds.
        of_draw, of_run = random.normal(0.0, 1.0, 6), random.normal(0.0, 0.5, len(PAIRS))
        control = dict(zip(PAIRS, random.normal(0.0, 3.0, len(PAIRS)).tolist(), strict=True))
        scores = {pair: control[pair] + true + of_draw[pair[0]] + of_run[row] for row, pair in enumerate(PAIRS)}
        for over_draws in covered:
            found = paired_difference(scores, control, over_draws=over_draws)
            assert found is not None
            assert found.half_width is not None
            covered[over_draws] += abs(found.mean - true) <= found.half_width
    assert covered[True] / experiments == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors
    assert covered[False] / experiments < 0.85, "seeds of a draw, counted one by one, would pretend to know more"


def test_only_pairs_that_both_have_are_compared() -> None:
    control = {(0, 1): 0.2, (0, 2): 0.4, (1, 1): 0.3}
    scores = {(0, 1): 0.3, (0, 2): 0.6, (1, 1): 0.3, (1, 2): 0.9}
    found = paired_difference(scores, control, over_draws=True)
    assert found is not None
    assert (found.mean, found.better, found.n) == (pytest.approx(0.075), 1, 2)
    assert paired_difference({(0, 1): 0.3}, control, over_draws=False) == PairedDifference(
        pytest.approx(0.1), None, 1, 1
    )
    assert paired_difference({(5, 1): 0.3}, control, over_draws=False) is None


def test_a_comparison_over_draws(tiny: TrainConfig) -> None:
    trainings = {
        "supervised": changed(tiny, method="supervised"),
        "upper bound": changed(tiny, method="supervised", data__labeled=1.0),
        "cps": tiny,
    }
    comparison = Comparison(trainings, "supervised", "test", [(0, 1), (0, 2), (1, 1), (1, 2)])
    runs = {
        "supervised draw 0 seed 1": {"test/miou": 0.1},
        "supervised draw 0 seed 2": {"test/miou": 0.3},
        "supervised draw 1 seed 1": {"test/miou": 0.4},
        "supervised draw 1 seed 2": {"test/miou": 0.4},
        "upper bound seed 1": {"test/miou": 0.5},
        "upper bound seed 2": {"test/miou": 0.6},
        "cps draw 0 seed 1": {"test/miou": 0.2},
        "cps draw 0 seed 2": {"failed": "the loss is not finite"},
        "cps draw 1 seed 1": {"test/miou": 0.3},
    }
    keys = {comparison.key(name, pair) for name in trainings for pair in comparison.pairs}
    assert keys == {*runs, "cps draw 1 seed 2"}, "with all images labelled no draw is another one"
    figures = comparison.figures(runs)
    assert figures["supervised"]["test/miou"] == {"mean": pytest.approx(0.3), "sd": pytest.approx(0.1 * 2**0.5)}
    assert figures["supervised"]["difference"] is None
    assert figures["upper bound"]["test/miou"] == {"mean": pytest.approx(0.55), "sd": None}
    assert (figures["upper bound"]["runs"], figures["upper bound"]["failed"]) == (2, 0)
    bound = figures["upper bound"]["difference"]
    assert (bound["mean"], bound["better"], bound["n"]) == (pytest.approx((0.35 + 0.15) / 2), 2, 2)
    assert (figures["cps"]["runs"], figures["cps"]["failed"]) == (2, 1)
    assert figures["cps"]["difference"]["mean"] == pytest.approx(0.0)
    assert figures["cps"]["difference"]["better"] == 1
    assert comparison.config("cps", (1, 2)) == changed(tiny, seed=2, data__subset_seed=1)


def test_all_other_scores_are_compared_too_and_classes_at_once(tiny: TrainConfig) -> None:
    random = np.random.default_rng(0)
    metrics = [
        "test/miou",
        "test/ensemble/miou",
        "test/b/miou",
        "test/pixel_accuracy",
        "test/drive/miou",
        "test/drive/iou/road",
    ]
    metrics += ["pseudo/miou", "pseudo/iou/road", "test/iou/road", "test/iou/sign", "train/cps"]
    comparison = Comparison(
        {"supervised": changed(tiny, method="supervised"), "cps": tiny},
        "supervised",
        "test",
        [(d, 1) for d in range(4)],
    )
    runs = {
        comparison.key(name, pair): dict(zip(metrics, random.uniform(0.2, 0.6, len(metrics)).tolist(), strict=True))
        for name in comparison.trainings
        for pair in comparison.pairs
    }
    further = comparison.figures(runs)["cps"]["further"]
    assert [*further] == ["test/pixel_accuracy", "test/drive/miou", "pseudo/miou", "test/iou/road", "test/iou/sign"]
    for metric, level in {"test/drive/miou": 0.95, "test/iou/sign": 0.975}.items():
        ours, theirs = ([runs[f"{name} draw {d} seed 1"][metric] for d in range(4)] for name in ("cps", "supervised"))
        expected = stats.ttest_rel(ours, theirs).confidence_interval(level)
        assert further[metric]["mean"] == pytest.approx((expected.low + expected.high) / 2)
        assert further[metric]["half_width"] == pytest.approx((expected.high - expected.low) / 2), metric
    shown = further_table(comparison, runs)
    assert [str(column.header) for column in shown.columns] == [
        "",
        "accuracy",
        "drive",
        "pseudo labels",
        "road",
        "sign",
    ]
    runs["cps draw 0 seed 1"] |= {"test/iou/sign": runs["supervised draw 0 seed 1"]["test/iou/sign"] - 0.1}
    for draw in range(1, 4):
        runs[f"cps draw {draw} seed 1"]["test/iou/sign"] = (
            runs[f"supervised draw {draw} seed 1"]["test/iou/sign"] - 0.101
        )
    shown = further_table(comparison, runs)
    assert [*shown.columns[-1].cells] == ["-10.1*"]


def test_where_no_draw_matters_the_interval_is_over_seeds(tiny: TrainConfig) -> None:
    all_labels = changed(tiny, method="supervised", data__labeled=1.0)
    trainings = {"upper bound": all_labels, "faster": changed(all_labels, optim__lr=0.1)}
    comparison = Comparison(trainings, "upper bound", "test", [(0, 1), (0, 2), (1, 1), (1, 2)])
    scores = {"upper bound seed 1": 0.5, "upper bound seed 2": 0.5, "faster seed 1": 0.6, "faster seed 2": 0.8}
    difference = comparison.figures({key: {"test/miou": score} for key, score in scores.items()})["faster"][
        "difference"
    ]
    assert (difference["mean"], difference["n"]) == (pytest.approx(0.2), 2)
    assert difference["half_width"] == pytest.approx(0.1 * stats.t.ppf(0.975, 1))
