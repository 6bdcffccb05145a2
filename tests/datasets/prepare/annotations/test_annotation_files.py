"""Files of other tools are named, with how to export what can be read."""

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from fuzzing import TEXT, damaged, fuzz

from cps_ray.datasets.prepare.annotations.files import foreign_annotation, read_json
from cps_ray.datasets.prepare.findings import BadItemError

COCO = {"images": [], "annotations": [], "categories": []}
LABELME = {"version": "5.5.0", "shapes": [], "imagePath": "a.jpg"}
FOREIGN: list[tuple[Any, str, str]] = [
    ([{"image_id": 1, "category_id": 1, "score": 0.5}], "results in COCO's form", "that has `images` and `categories`"),
    ([{"id": 1, "annotations": [], "data": {"image": "a"}}], "Label Studio's own json", "export as `COCO`"),
    ([{"image": "a", "id": 1, "annotation_id": 3}], "Label Studio's own json", "export as `COCO`"),
    ([{"data_row": {}}], "Labelbox's json", "export as COCO"),
    ({"_via_settings": {}, "_via_img_metadata": {}}, "VIA's json", "export as `COCO format`"),
    ({"a.jpg123": {"filename": "a.jpg", "size": 123, "regions": []}}, "VIA's json", "export as `COCO format`"),
    (
        {"description": "", "tags": [], "size": {}, "objects": []},
        "Supervisely's json",
        "export as COCO json, or as masks",
    ),
    ({"info": {}, "categories": {}, "items": []}, "Datumaro's json", "export as COCO"),
    ({"version": "2.0", "item": {}, "annotations": []}, "V7 Darwin's json", "export as COCO"),
    ({"type": "FeatureCollection", "features": []}, "GeoJSON", "export as COCO"),
    ({"images": [], "info": {}}, "COCO json without annotations", "use the file that has `annotations`"),
]
BYTES: list[tuple[bytes, str, str]] = [
    (b'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1', "CVAT's XML", "`Segmentation mask 1.1`"),
    (b"<annotation><folder>a</folder><polygon/>", "XML of Pascal VOC or of MIT's LabelMe", "export as COCO json"),
    (b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "XML", "export as COCO json"),
    ("<annotations>".encode("utf-16"), "CVAT's XML", "`COCO 1.0`"),
    (b"<", "XML", "export as COCO json"),
    (b"PK\x03\x04rest", "an archive", "unpack it"),
    (b"\x1f\x8brest", "an archive", "unpack it"),
    (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer", "run `git lfs pull`"),
]


@pytest.mark.parametrize(("document", "what", "remedy"), FOREIGN)
def test_json_of_other_tools(document: Any, what: str, remedy: str) -> None:
    data = json.dumps(document).encode()
    told = foreign_annotation(data, "a.JSON") or ""
    assert told.startswith(f"seems to be {what}; ")
    assert remedy in told
    for wanted in ("COCO json", "LabelMe json"):
        with pytest.raises(BadItemError) as caught:
            read_json("x/a.json", data, wanted)
        assert str(caught.value) == f"x/a.json: it must be {wanted}, but {told}."


@pytest.mark.parametrize(("data", "what", "remedy"), BYTES)
def test_files_that_are_no_json(data: bytes, what: str, remedy: str) -> None:
    told = foreign_annotation(data, "a.xml") or ""
    assert what in told
    assert remedy in told
    with pytest.raises(BadItemError) as caught:
        read_json("x/a.json", data, "COCO json")
    assert str(caught.value) == f"x/a.json: {told}."


def test_text_of_boxes() -> None:
    told = "seems to be YOLO's text with boxes and no outlines; export for segmentation, with polygons"
    assert foreign_annotation(b"0 0.5 0.5 1e-1 .25\r\n1 0.1 0.1 0.1 0.1\n", "a.txt") == told
    assert foreign_annotation(b"0 0.5 0.5 0.1 0.1 0.2 0.2\n", "a.txt") is None


def test_what_can_be_read_or_is_not_known_is_not_named() -> None:
    for data in (json.dumps(COCO).encode(), json.dumps(LABELME).encode(), b"{}", b"[]", b"3", b"[3", b"", b"[" * 10**5):
        assert foreign_annotation(data, "a.json") is None
    assert foreign_annotation(b"# label:color_rgb:parts:actions\nbackground:0,0,0::\n", "labelmap.txt") is None
    assert foreign_annotation(b"images/a b c d e\n", "list.txt") is None


def test_the_other_kind_that_can_be_read_is_named() -> None:
    with pytest.raises(BadItemError, match=r"it must be COCO json, but seems to be LabelMe json; read it as LabelMe\."):
        read_json("a.json", json.dumps(LABELME).encode(), "COCO json")
    with pytest.raises(BadItemError, match=r"it must be LabelMe json, but seems to be COCO json; read it as COCO\."):
        read_json("a.json", json.dumps(COCO).encode(), "LabelMe json")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"{}", "it must be COCO json, but seems to be something else; export it again as COCO json"),
        (b"", "it must be JSON, but is not (Expecting value: line 1 column 1 (char 0)); get the file again"),
        (b'{"a": 1}\n{"a": 2}', "it must be JSON, but is not (Extra data"),
        (b'{"a": "\xc4"}', "it must be UTF-8, but byte 7 is not; save it as UTF-8"),
        (b"\xff\xfe{\x00}\x00", "it must be UTF-8, but byte 0 is not; save it as UTF-8"),
        pytest.param(b"1" * 5000, "it must be JSON, but is not (Exceeds the limit", id="digits"),
        pytest.param(b"[" * 10**6, "its lists are nested too deeply", id="deep"),
    ],
)
def test_files_that_are_nothing(data: bytes, line: str) -> None:
    with pytest.raises(BadItemError) as caught:
        read_json("a.json", data, "COCO json")
    assert str(caught.value).startswith(f"a.json: {line}")
    assert "\n" not in str(caught.value)


def test_entities_of_xml_are_not_expanded() -> None:
    laughs = "".join(f'<!ENTITY l{k} "{f"&l{k - 1};" * 10}">' for k in range(1, 20))
    data = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY l0 "ha">{laughs}]><annotation>&l19;</annotation>'.encode()
    tracemalloc.start()
    assert (
        foreign_annotation(data, "a.xml")
        == "seems to be XML of Pascal VOC or of MIT's LabelMe; export as COCO json, or as masks"
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e5


def test_damaged_files_have_a_kind_or_none() -> None:
    documents = [json.dumps(document).encode() for document, *_ in FOREIGN]

    def use(changed: bytes) -> None:
        for name in ("a.json", "a.txt", "a.xml"):
            foreign_annotation(changed, name)
        read_json("a.json", changed, "COCO json")

    fuzz(json.dumps(COCO).encode(), use)
    for data in documents:  # none of them is COCO json, whatever is damaged
        draw = np.random.default_rng(0)
        for _ in range(200):
            with pytest.raises(BadItemError):
                use(damaged(data, draw, TEXT))
