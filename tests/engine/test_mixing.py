import numpy as np
import torch

from cps_ray.config.train import CpsConfig
from cps_ray.engine.batch import IGNORE
from cps_ray.engine.mixing import boxes_mask, classmix_masks, cutmix_masks, one_box_mask, paste


def test_one_box_has_the_area_asked_for() -> None:
    cps = CpsConfig(cutmix_boxes=1, cutmix_area=(0.4, 0.4))
    fractions = [boxes_mask(cps, 200, 300, np.random.default_rng(seed)).mean() for seed in range(200)]
    assert abs(np.mean(fractions) - 0.4) < 0.01


def test_three_boxes_paste_about_a_quarter() -> None:
    # Measured on the reference's generator: mean 0.25, 5 to 95 % 0.15 to 0.37.
    fractions = [boxes_mask(CpsConfig(), 128, 128, np.random.default_rng(seed)).mean() for seed in range(400)]
    assert 0.22 < np.mean(fractions) < 0.28
    assert 0.10 < np.quantile(fractions, 0.05) < np.quantile(fractions, 0.95) < 0.42


def test_one_box_or_nothing_is_pasted_as_in_unimatch() -> None:
    for height, width in ((200, 200), (64, 1024)):
        masks = [one_box_mask(height, width, np.random.default_rng(seed)) for seed in range(400)]
        boxes = [np.argwhere(mask) for mask in masks if mask.any()]
        assert 170 < len(boxes) < 230
        for cells, mask in zip(boxes, (mask for mask in masks if mask.any()), strict=True):
            tall, wide = cells.max(axis=0) - cells.min(axis=0) + 1
            assert tall * wide == mask.sum(), "one box"
            assert 0.015 < mask.mean() < 0.401
            assert 0.25 < (tall / height) / (wide / width) < 3.7
        assert any(len(cells) < 0.04 * mask.size for cells in boxes)
        assert any(len(cells) > 0.35 * mask.size for cells in boxes)


def test_every_view_has_masks_of_its_own() -> None:
    for mix in ("cutmix", "one_box"):
        first, second = (cutmix_masks(CpsConfig(mix=mix), 7, 3, range(8), 32, 48, view) for view in range(2))
        assert torch.equal(first, cutmix_masks(CpsConfig(mix=mix), 7, 3, range(8), 32, 48))
        assert not torch.equal(first, second)
    label = torch.arange(8, dtype=torch.uint8).repeat(4, 8, 1)
    assert not torch.equal(*(classmix_masks(label, 7, 3, range(4), view) for view in range(2)))


def test_masks_depend_on_seed_step_and_position_only() -> None:
    whole = cutmix_masks(CpsConfig(), 7, 3, range(4), 32, 48)
    halves = [cutmix_masks(CpsConfig(), 7, 3, part, 32, 48) for part in (range(2), range(2, 4))]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, cutmix_masks(CpsConfig(), 7, 4, range(4), 32, 48))


def test_paste_takes_the_partner_inside_the_mask() -> None:
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    own, partner = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.full((1, 3, 4, 4), 9, dtype=torch.uint8)
    mixed = paste(mask, own, partner)
    assert (mixed[:, :, :2] == 9).all()
    assert (mixed[:, :, 2:] == 0).all()


def test_classmix_takes_half_of_the_classes_whole() -> None:
    label = torch.randint(0, 5, (6, 20, 30), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    label[1][label[1] > 2] = 2  # three classes: one is taken
    label[2] = 4  # one class: none is
    label[3, :5] = IGNORE
    masks = classmix_masks(label, 0, 7, range(6))
    drawn = []
    for mask, classes in zip(masks, label, strict=True):
        taken = set(classes[mask].tolist())
        assert taken.isdisjoint(classes[~mask].tolist())  # whole classes
        assert len(taken) == len(set(classes.flatten().tolist()) - {IGNORE}) // 2
        assert IGNORE not in taken
        drawn.append(tuple(sorted(taken)))
    assert len(set(drawn)) > 2
    assert torch.equal(classmix_masks(label[2:], 0, 7, range(2, 6)), masks[2:])  # by position, not by place in a shard
    assert not torch.equal(classmix_masks(label, 0, 8, range(6)), masks)


def test_classmix_draws_classes_equally_often() -> None:
    label = torch.arange(4, dtype=torch.uint8).view(1, 2, 2).repeat(400, 1, 1)
    taken = classmix_masks(label, 0, 0, range(400)).float().mean(dim=0)
    assert ((taken - 0.5).abs() < 0.08).all()
