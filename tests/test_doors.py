"""The plug-ins of CONTRIBUTING.md as they are printed there: each trains, and all of them in Ray's workers."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import changed, without_a_cluster

import cps_ray
from cps_ray import sweep as sweep_command
from cps_ray.config.reader import load_sweep
from cps_ray.config.train import TrainConfig
from cps_ray.engine.networks import build_networks
from cps_ray.engine.preflight import Preflight

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n# (\w+\.py)\n(.*?)```", re.DOTALL)
MOST_LINES = 33
DOORS: dict[str, dict[str, Any]] = {
    "tversky": {"loss__supervised": {"ce": 1.0, "tversky:tversky": 0.5}},
    "noisy": {"method": "noisy:NoisyStudent", "custom": {"noise": 20}},
    "tiny": {"model__architecture": "tiny:Plain", "model__encoder": "tiny:Tiny", "model__options": {}},
    "tiny encoder": {"model__architecture": "deeplabv3plus", "model__encoder": "tiny:Tiny", "model__options": {}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the modules of CONTRIBUTING.md."""
    folder = tmp_path_factory.mktemp("doors")
    for name, text in BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text()):
        (folder / name).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def _importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)


def test_examples_are_short_and_use_the_public_interface_alone(folder: Path) -> None:
    assert {path.name for path in folder.glob("*.py")} == {"tversky.py", "noisy.py", "board.py", "tiny.py"}
    for path in folder.glob("*.py"):
        text = path.read_text()
        assert len(text.strip().splitlines()) <= MOST_LINES
        assert set(re.findall(r"cps_ray\.(\w+)", text)) <= set(cps_ray.__all__)
        for names in re.findall(r"^from cps_ray import \(?([^)]*?)\)?$", text, flags=re.MULTILINE):
            assert {name.strip() for name in names.split(",")} <= set(cps_ray.__all__)


@pytest.mark.parametrize("name", DOORS)
def test_examples_pass_the_trial_run_and_learn(tiny: TrainConfig, name: str) -> None:
    config = changed(tiny, **DOORS[name])
    assert Preflight(7, [(32, 48)]).fault(config) is None
    reports = without_a_cluster(config)
    assert all(math.isfinite(value) for report in reports for value in report.values())
    losses = [report["train/sup_a"] for report in reports]
    assert losses[-1] < losses[0]


def test_the_method_has_its_own_terms_and_settings(tiny: TrainConfig) -> None:
    config = changed(tiny, **DOORS["noisy"])
    assert config.custom["noise"] == 20.0
    assert config.custom["confidence"] == 0.0, "every default is on record"
    last = without_a_cluster(config)[-1]
    assert last["NoisyStudent/weight"] == 1.0
    assert {"train/pseudo", "pseudo/coverage"} <= last.keys()
    louder = without_a_cluster(changed(config, custom__noise=60.0))[-1]
    assert louder["train/pseudo"] != last["train/pseudo"]


def test_a_sweep_searches_settings_of_a_method_of_ones_own(tiny: TrainConfig, tmp_path: Path) -> None:
    train = changed(tiny, **DOORS["noisy"]).dump(str(tmp_path))
    space = {
        "custom.noise": {"type": "float", "low": 1.0, "high": 50.0},
        "loss.supervised": {"type": "choice", "values": ["ce", "dice"]},
    }
    sweep = {
        "version": 1,
        "name": "own",
        "output": "runs",
        "train": train,
        "search_space": space,
        "budget": {"trials": 2},
        "early_stopping": {"type": "none"},
    }
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(sweep))
    assert load_sweep(file).search_space.keys() == space.keys()
    file.write_text(yaml.safe_dump({**sweep, "search_space": {"custom.nois": space["custom.noise"]}}))
    with pytest.raises(
        cps_ray.CpsRayError, match=r"own.yaml:\d+: .*custom.*nois: no such setting. Did you mean noise\?"
    ):
        load_sweep(file)


