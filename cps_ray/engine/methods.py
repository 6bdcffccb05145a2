"""The methods: what each network learns from in a step. Cross pseudo supervision, and those it is compared with.

A method is a generator that yields the losses of one network after the other. It is suspended at each `yield` while
`train_step` goes back through these losses and updates that network; only then does the next network go forward, where the
method allows it. So one network's activations are in memory at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cps_ray.config.train import NETWORK_NAMES, PseudoLabelConfig, TrainConfig
from cps_ray.engine.batch import Batch
from cps_ray.engine.dense import squared_difference
from cps_ray.engine.features import beside, complementary_dropout, dropout
from cps_ray.engine.losses import Term, class_weights_on, loss_on_masks, sum_of_terms
from cps_ray.engine.passes import forward, second_view, strong_views, student_logits, teacher_logits, weak_view
from cps_ray.engine.pseudo_labels import (
    MicroBatch,
    Seen,
    count_labels,
    counted_pixels,
    mean_over_pixels,
    mix_with_labels,
    mixed_views,
    padding_of_view,
    paddings,
    pseudo_labels,
    sure_labels,
    with_labels,
    without_padding,
)
from cps_ray.engine.schedules import ramped_weight, started
from cps_ray.engine.state import TrainState
from cps_ray.errors import ConfigError

# L labelled images, U unlabelled images; C classes, H W pixels, h w cells of coarse logits. A tensor's name ends in its dims.

Losses = dict[str, Tensor]
"""`loss` carries the gradient; the terms beside it are for the record, without their weights."""


def losses_of_networks(config: TrainConfig, state: TrainState, micro: MicroBatch) -> Iterator[Losses]:
    """Yields the losses of one network after the other, by `config.method`; those of masks alone until the method's `start`."""
    settings = config.settings
    if settings is not None and not started(settings, state.step, config.schedule.steps):
        return supervised_only(config, state, micro)
    if config.method in METHODS:
        return METHODS[config.method](config, state, micro)
    return _as_promised(config.method, settings.losses(config, state, micro), len(state.networks))  # type: ignore[union-attr]


def _as_promised(name: str, losses: Any, networks: int) -> Iterator[Losses]:
    """Passes on what a method of one's own yields. Raises ConfigError where it is not what `train_step` needs."""
    promise = "A method yields, for each network in turn, a dict of scalar tensors, of which `loss` has a gradient."
    number = 0
    if not isinstance(losses, Iterator):
        raise ConfigError(f"method: {name}.losses must yield, but returned {type(losses).__name__}. {promise}")
    for number, each in enumerate(losses, 1):
        scalars = isinstance(each, dict) and all(
            isinstance(value, Tensor) and not value.dim() for value in each.values()
        )
        if number > networks or not scalars or "loss" not in each or not each["loss"].requires_grad:
            found = f"{[*each]}" if scalars else "something else"
            raise ConfigError(f"method: {name}.losses yielded {found} at {number} of {networks} networks. {promise}")
        yield each
    if number < networks:
        raise ConfigError(f"method: {name}.losses yielded {number} times for {networks} networks. {promise}")


def supervised_only(config: TrainConfig, state: TrainState, micro: MicroBatch) -> Iterator[Losses]:
    """Trains every network on the labelled images alone. With `method: supervised` there is only network a."""
    for name, model in state.models.items():
        coarse = forward(config.compute, model, micro.batch.labeled_image)
        loss, supervised, _ = loss_on_masks(config.loss, coarse, micro.batch.labeled_mask, micro.valid_pixels)
        yield {"loss": loss, f"sup_{name}": supervised}


def cps(config: TrainConfig, state: TrainState, micro: MicroBatch) -> Iterator[Losses]:
    """Trains each network on the masks and on the hard labels of all others (Chen et al., CVPR 2021, eq. 1-4; more than two
    networks: Filipiak et al. 2021).
    """
    return (_cps_by_teachers if config.cps.teachers_pass_apart else _cps_plain)(config, state, micro)


