"""The methods: what each network learns from in a step. Cross pseudo supervision, and those it is compared with.

A method is a generator that yields the losses of one network after the other. It is suspended at each `yield` while
`train_step` goes back through these losses and updates that network; only then does the next network go forward, where the
method allows it. So one network's activations are in memory at a time.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from cps_ray.config.train import NETWORK_NAMES, ComputeConfig, PseudoLabelLoss, TrainConfig
from cps_ray.engine.batch import Batch
from cps_ray.engine.dense import cross_entropy, squared_difference
from cps_ray.engine.features import Perturb, beside, complementary_dropout, dropout
from cps_ray.engine.losses import Term, class_weights_on, supervised_term
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
from cps_ray.engine.state import TrainState, autocast

# L labelled images, U unlabelled images; C classes, H W pixels, h w cells of coarse logits. A tensor's name ends in its dims.

Losses = dict[str, Tensor]
"""`loss` carries the gradient; the terms beside it are for the record, without their weights."""


def losses_of_networks(config: TrainConfig, state: TrainState, micro: MicroBatch) -> Iterator[Losses]:
    """Yields the losses of one network after the other, by `config.method`; those of masks alone until the method's `start`."""
    if config.semi_supervised and not started(getattr(config, config.method), state.step, config.schedule.steps):
        return supervised(config, state, micro)
    return METHODS[config.method](config, state, micro)


def supervised(config: TrainConfig, state: TrainState, micro: MicroBatch) -> Iterator[Losses]:
    """Trains every network on the labelled images alone. With `method: supervised` there is only network a."""
    for name, model in state.models.items():
        coarse = _forward(config.compute, model, micro.batch.labeled_image)
        mask_term = supervised_term(config.loss, coarse, micro.batch.labeled_mask, micro.valid_pixels)
        loss, _ = _sum_of_terms(coarse, [mask_term])
        yield {"loss": loss, f"sup_{name}": loss.detach()}


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
    image_U3HW, _ = _views(batch)
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
    mask_term = supervised_term(config.loss, coarse_LChw, micro.batch.labeled_mask, micro.valid_pixels)
    loss_L, terms_L = _sum_of_terms(coarse_LChw, [mask_term, *_peer_terms(config.cps, labels_L, own, weight * mean)])
    loss_U, terms_U = _sum_of_terms(coarse_UChw, _peer_terms(config.cps, labels_U, own, weight * mean))
    cross = (terms_L[1:].sum() + terms_U.sum()) * mean
    return {"loss": loss_L + loss_U, f"sup_{name}": terms_L[0] * mask_term.weight, "cps": cross}


def mean_teacher(config: TrainConfig, state: TrainState, micro: MicroBatch) -> Iterator[Losses]:
    """Trains network a to predict on strong views what its averaged self predicts on the weak ones: the squared difference of
    their probabilities (Tarvainen and Valpola, NeurIPS 2017)."""
    settings, (weak, strong) = config.mean_teacher, _views(micro.batch)
    teacher_U = _teacher_logits(config.compute, state.averages["a"], weak, batch_statistics=False)
    padding, _ = paddings(settings, micro)
    if micro.observe:
        count_labels(micro, [pseudo_labels(micro, teacher_U, padding)], padding)
    counted = counted_pixels(settings, padding)
    coarse_L, coarse_U = _student_logits(config, state.models["a"], micro.batch, strong)
    mask_term = supervised_term(config.loss, coarse_L, micro.batch.labeled_mask, micro.valid_pixels)
    loss_L, terms = _sum_of_terms(coarse_L, [mask_term])
    mean = mean_over_pixels(settings, state, padding) / coarse_U.shape[1]
    weight = ramped_weight(settings, state.step, config.schedule.steps)
    loss_U, difference = squared_difference(coarse_U, teacher_U, counted, weight * mean)
    yield {"loss": loss_L + loss_U, "sup_a": terms[0] * mask_term.weight, "consistency": difference[0] * mean}


