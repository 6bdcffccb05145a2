"""Drawing from the space and applying what was drawn."""

import random

import optuna
import pytest

from cps_ray.config.checks import remarks
from cps_ray.config.reader import load_sweep
from cps_ray.config.space import RandomSuggest, apply, draw, from_scalars, grid, own_point, preview, to_scalars
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


def test_the_own_point_has_what_lies_in_the_space(train):
    space = {
        "cps.cutmix_area": ChoiceParam(type="choice", values=[[0, 1], [0.25, 0.5]]),
        "ema.decay": ChoiceParam(type="choice", values=[0.99, None]),
        "model.b.encoder": ChoiceParam(type="choice", values=["resnet18"]),  # there is no b
        "cps.cutmix_boxes": IntParam(type="int", low=1, high=5, step=2, when={"ema.decay": None}),
        "augment.flip": FloatParam(type="float", low=0.0, high=1.0, when={"ema.decay": 0.99}),  # not active
        "cps.weight": FloatParam(type="float", low=2.0, high=3.0),  # 1.5 lies outside
        "augment.blur": FloatParam(type="float", low=0.0, high=1.0, when={"cps.weight": [2.0]}),
        "model.options.decoder_channels": IntParam(type="int", low=16, high=64, step=48),
    }
    own = own_point(space, train)
    boxes = {"cps.cutmix_boxes": 3, "model.options.decoder_channels": 64}
    assert own == {"cps.cutmix_area": [0.25, 0.5], "ema.decay": None, **boxes}
    assert apply(train, own, "") == train


def test_the_own_value_is_the_choice_as_it_is_written(train):
    space = {"augment.scale": ChoiceParam(type="choice", values=[[0.5, 2], [0.75, 1.5]])}
    own = own_point(space, train)
    assert to_scalars(space, own) == {"augment.scale": "[0.5, 2]"}, "else Optuna would not know it: train has 2.0"


def test_lists_and_null_come_back_from_optuna():
    space = {
        "crop": ChoiceParam(type="choice", values=[[64, 96], [128, 128], None, "[1]"]),
        "inner": IntParam(type="int", low=1, high=2, when={"crop": [[64, 96], None]}),
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = []
    for _ in range(20):
        trial = study.ask()
        points.append(draw(space, trial))
        assert from_scalars(space, trial.params) == points[-1]
        assert trial.params == to_scalars(space, points[-1])
        assert ("inner" in points[-1]) == (points[-1]["crop"] in ([64, 96], None))
    assert {str(point["crop"]) for point in points} == {"[64, 96]", "[128, 128]", "None", "[1]"}


def test_the_grid_is_every_point_once():
    space = {name: param for name, param in SPACE.items() if name not in ("rate", "width")}
    points = grid(space)
    # a alone; b and c with mid false, or true with three values of late.
    assert len(points) == 9 * 20
    assert len({str(point) for point in points}) == len(points)
    assert {point["fraction"] for point in points} == {k / 100 for k in range(0, 100, 5)}


def test_what_is_known_before_the_search_is_said(sweep_file):
    lines = remarks(load_sweep(sweep_file()))
    assert lines == [
        "Trial 0 has the values of train: optim.lr=0.01, cps.weight=1.5, cps.mix=cutmix, cps.cutmix_boxes=3."
    ]
    space = "{type: float, low: 2.0, high: 3.0, step: 1.0}"
    small = load_sweep(
        sweep_file(
            ("budget: {trials: 4}", "budget: {trials: 99}\nsampler: {type: grid}"),
            ("{type: float, low: 0.5, high: 5}", space),
            ("{type: float, low: 1e-3, high: 1e-1, log: true}", "{type: choice, values: [0.1, 0.01]}"),
        )
    )
    assert remarks(small) == [
        "Trial 0 has the values of train: optim.lr=0.01, cps.mix=cutmix, cps.cutmix_boxes=3. The others are drawn where they apply: cps.weight.",
        "The grid has 24 points: the search ends with them, before budget.trials=99.",
    ]