def _cps_plain(config: TrainConfig, state: TrainState, micro: MicroBatch) -> Iterator[Losses]:
    """Trains on unmixed images (eq. 1 to 4 of the paper): teacher and student are the same pass.

    L_cps(unlabelled) = CE(P1, Y2) + CE(P2, Y1), where Y is the arg-max of P; `images: all` adds the same on labelled images.
    """
    settings, batch = config.cps, micro.batch
    image_U3HW = weak_view(batch)
    everywhere = settings.images == "all"
    # Y1 and Y2 must both exist before either loss: all networks go forward first, and all activations are held at once.
    students = {name: _student_logits(config, model, batch, image_U3HW) for name, model in state.models.items()}
    # One tensor for both kinds of images: labels are then computed, counted and exchanged once.
    own = [torch.cat([coarse_U, coarse_L if everywhere else coarse_L[:0]]) for coarse_L, coarse_U in students.values()]
    padding_U, padding_L = paddings(settings, micro, everywhere)
    padding = torch.cat([padding_U, padding_L])
    labels = state.ranks.exchange(
        [sure_labels(settings, state.ranks, micro, coarse.detach(), padding) for coarse in own]
    )
    del own  # else these copies of the logits outlive the backward passes below
    labels_U = [label[: len(image_U3HW)] for label in labels]
    labels_L = [label[len(image_U3HW) :] for label in labels] if everywhere else []
    count_labels(micro, labels_U, padding_U)
    mean = mean_over_pixels(settings, state, padding)
    labels_U, labels_L = without_padding(settings, labels_U, padding_U), without_padding(settings, labels_L, padding_L)
    for name in state.models:
        yield _cps_losses(config, state, micro, name, *students.pop(name), labels_L, labels_U, mean)


def _cps_by_teachers(config: TrainConfig, state: TrainState, micro: MicroBatch) -> Iterator[Losses]:
    """Trains on images other than those that are labelled, or on labels of other weights: teachers label the clean images in a
    pass of their own. With CutMix images and labels are then mixed alike (the paper's CPS with CutMix).

    L_cps(unlabelled) = CE(P1(mix(u, u')), mix(Y2(u), Y2(u'))) + the same with 1 and 2 exchanged.
    """
    settings, batch = config.cps, micro.batch
    image_U3HW, labels_U, padding_U = _labeled_by_teachers(config, state, micro)
    students: dict[str, tuple[Tensor, Tensor]] = {}
    labels_L: list[Tensor] = []
    everywhere = settings.images == "all"
    _, padding_L = paddings(settings, micro, everywhere)
    if everywhere:
        # Labelled images are not mixed, so no teacher has seen them: there the students' own pass gives the labels, as without CutMix.
        students = {name: _student_logits(config, model, batch, image_U3HW) for name, model in state.models.items()}
        own = [
            sure_labels(settings, state.ranks, micro, coarse_L.detach(), padding_L) for coarse_L, _ in students.values()
        ]
        labels_L = without_padding(settings, state.ranks.exchange(own), padding_L)
    mean = mean_over_pixels(settings, state, torch.cat([padding_U, padding_L]))
    for name, model in state.models.items():
        # All targets are known by now: a network goes forward only when the one before it has gone back and was updated.
        logits = students.pop(name) if students else _student_logits(config, model, batch, image_U3HW)
        yield _cps_losses(config, state, micro, name, *logits, labels_L, labels_U, mean)


def _cps_losses(
    config: TrainConfig,
    state: TrainState,
    micro: MicroBatch,
    name: str,
    coarse_LChw: Tensor,
    coarse_UChw: Tensor,
    labels_L: Sequence[Tensor],
    labels_U: Sequence[Tensor],
    mean: Tensor | float,
) -> Losses:
    """Losses of one network: L_sup + weight * L_cps, its own labels left out. `labels_L` is empty with `images: unlabeled`."""
    own = NETWORK_NAMES.index(name)
    mean = mean / (len(labels_U) - 1)
    weight = ramped_weight(config.cps, state.step, config.schedule.steps)
    loss_L, supervised, terms_L = loss_on_masks(
        config.loss,
        coarse_LChw,
        micro.batch.labeled_mask,
        micro.valid_pixels,
        _peer_terms(config.cps, labels_L, own, weight * mean),
    )
    loss_U, terms_U = sum_of_terms(coarse_UChw, _peer_terms(config.cps, labels_U, own, weight * mean))
    cross = (terms_L.sum() + terms_U.sum()) * mean
    return {"loss": loss_L + loss_U, f"sup_{name}": supervised, "cps": cross}


