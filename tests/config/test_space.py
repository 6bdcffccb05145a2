"""Drawing from the space and applying what was drawn."""

import random

import optuna
import pytest

from cps_ray.config.reader import load_sweep
from cps_ray.config.space import RandomSuggest, apply, draw, preview
from cps_ray.config.sweep import ChoiceParam, FloatParam, IntParam
from cps_ray.errors import ConfigError

SPACE = {
    "late": IntParam(type="int", low=1, high=9, step=4, when={"mid": [True]}),
    "mid": ChoiceParam(type="choice", values=[True, False], when={"mode": ["b", "c"]}),
    "mode": ChoiceParam(type="choice", values=["a", "b", "c"]),
    "rate": FloatParam(type="float", low=1e-4, high=1e-1, log=True),
    "fraction": FloatParam(type="float", low=0.0, high=0.95, step=0.05),
    "width": IntParam(type="int", low=1, high=64, log=True),
}


@pytest.fixture
def train(sweep_file):
    return load_sweep(sweep_file()).train


def test_draws_follow_when_and_stay_in_range():
    points = preview(SPACE, 200, seed=0)
    for point in points:
        assert ("mid" in point) == (point["mode"] in ("b", "c"))
        assert ("late" in point) == (point.get("mid") is True)
        assert point.get("late", 1) in (1, 5, 9)
        assert 1e-4 <= point["rate"] <= 1e-1
        assert point["fraction"] in [k / 100 for k in range(0, 100, 5)]
        assert 1 <= point["width"] <= 64
    assert {point.get("late") for point in points} == {None, 1, 5, 9}
    assert {point["fraction"] for point in points} == {k / 100 for k in range(0, 100, 5)}
    assert 60 < sum(point["rate"] < 10**-2.5 for point in points) < 140


def test_preview_is_a_function_of_the_seed():
    random.seed(1)
    first = preview(SPACE, 5, seed=3)
    random.seed(2)
    assert preview(SPACE, 5, seed=3) == first
    assert preview(SPACE, 5, seed=4) != first
    assert draw(SPACE, RandomSuggest(3)) == first[0]


def test_an_optuna_trial_suggests():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(5):
        trial = study.ask()
        assert draw(SPACE, trial) == trial.params


def test_applying_nothing_changes_nothing(train):
    assert apply(train, {}, "here") == train
    for value in (random.Random(0).uniform(0.0, 9.0) for _ in range(50)):
        changed = apply(train, {"optim.lr": value}, "here")
        assert changed.optim.lr == value
        assert apply(changed, {}, "here") == changed


def test_apply_changes_settings_sections_and_mappings(train):
    assert train.model.options == {"decoder_channels": 64}
    changed = apply(train, {"cps.weight": 0.5, "model.options.decoder_channels": 32, "model.options.depth": 4}, "")
    assert (changed.cps.weight, changed.model.options) == (0.5, {"decoder_channels": 32, "depth": 4})
    assert apply(train, {"model.options": {"depth": 4}}, "").model.options == {"depth": 4}
    assert apply(changed, {"cps": {"ramp": 0.5}}, "").cps.weight == 0.5
    assert apply(train, {"model.b.encoder": "resnet34"}, "").model.b.encoder == "resnet34"
    assert apply(train, {"data.synthetic": None}, "").data == train.data
    assert train.cps.weight == 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.lrr": 1.0}, "trial 3: optim.lrr: no such setting. Did you mean optim.lr?"),
        ({"optim.lr": -1.0}, "trial 3: optim.lr: must be greater than 0, but got -1.0."),
        ({"seed.x": 1}, "trial 3: seed is 0 and holds no settings."),
        (
            {"schedule.steps": 7},
            "trial 3: `schedule.steps % schedule.eval_every == 0` must hold, but got steps=7, eval_every=50.",
        ),
    ],
)
def test_apply_refuses(train, changes, message):
    with pytest.raises(ConfigError) as caught:
        apply(train, changes, "trial 3")
    assert str(caught.value) == message