def test_the_trial_run_of_a_sweep_names_the_choice_that_is_no_loss(
    tiny: TrainConfig, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "vector.py").write_text("def vector(logits, target):\n    return logits.mean(dim=1)\n")
    choice = {"type": "choice", "values": ["ce", "tversky:tversky", "vector:vector"]}
    sweep = {
        "version": 1,
        "name": "own",
        "train": tiny.dump(str(tmp_path)),
        "search_space": {"loss.supervised": choice},
    }
    file = tmp_path / "own.yaml"
    file.write_text(
        yaml.safe_dump({**sweep, "output": "runs", "early_stopping": {"type": "none"}, "budget": {"trials": 2}})
    )
    assert sweep_command.main([str(file), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "search_space.loss.supervised.values[2]: " in error
    assert "vector:vector: must return a scalar, but returned float32 of shape (2, 8, 8). A loss is a function" in error
    assert "tversky:tversky" not in error


def test_the_encoder_is_dilated_and_its_weights_come_from_a_file(tiny: TrainConfig, tmp_path: Path) -> None:
    config = changed(tiny, **DOORS["tiny encoder"])
    network = build_networks(config, 7)["a"].network
    assert network.encoder(torch.zeros(1, 3, 64, 64))[-1].shape[-1] == 64 // 16, "deeplabv3plus asks for stride 16"
    with torch.no_grad():
        for parameter in network.encoder.parameters():
            parameter.fill_(0.25)
    torch.save(network.encoder.state_dict(), tmp_path / "tiny.pt")
    filled = build_networks(changed(config, model__weights_file=str(tmp_path / "tiny.pt")), 7)["a"].network
    assert all(bool((parameter == 0.25).all()) for parameter in filled.encoder.parameters())


@pytest.mark.ray
def test_all_of_them_train_in_rays_workers(tiny: TrainConfig, folder: Path, tmp_path: Path) -> None:
    together = {**DOORS["tversky"], **DOORS["noisy"], **DOORS["tiny"], "sinks": ["board:Board", "broken:Broken"]}
    (folder / "broken.py").write_text(
        "from cps_ray import Sink\n\n\nclass Broken(Sink):\n    def write(self, metrics):\n        raise OSError('no route to host')\n"
    )
    # Through the installed command, whose own path does not have the working directory; and two workers.
    config = changed(tiny, **together, resources__workers=2, resources__cpus_per_worker=0.5)
    (folder / "own.yaml").write_text(yaml.safe_dump(config.dump(str(folder))))
    code = "import sys; sys.path.remove(''); sys.argv = ['cps-ray', 'train', 'own.yaml', '--output', sys.argv[1]]; from cps_ray.__main__ import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == config.schedule.steps
    assert "train/pseudo" in records[-1]
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("sink Broken failed, the training goes on") == len(records)
    assert "no route to host" in log


WRONG = """
import torch
from cps_ray import MethodConfig, second_view, weak_view


class Returns(MethodConfig):
    def losses(self, config, state, micro):
        return {"loss": torch.zeros(())}


class WithoutLoss(MethodConfig):
    def losses(self, config, state, micro):
        yield {"sup_a": torch.zeros(())}


class WithoutGradient(MethodConfig):
    def losses(self, config, state, micro):
        yield {"loss": torch.zeros(())}


class OneOfTwo(MethodConfig):
    def num_networks(self, model):
        return 2

    def losses(self, config, state, micro):
        yield {"loss": state.models["a"](weak_view(micro.batch)).sum()}


class TwoOfOne(MethodConfig):
    def losses(self, config, state, micro):
        yield {"loss": state.models["a"](weak_view(micro.batch)).sum()}
        yield {"loss": state.models["a"](weak_view(micro.batch)).sum()}


class Undeclared(MethodConfig):
    def losses(self, config, state, micro):
        yield {"loss": state.models["a"](second_view(micro.batch)).sum()}


class TwoMaps(torch.nn.Module):
    out_channels = [3, 3]

    def __init__(self, depth, output_stride):
        super().__init__()

    def forward(self, x):
        return [x, x]


def without_encoder(encoder_name, encoder_weights, classes):
    return torch.nn.Conv2d(3, classes, 1)


class FiveClasses(torch.nn.Module):
    def __init__(self, encoder_name, encoder_weights, classes):
        super().__init__()
        self.encoder = torch.nn.Conv2d(3, 5, 1)

    def forward(self, x):
        return self.encoder(x)
"""
BARE = {"model__architecture": "fpn", "model__options": {}}


@pytest.mark.parametrize(
    ("changes", "setting", "why"),
    [
        ({"method": "wrong:Returns"}, "method", "wrong:Returns.losses must yield, but returned dict. A method yields"),
        ({"method": "wrong:WithoutLoss"}, "method", "yielded ['sup_a'] at 1 of 1 networks. A method yields"),
        ({"method": "wrong:WithoutGradient"}, "method", "yielded ['loss'] at 1 of 1 networks. A method yields"),
        ({"method": "wrong:OneOfTwo"}, "method", "yielded 1 times for 2 networks. A method yields"),
        ({"method": "wrong:TwoOfOne"}, "method", "yielded ['loss'] at 2 of 1 networks. A method yields"),
        ({"method": "wrong:Undeclared"}, "method", "the method's `views` must name it"),
        ({**BARE, "model__encoder": "wrong:TwoMaps"}, "model.encoder", "wrong:TwoMaps: maps an image of 64x64 px to"),
        ({**BARE, "model__encoder": "tiny:Tiny", "model__weights": "imagenet"}, "model.weights", "must be none for"),
        ({**BARE, "model__architecture": "wrong:without_encoder"}, "model.architecture", "with an `encoder`, but"),
        ({**BARE, "model__architecture": "wrong:FiveClasses"}, "model.encoder", "output must be (1, 7, h, w), but is"),
    ],
)
def test_what_is_written_wrongly_is_told_its_contract(
    tiny: TrainConfig, folder: Path, changes: dict[str, Any], setting: str, why: str
) -> None:
    (folder / "wrong.py").write_text(WRONG)
    fault = Preflight(7, [(32, 48)]).fault(changed(tiny, **changes))
    assert fault is not None
    assert fault.settings[0] == setting
    assert why in fault.text
    assert "\n" not in fault.text
