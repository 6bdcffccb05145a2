"""The methods: what each network learns from in a step. Cross pseudo supervision, and those it is compared with.

A method yields its losses network by network, and the step goes back through each before the next one is computed: so where
targets are known beforehand, one network's activations are in memory at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cps_ray.config.train import NETWORK_NAMES, MixConfig, TrainConfig
from cps_ray.engine.batch import Batch
from cps_ray.engine.dense import cross_entropy, hard_labels, mean_confidence, squared_difference
from cps_ray.engine.losses import Term, supervised_term
from cps_ray.engine.mixing import cutmix_masks, paste
from cps_ray.engine.schedules import ramped_weight
from cps_ray.engine.state import TrainState, autocast

# L labelled images, U unlabelled images; C classes, H W pixels, h w cells of coarse logits. A tensor's name ends in its dims.

Losses = dict[str, Tensor]
"""`loss` carries the gradient; the terms beside it are for the record, without their weights."""


@dataclass(frozen=True, slots=True)
class Micro:
    """A micro-batch, and what its losses need to know of the whole."""

    batch: Batch
    part: int
    """Number of the micro-batch in its step."""
    valid: Tensor
    """Labelled pixels of the global batch, divided by the number of its parts: scalar."""
    observe: bool
    """Whether pseudo labels are to be measured in this step."""
    confidences: list[Tensor] = field(default_factory=list)
    seen: dict[str, Tensor] = field(default_factory=dict)
    """What was measured: `confidence`, mean over pixels; `labels`, float64 (256, 256), pixels by the labels of networks a and b."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the crops."""
        return self.batch.labeled_mask.shape[-2], self.batch.labeled_mask.shape[-1]


def supervised(config: TrainConfig, state: TrainState, micro: Micro) -> Iterator[Losses]:
    """Network a alone on the labelled images."""
    coarse = _forward(config, state, state.models["a"], micro.batch.labeled_image)
    loss, _ = _learn(coarse, [supervised_term(config.loss, coarse, micro.batch.labeled_mask, micro.valid)])
    yield {"loss": loss, "sup_a": loss.detach()}


def cps(config: TrainConfig, state: TrainState, micro: Micro) -> Iterator[Losses]:
    """Each network learns from the masks and from the hard labels of all others (Chen et al., CVPR 2021, eq. 1-4; more than
    two networks: Filipiak et al. 2021).

    With CutMix labels are predicted on the clean images by a pass of their own, then images and labels are mixed alike;
    without it they are what the networks say in the pass in which they learn.
    """
    settings, batch = config.cps, micro.batch
    image, labels_U = _views(batch)[0], None
    if settings.mix == "cutmix":
        image, labels_U = _taught(config, state, micro)
    students: dict[str, tuple[Tensor, Tensor]] = {}
    labels_L: list[Tensor] | None = None
    if labels_U is None or settings.on == "all":  # all networks must have spoken before any can learn
        students = {name: _student(config, state, model, batch, image) for name, model in state.models.items()}
        unlabeled = 0 if labels_U is not None else image.shape[0]
        spoken = [
            (coarse_U[:unlabeled], coarse_L if settings.on == "all" else coarse_L[:0])
            for coarse_L, coarse_U in students.values()
        ]
        said = state.ranks.exchange([_labels(micro, torch.cat(each).detach(), settings.confidence) for each in spoken])
        labels_U = [label[:unlabeled] for label in said] if labels_U is None else labels_U
        labels_L = [label[unlabeled:] for label in said] if settings.on == "all" else None
    assert labels_U is not None
    _count(micro, labels_U)

    # The mean is over all pixels; an unsure (IGNORE) pixel counts as zero loss, as in FixMatch. So the divisor is the same on
    # every rank and micro-batch, and the loss does not depend on how a batch is split.
    pixels = labels_U[0].numel() + (labels_L[0].numel() if labels_L else 0)
    part = 1.0 / (pixels * (len(labels_U) - 1))
    weight = ramped_weight(settings, state.step, config.schedule.steps)
    for name, model in state.models.items():
        coarse_L, coarse_U = students.pop(name) if students else _student(config, state, model, batch, image)
        own = NETWORK_NAMES.index(name)
        supervision = supervised_term(config.loss, coarse_L, batch.labeled_mask, micro.valid)
        loss_L, terms_L = _learn(coarse_L, [supervision, *_peers(labels_L or [], own, weight * part)])
        loss_U, terms_U = _learn(coarse_U, _peers(labels_U, own, weight * part))
        cross = (terms_L[1:].sum() + terms_U.sum()) * part
        yield {"loss": loss_L + loss_U, f"sup_{name}": terms_L[0] * supervision[1], "cps": cross}


