import pytest

from cps_ray.config.train import CpsConfig, OptimConfig
from cps_ray.engine.schedules import average_decay, learning_rate, ramped_weight


def test_poly_is_the_papers_formula() -> None:
    optim = OptimConfig(lr=0.01, decay="poly", power=0.9)
    assert learning_rate(optim, 0, 100) == 0.01
    assert learning_rate(optim, 40, 100) == pytest.approx(0.01 * 0.6**0.9)


def test_cosine_and_constant() -> None:
    assert learning_rate(OptimConfig(lr=0.2, decay="cosine"), 50, 100) == pytest.approx(0.1)
    assert learning_rate(OptimConfig(lr=0.2, decay="constant"), 99, 100) == 0.2


def test_warm_up_is_linear_and_ends_at_the_rate() -> None:
    optim = OptimConfig(lr=0.1, warmup_steps=4, decay="constant")
    assert [learning_rate(optim, step, 10) for step in range(5)] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])


def test_weight_ramps_up_and_stays() -> None:
    linear = CpsConfig(weight=2.0, ramp=0.5)
    assert [ramped_weight(linear, step, 8) for step in (0, 2, 4, 7)] == [0.0, 1.0, 2.0, 2.0]
    sigmoid = CpsConfig(weight=2.0, ramp=0.5, ramp_shape="sigmoid")
    assert ramped_weight(sigmoid, 0, 8) == pytest.approx(2.0 * 0.0067379, rel=1e-4)
    assert ramped_weight(sigmoid, 2, 8) == pytest.approx(2.0 * 0.2865048, rel=1e-4)
    assert ramped_weight(CpsConfig(weight=1.5), 0, 8) == 1.5
    late = CpsConfig(weight=2.0, start=0.25, ramp=0.5)
    assert [ramped_weight(late, step, 8) for step in range(8)] == [0.0, 0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.0]


def test_the_average_forgets_its_start() -> None:
    assert [average_decay(0.9, step) for step in (0, 1, 4, 9, 100)] == pytest.approx([0.0, 0.5, 0.8, 0.9, 0.9])
