"""LabelMe files become the pixels that labelme paints; those of another image, size or kind are refused."""

import base64
import json
from typing import Any

import numpy as np
import pytest
from fuzzing import fuzz
from numpy.typing import NDArray
from trees import encoded

from cps_ray.datasets.prepare.annotations.labelme import labelme_shapes
from cps_ray.datasets.prepare.annotations.shapes import paint
from cps_ray.datasets.prepare.findings import BadItemError, Finding

SIZE = HEIGHT, WIDTH = 30, 40
TRAIN_IDS = {"car": 1, "road": 0, "unclear": 255}


def shape(kind: str | None, points: Any, label: Any = "car", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}} | more


def document(*shapes: Any, **more: Any) -> dict[str, Any]:
    about = {"version": "5.5.0", "flags": {}, "imagePath": "..\\photos\\a.jpg", "imageData": "no base64 !"}
    return {**about, "imageHeight": HEIGHT, "imageWidth": WIDTH, "shapes": list(shapes), **more}


def mask_of(content: Any, size: tuple[int, int] = SIZE, image: str | None = "photos/a.png") -> NDArray[np.uint8]:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    shapes = labelme_shapes("a.json", data, size, TRAIN_IDS, image)
    return paint(shapes, size, uncovered=9, overlaps="later")


def refused(content: Any, **more: Any) -> Finding:
    with pytest.raises(BadItemError) as caught:
        mask_of(content, **more)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return caught.value.finding


def png(mask: Any, **options: Any) -> str:
    return base64.b64encode(encoded(np.asarray(mask), "PNG", **options)).decode()


