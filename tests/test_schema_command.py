"""`python -m cps_ray.schema`: the shipped files keep to the JSON schema, typos do not, and whatever the reader takes it takes."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from cps_ray import schema
from cps_ray.config import yaml_reader
from cps_ray.config.reader import load_sweep, presets
from cps_ray.config.train import TrainConfig

ROOT = Path(__file__).parents[1]
SWEEPS = sorted(ROOT.glob("sweeps/*.yaml"))
PRESETS = ROOT / "cps_ray/config/presets"


def faults(kind: str, data: Any) -> list[str]:
    """Dotted settings that do not keep to the schema, each with the message."""
    found = Draft202012Validator(schema.json_schema(kind)).iter_errors(data)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


@pytest.mark.parametrize("kind", ["sweep", "train"])
def test_it_prints_a_valid_schema_with_descriptions(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert schema.main([kind]) == 0
    printed = json.loads(capsys.readouterr().out)
    Draft202012Validator.check_schema(printed)
    crop = printed["$defs"]["DataConfig"]["properties"]["crop_px"]
    assert crop["description"] == "(height, width) of a training crop."


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps_keep_to_it(path: Path) -> None:
    data = yaml_reader.load(path).data
    assert faults("sweep", data) == []
    assert faults("sweep", load_sweep(path).model_dump(mode="json")) == [], "sweep.yaml in the sweep folder"
    assert faults("sweep", data | {"sampelr": {}}) == [
        ": Additional properties are not allowed ('sampelr' was unexpected)"
    ]
    train = {name: value for name, value in data["train"].items() if name != "optim"}
    assert faults("sweep", data | {"train": train}) == ["train: 'optim' is a required property"]


@pytest.mark.parametrize("name", presets())
def test_presets_keep_to_it_but_for_their_shards(name: str) -> None:
    data = yaml_reader.load(PRESETS / f"{name}.yaml").data
    assert faults("train", data) == ["data: 'shards' is a required property"]
    assert faults("train", data | {"data": data["data"] | {"shards": "here"}}) == []


def test_a_training_on_a_preset_requires_nothing_else() -> None:
    data = {"preset": "reference/voc", "data": {"shards": "here", "labeled": "1_4"}, "cps": {"weight": 2}}
    assert faults("train", data) == []
    sweep = yaml_reader.load(SWEEPS[0]).data
    assert faults("sweep", sweep | {"train": data}) == []
    assert faults("train", data | {"preset": "reference/vox"})[0].startswith("preset: 'reference/vox' is not one of")
    (fault,) = faults("train", data | {"cps": {"wieght": 2}})
    assert fault == "cps: Additional properties are not allowed ('wieght' was unexpected)"
    (fault,) = faults("train", data | {"optim": {"lr": -1}})
    assert fault.startswith("optim.lr: -1 is less than or equal to the minimum of 0")


def test_a_training_as_it_is_written_keeps_to_it(tiny: TrainConfig) -> None:
    assert faults("train", tiny.dump()) == []


@pytest.mark.parametrize(
    ("time", "taken"), [("48h", True), ("1.5 h", True), (60, True), ("48 hours", False), (0, False)]
)
def test_durations(time: object, taken: bool) -> None:
    sweep = yaml_reader.load(SWEEPS[0]).data
    assert (not faults("sweep", sweep | {"budget": {"trials": 1, "time": time}})) == taken
