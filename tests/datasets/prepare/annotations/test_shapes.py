"""Areas are painted in the order that the rule for overlaps says; outlines and runs become the pixels that pycocotools gives."""

import tracemalloc
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from cps_ray.datasets.prepare.annotations.shapes import (
    Area,
    Overlaps,
    Shape,
    check_polygon,
    decode_runs,
    draw_polygons,
    draw_runs,
    paint,
    read_points,
)
from cps_ray.datasets.prepare.findings import BadItemError

SIZE = (37, 53)


def box(train_id: int, top: int, left: int, bottom: int, right: int) -> Shape:
    return Shape(train_id, lambda: Area(top, left, np.ones((bottom - top, right - left), np.bool_)))


def whole(area: Area, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    return paint([Shape(1, lambda: area)], size, uncovered=0, overlaps="later")


def painted(overlaps: Overlaps, *shapes: Shape) -> list[list[int]]:
    return paint(shapes, (2, 5), uncovered=9, overlaps=overlaps).tolist()


# ------------------------------------------------------------------------------------------------------- overlaps


def test_later_shapes_lie_on_top() -> None:
    assert painted("later", box(1, 0, 0, 2, 3), box(2, 0, 2, 1, 4)) == [[1, 1, 2, 2, 9], [1, 1, 1, 9, 9]]
    assert painted("later", box(2, 0, 2, 1, 4), box(1, 0, 0, 2, 3)) == [[1, 1, 1, 2, 9], [1, 1, 1, 9, 9]]


def test_smaller_shapes_lie_on_top_and_of_equal_ones_the_later() -> None:
    assert painted("smaller", box(2, 0, 2, 1, 4), box(1, 0, 0, 2, 3)) == [[1, 1, 2, 2, 9], [1, 1, 1, 9, 9]]
    assert painted("smaller", box(1, 0, 0, 1, 3), box(2, 0, 1, 1, 4)) == [[1, 2, 2, 2, 9], [9] * 5]
    assert painted("smaller", box(2, 0, 1, 1, 4), box(1, 0, 0, 1, 3)) == [[1, 1, 1, 2, 9], [9] * 5]


def test_pixels_of_several_classes_are_ignored() -> None:
    shapes = box(1, 0, 0, 2, 3), box(2, 0, 2, 1, 4), box(2, 0, 3, 2, 5)
    assert painted("ignore", *shapes) == [[1, 1, 255, 2, 2], [1, 1, 1, 2, 2]], "of one class they are not"
    assert painted("ignore", *shapes, box(2, 0, 2, 1, 3))[0][2] == 255, "whatever follows"
    assert painted("ignore", box(9, 0, 0, 1, 2), box(1, 0, 1, 1, 3)) == [[9, 255, 1, 9, 9], [9] * 5], "9 is a class too"


def test_without_shapes_all_is_uncovered() -> None:
    assert painted("later") == [[9] * 5] * 2


def test_one_area_at_a_time_is_in_memory() -> None:
    shapes = [Shape(1, lambda: Area(0, 0, np.ones((1000, 1000), np.bool_))) for _ in range(30)]
    tracemalloc.start()
    paint(shapes, (1000, 1000), uncovered=0, overlaps="later")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6


# ------------------------------------------------------------------------------------------------ outlines and runs


@pytest.mark.parametrize("seed", range(60))
def test_polygons_have_the_pixels_of_pycocotools(seed: int) -> None:
    draw = np.random.default_rng(seed)
    parts = [draw.uniform(-20, 70, (draw.integers(3, 9), 2)) for _ in range(draw.integers(1, 4))]
    if seed % 3 == 0:  # whole numbers, and points that repeat
        parts = [np.repeat(np.round(part), 2, axis=0) for part in parts]
    theirs = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([part.ravel() for part in parts], *SIZE)))
    assert np.array_equal(whole(draw_polygons(parts, SIZE)), theirs)


@pytest.mark.parametrize("seed", range(60))
def test_compressed_runs_have_the_pixels_of_pycocotools(seed: int) -> None:
    draw = np.random.default_rng(seed)
    size = (int(draw.integers(1, 70)), int(draw.integers(1, 900)))
    mask = np.asfortranarray(np.repeat(draw.random(size) < draw.random(), draw.integers(1, 30), axis=1)[:, : size[1]])
    runs = decode_runs(coco_mask.encode(mask.astype(np.uint8))["counts"])
    assert np.array_equal(whole(draw_runs(runs, size), size), mask)


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([6], [[0, 0, 0], [0, 0, 0]]),
        ([0, 6], [[1, 1, 1], [1, 1, 1]]),
        ([3, 2, 1], [[0, 0, 1], [0, 1, 0]]),
        ([0, 0, 2, 1, 0, 2, 1], [[0, 1, 1], [0, 1, 0]]),
        ([6, 0], [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_runs_go_down_the_columns(runs: list[int], expected: list[list[int]]) -> None:
    assert whole(draw_runs(np.array(runs), (2, 3)), (2, 3)).tolist() == expected


@pytest.mark.parametrize("text", [b"", b"P", b"\x00", b"a\xff", b"oooooooo1", b"1 2"])
def test_damaged_runs_are_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"damaged|longer"):
        decode_runs(text)


def test_points_may_be_flat_or_pairs() -> None:
    assert read_points("a", [1, 2.5, 3, 4]).tolist() == read_points("a", [[1, 2.5], [3, 4]]).tolist()


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (None, "are missing"),
        ("text", "are 'text'"),
        ([1, 2, 3], "of shape (3,)"),
        ([[1, 2, 3]], "of shape (1, 3)"),
        ([[1, 2], [3]], "some are not"),
        ([1, "x"], "some are not"),
        ([{}, {}], "some are not"),
        ([10**400, 1], "some are not"),
        ([[1, None]], "one is nan"),
        ([1, float("nan")], "one is nan"),
        ([float("-inf"), 1], "one is -inf"),
        ([1e7, 1], "at most 1000000 px, but one is 1e+07"),
        ([0] * 2_000_002, "at most 1000000 points"),
        ([[0, 0]] * 1_000_001, "at most 1000000 points"),
    ],
)
def test_what_is_no_list_of_points_is_refused(values: Any, found: str) -> None:
    with pytest.raises(BadItemError) as caught:
        read_points("a.json, shape 3", values)
    assert found in caught.value.finding.found
    assert caught.value.finding.where == "a.json, shape 3"


def test_outlines_that_cannot_be_drawn_are_refused() -> None:
    with pytest.raises(BadItemError, match="at least 3 points, but this has 2"):
        check_polygon("a", np.zeros((2, 2)))
    with pytest.raises(BadItemError, match="at most 2000000 px long, but this is 3999996"):
        check_polygon("a", np.array([[0, 0], [999_999, 0]] * 2))


def test_points_far_out_need_no_memory() -> None:
    far = np.array([[-900_000.0, -5], [20, 20], [-900_000, 30]])
    check_polygon("a", far)
    theirs = coco_mask.decode(coco_mask.frPyObjects([far.ravel()], *SIZE))[..., 0]
    assert np.array_equal(whole(draw_polygons([far], SIZE)), theirs)
    assert whole(partial(draw_polygons, [far + 500_000], SIZE)()).sum() == 0
