import pytest
import torch
import torch.nn.functional as F
from test_dense import by_hand, random_logits

from cps_ray.config.train import LossConfig
from cps_ray.engine.batch import IGNORE
from cps_ray.engine.dense import cross_entropy, upsample
from cps_ray.engine.losses import Term, check_losses, hard_pixels, loss_on_masks, supervised_term, weighed_pixels
from cps_ray.errors import ConfigError

SIZE = (32, 64)


def loss_of(logits: torch.Tensor, term: Term) -> float:
    return float(cross_entropy(logits, [term.target], [term.weight], [term.class_weights])[0])


def random_mask(seed: int) -> torch.Tensor:
    return torch.randint(0, 3, (2, *SIZE), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_supervised_loss_divides_by_the_given_count() -> None:
    logits, mask = random_logits(2, (2, 3, *SIZE)), random_mask(3)
    mask[0, :20] = IGNORE
    total, count = by_hand(logits, mask)
    loss = loss_of(
        logits, supervised_term(LossConfig(), LossConfig().supervised, 1.0, logits, mask, torch.tensor(float(count)))
    )
    assert loss == pytest.approx(total / count, rel=1e-5)
    assert loss == pytest.approx(float(F.cross_entropy(logits, mask.long(), ignore_index=IGNORE)), rel=1e-5)


def test_a_mask_without_labels_gives_zero() -> None:
    mask = torch.full((2, *SIZE), IGNORE, dtype=torch.uint8)
    logits = random_logits(0, (2, 3, *SIZE))
    for loss in (LossConfig(), LossConfig(supervised="ohem", ohem_min_kept=4)):
        assert loss_of(logits, supervised_term(loss, loss.supervised, 1.0, logits, mask, torch.tensor(0.0))) == 0.0


@pytest.mark.parametrize("threshold", [0.2, 0.7])
@pytest.mark.parametrize("min_kept", [1, 500, 2000, 4031, 4032, 100_000])
def test_ohem_equals_sorting(min_kept: int, threshold: float) -> None:
    logits, target = random_logits(4, (2, 3, *SIZE)), random_mask(5)
    target[1, 31] = IGNORE  # 4032 pixels are left
    pixel = F.cross_entropy(logits, target.long(), ignore_index=IGNORE, reduction="none")[target != IGNORE]
    probability = (-pixel).exp()
    if min_kept < len(pixel):
        limit = max(threshold, float(probability.sort().values[min_kept - 1]))
        pixel = pixel[probability <= limit + 1e-7]
    ohem = LossConfig(supervised="ohem", ohem_threshold=threshold, ohem_min_kept=min_kept)
    term = supervised_term(ohem, ohem.supervised, 1.0, logits, target, torch.tensor(0.0))
    assert loss_of(logits, term) == pytest.approx(float(pixel.mean()), rel=1e-5)
    assert torch.equal(term.target, hard_pixels(logits, target, threshold, min_kept))


WEIGHTS = (0.5, 3.0, 0.0)


def test_class_weights_are_torchs() -> None:
    logits, mask = random_logits(2, (2, 3, *SIZE)), random_mask(3)
    mask[0, :20] = IGNORE
    loss = LossConfig(class_weights=WEIGHTS)
    expected = F.cross_entropy(logits, mask.long(), torch.tensor(WEIGHTS), ignore_index=IGNORE)
    found = loss_of(logits, supervised_term(loss, loss.supervised, 1.0, logits, mask, weighed_pixels(loss, mask)))
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_class_weights_weigh_hard_pixels() -> None:
    logits, mask = random_logits(4, (2, 3, *SIZE)), random_mask(5)
    loss = LossConfig(supervised="ohem", ohem_threshold=0.2, ohem_min_kept=500, class_weights=WEIGHTS)
    kept = hard_pixels(logits, mask, 0.2, 500)
    assert 0.05 < (kept == IGNORE).float().mean() < 0.95
    expected = F.cross_entropy(logits, kept.long(), torch.tensor(WEIGHTS), ignore_index=IGNORE)
    assert loss_of(
        logits, supervised_term(loss, loss.supervised, 1.0, logits, mask, torch.tensor(0.0))
    ) == pytest.approx(float(expected), rel=1e-5)


def of_masks(loss: LossConfig, coarse: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The supervised loss of a whole batch, with gradient, and what is reported of it."""
    value, supervised, _ = loss_on_masks(loss, coarse, mask, weighed_pixels(loss, mask).float())
    return value, supervised


def case() -> tuple[torch.Tensor, torch.Tensor]:
    """Coarse logits (2, 5, 8, 8) of images of 32x32 px, and their mask with IGNORE in a corner."""
    draw = torch.Generator().manual_seed(3)
    coarse = torch.randn(2, 5, 8, 8, generator=draw).requires_grad_()
    mask = torch.randint(5, (2, 32, 32), generator=draw).to(torch.uint8)
    mask[:, :7, :9] = IGNORE
    return coarse, mask


def plain_ce(logits: torch.Tensor, target: torch.Tensor, class_weights: torch.Tensor | None = None) -> torch.Tensor:
    """A plug-in that is known: torch's own."""
    return torch.nn.functional.cross_entropy(logits, target, class_weights, ignore_index=IGNORE)


@pytest.mark.parametrize("class_weights", [None, (0.5, 2.0, 1.0, 0.0, 3.0)])
def test_a_loss_by_autograd_is_the_lean_one_where_both_are_cross_entropy(
    class_weights: tuple[float, ...] | None,
) -> None:
    found = []
    for name in ("ce", f"{__name__}:plain_ce"):
        coarse, mask = case()
        value, supervised = of_masks(LossConfig(supervised=name, class_weights=class_weights), coarse, mask)
        assert float(supervised) == pytest.approx(float(value))
        assert not supervised.requires_grad
        found.append((float(value), torch.autograd.grad(value, coarse)[0]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-8)


def test_losses_are_summed_with_their_weights() -> None:
    coarse, mask = case()
    alone = {
        name: float(of_masks(LossConfig(supervised=name), coarse, mask)[0])
        for name in ("ce", "dice", "focal", "lovasz")
    }
    weights = {"ce": 0.5, "dice": 2.0, "lovasz": 0.25}
    value, supervised = of_masks(LossConfig(supervised=weights), coarse, mask)
    assert float(value) == pytest.approx(sum(weight * alone[name] for name, weight in weights.items()), rel=1e-6)
    assert float(supervised) == pytest.approx(float(value))
    assert len({round(each, 6) for each in alone.values()}) == 4


def dice_by_hand(prob: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """(C,): one minus the Dice coefficient of each class, over all images."""
    return 1 - 2 * (prob * truth).sum((0, 2, 3)) / (prob.sum((0, 2, 3)) + truth.sum((0, 2, 3)))


@pytest.mark.parametrize("class_weights", [None, (0.5, 2.0, 1.0, 0.0, 3.0)])
def test_dice_and_focal_are_their_equations(class_weights: tuple[float, ...] | None) -> None:
    coarse, mask = case()
    weight = torch.tensor(class_weights or [1.0] * 5)
    logits = upsample(coarse.detach(), (32, 32))
    known = (mask != IGNORE).unsqueeze(1)
    truth = torch.nn.functional.one_hot(mask.long().where(known[:, 0], 0), 5).movedim(3, 1) * known
    dice = dice_by_hand(logits.softmax(1) * known, truth)
    value, _ = of_masks(LossConfig(supervised="dice", class_weights=class_weights), coarse, mask)
    assert float(value) == pytest.approx(float((dice * weight).sum() / weight.sum()), rel=1e-5)
    # Focal loss (Lin et al., ICCV 2017), gamma 2, one class against the rest.
    p = logits.sigmoid()
    right = torch.where(truth.bool(), p, 1 - p)
    focal = (-((1 - right) ** 2) * right.log() * known).sum((0, 2, 3)) / known.sum()
    value, _ = of_masks(LossConfig(supervised="focal", class_weights=class_weights), coarse, mask)
    assert float(value) == pytest.approx(float((focal * weight).sum() / weight.sum()), rel=1e-5)


@pytest.mark.parametrize("name", ["dice", "focal", "lovasz"])
def test_a_batch_without_labelled_pixels_has_no_loss_and_no_nan(name: str) -> None:
    coarse, mask = case()
    value, _ = of_masks(LossConfig(supervised=name), coarse, torch.full_like(mask, IGNORE))
    assert float(value) == 0.0
    assert not torch.autograd.grad(value, coarse)[0].any()


def _vector(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return logits.mean(dim=1)


def _without_gradient(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.ones(())


def _of_all_pixels(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return logits.square().mean()


def _infinite(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return logits.sum() / 0


def _one_argument(logits: torch.Tensor) -> torch.Tensor:
    return logits.mean()


def _nothing(logits: torch.Tensor, target: torch.Tensor) -> None:
    return None


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("WEIGHTS", "cannot be called"),
        ("_vector", r"must return a scalar, but returned float32 of shape \(2, 8, 8\)"),
        ("_without_gradient", "must have a gradient by the logits, but has none"),
        ("_of_all_pixels", "must leave out pixels whose target is 255, but they have a gradient"),
        ("_infinite", "must be finite, but is"),
        ("_one_argument", "fails with TypeError"),
        ("_nothing", "must return a tensor, but returned NoneType"),
    ],
)
def test_a_loss_that_is_written_wrongly_is_told_its_contract(name: str, why: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"^loss\.supervised: \S+:{name}:? {why}.*\. A loss is a function \(logits, target\) -> scalar",
    ):
        check_losses(LossConfig(supervised=f"{__name__}:{name}"), 5)


def test_class_weights_need_a_loss_that_takes_them() -> None:
    of_all = LossConfig(supervised=f"{__name__}:_of_all_pixels", class_weights=(1.0, 2.0))
    with pytest.raises(ConfigError, match=r"^loss\.class_weights: \S+:_of_all_pixels has no parameter `class_weights`"):
        check_losses(of_all, None)
    check_losses(LossConfig(supervised=f"{__name__}:plain_ce", class_weights=(1.0, 2.0)), 2)
