"""The step against an independent, naive implementation of the papers' equations."""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import changed, double_precision

from cps_ray.config.train import TrainConfig
from cps_ray.engine.batch import IGNORE, Batch
from cps_ray.engine.methods import METHODS
from cps_ray.engine.mixing import classmix_masks, cutmix_masks
from cps_ray.engine.networks import Segmenter
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import TrainState, build_state
from cps_ray.engine.step import OBSERVE_EVERY, train_step
from cps_ray.errors import ConfigError
from cps_ray.runs import read_checkpoint, write_checkpoint

CLASSES = 3
SIZE = (32, 48)
Say = Callable[[torch.Tensor], torch.Tensor]
Change = Callable[[list[torch.Tensor]], list[torch.Tensor]]


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    image = lambda n: torch.randint(0, 256, (n, 3, *SIZE), generator=generator, dtype=torch.uint8)  # noqa: E731
    mask = torch.randint(0, CLASSES, (4, *SIZE), generator=generator).to(torch.uint8)
    mask[0, :5] = IGNORE
    whole = [0, SIZE[0], 0, SIZE[1]]
    boxes = [[whole, [4, 30, 0, 48], whole, [0, 32, 10, 41]], [whole, [1, 20, 0, 48], whole, [0, 32, 3, 30]]]
    boxes += [[[5, 25, 5, 25], whole, whole, whole]]
    labeled, unlabeled, second = (torch.tensor(box, dtype=torch.int32) for box in boxes)
    return Batch(image(4), mask, image(4), image(4), image(4), labeled, unlabeled, second)


@pytest.fixture
def full(tiny: TrainConfig) -> TrainConfig:
    """Full weight from the first step."""
    return changed(tiny, cps__ramp=0.0, cps__weight=1.5)


def state_of(config: TrainConfig) -> TrainState:
    return build_state(config, CLASSES, Ranks())


def full_logits(network: Segmenter) -> Say:
    """Plain full-resolution logits: `network`'s own head and torch's upsampling."""

    def say(image: torch.Tensor) -> torch.Tensor:
        x = (image.float() - network.mean) / network.std
        x = F.pad(x, (0, 64 - SIZE[1]))
        return F.interpolate(network.network(x), (32, 64), mode="bilinear", align_corners=True)[..., : SIZE[1]]

    return say


