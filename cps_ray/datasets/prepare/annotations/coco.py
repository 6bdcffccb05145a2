"""COCO json: one file with the outlines and runs of many images, as Roboflow, CVAT and Label Studio export it too."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cps_ray.datasets.prepare.annotations.files import check_size, is_name, read_file, read_json, train_id_of
from cps_ray.datasets.prepare.annotations.shapes import (
    Area,
    Shape,
    Size,
    check_polygon,
    decode_runs,
    draw_polygons,
    draw_runs,
    read_points,
    refused,
    shown,
)
from cps_ray.engine.batch import IGNORE

Crowd = Literal["class", "ignore"]
_KEPT = ("id", "category_id", "iscrowd", "segmentation")
"""What an image's text keeps of an annotation; of `bbox` it keeps whether there is one."""
_CHARS_PER_PIXEL = 2
"""More characters of compressed runs than this cannot be needed."""
_AGAIN = "export it again"
_BAD_FILE, _BAD_RUNS = "annotation is unreadable", "runs are wrong"


@dataclass(frozen=True)
class CocoImage:
    """An image that a COCO file lists, and what the file says of it."""

    name: str
    """`file_name`, with `/` between folders; it never leads out of the folder that it is relative to."""
    size: Size | None
    """(height, width) in px as the file says; None where it does not."""
    annotation: str
    """Its size and annotations as compact JSON text, for `coco_shapes`."""


@dataclass(frozen=True)
class CocoFile:
    """What a COCO file holds."""

    path: str
    categories: Mapping[int, str]
    """Id -> name, in the file's order."""
    num_annotations: Mapping[int, int]
    """Category id -> number of annotations. Roboflow adds a category 0, named as the data set is, that has none."""
    images: tuple[CocoImage, ...]
    """Images in the file's order."""


def read_coco(path: str) -> CocoFile:
    """Reads a COCO file. Raises BadItemError if it is none, is too large, or does not say clearly what belongs to which image."""
    try:
        return _read(path, read_json(path, read_file(path), "COCO json"))
    except (
        RecursionError
    ):  # the text of an annotation is nested less deeply than the file, but written by another function
        raise refused(_BAD_FILE, path, "its lists are nested too deeply to be annotations", _AGAIN) from None


def _read(path: str, document: Mapping[str, Any]) -> CocoFile:
    entries = {key: _entries(path, document, key) for key in ("categories", "images", "annotations")}
    categories = {
        _id(path, "categories", place, entry): _name(path, f"categories[{place}].name", entry.get("name"))
        for place, entry in enumerate(entries["categories"])
    }
    texts: dict[int | str, list[str]] = {
        _id(path, "images", place, entry): [] for place, entry in enumerate(entries["images"])
    }
    for key in ("categories", "images"):
        _refuse_repeats(path, f"every `id` in `{key}`", [entry["id"] for entry in entries[key]])
    names = [
        _relative(path, place, _name(path, f"images[{place}].file_name", entry.get("file_name")))
        for place, entry in enumerate(entries["images"])
    ]
    _refuse_repeats(path, "every `file_name` in `images`", names)
    counts = dict.fromkeys(categories, 0)
    for place, entry in enumerate(entries["annotations"]):
        image, category = entry.get("image_id"), entry.get("category_id")
        if not _has(texts, image):
            found = f"annotations[{place}] must be of an image in `images`, but has `image_id` {shown(image)}"
            raise refused(_BAD_FILE, path, found, f"{_AGAIN} with all images")
        if _has(counts, category):
            counts[category] += 1
        kept = {"id": place} | {key: entry[key] for key in _KEPT if key in entry}
        texts[entry["image_id"]].append(json.dumps(kept | {"bbox": bool(entry.get("bbox"))}, separators=(",", ":")))
    images = []
    for name, entry, annotations in zip(names, entries["images"], texts.values(), strict=True):
        declared = [value if _is_side(value) else None for value in (entry.get("height"), entry.get("width"))]
        height, width = declared
        text = f'{{"size":{json.dumps(declared)},"annotations":[{",".join(annotations)}]}}'
        images.append(CocoImage(name, (height, width) if height and width else None, text))
    return CocoFile(path, categories, counts, tuple(images))


def coco_train_ids(coco: CocoFile, train_ids: Mapping[str, int]) -> dict[int, int]:
    """Returns category id -> train id, or IGNORE, from those of labels. BadItemError if a category in use is no label."""
    used = {key: name for key, name in coco.categories.items() if coco.num_annotations[key] or name in train_ids}
    return {key: train_id_of(coco.path, name, train_ids) for key, name in used.items()}