def fixmatch(config: TrainConfig, state: TrainState, micro: MicroBatch) -> Iterator[Losses]:
    """Trains network a on its own sure labels of weak views, applied to strong ones that CutMix has mixed (Sohn et al., NeurIPS
    2020; for segmentation as in Yang et al., CVPR 2023)."""
    settings, model, weak = config.fixmatch, state.models["a"], _views(micro.batch)[0]
    # Evaluation mode: with batch statistics of the weak views the labels of one image would depend on the others.
    teacher = (state.averages if settings.teacher == "average" else state.networks)["a"]
    teacher_U = _teacher_logits(config.compute, teacher, weak, batch_statistics=False)
    padding, _ = paddings(settings, micro)
    labels = [sure_labels(settings, state.ranks, micro, teacher_U, padding)]
    count_labels(micro, labels, padding)  # before mixing: coverage is of whole images
    labels = without_padding(settings, labels, padding)
    views = [weak] if settings.view == "weak" else _strong_views(micro.batch)[: settings.strong_views]
    seen = mixed_views(settings, config.seed, state, micro, views, labels, padding)
    coarse_L, coarse_U = _student_logits(config, model, micro.batch, torch.cat([image for image, _, _ in seen]))
    dropped_U = (
        _forward(config.compute, model, weak, dropout(settings.feature_dropout)) if settings.feature_dropout else None
    )
    yield _consistency_losses(
        config, settings, state, micro, coarse_L, coarse_U, seen, dropped_U, (weak, labels, padding)
    )


def unimatch(config: TrainConfig, state: TrainState, micro: MicroBatch) -> Iterator[Losses]:
    """Trains network a on sure labels of weak views, applied to two strong ones and to perturbed features, in the form of the
    authors' code (UniMatch: Yang et al., CVPR 2023; V2: TPAMI 2025).

    L = (L_sup + weight L_u) / 2. v1: L_u = (mean of the strong views + dropped features) / 2; v2: the mean of the strong views.
    """
    settings, weak, v2 = config.unimatch, _views(micro.batch)[0], config.unimatch.version == "v2"
    coarse_L, teachers_U, dropped_U = _unimatch_weak_pass(config, state, micro)
    padding, _ = paddings(settings, micro)
    labels = [sure_labels(settings, state.ranks, micro, teacher_U, padding) for teacher_U in teachers_U]
    own, pasted = without_padding(settings, [labels[0]], padding), without_padding(settings, [labels[-1]], padding)
    count_labels(micro, labels[:1], padding)
    seen = mixed_views(settings, config.seed, state, micro, _strong_views(micro.batch), own, padding, pasted)
    perturb = complementary_dropout(settings.feature_dropout) if v2 else None
    coarse_U = _forward(config.compute, state.models["a"], torch.cat([image for image, _, _ in seen]), perturb)
    losses = _consistency_losses(
        config, settings, state, micro, coarse_L, coarse_U, seen, dropped_U, (weak, own, padding)
    )
    yield {**losses, "loss": losses["loss"] / 2.0}


