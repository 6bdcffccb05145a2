"""Raw folders as people have them become the right pixels, or one line that says why not; remedies are tried on their inputs."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.io import savemat
from trees import encoded, patches, save, scene

from cps_ray.datasets.images import decode_image, decode_mask
from cps_ray.datasets.prepare.assembly import BadDataError, DataSetPlan, write_shards
from cps_ray.datasets.prepare.items import FromFiles
from cps_ray.datasets.prepare.layouts import folder
from cps_ray.datasets.prepare.recipe import load_recipe
from cps_ray.datasets.shards import Manifest, Shards, open_shards

SIZE = (24, 32)
CLASSES = "[{name: background}, {name: body}, {name: glass}]"
SPLITS = "{train: {images: images/*, masks: masks/*}}"
IDS = (0, 1, 2)


class RawFolder:
    """A raw folder, and what becomes of it."""

    def __init__(self, root: Path) -> None:
        self.root, self.raw, self.out = root, root / "raw", root / "out"
        self.recipe = ""

    def describe(self, settings: str = "", *, classes: str = CLASSES, splits: str = SPLITS) -> "RawFolder":
        self.recipe = f"classes: {classes}\nsplits: {splits}\n{settings}\n"
        return self

    def photos(self, count: int = 2, suffix: str = ".jpg") -> "RawFolder":
        for number in range(count):
            save(self.raw / f"images/{number}{suffix}", scene(f"photo {number}"))
        return self

    def write(self, name: str, data: bytes) -> None:
        path = self.raw / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def prepare(self, *, skip_bad: bool = False, **more: Any) -> Manifest:
        (self.root / "recipe.yaml").write_text(self.recipe)
        found = folder(self.raw, load_recipe(self.root / "recipe.yaml"))
        plan = DataSetPlan(
            found.splits,
            FromFiles(found.reader, found.value_range, bands=found.bands),
            found.classes,
            found.palette,
            "a test",
            found.findings,
            found.notes,
            found.photos_stay,
            found.tiles,
        )
        return write_shards(self.out, plan, skip_bad=skip_bad, threads=1, **more)

    def shards(self) -> Shards:
        return open_shards(self.out)

    def masks(self, split: str = "train") -> Mapping[str, np.ndarray | None]:
        index = self.shards().index(split)
        rows = index.locations.read(range(len(index)))
        return {row.id: None if row.mask is None else decode_mask(row.mask) for row in rows}

    def images(self, split: str = "train") -> Mapping[str, np.ndarray]:
        index = self.shards().index(split)
        return {row.id: decode_image(row.image) for row in index.locations.read(range(len(index)))}

    def refused(self) -> str:
        with pytest.raises(BadDataError) as caught:
            self.prepare()
        return "\n".join(finding.line for finding in caught.value.findings if finding.fatal)


@pytest.fixture
def raw(tmp_path: Path) -> RawFolder:
    return RawFolder(tmp_path)


def mask(number: int, ids: tuple[int, ...] = IDS) -> np.ndarray:
    return patches(f"mask {number}", ids)


def check(raw: RawFolder, wanted: Mapping[str, np.ndarray]) -> None:
    found = raw.masks()
    for key, train_ids in wanted.items():
        assert np.array_equal(found[key], train_ids), key


# ------------------------------------------------------------------------------------------------- what masks hold


def test_ids_in_16_bit_pngs_of_three_channels(raw: RawFolder) -> None:
    raw.photos().describe()
    for number in range(2):
        deep = np.repeat(mask(number)[..., None].astype(np.uint16), 3, axis=2)
        raw.write(f"masks/{number}.png", bytes(cv2.imencode(".png", deep)[1]))
    raw.prepare()
    check(raw, {"0": mask(0), "1": mask(1)})


def with_palette(values: np.ndarray, colors: list[tuple[int, int, int]]) -> bytes:
    image = Image.fromarray(values)
    image.putpalette([channel for color in colors for channel in color])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


COLORS = [(0, 0, 0), (200, 0, 0), (0, 0, 200)]
COLORED = "[{name: background, color: [0, 0, 0]}, {name: body, color: [200, 0, 0]}, {name: glass, color: [0, 0, 200]}]"


def test_palettes_in_another_order_are_refused_until_it_is_said_what_counts(raw: RawFolder) -> None:
    raw.photos().describe(classes=COLORED)
    raw.write("masks/0.png", with_palette(mask(0), COLORS))
    swapped = np.array([0, 2, 1], np.uint8)[mask(1)]
    raw.write("masks/1.png", with_palette(swapped, [COLORS[0], COLORS[2], COLORS[1]]))
    assert "index 1 means class 1, but has in the palette (0, 0, 200), the colour of class 2" in raw.refused()
    raw.describe(classes="[{name: background}, {name: body}, {name: glass}]")
    assert "palettes must agree, but index 1 is (0, 0, 200) and (200, 0, 0)" in raw.refused()
    with pytest.raises(BadDataError):
        raw.prepare(skip_bad=True)
    raw.describe("mask_coding: indices", classes=COLORED).prepare()
    check(raw, {"0": mask(0), "1": swapped})
    raw.out = raw.root / "by color"
    raw.describe("mask_coding: colors", classes=COLORED).prepare()
    check(raw, {"0": mask(0), "1": mask(1)})


def test_grey_palettes_whose_levels_are_other_ids_are_refused(raw: RawFolder) -> None:
    """GIF, for one, numbers the grey levels that occur."""
    raw.photos(1).describe()
    levels = np.where(mask(0) > 0, 2, 0).astype(np.uint8)
    raw.write("masks/0.gif", encoded(levels, "GIF"))
    assert "its palette is grey, and indices and grey levels mean different classes (0: 0, 1: 2)" in raw.refused()
    raw.describe("mask_coding: indices").prepare()
    check(raw, {"0": levels // 2})


def test_masks_of_one_class_alone_are_an_error(raw: RawFolder) -> None:
    raw.photos().describe()
    for number in range(2):
        save(raw.raw / f"masks/{number}.png", np.zeros(SIZE, np.uint8))
    assert "masks must show two classes or more, but all of them show only background" in raw.refused()


def test_a_few_smoothed_edges_are_not_to_be_mapped(raw: RawFolder) -> None:
    raw.photos().describe("ignore_ids: [9]", classes="[{name: a, ids: [0]}, {name: b, ids: [10]}]")
    for number in range(2):
        save(raw.raw / f"masks/{number}.png", mask(number, (0, 10)))
    smooth = mask(1, (0, 10)).copy()
    edges = np.argwhere(np.diff(smooth.astype(int), axis=1) != 0)
    for count, (row, column) in enumerate(edges[:12]):
        smooth[row, column] = (3, 7)[count % 2]
    save(raw.raw / "masks/1.png", smooth)
    said = raw.refused()
    assert "3 (6 px), 7 (6 px)" in said
    assert "so the edges are smoothed: export the masks again" in said
    assert "map them" not in said


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_grey_masks_with_a_threshold(raw: RawFolder, suffix: str) -> None:
    raw.photos().describe("threshold: 127", classes="[{name: background}, {name: body}]")
    big = {str(number): cv2.resize(mask(number, (0, 1)), (32, 24)) for number in range(2)}
    for key, values in big.items():
        soft = cv2.GaussianBlur(values * np.float32(255), (3, 3), 0.4).astype(np.uint8)
        save(raw.raw / f"masks/{key}{suffix}", soft, **({"quality": 95} if suffix == ".jpg" else {}))
        big[key] = np.asarray(Image.open(raw.raw / f"masks/{key}{suffix}")) > 127
    raw.prepare()
    check(raw, big)


def test_lossy_masks_say_that_a_threshold_would_do(raw: RawFolder) -> None:
    raw.photos(1).describe()
    save(raw.raw / "masks/0.jpg", mask(0) * 120)
    said = raw.refused()
    assert "masks must be lossless, but this is a grey JPEG of 8 bits" in said
    assert "`threshold: 127`" in said


def test_ranges_of_ids(raw: RawFolder) -> None:
    raw.photos(1).describe(
        classes='[{name: low, ids: ["0-127"]}, {name: high, ids: [130, "140-254"]}]',
        settings='ignore_ids: ["128-129", 255]',
    )
    values = mask(0, (0, 5, 127, 128, 130, 141, 254, 255))
    save(raw.raw / "masks/0.png", values)
    raw.prepare()
    check(raw, {"0": np.where(values < 128, 0, np.where((values == 128) | (values == 255), 255, 1))})


@pytest.mark.parametrize(("meaning", "train_id"), [("ignore", 255), ("background", 0)])
def test_transparent_pixels_mean_what_the_recipe_says(raw: RawFolder, meaning: str, train_id: int) -> None:
    raw.photos(1).describe("mask_coding: colors", classes=COLORED)
    values, clear = mask(0), mask(7, (0, 1)) > 0
    pixels = np.dstack([np.array(COLORS, np.uint8)[values], np.where(clear, 0, 255).astype(np.uint8)])
    pixels[clear, :3] = 77  # a colour of no class, which nobody sees
    save(raw.raw / "masks/0.png", pixels)
    assert "say in the recipe what that means, `transparent: ignore`" in raw.refused()
    raw.describe(f"mask_coding: colors\ntransparent: {meaning}", classes=COLORED).prepare()
    check(raw, {"0": np.where(clear, train_id, values)})


def test_a_struct_in_matlab(raw: RawFolder) -> None:
    raw.photos(1).describe()
    cell = np.empty((1, 2), object)
    for at in range(2):
        cell[0, at] = {"Segmentation": mask(at).astype(np.uint16), "Boundaries": np.zeros(SIZE, np.uint8)}
    raw.raw.joinpath("masks").mkdir()
    savemat(raw.raw / "masks/0.mat", {"groundTruth": cell, "other": mask(0)})
    savemat(raw.raw / "masks/0.mat", {"groundTruth": cell})
    assert "say in the recipe which is the mask, `mask_variable: NAME`" in raw.refused()
    raw.describe("mask_variable: groundTruth.Segmentation")
    assert (
        "must name one matrix, but groundTruth has 2 entries; say which, counted from 0: `groundTruth[0]`"
        in raw.refused()
    )
    raw.describe("mask_variable: groundTruth[1].Segmentation").prepare()
    check(raw, {"0": mask(1)})


def test_masks_of_the_same_photo_at_another_scale(raw: RawFolder) -> None:
    raw.photos(1).describe()
    small = mask(0)[::2, ::2].copy()
    save(raw.raw / "masks/0.png", small)
    assert "the recipe may say `mask_size: resize`" in raw.refused()
    raw.describe("mask_size: resize").prepare()
    check(raw, {"0": np.kron(small, np.ones((2, 2), np.uint8))})


def test_masks_of_another_shape_are_not_resized(raw: RawFolder) -> None:
    raw.photos(1).describe("mask_size: resize")
    save(raw.raw / "masks/0.png", mask(0)[:, :24].copy())
    assert "must have the shape of its image, but the image is 32x24 px and the mask 24x24 px" in raw.refused()


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("turned_masks", [True, False])
def test_exif_of_photos_alone(raw: RawFolder, orientation: int, turned_masks: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = scene("turned", (24, 24))
    raw.write("images/0.jpg", encoded(stored, "JPEG", exif=exif, quality=95))
    seen = patches("on the seen photo", IDS, (24, 24))
    back = {3: np.rot90(seen, 2), 6: np.rot90(seen, 1)}[orientation]
    save(raw.raw / "masks/0.png", seen if turned_masks else back.copy())
    raw.describe()
    assert "`masks_turned: true` if they were drawn on the photo as viewers show it" in raw.refused()
    raw.describe(f"masks_turned: {str(turned_masks).lower()}").prepare()
    check(raw, {"0": seen})
    assert np.abs(raw.images()["0"].astype(int) - np.rot90(stored, {3: 2, 6: 3}[orientation])).mean() < 15


# -------------------------------------------------------------------------------------- several masks, and outlines

PER_CLASS = "{train: {images: images/*, masks: {body: 'body/{id}*.png', glass: 'glass/{id}.png'}}}"


@pytest.mark.parametrize("overlaps", ["later", "smaller", "ignore"])
def test_a_mask_per_class(raw: RawFolder, overlaps: str) -> None:
    raw.photos(2).describe(
        f"overlaps: {overlaps}", splits="{train: {images: images/*, masks: {body: 'body/*', glass: 'glass/*'}}}"
    )
    body, glass = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
    body[2:20, 2:20], glass[10:24, 10:32] = 255, 1
    for number in range(2):
        save(raw.raw / f"body/{number}.png", body)
    save(raw.raw / "glass/0.png", glass)
    raw.prepare()
    wanted = np.where(glass > 0, 2, np.where(body > 0, 1, 0))
    both = (body > 0) & (glass > 0)
    if overlaps == "ignore":
        wanted[both] = 255
    elif overlaps == "smaller":
        wanted[both] = 1 if (body > 0).sum() < (glass > 0).sum() else 2
    check(raw, {"0": wanted, "1": (body > 0).astype(int)})


def test_a_mask_per_object_unites(raw: RawFolder) -> None:
    classes, splits = (
        "[{name: background}, {name: nucleus}]",
        "{train: {images: '{id}/images/*.png', masks: {nucleus: '{id}/masks/*.png'}}}",
    )
    wanted = np.zeros(SIZE, np.uint8)
    save(raw.raw / "a/images/a.png", scene("a"))
    for number, (top, left) in enumerate([(1, 1), (8, 20), (15, 5)]):
        area = np.zeros(SIZE, np.uint8)
        area[top : top + 5, left : left + 6] = 255
        save(raw.raw / f"a/masks/{number}.png", area)
        wanted |= area > 0
    raw.describe(classes=classes, splits=splits).prepare()
    check(raw, {"a": wanted})


def test_what_no_mask_covers_must_be_said_where_no_class_is_called_background(raw: RawFolder) -> None:
    raw.photos(1)
    save(raw.raw / "body/0.png", mask(0, (0, 255)))
    splits = "{train: {images: images/*, masks: {body: 'body/*'}}}"
    with pytest.raises(
        Exception, match="`uncovered` must say what pixels are that no outline or mask of a class covers"
    ):
        raw.describe(classes="[{name: body}, {name: rest}]", splits=splits).prepare()
    raw.describe("uncovered: rest", classes="[{name: body}, {name: rest}]", splits=splits).prepare()
    check(raw, {"0": np.where(mask(0, (0, 255)) > 0, 0, 1)})


def coco(images: int, **more: Any) -> bytes:
    document = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 24, "width": 32} for n in range(images)],
        "categories": [{"id": 0, "name": "cars"}, {"id": 4, "name": "body"}, {"id": 9, "name": "windshield"}],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 4, "iscrowd": 0, "segmentation": [[2, 2, 20, 2, 20, 20, 2, 20]]}
            for n in range(images)
        ]
        + [{"id": 99, "image_id": 0, "category_id": 9, "iscrowd": 0, "segmentation": [[10, 10, 30, 10, 30, 23]]}],
    }
    return json.dumps(document | more).encode()


LABELED = "[{name: background}, {name: body}, {name: glass, labels: [windshield, window]}]"


def test_coco(raw: RawFolder) -> None:
    from pycocotools import mask as coco_mask

    raw.photos(3)
    raw.write("labels.json", coco(2))
    raw.describe(classes=LABELED, splits="{train: {images: images/*, coco: labels.json, unlabeled: rest}}").prepare()

    def area(outline: list[int]) -> np.ndarray:
        return np.asarray(coco_mask.decode(coco_mask.frPyObjects([outline], *SIZE)))[..., 0] > 0

    body, glass = area([2, 2, 20, 2, 20, 20, 2, 20]), area([10, 10, 30, 10, 30, 23])
    check(raw, {"0": np.where(glass, 2, body), "1": body.astype(int)})
    assert raw.masks()["2"] is None, "a photo that the file does not list is unlabelled"


def test_labels_of_no_class_name_the_way_out(raw: RawFolder) -> None:
    raw.photos(2)
    raw.write("labels.json", coco(2))
    splits = "{train: {images: images/*, coco: labels.json}}"
    with pytest.raises(Exception, match=r"'windshield' is of none; .*`labels`, or to `ignore_labels`"):
        raw.describe(splits=splits).prepare()
    raw.describe("ignore_labels: [windshield]", splits=splits).prepare()
    assert 255 in (raw.masks()["0"] if raw.masks()["0"] is not None else [])


def test_labelme(raw: RawFolder) -> None:
    raw.photos(2)
    for number in range(2):
        shapes = [{"label": "body", "points": [[2, 2], [20, 18]], "shape_type": "rectangle"}]
        document = {"shapes": shapes, "imagePath": f"{number}.jpg", "imageHeight": 24, "imageWidth": 32}
        raw.write(f"images/{number}.json", json.dumps(document).encode())
    raw.describe(splits="{train: {images: 'images/*.jpg', masks: 'images/*.json'}}").prepare()
    wanted = np.zeros(SIZE, np.uint8)
    wanted[2:19, 2:21] = 1
    check(raw, {"0": wanted, "1": wanted})


def test_yolo(raw: RawFolder) -> None:
    raw.photos(2)
    raw.write("data.yaml", b"names: {0: body, 1: window}\n")
    raw.write("labels/0.txt", b"0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n")
    raw.write("labels/1.txt", b"")
    splits = "{train: {images: images/*, masks: labels/*.txt}}"
    raw.describe("yolo_names: data.yaml", classes=LABELED, splits=splits).prepare()
    wanted = np.zeros(SIZE, np.uint8)
    wanted[6:18, 8:24] = 1
    check(raw, {"0": wanted, "1": np.zeros(SIZE)})


def test_a_field_of_view(raw: RawFolder) -> None:
    raw.photos(1).describe(splits="{train: {images: images/*, masks: masks/*, ignore_masks: fov/*}}")
    save(raw.raw / "masks/0.png", mask(0))
    inside = np.zeros(SIZE, np.uint8)
    inside[4:20, 4:28] = 255
    save(raw.raw / "fov/0.png", inside)
    raw.prepare()
    check(raw, {"0": np.where(inside > 0, mask(0), 255)})


# ------------------------------------------------------------------------------------------------------------- photos


def test_ten_bands_of_16_bits(raw: RawFolder) -> None:
    rng = np.random.default_rng(0)
    stacks = [rng.integers(200, 3000, (*SIZE, 10), np.uint16) for _ in range(2)]
    (raw.raw / "images").mkdir(parents=True)
    for number, stack in enumerate(stacks):
        tifffile.imwrite(raw.raw / f"images/{number}.tif", stack, photometric="minisblack", planarconfig="contig")
        save(raw.raw / f"masks/{number}.png", mask(number))
    raw.describe()
    assert "is a TIFF of 10 bands of 16 bits; say in the recipe which are red, green and blue" in raw.refused()
    manifest = raw.describe("bands: [4, 3, 2]\nstretch: [0.02, 0.98]").prepare()
    values = np.concatenate([stack[..., [3, 2, 1]].reshape(-1, 3) for stack in stacks])
    low, high = np.quantile(values, [0.02, 0.98], axis=0)
    assert np.allclose(np.array(manifest.value_range), np.stack([low, high], axis=1))
    assert manifest.bands == (4, 3, 2)
    wanted = np.clip((stacks[0][..., [3, 2, 1]] - low) * 255 / (high - low), 0, 255).round()
    assert np.abs(raw.images()["0"] - wanted).max() <= 1, "halves may be rounded either way"
    assert any("black and white are the quantiles 0.02 and 0.98 of the training images" in n for n in manifest.notes)


def test_training_images_in_tiles_and_whole_ones_for_val(raw: RawFolder) -> None:
    size = (50, 70)
    for split in ("train", "val"):
        save(raw.raw / f"{split}/a {split}.png", scene(split, size))
        save(raw.raw / f"{split}_masks/a {split}.png", patches(split, IDS, size))
    splits = "{train: {images: train/*, masks: train_masks/*}, val: {images: val/*, masks: val_masks/*}}"
    manifest = raw.describe("tiles: {size_px: 32, overlap_px: 8}", splits=splits).prepare()
    assert manifest.tiles is not None
    assert (manifest.tiles.size_px, manifest.tiles.overlap_px) == (32, 8)
    tiles, masks = raw.images(), raw.masks()
    assert set(tiles) == {f"a train_y{top:05d}_x{left:05d}" for top in (0, 18) for left in (0, 24, 38)}
    for key, pixels in tiles.items():
        top, left = int(key[-12:-7]), int(key[-5:])
        assert np.array_equal(pixels, scene("train", size)[top : top + 32, left : left + 32])
        assert np.array_equal(masks[key], patches("train", IDS, size)[top : top + 32, left : left + 32])
    assert raw.images("val")["a val"].shape == (*size, 3)


# ----------------------------------------------------------------------------------------------------------- skip-bad


def test_the_photo_of_a_bad_mask_stays_where_the_recipe_takes_the_rest(raw: RawFolder) -> None:
    raw.photos(4)
    for number in range(3):
        save(raw.raw / f"masks/{number}.png", mask(number))
    save(raw.raw / "masks/1.png", scene("no mask"))
    raw.describe(splits="{train: {images: images/*, masks: masks/*, unlabeled: rest}}")
    assert "this is an RGB PNG of 8 bits" in raw.refused()
    manifest = raw.prepare(skip_bad=True)
    assert {key: found is not None for key, found in raw.masks().items()} == {
        "0": True,
        "1": False,
        "2": True,
        "3": False,
    }
    assert [entry.file for entry in manifest.left_out] == [str(raw.raw / "masks/1.png")]
    assert any("0 of 4 images and 1 of 3 masks are" in note for note in manifest.notes)


def test_what_was_read_is_not_read_again(raw: RawFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.photos(6).describe()
    for number in range(6):
        save(raw.raw / f"masks/{number}.png", mask(number))
    save(raw.raw / "masks/3.png", scene("no mask"))
    raw.refused()
    read: list[str] = []
    original = FromFiles.__call__
    monkeypatch.setattr(FromFiles, "__call__", lambda self, source: (read.append(source.id), original(self, source))[1])
    save(raw.raw / "masks/3.png", mask(3))
    raw.prepare()
    assert read == ["3"]
    check(raw, {str(number): mask(number) for number in range(6)})


def test_the_fingerprint_is_of_pixels_and_train_ids(raw: RawFolder) -> None:
    """Another encoding, compression or order changes nothing; one pixel of an image or a mask does."""
    raw.photos(3, ".png").describe()
    for number in range(3):
        save(raw.raw / f"masks/{number}.png", mask(number))
    first = raw.prepare().splits["train"].fingerprint
    assert first.startswith("3-")

    def again(name: str) -> str:
        raw.out = raw.root / name
        return raw.prepare().splits["train"].fingerprint

    save(raw.raw / "images/0.bmp", scene("photo 0"))
    (raw.raw / "images/0.png").unlink()
    save(raw.raw / "masks/2.png", np.repeat(mask(2)[..., None], 3, axis=2))
    assert again("other encodings") == first
    changed = mask(1).copy()
    changed[5, 5] = (changed[5, 5] + 1) % 3
    save(raw.raw / "masks/1.png", changed)
    assert again("a pixel of a mask") != first
    save(raw.raw / "masks/1.png", mask(1))
    assert again("as it was") == first
    pixels = scene("photo 0").copy()
    pixels[0, 0, 0] ^= 1
    save(raw.raw / "images/0.bmp", pixels)
    assert again("a pixel of an image") != first


# ------------------------------------------------------------------------------------- what an index or a name hides


def white_first(area: np.ndarray) -> bytes:
    """A palette image of black and white whose index 0 is white: the area is index 0."""
    return with_palette(np.where(area, 0, 1).astype(np.uint8), [(255, 255, 255), (0, 0, 0)])


def test_a_palette_whose_first_colour_is_white_is_no_mask_of_one_class(raw: RawFolder) -> None:
    raw.photos(1).describe(splits="{train: {images: images/*, masks: {body: body/*}}}")
    raw.write("body/0.png", white_first(mask(0, (0, 1)) > 0))
    assert "index 0 must be black, and others not, but index 0 is (255, 255, 255)" in raw.refused()
    save(raw.raw / "body/0.png", mask(0, (0, 255)))
    raw.prepare()
    check(raw, {"0": mask(0, (0, 1))})


def test_a_field_of_view_is_judged_by_its_colours_too(raw: RawFolder) -> None:
    raw.photos(1).describe(splits="{train: {images: images/*, masks: masks/*, ignore_masks: fov/*}}")
    save(raw.raw / "masks/0.png", mask(0))
    raw.write("fov/0.png", white_first(mask(1, (0, 1)) > 0))
    assert "index 0 must be black, and others not" in raw.refused()


def test_a_threshold_is_of_grey_levels_and_not_of_indices(raw: RawFolder) -> None:
    raw.photos(1).describe("threshold: 127", classes="[{name: background}, {name: body}]")
    area = mask(0, (0, 1)) > 0
    raw.write("masks/0.png", white_first(area))
    raw.prepare()
    check(raw, {"0": area.astype(int)})


def test_deep_masks_that_are_transparent_all_over(raw: RawFolder) -> None:
    """Two masks: one of them alone would show one class."""
    raw.photos(2).describe("transparent: background")
    for number, alpha in enumerate((0, 65535)):
        values = np.repeat(mask(number)[..., None].astype(np.uint16), 4, axis=2)
        values[..., 3] = alpha
        raw.write(f"masks/{number}.png", bytes(cv2.imencode(".png", values)[1]))
    raw.prepare()
    check(raw, {"0": np.zeros(SIZE), "1": mask(1)})


def test_probabilities_that_are_not_a_number_have_no_threshold(raw: RawFolder) -> None:
    raw.photos(1).describe("threshold: 0.5", classes="[{name: background}, {name: body}]")
    values = mask(0, (0, 1)).astype(np.float32)
    values[0, 0] = np.nan
    raw.raw.joinpath("masks").mkdir()
    np.save(raw.raw / "masks/0.npy", values)
    assert "must be numbers, but 1 are not finite" in raw.refused()


def test_an_image_of_a_coco_file_is_the_file_of_that_very_name(raw: RawFolder) -> None:
    """`0_left.jpg` is not there, and `0.jpg` is another photo."""
    raw.photos(1)
    document = json.loads(coco(1))
    document["images"][0]["file_name"] = "0_left.jpg"
    raw.write("labels.json", json.dumps(document).encode())
    raw.describe(classes=LABELED, splits="{train: {images: images/*, coco: labels.json}}")
    assert "'0' has none" in raw.refused()


@pytest.mark.parametrize("name", ["images/a/0_rgb.jpg", "elsewhere/a/0_rgb.jpg", "a/0_rgb.jpg"])
def test_images_of_a_coco_file_are_found_by_their_path(raw: RawFolder, name: str) -> None:
    for drive in "ab":
        save(raw.raw / f"images/{drive}/0_rgb.jpg", scene(drive))
    document = json.loads(coco(1))
    document["images"][0]["file_name"] = name
    raw.write("labels.json", json.dumps(document).encode())
    splits = "{train: {images: 'images/{id}_rgb.jpg', coco: labels.json, unlabeled: rest}}"
    raw.describe(classes=LABELED, splits=splits).prepare()
    assert {key: found is not None for key, found in raw.masks().items()} == {"a/0": True, "b/0": False}
