"""The loop, resume and divergence."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import changed

from cps_ray.config.train import TrainConfig
from cps_ray.datasets.loader import eval_batches, train_batches, train_data
from cps_ray.datasets.shards import open_shards
from cps_ray.engine.batch import Batch, EvalBatch
from cps_ray.engine.evaluation import evaluate, summarise
from cps_ray.engine.loop import fit
from cps_ray.engine.metrics import confusion
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import TrainState, build_state, load_networks
from cps_ray.engine.telemetry import collapse
from cps_ray.errors import CheckpointError, DivergedError
from cps_ray.runs import read_checkpoint, write_checkpoint


def run(config: TrainConfig, state: TrainState, stop_at: int | None = None) -> list[dict[str, Any]]:
    """Trains on the real data path; returns the reports."""
    shards = open_shards(config.data.shards)
    reports: list[dict[str, Any]] = []

    def report(metrics: dict[str, Any], _: TrainState) -> bool:
        reports.append(metrics)
        return metrics["step"] != stop_at

    batches = train_batches(train_data(shards, config), config, start_step=state.step)
    fit(config, state, batches, lambda _: {}, report)
    return reports


def test_reports_come_at_the_cadence_and_carry_the_means(tiny: TrainConfig) -> None:
    reports = run(tiny, build_state(tiny, 7, Ranks()))
    assert [r["step"] for r in reports] == [2, 4, 6]
    assert {
        "train/loss",
        "train/sup_a",
        "train/sup_b",
        "train/cps",
        "train/grad_norm_b",
        "pseudo/agreement",
        "pseudo/confidence",
        "memory/peak_bytes",
        "optim/lr",
        "cps/weight",
    } <= set(reports[0])
    assert reports[0]["cps/weight"] == pytest.approx(1 / 3)
    assert 0 <= reports[0]["time/data_wait"] <= 1


@pytest.mark.parametrize("stop", [2, 4])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_resumed_training_equals_the_unbroken_one_bit_for_bit(
    tiny: TrainConfig, tmp_path: Path, name: str, stop: int
) -> None:
    # With dropout: its random numbers, too, are a function of the step.
    options = {"decoder_channels": 16, "decoder_aspp_dropout": 0.5}
    config = changed(tiny, optim__name=name, model__options=options, ema__decay=0.9)
    unbroken = build_state(config, 7, Ranks())
    whole = run(config, unbroken)

    first = build_state(config, 7, Ranks())
    run(config, first, stop_at=stop)
    write_checkpoint(tmp_path, first.snapshot(), {})
    torch.manual_seed(12345)  # whatever another process had drawn before
    second = build_state(config, 7, Ranks())
    second.load(read_checkpoint(tmp_path), source=tmp_path)
    assert second.step == stop
    rest = run(config, second)
    for own, other in ((unbroken.networks, second.networks), (unbroken.averages, second.averages)):
        for key in own:
            for a, b in zip(own[key].state_dict().values(), other[key].state_dict().values(), strict=True):
                assert torch.equal(a, b)
    losses = lambda reports: [r["train/loss"] for r in reports]  # noqa: E731
    assert losses(whole)[stop // 2 :] == losses(rest)


def test_report_false_stops(tiny: TrainConfig) -> None:
    state = build_state(tiny, 7, Ranks())
    run(tiny, state, stop_at=2)
    assert state.step == 2


def test_a_loss_that_is_not_finite_names_its_step(tiny: TrainConfig) -> None:
    config = changed(tiny, optim__lr=1e20)
    with pytest.raises(DivergedError, match=r"not finite at step [1-4]"):
        run(config, build_state(config, 7, Ranks()))


def test_a_checkpoint_of_other_networks_is_refused(tiny: TrainConfig) -> None:
    snapshot = build_state(tiny, 7, Ranks()).snapshot()
    assert snapshot is not None
    with pytest.raises(CheckpointError, match="here/step2: the checkpoint must be of this config's networks"):
        build_state(changed(tiny, model__encoder="tu-test_resnet"), 7, Ranks()).load(snapshot, source="here/step2")


def test_evaluation_counts_every_pixel_once_and_separates_slices(tiny: TrainConfig) -> None:
    config = changed(tiny, data__slices={"first": "test_00000", "odd": "test_0000[135]"})
    shards = open_shards(config.data.shards)
    network = build_state(config, 7, Ranks()).networks["a"]

    def batches() -> Iterator[Any]:
        return eval_batches(shards, "test", size_px=4 * 32 * 48)

    found = evaluate(config, {"a": network}, batches(), 7, Ranks())
    by_image = {}
    for batch in eval_batches(shards, "test", size_px=1):
        with torch.inference_mode():
            by_image[batch.ids[0]] = confusion(network.eval().logits(batch.image).argmax(1), batch.mask, 7)[0]
    assert len(by_image) == 6
    assert torch.equal(found.whole_split, torch.stack(list(by_image.values())).sum(0))
    assert torch.equal(found.slices["first"], by_image["test_00000"])
    assert torch.equal(found.slices["odd"], by_image["test_00001"] + by_image["test_00003"] + by_image["test_00005"])


def test_batches_end_with_the_steps(tiny: TrainConfig) -> None:
    data = train_data(open_shards(tiny.data.shards), tiny)
    batches: list[Batch] = list(train_batches(data, tiny, start_step=4))
    assert len(batches) == 2


def test_parameters_that_no_output_needs_are_frozen(tiny: TrainConfig) -> None:
    """DDP would wait for their gradients: PSPNet leaves the last stages of its encoder unused."""
    config = changed(tiny, model__architecture="pspnet", model__encoder="resnet18", model__options={})
    state = build_state(config, 7, Ranks())
    parameters = [(name, p) for network in state.networks.values() for name, p in network.named_parameters()]
    frozen = [name for name, p in parameters if not p.requires_grad]
    assert any("layer4" in name for name in frozen)
    run(config, state)
    moved = {id(p) for optimizer in state.optimizers.values() for p in optimizer.state}  # those that had a gradient
    assert moved == {id(p) for _, p in parameters if p.requires_grad}
    usual = build_state(tiny, 7, Ranks())
    assert all(p.requires_grad for network in usual.networks.values() for p in network.parameters())


def test_the_networks_of_a_checkpoint_are_the_averages_if_there_are_any(tiny: TrainConfig, tmp_path: Path) -> None:
    image = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    for number, decay in enumerate((None, 0.9)):
        config = changed(tiny, ema__decay=decay)
        state = build_state(config, 7, Ranks())
        run(config, state, stop_at=2)
        folder = tmp_path / str(number)
        folder.mkdir()
        write_checkpoint(folder, state.snapshot(), {})
        loaded = load_networks(config, read_checkpoint(folder), 7, source=folder)
        assert [*loaded] == ["a", "b"]
        for name, network in loaded.items():
            assert torch.equal(network.logits(image), state.evaluated[name].eval().logits(image))
    with pytest.raises(CheckpointError, match="must hold this config's network c"):
        load_networks(changed(config, model__networks=3), read_checkpoint(folder), 7, source=folder)


DEAD = {
    "val/iou/road": 0.3,
    "val/iou/sky": 0.0,
    "val/iou/car": 0.0,
    "pseudo/coverage": 1.0,
    "pseudo/top_fraction": 1.0,
    "pseudo/agreement": 1.0,
}
ALIVE = {**DEAD, "val/iou/sky": 0.1, "pseudo/top_fraction": 0.8}


def finding(config: TrainConfig, state: TrainState, found: list[dict[str, Any]]) -> None:
    """Trains on while its evaluations find these."""
    batches = train_batches(train_data(open_shards(config.data.shards), config), config, start_step=state.step)
    each = iter(found)
    fit(config, state, batches, lambda _: dict(next(each)), lambda *_: True)


def test_a_collapse_that_lasts_ends_the_training_with_its_reason(tiny: TrainConfig) -> None:
    config = changed(tiny, schedule__steps=16, schedule__eval_every=1)
    state = build_state(config, 7, Ranks())
    with pytest.raises(
        DivergedError, match="one class takes all: of 3 classes in val only road is found, at 3 evaluations"
    ):
        finding(config, state, [DEAD] * 10 + [ALIVE] + [DEAD] * 3)
    assert state.step == 14  # not those that have not begun to learn, nor those that recover


def test_a_checkpoint_knows_how_long_a_collapse_has_lasted(tiny: TrainConfig, tmp_path: Path) -> None:
    config = changed(tiny, schedule__steps=8, schedule__eval_every=1)
    state = build_state(config, 7, Ranks())
    state.step, state.collapsed = 6, 2
    write_checkpoint(tmp_path, state.snapshot(), {})
    resumed = build_state(config, 7, Ranks())
    resumed.load(read_checkpoint(tmp_path), source=tmp_path)
    with pytest.raises(DivergedError, match="the last at step 7"):
        finding(config, resumed, [DEAD])
    # Its process may be lost before anybody has heard of it: resumed, the training ends as it had ended.
    with pytest.raises(DivergedError, match="collapsed for good at step 7"):
        finding(config, resumed, [])


def rare(foreground: float) -> Iterator[Batch]:
    """Noise, of which this fraction of pixels is called foreground at random: there is nothing to find."""
    generator = torch.Generator().manual_seed(0)
    while True:
        image = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
        mask = (torch.rand(2, 32, 32, generator=generator) < foreground).to(torch.uint8)
        yield Batch(image[:2], mask, image[2:])


def train_on_rare(config: TrainConfig, foreground: float) -> list[dict[str, Any]]:
    """Trains on `rare` and evaluates on it; returns the reports."""
    state = build_state(config, 2, Ranks())
    reports: list[dict[str, Any]] = []
    batch = next(rare(foreground))
    whole = EvalBatch(("x", "y"), batch.labeled_image, batch.labeled_mask)

    def report(metrics: dict[str, Any], _: TrainState) -> bool:
        reports.append(metrics)
        return True

    def validate(state: TrainState) -> dict[str, Any]:
        return summarise(evaluate(config, state.evaluated, [whole], 2, Ranks()), ["background", "foreground"], "val")

    fit(config, state, rare(foreground), validate, report)
    return reports


@pytest.fixture
def blind(tiny: TrainConfig) -> TrainConfig:
    """Learns nothing but that background is common, and the networks teach each other so."""
    return changed(tiny, schedule__steps=40, schedule__eval_every=5, optim__lr=0.1, optim__decay="constant")


def test_a_baseline_that_finds_no_foreground_is_a_result(blind: TrainConfig) -> None:
    reports = train_on_rare(changed(blind, method="supervised"), 0.03)
    assert reports[-1]["step"] == 40
    assert 0.96 < reports[-1]["labeled/top_fraction"] < 0.98
    assert all("one class takes all" in (collapse(report) or "") for report in reports[-4:]), "it is reported"


def test_networks_that_teach_each_other_away_what_masks_show_are_ended(blind: TrainConfig) -> None:
    with pytest.raises(DivergedError, match="of 2 classes in val only background is found"):
        train_on_rare(blind, 0.03)


def test_networks_whose_masks_show_next_to_nothing_else_are_not_ended(blind: TrainConfig) -> None:
    reports = train_on_rare(blind, 0.0005)
    assert reports[-1]["step"] == 40
    assert reports[-1]["pseudo/top_fraction"] >= 0.999
    assert reports[-1]["labeled/top_fraction"] >= 0.999
