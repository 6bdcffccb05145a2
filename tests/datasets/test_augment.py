from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cps_ray.config.train import AugmentConfig
from cps_ray.datasets.augment import TrainView
from cps_ray.engine.batch import IGNORE


def coded(height: int = 40, width: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red channel is its mask: blocks of 8 px, so that interpolation blurs edges only."""
    rng = np.random.default_rng(0)
    mask = np.kron(rng.integers(0, 8, (height // 8 + 1, width // 8 + 1)), np.ones((8, 8)))[:height, :width].astype(
        np.uint8
    )
    return np.dstack([mask * 30, np.full_like(mask, 100), np.full_like(mask, 50)]), mask


@pytest.mark.parametrize("scale", [(0.5, 2.0), (1.0, 1.0), (0.5, 0.5)])
def test_image_and_mask_stay_aligned(scale: tuple[float, float]) -> None:
    image, mask = coded()
    view = TrainView(AugmentConfig(scale=scale), (32, 48))
    for seed in range(30):
        made, label = view(image, mask, seed)
        assert made.shape == (3, 32, 48)
        assert label is not None
        assert made.dtype == label.dtype == torch.uint8
        counted = label != IGNORE
        assert counted.any()
        same = (made[0].float() / 30).round()[counted] == label[counted]
        assert same.float().mean() > 0.8


def test_padding_is_ignored_and_mean_coloured() -> None:
    image, mask = coded(16, 16)
    made, label = TrainView(AugmentConfig(scale=(1.0, 1.0)), (32, 32))(image, mask, 0)
    assert label is not None
    padded = label == IGNORE
    assert int(padded.sum()) == 32 * 32 - 16 * 16
    assert made[:, padded].unique(dim=1).flatten().tolist() == [124, 116, 104]


def test_a_view_is_a_function_of_the_seed_on_any_thread() -> None:
    image, mask = coded()
    view = TrainView(AugmentConfig(color=0.5, blur=0.5), (32, 48))
    alone = [view(image, mask, seed)[0] for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: view(image, mask, seed)[0], range(16)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not torch.equal(alone[0], alone[1])


def test_half_of_the_views_are_flipped() -> None:
    image, _ = coded(32, 48)
    view = TrainView(AugmentConfig(scale=(1.0, 1.0), flip=0.5), (32, 48))
    plain = torch.from_numpy(image.transpose(2, 0, 1).copy())
    flipped = sum(torch.equal(view(image, None, seed)[0], plain.flip(2)) for seed in range(200))
    kept = sum(torch.equal(view(image, None, seed)[0], plain) for seed in range(200))
    assert flipped + kept == 200
    assert 70 < flipped < 130


def test_colour_changes_the_image_alone() -> None:
    image, mask = coded(32, 48)
    made, label = TrainView(AugmentConfig(scale=(1.0, 1.0), flip=0.0, color=1.0), (32, 48))(image, mask, 1)
    assert label is not None
    assert torch.equal(label, torch.from_numpy(mask))
    assert not torch.equal(made, torch.from_numpy(image.transpose(2, 0, 1).copy()))
