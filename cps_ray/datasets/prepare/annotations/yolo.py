"""YOLO's text for segmentation: one file per image, one polygon per line, in fractions of the image's sides."""

import io
from collections.abc import Mapping
from functools import partial

import yaml

from cps_ray.datasets.prepare.annotations.files import is_name, read_file, train_id_of
from cps_ray.datasets.prepare.annotations.shapes import (
    Shape,
    Size,
    check_polygon,
    draw_polygons,
    read_points,
    refused,
    shown,
)

_MAX_FIELDS = 2_000_002
"""A line is split at most so often; then it has too many points for `read_points`."""
_TOLERANCE = 0.01
"""How far beyond 0..1 a point may lie. Tools round; what lies farther out was not divided by the sides."""
_MAX_YAML_BYTES = 2**20
"""A longer data.yaml would take minutes to read."""
_BAD_LINE, _AGAIN = "line is unreadable", "export it again for segmentation"


def read_yolo_names(path: str) -> dict[int, str]:
    """Returns class number -> name from the `names` of a data.yaml. BadItemError if it has none."""
    data = read_file(path)
    rule, remedy = "names are unreadable", "give it `names: [road, car]`"
    if len(data) > _MAX_YAML_BYTES:
        raise refused(rule, path, f"it must have at most {_MAX_YAML_BYTES} bytes, but has {len(data)}", remedy)
    try:
        # BaseLoader keeps all as text: a class may be named `no` or `1`, which are no text elsewhere.
        document = yaml.load(data.decode("utf-8-sig"), Loader=yaml.BaseLoader)  # nothing but text, lists and mappings
        names = document["names"]
        table = {int(key): name for key, name in (dict(enumerate(names)) if isinstance(names, list) else names).items()}
        if table and len(table) == len(names) and all(map(is_name, table.values())):
            return table
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        pass
    raise refused(rule, path, "it must be YAML with a list or a mapping `names`, but is not", remedy)


def yolo_shapes(
    path: str, data: bytes, size: Size, names: Mapping[int, str], train_ids: Mapping[str, int]
) -> list[Shape]:
    """Returns the shapes in `data`, the bytes of the file at `path`; none if it is empty.

    Polygons are drawn as pycocotools draws x * width and y * height. `size`: (height, width) of the photo in px. `names`: class
    number -> name; `train_ids`: name -> train id, or IGNORE. BadItemError if a line is no polygon of a known class.
    """
    shapes = []
    for number, line in enumerate(io.BytesIO(data), start=1):
        where = f"{path}:{number}"
        fields = line.split(maxsplit=_MAX_FIELDS)
        if not fields:
            continue
        if len(fields) == 5:
            found = "a line must be a class and the points of a polygon, but this is a box, with no outline"
            raise refused("annotation has no outline", where, found, _AGAIN)
        if not fields[0].isdigit() or len(fields[0]) > 9 or int(fields[0]) not in names:
            found = f"a line must begin with a class's number in `names`, but begins with {shown(fields[0].decode('utf-8', 'replace'))}"
            raise refused(_BAD_LINE, where, found, "use the data.yaml of this export")
        if len(fields) % 2 == 0:
            found = f"a polygon must have pairs x y, but this line has {len(fields) - 1} numbers"
            raise refused(_BAD_LINE, where, found, f"{_AGAIN}, without confidences")
        train_id = train_id_of(where, names[int(fields[0])], train_ids)
        fractions = read_points(where, fields[1:])
        if fractions.min(initial=0) < -_TOLERANCE or fractions.max(initial=0) > 1 + _TOLERANCE:
            found = f"points must be fractions, 0..1, of the sides, but are {fractions.min():g}..{fractions.max():g}"
            raise refused("points are wrong", where, found, "divide x by the width and y by the height")
        points = fractions * size[::-1]
        check_polygon(where, points)
        shapes.append(Shape(train_id, partial(draw_polygons, [points], size)))
    return shapes