def coco_shapes(path: str, annotation: str, size: Size, train_ids: Mapping[int, int], crowd: Crowd) -> list[Shape]:
    """Returns the shapes of an image, from its text in `read_coco(path)`; pixels are those that pycocotools gives.

    `size`: (height, width) of the photo in px. `train_ids`: category id -> train id. `crowd`: what `iscrowd` means, its class or
    IGNORE; tools may set it for whatever they write as runs, because COCO itself has runs for crowds alone. BadItemError if an
    annotation has no usable outline.
    """
    try:
        document = json.loads(annotation)
    except RecursionError:  # here the stack may be deeper than where the file was read
        raise refused(_BAD_FILE, path, "its lists are nested too deeply to be annotations", _AGAIN) from None
    check_size(path, document["size"], size)
    shapes = []
    for entry in document["annotations"]:
        where = f"{path}, annotation {shown(entry['id'])}"
        category, segmentation = entry.get("category_id"), entry.get("segmentation")
        if not _has(train_ids, category):
            found = f"`category_id` must be one in `categories`, but is {shown(category)}"
            raise refused("category is unknown", where, found, _AGAIN)
        if not segmentation:
            found = f"an annotation must have an outline, but this has {'a box and ' * entry['bbox']}no outline"
            remedy = "draw outlines, or export for segmentation, not for detection"
            raise refused("annotation has no outline", where, found, remedy)
        train_id = IGNORE if crowd == "ignore" and entry.get("iscrowd") else train_ids[category]
        if isinstance(segmentation, dict):
            shapes.append(Shape(train_id, partial(_draw_coco_runs, where, segmentation, size)))
            continue
        if not isinstance(segmentation, list) or not isinstance(segmentation[0], list):
            found = "`segmentation` must be a list of polygons, or runs with `counts` and `size`, but is neither"
            raise refused("annotation has no outline", where, found, _AGAIN)
        parts = [read_points(where, part) for part in segmentation]
        for part in parts:
            check_polygon(where, part)
        shapes.append(Shape(train_id, partial(draw_polygons, parts, size)))
    return shapes


def _draw_coco_runs(where: str, segmentation: Mapping[str, Any], size: Size) -> Area:
    height, width = size
    if segmentation.get("size") != [height, width]:
        found = (
            f"runs must be of the photo's size, [{height}, {width}], but have `size` {shown(segmentation.get('size'))}"
        )
        raise refused(_BAD_RUNS, where, found, f"{_AGAIN} from the same photos")
    counts = segmentation.get("counts")
    runs = _run_lengths(where, counts, height * width)
    # Each is looked at first: a sum of very large ones may overflow to the right number.
    if ((runs < 0) | (runs > height * width)).any() or runs.sum() != height * width:
        found = f"runs must be lengths, 0 or more, that add up to {height * width} px, but add up to {runs.sum()}"
        raise refused(_BAD_RUNS, where, found, _AGAIN)
    return draw_runs(runs, size)


def _run_lengths(where: str, counts: Any, num_pixels: int) -> NDArray[np.int64]:
    found = f"`counts` must be a list of lengths or compressed text, but is {shown(counts)}"
    try:
        if isinstance(counts, str) and len(counts) <= _CHARS_PER_PIXEL * num_pixels + 16:
            return decode_runs(counts.encode("ascii"))
        if isinstance(counts, list) and len(counts) <= num_pixels + 2:
            lengths = np.array(counts, np.float64)
            if lengths.ndim == 1 and (np.abs(lengths) <= num_pixels).all() and (lengths == np.round(lengths)).all():
                return lengths.astype(np.int64)
    except (ValueError, TypeError, OverflowError):
        pass
    raise refused(_BAD_RUNS, where, found, _AGAIN)


def _entries(path: str, document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    entries = document[key]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise refused(_BAD_FILE, path, f"`{key}` must be a list of objects, but is none", _AGAIN)
    return entries


def _id(path: str, key: str, place: int, entry: Mapping[str, Any]) -> Any:
    value = entry.get("id")
    # Images may be numbered with text; categories are numbers, because masks are made of them.
    if isinstance(value, bool) or not isinstance(value, (int, str) if key == "images" else int):
        raise refused(_BAD_FILE, path, f"{key}[{place}].id must be a number, but is {shown(value)}", _AGAIN)
    return value


def _name(path: str, setting: str, value: Any) -> str:
    if not is_name(value):
        raise refused(_BAD_FILE, path, f"{setting} must be a name, but is {shown(value)}", _AGAIN)
    return str(value)


def _relative(path: str, place: int, name: str) -> str:
    """Returns a file name with `/` between folders. BadItemError if it leads elsewhere than into the folder of images."""
    pure = PurePosixPath(name.replace("\\", "/"))
    if pure.is_absolute() or PureWindowsPath(name).drive or ".." in pure.parts or "\0" in name or not pure.name:
        found = f"images[{place}].file_name must be a path inside of the folder of images, but is {shown(name)}"
        raise refused("name leads elsewhere", path, found, "export it with names of files alone")
    return pure.as_posix()


def _refuse_repeats(path: str, what: str, values: Sequence[int | str]) -> None:
    value, count = Counter(values).most_common(1)[0] if values else ("", 1)
    if count > 1:
        raise refused(_BAD_FILE, path, f"{what} must be unique, but {shown(value)} is there {count} times", _AGAIN)


def _is_side(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 1 and value == value // 1


def _has(known: Mapping[Any, Any], key: Any) -> bool:
    # A list is no key, and True would pass for 1.
    return isinstance(key, int | str | float) and not isinstance(key, bool) and key in known
