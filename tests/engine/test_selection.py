"""Pseudo labels that count, by a threshold per class."""

import torch

from cps_ray.engine.batch import IGNORE
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.selection import surest


def test_each_class_keeps_the_same_fraction_and_its_surest_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (2, 80, 90), generator=generator).to(torch.uint8)
    label[0, :10] = IGNORE
    # Class 0 is far surer than class 2: one threshold for all would drop class 2 as a whole.
    certainty = 1.0 - 10.0 ** -(
        torch.rand(label.shape, generator=generator) + torch.tensor([4.0, 2.0, 0.3])[label.clamp(max=2).long()]
    )
    counted = torch.ones_like(label, dtype=torch.bool)
    counted[1, 70:] = False
    kept = surest(label, certainty, counted, 0.3, 3, Ranks())
    assert not kept[label == IGNORE].any()
    for number in range(3):
        here = (label == number) & counted
        assert 0.3 <= float(kept[here].float().mean()) < 0.31
        assert certainty[here & kept].min() >= certainty[here & ~kept].max() - 1e-2
        assert certainty[here].sort(descending=True).values[int(0.3 * here.sum()) - 1] >= certainty[here & kept].min()


def test_all_of_equal_certainty_are_kept() -> None:
    label = torch.zeros(1, 8, 8, dtype=torch.uint8)
    assert surest(label, torch.ones(1, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool), 0.1, 1, Ranks()).all()
