import pytest
import torch
import torch.nn.functional as F
from test_dense import by_hand, random_logits

from cps_ray.config.train import LossConfig
from cps_ray.engine.batch import IGNORE
from cps_ray.engine.dense import cross_entropy
from cps_ray.engine.losses import Term, hard_pixels, supervised_term, weighed_pixels

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
