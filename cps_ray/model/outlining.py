"""Outlines of a mask's regions, as polygons that annotation tools edit: drawn again they are the mask, pixel for pixel."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import cv2
import numpy as np
from numpy.typing import NDArray

# H W pixels of a mask, h w of a region's box. Points are (x, y); pixel (column, row) is the square from it to (column + 1, row + 1).
Points = NDArray[np.float64]
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))
"""East, south, west, north: each turns to the right of the one before."""
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
_INTO_PIXEL = 0.01
"""How far inside of its pixel's edge a corner is set for tools that round down to pixels and paint those on the outline, too."""


@dataclass(frozen=True, slots=True)
class MaskRegion:
    """Pixels of one class that touch each other at their sides."""

    label: int
    top: int
    left: int
    inside: NDArray[np.bool_]
    """(h, w): which pixels of the box at (top, left) belong to the region."""

    def painted(self) -> tuple[Points, float]:
        """Returns the outer outline, for tools that paint outlines one over the other, and the area in px that it encloses.

        Holes are painted, too: regions inside of them must come later. In order of decreasing area they do. Every pixel on the outline
        is painted by such tools (labelme, by Pillow), hence the corners lie inside of them.
        """
        (corners, turns), *_ = sorted(_loops(self.inside), key=lambda loop: -_area(loop[0]))
        return corners + _INTO_PIXEL * turns + (self.left, self.top), _area(corners)

    def filled(self) -> list[Points]:
        """Returns polygons without holes that fill the region together and do not overlap: a region with holes is cut through them.

        Corners are those of the pixels, as COCO has them.
        """
        return [np.add(corners, (self.left, self.top)) for corners in _cut_open(self.inside)]


def regions(mask: NDArray[np.uint8]) -> Iterator[MaskRegion]:
    """Yields the regions of a mask (H, W), class by class."""
    for label in np.unique(mask).tolist():
        for top, left, inside in _components(mask == label):
            yield MaskRegion(label, top, left, inside)


def without_specks(mask: NDArray[np.uint8], smallest_px: int) -> NDArray[np.uint8]:
    """Returns the mask (H, W) with regions of fewer than `smallest_px` pixels given to the class of most pixels beside them."""
    cleaned = mask.copy()
    for _ in range(smallest_px):  # what is given away may lie beside another speck, or make one larger
        specks = [each for each in regions(cleaned) if np.count_nonzero(each.inside) < smallest_px]
        for speck in sorted(specks, key=lambda each: int(np.count_nonzero(each.inside))):
            height, width = speck.inside.shape
            top, left = max(0, speck.top - 1), max(0, speck.left - 1)
            around = cleaned[top : speck.top + height + 1, left : speck.left + width + 1]
            inside = np.zeros(around.shape, np.uint8)
            inside[speck.top - top :, speck.left - left :][:height, :width] = speck.inside
            beside = around[(cv2.dilate(inside, _CROSS) > 0) & (inside == 0)]
            if beside.size and (beside != speck.label).all():  # else another speck has joined it meanwhile
                around[inside > 0] = np.bincount(beside).argmax()
        if not specks:
            break
    return cleaned


def _components(inside: NDArray[np.bool_]) -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
    """Yields (top, left, pixels of the box) of what hangs together at pixels' sides."""
    count, number_of, boxes, _ = cv2.connectedComponentsWithStats(inside.astype(np.uint8), connectivity=4)
    for number in range(1, count):
        left, top, width, height = boxes[number, :4].tolist()
        yield top, left, number_of[top : top + height, left : left + width] == number


def _loops(inside: NDArray[np.bool_]) -> list[tuple[Points, Points]]:
    """Returns the outlines of a region (h, w), that of the whole clockwise and those of its holes the other way round.

    Each as corners (N, 2), and for each corner the direction (N, 2) of the pixel inside of it.
    """
    padded = np.pad(inside, 1)
    edges: set[tuple[int, int, int]] = set()
    # (x, y) where an edge begins, and its direction: the region is to its right.
    for direction, (start_x, start_y) in enumerate(((0, 0), (1, 0), (1, 1), (0, 1))):
        across, down = _STEPS[(direction + 3) % 4]
        beyond = padded[1 + down :, 1 + across :][: inside.shape[0], : inside.shape[1]]
        rows, columns = np.nonzero(inside & ~beyond)
        edges.update(zip((columns + start_x).tolist(), (rows + start_y).tolist(), repeat(direction)))
    loops = []
    for first in sorted(edges):
        if first not in edges:
            continue
        edge, walked = first, list[tuple[int, int, int]]()
        corners, turns = list[tuple[int, int]](), list[tuple[int, int]]()
        while edge != first or not walked:
            walked.append(edge)
            x, y, direction = edge
            x, y = x + _STEPS[direction][0], y + _STEPS[direction][1]
            # To the right where there is a choice, along the same pixel: pixels that touch at a corner alone are no neighbours.
            edge = next(each for turn in (1, 0, 3) if (each := (x, y, (direction + turn) % 4)) in edges)
            if edge[2] != direction:
                corners.append((x, y))
                inward = (_STEPS[(direction + 1) % 4], _STEPS[(edge[2] + 1) % 4])
                turns.append((inward[0][0] + inward[1][0], inward[0][1] + inward[1][1]))
        edges.difference_update(walked)
        loops.append((np.array(corners, np.float64), np.array(turns, np.float64)))
    return loops


def _area(corners: Points) -> float:
    """Returns the area of a polygon in px, negative where it runs counter-clockwise."""
    x, y = corners.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _cut_open(inside: NDArray[np.bool_]) -> Iterator[Points]:
    """Yields polygons that fill a region (h, w): its outline, or those of its parts left and right of a hole's middle."""
    (outline, *holes) = sorted((corners for corners, _ in _loops(inside)), key=lambda corners: -_area(corners))
    if not holes:
        yield outline
        return
    hole = holes[-1]  # the largest
    middle = int(hole[:, 0].min() + hole[:, 0].max() + 1) // 2
    for first, half in ((0, inside[:, :middle]), (middle, inside[:, middle:])):
        for top, left, part in _components(half):
            for corners in _cut_open(part):
                yield np.add(corners, (first + left, top))
