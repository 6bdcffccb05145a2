"""Encoders that do not learn, or learn at a rate of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import changed
from torch import Tensor

from cps_ray.config.train import NetworkConfig, OptimConfig, TrainConfig
from cps_ray.datasets.loader import eval_batches, train_batches, train_data
from cps_ray.datasets.shards import open_shards
from cps_ray.engine.evaluation import evaluate
from cps_ray.engine.networks import build_network
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.schedules import learning_rate
from cps_ray.engine.state import TrainState, build_state
from cps_ray.engine.step import train_step
from cps_ray.errors import CheckpointError, ConfigError
from cps_ray.runs import read_checkpoint, write_checkpoint


@pytest.fixture
def frozen(tiny: TrainConfig, tmp_path: Path) -> TrainConfig:
    """Six steps of CPS whose teachers take batch statistics; both encoders are frozen."""
    path = tmp_path / "encoder.pt"
    encoder = build_network(NetworkConfig(encoder="tu-test_efficientnet"), 2, seed=5).network.encoder
    for name, buffer in encoder.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()  # so that evaluation mode, training mode and a fresh network all differ
    torch.save(encoder.state_dict(), path)
    return changed(tiny, model__weights_file=str(path), model__freeze_encoder=True, ema__decay=0.9)


def train(config: TrainConfig, state: TrainState, stop_at: int = 99) -> None:
    data = train_data(open_shards(config.data.shards), config)
    for batch in train_batches(data, config, start_step=state.step):
        if state.step == stop_at:
            break
        train_step(config, state, batch)


def parts(state: TrainState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State of all encoders, and of all the rest: of networks and of averages."""
    kinds = {"network": state.networks, "average": state.averages}
    entries = {
        f"{kind} {name} {key}": value.clone()
        for kind, networks in kinds.items()
        for name, network in networks.items()
        for key, value in network.state_dict().items()
        if not key.endswith(("mean", "std")) or "running" in key
    }
    inside = {key: value for key, value in entries.items() if ".encoder." in key}
    return inside, {key: value for key, value in entries.items() if key not in inside}


@pytest.mark.parametrize(
    "form",
    [
        {"cps__mix": "cutmix", "compute__accumulate": 2},
        {"cps__mix": "none", "optim__head_lr_factor": 10.0, "optim__name": "adamw"},
        {"method": "fixmatch"},
        {"model__backbone_init": "shared", "model__networks": 3},
        {"method": "mean_teacher", "optim__clip_norm": 1.0},
    ],
)
def test_a_frozen_encoder_stays_bit_for_bit_and_the_head_learns(frozen: TrainConfig, form: dict[str, object]) -> None:
    config = changed(frozen, **form)
    state = build_state(config, 7, Ranks())
    encoders, heads = parts(state)
    assert any("running_var" in key for key in encoders)
    train(config, state)
    evaluate(config, state.evaluated, eval_batches(open_shards(config.data.shards), "val"), 7, Ranks())
    train_step(config, state, next(iter(train_batches(train_data(open_shards(config.data.shards), config), config))))
    encoders_after, heads_after = parts(state)
    assert all(torch.equal(value, encoders[key]) for key, value in encoders_after.items())
    assert not any(torch.equal(value, heads[key]) for key, value in heads_after.items() if "weight" in key)
    for name, optimizer in state.optimizers.items():
        head = {id(p) for key, p in state.networks[name].named_parameters() if "encoder" not in key}
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == head


def test_a_frozen_encoder_leaves_no_graph_and_stays_in_evaluation_mode(frozen: TrainConfig) -> None:
    network = build_network(frozen.model, 3, seed=0)
    seen: list[Tensor] = []
    network.network.encoder.register_forward_hook(lambda module, _, maps: seen.extend(maps))
    for mode in (True, False, True):
        network.train(mode)
        assert not any(module.training for module in network.network.encoder.modules())
        assert network.network.decoder.training == network.network.segmentation_head.training == mode
        assert network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).requires_grad
    assert len(seen) == 18
    assert all(each.grad_fn is None and not each.requires_grad for each in seen)  # so nothing was kept to go back


def test_a_training_with_a_frozen_encoder_resumes_bit_for_bit(frozen: TrainConfig, tmp_path: Path) -> None:
    config = changed(frozen, optim__head_lr_factor=10.0)
    unbroken, first, second = (build_state(config, 7, Ranks()) for _ in range(3))
    train(config, unbroken)
    train(config, first, stop_at=2)
    write_checkpoint(tmp_path, first.snapshot(), {})
    second.load(read_checkpoint(tmp_path), source=tmp_path)
    train(config, second)
    for own, other in zip(parts(unbroken), parts(second), strict=True):
        assert all(torch.equal(value, other[key]) for key, value in own.items())


def test_one_network_may_be_frozen_and_the_other_not(frozen: TrainConfig) -> None:
    config = changed(frozen, model__b={"encoder": "tu-test_resnet", "options": {"decoder_channels": 16}})
    state = build_state(config, 7, Ranks())
    before, _ = parts(state)
    train(config, state)
    moved = {key for key, value in parts(state)[0].items() if not torch.equal(value, before[key])}
    assert moved
    assert all(key.startswith(("network b", "average b")) for key in moved)


