"""The step against an independent, naive implementation of the paper's equations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import changed

from cps_ray.config.train import TrainConfig
from cps_ray.engine.batch import IGNORE, Batch
from cps_ray.engine.mixing import cutmix_masks
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import TrainState, build_state
from cps_ray.engine.step import train_step

CLASSES = 3


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    image = lambda n: torch.randint(0, 256, (n, 3, 32, 48), generator=generator, dtype=torch.uint8)  # noqa: E731
    mask = torch.randint(0, CLASSES, (4, 32, 48), generator=generator).to(torch.uint8)
    mask[0, :5] = IGNORE
    return Batch(image(4), mask, image(4))


def state_of(config: TrainConfig) -> TrainState:
    return build_state(config, CLASSES, Ranks())


def reference(
    config: TrainConfig, state: TrainState, batch: Batch, weight: float, *, copy_networks: bool = True
) -> torch.Tensor:
    """Eq. 1 to 4 of the paper, with CutMix on unlabelled images: every term written out, one network at a time."""
    pair = copy.deepcopy(state.pair) if copy_networks else state.pair
    a, b = pair.a.train(), pair.b.train()
    unlabeled = batch.unlabeled_image
    assert unlabeled is not None
    if config.cps.mix == "cutmix":
        with torch.no_grad():
            label_a, label_b = a(unlabeled).argmax(1), b(unlabeled).argmax(1)
        mask = cutmix_masks(config.cps, config.seed, state.step, range(4), 32, 48)
        partner = [1, 2, 3, 0]
        label_a = torch.where(mask, label_a[partner], label_a)
        label_b = torch.where(mask, label_b[partner], label_b)
        unlabeled = torch.where(mask[:, None], unlabeled[partner], unlabeled)
    images = torch.cat([batch.labeled_image, unlabeled])
    out_a, out_b = a(images), b(images)
    target = batch.labeled_mask.long()
    loss = sum(F.cross_entropy(out[:4], target, ignore_index=IGNORE) for out in (out_a, out_b))
    if config.cps.mix == "none":
        label_a, label_b = out_a[4:].argmax(1), out_b[4:].argmax(1)
    loss = loss + weight * (F.cross_entropy(out_a[4:], label_b) + F.cross_entropy(out_b[4:], label_a))
    return loss


@pytest.mark.parametrize("mix", ["none", "cutmix"])
def test_loss_equals_the_papers_equations(tiny: TrainConfig, batch: Batch, mix: str) -> None:
    config = changed(tiny, cps__mix=mix, cps__ramp=0.0, cps__weight=1.5)
    state = state_of(config)
    expected = reference(config, state, batch, 1.5)
    losses = train_step(config, state, batch)
    assert float(losses["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert state.step == 1


def test_gradient_equals_the_papers_equations(tiny: TrainConfig, batch: Batch) -> None:
    config = changed(tiny, cps__ramp=0.0)
    state = state_of(config)
    twin = state_of(config)
    train_step(config, state, batch)
    grads = {name: p.grad for name, p in state.pair.named_parameters()}
    reference(config, twin, batch, config.cps.weight, copy_networks=False).backward()
    for name, p in twin.pair.named_parameters():
        assert torch.allclose(grads[name], p.grad, rtol=1e-3, atol=1e-6), name


def test_each_network_learns_from_the_other_one(tiny: TrainConfig, batch: Batch) -> None:
    """With no labelled pixel, a network that always says class 2 makes its peer say class 2, and is not moved itself
    towards its own labels."""
    config = changed(tiny, cps__mix="none", cps__ramp=0.0, optim__lr=0.1, optim__momentum=0.0, optim__weight_decay=0.0)
    state = state_of(config)
    assert state.pair.b is not None
    with torch.no_grad():
        head = state.pair.b.network.segmentation_head[0]
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 0.0, 10.0]))
    unlabeled_only = Batch(batch.labeled_image, torch.full_like(batch.labeled_mask, IGNORE), batch.unlabeled_image)
    images = batch.unlabeled_image
    said = lambda network: (network.eval()(images).argmax(1) == 2).float().mean()  # noqa: E731
    start = said(state.pair.a)
    for _ in range(20):
        train_step(config, state, unlabeled_only)
    assert start < 0.9
    assert said(state.pair.a) > 0.99


def test_cps_on_all_images_counts_the_labelled_ones_too(tiny: TrainConfig, batch: Batch) -> None:
    config = changed(tiny, cps__on="all", cps__mix="none", cps__ramp=0.0)
    state = state_of(config)
    a, b = copy.deepcopy(state.pair.a).train(), copy.deepcopy(state.pair.b).train()
    images = torch.cat([batch.labeled_image, batch.unlabeled_image])
    out_a, out_b = a(images), b(images)
    cross = F.cross_entropy(out_a, out_b.argmax(1)) + F.cross_entropy(out_b, out_a.argmax(1))
    assert float(train_step(config, state, batch)["cps"]) == pytest.approx(float(cross), rel=1e-5)


def test_weight_zero_on_the_ramps_first_step(tiny: TrainConfig, batch: Batch) -> None:
    losses = train_step(changed(tiny, cps__weight=100.0), state_of(tiny), batch)
    assert float(losses["loss"]) == pytest.approx(float(losses["sup_a"] + losses["sup_b"]), rel=1e-6)


def test_supervised_trains_network_a_alone(tiny: TrainConfig, batch: Batch) -> None:
    config = changed(tiny, method="supervised")
    state = state_of(config)
    expected = F.cross_entropy(
        copy.deepcopy(state.pair.a).train()(batch.labeled_image), batch.labeled_mask.long(), ignore_index=IGNORE
    )
    losses = train_step(config, state, Batch(batch.labeled_image, batch.labeled_mask, None))
    assert set(losses) == {"loss", "sup_a"}
    assert float(losses["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_micro_batches_sum_to_the_whole(tiny: TrainConfig, batch: Batch) -> None:
    """Batch norm sees smaller batches, so the networks are compared in a form that has none: evaluation mode."""
    whole, parts = changed(tiny, cps__mix="none"), changed(tiny, cps__mix="none", compute__accumulate=2)
    grads = []
    for config in (whole, parts):
        state = state_of(config)
        for module in state.pair.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train = lambda mode=True, m=module: m  # stays in evaluation mode
                module.training = False
        train_step(config, state, batch)
        grads.append({n: p.grad for n, p in state.pair.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], rtol=1e-3, atol=1e-6), name


def test_clipping_bounds_the_gradient_of_each_network(tiny: TrainConfig, batch: Batch) -> None:
    config = changed(tiny, optim__clip_norm=0.01)
    state = state_of(config)
    train_step(config, state, batch)
    for network in (state.pair.a, state.pair.b):
        norm = torch.cat([p.grad.flatten() for p in network.parameters()]).norm()
        assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_norms_and_biases_are_not_decayed(tiny: TrainConfig) -> None:
    state = state_of(changed(tiny, optim__weight_decay=0.1))
    for optimizer in state.optimizers:
        decayed, bare = optimizer.param_groups
        assert decayed["weight_decay"] == 0.1
        assert all(p.dim() > 1 for p in decayed["params"])
        assert bare["weight_decay"] == 0.0
        assert all(p.dim() <= 1 for p in bare["params"])
        assert bare["params"]


@pytest.mark.parametrize("autocast", ["bf16"])
def test_autocast_stays_near_full_precision(tiny: TrainConfig, batch: Batch, autocast: str) -> None:
    exact = train_step(tiny, state_of(tiny), batch)["loss"]
    rounded = train_step(changed(tiny, compute__autocast=autocast), state_of(tiny), batch)["loss"]
    assert float(rounded) == pytest.approx(float(exact), rel=0.05)
    assert rounded.dtype == torch.float32
