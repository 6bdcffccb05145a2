"""COCO files become the pixels that pycocotools gives; those that are not clear about an image are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import fuzz
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from cps_ray.datasets.prepare.annotations import coco
from cps_ray.datasets.prepare.annotations.coco import CocoFile, coco_shapes, coco_train_ids, read_coco
from cps_ray.datasets.prepare.annotations.shapes import paint
from cps_ray.datasets.prepare.findings import BadItemError, Finding

SIZE = HEIGHT, WIDTH = 40, 60
SQUARE = [[5.0, 5, 15, 5, 15, 15, 5, 15]]
CATEGORIES = [{"id": 0, "name": "set", "supercategory": "none"}, {"id": 7, "name": "car"}, {"id": 3, "name": "road"}]
"""As Roboflow writes them: 0 is named as the data set is, and no annotation has it."""
TRAIN_IDS = {"car": 1, "road": 0}


def annotation(segmentation: Any, category: Any = 7, **more: Any) -> dict[str, Any]:
    return {"id": 11, "image_id": 1, "category_id": category, "segmentation": segmentation, "iscrowd": 0} | more


def document(*annotations: dict[str, Any], **more: Any) -> dict[str, Any]:
    images = [{"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}]
    return {"images": images, "categories": CATEGORIES, "annotations": list(annotations)} | more


def written(folder: Path, content: Any) -> str:
    path = folder / "c.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(path)


def masks_of(file: CocoFile, size: tuple[int, int] = SIZE, crowd: coco.Crowd = "class") -> list[list[list[int]]]:
    ids = coco_train_ids(file, TRAIN_IDS)
    shapes = [coco_shapes(file.path, image.annotation, size, ids, crowd) for image in file.images]
    return [paint(each, size, uncovered=9, overlaps="later").tolist() for each in shapes]


def refused(folder: Path, content: Any, size: tuple[int, int] = SIZE) -> Finding:
    with pytest.raises(BadItemError) as caught:
        masks_of(read_coco(written(folder, content)), size)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(folder)) + 400
    assert caught.value.finding.where.startswith(str(folder / "c.json"))
    return caught.value.finding


def runs_of(mask: NDArray[np.uint8]) -> list[int]:
    flat = np.concatenate(([0], mask.ravel(order="F"), [2]))
    edges = np.flatnonzero(np.diff(flat))
    lengths = np.diff(edges, prepend=0)
    return [int(length) for length in lengths]


# --------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("seed", range(30))
def test_masks_are_those_of_pycocotools_painted_in_order(tmp_path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    annotations = []
    for place in range(8):
        blob = np.zeros(SIZE, np.uint8)
        top, left = draw.integers(0, HEIGHT - 9), draw.integers(0, WIDTH - 9)
        blob[top : top + draw.integers(4, 40), left : left + draw.integers(4, 50)] = 1
        blob[top + 1 : top + 4, left + 2 : left + 8] = 0  # a hole
        parts = [draw.uniform(-9, 66, 2 * draw.integers(3, 8)).round(draw.integers(0, 4)).tolist() for _ in range(3)]
        compressed = coco_mask.encode(np.asfortranarray(blob))["counts"].decode()
        segmentation: Any = [
            parts[:1],
            parts,
            {"size": list(SIZE), "counts": runs_of(blob)},
            {"size": list(SIZE), "counts": compressed},
        ][place % 4]
        category, image = int(draw.choice([3, 7])), int(draw.integers(1, 3))
        annotations.append(annotation(segmentation, category, id=place + 1, image_id=image, iscrowd=place % 2))
    draw.shuffle(annotations)
    images = [{"id": k, "file_name": f"{k}.jpg", "height": HEIGHT, "width": WIDTH} for k in (2, 1)]
    path = written(tmp_path, document(*annotations, images=images))
    file = read_coco(path)
    theirs, by_category = COCO(path), {7: 1, 3: 0}
    for image, ours in zip(images, masks_of(file), strict=True):
        expected = np.full(SIZE, 9)
        for entry in theirs.dataset["annotations"]:
            if entry["image_id"] == image["id"]:
                expected[theirs.annToMask(entry) > 0] = by_category[entry["category_id"]]
        assert np.array_equal(ours, expected)


def test_the_parts_of_an_annotation_are_united(tmp_path: Path) -> None:
    parts = [[0, 0, 4, 0, 4, 4, 0, 4], [2, 2, 6, 2, 6, 6, 2, 6]]
    (mask,) = masks_of(read_coco(written(tmp_path, document(annotation(parts)))))
    expected = np.full(SIZE, 9)
    expected[0:4, 0:4] = expected[2:6, 2:6] = 1
    assert np.array_equal(mask, expected)


def test_a_category_that_no_annotation_has_needs_no_class(tmp_path: Path) -> None:
    file = read_coco(written(tmp_path, document(annotation(SQUARE), annotation(SQUARE), annotation(SQUARE, 3))))
    assert list(file.categories.items()) == [(0, "set"), (7, "car"), (3, "road")]
    assert file.num_annotations == {0: 0, 7: 2, 3: 1}
    assert coco_train_ids(file, TRAIN_IDS) == {7: 1, 3: 0}
    assert coco_train_ids(file, TRAIN_IDS | {"set": 255}) == {0: 255, 7: 1, 3: 0}


def test_a_category_in_use_must_be_a_label(tmp_path: Path) -> None:
    file = read_coco(written(tmp_path, document(annotation(SQUARE))))
    with pytest.raises(BadItemError) as caught:
        coco_train_ids(file, {"cars": 1, "road": 0})
    assert caught.value.finding.found == "every label must be one of a class, but 'car' is of none"
    expected = "did you mean 'cars'? If not, add it to a class's `labels`, or to `ignore_labels`, in the recipe"
    assert caught.value.finding.remedy == expected


def test_crowds_are_of_their_class_or_ignored(tmp_path: Path) -> None:
    file = read_coco(written(tmp_path, document(annotation(SQUARE, iscrowd=1), annotation([[30, 5, 35, 5, 35, 15]]))))
    assert masks_of(file)[0][10][10] == 1
    ignored = masks_of(file, crowd="ignore")[0]
    assert ignored[10][10] == 255
    assert ignored[7][34] == 1


def test_images_without_annotations_are_listed(tmp_path: Path) -> None:
    images = [{"id": k, "file_name": k, "height": HEIGHT, "width": WIDTH} for k in ("b.jpg", "a.jpg")]
    file = read_coco(written(tmp_path, document(annotation(SQUARE, image_id="a.jpg"), images=images)))
    assert [(image.name, image.size) for image in file.images] == [("b.jpg", SIZE), ("a.jpg", SIZE)]
    empty, square = masks_of(file)
    assert np.unique(empty).tolist() == [9]
    assert np.unique(square).tolist() == [1, 9]


def test_names_may_have_folders_and_backslashes(tmp_path: Path) -> None:
    for given, name in {"x/a.jpg": "x/a.jpg", "x\\y z\\ä.jpg": "x/y z/ä.jpg", "./a.jpg": "a.jpg"}.items():
        images = [{"id": 1, "file_name": given, "height": HEIGHT, "width": WIDTH}]
        assert read_coco(written(tmp_path, document(images=images))).images[0].name == name


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    assert masks_of(read_coco(written(tmp_path, b"\xef\xbb\xbf" + json.dumps(document()).encode())))


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("entry", "found", "remedy"),
    [
        (
            annotation([], bbox=[1, 2, 3, 4]),
            "but this has a box and no outline",
            "draw outlines, or export for segmentation",
        ),
        (annotation([]), "but this has no outline", "draw outlines"),
        (annotation(None), "but this has no outline", "draw outlines"),
        (annotation([[]]), "at least 3 points, but this has 0", "remove it"),
        (annotation([[1, 2, 3, 4]]), "at least 3 points, but this has 2", "remove it"),
        (annotation([*SQUARE, [1, 2, 3, 4]]), "at least 3 points, but this has 2", "remove it"),
        (annotation([[1, 2, 3, 4, 5, 6, 7]]), "pairs x, y", "remove it"),
        (annotation([[1, 2, 3, 4, 5, float("nan")]]), "but one is nan", "remove it"),
        (annotation([1, 2, 3, 4, 5, 6]), "a list of polygons, or runs with `counts`", "export it again"),
        (annotation("text"), "a list of polygons, or runs with `counts`", "export it again"),
        (annotation(SQUARE, 99), "`category_id` must be one in `categories`, but is 99", "export it again"),
        (annotation(SQUARE, [7]), "`category_id` must be one in `categories`, but is [7]", "export it again"),
        (annotation(SQUARE, None), "`category_id` must be one in `categories`, but is missing", "export it again"),
        (annotation(SQUARE, 0) | {"category_id": False}, "but is False", "export it again"),
        (annotation({"counts": [2400]}), "[40, 60], but have `size` missing", "from the same photos"),
        (
            annotation({"counts": [2400], "size": [60, 40]}),
            "[40, 60], but have `size` [60, 40]",
            "from the same photos",
        ),
        (
            annotation({"counts": [1e9], "size": [10**9, 10**9]}),
            "but have `size` [1000000000, 1000000000]",
            "same photos",
        ),
        (annotation({"counts": [10, 20], "size": [40, 60]}), "add up to 2400 px, but add up to 30", "export it again"),
        (annotation({"counts": [2400, 1], "size": [40, 60]}), "add up to 2401", "export it again"),
        (annotation({"counts": [-1, 2401], "size": [40, 60]}), "`counts` must be", "export it again"),
        (annotation({"counts": [2410, -10], "size": [40, 60]}), "`counts` must be", "export it again"),
        (annotation({"counts": [1, -1, 2400], "size": [40, 60]}), "0 or more", "export it again"),
        (annotation({"counts": [0.5, 2399.5], "size": [40, 60]}), "`counts` must be", "export it again"),
        (annotation({"counts": [], "size": [40, 60]}), "add up to 0", "export it again"),
        (annotation({"counts": "", "size": [40, 60]}), "`counts` must be", "export it again"),
        (annotation({"counts": "oo", "size": [40, 60]}), "`counts` must be", "export it again"),
        (annotation({"counts": "1" * 5000, "size": [40, 60]}), "`counts` must be", "export it again"),
        (annotation({"counts": "ß", "size": [40, 60]}), "`counts` must be", "export it again"),
        (annotation({"counts": {"a": 1}, "size": [40, 60]}), "`counts` must be", "export it again"),
    ],
)
def test_annotations_that_have_no_pixels(tmp_path: Path, entry: dict[str, Any], found: str, remedy: str) -> None:
    finding = refused(tmp_path, document(entry))
    assert found in finding.found
    assert remedy in finding.remedy
    assert finding.where == f"{tmp_path / 'c.json'}, annotation 11"


def test_annotations_are_counted_where_they_have_no_id(tmp_path: Path) -> None:
    entry = {key: value for key, value in annotation([]).items() if key != "id"}
    assert refused(tmp_path, document(annotation(SQUARE), entry)).where.endswith(", annotation 1")


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"height": 41, "width": 60}, "60 x 40 px, but was made for 60 x 41"),
        ({"height": 10**9, "width": 10**9}, "60 x 40 px, but was made for 1000000000 x 1000000000"),
        ({"height": 40}, "60 x 40 px, but the file says none"),
        ({"height": None, "width": None}, "60 x 40 px, but the file says none"),
        ({"height": "40", "width": 60}, "60 x 40 px, but the file says none"),
        ({"height": float("nan"), "width": 60}, "60 x 40 px, but the file says none"),
    ],
)
def test_the_size_must_be_that_of_the_photo(tmp_path: Path, size: dict[str, Any], said: str) -> None:
    assert said in refused(tmp_path, document(images=[{"id": 1, "file_name": "a.jpg", **size}])).found


def test_a_turned_photo_is_named(tmp_path: Path) -> None:
    finding = refused(tmp_path, document(), (WIDTH, HEIGHT))
    assert "40 x 60 px, but was made for 60 x 40" in finding.found
    assert "EXIF" in finding.remedy


def image(**more: Any) -> dict[str, Any]:
    return {"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH} | more


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (
            {"images": [image(), image(file_name="b.jpg")]},
            "every `id` in `images` must be unique, but 1 is there 2 times",
        ),
        (
            {"images": [image(), image(id=2)]},
            "every `file_name` in `images` must be unique, but 'a.jpg' is there 2 times",
        ),
        ({"images": [image(file_name="x\\a"), image(id=2, file_name="x/a")]}, "'x/a' is there 2 times"),
        ({"images": [image(id=True)]}, "images[0].id must be a number, but is True"),
        ({"images": [image(id=None)]}, "images[0].id must be a number, but is missing"),
        ({"images": [image(file_name=None)]}, "images[0].file_name must be a name, but is missing"),
        ({"images": [image(file_name="\ud800.jpg")]}, "images[0].file_name must be a name, but is '\\ud800.jpg'"),
        ({"images": {}}, "`images` must be a list of objects"),
        ({"images": [3]}, "`images` must be a list of objects"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "every `id` in `categories` must be unique"),
        ({"categories": [{"id": "1", "name": "a"}]}, "categories[0].id must be a number, but is '1'"),
        ({"categories": [{"id": 1}]}, "categories[0].name must be a name, but is missing"),
        ({"annotations": [annotation(SQUARE, image_id=9)]}, "annotations[0] must be of an image in `images`"),
        ({"annotations": [annotation(SQUARE, image_id="1")]}, "but has `image_id` '1'"),
        ({"annotations": [annotation(SQUARE, image_id={})]}, "but has `image_id` {}"),
    ],
)
def test_files_that_are_not_clear(tmp_path: Path, changed: dict[str, Any], found: str) -> None:
    assert found in refused(tmp_path, document(**changed)).found


@pytest.mark.parametrize(
    "name",
    ["../a.jpg", "x/../../a.jpg", "/etc/passwd", "..\\a.jpg", "\\a.jpg", "C:\\a.jpg", "C:a.jpg", "..", ".", "a\0.jpg"],
)
def test_names_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    finding = refused(tmp_path, document(images=[image(file_name=name)]))
    assert finding.found.startswith("images[0].file_name must be a path inside of the folder of images, but is '")


def test_nested_lists_are_no_annotations(tmp_path: Path) -> None:
    text = json.dumps(document(annotation("HERE")))
    for depth in (50, 900, 980, 990, 1000, 100_000):
        finding = refused(tmp_path, text.replace('"HERE"', "[" * depth + "]" * depth).encode())
        assert "nested too deeply" in finding.found or "pairs" in finding.found, depth


def test_large_files_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    with path.open("wb") as file:
        file.truncate(2**30)  # takes no room on the disk
    with pytest.raises(BadItemError, match="at most 512 MB, but has 1024; export it in parts"):
        read_coco(str(path))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json", Path("/dev/zero")):
        with pytest.raises(BadItemError, match="it must be a file, but is none"):
            read_coco(str(path))


@pytest.mark.slow  # writes and reads 200 MB
def test_ten_million_points_are_refused(tmp_path: Path) -> None:
    text = json.dumps(document(annotation([["HERE"]]))).replace('"HERE"', ",".join(["12.5"] * 20_000_000))
    assert "at most 1000000 points, but has more" in refused(tmp_path, text.encode()).found


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    blob = np.zeros(SIZE, np.uint8)
    blob[3:20, 7:30] = np.eye(17, 23)
    runs = {"size": list(SIZE), "counts": runs_of(blob)}
    text = {"size": list(SIZE), "counts": coco_mask.encode(np.asfortranarray(blob))["counts"].decode()}
    data = json.dumps(document(annotation(SQUARE, 3), annotation(text), annotation(runs)))
    fuzz(data.encode(), lambda changed: masks_of(read_coco(written(tmp_path, changed))))


def test_runs_whose_sum_overflows_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Text that gives such runs has some 65000 of them.
    monkeypatch.setattr(coco, "decode_runs", lambda text: np.array([*[2**62] * 4, HEIGHT * WIDTH]))
    entry = annotation({"size": list(SIZE), "counts": "1"})
    assert "runs must be lengths" in refused(tmp_path, document(entry)).found


def test_damaged_runs_are_refused_or_read(tmp_path: Path) -> None:
    blob = np.asfortranarray(np.random.default_rng(0).integers(0, 2, SIZE, np.uint8))
    ids, text = {7: 1}, coco_mask.encode(blob)["counts"]

    def use(changed: bytes) -> None:
        entry = annotation({"size": list(SIZE), "counts": changed.decode("latin-1")}, bbox=True)
        shapes = coco_shapes("c.json", json.dumps({"size": SIZE, "annotations": [entry]}), SIZE, ids, "class")
        paint(shapes, SIZE, uncovered=0, overlaps="smaller")

    fuzz(text, use, alphabet=bytes(range(48, 112)))
