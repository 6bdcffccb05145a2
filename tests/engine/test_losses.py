import math

import pytest
import torch
import torch.nn.functional as F

from cps_ray.config.train import LossConfig
from cps_ray.engine.batch import IGNORE
from cps_ray.engine.losses import cross_pseudo_loss, ohem, pseudo_labels, supervised_loss


def random_logits(seed: int, shape: tuple[int, ...] = (2, 3, 4, 4)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """Summed cross-entropy and counted pixels, one pixel at a time."""
    total, count = 0.0, 0
    images, _, height, width = logits.shape
    for n in range(images):
        for y in range(height):
            for x in range(width):
                label = int(labels[n, y, x])
                if label == IGNORE:
                    continue
                scores = [float(v) for v in logits[n, :, y, x]]
                top = max(scores)
                total += top + math.log(sum(math.exp(s - top) for s in scores)) - scores[label]
                count += 1
    return total, count


def test_cross_pseudo_loss_equals_a_loop_over_pixels() -> None:
    logits_a, logits_b = random_logits(0), random_logits(1)
    labels = pseudo_labels(logits_b, 0.0)
    assert torch.equal(labels, logits_b.argmax(1))
    total, count = by_hand(logits_a, labels)
    assert float(cross_pseudo_loss(logits_a, labels)) == pytest.approx(total / count, rel=1e-5)


def test_unsure_pixels_count_as_zero_and_get_no_gradient() -> None:
    logits_a, logits_b = random_logits(0).requires_grad_(), random_logits(1)
    labels = pseudo_labels(logits_b, 0.8)
    sure = logits_b.softmax(1).amax(1) >= 0.8
    assert 0 < sure.sum() < sure.numel()
    assert torch.equal(labels == IGNORE, ~sure)
    loss = cross_pseudo_loss(logits_a, labels)
    total, _ = by_hand(logits_a.detach(), labels)
    assert float(loss) == pytest.approx(total / labels.numel(), rel=1e-5)
    loss.backward()
    assert logits_a.grad is not None
    assert torch.equal(logits_a.grad.abs().sum(1) > 0, sure)


def test_no_gradient_flows_through_pseudo_labels() -> None:
    logits = random_logits(1).requires_grad_()
    assert not pseudo_labels(logits, 0.5).requires_grad


def test_supervised_loss_divides_by_the_given_count() -> None:
    logits = random_logits(2)
    mask = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    mask[0, :2] = IGNORE
    total, count = by_hand(logits, mask)
    loss = supervised_loss(LossConfig(), logits, mask, torch.tensor(float(count)))
    assert float(loss) == pytest.approx(total / count, rel=1e-5)
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits, mask.long(), ignore_index=IGNORE)), rel=1e-5)


def test_a_mask_without_labels_gives_zero() -> None:
    mask = torch.full((2, 4, 4), IGNORE, dtype=torch.uint8)
    assert float(supervised_loss(LossConfig(), random_logits(0), mask, torch.tensor(0.0))) == 0.0
    assert float(ohem(random_logits(0), mask.long(), 0.7, 4)) == 0.0


@pytest.mark.parametrize("min_kept", [1, 5, 20, 31, 1000])
def test_ohem_equals_sorting(min_kept: int) -> None:
    logits = random_logits(4)
    target = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(5))
    target[1, 3, 3] = IGNORE
    pixel = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")[target != IGNORE]
    probability = (-pixel).exp()
    if min_kept < len(pixel):
        limit = max(0.4, float(probability.sort().values[min_kept - 1]))
        pixel = pixel[probability <= limit + 1e-7]
    assert float(ohem(logits, target, 0.4, min_kept)) == pytest.approx(float(pixel.mean()), rel=1e-5)
