"""Outlines and runs become areas of an image, and areas become a mask of train ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from cps_ray.datasets.prepare.findings import BadItemError, Finding
from cps_ray.engine.batch import IGNORE

Overlaps = Literal["later", "smaller", "ignore"]
Size = tuple[int, int]
"""(height, width) in px."""
_MAX_POINTS = 1_000_000
_MAX_COORDINATE = 1_000_000
"""Largest distance in px of a point from the image's corner; pycocotools counts fifths of pixels in 32 bits."""
_MAX_OUTLINE_PX = 2_000_000
"""Longest outline; pycocotools needs some 100 bytes for each of its pixels."""
_RUN_DIGIT_BITS = 5
_MAX_SHOWN = 60
"""Characters of a value in a message."""


@dataclass(frozen=True, slots=True)
class Area:
    """Some pixels of an image."""

    top: int
    left: int
    mask: NDArray[np.bool_]
    """(h, w): which pixels of the box at (top, left), all of it in the image, belong to the area."""


@dataclass(frozen=True, slots=True)
class Shape:
    """An area and its class."""

    train_id: int
    """0..C-1, or IGNORE."""
    draw: Callable[[], Area]
    """Draws the area. It is called when the shape is painted, so that one area at a time is in memory."""


def refused(rule: str, where: str, found: str, remedy: str) -> BadItemError:
    """Returns the error of a file, or of one shape in it, that cannot be used; see `Finding`."""
    return BadItemError(Finding(rule, where, found, remedy))