def mean_teacher(config: TrainConfig, state: TrainState, micro: Micro) -> Iterator[Losses]:
    """Network a learns to say of strong views what its averaged self says of the weak ones: the squared difference of their
    probabilities (Tarvainen and Valpola, NeurIPS 2017)."""
    weak, strong = _views(micro.batch)
    teacher_U = _look(config, state, state.averages["a"], weak, batch_statistics=False)
    if micro.observe:
        _count(micro, [_labels(micro, teacher_U)])
    coarse_L, coarse_U = _student(config, state, state.models["a"], micro.batch, strong)
    supervision = supervised_term(config.loss, coarse_L, micro.batch.labeled_mask, micro.valid)
    loss_L, terms = _learn(coarse_L, [supervision])
    part = 1.0 / (weak.shape[0] * micro.size[0] * micro.size[1] * coarse_U.shape[1])
    weight = ramped_weight(config.mean_teacher, state.step, config.schedule.steps)
    loss_U, apart = squared_difference(coarse_U, teacher_U, micro.size, weight * part)
    yield {"loss": loss_L + loss_U, "sup_a": terms[0] * supervision[1], "consistency": apart[0] * part}


def fixmatch(config: TrainConfig, state: TrainState, micro: Micro) -> Iterator[Losses]:
    """Network a learns its own sure labels of weak views on strong ones, mixed by CutMix (Sohn et al., NeurIPS 2020; for
    segmentation as in Yang et al., CVPR 2023)."""
    settings, (weak, strong) = config.fixmatch, _views(micro.batch)
    coarse = _look(config, state, state.networks["a"], weak, batch_statistics=False)
    labels = [_labels(micro, coarse, settings.confidence)]
    _count(micro, labels)
    if settings.mix == "cutmix":
        strong, labels = _mix(settings, config, state, micro, _bundle(strong, labels))
    coarse_L, coarse_U = _student(config, state, state.models["a"], micro.batch, strong)
    supervision = supervised_term(config.loss, coarse_L, micro.batch.labeled_mask, micro.valid)
    loss_L, terms_L = _learn(coarse_L, [supervision])
    part = 1.0 / labels[0].numel()
    weight = ramped_weight(settings, state.step, config.schedule.steps)
    loss_U, terms_U = _learn(coarse_U, [(labels[0], weight * part)])
    yield {"loss": loss_L + loss_U, "sup_a": terms_L[0] * supervision[1], "pseudo": terms_U[0] * part}


METHODS: dict[str, Callable[[TrainConfig, TrainState, Micro], Iterator[Losses]]] = {
    "supervised": supervised,
    "cps": cps,
    "mean_teacher": mean_teacher,
    "fixmatch": fixmatch,
}


# ---------------------------------------------------------------------------------------------------- shared parts


def _views(batch: Batch) -> tuple[Tensor, Tensor]:
    """The unlabelled images as they come, and their second view (U, 3, H, W) if there is one."""
    image = batch.unlabeled_image
    if image is None:
        raise ValueError("every method but `supervised` needs `unlabeled_image` in its batches.")
    return image, image if batch.unlabeled_second is None else batch.unlabeled_second


def _forward(config: TrainConfig, state: TrainState, model: nn.Module, image_B3HW: Tensor) -> Tensor:
    """Coarse logits (B, C, h, w), with gradient."""
    with autocast(config, state.ranks.device):
        coarse: Tensor = model(image_B3HW)
    return coarse


