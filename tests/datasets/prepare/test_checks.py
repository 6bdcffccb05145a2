"""Every trap that a raw data set can hold is found, in data sets of official layout too."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import trees
from PIL import Image
from scipy.io import savemat
from trees import POINTER, READER, city_id, encoded, pair, patches, plan, save, scene

from cps_ray.datasets.prepare import checks, layouts
from cps_ray.datasets.prepare.assembly import BadDataError, DataSetPlan, write_shards
from cps_ray.datasets.prepare.findings import Finding
from cps_ray.datasets.prepare.items import FromFiles, Source
from cps_ray.datasets.prepare.layouts import RawData
from cps_ray.datasets.prepare.masks import MaskReader
from cps_ray.datasets.prepare.recipe import Recipe
from cps_ray.datasets.shards import Index, Manifest, open_shards

# ------------------------------------------------------------------------------------- planted in official layouts


def findings(raw: RawData, out: Path) -> tuple[Finding, ...]:
    """Prepares data that must be refused; returns every finding."""
    make_item = FromFiles(raw.reader, raw.value_range)
    data = DataSetPlan(raw.splits, make_item, raw.classes, raw.palette, "a test", raw.findings, raw.notes)
    with pytest.raises(BadDataError) as caught:
        write_shards(out, data)
    return caught.value.findings


def prepared(raw: RawData, out: Path, *, skip_bad: bool = False) -> Manifest:
    make_item = FromFiles(raw.reader, raw.value_range)
    data = DataSetPlan(raw.splits, make_item, raw.classes, raw.palette, "a test", raw.findings, raw.notes)
    return write_shards(out, data, skip_bad=skip_bad)


def turned_photo(pixels: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3
    return encoded(pixels, "PNG", exif=exif)


Plant = Callable[[Path, Path], object]
"""Spoils an image and its mask, given as paths."""
ANYWHERE: dict[str, tuple[Plant, str]] = {
    "an image is an LFS pointer": (lambda image, mask: image.write_bytes(POINTER), "Git LFS pointer"),
    "a mask is an LFS pointer": (lambda image, mask: mask.write_bytes(POINTER), "Git LFS pointer"),
    "an image is cut short": (
        lambda image, mask: image.write_bytes(image.read_bytes()[:-60]),
        "the file",
    ),
    "a mask is cut short": (lambda image, mask: mask.write_bytes(mask.read_bytes()[:-30]), "the file"),
    "an image is empty": (lambda image, mask: image.write_bytes(b""), "the file is empty"),
    "an image is a web page": (lambda image, mask: image.write_bytes(b"<html>"), "is a web page, not an image"),
    "sizes differ": (
        lambda image, mask: save(image, scene("x", (12, 16))),
        "the image is 16x12 px and the mask 32x24 px",
    ),
    "EXIF of the image alone": (
        lambda image, mask: image.write_bytes(turned_photo(scene("x"))),
        "EXIF orientation 3, and nothing tells whether its mask is turned",
    ),
}
MASKS: dict[str, tuple[Plant, str]] = {
    "colours instead of ids": (lambda image, mask: save(mask, scene("x")), "this is an RGB PNG of 8 bits"),
    "grey levels": (lambda image, mask: save(mask, scene("x")[..., 0]), "so many are grey levels or smoothed edges"),
    "lossy": (
        lambda image, mask: mask.write_bytes(encoded(np.zeros(trees.SIZE, np.uint8), "JPEG")),
        "this is a grey JPEG of 8 bits",
    ),
}


@pytest.mark.parametrize("trap", [*ANYWHERE, *MASKS, "an id above the table", "labelTrainIds among labelIds"])
def test_traps_in_cityscapes_are_found(tmp_path: Path, trap: str) -> None:
    raw = trees.cityscapes(tmp_path / "raw")
    key = city_id("aachen", 1)
    image = raw / f"leftImg8bit/train/aachen/{key}_leftImg8bit.png"
    mask = raw / f"gtFine/train/aachen/{key}_gtFine_labelIds.png"
    others: dict[str, tuple[Plant, str]] = {
        "an id above the table": (lambda image, mask: save(mask, patches("x", (7, 34, 77))), "also holds 34 ("),
        "labelTrainIds among labelIds": (
            lambda image, mask: save(mask, patches("x", (0, 1, 13, 255))),
            "masks must all be labelIds",
        ),
    }
    plant, message = (ANYWHERE | MASKS | others)[trap]
    plant(image, mask)
    assert_one(findings(layouts.cityscapes(raw), tmp_path / "out"), {str(image), str(mask)}, message)
    manifest = prepared(layouts.cityscapes(raw), tmp_path / "out", skip_bad=True)
    assert manifest.splits["train"].images == 4
    assert len(manifest.left_out) == 1


VOC_TRAPS: dict[str, tuple[Plant, str]] = {
    **ANYWHERE,
    **MASKS,
    "a class too many": (lambda image, mask: save(mask, patches("x", (0, 21))), "also holds 21 ("),
    "the palette read as colours": (
        lambda image, mask: save(mask, np.asarray(Image.open(mask).convert("RGB"))),
        "this is an RGB PNG of 8 bits",
    ),
}
SBD_TRAPS: dict[str, tuple[Plant, str]] = {
    **ANYWHERE,
    "a class too many": (lambda image, mask: trees.mat(mask, patches("x", (0, 21))), "also holds 21 ("),
    "no struct of SBD": (lambda image, mask: savemat(mask, {"a": np.eye(3), "b": np.eye(3)}), "must hold `GTcls`"),
}


@pytest.mark.parametrize("trap", VOC_TRAPS)
def test_traps_in_voc_are_found(tmp_path: Path, trap: str) -> None:
    raw, sbd = trees.voc(tmp_path / "voc"), trees.sbd(tmp_path / "sbd")
    image = raw / "VOCdevkit/VOC2012/JPEGImages/2008_000015.jpg"
    mask = raw / "VOCdevkit/VOC2012/SegmentationClass/2008_000015.png"
    plant, message = VOC_TRAPS[trap]
    plant(image, mask)
    found = layouts.voc(raw, sbd=sbd, published=True)
    assert_one(findings(found, tmp_path / "out"), {str(image), str(mask)}, message)


@pytest.mark.parametrize("trap", SBD_TRAPS)
def test_traps_in_sbd_are_found(tmp_path: Path, trap: str) -> None:
    raw, sbd = trees.voc(tmp_path / "voc"), trees.sbd(tmp_path / "sbd")
    image = raw / "VOCdevkit/VOC2012/JPEGImages/2008_000023.jpg"
    mask = sbd / "benchmark_RELEASE/dataset/cls/2008_000023.mat"
    plant, message = SBD_TRAPS[trap]
    plant(image, mask)
    found = layouts.voc(raw, sbd=sbd, published=True)
    assert_one(findings(found, tmp_path / "out"), {str(image), str(mask)}, message)


def assert_one(found: tuple[Finding, ...], paths: set[str], message: str) -> None:
    """There is one fatal finding, which names the file, what was found, and what to do."""
    (finding,) = (finding for finding in found if finding.fatal)
    assert finding.where in paths
    assert message in finding.line
    assert finding.found
    assert finding.remedy


def test_all_traps_at_once_are_all_reported(tmp_path: Path) -> None:
    """Nothing hides behind the first problem."""
    raw = trees.cityscapes(tmp_path / "raw", train_extra=0)
    traps = {**ANYWHERE, **MASKS}
    paths = {}
    for frame, (trap, (plant, _)) in enumerate(traps.items()):
        trees.city_image(raw, "train", "zurich", frame)
        trees.city_mask(raw, "train", "zurich", frame)
        key = city_id("zurich", frame)
        image = raw / f"leftImg8bit/train/zurich/{key}_leftImg8bit.png"
        mask = raw / f"gtFine/train/zurich/{key}_gtFine_labelIds.png"
        plant(image, mask)
        paths[trap] = {str(image), str(mask)}
    next(raw.glob("gtFine/train/bochum/*000001_gtFine_labelIds.png")).unlink()
    next(raw.glob("leftImg8bit/train/bochum/*000000_leftImg8bit.png")).unlink()
    twin = raw / f"leftImg8bit/train/aachen/{city_id('aachen', 0)}_leftImg8bit.png"
    shutil.copy(raw / f"leftImg8bit/val/munster/{city_id('munster', 0)}_leftImg8bit.png", twin)
    found = [finding for finding in findings(layouts.cityscapes(raw), tmp_path / "out") if finding.fatal]
    assert len(found) == len(traps) + 3
    for trap, (_, message) in traps.items():
        assert [finding for finding in found if finding.where in paths[trap] and message in finding.line], trap
    assert {finding.rule for finding in found} >= {"no mask", "no image", checks.SAME_IMAGE}
    manifest = prepared(layouts.cityscapes(raw), tmp_path / "out", skip_bad=True)
    assert len(manifest.left_out) == len(found)
    assert manifest.splits["train"].images == 2, "all that was sound in aachen and bochum"


def test_masks_of_unlabelled_images_are_never_opened(tmp_path: Path) -> None:
    raw = trees.cityscapes(tmp_path / "raw")
    for path in [*raw.glob("gtFine/test/*/*"), *raw.glob("gtCoarse/*/*/*")]:
        path.write_bytes(b"garbage")
    manifest = prepared(layouts.cityscapes(raw, unlabeled=["train_extra", "test"]), tmp_path / "out")
    assert (manifest.splits["train"].images, manifest.splits["train"].masks) == (9, 5)


def test_a_sound_data_set_of_official_layout_passes(tmp_path: Path) -> None:
    notes = prepared(layouts.cityscapes(trees.cityscapes(tmp_path / "city")), tmp_path / "a").notes
    assert notes[0] == "masks hold labelIds"
    assert len([note for note in notes if "no mask shows" in note]) == 3, "tiny masks show 8 of the 19 classes"
    assert len(notes) == 4
    voc = layouts.voc(trees.voc(tmp_path / "voc"), sbd=trees.sbd(tmp_path / "sbd"), published=True)
    assert all("no mask shows" in note for note in prepared(voc, tmp_path / "b").notes[1:])


# ------------------------------------------------------------------------------------------ traps of other folders


def folder_data(raw: Path, **settings: Any) -> RawData:
    classes = [{"name": name, "color": (place, 0, 0)} for place, name in enumerate(("x", "y"))]
    splits = {"train": {"images": "images/*", "masks": "masks/*"}}
    return layouts.folder(raw, Recipe.model_validate({"classes": classes, "splits": splits} | settings))


def masks(raw: Path, values: tuple[int, ...], images: int = 2) -> Path:
    for number in range(images):
        save(raw / f"images/{number}.png", scene(f"i{number}"))
        save(raw / f"masks/{number}.png", patches(f"m{number}", values))
    return raw


def test_white_as_a_class_is_refused_until_the_recipe_says_what_it_is(tmp_path: Path) -> None:
    raw = masks(tmp_path / "raw", (0, 255))
    finding, alone = (finding for finding in findings(folder_data(raw), tmp_path / "out") if finding.fatal)
    assert "all of them show only" in alone.found
    assert "255 means ignore, but the masks of split train hold only 0 and 255" in finding.found
    assert "give that class `ids: [255]`; if not, list 255 in `ignore_ids`" in finding.remedy
    classes = [{"name": "x"}, {"name": "y", "ids": [255]}]
    assert prepared(folder_data(raw, classes=classes), tmp_path / "class").splits["train"].class_images == (2, 2)
    save(raw / "masks/0.png", np.ones((24, 32), np.uint8))
    assert prepared(folder_data(raw, ignore_ids=[255]), tmp_path / "void").splits["train"].class_images == (1, 1)


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ((1, 2), "the ids seem to start at 1: give the classes `ids` in the recipe"),
        ((0, 1, 11), "map them with `ids` or `ignore_ids` in the recipe"),
        ((0, 5), "map them with `ids` or `ignore_ids` in the recipe"),
    ],
    ids=["from 1", "void is 11", "a gap"],
)
def test_values_outside_the_table_are_refused_until_mapped(
    tmp_path: Path, values: tuple[int, ...], remedy: str
) -> None:
    raw = masks(tmp_path / "raw", values)
    found = [finding for finding in findings(folder_data(raw), tmp_path / "out") if finding.fatal]
    assert [finding.remedy for finding in found] == [remedy] * 2
    mapped = [{"name": "x", "ids": [values[0]]}, {"name": "y", "ids": [values[1]]}]
    assert (
        prepared(folder_data(raw, classes=mapped, ignore_ids=list(values[2:])), tmp_path / "out").splits["train"].masks
        == 2
    )


def test_repeated_names_and_missing_partners(tmp_path: Path) -> None:
    raw = masks(tmp_path / "raw", (0, 1))
    save(raw / "images/0.jpg", scene("another"))
    (raw / "masks/1.png").unlink()
    rules = {finding.rule for finding in findings(folder_data(raw), tmp_path / "out") if finding.fatal}
    assert rules == {"ids repeat", "no mask"}


def test_interpolated_masks_are_warned_of(tmp_path: Path) -> None:
    """Also where images are shrunk, which hides the smooth edges."""
    raw = masks(tmp_path / "raw", (0, 4, 9))
    classes = [{"name": str(place)} for place in range(10)]
    sharp = prepared(folder_data(raw, classes=classes), tmp_path / "sharp")
    assert not [note for note in sharp.notes if "must be sharp" in note]
    for path in raw.glob("masks/*"):
        with Image.open(path) as image:
            mask = np.asarray(image)
        twice = cv2.resize(mask, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR)
        save(path, twice)
        save(raw / "images" / path.name, scene(path.stem, twice.shape))
    for scale in (1.0, 0.5):
        found = folder_data(raw, classes=classes)
        made = DataSetPlan(found.splits, FromFiles(found.reader, None, scale), found.classes, found.palette, "a test")
        notes = write_shards(tmp_path / f"smooth {scale}", made).notes
        assert [note for note in notes if "edges between classes must be sharp, but" in note], scale


def test_16_bit_images_that_use_little_of_their_range_are_warned_of(tmp_path: Path) -> None:
    raw = masks(tmp_path / "raw", (0, 1))
    for path in raw.glob("images/*"):
        save(path, scene(path.name)[..., 0].astype(np.uint16) * 16)
    (note,) = prepared(folder_data(raw), tmp_path / "dark").notes
    assert "and will be nearly black; say in the recipe what is white: `value_range: [0, " in note
    assert prepared(folder_data(raw, value_range=(0, 4095)), tmp_path / "out").notes == ()


# ----------------------------------------------------------------------------------------------- the whole data set


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "raw"


def check_prepared(raw: Path, **splits: list[Source]) -> list[Finding]:
    """Prepares the splits without the files that cannot be used; returns what the checks of the whole data set find."""
    out = raw.parent / "out"
    write_shards(out, plan(splits), skip_bad=True)
    return checks.check_prepared(indexes(out), trees.CLASSES)


def indexes(out: Path) -> dict[str, Index]:
    shards = open_shards(out)
    return {name: shards.index(name) for name in shards.manifest.splits}


def test_nothing_is_found_where_nothing_is_wrong(raw: Path) -> None:
    assert check_prepared(raw, train=[pair(raw, key) for key in "abc"], val=[pair(raw, key) for key in "de"]) == []


def test_near_duplicates_in_two_splits_are_warned_of(raw: Path) -> None:
    """A copy that was saved again, smaller and brighter, is named; images that look different are not."""
    sources = [pair(raw, key, size=(60, 80)) for key in "abcd"]
    pixels = np.clip(cv2.resize(scene("b", (60, 80)), (60, 45), interpolation=cv2.INTER_AREA).astype(int) + 9, 0, 255)
    (raw / "copy.jpg").write_bytes(encoded(pixels.astype(np.uint8), "JPEG", quality=70))
    copy = Source("copy", str(raw / "copy.jpg"))
    (finding,) = check_prepared(raw, train=sources[:3], val=[sources[3], copy])
    assert (finding.rule, finding.where, finding.fatal) == ("near duplicates", "train and val", False)
    assert "1 pairs look nearly the same (b ~ copy)" in finding.found


def test_more_rows_than_are_compared_at_once(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_ROWS_AT_ONCE", 2)
    train = [pair(raw, f"t{n}", masked=False) for n in range(5)]
    (raw / "copy.jpg").write_bytes(encoded(scene("t4"), "JPEG", quality=90))
    write_shards(raw.parent / "out", plan({"train": train, "val": [Source("copy", str(raw / "copy.jpg"))]}))
    found = indexes(raw.parent / "out")
    assert [(row, column) for row, column, _ in checks.near_pairs(found["train"], found["val"])] == [(4, 0)]


def test_images_that_repeat_in_a_split_are_warned_of(raw: Path) -> None:
    sources = [pair(raw, key) for key in "abc"]
    again = [Source(f"{source.id} again", source.image, source.masks) for source in sources[:2]]
    (finding,) = check_prepared(raw, train=[*sources, *again])
    assert "2 images should be in the split once, but are there again (a = a again, b = b again)" in finding.found


def test_which_split_keeps_an_image_that_all_splits_hold(raw: Path) -> None:
    """The test set first, then val, because an image in two splits spoils scores."""
    kept = {name: [pair(raw, name)] for name in ("train", "val", "test")}
    for name, sources in kept.items():
        (raw / f"{name} copy.png").write_bytes((raw / "val.png").read_bytes())
        sources.append(Source(f"{name} copy", str(raw / f"{name} copy.png")))
    with pytest.raises(BadDataError) as caught:
        write_shards(raw.parent / "out", plan(kept))
    lost = {Path(finding.where).name: finding.remedy for finding in caught.value.findings if finding.fatal}
    assert lost == {
        "train copy.png": "take it out of train",
        "val copy.png": "take it out of val",
        "val.png": "take it out of val",
    }


def test_classes_that_no_mask_shows_are_warned_of(raw: Path) -> None:
    train = [pair(raw, "a", values=(0, 1)), pair(raw, "b", values=(0,)), pair(raw, "c", masked=False)]
    found = check_prepared(raw, train=train, val=[pair(raw, "d", values=(0, 2))])
    assert [(finding.rule, finding.where, finding.fatal) for finding in found] == [
        ("class is absent", "train", False),
        ("class is absent", "val", False),
    ]
    assert "no mask shows water: such a class is never learnt" in found[0].found
    assert "no mask shows stone: such a class counts in no mean IoU of this split" in found[1].found


def test_a_split_without_masks_lacks_no_class(raw: Path) -> None:
    assert check_prepared(raw, train=[pair(raw, "a", masked=False)]) == []


def test_empty_masks_are_warned_of(raw: Path) -> None:
    found = check_prepared(raw, train=[pair(raw, "a"), pair(raw, "b", values=(255,)), pair(raw, "c", values=(255,))])
    assert [finding.rule for finding in found] == ["mask is empty", "most is ignored"]
    assert "2 have none (b, c)" in found[0].found
    assert "67 % of the masks is ignored" in found[1].found


def test_255_beside_many_classes_is_what_it_says() -> None:
    by_default = MaskReader("ids", READER.meanings, 3, void_by_default=True)
    assert checks.check_mask_values("train", "m.png", {0: 5, 1: 5, 255: 9}, by_default) == []
    assert checks.check_mask_values("train", "m.png", {0: 5, 1: 9}, by_default) == []
    assert checks.check_mask_values("train", "m.png", {0: 5, 255: 9}, READER) == [], "the recipe says so"
    (finding,) = checks.check_mask_values("train", "m.png", {3: 5, 255: 9}, by_default)
    assert finding.whole_split


def test_an_image_in_16_bits_over_its_range_is_no_finding() -> None:
    assert checks.check_image_peak("train", "i.png", 65535, None) == []
    assert checks.check_image_peak("train", "i.png", 4095, (0, 4095)) == []
    assert checks.check_image_peak("train", "i.png", None, None) == []
    assert checks.check_image_peak("train", "i.png", 4095, None)