def shown(value: Any) -> str:
    """Returns a value of a file for a message: quoted if it is text, and short."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def paint(shapes: Sequence[Shape], size: Size, *, uncovered: int, overlaps: Overlaps) -> NDArray[np.uint8]:
    """Paints shapes in order into a mask uint8 (H, W) of train ids.

    `uncovered`: train id of pixels without a shape. `overlaps`: what lies on top, the later shape or the smaller one; "ignore":
    where shapes of different classes overlap, the pixels are IGNORE. BadItemError if a shape cannot be drawn.
    """
    if overlaps == "smaller":
        # Stable: of areas of one size the later lies on top.
        shapes = sorted(shapes, key=lambda shape: -int(np.count_nonzero(shape.draw().mask)))
    mask = np.full(size, uncovered, np.uint8)
    claimed = np.zeros(size, np.bool_)
    for shape in shapes:
        area = shape.draw()
        height, width = area.mask.shape
        box = np.s_[area.top : area.top + height, area.left : area.left + width]
        train_id = np.uint8(shape.train_id)
        if overlaps == "ignore":
            disputed = area.mask & claimed[box] & (mask[box] != train_id)
            claimed[box] |= area.mask
            np.copyto(mask[box], train_id, where=area.mask)
            np.copyto(mask[box], np.uint8(IGNORE), where=disputed)
        else:
            np.copyto(mask[box], train_id, where=area.mask)
    return mask


# --------------------------------------------------------------------------------------------------------- outlines


def read_points(where: str, values: Any) -> NDArray[np.float64]:
    """Returns points (N, 2) of x, y from `[x1, y1, x2, ...]` or `[[x1, y1], ...]`. BadItemError if they are none."""
    rule, remedy = "points are wrong", "draw it again, or remove it"
    if not isinstance(values, list):
        raise refused(rule, where, f"points must be a list of numbers, but are {shown(values)}", remedy)
    if len(values) > 2 * _MAX_POINTS:
        raise refused(rule, where, f"an outline must have at most {_MAX_POINTS} points, but has more", remedy)
    try:
        numbers = np.array(values, np.float64)
    except (ValueError, TypeError, OverflowError):
        raise refused(rule, where, "points must be pairs of numbers, but some are not", remedy) from None
    if numbers.ndim == 1 and len(numbers) % 2 == 0:
        numbers = numbers.reshape(-1, 2)
    if numbers.ndim != 2 or numbers.shape[1] != 2:
        found = f"points must be pairs x, y, but these are numbers of shape {numbers.shape}"
        raise refused(rule, where, found, remedy)
    if len(numbers) > _MAX_POINTS:
        raise refused(rule, where, f"an outline must have at most {_MAX_POINTS} points, but has {len(numbers)}", remedy)
    outside = ~(np.abs(numbers) <= _MAX_COORDINATE)  # NaN is no number that is small enough
    if outside.any():
        found = f"coordinates must be numbers of at most {_MAX_COORDINATE} px, but one is {numbers[outside][0]:g}"
        raise refused(rule, where, found, remedy)
    return numbers


def check_polygon(where: str, points: NDArray[np.float64]) -> None:
    """Raises BadItemError if (N, 2) points are too few for a polygon, or if its outline is too long to be drawn."""
    rule, remedy = "points are wrong", "draw it again, or remove it"
    if len(points) < 3:
        raise refused(rule, where, f"a polygon must have at least 3 points, but this has {len(points)}", remedy)
    length = np.abs(np.diff(points, axis=0, append=points[:1])).max(axis=1).sum()
    if length > _MAX_OUTLINE_PX:
        found = f"an outline must be at most {_MAX_OUTLINE_PX} px long, but this is {length:.0f}"
        raise refused(rule, where, found, remedy)


def draw_polygons(parts: Sequence[NDArray[np.float64]], size: Size) -> Area:
    """Draws the union of polygons, each checked points (N, 2), as pycocotools does: even-odd inside, clipped to the image."""
    runs = coco_mask.merge(coco_mask.frPyObjects([part.ravel() for part in parts], *size))
    return draw_runs(decode_runs(runs["counts"]), size)


# ------------------------------------------------------------------------------------------------------------- runs


def decode_runs(text: bytes) -> NDArray[np.int64]:
    """Returns the lengths of runs from COCO's compressed text. ValueError if it is none.

    pycocotools has a reader too, but where runs are too few it leaves the rest of a mask as the memory happened to be.
    """
    # 6 bits a byte, from 48: 5 of the number, the lowest first, and one that says that more follow.
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(digits & 32 == 0)
    if not len(last) or last[-1] != len(digits) - 1 or digits.min() < 0 or digits.max() > 63:
        raise ValueError("the text is damaged")
    first = np.concatenate(([0], last[:-1] + 1))
    length = last - first + 1
    if length.max() > 7:
        raise ValueError("a run is longer than any image")
    place = np.arange(len(digits)) - np.repeat(first, length)
    runs = np.add.reduceat((digits & 31) << _RUN_DIGIT_BITS * place, first)
    runs -= np.where(digits[last] & 16, 1 << _RUN_DIGIT_BITS * length, 0)  # the highest bit is the sign
    # From the fourth on, what is stored is the difference to the run before the last.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return np.asarray(runs, np.int64)


def draw_runs(runs: NDArray[np.int64], size: Size) -> Area:
    """Draws runs, in turns outside and inside of the area, down the columns of the image, all of which they fill."""
    height = size[0]
    ends = np.cumsum(runs)
    starts, stops = ends[0::2][: len(ends) // 2], ends[1::2]
    inside = np.flatnonzero(stops > starts)
    if not len(inside):
        return Area(0, 0, np.zeros((0, 0), np.bool_))
    # Only the columns and rows that the area touches: most are small, and there may be many.
    left, right = int(starts[inside[0]]) // height, -(-int(stops[inside[-1]]) // height)
    lengths = np.diff(np.clip(ends, left * height, right * height), prepend=left * height)
    columns = np.repeat(np.arange(len(runs)) % 2 == 1, lengths.astype(np.int64)).reshape(right - left, height)
    rows = np.flatnonzero(columns.any(axis=0))
    return Area(int(rows[0]), left, columns[:, rows[0] : rows[-1] + 1].T)