def mean_teacher(config: TrainConfig, state: TrainState, micro: MicroBatch) -> Iterator[Losses]:
    """Trains network a to predict on strong views what its averaged self predicts on the weak ones: the squared difference of
    their probabilities (Tarvainen and Valpola, NeurIPS 2017)."""
    settings, weak, strong = config.mean_teacher, weak_view(micro.batch), second_view(micro.batch)
    teacher_U = teacher_logits(config.compute, state.averages["a"], weak)
    padding, _ = paddings(settings, micro)
    if micro.observe:
        count_labels(micro, [pseudo_labels(micro, teacher_U, padding)], padding)
    counted = counted_pixels(settings, padding)
    coarse_L, coarse_U = student_logits(config.compute, state.models["a"], micro.batch, strong)
    loss_L, supervised, _ = loss_on_masks(config.loss, coarse_L, micro.batch.labeled_mask, micro.valid_pixels)
    mean = mean_over_pixels(settings, state, padding) / coarse_U.shape[1]
    weight = ramped_weight(settings, state.step, config.schedule.steps)
    loss_U, difference = squared_difference(coarse_U, teacher_U, counted, weight * mean)
    yield {"loss": loss_L + loss_U, "sup_a": supervised, "consistency": difference[0] * mean}


def fixmatch(config: TrainConfig, state: TrainState, micro: MicroBatch) -> Iterator[Losses]:
    """Trains network a on its own sure labels of weak views, applied to strong ones that CutMix has mixed (Sohn et al., NeurIPS
    2020; for segmentation as in Yang et al., CVPR 2023)."""
    settings, model, weak = config.fixmatch, state.models["a"], weak_view(micro.batch)
    # Evaluation mode: with batch statistics of the weak views the labels of one image would depend on the others.
    teacher = (state.averages if settings.teacher == "average" else state.networks)["a"]
    teacher_U = teacher_logits(config.compute, teacher, weak)
    label, padding = label_images(settings, state, micro, teacher_U)
    labels = [label]
    views = [weak] if settings.view == "weak" else strong_views(micro.batch, settings.strong_views)
    seen = mixed_views(settings, config.seed, state, micro, views, labels, padding)
    coarse_L, coarse_U = student_logits(config.compute, model, micro.batch, torch.cat([image for image, _, _ in seen]))
    dropped_U = (
        forward(config.compute, model, weak, dropout(settings.feature_dropout)) if settings.feature_dropout else None
    )
    yield _consistency_losses(
        config, settings, state, micro, coarse_L, coarse_U, seen, dropped_U, (weak, labels, padding)
    )


def unimatch(config: TrainConfig, state: TrainState, micro: MicroBatch) -> Iterator[Losses]:
    """Trains network a on sure labels of weak views, applied to two strong ones and to perturbed features, in the form of the
    authors' code (UniMatch: Yang et al., CVPR 2023; V2: TPAMI 2025).

    L = (L_sup + weight L_u) / 2. v1: L_u = (mean of the strong views + dropped features) / 2; v2: the mean of the strong views.
    """
    settings, weak, v2 = config.unimatch, weak_view(micro.batch), config.unimatch.version == "v2"
    coarse_L, teachers_U, dropped_U = _unimatch_weak_pass(config, state, micro)
    padding, _ = paddings(settings, micro)
    labels = [sure_labels(settings, state.ranks, micro, teacher_U, padding) for teacher_U in teachers_U]
    own, pasted = without_padding(settings, [labels[0]], padding), without_padding(settings, [labels[-1]], padding)
    count_labels(micro, labels[:1], padding)
    seen = mixed_views(settings, config.seed, state, micro, strong_views(micro.batch), own, padding, pasted)
    perturb = complementary_dropout(settings.feature_dropout) if v2 else None
    coarse_U = forward(config.compute, state.models["a"], torch.cat([image for image, _, _ in seen]), perturb)
    losses = _consistency_losses(
        config, settings, state, micro, coarse_L, coarse_U, seen, dropped_U, (weak, own, padding)
    )
    yield {**losses, "loss": losses["loss"] / 2.0}


