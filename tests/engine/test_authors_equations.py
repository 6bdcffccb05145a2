"""The step of the reference presets against the arithmetic of the CPS authors' code, in double precision.

What one iteration of their code computes (github.com/charlesCXK/TorchSemiSeg at 5e0c29c) is written down here anew, in plain torch: the order of
the passes, logits at full resolution, losses and the quotient that they get, two SGD optimizers with the nominal rate and weight decay. It shares
with the engine the layers of the networks; first weights, images and the boxes of CutMix are given to both. `train_step` runs with the shipped
preset, smaller and on one worker; nothing else is changed.

Both train in double precision (`support.double_precision`), where the last bit of a sum turns no hard label. What is left is rounding: the
engine normalises (x - 255 mean) / (255 std) where theirs is (x / 255 - mean) / std, takes softmax and gradient in one go, and multiplies rate
and decay where theirs divides the loss. Batch norm over so few images makes more of it: up to 6e-14 of a loss, 3e-14 in a weight and 2e-13 in
a running statistic. The bounds are 1e-12 and 1e-11.

`authors_equations.json` holds what this file's writing gave when it was compared, so that a change of both sides at once is seen; 1e-9 leaves
room for other processors and versions of torch. To write it anew: PYTHONPATH=.:tests python tests/engine/test_authors_equations.py

Planted bugs that turn it red, each alone: labels are not exchanged, OHEM's threshold is halved, the labelled images go first with CutMix
(tests/test_mutations.py).
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import double_precision
from torch import Tensor, nn

from cps_ray.config.reader import load_train
from cps_ray.config.train import TrainConfig
from cps_ray.engine.batch import Batch
from cps_ray.engine.mixing import cutmix_masks
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.state import TrainState, build_state
from cps_ray.engine.step import train_step

GOLDEN = Path(__file__).with_name("authors_equations.json")
CLASSES, STEPS, LABELED, UNLABELED, SIDE = 3, 2, 3, 4, 32
VOID = 255


@dataclass(frozen=True)
class Recipe:
    """What an experiment of theirs says, not what our preset makes of it; and the size of OHEM's smallest selection here."""

    preset: str
    gpus: int
    """Each loss is divided by their number before the gradients are averaged over them, so that this quotient is left."""
    nominal_lr: float
    cps_weight: float
    cutmix: bool
    min_kept: int | None = None
    """None: the mean over all labelled pixels instead of OHEM."""


RECIPES = {
    "voc": Recipe("reference/voc", 4, 0.01, 1.5, cutmix=False),
    "voc-cutmix": Recipe("reference/voc-cutmix", 4, 0.01, 1.0, cutmix=True),
    # Few, so that the threshold decides; most of the pixels, so that their number does, until in the last step there are fewer.
    "cityscapes": Recipe("reference/cityscapes", 8, 0.02, 6.0, cutmix=False, min_kept=100),
    "cityscapes-cutmix": Recipe("reference/cityscapes-cutmix", 8, 0.02, 5.0, cutmix=True, min_kept=2600),
}


@dataclass(frozen=True)
class Given:
    """What both sides are given for a step."""

    batch: Batch
    boxes: Tensor
    """bool (U, H, W): where the second view is pasted."""


@dataclass(frozen=True)
class Trace:
    """What a training did: losses by name, one of each step, and the networks after the last one."""

    losses: dict[str, list[float]]
    networks: list[dict[str, Tensor]]
    """Per network, weights and running statistics by name."""
    kept: list[int]
    """Labelled pixels in each supervised loss of the first network. Known of the authors' code alone."""


# ------------------------------------------------------------------------------------------------- what both are given


def preset_of(recipe: Recipe) -> TrainConfig:
    sizes = {
        "data.shards": "unused",
        "data.crop_px": [SIDE, SIDE],
        "data.labeled_batch": LABELED,
        "data.unlabeled_batch": UNLABELED,
        "model.encoder": "tu-test_resnet",
        "model.weights": "none",
        "schedule.steps": STEPS,
        "schedule.eval_every": STEPS,
        "resources.workers": 1,
        "resources.gpus_per_worker": 0,
    } | ({} if recipe.min_kept is None else {"loss.ohem_min_kept": recipe.min_kept})
    return load_train(Path(recipe.preset), [f"{name}={value}" for name, value in sizes.items()])


def draws(*key: int, shape: Sequence[int]) -> Tensor:
    """Uniform in [0, 1), float64. numpy's and not torch's, so that golden numbers depend on no library's way to initialise."""
    return torch.from_numpy(np.random.default_rng(key).random(shape))


