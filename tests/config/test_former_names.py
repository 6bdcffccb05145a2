"""Settings of earlier versions are refused, and the message says what they are called now."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cps_ray.config.reader import load_sweep, load_train
from cps_ray.errors import ConfigError

SweepFile = Callable[..., Path]

IMAGES = "is called cps.images now."
SLICES = "is called data.slices now."
SUBSET_SEED = "is called data.subset_seed now."
NO_MODE = "is gone: every metric is better when it is higher. Remove the line."
PLACEMENT = "must be replicated or one_network_per_worker, but got 'split'. It is called one_network_per_worker now."

WEIGHT = "cps.weight: {type: float, low: 0.5, high: 5}"
BATCH = "    unlabeled_batch: 4\n"
SCHEDULE = "  schedule: {steps: 200, eval_every: 50}\n"
TRAIN = """\
data: {{shards: s, labeled: 1, crop_px: [64, 64], labeled_batch: 2, unlabeled_batch: 2{data}}}
model: {{encoder: resnet18}}
optim: {{lr: 0.01}}
schedule: {{steps: 10, eval_every: 5}}
{section}
"""


def refusal(load: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        load()
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (SCHEDULE, f"{SCHEDULE}  cps: {{on: all}}\n", f"15: train.cps.on: {IMAGES}"),
        (BATCH, f'{BATCH}    groups: {{a: "a*"}}\n', f"11: train.data.groups: {SLICES}"),
        (BATCH, f"{BATCH}    split_seed: 1\n", f"11: train.data.split_seed: {SUBSET_SEED}"),
        ("budget:", "objective: {mode: max}\nbudget:", f"15: objective.mode: {NO_MODE}"),
        (SCHEDULE, f"{SCHEDULE}  resources: {{workers: 2, placement: split}}\n",
         f"15: train.resources.placement: {PLACEMENT}"),
    ],
)  # fmt: skip
def test_in_a_sweep_file(sweep_file: SweepFile, old: str, new: str, message: str) -> None:
    assert refusal(lambda: load_sweep(sweep_file((old, new)))) == f"sweeps/x.yaml:{message}"


@pytest.mark.parametrize(
    ("data", "section", "message"),
    [
        ("", "cps: {on: all}", f"5: cps.on: {IMAGES}"),
        (", groups: {a: b}", "", f"1: data.groups: {SLICES}"),
        (", split_seed: 1", "", f"1: data.split_seed: {SUBSET_SEED}"),
        ("", "resources: {workers: 2, placement: split}", f"5: resources.placement: {PLACEMENT}"),
    ],
)
def test_in_a_training_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, section: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(TRAIN.format(data="", section=""))
    assert load_train(Path("t.yaml")).data.subset_seed == 0
    Path("t.yaml").write_text(TRAIN.format(data=data, section=section))
    assert refusal(lambda: load_train(Path("t.yaml"))) == f"t.yaml:{message}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.cps.on=all", f"train.cps.on: {IMAGES}"),
        ("train.data.groups={a: b}", f"train.data.groups: {SLICES}"),
        ("train.data.split_seed=1", f"train.data.split_seed: {SUBSET_SEED}"),
        ("objective.mode=max", f"objective.mode: {NO_MODE}"),
        ("train.resources.placement=split", f"train.resources.placement: {PLACEMENT}"),
        ("search_space.cps.on={type: choice, values: [all]}", f"search_space.cps.on: {IMAGES}"),
        ("baselines.supervised.cps.on=all", f"baselines.supervised.cps.on: {IMAGES}"),
    ],
)
def test_in_an_override(sweep_file: SweepFile, override: str, message: str) -> None:
    assert refusal(lambda: load_sweep(sweep_file(), [override])) == f"--set {override}: {message}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cps.on", IMAGES),
        ("objective.mode", NO_MODE),
        ("data.groups", SLICES),
        ("data.split_seed", SUBSET_SEED),
        # Its name is today's: what may not be searched at all is not asked for its values.
        (
            "resources.placement",
            "cannot be searched: how a training is spread over the cluster does not make it better.",
        ),
    ],
)
def test_in_the_search_space(sweep_file: SweepFile, name: str, message: str) -> None:
    path = sweep_file((WEIGHT, f"{name}: {{type: choice, values: [split]}}"))
    assert refusal(lambda: load_sweep(path)) == f"sweeps/x.yaml:19: search_space.{name}: {message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cps.on: all", f"cps.on: {IMAGES}"),
        ("data.groups: {a: b}", f"data.groups: {SLICES}"),
        ("data.split_seed: 1", f"data.split_seed: {SUBSET_SEED}"),
        ("resources.placement: split", f"resources.placement: {PLACEMENT}"),
    ],
)
def test_in_a_baseline(sweep_file: SweepFile, change: str, message: str) -> None:
    path = sweep_file(("{method: supervised}", f"{{{change}}}"))
    assert refusal(lambda: load_sweep(path)) == f"sweeps/x.yaml:25: baselines.supervised.{message}"


@pytest.mark.parametrize(("name", "message"), [("cps.on", IMAGES), ("data.groups", SLICES)])
def test_in_the_changes_of_final_runs(sweep_file: SweepFile, name: str, message: str) -> None:
    override = f"final.set={{{name}: all}}"
    assert refusal(lambda: load_sweep(sweep_file(), [override])) == f"--set {override}: final.set.{name}: {message}"