def test_a_frozen_encoder_needs_weights(tiny: TrainConfig) -> None:
    with pytest.raises(
        ConfigError, match=r"`model.freeze_encoder: true` needs `model.weights` or `model.weights_file`"
    ):
        changed(tiny, model__freeze_encoder=True)


def sgd(optim: OptimConfig, encoder: list[Tensor], head: list[Tensor]) -> torch.optim.Optimizer:
    groups = [{"params": encoder, "lr": optim.lr}, {"params": head, "lr": optim.lr * optim.head_lr_factor}]
    return torch.optim.SGD(groups, momentum=optim.momentum, weight_decay=0.0)


def adamw(optim: OptimConfig, encoder: list[Tensor], head: list[Tensor]) -> torch.optim.Optimizer:
    groups = [{"params": encoder, "lr": optim.lr}, {"params": head, "lr": optim.lr * optim.head_lr_factor}]
    return torch.optim.AdamW(groups, weight_decay=0.0)


@pytest.mark.parametrize("theirs", [sgd, adamw])
def test_the_head_learns_at_a_multiple_of_the_rate(
    tiny: TrainConfig, theirs: Callable[[OptimConfig, list[Tensor], list[Tensor]], torch.optim.Optimizer]
) -> None:
    """Against a plain optimizer of torch with two groups, which is given the same gradients."""
    changes = {"name": theirs.__name__, "lr": 1e-3, "head_lr_factor": 20.0, "weight_decay": 0.0, "warmup_steps": 3}
    config = changed(tiny, method="supervised", optim=changes)
    state = build_state(config, 7, Ranks())
    network, optimizer = state.networks["a"], state.optimizers["a"]
    copies = {key: p.detach().clone() for key, p in network.named_parameters()}
    kinds = ([key for key in copies if ".encoder." in key], [key for key in copies if ".encoder." not in key])
    reference = theirs(config.optim, *([copies[key] for key in kind] for kind in kinds))
    rates: list[tuple[float, ...]] = []

    def follow(*_: object) -> None:
        rate = learning_rate(config.optim, state.step, config.schedule.steps)
        for group, factor in zip(reference.param_groups, (1.0, 20.0), strict=True):
            group["lr"] = rate * factor
        for key, parameter in network.named_parameters():
            copies[key].grad = parameter.grad.clone()
        reference.step()
        rates.append(tuple(sorted({group["lr"] for group in optimizer.param_groups})))

    optimizer.register_step_pre_hook(follow)
    train(config, state)
    assert len({rate for rate, _ in rates}) == 6  # warm-up and decay reach both
    assert all(high == pytest.approx(20 * low) for low, high in rates)
    for key, parameter in network.named_parameters():
        assert torch.allclose(parameter, copies[key], rtol=1e-4, atol=1e-6), key


def test_a_factor_of_one_leaves_the_optimizer_as_it_was(tiny: TrainConfig) -> None:
    state = build_state(tiny, 7, Ranks())
    for name, optimizer in state.optimizers.items():
        parameters = [p for p in state.networks[name].parameters() if p.requires_grad]
        weights, rest = ([id(p) for p in group["params"]] for group in optimizer.param_groups)
        assert weights == [id(p) for p in parameters if p.dim() > 1]
        assert rest == [id(p) for p in parameters if p.dim() <= 1]
        assert all(group["lr"] == tiny.optim.lr for group in optimizer.param_groups)


def test_a_checkpoint_from_before_there_were_factors_goes_on(tiny: TrainConfig, tmp_path: Path) -> None:
    state = build_state(tiny, 7, Ranks())
    train(tiny, state, stop_at=2)
    snapshot = state.snapshot()
    assert snapshot is not None
    for saved in snapshot["networks"].values():
        for group in saved["optimizer"]["param_groups"]:
            del group["lr_factor"]
    write_checkpoint(tmp_path, snapshot, {})
    other = build_state(tiny, 7, Ranks())
    other.load(read_checkpoint(tmp_path), source=tmp_path)
    for each in (state, other):
        train(tiny, each)
    for p, q in zip(state.networks["a"].parameters(), other.networks["a"].parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_checkpoint_without_loss_scales_goes_on_where_none_are_needed(tiny: TrainConfig) -> None:
    """Earlier versions saved one scale for all networks."""
    state = build_state(tiny, 7, Ranks())
    snapshot = state.snapshot()
    assert snapshot is not None
    for saved in snapshot["networks"].values():
        del saved["scaler"]
    state.load(snapshot, "old")
    fp16 = changed(tiny, compute__autocast="fp16", resources__gpus_per_worker=1.0)
    with pytest.raises(CheckpointError, match=r"^old: the checkpoint must be of this config's networks, but 'scaler'"):
        build_state(fp16, 7, Ranks()).load(snapshot, "old")