def given(config: TrainConfig, step: int) -> Given:
    images = (draws(1, step, shape=(LABELED + 2 * UNLABELED, 3, SIDE, SIDE)) * 256).to(torch.uint8)
    mask = (draws(2, step, shape=(LABELED, SIDE, SIDE)) * CLASSES).to(torch.uint8)
    mask[:, : 4 + 8 * step, 4:] = VOID
    boxes = cutmix_masks(config.cps, config.seed, step, range(UNLABELED), SIDE, SIDE)
    # Crops of small images: their padding is trained on like the rest.
    shown = {
        name: torch.tensor([[4, SIDE - 4, 0, SIDE - 8]], dtype=torch.int32).expand(number, 4)
        for name, number in (("labeled_box", LABELED), ("unlabeled_box", UNLABELED), ("second_box", UNLABELED))
    }
    return Given(Batch(images[:LABELED], mask, *images[LABELED:].chunk(2), **shown), boxes)


def start(config: TrainConfig) -> TrainState:
    """Step 0, with weights by numpy: equal encoders, each network a decoder and a classifier of its own."""
    state = build_state(config, CLASSES, Ranks())
    for number, network in enumerate(state.networks.values()):
        for index, (name, p) in enumerate(network.network.named_parameters()):
            u = 2.0 * draws(3, index, 0 if name.startswith("encoder.") else number, shape=p.shape) - 1.0
            fan_in = max(1, p[0].numel())
            # Weights of the variance 2 / fan_in, those of norms around 1, biases around 0; and a classifier that is sure of some pixels.
            p.data = u * (6 / fan_in) ** 0.5 if p.dim() > 1 else 0.1 * u + float(name.endswith("weight"))
        network.network.segmentation_head[0].weight.data *= 3.0
    return state


# ------------------------------------------------------------------------------------------ what the authors' code computes