# --------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    ("kind", "points", "rows", "columns"),
    [
        ("rectangle", [[3, 4], [6, 8]], (4, 9), (3, 7)),
        ("rectangle", [[6.9, 4.9], [3.9, 8.9]], (4, 9), (3, 7)),
        ("rectangle", [[-5, -5], [99, 2]], (0, 3), (0, 40)),
        ("polygon", [[3, 4], [6, 4], [6, 8], [3, 8]], (4, 9), (3, 7)),
        (None, [[3, 4], [6, 4], [6, 8], [3, 8]], (4, 9), (3, 7)),
        ("oriented_rectangle", [[3, 4], [6, 4], [6, 8], [3, 8]], (4, 9), (3, 7)),
        ("linestrip", [[10, 5], [20, 5]], (0, 10), (10, 21)),
        ("line", [[20, 25], [10, 25]], (20, 30), (10, 21)),
    ],
)
def test_borders_belong_to_shapes(
    kind: str | None, points: Any, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    expected = np.full(SIZE, 9)
    expected[slice(*rows), slice(*columns)] = 1
    found = mask_of(document(shape(kind, points)))
    if kind in ("line", "linestrip"):  # an even width lies on one side by half a pixel, which Pillow decides
        assert abs(int((found == 1).sum()) - int((expected == 1).sum())) <= 22
        assert (found == 1)[rows[0] + 1 : rows[1] - 1, columns[0] : columns[1]].all()
    else:
        assert np.array_equal(found, expected)


def test_points_and_circles_are_discs() -> None:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for entry, radius in ((shape("point", [[20, 15]]), 5), (shape("circle", [[20, 15], [23, 19]]), 5)):
        found, distance = mask_of(document(entry)) == 1, np.hypot(x - 20, y - 15)
        assert found[distance <= radius].all()
        assert not found[distance >= radius + 0.8].any()


def test_masks_lie_in_their_box() -> None:
    mask = np.array([[1, 0, 1], [0, 0, 1]])
    for text in (png(mask.astype(bool)), png(mask.astype(np.uint8) * 255), png(mask.astype(np.uint8))):
        found = mask_of(document(shape("mask", [[37.0, 28.0], [39.0, 29.0]], mask=text)))
        assert np.argwhere(found == 1).tolist() == [[28, 37], [28, 39], [29, 39]]


def test_later_shapes_lie_on_top_and_groups_mean_nothing() -> None:
    box, line = [[0, 0], [9, 9]], [[5, 5], [30, 25]]
    below = mask_of(document(shape("rectangle", box, "road", group_id=1), shape("rectangle", line, group_id=1)))
    assert (below[5, 5], below[4, 4], below[20, 20]) == (1, 0, 1)
    above = mask_of(
        document(shape("rectangle", line), shape("rectangle", box, "road"), shape("point", [[1, 1]], "unclear"))
    )
    assert (above[5, 9], above[20, 20], above[1, 1]) == (0, 1, 255)


def test_files_without_shapes_have_no_objects() -> None:
    assert np.unique(mask_of(document())).tolist() == [9]


def test_the_kind_may_be_missing_as_in_old_files() -> None:
    entry = shape(None, [[3, 4], [6, 4], [6, 8]])
    del entry["shape_type"]
    assert (mask_of(document(entry)) == 1).any()


def test_shapes_outside_of_the_photo_have_no_pixels() -> None:
    for kind, points in {
        "rectangle": [[50, 4], [60, 8]],
        "circle": [[-50, 4], [-40, 8]],
        "polygon": [[0, 90], [9, 90], [9, 99]],
        "line": [[900, 1], [900, 9]],
        "point": [[-6, -6]],
    }.items():
        assert not (mask_of(document(shape(kind, points))) == 1).any()


def random_shape(draw: np.random.Generator, kind: str, scale: int) -> dict[str, Any]:
    count = {"polygon": 7, "linestrip": 5, "point": 1, "oriented_rectangle": 4}.get(kind, 2)
    points = draw.uniform(-25 * scale, 65 * scale, (count, 2)).round(draw.integers(0, 3))
    entry = shape(kind, points.tolist(), str(draw.choice(list(TRAIN_IDS))))
    if kind == "mask":
        left, top, height, width = draw.integers([0, 0, 1, 1], [20, 15, 16, 21])
        entry["points"] = [[float(left), float(top)], [left + width - 1.0, top + height - 1.0]]
        entry["mask"] = png(draw.random((height, width)) < 0.5)
    return entry


def test_pixels_are_those_of_labelme() -> None:
    """Skipped without labelme, which needs Qt; then only the literal pixels above are compared."""
    utils = pytest.importorskip("labelme.utils", reason="needs labelme to compare pixels with", exc_type=ImportError)
    draw = np.random.default_rng(0)
    kinds = ["polygon", "rectangle", "circle", "line", "linestrip", "point", "oriented_rectangle", "mask"]
    for place in range(500):
        scale = 20 if place % 5 == 0 else 1  # far out, now and then
        entries = [random_shape(draw, str(kind), scale) for kind in draw.choice(kinds, 6)]
        masks = [{"mask": utils.img_b64_to_arr(entry["mask"]) > 0} if "mask" in entry else {} for entry in entries]
        theirs = [entry | mask for entry, mask in zip(entries, masks, strict=True)]
        classes, instances = utils.shapes_to_label(SIZE, theirs, TRAIN_IDS)
        assert np.array_equal(mask_of(document(*entries)), np.where(instances > 0, classes, 9)), place


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (shape("polygon", [[1, 2], [3, 4]]), "a polygon must have at least 3 points, but this has 2"),
        (shape("rectangle", [[1, 2]]), "a rectangle must have 2 points, but this has 1"),
        (shape("circle", [[1, 2]] * 3), "a circle must have 2 points, but this has 3"),
        (shape("linestrip", [[1, 2]]), "a linestrip must have at least 2 points, but this has 1"),
        (
            shape("rotation", [[1, 2]] * 4),
            "`shape_type` must be one of circle, line, linestrip, mask, oriented_rectangle,",
        ),
        (shape("", [[1, 2]] * 4), "`shape_type` must be one of"),
        (shape(None, [[1, 2]] * 4, shape_type=[]), "`shape_type` must be one of"),
        (shape("polygon", []), "a polygon must have at least 3 points, but this has 0"),
        (shape("polygon", None), "points must be a list of numbers, but are missing"),
        (shape("polygon", [[1, 2], [3, 4], [5, float("inf")]]), "but one is inf"),
        (shape("circle", [[0, 0], [9e9, 0]]), "but one is 9e+09"),
        (shape("polygon", [[1, 2]] * 3, None), "`label` must be a name, but is missing"),
        (shape("polygon", [[1, 2]] * 3, "\ud800"), "`label` must be a name, but is '\\ud800'"),
        (shape("polygon", [[1, 2]] * 3, "cars"), "every label must be one of a class, but 'cars' is of none"),
        (shape("mask", [[1, 2], [3, 4]]), "`mask` must be a PNG of 3 x 3 px in base64"),
        (shape("mask", [[1, 2], [3, 4]], mask=3), "`mask` must be a PNG of 3 x 3 px in base64"),
        (shape("mask", [[1, 2], [3, 4]], mask="!"), "`mask` must be a PNG of 3 x 3 px in base64"),
        (
            shape("mask", [[1, 2], [3, 4]], mask=png(np.ones((2, 3), bool))),
            "3 px in base64, but is not (it is no PNG of the size",
        ),
        (shape("mask", [[1, 2], [3, 4]], mask=png(np.ones((3, 3, 3), np.uint8))), "it has colours"),
        (shape("mask", [[1, 2], [3, 4]], mask=png(np.ones((3, 3), bool))[:60]), "`mask` must be a PNG"),
        (
            shape("mask", [[38, 2], [40, 4]], mask=png(np.ones((3, 3), bool))),
            "must lie in the photo, but is from (38, 2) to (40, 4)",
        ),
        (shape("mask", [[-1, 2], [1, 4]], mask=png(np.ones((3, 3), bool))), "must lie in the photo"),
        (shape("mask", [[3, 4], [1, 2]], mask=png(np.ones((3, 3), bool))), "must lie in the photo"),
    ],
)
def test_shapes_that_have_no_pixels(entry: dict[str, Any], found: str) -> None:
    finding = refused(document(shape("point", [[1, 1]]), entry))
    assert found in finding.found
    assert finding.where == "a.json, shape 2"


