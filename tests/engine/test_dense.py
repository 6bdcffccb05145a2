"""Losses and labels from coarse logits, against loops over pixels and against torch on full logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import double_precision

from cps_ray.engine import dense
from cps_ray.engine.batch import IGNORE

COARSE = (3, 5, 8, 16)
SIZES = [(32, 64), (30, 33)]
"""Full size of the padded image, and one that is cut out of it."""


def random_logits(seed: int, shape: tuple[int, ...] = COARSE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def random_labels(seed: int, size: tuple[int, int], classes: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (3, *size), generator=generator).to(torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE
    return labels


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
                scores = logits[n, :, y, x].tolist()
                top = max(scores)
                total += top + math.log(sum(math.exp(s - top) for s in scores)) - scores[label]
                count += 1
    return total, count


def plain(coarse: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(coarse, (32, 64), mode="bilinear", align_corners=True)[..., : size[0], : size[1]]


@pytest.fixture(params=[1, 2, 100], autouse=True)
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images at a time."""
    monkeypatch.setitem(dense._CHUNK_PX, "cpu", request.param * 32 * 64)


def test_cross_entropy_equals_a_loop_over_pixels() -> None:
    coarse, labels = random_logits(0), random_labels(1, (30, 33))
    total, _ = by_hand(plain(coarse, (30, 33)), labels)
    assert float(dense.cross_entropy(coarse, [labels], [1.0])[0]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cross_entropy_and_its_gradient_are_torchs(size: tuple[int, int], layout: torch.memory_format) -> None:
    targets, weights = [random_labels(1, size), random_labels(2, size)], [0.3, torch.tensor(2.0)]
    ours = random_logits(0).contiguous(memory_format=layout).requires_grad_()
    theirs = random_logits(0).requires_grad_()
    full = plain(theirs, size)
    terms = [F.cross_entropy(full, t.long(), ignore_index=IGNORE, reduction="sum") for t in targets]
    expected = 0.3 * terms[0] + 2.0 * terms[1]
    (7.0 * expected).backward()
    loss, parts = dense.cross_entropy(ours, targets, weights)
    (7.0 * loss).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert parts.tolist() == pytest.approx([float(term) for term in terms], rel=1e-5)
    assert not parts.requires_grad
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_gradient_in_double_precision() -> None:
    """Checks by finite differences, with logits at full resolution as networks without an upsampling at their end make them."""
    coarse = torch.randn(1, 3, 32, 32, dtype=torch.float64)[:, :, ::4, ::4].clone().requires_grad_()
    labels = torch.randint(0, 3, (1, 32, 32)).to(torch.uint8)
    with double_precision():
        assert torch.autograd.gradcheck(lambda x: dense.cross_entropy(x, [labels], [0.1])[0], coarse)
        weights = [torch.tensor([0.5, 2.0, 1.0])]
        assert torch.autograd.gradcheck(lambda x: dense.cross_entropy(x, [labels], [0.1], weights)[0], coarse)
        teacher, counted = torch.randn(1, 3, 8, 8), labels > 0
        assert torch.autograd.gradcheck(lambda x: dense.squared_difference(x, teacher, counted, 0.1)[0], coarse)


def test_full_logits_are_not_changed_by_the_loss() -> None:
    logits = random_logits(0, (2, 3, 32, 64))
    before = logits.clone()
    labels = random_labels(0, (32, 64), 3)[:2]
    dense.cross_entropy(logits, [labels], [1.0])
    dense.confidence_by_class(logits, torch.ones(len(logits), 32, 64, dtype=torch.bool))
    dense.hard_labels(logits, (32, 64), 0.9)
    assert torch.equal(logits, before)


def test_huge_logits_stay_finite() -> None:
    coarse = (random_logits(0) * 1e4).requires_grad_()
    loss, _ = dense.cross_entropy(coarse, [random_labels(1, (32, 64))], [1.0])
    loss.backward()
    assert torch.isfinite(loss.detach())
    assert torch.isfinite(coarse.grad).all()


@pytest.mark.parametrize("size", SIZES)
def test_squared_difference_is_that_of_probabilities(size: tuple[int, int]) -> None:
    ours, theirs = random_logits(0).requires_grad_(), random_logits(0).requires_grad_()
    teacher = random_logits(1).requires_grad_()
    counted = torch.rand(len(ours), *size) < 0.7
    squares = (plain(theirs, size).softmax(1) - plain(teacher.detach(), size).softmax(1)).square()
    expected = squares.movedim(1, -1)[counted].sum()
    (0.5 * expected).backward()
    loss, term = dense.squared_difference(ours, teacher, counted, 0.5)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.5 * float(expected.detach()), rel=1e-5)
    assert float(term) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert teacher.grad is None


@pytest.mark.parametrize("size", SIZES)
def test_hard_labels_are_the_argmax_where_it_is_sure(size: tuple[int, int]) -> None:
    coarse = random_logits(0).requires_grad_()
    confidence, label = plain(coarse.detach(), size).softmax(1).max(1)
    found = dense.hard_labels(coarse, size)
    assert found.dtype == torch.uint8
    assert not found.requires_grad
    assert torch.equal(found.long(), label)
    sure = dense.hard_labels(coarse, size, 0.6)
    assert 0 < (sure == IGNORE).sum() < sure.numel()
    assert torch.equal(sure.long(), label.masked_fill(confidence < 0.6, IGNORE))
    counted = torch.rand(found.shape) < 0.7
    total, pixels = dense.confidence_by_class(coarse, counted)
    for each in range(coarse.shape[1]):
        members = counted & (label == each)
        assert int(pixels[each]) == int(members.sum())
        assert float(total[each]) == pytest.approx(float(confidence[members].sum()), rel=1e-5)


def test_pixel_cross_entropy_is_torchs() -> None:
    coarse, labels = random_logits(0), random_labels(1, (30, 33))
    expected = F.cross_entropy(plain(coarse, (30, 33)), labels.long(), ignore_index=IGNORE, reduction="none")
    assert torch.allclose(dense.pixel_cross_entropy(coarse, labels), expected, atol=1e-5)