class AuthorsTraining:
    """Two branches and their optimizers, without distribution: one process in the place of all GPUs."""

    def __init__(self, recipe: Recipe, branches: Sequence[nn.Module]) -> None:
        self.recipe = recipe
        self.one, self.two = (branch.train() for branch in branches)
        self.optimizers = [self._optimizer(branch) for branch in branches]
        self.kept: list[int] = []

    def _optimizer(self, branch: nn.Module) -> torch.optim.Optimizer:
        convolutions = [m for m in branch.modules() if isinstance(m, nn.Conv2d)]
        norms = [m for m in branch.modules() if isinstance(m, nn.BatchNorm2d)]
        decayed = [m.weight for m in convolutions]
        bare = [m.bias for m in convolutions if m.bias is not None] + [p for m in norms for p in m.parameters()]
        assert len(decayed) + len(bare) == len(list(branch.parameters()))
        groups = [{"params": decayed, "weight_decay": 1e-4}, {"params": bare, "weight_decay": 0.0}]
        return torch.optim.SGD(groups, lr=self.recipe.nominal_lr, momentum=0.9, foreach=False, fused=False)

    def step(self, number: int, step: Given) -> dict[str, float]:
        """One iteration; returns its losses by the names that the engine gives them."""
        batch = step.batch
        x, u0, u1 = (
            normalised(image) for image in (batch.labeled_image, batch.unlabeled_image, batch.unlabeled_second)
        )
        target = batch.labeled_mask.long()
        if self.recipe.cutmix:
            cps, labeled_1, labeled_2 = self._with_cutmix(x, u0, u1, step.boxes.unsqueeze(1).to(x.dtype))
        else:
            cps, labeled_1, labeled_2 = self._plain(x, u0)
        target_1, target_2 = self._counted(labeled_1, target), self._counted(labeled_2, target)
        supervised_1, supervised_2 = cross_entropy(labeled_1, target_1), cross_entropy(labeled_2, target_2)
        self.kept.append(int((target_1 != VOID).sum()))
        loss = supervised_1 + supervised_2 + self.recipe.cps_weight * cps
        rate = self.recipe.nominal_lr * (1 - number / STEPS) ** 0.9
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate
        (loss / self.recipe.gpus).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        values = {"loss": loss, "sup_a": supervised_1, "sup_b": supervised_2, "cps": cps}
        return {name: float(value.detach()) for name, value in values.items()}

    def _plain(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Four passes, labelled images before unlabelled ones; one cross-entropy over the images of both kinds."""
        x1, u1 = full_logits(self.one, x), full_logits(self.one, u)
        x2, u2 = full_logits(self.two, x), full_logits(self.two, u)
        both_1, both_2 = torch.cat([x1, u1]), torch.cat([x2, u2])
        return cross_entropy(both_1, both_2.argmax(1)) + cross_entropy(both_2, both_1.argmax(1)), x1, x2

    def _with_cutmix(self, x: Tensor, u0: Tensor, u1: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Eight passes: both views without gradient, then the mixed one, and the labelled images last. Logits are mixed, then labels taken."""
        with torch.no_grad():
            labels_1, labels_2 = (
                (full_logits(branch, u0) * (1 - boxes) + full_logits(branch, u1) * boxes).argmax(1)
                for branch in (self.one, self.two)
            )
        mixed = u0 * (1 - boxes) + u1 * boxes
        student_1, student_2 = full_logits(self.one, mixed), full_logits(self.two, mixed)
        cps = cross_entropy(student_1, labels_2) + cross_entropy(student_2, labels_1)
        return cps, full_logits(self.one, x), full_logits(self.two, x)

    def _counted(self, logits: Tensor, target: Tensor) -> Tensor:
        kept = self.recipe.min_kept
        return target if kept is None else hard_pixels(logits.detach(), target, kept)


def normalised(image: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (image.double() / 255 - mean) / std


def full_logits(branch: nn.Module, image: Tensor) -> Tensor:
    return F.interpolate(branch(image), (SIDE, SIDE), mode="bilinear", align_corners=True)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, ignore_index=VOID)


def hard_pixels(logits: Tensor, target: Tensor, min_kept: int, threshold: float = 0.7) -> Tensor:
    """The target, void but where the true class has at most `threshold`, or at most the min_kept-th smallest probability of all pixels, in which
    void ones have 1. All labelled pixels, where they are fewer than min_kept."""
    labeled = target != VOID
    if int(labeled.sum()) < min_kept:
        return target
    probability = logits.softmax(1).gather(1, target.where(labeled, 0).unsqueeze(1)).squeeze(1).where(labeled, 1.0)
    limit = max(threshold, float(probability.flatten().sort().values[min_kept - 1]))
    return target.where(labeled & (probability <= limit), VOID)


# ---------------------------------------------------------------------------------------------------------- comparison


def train_both(recipe: Recipe) -> tuple[Trace, Trace]:
    """Returns what the authors' code does, and the engine, from the same start."""
    config = preset_of(recipe)
    with double_precision():
        state = start(config)
        authors = AuthorsTraining(recipe, [copy.deepcopy(network.network) for network in state.networks.values()])
        steps = [given(config, number) for number in range(STEPS)]
        expected = [authors.step(number, step) for number, step in enumerate(steps)]
        found = [train_step(config, state, step.batch) for step in steps]
    branches = [authors.one, authors.two], [network.network for network in state.networks.values()]
    first, second = (
        Trace(
            {name: [float(step[name]) for step in losses] for name in expected[0]}, [b.state_dict() for b in both], kept
        )
        for losses, both, kept in zip((expected, found), branches, (authors.kept, []), strict=True)
    )
    return first, second


def golden(trace: Trace) -> dict[str, Any]:
    """Losses and counts of pixels by step; per network, the norm of all its weights, and of all its running statistics."""
    norms: dict[str, list[float]] = {"weights": [], "statistics": []}
    for network in trace.networks:
        for kind, values in norms.items():
            statistics = kind == "statistics"
            tensors = [t.flatten() for name, t in network.items() if t.dim() and ("running" in name) == statistics]
            values.append(float(torch.cat(tensors).norm()))
    return trace.losses | norms | {"kept": trace.kept}


@pytest.fixture(scope="module", params=RECIPES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def traces(name: str) -> tuple[Trace, Trace]:
    return train_both(RECIPES[name])


def test_losses_are_the_authors(traces: tuple[Trace, Trace]) -> None:
    authors, engine = traces
    for term, values in authors.losses.items():
        assert engine.losses[term] == pytest.approx(values, rel=1e-12), term


def test_weights_and_running_statistics_are_the_authors(traces: tuple[Trace, Trace]) -> None:
    for expected, found in zip(*(trace.networks for trace in traces), strict=True):
        assert [*expected] == [*found]
        for place, value in expected.items():
            assert value.dtype == (torch.float64 if value.dim() else torch.int64), place
            assert torch.allclose(found[place], value, rtol=0, atol=1e-11), place


def test_the_authors_equations_give_what_they_gave(name: str, traces: tuple[Trace, Trace]) -> None:
    wanted, found = json.loads(GOLDEN.read_text())[name], golden(traces[0])
    assert {*found} == {*wanted}
    for key, values in found.items():
        assert values == pytest.approx(wanted[key], rel=1e-9), key


def test_every_rule_of_ohem_decides_somewhere() -> None:
    """Else the comparison would not see a wrong one."""
    kept = {name: numbers["kept"] for name, numbers in json.loads(GOLDEN.read_text()).items()}
    labeled = kept["voc"]
    assert RECIPES["cityscapes"].min_kept < min(kept["cityscapes"])  # the threshold
    assert all(few < many for few, many in zip(kept["cityscapes"], labeled, strict=True))
    assert kept["cityscapes-cutmix"] == [RECIPES["cityscapes-cutmix"].min_kept, labeled[1]]  # the number, and too few


if __name__ == "__main__":
    numbers = {name: golden(train_both(recipe)[0]) for name, recipe in RECIPES.items()}
    GOLDEN.write_text(json.dumps(numbers, indent=2) + "\n")
