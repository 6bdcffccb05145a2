"""Import paths, and what a plug-in that is written wrongly is told: one line with the contract."""

from pathlib import Path

import pytest
from support import changed

from cps_ray.config.plugins import load_plugin
from cps_ray.config.train import TrainConfig
from cps_ray.errors import ConfigError

MODULE = """
import torch
from cps_ray import MethodConfig, Sink

number = 3


class NoLosses(MethodConfig):
    pass


class NoView(MethodConfig):
    @property
    def views(self):
        return ("strong",)

    def losses(self, config, state, micro):
        yield {}


class Noise(MethodConfig):
    noise: float = 10.0

    def losses(self, config, state, micro):
        yield {}


class Averaged(Noise):
    @property
    def needs_average(self):
        return "method: mine:Averaged"


class NoWrite(Sink):
    pass
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import cps_ray\n1 / 0\n")
    (tmp_path / "needy.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("mine:numbr", "mine has no 'numbr'. Did you mean number?"),
        (
            "nowhere:x",
            "nowhere cannot be imported: No module named 'nowhere'. It must lie in the working directory or on PYTHONPATH.",
        ),
        ("nowhere.sub:x", "nowhere.sub cannot be imported: No module named 'nowhere'. It must lie in"),
        ("broken:x", "broken cannot be imported: division by zero."),
    ],
)
def test_what_cannot_be_imported_is_named(path: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_plugin("method", path)
    assert str(caught.value).startswith(f"method: {why}")


def test_advice_is_given_only_where_the_module_itself_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"'a_package_that_is_not_there'\.$"):
        load_plugin("method", "needy:x")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"method": "mine:number"}, r"method: mine:number must be a subclass of cps_ray.MethodConfig with `losses\("),
        ({"method": "mine:NoLosses"}, r"method: mine:NoLosses must be a subclass of cps_ray.MethodConfig with `losses\("),
        ({"method": "mine:NoView"}, r"custom: mine:NoView: its views must be one of \('weak',\), .* but is \('strong',\)"),
        ({"method": "mine:Noise", "custom": {"nois": 1}}, r"custom: nois: no such setting. Did you mean noise\?"),
        ({"method": "mine:Noise", "custom": {"weight": -1}}, r"custom: weight: must be at least 0, but got -1"),
        ({"method": "mine:Averaged"}, r"`ema.decay` must be given with `method: mine:Averaged`"),
        ({"custom": {"noise": 1}}, r"custom: is for a method of yours, MODULE:NAME, but method is cps"),
        ({"sinks": ["mine:NoWrite"]}, r"sinks: mine:NoWrite must be a subclass of cps_ray.Sink with `write\(self, metrics\)`"),
        ({"sinks": ["mine:number"]}, r"sinks: mine:number must be a subclass of cps_ray.Sink"),
        ({"method": "cp"}, r"method: must be supervised, cps, .* or unimatch or a plug-in, MODULE:NAME, but got 'cp'"),
        ({"loss__supervised": "dise"}, r"must be ce, ohem, dice, focal or lovasz or a plug-in, MODULE:NAME or a mapping, but got 'dise'"),
        ({"loss__supervised": "lovasz", "loss__class_weights": [1.0] * 7}, "`loss.class_weights` needs another loss in `loss.supervised`: lovasz"),
        ({"loss__supervised": {"ce": 0.0}}, "greater than 0"),
    ],
)  # fmt: skip
def test_what_does_not_keep_to_its_contract_is_refused(tiny: TrainConfig, changes: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        changed(tiny, **changes)
    assert "\n" not in str(caught.value)


def test_a_method_of_ones_own_decides_what_a_built_in_one_does(tiny: TrainConfig) -> None:
    config = changed(tiny, method="mine:Noise", custom={"noise": 3})
    assert config.semi_supervised
    assert (config.networks, config.unlabeled_views, config.method_name) == (1, ("weak",), "Noise")
    assert config.settings is not None
    assert config.settings.model_dump()["noise"] == 3.0
    assert TrainConfig.model_validate(config.dump()) == config