def reference(config: TrainConfig, state: TrainState, batch: Batch, *, own_networks: bool = False) -> torch.Tensor:
    """Eq. 1 to 4 of the CPS paper, with CutMix on unlabelled images as its code has it: every term and every pass of every
    network written out, one network at a time. Also n networks, as in n-CPS."""
    cps, size = config.cps, 4
    networks = [n if own_networks else copy.deepcopy(n) for n in state.networks.values()]
    nets = [full_logits(network.train()) for network in networks]
    u0, u1, x, y = batch.unlabeled_image, batch.unlabeled_second, batch.labeled_image, batch.labeled_mask.long()
    joint = cps.forwards == "joint"
    labels: list[torch.Tensor] = []
    pasted: list[torch.Tensor] = []
    seen = u1 if cps.student == "strong" else u0
    image, padding = seen, outside(batch.unlabeled_box)
    if cps.mix != "none" or cps.student == "strong" or cps.teacher == "average":
        mask = cutmix_masks(cps, config.seed, state.step, range(size), *SIZE)
        if cps.mix == "none":
            mask = torch.zeros_like(mask)
        teachers = list(state.averages.values()) if cps.teacher == "average" else networks
        for network in networks:
            network.train(cps.teacher_bn == "train")
        for net in map(full_logits, teachers):
            with torch.no_grad():
                if cps.cutmix_partner == "other":
                    own = net(u0).argmax(1)
                    other = own[[1, 2, 3, 0]]
                elif joint:
                    own, other = net(torch.cat([u0, u1])).argmax(1).chunk(2)
                else:
                    own, other = net(u0).argmax(1), net(u1).argmax(1)
            pasted.append(other)
            labels.append(own)
        if cps.mix == "classmix":  # a decides for one image, b for the next
            deciding = torch.stack([pasted[image % len(pasted)][image] for image in range(size)])
            mask = classmix_masks(deciding, config.seed, state.step, range(size))
        labels = [torch.where(mask, other, own) for own, other in zip(labels, pasted, strict=True)]
        partner, around = (
            (u1, outside(batch.second_box))
            if cps.cutmix_partner == "self"
            else (seen[[1, 2, 3, 0]], padding[[1, 2, 3, 0]])
        )
        image, padding = torch.where(mask[:, None], partner, seen), torch.where(mask, around, padding)
        for network in networks:
            network.train()
    if joint:
        outs = [net(torch.cat([x, image])).split([4, 4]) for net in nets]
    elif cps.mix == "cutmix":
        outs = [tuple(reversed([net(image), net(x)])) for net in nets]
    else:
        outs = [(net(x), net(image)) for net in nets]
    if not labels:
        labels = [out_u.argmax(1) for _, out_u in outs]
    if cps.images == "all":
        labels = [torch.cat([out_x.argmax(1), label]) for (out_x, _), label in zip(outs, labels, strict=True)]
        padding = torch.cat([outside(batch.labeled_box), padding])
    if cps.padding == "ignore":
        labels = [label.masked_fill(padding, IGNORE) for label in labels]
    loss = torch.zeros(())
    ce = functools.partial(F.cross_entropy, ignore_index=IGNORE)
    weights = None if config.loss.class_weights is None else torch.tensor(config.loss.class_weights)
    pseudo_weights = torch.tensor(cps.class_weights or [1.0] * CLASSES)

    def weighed(out: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Mean over the pixels that are not IGNORE, whatever their weights."""
        return (ce(out, label, reduction="none") * pseudo_weights[label.clamp(max=CLASSES - 1)]).sum() / (
            label != IGNORE
        ).sum()

    for me, (out_x, out_u) in enumerate(outs):
        loss = loss + ce(out_x, y, weights)
        out = torch.cat([out_x, out_u]) if cps.images == "all" else out_u
        peers = [label for other, label in enumerate(labels) if other != me]
        loss = loss + cps.weight * sum(weighed(out, label) for label in peers) / len(peers)
    return loss


def outside(boxes: torch.Tensor) -> torch.Tensor:
    """Where views are padding, pixel by pixel."""
    padding = torch.ones(len(boxes), *SIZE, dtype=torch.bool)
    for image, (top, bottom, left, right) in enumerate(boxes.tolist()):
        padding[image, top:bottom, left:right] = False
    return padding


@pytest.mark.parametrize("padding", ["count", "ignore"])
def test_only_the_surest_labels_of_each_class_count(full: TrainConfig, batch: Batch, padding: str) -> None:
    config = changed(full, cps__mix="none", cps__class_fraction=0.4, cps__padding=padding)
    state = state_of(config)
    outs = []
    for network in state.networks.values():
        out = full_logits(copy.deepcopy(network).train())(torch.cat([batch.labeled_image, batch.unlabeled_image]))
        outs.append(out.split([4, 4]))
    counted = torch.ones(4, *SIZE, dtype=torch.bool)
    if padding == "ignore":
        counted = ~outside(batch.unlabeled_box)
    labels = []
    for _, out in outs:
        top, label = out.softmax(1).max(1)
        for number in range(CLASSES):
            here = (label == number) & counted
            if here.any():
                limit = top[here].sort(descending=True).values[max(0, math.ceil(0.4 * int(here.sum())) - 1)]
                label[(label == number) & (top < limit - 1e-3)] = IGNORE  # what a bin holds beyond the limit stays
        labels.append(label.masked_fill(~counted, IGNORE))
    losses = train_step(config, state, batch)
    found = float(losses["cps"])
    expected = sum(
        float(F.cross_entropy(out, label, ignore_index=IGNORE, reduction="sum") / counted.sum())
        for (_, out), label in zip(outs, reversed(labels), strict=True)
    )
    assert found == pytest.approx(expected, rel=0.03)
    everything = train_step(changed(config, cps__class_fraction=1.0), state_of(config), batch)
    assert found < 0.7 * float(everything["cps"])
    unobserved = state_of(config)
    unobserved.step = 1
    assert float(train_step(config, unobserved, batch)["cps"]) == found


def gradients(state: TrainState) -> dict[str, dict[str, torch.Tensor]]:
    """Is filled by the next step with what each network's optimizer is given, by the names of network and parameter."""
    seen: dict[str, dict[str, torch.Tensor]] = {}
    for name, network in state.networks.items():

        def keep(*_: object, name: str = name, network: torch.nn.Module = network) -> None:
            seen[name] = {place: p.grad.clone() for place, p in network.named_parameters() if p.grad is not None}

        state.optimizers[name].register_step_pre_hook(keep)
    return seen


FORMS = {
    "plain": {"mix": "none"},
    "plain, as the paper's code": {"mix": "none", "images": "all", "forwards": "separate"},
    "cutmix": {"mix": "cutmix"},
    "cutmix, as the paper's code": {"mix": "cutmix", "forwards": "separate", "cutmix_partner": "self"},
    "cutmix, own view, joint": {"mix": "cutmix", "cutmix_partner": "self"},
    "cutmix, eval": {"mix": "cutmix", "teacher_bn": "eval"},
    "cutmix, all": {"mix": "cutmix", "images": "all"},
    "strong": {"mix": "none", "student": "strong"},
    "strong, cutmix, all": {"mix": "cutmix", "student": "strong", "images": "all"},
    "average": {"mix": "none", "teacher": "average"},
    "average, cutmix, strong": {"mix": "cutmix", "teacher": "average", "student": "strong"},
    "plain, no padding": {"mix": "none", "padding": "ignore"},
    "plain, no padding, all": {"mix": "none", "images": "all", "padding": "ignore"},
    "classmix": {"mix": "classmix"},
    "classmix, own view, average": {"mix": "classmix", "teacher": "average", "cutmix_partner": "self"},
    "weights, all": {"mix": "none", "images": "all", "class_weights": [0.5, 2.0, 0.0]},
    "cutmix, no padding": {"mix": "cutmix", "padding": "ignore"},
    "cutmix, no padding, own view, all": {
        "mix": "cutmix",
        "images": "all",
        "padding": "ignore",
        "cutmix_partner": "self",
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("networks", [2, 3])
def test_loss_and_gradient_equal_the_papers_equations(
    full: TrainConfig, batch: Batch, form: str, networks: int
) -> None:
    config = changed(
        full, model__networks=networks, ema__decay=0.9, **{f"cps__{name}": value for name, value in FORMS[form].items()}
    )
    if form.startswith("weights"):
        config = changed(config, loss__class_weights=[3.0, 0.2, 1.0])
    state, twin = state_of(config), state_of(config)
    for each in (state, twin):  # else averages would be the networks themselves
        torch.manual_seed(0)
        for average in each.averages.values():
            for parameter in average.parameters():
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    expected, given = reference(config, twin, batch, own_networks=True), gradients(state)
    losses = train_step(config, state, batch)
    assert float(losses["loss"]) == pytest.approx(float(expected.detach()), rel=1e-5)
    expected.backward()
    for name, network in state.networks.items():
        for (place, grad), q in zip(given[name].items(), twin.networks[name].parameters(), strict=True):
            assert torch.allclose(grad, q.grad, rtol=1e-3, atol=1e-6), (name, place)
        for (place, p), q in zip(network.named_buffers(), twin.networks[name].buffers(), strict=True):
            assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), (name, place)  # running statistics, in the same order
    assert state.step == 1


def test_twenty_steps_are_those_of_the_papers_equations(full: TrainConfig, batch: Batch) -> None:
    """Golden losses: an own loop of plain SGD over the reference, in double precision, so that no tie turns a label."""
    config = changed(full, schedule__steps=20, schedule__eval_every=20, optim__decay="constant")
    optim = config.optim
    speed: dict[torch.Tensor, torch.Tensor] = {}
    with double_precision():
        state, twin = state_of(config), state_of(config)
        for step in range(20):
            twin.step = step
            parameters = [p for network in twin.networks.values() for p in network.parameters()]
            expected = reference(config, twin, batch, own_networks=True)
            for p, grad in zip(parameters, torch.autograd.grad(expected, parameters), strict=True):
                pull = grad + optim.weight_decay * p.detach() * (p.dim() > 1)
                speed[p] = optim.momentum * speed[p] + pull if p in speed else pull
                p.data -= optim.lr * speed[p]
            found = train_step(config, state, batch)
            assert float(found["loss"]) == pytest.approx(float(expected.detach()), rel=1e-9), step


@pytest.fixture
def doubled() -> Iterator[None]:
    """Everything in double precision, so that no tie turns a label."""
    with double_precision():
        yield


@pytest.mark.parametrize("mix", ["none", "cutmix"])
def test_the_same_seed_gives_the_same_step_to_the_last_bit(full: TrainConfig, batch: Batch, mix: str) -> None:
    config = changed(full, cps__mix=mix)
    first, again = state_of(config), state_of(config)
    for _ in range(3):
        assert torch.equal(train_step(config, first, batch)["loss"], train_step(config, again, batch)["loss"])
    for p, q in zip(first.networks["b"].parameters(), again.networks["b"].parameters(), strict=True):
        assert torch.equal(p, q)


def test_each_network_learns_from_the_other_one(tiny: TrainConfig, batch: Batch) -> None:
    """A network that always predicts class 2 teaches its peer class 2 where no pixel is labelled, and is not moved itself
    towards its own labels."""
    config = changed(tiny, cps__mix="none", cps__ramp=0.0, optim__lr=0.1, optim__momentum=0.0, optim__weight_decay=0.0)
    state = state_of(config)
    with torch.no_grad():
        head = state.networks["b"].network.segmentation_head[0]
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 0.0, 10.0]))
    unlabeled_only = Batch(batch.labeled_image, torch.full_like(batch.labeled_mask, IGNORE), batch.unlabeled_image)
    images = batch.unlabeled_image
    said = lambda network: (network.eval().logits(images).argmax(1) == 2).float().mean()  # noqa: E731
    start = said(state.networks["a"])
    for _ in range(20):
        train_step(config, state, unlabeled_only)
    assert start < 0.9
    assert said(state.networks["a"]) > 0.99