def _student(
    config: TrainConfig, state: TrainState, model: nn.Module, batch: Batch, image_U3HW: Tensor
) -> tuple[Tensor, Tensor]:
    """Coarse logits of the labelled and of these unlabelled images: in one pass, or in the order of the paper's code."""
    labeled = batch.labeled_image.shape[0]
    if config.method != "cps" or config.cps.forwards == "joint":
        coarse = _forward(config, state, model, torch.cat([batch.labeled_image, image_U3HW]))
        return coarse[:labeled], coarse[labeled:]
    # Which kind comes last weighs most in batch norm's running statistics.
    if config.cps.mix == "cutmix":
        coarse_U = _forward(config, state, model, image_U3HW)
        return _forward(config, state, model, batch.labeled_image), coarse_U
    return _forward(config, state, model, batch.labeled_image), _forward(config, state, model, image_U3HW)


@torch.no_grad()
def _look(
    config: TrainConfig, state: TrainState, network: nn.Module, image_U3HW: Tensor, *, batch_statistics: bool
) -> Tensor:
    """Coarse logits (U, C, h, w) of a network that is not to learn from them."""
    mode = network.training
    network.train(batch_statistics)
    coarse = _forward(config, state, network, image_U3HW)
    network.train(mode)
    return coarse


def _learn(coarse_BChw: Tensor, terms: list[Term]) -> tuple[Tensor, Tensor]:
    return cross_entropy(coarse_BChw, [target for target, _ in terms], [weight for _, weight in terms])


def _peers(labels: list[Tensor], own: int, weight: float) -> list[Term]:
    return [(label, weight) for number, label in enumerate(labels) if number != own]


def _labels(micro: Micro, coarse_BChw: Tensor, confidence: float = 0.0) -> Tensor:
    """Hard labels: uint8 (B, H, W). They carry no gradient."""
    if micro.observe:
        micro.confidences.append(mean_confidence(coarse_BChw, micro.size))
        micro.seen["confidence"] = torch.stack(micro.confidences).mean()
    return hard_labels(coarse_BChw, micro.size, confidence)


def _count(micro: Micro, labels: list[Tensor]) -> None:
    if micro.observe:
        pairs = labels[0].flatten().long() * 256 + labels[min(1, len(labels) - 1)].flatten()
        # Not bincount, which waits for a GPU.
        counts = torch.zeros(256 * 256, dtype=torch.float64, device=pairs.device)
        micro.seen["labels"] = counts.scatter_add_(0, pairs, torch.ones_like(pairs, dtype=torch.float64)).view(256, 256)


def _taught(config: TrainConfig, state: TrainState, micro: Micro) -> tuple[Tensor, list[Tensor]]:
    """Mixed unlabelled images (U, 3, H, W) and the labels that each network gives them, uint8 (U, H, W).

    The partner is another image, the successor in the global batch, or another view of the same one.
    """
    settings, (image, second) = config.cps, _views(micro.batch)
    views = [image] if settings.cutmix_partner == "other" else [image, second]
    passes = views if settings.forwards == "separate" else [torch.cat(views)]
    own = []
    for network in state.networks.values():
        looks = [
            _look(config, state, network, seen, batch_statistics=settings.teacher_bn == "train") for seen in passes
        ]
        own.append(_labels(micro, torch.cat(looks), settings.confidence))
    bundles = [
        _bundle(view, labels)
        for view, *labels in zip(
            views, *(torch.chunk(said, len(views)) for said in state.ranks.exchange(own)), strict=True
        )
    ]
    return _mix(settings, config, state, micro, *bundles)


def _bundle(image_U3HW: Tensor, labels_UHW: list[Tensor]) -> Tensor:
    """Images and what is said of them as one tensor, uint8 (U, 3 + n, H, W): mixed alike, and exchanged at once."""
    return torch.cat([image_U3HW, *(label.unsqueeze(1) for label in labels_UHW)], dim=1)


def _mix(
    settings: MixConfig,
    config: TrainConfig,
    state: TrainState,
    micro: Micro,
    own: Tensor,
    partner: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Bundles mixed by CutMix -> images, label maps; the partner is the next image of the global batch if none is given."""
    ranks, (size, _, height, width) = state.ranks, own.shape
    # The images of all shares' micro-batch `part`, in order, are the batch that is rolled.
    first = (micro.part * ranks.shares + ranks.share) * size
    masks = cutmix_masks(settings, config.seed, state.step, range(first, first + size), height, width)
    mixed = paste(masks.to(own.device, non_blocking=True), own, ranks.roll(own) if partner is None else partner)
    return mixed[:, :3], list(mixed[:, 3:].unbind(dim=1))
