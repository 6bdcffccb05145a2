"""Outlines drawn again are the mask: COCO's by pycocotools, those that are painted over each other by Pillow, as labelme does it."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from cps_ray.model.outlining import regions, without_specks

Mask = NDArray[np.uint8]


def of_text(*rows: str) -> Mask:
    return np.array([[int(character) for character in row] for row in rows], np.uint8)


RING = of_text("0000000", "0111110", "0122210", "0120210", "0122210", "0111110", "0000000")
PINCHED = of_text("11110", "10010", "10001", "11111", "00010", "10100")


def noise(seed: int) -> Mask:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 30, 2).tolist()
    mask = rng.integers(0, 3, (height, width), np.uint8)
    if seed % 2:
        mask = np.asarray(cv2.resize(mask, (3 * width, 2 * height), interpolation=cv2.INTER_NEAREST), np.uint8)
    return mask


MASKS = [RING, PINCHED, of_text("1"), of_text("10", "01"), np.zeros((3, 4), np.uint8), *map(noise, range(40))]


def smooth(seed: int = 0, size: tuple[int, int] = (64, 96)) -> Mask:
    scores = np.random.default_rng(seed).random((*size, 5)).astype(np.float32)
    return np.asarray(cv2.GaussianBlur(scores, (0, 0), 3).argmax(-1), np.uint8)


@pytest.mark.parametrize("mask", MASKS)
def test_cocos_polygons_fill_each_pixel_once(mask: Mask) -> None:
    times = np.zeros(mask.shape, np.int64)
    for region in regions(mask):
        for polygon in region.filled():
            (runs,) = coco_mask.frPyObjects([polygon.ravel().tolist()], *mask.shape)
            drawn = coco_mask.decode(runs) > 0
            assert drawn.any()
            assert (mask[drawn] == region.label).all()
            times += drawn
    assert (times == 1).all()


@pytest.mark.parametrize("mask", [*MASKS, smooth()])
def test_painted_from_large_to_small_outlines_are_the_mask(mask: Mask) -> None:
    picture = Image.new("L", mask.shape[::-1], 255)
    painted = [(*region.painted(), region.label) for region in regions(mask)]
    for outline, _, label in sorted(painted, key=lambda each: -each[1]):
        ImageDraw.Draw(picture).polygon([tuple(point) for point in outline.tolist()], fill=label, outline=label)
    assert np.array_equal(np.asarray(picture), mask)


def test_a_region_with_a_hole_is_cut_through_the_hole() -> None:
    by_label = {(region.label, region.top): region for region in regions(RING)}
    assert {key: len(region.filled()) for key, region in by_label.items()} == {
        (0, 0): 2,
        (0, 3): 1,
        (1, 1): 2,
        (2, 2): 2,
    }
    outline, area = by_label[1, 1].painted()
    assert area == 25
    assert outline.round().tolist() in [np.roll([[1, 1], [6, 1], [6, 6], [1, 6]], n, axis=0).tolist() for n in range(4)]


def test_specks_go_to_what_is_around_them() -> None:
    mask = smooth(1)
    mask[10, 10], mask[30, 40:43], mask[50, 60:64] = 7, 6, 9
    cleaned = without_specks(mask, 4)
    sizes = [np.count_nonzero(region.inside) for region in regions(cleaned)]
    assert min(sizes) >= 4
    assert not np.isin(cleaned, (6, 7)).any()
    assert (cleaned == 9).sum() == 4
    large = np.zeros(mask.shape, np.bool_)
    for region in regions(mask):
        if np.count_nonzero(region.inside) >= 4:
            height, width = region.inside.shape
            large[region.top : region.top + height, region.left : region.left + width] |= region.inside
    assert np.array_equal(cleaned[large], mask[large])


def test_an_image_of_one_speck_stays() -> None:
    assert np.array_equal(without_specks(of_text("2"), 4), of_text("2"))