def test_weight_zero_on_the_ramps_first_step(tiny: TrainConfig, batch: Batch) -> None:
    losses = train_step(changed(tiny, cps__weight=100.0), state_of(tiny), batch)
    assert float(losses["loss"]) == pytest.approx(float(losses["sup_a"] + losses["sup_b"]), rel=1e-6)
    assert float(losses["cps"]) > 0


@pytest.mark.parametrize("mix", ["none", "cutmix"])
def test_before_the_start_only_masks_teach(tiny: TrainConfig, batch: Batch, mix: str) -> None:
    config = changed(tiny, cps__start=0.25, cps__ramp=0.0, cps__mix=mix, schedule__steps=8, schedule__eval_every=4)
    state = state_of(config)
    alone = [full_logits(copy.deepcopy(network).train())(batch.labeled_image) for network in state.networks.values()]
    expected = sum(F.cross_entropy(out, batch.labeled_mask.long(), ignore_index=IGNORE) for out in alone)
    kinds = []
    for step in range(3):
        losses = train_step(config, state, batch)
        kinds.append("cps" in losses)
        if step == 0:
            assert float(losses["loss"]) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert kinds == [False, False, True]
    assert float(losses["loss"]) > float(losses["sup_a"] + losses["sup_b"])  # at once with its full weight


