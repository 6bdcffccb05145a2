"""Views: image and mask stay together, and what is seen is what albumentations' pipeline would show."""

from concurrent.futures import ThreadPoolExecutor

import albumentations as A  # noqa: N812
import cv2
import numpy as np
import pytest

from cps_ray.config.train import AugmentConfig
from cps_ray.datasets.augment import TrainView
from cps_ray.engine.batch import IGNORE

MEAN = [124, 116, 104]


def coded(height: int = 40, width: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red channel is its mask: blocks of 8 px, so that interpolation blurs edges only."""
    rng = np.random.default_rng(0)
    mask = np.kron(rng.integers(0, 8, (height // 8 + 1, width // 8 + 1)), np.ones((8, 8)))[:height, :width].astype(
        np.uint8
    )
    return np.dstack([mask * 30, np.full_like(mask, 100), np.full_like(mask, 50)]), mask


def view_of(
    augment: AugmentConfig,
    crop: tuple[int, int],
    image: np.ndarray,
    mask: np.ndarray | None,
    seed: int,
    **outputs: list[np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    view, label = np.full((3, *crop), 7, np.uint8), np.full(crop, 7, np.uint8)
    TrainView(augment, crop)(image, mask, (seed,), view=view, label=label, **outputs)
    return view, label


@pytest.mark.parametrize("scale", [(0.5, 2.0), (1.0, 1.0), (0.5, 0.5), (2.0, 2.0)])
def test_image_and_mask_stay_aligned(scale: tuple[float, float]) -> None:
    image, mask = coded()
    for seed in range(30):
        view, label = view_of(AugmentConfig(scale=scale), (32, 48), image, mask, seed)
        counted = label != IGNORE
        assert counted.any()
        same = (view[0] / 30).round()[counted] == label[counted]
        assert same.mean() > 0.8
        assert (view[:, ~counted].T == MEAN).all()


def test_padding_is_ignored_and_mean_coloured_around_the_image() -> None:
    image, mask = coded(16, 16)
    view, label = view_of(AugmentConfig(scale=(1.0, 1.0), flip=0.0), (32, 32), image, mask, 0)
    padded = label == IGNORE
    assert not padded[8:24, 8:24].any()
    assert int(padded.sum()) == 32 * 32 - 16 * 16
    assert np.unique(view[:, padded], axis=1).ravel().tolist() == MEAN
    assert (view[:, 8:24, 8:24].transpose(1, 2, 0) == image).all()


def test_the_box_is_where_the_image_is() -> None:
    image, mask = coded(30, 40)
    augment, padded = AugmentConfig(scale=(0.5, 2.0)), 0
    for seed in range(60):
        view, label = np.empty((3, 32, 48), np.uint8), np.empty((32, 48), np.uint8)
        top, bottom, left, right = TrainView(augment, (32, 48))(image, mask, (seed,), view=view, label=label)
        inside = np.zeros_like(label, bool)
        inside[top:bottom, left:right] = True
        assert (inside == (label != IGNORE)).all()
        padded += not inside.all()
    assert 20 < padded < 60


def test_strong_views_differ_in_colour_alone() -> None:
    image, _ = coded(64, 64)
    first, second, alone = (np.empty((3, 32, 48), np.uint8) for _ in range(3))
    view, _ = view_of(AugmentConfig(), (32, 48), image, None, 3, strong=[first, second])
    view_of(AugmentConfig(), (32, 48), image, None, 3, strong=[alone])
    assert (first == alone).all()
    assert (first != second).mean() > 0.5
    assert (first != view).mean() > 0.5


@pytest.mark.parametrize("zoom", [0.5, 0.75, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("crop", [(32, 48), (64, 64)])
def test_the_view_is_what_zooming_the_whole_image_and_then_cropping_shows(zoom: float, crop: tuple[int, int]) -> None:
    """The reference is albumentations' RandomScale and PadIfNeeded, then a crop at the position that was drawn here."""
    rng = np.random.default_rng(3)
    image = cv2.resize(rng.integers(0, 256, (3, 5, 3), np.uint8), (120, 72), interpolation=cv2.INTER_CUBIC)
    mask = np.asarray(image[..., 0] // 64, np.uint8)
    zooming = A.RandomScale(
        (zoom - 1, zoom - 1), interpolation=cv2.INTER_LINEAR, mask_interpolation=cv2.INTER_NEAREST_EXACT, p=1
    )
    padding = A.PadIfNeeded(*crop, border_mode=cv2.BORDER_CONSTANT, fill=tuple(MEAN), fill_mask=IGNORE)
    zoomed = A.Compose([zooming, padding])(image=image, mask=mask)
    for seed in range(8):
        view, label = view_of(AugmentConfig(scale=(zoom, zoom), flip=0.0), crop, image, mask, seed)
        draws = np.random.default_rng((seed,)).random(4)[1:3]
        windows = [min(length, round(view_px / zoom)) for length, view_px in zip(image.shape, crop, strict=False)]
        firsts = [
            int(d * (length - window + 1)) for d, length, window in zip(draws, image.shape, windows, strict=False)
        ]
        last = [zoomed["mask"].shape[axis] - crop[axis] for axis in (0, 1)]
        y, x = (min(round(first * zoom), limit) for first, limit in zip(firsts, last, strict=True))
        expected = zoomed["image"][y : y + crop[0], x : x + crop[1]].transpose(2, 0, 1)
        assert np.abs(expected.astype(int) - view).mean() < 7
        assert (zoomed["mask"][y : y + crop[0], x : x + crop[1]] == label).mean() > 0.9


def test_every_position_and_zoom_is_drawn_equally_often() -> None:
    """The values of a ramp show where the window lay, and how large it was."""
    image = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (40, 200, 3)).copy()
    augment = AugmentConfig(scale=(0.8, 1.6), flip=0.0)
    views = [view_of(augment, (32, 32), image, None, seed)[0][0, 16].astype(float) for seed in range(600)]
    widths = np.array([view[-1] - view[0] + 1 for view in views])
    positions = np.array([view[0] for view in views]) / (200 - widths)
    assert np.quantile(positions, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.06)
    zooms = 32 / widths
    assert np.quantile(zooms, [0.1, 0.5, 0.9]) == pytest.approx([0.88, 1.2, 1.52], abs=0.06)


def noise() -> tuple[np.ndarray, np.ndarray]:
    """An image and a mask that look different at every zoom and position."""
    rng = np.random.default_rng(5)
    return rng.integers(0, 256, (70, 90, 3), np.uint8), rng.integers(0, 9, (70, 90), np.uint8)


def zoomed(zoom: float, seed: int) -> tuple[bytes, bytes]:
    """Returns the bits of a view at one zoom."""
    view, label = view_of(AugmentConfig(scale=(zoom, zoom)), (32, 48), *noise(), seed)
    return view.tobytes(), label.tobytes()


def test_only_listed_zooms_are_drawn_and_each_equally_often() -> None:
    zooms = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
    counts = dict.fromkeys(zooms, 0)
    for seed in range(600):
        view, label = view_of(AugmentConfig(scales=zooms), (32, 48), *noise(), seed)
        (zoom,) = [zoom for zoom in zooms if zoomed(zoom, seed) == (view.tobytes(), label.tobytes())]
        counts[zoom] += 1
    assert all(75 < count < 125 for count in counts.values()), counts


def test_without_listed_zooms_any_in_the_range_is_drawn() -> None:
    """The first draw of a seed is the position in the range, as before there were lists."""
    for seed in range(50):
        zoom = 0.5 + (2.0 - 0.5) * np.random.default_rng((seed,)).random()
        view, label = view_of(AugmentConfig(scale=(0.5, 2.0), scales=None), (32, 48), *noise(), seed)
        assert (view.tobytes(), label.tobytes()) == zoomed(zoom, seed)


def test_a_view_is_a_function_of_the_seed_on_any_thread() -> None:
    image, mask = coded()
    augment = AugmentConfig(color=0.5, blur=0.5)
    alone = [view_of(augment, (32, 48), image, mask, seed) for seed in range(16)]
    view = TrainView(augment, (32, 48))

    def make(seed: int) -> tuple[np.ndarray, np.ndarray]:
        pixels, label = np.empty((3, 32, 48), np.uint8), np.empty((32, 48), np.uint8)
        view(image, mask, (seed,), view=pixels, label=label)
        return pixels, label

    with ThreadPoolExecutor(4) as pool:
        in_threads = list(pool.map(make, range(16)))
    for (view_alone, label_alone), (view_in_thread, label_in_thread) in zip(alone, in_threads, strict=True):
        assert np.array_equal(view_alone, view_in_thread)
        assert np.array_equal(label_alone, label_in_thread)
    assert not np.array_equal(alone[0][0], alone[1][0])


def test_half_of_the_views_are_flipped() -> None:
    image, _ = coded(32, 48)
    plain = image.transpose(2, 0, 1)
    views = [view_of(AugmentConfig(scale=(1.0, 1.0), flip=0.5), (32, 48), image, None, seed)[0] for seed in range(200)]
    flipped = sum(np.array_equal(view, plain[:, :, ::-1]) for view in views)
    assert flipped + sum(np.array_equal(view, plain) for view in views) == 200
    assert 70 < flipped < 130


def test_a_flip_turns_the_mask_too() -> None:
    image, mask = coded(32, 48)
    _, label = view_of(AugmentConfig(scale=(1.0, 1.0), flip=1.0), (32, 48), image, mask, 0)
    assert np.array_equal(label, mask[:, ::-1])


def test_colour_changes_the_image_alone() -> None:
    image, mask = coded(32, 48)
    view, label = view_of(AugmentConfig(scale=(1.0, 1.0), flip=0.0, color=1.0), (32, 48), image, mask, 1)
    assert np.array_equal(label, mask)
    assert not np.array_equal(view, image.transpose(2, 0, 1))


def test_the_strong_view_shows_the_same_place_in_other_colours() -> None:
    image, mask = coded(32, 48)
    augment = AugmentConfig(scale=(1.0, 1.0), flip=0.0)
    changed = 0
    for seed in range(20):
        strong = np.zeros((3, 32, 48), np.uint8)
        view, _ = view_of(augment, (32, 48), image, mask, seed, strong=[strong])
        assert np.array_equal(view, image.transpose(2, 0, 1))
        changed += not np.array_equal(strong, view)
        # Blocks of one class keep one colour: edges lie where they lay.
        edges = [np.abs(np.diff(pixels.astype(int).sum(0), axis=1)) > 40 for pixels in (view, strong)]
        assert (edges[1] & ~edges[0]).mean() < 0.12
    assert changed >= 18


def test_the_strong_change_does_not_follow_the_weak_one() -> None:
    """On a grey image a change of colour is a factor of the brightness. From the same draws, both changes would have nearly the same."""
    image = np.full((32, 48, 3), 100, np.uint8)
    factors = []
    for seed in range(200):
        strong = np.zeros((3, 32, 48), np.uint8)
        view, _ = view_of(AugmentConfig(color=1.0), (32, 48), image, None, seed, strong=[strong])
        factors.append((view[0, 16, 24] / 100, strong[0, 16, 24] / view[0, 16, 24]))
    weak, strong = np.array(factors).T
    assert weak.std() > 0.1
    assert strong.std() > 0.1
    assert abs(np.corrcoef(weak, strong)[0, 1]) < 0.3
