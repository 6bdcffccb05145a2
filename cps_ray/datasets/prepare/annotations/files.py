"""Annotation files are read within bounds, and those of other tools are told apart by what they hold."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cps_ray.datasets.prepare.annotations.shapes import Size, refused, shown
from cps_ray.text import nearest

_MAX_BYTES = 512 * 2**20
_HEAD = 4096
"""Bytes in which a file's kind shows."""
_TO_COCO = "export as COCO json with polygons"
_XML = {
    "annotations": ("CVAT's XML", "export as `COCO 1.0` or `Segmentation mask 1.1`"),
    "annotation": ("XML of Pascal VOC or of MIT's LabelMe", "export as COCO json, or as masks"),
    "root": ("LabelU's XML", _TO_COCO),
}
"""Name of the outermost element -> what the file is, and what to do."""


def read_file(path: str) -> bytes:
    """Returns the bytes of an annotation file. BadItemError if it cannot be read, or is so large that it must not be."""
    try:
        if not Path(path).is_file():
            raise refused("file is unreadable", path, "it must be a file, but is none", "correct the path")
        size = Path(path).stat().st_size
        if size > _MAX_BYTES:
            found = f"an annotation file must have at most {_MAX_BYTES >> 20} MB, but has {size >> 20}"
            raise refused("file is too large", path, found, "export it in parts")
        return Path(path).read_bytes()
    except OSError as error:
        found, remedy = f"the file cannot be read ({error.strerror})", "get it again, or fix its permissions"
        raise refused("file is unreadable", path, found, remedy) from None


def read_json(path: str, data: bytes, wanted: str) -> Any:
    """Returns the JSON object in the bytes of a file, which must be `wanted`: COCO json, or LabelMe json. Else BadItemError."""
    rule, get_again = "annotation is unreadable", f"get the file again, or export it again as {wanted}"
    try:
        document = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        found, remedy = _foreign_bytes(data) or (f"it must be UTF-8, but byte {error.start} is not", "save it as UTF-8")
        raise refused(rule, path, found, remedy) from None
    except RecursionError:
        raise refused(rule, path, "its lists are nested too deeply to be annotations", get_again) from None
    except ValueError as error:
        found, remedy = _foreign_bytes(data) or (f"it must be JSON, but is not ({str(error)[:100]})", get_again)
        raise refused(rule, path, found, remedy) from None
    what, remedy = json_kind(document) or ("something else", f"export it again as {wanted}")
    if what != wanted:
        found = f"it must be {wanted}, but seems to be {what}"
        raise refused("annotation is of another kind", path, found, remedy)
    return document


def json_kind(document: Any) -> tuple[str, str] | None:
    """Returns whose a JSON document seems to be, and what to do with it. None: nobody's that is known here."""
    if isinstance(document, list):
        keys = set(document[0]) if document and isinstance(document[0], dict) else set()
        if {"image_id", "category_id"} <= keys:
            return "results in COCO's form", "use the annotations, the file that has `images` and `categories`"
        if keys & {"annotations", "completions", "annotation_id", "lead_time"}:
            return "Label Studio's own json", "export as `COCO`, or as `Brush labels to PNG`"
        return ("Labelbox's json", _TO_COCO) if keys & {"data_row", "Labeled Data"} else None
    if not isinstance(document, dict):
        return None
    if {"images", "annotations", "categories"} <= document.keys():
        return "COCO json", "read it as COCO"
    if "shapes" in document:
        return "LabelMe json", "read it as LabelMe"
    if document.get("type") in ("FeatureCollection", "Feature"):
        return "GeoJSON", _TO_COCO
    if "images" in document:
        return "COCO json without annotations", "use the file that has `annotations` and `categories`"
    if any(key in document for key in ("_via_settings", "_via_img_metadata")) or _values_have(document, "regions"):
        return "VIA's json", "export as `COCO format`"
    if "objects" in document and ("size" in document or "tags" in document):
        return "Supervisely's json", "export as COCO json, or as masks"
    if {"items", "categories"} <= document.keys() or "dm_format_version" in document:
        return "Datumaro's json", _TO_COCO
    if "data_row" in document:
        return "Labelbox's json", _TO_COCO
    if {"item", "annotations"} <= document.keys():
        return "V7 Darwin's json", _TO_COCO
    return None


def foreign_annotation(data: bytes, name: str) -> str | None:
    """Returns what a file, given its bytes and name, seems to be, and what to do, after `; `: the end of a sentence.

    None if it may be what is read here: COCO json, LabelMe json, YOLO text with outlines, `labelmap.txt`; or nothing that is known.
    """
    known = _foreign_bytes(data)
    if not known and (name.lower().endswith(".json") or data[:1] in (b"{", b"[")):
        try:
            kind = json_kind(json.loads(data.decode("utf-8-sig")))
        except (ValueError, RecursionError):
            kind = None
        known = (f"seems to be {kind[0]}", kind[1]) if kind and kind[0] not in ("COCO json", "LabelMe json") else None
    if not known and name.lower().endswith(".txt"):
        first = data[:_HEAD].split(b"\n", 1)[0].split()
        if len(first) == 5 and all(map(_is_number, first)):
            known = "seems to be YOLO's text with boxes and no outlines", "export for segmentation, with polygons"
    return "; ".join(known) if known else None


def train_id_of(where: str, label: str, train_ids: Mapping[str, int]) -> int:
    """Returns the train id, or IGNORE, that a label of an export means. BadItemError if it means none."""
    if label not in train_ids:
        near = nearest(label, train_ids)
        remedy = "add it to a class's `labels`, or to `ignore_labels`, in the recipe"
        found = f"every label must be one of a class, but {label!r} is of none"
        raise refused(
            "label has no class", where, found, f"did you mean {near!r}? If not, {remedy}" if near else remedy
        )
    return train_ids[label]


def check_size(path: str, declared: Any, size: Size) -> None:
    """Raises BadItemError unless `declared`, the [height, width] that the annotations are for, is the (height, width) of the photo."""
    if tuple(declared) == size:
        return
    height, width = size
    missing = any(value is None for value in declared)
    said = "the file says none" if missing else f"was made for {shown(declared[1])} x {shown(declared[0])}"
    found = f"annotations must be made for the photo's size, {width} x {height} px, but {said}"
    remedy = "export it again with the size of the images, from the same photos"
    if tuple(declared) == (width, height):
        remedy = "one is turned by its EXIF orientation: save the photo the right way up and annotate that"
    raise refused("annotation is of another size", path, found, remedy)


def is_name(value: Any) -> bool:
    """Returns whether a value is text that can be written and is not empty; JSON may hold halves of characters."""
    return isinstance(value, str) and bool(value) and value.encode("utf-8", "replace").decode() == value


def _foreign_bytes(data: bytes) -> tuple[str, str] | None:
    """Returns what a file that is no JSON seems to be, and what to do."""
    head = data[:_HEAD]
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer", "run `git lfs pull`"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!")):
        return "seems to be an archive", "unpack it"
    text = head.decode("utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig", "replace").lstrip()
    if text.startswith("<"):
        root = re.search(r"<([A-Za-z_][\w:.-]*)", text)
        what, remedy = _XML.get(root[1] if root else "", ("XML", "export as COCO json with polygons, or as masks"))
        return f"seems to be {what}", remedy
    return None


def _values_have(document: dict[str, Any], key: str) -> bool:
    first = next(iter(document.values()), None)
    return isinstance(first, dict) and key in first


def _is_number(text: bytes) -> bool:
    return re.fullmatch(rb"[-+]?\d*\.?\d+(e[-+]?\d+)?", text.lower()) is not None