def _unimatch_weak_pass(
    config: TrainConfig, state: TrainState, micro: MicroBatch
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Coarse logits of the labelled images; those, without gradient, that label a weak view where it stays itself and, if they are
    others, where it is pasted into another image; with v1, those of its dropped features."""
    compute, model, labeled, weak = config.compute, state.models["a"], micro.batch.labeled_image, _views(micro.batch)[0]
    v2 = config.unimatch.version == "v2"
    teacher = (state.averages if v2 else state.networks)["a"]
    teacher_U = _teacher_logits(compute, teacher, weak, batch_statistics=False)
    if v2:
        return _forward(compute, model, labeled), [teacher_U], None
    # Where it stays itself, the pass that learns labels an image, hence batch statistics: so does the authors' code.
    perturb = beside(dropout(config.unimatch.feature_dropout))
    coarse = _forward(compute, model, torch.cat([labeled, weak]), perturb)
    coarse_L, coarse_U, _, dropped_U = torch.split(coarse, [len(labeled), len(weak)] * 2)
    return coarse_L, [coarse_U.detach(), teacher_U], dropped_U


METHODS: dict[str, Callable[[TrainConfig, TrainState, MicroBatch], Iterator[Losses]]] = {
    "supervised": supervised,
    "cps": cps,
    "mean_teacher": mean_teacher,
    "fixmatch": fixmatch,
    "unimatch": unimatch,
}


# ---------------------------------------------------------------------------------------------------- shared parts


def _views(batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the unlabelled images as they come, and their second view if there is one, else the same: (U, 3, H, W) each."""
    image = batch.unlabeled_image
    if image is None:
        raise ValueError("every method but `supervised` needs `unlabeled_image` in its batches.")
    return image, image if batch.unlabeled_second is None else batch.unlabeled_second


def _strong_views(batch: Batch) -> list[Tensor]:
    """Returns two strong views of the unlabelled images, (U, 3, H, W) each; where there is but one, twice the same."""
    second = _views(batch)[1]
    return [second, second if batch.unlabeled_third is None else batch.unlabeled_third]


def _forward(compute: ComputeConfig, model: nn.Module, image_B3HW: Tensor, perturb: Perturb | None = None) -> Tensor:
    """Coarse logits (B, C, h, w), with gradient. `perturb` changes the features that the decoder sees, and may change B."""
    with autocast(compute.autocast, image_B3HW.device):
        coarse: Tensor = model(image_B3HW) if perturb is None else model(image_B3HW, perturb=perturb)
    return coarse


def _student_logits(config: TrainConfig, model: nn.Module, batch: Batch, image_U3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Coarse logits of the labelled and of these unlabelled images: in one pass, or in the order of the paper's code."""
    labeled = batch.labeled_image.shape[0]
    if config.method != "cps" or config.cps.forwards == "joint":
        coarse = _forward(config.compute, model, torch.cat([batch.labeled_image, image_U3HW]))
        return coarse[:labeled], coarse[labeled:]
    # Two passes update batch norm's running statistics twice, and the kind that comes last weighs most in them. The
    # paper's code has the unlabelled images first with CutMix, and last without.
    if config.cps.mix != "none":
        coarse_U = _forward(config.compute, model, image_U3HW)
        return _forward(config.compute, model, batch.labeled_image), coarse_U
    return _forward(config.compute, model, batch.labeled_image), _forward(config.compute, model, image_U3HW)


@torch.no_grad()
def _teacher_logits(
    compute: ComputeConfig, network: nn.Module, image_U3HW: Tensor, *, batch_statistics: bool
) -> Tensor:
    """Coarse logits (U, C, h, w) of a network that does not learn from this pass.

    `batch_statistics`: whether its norms take those of the batch, and update their running ones, as in training.
    """
    mode = network.training
    network.train(batch_statistics)
    coarse = _forward(compute, network, image_U3HW)
    network.train(mode)
    return coarse


def _sum_of_terms(coarse_BChw: Tensor, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """Returns the weighted sum of cross-entropies, with gradient, and each of them (K,) without weight or gradient."""
    return cross_entropy(coarse_BChw, *map(list, zip(*terms, strict=True)))


def _consistency_losses(
    config: TrainConfig,
    settings: PseudoLabelLoss,
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
    mask_term = supervised_term(config.loss, coarse_LChw, micro.batch.labeled_mask, micro.valid_pixels)
    loss, terms = _sum_of_terms(coarse_LChw, [mask_term])
    losses = {"sup_a": terms[0] * mask_term.weight}
    weight = ramped_weight(settings, state.step, config.schedule.steps)
    parts = [("pseudo", coarse_UChw, seen, weight)]
    if dropped_UChw is not None:
        parts = [("pseudo", coarse_UChw, seen, weight / 2.0), ("pseudo_dropped", dropped_UChw, [weak], weight / 2.0)]
    for name, coarse_BChw, views, part_weight in parts:
        for coarse_UChw, (_, labels, padding) in zip(coarse_BChw.chunk(len(views)), views, strict=True):
            mean = mean_over_pixels(settings, state, padding) / len(views)
            more, terms = _sum_of_terms(coarse_UChw, _peer_terms(settings, labels, None, part_weight * mean))
            loss, losses[name] = loss + more, losses.get(name, 0.0) + terms[0] * mean
    return {"loss": loss, **losses}


def _peer_terms(
    settings: PseudoLabelLoss, labels: Sequence[Tensor], own: int | None, weight: Tensor | float
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
    weak, second = _views(batch)
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
        coarse = [_teacher_logits(config.compute, teacher, each, batch_statistics=batch_statistics) for each in passes]
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