def test_labels_that_were_meant_are_named() -> None:
    expected = "did you mean 'car'? If not, add it to a class's `labels`, or to `ignore_labels`, in the recipe"
    assert refused(document(shape("point", [[1, 1]], "cars"))).remedy == expected


def test_the_file_must_be_of_the_photo() -> None:
    assert refused(document(), image="photos/b.jpg").found == "it must be of 'b.jpg', but says that it is of 'a.jpg'"
    for path in ("a.jpg", "x/a.jpg", "../x/a.jpeg", "C:\\x\\a.jpg", "", None):
        mask_of(document(imagePath=path))
    mask_of(document(imagePath="b.jpg"), image=None)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"imageHeight": 31}, "40 x 30 px, but was made for 40 x 31"),
        ({"imageHeight": None, "imageWidth": None}, "40 x 30 px, but the file says none"),
        ({"imageWidth": "40"}, "40 x 30 px, but was made for '40' x 30"),
        ({"imageWidth": [1]}, "40 x 30 px, but was made for [1] x 30"),
        ({"imageHeight": 10**9, "imageWidth": 10**9}, "was made for 1000000000 x 1000000000"),
    ],
)
def test_the_size_must_be_that_of_the_photo(more: dict[str, Any], said: str) -> None:
    assert said in refused(document(**more)).found


@pytest.mark.parametrize("shapes", [None, {}, 3, [3], [[]]])
def test_shapes_must_be_a_list(shapes: Any) -> None:
    assert "`shapes` must be a list of objects" in refused(document() | {"shapes": shapes}).found


def test_nested_lists_are_no_annotations() -> None:
    assert "nested too deeply" in refused(b"[" * 100_000).found


def test_circles_far_out_need_no_memory_and_have_a_bound() -> None:
    assert (mask_of(document(shape("circle", [[-39_000, 0], [0, 0]]))) == 1).any()
    with pytest.raises(BadItemError, match="a radius of at most 40000 px, but this has 900000"):
        mask_of(document(shape("circle", [[-900_000, 0], [0, 0]])))


def test_damaged_files_are_refused_or_read() -> None:
    entries = [
        shape("circle", [[20, 15], [23, 19]]),
        shape("mask", [[3, 4], [9, 9]], mask=png(np.eye(6, 7, dtype=bool))),
    ]
    fuzz(json.dumps(document(*entries)).encode(), mask_of)


def test_damaged_masks_are_refused_or_read() -> None:
    data = encoded(np.eye(20, 30, dtype=bool), "PNG")

    def use(changed: bytes) -> None:
        entry = shape("mask", [[3, 4], [32, 23]], mask=base64.b64encode(changed).decode())
        mask_of(document(entry))

    fuzz(data, use, alphabet=bytes(range(256)))