def test_supervised_trains_network_a_alone(tiny: TrainConfig, batch: Batch) -> None:
    config = changed(tiny, method="supervised")
    state = state_of(config)
    say = full_logits(copy.deepcopy(state.networks["a"]).train())
    expected = F.cross_entropy(say(batch.labeled_image), batch.labeled_mask.long(), ignore_index=IGNORE)
    losses = train_step(config, state, Batch(batch.labeled_image, batch.labeled_mask, None))
    assert set(losses) == {"loss", "sup_a", "grad_norm_a"}
    assert float(losses["loss"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("padding", ["count", "ignore"])
def test_mean_teacher_is_the_squared_difference_to_the_averaged_network(
    tiny: TrainConfig, batch: Batch, padding: str
) -> None:
    config = changed(
        tiny, method="mean_teacher", ema__decay=0.9, mean_teacher__weight=10.0, mean_teacher__padding=padding
    )
    state = state_of(config)
    train_step(config, state, batch)  # now the average is another network than the student's next one
    student = full_logits(copy.deepcopy(state.networks["a"]).train())
    teacher = full_logits(copy.deepcopy(state.averages["a"]).eval())
    out_x, out_u = student(torch.cat([batch.labeled_image, batch.unlabeled_second])).split([4, 4])
    with torch.no_grad():
        target = teacher(batch.unlabeled_image).softmax(1)
    square = (out_u.softmax(1) - target).square()
    consistency = square.movedim(1, -1)[~outside(batch.unlabeled_box)].mean() if padding == "ignore" else square.mean()
    supervised = F.cross_entropy(out_x, batch.labeled_mask.long(), ignore_index=IGNORE)
    losses = train_step(config, state, batch)
    assert float(losses["consistency"]) == pytest.approx(float(consistency), rel=1e-4)
    assert float(losses["loss"]) == pytest.approx(float(supervised + 10.0 * consistency), rel=1e-5)


@pytest.mark.parametrize("padding", ["count", "ignore"])
@pytest.mark.parametrize("mix", ["none", "cutmix"])
def test_fixmatch_learns_sure_labels_of_weak_views_on_strong_ones(
    tiny: TrainConfig, batch: Batch, mix: str, padding: str
) -> None:
    state = state_of(changed(tiny, method="fixmatch"))
    network = copy.deepcopy(state.networks["a"])
    with torch.no_grad():
        top, label = full_logits(network.eval())(batch.unlabeled_image).softmax(1).max(1)
    sure = float(top.quantile(0.6))
    config = changed(tiny, method="fixmatch", fixmatch__mix=mix, fixmatch__confidence=sure)
    config = changed(config, fixmatch__padding=padding)
    label[top < sure] = IGNORE
    assert 0.01 < (label == IGNORE).float().mean() < 0.99
    image, counted = batch.unlabeled_second, torch.ones_like(label, dtype=torch.bool)
    if padding == "ignore":
        counted = ~outside(batch.unlabeled_box)
        label[~counted] = IGNORE
    if mix == "cutmix":
        mask = cutmix_masks(config.fixmatch, config.seed, 0, range(4), *SIZE)
        image = torch.where(mask[:, None], image[[1, 2, 3, 0]], image)
        label = torch.where(mask, label[[1, 2, 3, 0]], label)
        counted = torch.where(mask, counted[[1, 2, 3, 0]], counted)
    out_x, out_u = full_logits(network.train())(torch.cat([batch.labeled_image, image])).split([4, 4])
    loss = F.cross_entropy(out_x, batch.labeled_mask.long(), ignore_index=IGNORE)
    loss = loss + F.cross_entropy(out_u, label, ignore_index=IGNORE, reduction="sum") / counted.sum()
    assert float(train_step(config, state, batch)["loss"]) == pytest.approx(float(loss), rel=1e-5)


def features_said(network: Segmenter, image: torch.Tensor, change: Change | None = None) -> torch.Tensor:
    """Full-resolution logits by way of encoder, decoder and head, with `change` between the first two."""
    x = F.pad((image.double() - network.mean) / network.std, (0, 64 - SIZE[1]))
    net = network.network
    features = net.encoder(x)
    coarse = net.segmentation_head(net.decoder(change(features) if change else features))
    return F.interpolate(coarse, (32, 64), mode="bilinear", align_corners=True)[..., : SIZE[1]]


def labels_of(logits: torch.Tensor, confidence: float) -> torch.Tensor:
    top, label = logits.detach().softmax(1).max(1)
    return label.masked_fill(top < confidence, IGNORE)


def mean_over_counted(out: torch.Tensor, label: torch.Tensor, padding: torch.Tensor, kind: str) -> torch.Tensor:
    """Cross-entropy where the label is sure, divided by all pixels or by those that are no padding."""
    if kind == "ignore":
        label = label.masked_fill(padding, IGNORE)
    pixels = int((~padding).sum()) if kind == "ignore" else padding.numel()
    return F.cross_entropy(out, label, ignore_index=IGNORE, reduction="sum") / pixels


def unimatch_reference(config: TrainConfig, state: TrainState, batch: Batch) -> torch.Tensor:
    """The loss of UniMatch's and of UniMatch V2's authors, every pass and every term written out."""
    unimatch, network, p = config.unimatch, state.networks["a"], config.unimatch.feature_dropout
    x, weak, y = batch.labeled_image, batch.unlabeled_image, batch.labeled_mask.long()
    strong = [batch.unlabeled_second, batch.unlabeled_third]
    boxes = [cutmix_masks(unimatch, config.seed, state.step, range(4), *SIZE, view) for view in range(2)]
    assert all(box.any() for box in boxes)
    padding, successor = outside(batch.unlabeled_box), [1, 2, 3, 0]
    torch.manual_seed((config.seed * 1_000_003 + state.step) * 4099)

    def dropped(features: list[torch.Tensor]) -> list[torch.Tensor]:
        keep = [torch.empty(*f.shape[:2], 1, 1).bernoulli_(1 - p) / (1 - p) for f in features]
        return [torch.cat([f, f * mask]) for f, mask in zip(features, keep, strict=True)]

    def complementary(features: list[torch.Tensor]) -> list[torch.Tensor]:
        order, masks = torch.rand(4).argsort(), {}
        for f in features:
            if f.shape[1] not in masks:
                mask = torch.empty(4, f.shape[1]).bernoulli_(0.5) * 2
                pair = [mask, 2 - mask]
                for image in range(4):
                    if order[image] < int(4 * (1 - p)):
                        pair[0][image] = pair[1][image] = 1.0
                masks[f.shape[1]] = torch.cat(pair)
        return [f * masks[f.shape[1]][:, :, None, None] for f in features]

    with torch.no_grad():
        teacher = state.averages["a"].eval() if unimatch.version == "v2" else network.eval()
        pasted = labels_of(features_said(teacher, weak), unimatch.confidence)
    network.train()
    if unimatch.version == "v1":
        out = features_said(network, torch.cat([x, weak]), dropped)
        out_x, out_own, _, out_dropped = out.split([4, 4, 4, 4])
        own = labels_of(out_own, unimatch.confidence)
    else:
        out_x, own = features_said(network, x), pasted
    for label in (own, pasted):
        assert 0.05 < (label == IGNORE).double().mean() < 0.95
    images, labels, paddings = [], [], []
    for view, box in zip(strong, boxes, strict=True):
        images.append(torch.where(box[:, None], view[successor], view))
        labels.append(torch.where(box, pasted[successor], own))
        paddings.append(torch.where(box, padding[successor], padding))
    outs = features_said(network, torch.cat(images), complementary if unimatch.version == "v2" else None).chunk(2)
    terms = [mean_over_counted(*each, unimatch.padding) for each in zip(outs, labels, paddings, strict=True)]
    supervised = F.cross_entropy(out_x, y, ignore_index=IGNORE)
    if unimatch.version == "v2":
        return (supervised + unimatch.weight * (terms[0] + terms[1]) / 2) / 2
    dropped_term = mean_over_counted(out_dropped, own, padding, unimatch.padding)
    return (supervised + unimatch.weight * (0.25 * terms[0] + 0.25 * terms[1] + 0.5 * dropped_term)) / 2


@torch.no_grad()
def settle(network: Segmenter, batch: Batch) -> None:
    """Gives it running statistics of these images: in evaluation mode a new network is equally unsure everywhere."""
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    network.train()(torch.cat([batch.labeled_image, batch.unlabeled_image]))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    network.eval()


UNIMATCH = {
    "v1": {},
    "v1, padding counts": {"padding": "count", "weight": 2.0},
    "v1, few dropped": {"feature_dropout": 0.2},
    "v1, boxes combined": {"mix": "cutmix"},
    "v2": {"version": "v2"},
    "v2, three of four keep their channels": {"version": "v2", "feature_dropout": 0.25},
}


@pytest.mark.parametrize("form", UNIMATCH)
def test_unimatch_takes_the_steps_of_its_authors_equations(
    tiny: TrainConfig, batch: Batch, doubled: None, form: str
) -> None:
    config = changed(tiny, method="unimatch", ema__decay=0.6, optim__decay="constant", unimatch__confidence=0.45)
    config = changed(config, **{f"unimatch__{name}": value for name, value in UNIMATCH[form].items()})
    optim, state, twin = config.optim, state_of(config), state_of(config)
    for each in (state, twin):
        settle(each.networks["a"].double(), batch)
        settle(each.averages["a"].double(), batch)
    network, average = twin.networks["a"], twin.averages["a"]
    speed = {p: torch.zeros_like(p) for p in network.parameters()}
    for step in range(3):
        twin.step = step
        expected = unimatch_reference(config, twin, batch)
        for (p, v), grad in zip(speed.items(), torch.autograd.grad(expected, [*speed]), strict=True):
            speed[p] = optim.momentum * v + grad + optim.weight_decay * p.detach() * (p.dim() > 1)
            p.data -= optim.lr * speed[p]
        decay = min(0.6, 1 - 1 / (step + 1))
        for kept, new in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
            kept.copy_(decay * kept + (1 - decay) * new if kept.is_floating_point() else new)
        found = train_step(config, state, batch)
        assert float(found["loss"]) == pytest.approx(float(expected.detach()), rel=1e-9), step
    assert ("pseudo_dropped" in found) == (config.unimatch.version == "v1")


FIXMATCH = {
    "average": {"teacher": "average"},
    "two strong views": {"strong_views": 2},
    "dropped features": {"feature_dropout": 0.3},
    "self-training": {"view": "weak", "confidence": 0.0},
    "self-training, plain": {"view": "weak", "confidence": 0.0, "mix": "none"},
    "all": {"teacher": "average", "strong_views": 2, "feature_dropout": 0.5, "padding": "ignore", "weight": 2.0},
}


@pytest.mark.parametrize("form", FIXMATCH)
def test_fixmatchs_switches_are_terms_of_its_loss(tiny: TrainConfig, batch: Batch, doubled: None, form: str) -> None:
    config = changed(tiny, method="fixmatch", ema__decay=0.6, fixmatch__confidence=0.45)
    config = changed(config, **{f"fixmatch__{name}": value for name, value in FIXMATCH[form].items()})
    fixmatch, state = config.fixmatch, state_of(config)
    train_step(config, state, batch)
    train_step(config, state, batch)  # now the average is another network
    settle(state.networks["a"], batch)
    settle(state.averages["a"], batch)
    network, average = copy.deepcopy(state.networks["a"]), copy.deepcopy(state.averages["a"])
    teacher = average if fixmatch.teacher == "average" else network
    with torch.no_grad():
        label = labels_of(features_said(teacher.eval(), batch.unlabeled_image), fixmatch.confidence)
    assert (label != IGNORE).double().mean() > 0.05
    views = [batch.unlabeled_second, batch.unlabeled_third][: fixmatch.strong_views]
    views = [batch.unlabeled_image] if fixmatch.view == "weak" else views
    padding, seen = outside(batch.unlabeled_box), []
    for number, view in enumerate(views):
        box = cutmix_masks(fixmatch, config.seed, 2, range(4), *SIZE, number)
        box &= fixmatch.mix == "cutmix"
        mixed = [torch.where(b, each[[1, 2, 3, 0]], each) for b, each in ((box[:, None], view), (box, label))]
        seen.append((*mixed, torch.where(box, padding[[1, 2, 3, 0]], padding)))
    out = features_said(network.train(), torch.cat([batch.labeled_image, *(image for image, _, _ in seen)]))
    out_x, *outs = out.split(4)
    loss = sum(
        mean_over_counted(out, *each, fixmatch.padding) for out, (_, *each) in zip(outs, seen, strict=True)
    ) / len(seen)
    if fixmatch.feature_dropout:
        torch.manual_seed((config.seed * 1_000_003 + 2) * 4099)
        keep = 1 - fixmatch.feature_dropout

        def thinned(features: list[torch.Tensor]) -> list[torch.Tensor]:
            return [f * torch.empty(*f.shape[:2], 1, 1).bernoulli_(keep) / keep for f in features]

        dropped = features_said(network, batch.unlabeled_image, thinned)
        loss = (loss + mean_over_counted(dropped, label, padding, fixmatch.padding)) / 2
    loss = F.cross_entropy(out_x, batch.labeled_mask.long(), ignore_index=IGNORE) + fixmatch.weight * loss
    assert float(train_step(config, state, batch)["loss"]) == pytest.approx(float(loss.detach()), rel=1e-9)


def test_averages_are_plain_means_at_first_then_exponential(tiny: TrainConfig, batch: Batch) -> None:
    config = changed(tiny, ema__decay=0.6)
    state = state_of(config)
    expected = None
    for step in range(5):
        train_step(config, state, batch)
        now = state.networks["b"].network.segmentation_head[0].weight.detach().clone()
        decay = min(0.6, 1 - 1 / (step + 1))
        expected = now if expected is None else decay * expected + (1 - decay) * now
        average = state.averages["b"].network.segmentation_head[0].weight
        assert torch.allclose(average, expected, rtol=1e-5, atol=1e-7)
        assert not average.requires_grad
    statistics = dict(state.averages["a"].named_buffers())
    moved = [
        name
        for name, buffer in state.networks["a"].named_buffers()
        if "running_mean" in name and not torch.equal(buffer, statistics[name])
    ]
    assert moved
    assert all(float(statistics[name].abs().sum()) > 0 for name in moved)
    assert state.evaluated is state.averages


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_sum_to_the_whole(tiny: TrainConfig, batch: Batch, method: str) -> None:
    """Batch norm sees smaller batches, so the networks are compared in a form that has none: evaluation mode. With CutMix the
    partners are others, so it is left out."""
    changes = {
        "method": method,
        "ema__decay": 0.9,
        "cps__mix": "none",
        "fixmatch__mix": "none",
        "fixmatch__confidence": 0.4,
        "unimatch__mix": "none",
        "unimatch__feature_dropout": 0.0,
        "unimatch__confidence": 0.4,
    }
    whole = changed(tiny, **changes)
    grads = []
    for config in (whole, changed(whole, compute__accumulate=2)):
        state = state_of(config)
        for network in [*state.networks.values(), *state.averages.values()]:
            for module in network.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.train = lambda mode=True, m=module: m  # stays in evaluation mode
                    module.training = False
        grads.append(gradients(state))
        train_step(config, state, batch)
    for name in state.networks:
        for place, grad in grads[0][name].items():
            assert torch.allclose(grad, grads[1][name][place], rtol=1e-3, atol=1e-6), (name, place)


def test_a_network_has_moved_and_has_no_gradient_when_the_next_one_learns(full: TrainConfig, batch: Batch) -> None:
    """Its gradients would stand beside the next one's activations."""
    state = state_of(full)
    first, second = state.networks.values()
    before = [p.clone() for p in first.parameters()]
    moved: list[bool] = []

    def look(*_: object) -> None:
        if not moved:
            moved.append(any(not torch.equal(p, q) for p, q in zip(first.parameters(), before, strict=True)))
            assert all(p.grad is None for p in first.parameters())

    next(p for p in second.parameters() if p.requires_grad).register_hook(look)
    train_step(full, state, batch)
    assert moved == [True]


def test_clipping_bounds_the_gradient_of_each_network(tiny: TrainConfig, batch: Batch) -> None:
    config = changed(tiny, optim__clip_norm=0.01)
    state = state_of(config)
    given = gradients(state)
    norms = train_step(config, state, batch)
    for name in state.networks:
        norm = torch.cat([grad.flatten() for grad in given[name].values()]).norm()
        assert float(norm) == pytest.approx(0.01, rel=1e-3)
        assert float(norms[f"grad_norm_{name}"]) > 0.01


def test_norms_and_biases_are_not_decayed(tiny: TrainConfig) -> None:
    state = state_of(changed(tiny, optim__weight_decay=0.1))
    for optimizer in state.optimizers.values():
        decayed, bare = optimizer.param_groups
        assert decayed["weight_decay"] == 0.1
        assert all(p.dim() > 1 for p in decayed["params"])
        assert bare["weight_decay"] == 0.0
        assert all(p.dim() <= 1 for p in bare["params"])
        assert bare["params"]


def test_pseudo_labels_are_measured_now_and_then(full: TrainConfig, batch: Batch) -> None:
    config = changed(full, cps__confidence=0.4, cps__cutmix_boxes=1, cps__cutmix_area=(0.0, 0.0))
    config = changed(config, schedule__steps=60, schedule__eval_every=15)
    state = state_of(config)
    said = []
    with torch.no_grad():
        for network in state.networks.values():
            said.append(full_logits(copy.deepcopy(network).train())(batch.unlabeled_image).softmax(1).max(1))
    seen = train_step(config, state, batch)
    (sure_a, label_a), (sure_b, label_b) = said
    inside = ~outside(batch.unlabeled_box)
    for each in range(seen["confidence"].shape[1]):
        of_a, of_b = (sure[inside & (label == each)] for sure, label in said)
        assert float(seen["confidence"][0, each]) == pytest.approx(float(of_a.sum() + of_b.sum()), rel=1e-4)
        assert int(seen["confidence"][1, each]) == len(of_a) + len(of_b)
    label_a[sure_a < 0.4], label_b[sure_b < 0.4] = IGNORE, IGNORE
    for i in (0, 1, 2, IGNORE):
        for j in (0, 1, 2, IGNORE):
            assert int(seen["labels"][i, j]) == int(((label_a == i) & (label_b == j) & inside).sum()), (i, j)
    later = [set(train_step(config, state, batch)) for _ in range(1, 16)]
    assert OBSERVE_EVERY == 10
    for measured in ("labels", "grad_norm_b"):
        assert [step for step, names in enumerate(later, start=1) if measured in names] == [
            10,
            14,
        ]  # 14 is evaluated at 15


@pytest.mark.parametrize("method", ["mean_teacher", "fixmatch"])
def test_the_labels_of_one_network_are_counted_alone(full: TrainConfig, batch: Batch, method: str) -> None:
    config = changed(full, method=method, ema__decay=0.9)
    seen = train_step(config, state_of(config), batch)
    assert seen["labels"].shape == (256,)
    assert int(seen["labels"].sum()) == int((~outside(batch.unlabeled_box)).sum())


@pytest.mark.parametrize("autocast", ["bf16"])
def test_autocast_stays_near_full_precision(tiny: TrainConfig, batch: Batch, autocast: str) -> None:
    exact = train_step(tiny, state_of(tiny), batch)["loss"]
    rounded = train_step(changed(tiny, compute__autocast=autocast), state_of(tiny), batch)["loss"]
    assert float(rounded) == pytest.approx(float(exact), rel=0.05)
    assert rounded.dtype == torch.float32


@pytest.mark.parametrize("method", ["cps", "mean_teacher", "fixmatch", "unimatch"])
def test_without_unlabelled_images_only_supervised_can_train(tiny: TrainConfig, batch: Batch, method: str) -> None:
    config = changed(tiny, method=method, ema__decay=0.9)
    with pytest.raises(ConfigError, match="the batch is without unlabelled images"):
        train_step(config, state_of(config), Batch(batch.labeled_image, batch.labeled_mask, None))


def test_a_checkpoint_holds_every_network_and_average(tiny: TrainConfig, batch: Batch, tmp_path: Path) -> None:
    config = changed(tiny, ema__decay=0.9, model__networks=3)
    state = state_of(config)
    train_step(config, state, batch)
    write_checkpoint(tmp_path, state.snapshot(), {})
    other = state_of(changed(config, seed=1))
    other.load(read_checkpoint(tmp_path), source=tmp_path)
    assert other.step == 1
    for own, loaded in ((state.networks, other.networks), (state.averages, other.averages)):
        assert [*own] == [*loaded] == ["a", "b", "c"]
        for name in own:
            for p, q in zip(own[name].state_dict().values(), loaded[name].state_dict().values(), strict=True):
                assert torch.equal(p, q)


def test_each_network_has_a_loss_scale_of_its_own(full: TrainConfig, batch: Batch) -> None:
    """Scales of powers of two change no bit of a step; one network's overflow skips its own step and halves its own scale."""
    plain, scaled = state_of(full), state_of(full)
    for pace, name in enumerate(scaled.networks, start=1):
        scaled.scalers[name] = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=pace)
    for _ in range(2):
        train_step(full, plain, batch)
        train_step(full, scaled, batch)
    assert {name: scaler.get_scale() for name, scaler in scaled.scalers.items()} == {"a": 64.0, "b": 32.0}
    before = {name: [p.clone() for p in network.parameters()] for name, network in scaled.networks.items()}
    for name, network in plain.networks.items():
        assert all(map(torch.equal, network.parameters(), before[name]))
    next(scaled.networks["b"].parameters()).register_hook(lambda grad: grad + float("inf"))
    train_step(full, scaled, batch)
    assert {name: scaler.get_scale() for name, scaler in scaled.scalers.items()} == {"a": 128.0, "b": 16.0}
    moved = {
        name: not all(map(torch.equal, network.parameters(), before[name])) for name, network in scaled.networks.items()
    }
    assert moved == {"a": True, "b": False}
