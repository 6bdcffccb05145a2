"""Drafts are read back as they are, by our own readers and by those of the tools that they are for."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from test_outlining import Mask, smooth

from cps_ray import prepare
from cps_ray.datasets.images import decode_mask
from cps_ray.datasets.shards import open_shards
from cps_ray.errors import DataError
from cps_ray.model.drafting import SMALLEST_PX, Draft, write_drafts
from cps_ray.model.outlining import without_specks

CLASSES = ("road", "a car", "Bäume", "sky", "person")
PALETTE = ((128, 64, 128), (0, 0, 142), (107, 142, 35), (70, 130, 180), (220, 20, 60))


def encoded(size: tuple[int, int], kind: str, orientation: int = 1) -> bytes:
    exif, data = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(size[0]).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(data, kind, exif=exif)
    return data.getvalue()


PREDICTED = {"one": smooth(2), "folder/two": smooth(3, (40, 70)), "turned": smooth(4, (70, 40))}
IMAGES = {
    "one": encoded((64, 96), "PNG"),
    "folder/two": encoded((40, 70), "JPEG"),
    "turned": encoded((40, 70), "JPEG", 6),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("made") / "drafts"
    made.mkdir()
    write_drafts(made, [Draft(name, IMAGES[name], mask) for name, mask in PREDICTED.items()], CLASSES, PALETTE)
    return made


def truth(name: str) -> Mask:
    return without_specks(PREDICTED[name], SMALLEST_PX)


def test_drafts_are_what_was_predicted_but_for_specks() -> None:
    for mask in (*PREDICTED.values(), smooth(5, (400, 600))):
        cleaned = without_specks(mask, SMALLEST_PX)
        for label in np.unique(mask):
            union = (mask == label) | (cleaned == label)
            assert ((mask == label) & (cleaned == label)).sum() / union.sum() >= 0.98


def test_pycocotools_reads_the_masks(folder: Path) -> None:
    coco = COCO(str(folder / "coco.json"))
    assert [each["name"] for each in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    for image in coco.loadImgs(coco.getImgIds()):
        mask = np.full((image["height"], image["width"]), 255, np.uint8)
        for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
            inside = coco.annToMask(annotation) > 0
            rows, columns = np.nonzero(inside)
            assert annotation["area"] == inside.sum()
            assert annotation["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            mask[inside] = annotation["category_id"] - 1
        assert (folder / "images" / image["file_name"]).is_file()
        assert np.array_equal(mask, truth(image["file_name"].rpartition(".")[0]))


def test_labelme_paints_the_masks(folder: Path) -> None:
    """As its `shape_to_mask` does, which is not installed here: a polygon of Pillow with its outline, shape after shape."""
    assert (folder / "labels.txt").read_text().splitlines() == list(CLASSES)
    for name in PREDICTED:
        path = folder / f"images/{name}.json"
        document = json.loads(path.read_text())
        picture = Image.new("L", (document["imageWidth"], document["imageHeight"]), 255)
        for shape in document["shapes"]:
            label = CLASSES.index(shape["label"])
            assert len(shape["points"]) >= 4
            ImageDraw.Draw(picture).polygon([tuple(point) for point in shape["points"]], fill=label, outline=label)
        assert np.array_equal(np.asarray(picture), truth(name))
        assert (path.parent / document["imagePath"]).read_bytes() == IMAGES[name]


def test_index_pngs_have_the_palette(folder: Path) -> None:
    for name in PREDICTED:
        with Image.open(folder / f"masks/{name}.png") as picture:
            assert picture.mode == "P"
            assert np.array_equal(np.asarray(picture), truth(name))
            assert picture.getpalette()[: 3 * len(PALETTE)] == [channel for color in PALETTE for channel in color]


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("masks", "other"),
    [
        ("masks: images/{id}.json", "masks: images/{id}.json"),
        ("masks: images/{id}.json", "coco: coco.json"),
        ("masks: images/{id}.json", 'masks: "masks/{id}.png"'),
    ],
)
def test_prepare_reads_the_masks(folder: Path, tmp_path: Path, masks: str, other: str) -> None:
    text = (folder / "recipe.yaml").read_text()
    body = text[text.index("classes:") :].replace(masks, other)
    assert other in body
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(body if "png" not in other else body.replace("uncovered: ignore\n", ""))
    out = tmp_path / "shards"
    assert prepare.main(["folder", str(folder), str(out), "--recipe", str(recipe)]) == 0
    index = open_shards(out).index("train")
    assert set(index.ids) == set(PREDICTED)
    for item in index.locations.read(range(len(index))):
        assert item.mask is not None
        assert np.array_equal(decode_mask(item.mask), truth(item.id))
        assert item.image == IMAGES[item.id]


@pytest.mark.parametrize("name", ["../one", "/tmp/one", "a/../../b"])
def test_ids_lead_nowhere_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="must be names of files in a folder"):
        write_drafts(tmp_path, [Draft(name, b"", smooth(0))], CLASSES, PALETTE)
    assert not [*tmp_path.iterdir()]
