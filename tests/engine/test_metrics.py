import math

import pytest
import torch

from cps_ray.engine.batch import IGNORE
from cps_ray.engine.metrics import (
    calibration,
    calibration_error,
    class_accuracy,
    confusion,
    iou,
    mean_iou,
    micro_iou,
    pixel_accuracy,
)


def test_iou_equals_sets_of_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(0, 4, (5, 6, 7), generator=generator)
    target = torch.randint(0, 4, (5, 6, 7), generator=generator).to(torch.uint8)
    target[0, :3] = IGNORE
    counted = target != IGNORE
    scores = iou(confusion(predicted, target, 4).sum(0))
    for label in range(4):
        hit = ((predicted == label) & (target == label) & counted).sum()
        union = (((predicted == label) | (target == label)) & counted).sum()
        assert math.isclose(float(scores[label]), float(hit / union), rel_tol=1e-6)


def test_sums_over_batches_equal_the_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    predicted = torch.randint(0, 3, (7, 4, 4), generator=generator)
    target = torch.randint(0, 3, (7, 4, 4), generator=generator).to(torch.uint8)
    whole = confusion(predicted, target, 3)
    assert whole.shape == (7, 3, 3)
    parts = [confusion(predicted[a:b], target[a:b], 3).sum(0) for a, b in ((0, 3), (3, 4), (4, 7))]
    assert torch.equal(whole.sum(0), torch.stack(parts).sum(0))


def test_absent_classes_do_not_count() -> None:
    matrix = torch.tensor([[8, 2, 0], [0, 10, 0], [0, 0, 0]])
    assert math.isclose(mean_iou(matrix), (8 / 10 + 10 / 12) / 2)
    assert math.isnan(float(iou(matrix)[2]))


def test_an_image_of_ignored_pixels_adds_nothing() -> None:
    target = torch.full((1, 2, 2), IGNORE, dtype=torch.uint8)
    assert confusion(torch.zeros(1, 2, 2, dtype=torch.int64), target, 3).sum() == 0


def pixels(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted and true classes of 0..5, some ignored. 3 is never true, 4 never predicted, 5 neither."""
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randint(0, 4, (3, 5, 7), generator=generator).to(torch.uint8)
    target = torch.tensor([0, 1, 2, 4])[torch.randint(0, 4, (3, 5, 7), generator=generator)].to(torch.uint8)
    target[:, 1, 2:6] = IGNORE
    return predicted, target


def test_confusion_counts_one_pixel_at_a_time() -> None:
    predicted, target = pixels(2)
    expected = torch.zeros(3, 6, 6, dtype=torch.int64)
    for n in range(3):
        for true, said in zip(target[n].flatten().tolist(), predicted[n].flatten().tolist(), strict=True):
            if true != IGNORE:
                expected[n, true, said] += 1
    for dtype in (torch.uint8, torch.int64):
        found = confusion(predicted.to(dtype), target, 6)
        assert found.dtype == torch.int64
        assert torch.equal(found, expected)


def test_labels_of_255_classes_count_and_what_is_predicted_at_ignored_pixels_does_not() -> None:
    predicted = torch.tensor([[[254, 254, 7]], [[0, 254, 0]]], dtype=torch.uint8)
    target = torch.tensor([[[254, IGNORE, 254]], [[0, IGNORE, IGNORE]]], dtype=torch.uint8)
    found = confusion(predicted, target, 255)
    assert found[0].nonzero().tolist() == [[254, 7], [254, 254]]
    assert found[1].nonzero().tolist() == [[0, 0]]


def test_scores_equal_counts_over_pixels() -> None:
    predicted, target = pixels(3)
    matrix = confusion(predicted, target, 6).sum(0)
    pairs = [
        pair for pair in zip(target.flatten().tolist(), predicted.flatten().tolist(), strict=True) if pair[0] != 255
    ]
    hits, unions, trues = [0] * 6, [0] * 6, [0] * 6
    for label in range(6):
        hits[label] = sum(true == said == label for true, said in pairs)
        unions[label] = sum(label in pair for pair in pairs)
        trues[label] = sum(true == label for true, _ in pairs)
    assert (hits[3], trues[3]) == (hits[4], unions[5]) == (0, 0)
    assert unions[3]
    assert unions[4]
    # 3 is predicted and 4 is true, so both have an IoU of 0; 5 has none.
    assert math.isclose(mean_iou(matrix), sum(hits[label] / unions[label] for label in range(5)) / 5)
    assert math.isclose(micro_iou(matrix), sum(hits) / sum(unions))
    assert math.isclose(pixel_accuracy(matrix), sum(true == said for true, said in pairs) / len(pairs))
    assert math.isclose(class_accuracy(matrix), sum(hits[label] / trues[label] for label in (0, 1, 2, 4)) / 4)


def test_confidence_lies_in_bins_that_hold_their_upper_edge() -> None:
    confidence = torch.tensor([1.0, 14.5 / 15, 0.2, 0.2 + 1e-6, 0.0, float("nan"), 0.5])
    hit = torch.tensor([True, False, True, True, False, False, True])
    counted = torch.tensor([True] * 6 + [False])
    sums = calibration(confidence, hit, counted)
    assert sums.dtype == torch.int64
    assert sums[0].tolist() == [2, 0, 1, 1, *[0] * 10, 2]
    assert sums[1].tolist() == [0, 0, 1, 1, *[0] * 10, 1]
    assert (sums[2] * 2.0**-24).tolist() == pytest.approx([0, 0, 0.2, 0.2, *[0] * 10, 1 + 14.5 / 15], abs=1e-5)
    assert calibration_error(sums) == pytest.approx((0.8 + 0.8 + 14.5 / 15) / 6, abs=1e-5)


def test_calibration_sums_are_exact_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence, hit = torch.rand(5000, generator=generator), torch.rand(5000, generator=generator) > 0.5
    counted = torch.ones_like(hit)
    whole = calibration(confidence, hit, counted)
    parts = [calibration(confidence[first::7], hit[first::7], counted[first::7]) for first in range(7)]
    assert torch.equal(torch.stack(parts).sum(0), whole)
    assert whole[2].sum() == int((confidence.double() * 2**24).sum())


def test_an_empty_matrix_has_no_scores() -> None:
    empty = torch.zeros(3, 3, dtype=torch.int64)
    assert iou(empty).isnan().all()
    assert all(math.isnan(score(empty)) for score in (mean_iou, micro_iou, pixel_accuracy, class_accuracy))
    assert math.isnan(calibration_error(torch.zeros(3, 15, dtype=torch.int64)))