def _unimatch_weak_pass(
    config: TrainConfig, state: TrainState, micro: MicroBatch
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Coarse logits of the labelled images; those, without gradient, that label a weak view where it stays itself and, if they are
    others, where it is pasted into another image; with v1, those of its dropped features."""
    compute, model, labeled, weak = config.compute, state.models["a"], micro.batch.labeled_image, weak_view(micro.batch)
    v2 = config.unimatch.version == "v2"
    teacher = (state.averages if v2 else state.networks)["a"]
    teacher_U = teacher_logits(compute, teacher, weak)
    if v2:
        return forward(compute, model, labeled), [teacher_U], None
    # Where it stays itself, the pass that learns labels an image, hence batch statistics: so does the authors' code.
    perturb = beside(dropout(config.unimatch.feature_dropout))
    coarse = forward(compute, model, torch.cat([labeled, weak]), perturb)
    coarse_L, coarse_U, _, dropped_U = torch.split(coarse, [len(labeled), len(weak)] * 2)
    return coarse_L, [coarse_U.detach(), teacher_U], dropped_U


METHODS: dict[str, Callable[[TrainConfig, TrainState, MicroBatch], Iterator[Losses]]] = {
    "supervised": supervised_only,
    "cps": cps,
    "mean_teacher": mean_teacher,
    "fixmatch": fixmatch,
    "unimatch": unimatch,
}


# ---------------------------------------------------------------------------------------------------- shared parts


def _student_logits(config: TrainConfig, model: nn.Module, batch: Batch, image_U3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Coarse logits of the labelled and of these unlabelled images, by `cps.forwards`."""
    compute = config.compute
    if config.cps.forwards == "joint":
        return student_logits(compute, model, batch, image_U3HW)
    # Two passes update batch norm's running statistics twice, and the kind that comes last weighs most in them. The
    # paper's code has the unlabelled images first with CutMix, and last without.
    if config.cps.mix != "none":
        coarse_U = forward(compute, model, image_U3HW)
        return forward(compute, model, batch.labeled_image), coarse_U
    return forward(compute, model, batch.labeled_image), forward(compute, model, image_U3HW)


def _consistency_losses(
    config: TrainConfig,
    settings: PseudoLabelConfig,
    state: TrainState,
    micro: MicroBatch,
    coarse_LChw: Tensor,
    coarse_UChw: Tensor,
    seen: Sequence[Seen],
    dropped_UChw: Tensor | None,
    weak: Seen,
) -> Losses:
    """Losses of network a: L_sup + weight * L_u, where L_u is the mean over the views `seen`, whose logits stand one behind the other in
    `coarse_UChw`; with `dropped_UChw`, of features of the `weak` view, half of that and half of theirs."""
    loss, supervised, _ = loss_on_masks(config.loss, coarse_LChw, micro.batch.labeled_mask, micro.valid_pixels)
    losses = {"sup_a": supervised}
    parts = [("pseudo", coarse_UChw, seen, 1.0)]
    if dropped_UChw is not None:
        parts = [("pseudo", coarse_UChw, seen, 0.5), ("pseudo_dropped", dropped_UChw, [weak], 0.5)]
    for name, coarse_BChw, views, fraction in parts:
        for coarse_UChw, (_, (label,), padding) in zip(coarse_BChw.chunk(len(views)), views, strict=True):
            more, mean = loss_on_labels(config, settings, state, coarse_UChw, label, padding, fraction / len(views))
            loss, losses[name] = loss + more, losses.get(name, 0.0) + mean / len(views)
    return {"loss": loss, **losses}


def label_images(
    settings: PseudoLabelConfig, state: TrainState, micro: MicroBatch, teacher_UChw: Tensor
) -> tuple[Tensor, Tensor]:
    """Makes pseudo labels of a network's coarse logits for the unlabelled images, and measures them.

    Returns the labels, uint8 (U, H, W), IGNORE where they are not sure enough or are not to count, and where the images are padding,
    bool (U, H, W).
    """
    padding, _ = paddings(settings, micro)
    labels = [sure_labels(settings, state.ranks, micro, teacher_UChw, padding)]
    count_labels(micro, labels, padding)  # before any mixing: coverage is of whole images
    return without_padding(settings, labels, padding)[0], padding


def loss_on_labels(
    config: TrainConfig,
    settings: PseudoLabelConfig,
    state: TrainState,
    coarse_UChw: Tensor,
    label_UHW: Tensor,
    padding_UHW: Tensor,
    fraction: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns `fraction` of the method's weight of this step times the cross-entropy on pseudo labels, with gradient; and the mean
    cross-entropy itself, without."""
    weight = fraction * ramped_weight(settings, state.step, config.schedule.steps)
    mean = mean_over_pixels(settings, state, padding_UHW)
    loss, terms = sum_of_terms(coarse_UChw, _peer_terms(settings, [label_UHW], None, weight * mean))
    return loss, terms[0] * mean


def _peer_terms(
    settings: PseudoLabelConfig, labels: Sequence[Tensor], own: int | None, weight: Tensor | float
) -> list[Term]:
    """Terms of the labels (B, H, W) of all networks but `own`."""
    return [
        Term(label, weight, class_weights_on(label.device, settings.class_weights))
        for number, label in enumerate(labels)
        if number != own
    ]


def _labeled_by_teachers(
    config: TrainConfig, state: TrainState, micro: MicroBatch
) -> tuple[Tensor, list[Tensor], Tensor]:
    """What the students see of the unlabelled images (U, 3, H, W), the labels of each network for it, uint8 (U, H, W) each, and where
    it is padding, bool (U, H, W). Mixed, if `mix` says so.

    The partner is another image, the successor in the global batch, or another view of the same one.
    """
    settings, batch = config.cps, micro.batch
    weak = weak_view(batch)
    second = second_view(batch) if len(settings.views) > 1 else weak
    # A successor is labelled as an image of the batch anyhow: only another view needs labels of its own.
    apart = settings.pastes_other_view
    views = [weak, second] if apart else [weak]
    passes = views if settings.forwards == "separate" else [torch.cat(views)]
    paddings = [padding_of_view(settings, micro, weak, batch.unlabeled_box)]
    if apart:
        paddings.append(padding_of_view(settings, micro, second, batch.second_box))
    by_average = settings.teacher == "average"
    batch_statistics = settings.teacher_bn == "train" and not by_average
    own = []
    # `networks` and not `models`: DDP's wrapper would wait for a backward pass.
    for teacher in (state.averages if by_average else state.networks).values():
        coarse = [teacher_logits(config.compute, teacher, each, batch_statistics=batch_statistics) for each in passes]
        own.append(sure_labels(settings, state.ranks, micro, torch.cat(coarse), torch.cat(paddings)))
    labels = [torch.chunk(each, len(views)) for each in state.ranks.exchange(own)]  # by network, then by view
    by_view = [
        without_padding(settings, of_view, padding)
        for of_view, padding in zip(zip(*labels, strict=True), paddings, strict=True)
    ]
    seen = [second if settings.student == "strong" else weak, *views[1:]]
    if settings.mix == "none":
        image, labels_U, padding = seen[0], by_view[0], paddings[0]
    else:
        image, labels_U, padding = mix_with_labels(
            settings, config.seed, state, micro, *map(with_labels, seen, by_view, paddings)
        )
    count_labels(micro, labels_U, padding)
    return image, labels_U, padding
