"""LabelMe json: one file per image, with polygons, boxes, circles, lines, points and masks; pixels are those that labelme paints."""

import base64
import io
import math
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cps_ray.datasets.prepare.annotations.files import check_size, is_name, read_json, train_id_of
from cps_ray.datasets.prepare.annotations.shapes import Area, Shape, Size, check_polygon, read_points, refused, shown

_LINE_WIDTH = 10
"""Width in px with which labelme paints lines."""
_POINT_RADIUS = 5
"""Radius in px with which labelme paints points."""
_MAX_RADIUS = 40_000
"""Largest radius in px; from 46 341, whose square has more than 31 bits, Pillow 11 takes minutes."""
_NUM_POINTS = {"rectangle": 2, "circle": 2, "line": 2, "point": 1, "mask": 2, "oriented_rectangle": 4}
"""Kind of shape -> how many points it has; polygons and strips of lines have any number."""
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What Pillow raises on damaged files; found by damaging them at random."""
_DRAW_AGAIN = "draw it again, or remove it"
Corner = tuple[int, int]
"""x, y in px."""


def labelme_shapes(
    path: str, data: bytes, size: Size, train_ids: Mapping[str, int], image: str | None = None
) -> list[Shape]:
    """Returns the shapes in `data`, the bytes of the LabelMe file at `path`; the later lies on top in labelme.

    `size`: (height, width) of the photo in px. `train_ids`: label -> train id, or IGNORE. `image`: path of the photo, whose name
    without suffix must be that in the file; None: any. BadItemError if the file, its size or a shape is not usable.
    """
    document = read_json(path, data, "LabelMe json")
    entries, name = document["shapes"], document.get("imagePath")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise refused(
            "annotation is unreadable", path, "`shapes` must be a list of objects, but is none", "save it again"
        )
    # Only the name: folders are those of the machine on which the file was made.
    if image is not None and is_name(name) and _stem(name) != _stem(image):
        found = f"it must be of {PurePosixPath(image).name!r}, but says that it is of {_file_name(name)!r}"
        raise refused("annotation is of another image", path, found, "rename one, or correct `imagePath` in the file")
    check_size(path, [document.get("imageHeight"), document.get("imageWidth")], size)
    return [_shape(f"{path}, shape {place}", entry, size, train_ids) for place, entry in enumerate(entries, start=1)]


def _shape(where: str, entry: Mapping[str, Any], size: Size, train_ids: Mapping[str, int]) -> Shape:
    label, kind = entry.get("label"), entry.get("shape_type")
    kind = "polygon" if kind is None else kind
    if not is_name(label):
        raise refused("shape has no label", where, f"`label` must be a name, but is {shown(label)}", "give it a label")
    train_id = train_id_of(where, str(label), train_ids)
    points = read_points(where, entry.get("points"))
    if not isinstance(kind, str) or kind not in (*_NUM_POINTS, "polygon", "linestrip"):
        known = ", ".join(sorted((*_NUM_POINTS, "polygon", "linestrip")))
        raise refused(
            "shape is unknown", where, f"`shape_type` must be one of {known}, but is {shown(kind)}", _DRAW_AGAIN
        )
    if kind in ("polygon", "oriented_rectangle"):
        check_polygon(where, points)
    wanted = _NUM_POINTS.get(kind)
    if (len(points) != wanted) if wanted else (len(points) < 2):
        found = f"a {kind} must have {wanted or 'at least 2'} points, but this has {len(points)}"
        raise refused("points are wrong", where, found, _DRAW_AGAIN)
    if kind == "circle" and math.dist(*points) > _MAX_RADIUS:
        found = f"a circle must have a radius of at most {_MAX_RADIUS} px, but this has {math.dist(*points):.0f}"
        raise refused("points are wrong", where, found, _DRAW_AGAIN)
    if kind == "mask":
        return Shape(train_id, partial(_draw_mask, where, points, entry.get("mask"), size))
    return Shape(train_id, partial(_draw_shape, kind, points, size))


def _draw_shape(kind: str, points: NDArray[np.float64], size: Size) -> Area:
    if kind == "circle":
        (x, y), (on_x, on_y) = points
        return _draw_ellipse(x, y, math.sqrt((x - on_x) ** 2 + (y - on_y) ** 2), size)
    if kind == "point":
        return _draw_ellipse(points[0, 0], points[0, 1], _POINT_RADIUS, size)
    if kind == "rectangle":
        corners = _corners([points.min(axis=0), points.max(axis=0)])
        return _draw(corners, 0, size, lambda draw, at: draw.rectangle(at, fill=1, outline=1))
    if kind in ("line", "linestrip"):
        return _draw(_corners(points), _LINE_WIDTH, size, lambda draw, at: draw.line(at, fill=1, width=_LINE_WIDTH))
    return _draw(_corners(points), 0, size, lambda draw, at: draw.polygon(at, fill=1, outline=1))


def _draw_ellipse(x: float, y: float, radius: float, size: Size) -> Area:
    corners = _corners(np.array([(x - radius, y - radius), (x + radius, y + radius)]))
    return _draw(corners, 0, size, lambda draw, at: draw.ellipse(at, fill=1, outline=1))


def _corners(points: Any) -> list[Corner]:
    # Pillow cuts off what is behind the point; so it is done before the shift of `_draw`, to which that is not indifferent.
    return [(int(x), int(y)) for x, y in points]


def _draw(
    corners: list[Corner], margin: int, size: Size, draw: Callable[[ImageDraw.ImageDraw, list[Corner]], None]
) -> Area:
    """Lets `draw` paint corners on an image that has room for them and a margin, but ends where the photo ends."""
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    left, right = max(0, min(xs) - margin), min(size[1], max(xs) + margin + 1)
    top, bottom = max(0, min(ys) - margin), min(size[0], max(ys) + margin + 1)
    if left >= right or top >= bottom:
        return Area(0, 0, np.zeros((0, 0), np.bool_))
    image = Image.new("L", (right - left, bottom - top))
    draw(ImageDraw.Draw(image), [(x - left, y - top) for x, y in corners])
    return Area(top, left, np.asarray(image) > 0)


def _draw_mask(where: str, points: NDArray[np.float64], text: Any, size: Size) -> Area:
    (left, top), (right, bottom) = _corners(points)
    shape = bottom - top + 1, right - left + 1
    if min(left, top) < 0 or right >= size[1] or bottom >= size[0] or min(shape) < 1:
        found = f"the box of a mask must lie in the photo, but is from ({left}, {top}) to ({right}, {bottom})"
        raise refused("points are wrong", where, found, _DRAW_AGAIN)
    try:
        data = base64.b64decode(text)
        # Width and height stand in the first chunk; looked at first, so that a small file cannot become a large image.
        if struct.unpack(">2I", data[16:24]) != shape[::-1]:
            raise ValueError("it is no PNG of the size of its box")
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            mask = np.asarray(image) != 0
        if mask.ndim != 2:
            raise ValueError("it has colours")
    except _DAMAGED as error:
        found = f"`mask` must be a PNG of {shape[1]} x {shape[0]} px in base64, but is not ({str(error)[:100]})"
        raise refused("mask is unreadable", where, found, _DRAW_AGAIN) from None
    return Area(top, left, mask)


def _file_name(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).name


def _stem(path: str) -> str:
    return PurePosixPath(_file_name(path)).stem
