import math

import torch

from cps_ray.engine.batch import IGNORE
from cps_ray.engine.loop import summarise
from cps_ray.engine.metrics import confusion, iou, mean_iou


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
    metrics = summarise({"": matrix, "night": torch.zeros(3, 3)}, ["sky", "road", "car"], "val")
    assert set(metrics) == {"val/miou", "val/iou/sky", "val/iou/road"}


def test_an_image_of_ignored_pixels_adds_nothing() -> None:
    target = torch.full((1, 2, 2), IGNORE, dtype=torch.uint8)
    assert confusion(torch.zeros(1, 2, 2, dtype=torch.int64), target, 3).sum() == 0
