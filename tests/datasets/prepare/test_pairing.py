"""Pairing: no image ever gets the mask of another one, and every remedy that is printed helps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trees import save, scene

from cps_ray.datasets.prepare import layouts
from cps_ray.datasets.prepare.layouts import RawData
from cps_ray.datasets.prepare.recipe import Recipe
from cps_ray.errors import DataError

MASK = np.array([[0, 1, 2, 0], [1, 1, 2, 0]], np.uint8)


def found(raw: Path, train: Mapping[str, Any], **settings: Any) -> RawData:
    classes = [{"name": name} for name in ("background", "crop", "weed")]
    return layouts.folder(raw, Recipe.model_validate({"classes": classes, "splits": {"train": train}} | settings))


def image(raw: Path, *names: str) -> None:
    for name in names:
        save(raw / name, scene(name, (2, 4)))


def mask(raw: Path, *names: str) -> None:
    for name in names:
        save(raw / name, MASK)


def pairs(raw: Path, data: RawData) -> dict[str, tuple[str, ...]]:
    """Returns id -> paths of image, masks and field of view, relative to the raw folder."""
    return {
        source.id: tuple(str(Path(path).relative_to(raw)) for path in source.paths) for source in data.splits["train"]
    }


def where(raw: Path, data: RawData, rule: str) -> list[str]:
    return sorted(str(Path(finding.where).relative_to(raw)) for finding in data.findings if finding.rule == rule)


# ------------------------------------------------------------------------------------------------ names that repeat


@pytest.mark.parametrize(
    ("images", "masks"),
    [("images/*/*.png", "masks/*/*.png"), ("images/**/*", "masks/**/*"), ("images/{id}.png", "masks/{id}.png")],
)
def test_ids_hold_folders_where_names_repeat(tmp_path: Path, images: str, masks: str) -> None:
    image(tmp_path, "images/drive_a/00000.png", "images/drive_b/00000.png")
    mask(tmp_path, "masks/drive_b/00000.png")
    data = found(tmp_path, {"images": images, "masks": masks})
    assert pairs(tmp_path, data) == {"drive_b/00000": ("images/drive_b/00000.png", "masks/drive_b/00000.png")}
    assert where(tmp_path, data, "no mask") == ["images/drive_a/00000.png"]


def test_one_repeating_kind_makes_all_ids_of_the_split_long(tmp_path: Path) -> None:
    image(tmp_path, "images/a/0.png", "images/b/1.png", "more/a/7.jpg", "more/b/7.jpg")
    mask(tmp_path, "masks/a/0.png", "masks/b/1.png", "fov/a/0.png", "fov/b/1.png")
    split = {"images": "images/*/*", "masks": "masks/*/*", "unlabeled": "more/*/*", "ignore_masks": "fov/*/*"}
    data = found(tmp_path, split)
    assert list(pairs(tmp_path, data)) == ["a/0", "a/7", "b/1", "b/7"]
    assert data.notes == ("ids of split train hold folders, as file names repeat: a/0",)
    assert list(pairs(tmp_path, found(tmp_path, split | {"unlabeled": "more/a/*"}))) == ["0", "1", "7"]


def test_a_mask_of_another_folder_is_never_taken_for_the_only_image_of_its_name(tmp_path: Path) -> None:
    image(tmp_path, "images/a/0.png", "images/b/1.png")
    mask(tmp_path, "masks/a/0.png", "masks/b/0.png", "masks/b/1.png")
    for masks in ("masks/*/*.png", {"crop": "masks/*/*.png"}):
        data = found(tmp_path, {"images": "images/*/*.png", "masks": masks})
        assert pairs(tmp_path, data)["a/0"] == ("images/a/0.png", "masks/a/0.png")
        assert where(tmp_path, data, "no image") == ["masks/b/0.png"]


def test_every_file_of_an_id_that_means_two_images_goes(tmp_path: Path) -> None:
    image(tmp_path, "images/a.png", "images/a.jpg", "images/b.png")
    mask(tmp_path, "masks/a.png", "masks/b.png")
    split = {"images": "images/*", "masks": "masks/*"}
    data = found(tmp_path, split)
    assert where(tmp_path, data, "ids repeat") == ["images/a.jpg", "images/a.png", "masks/a.png"]
    assert not any(finding.whole_split for finding in data.findings)
    assert list(pairs(tmp_path, data)) == ["b"]
    assert "'a' means images/a.jpg, images/a.png; rename all but one, narrow the patterns" in data.findings[0].line

    assert not found(tmp_path, split | {"images": "images/*.png"}).findings, "the remedy: narrow the patterns"
    (tmp_path / "images/a.jpg").rename(tmp_path / "images/c.jpg")
    mask(tmp_path, "masks/c.png")
    assert list(pairs(tmp_path, found(tmp_path, split))) == ["a", "b", "c"], "the remedy: rename all but one"


def test_the_remedy_for_ids_that_repeat_in_spite_of_id(tmp_path: Path) -> None:
    image(tmp_path, "images/x/0.png", "images/y/0.png")
    mask(tmp_path, "masks/x/0.png", "masks/y/0.png")
    data = found(tmp_path, {"images": "images/*/{id}.png", "masks": "masks/*/{id}.png"})
    assert [finding.rule for finding in data.findings] == 4 * ["ids repeat"]
    assert "or let `{id}` take in the folders, as images/{id}.png does" in data.findings[0].line
    assert not pairs(tmp_path, data)
    data = found(tmp_path, {"images": "images/{id}.png", "masks": "masks/{id}.png"})
    assert not data.findings
    assert pairs(tmp_path, data)["y/0"] == ("images/y/0.png", "masks/y/0.png")


def test_unlabelled_images_may_have_the_names_of_labelled_ones(tmp_path: Path) -> None:
    image(tmp_path, "images/1.png", "more/1.jpg", "more/2.jpg")
    mask(tmp_path, "masks/1.png")
    data = found(tmp_path, {"images": "images/*", "masks": "masks/*", "unlabeled": "more/*"})
    assert pairs(tmp_path, data) == {
        "1": ("images/1.png", "masks/1.png"),
        "more/1": ("more/1.jpg",),
        "more/2": ("more/2.jpg",),
    }


# ---------------------------------------------------------------------------------------------- several masks, none


@pytest.mark.parametrize(
    ("split", "files", "remedy"),
    [
        (  # one per object, as DSB2018
            {"images": "{id}/images/*.png", "masks": "{id}/masks/*.png"},
            ["a/masks/7f.png", "a/masks/3c.png"],
            {"weed": "{id}/masks/*.png"},
        ),
        (
            {"images": "{id}/images/*.png", "masks": "masks/*/{id}.png"},
            ["masks/red/a.png", "masks/blue/a.png"],
            {"crop": "masks/red/{id}.png", "weed": "masks/blue/{id}.png"},
        ),
        (
            {"images": "a/images/*.png", "masks": "masks/*/*.png"},
            ["masks/red/a.png", "masks/blue/a.png"],
            {"crop": "masks/red/*.png", "weed": "masks/blue/*.png"},
        ),
        (
            {"images": "a/images/*.png", "masks": ["m/*", "n/*"]},
            ["m/a.png", "n/a.png"],
            "m/*",  # narrow the pattern
        ),
    ],
)  # fmt: skip
def test_several_masks_for_one_image_are_never_skipped(
    tmp_path: Path, split: dict[str, Any], files: list[str], remedy: Any
) -> None:
    image(tmp_path, "a/images/a.png")
    mask(tmp_path, *files)
    data = found(tmp_path, split)
    assert where(tmp_path, data, "several masks for one image") == sorted(files)
    assert all(finding.whole_split for finding in data.findings)
    assert (
        "'a' has 2; if each holds a class or an object, name the class, which unites them: `masks: {weed: PATTERN}`"
        in (data.findings[0].line)
    )
    assert not pairs(tmp_path, data)

    data = found(tmp_path, split | {"masks": remedy})
    assert not data.findings
    assert sorted(pairs(tmp_path, data)["a"][1:]) == sorted(files if isinstance(remedy, dict) else files[:1])


def test_masks_of_a_class_unite_in_the_order_of_the_classes(tmp_path: Path) -> None:
    image(tmp_path, "images/1.png", "images/2.png", "images/3.png")
    mask(tmp_path, "weed/1.png", "weed/2.png", "crop/1_b.png", "crop/1_a.png")
    masks = {"weed": "weed/*", "crop": ["crop/{id}_b.png", "crop/{id}_a.png"]}
    data = found(tmp_path, {"images": "images/*", "masks": masks})
    assert pairs(tmp_path, data) == {
        "1": ("images/1.png", "crop/1_a.png", "crop/1_b.png", "weed/1.png"),
        "2": ("images/2.png", "weed/2.png"),
    }
    assert [mask.train_id for mask in data.splits["train"][0].masks] == [1, 1, 2]
    assert where(tmp_path, data, "no mask") == ["images/3.png"]


def test_masks_of_a_class_unite_only_where_it_is_said_which_image_they_are_of(tmp_path: Path) -> None:
    image(tmp_path, "images/1.png", "images/2.png")
    mask(tmp_path, "masks/i/1.png", "masks/j/1.png", "masks/j/2.png")
    data = found(tmp_path, {"images": "images/*", "masks": {"crop": "masks/*/*.png"}})
    assert all(finding.whole_split for finding in data.findings)
    assert "'1' has 2; say with `{id}` which part of the path is the image's, as in masks/*/{id}.png." in (
        data.findings[0].line
    )
    data = found(tmp_path, {"images": "images/*", "masks": {"crop": "masks/*/{id}.png"}})
    assert pairs(tmp_path, data)["1"] == ("images/1.png", "masks/i/1.png", "masks/j/1.png")


def test_a_class_without_files_is_named(tmp_path: Path) -> None:
    image(tmp_path, "images/1.png")
    mask(tmp_path, "crop/1.png")
    with pytest.raises(DataError, match=r"splits.train.masks.weed 'weed/\*' must match files, but matches none"):
        found(tmp_path, {"images": "images/*", "masks": {"crop": "crop/*", "weed": "weed/*"}})


def test_the_field_of_view_of_every_labelled_image(tmp_path: Path) -> None:
    image(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    mask(tmp_path, "1_manual.png", "2_manual.png", "1_fov.png")
    split = {"images": "{id}.jpg", "masks": "{id}_manual.png", "ignore_masks": "{id}_fov.png", "unlabeled": "rest"}
    data = found(tmp_path, split)
    assert data.splits["train"][0].field_of_view == str(tmp_path / "1_fov.png")
    (finding,) = data.findings
    assert finding.line == (
        f"{tmp_path}/2.jpg: in split train every labelled image must have one of the `ignore_masks`, but '2' has none "
        "(of 1 such); add it, or fix the patterns."
    )
    assert list(pairs(tmp_path, data)) == ["1", "3"], "where every pixel of 2 would count"
    mask(tmp_path, "2_fov.png")
    data = found(tmp_path, split)
    assert not data.findings
    assert pairs(tmp_path, data)["3"] == ("3.jpg",), "an unlabelled image needs none"


def test_the_rest_is_unlabelled(tmp_path: Path) -> None:
    image(tmp_path, "1.jpg", "2.JPG", "3.jpeg", "more/4.jpg")
    mask(tmp_path, "2.png")
    split = {"images": "*.jpg", "masks": "*.png"}
    missing = found(tmp_path, split).findings
    assert [Path(finding.where).name for finding in missing] == ["1.jpg", "3.jpeg"]
    assert missing[0].remedy.endswith("or take such images as unlabelled: `unlabeled: rest`")

    data = found(tmp_path, split | {"unlabeled": "rest"})
    assert pairs(tmp_path, data) == {"1": ("1.jpg",), "2": ("2.JPG", "2.png"), "3": ("3.jpeg",)}
    assert not data.findings
    assert data.notes == ("split train: 2 images have no mask, and are unlabelled",)
    data = found(tmp_path, split | {"unlabeled": ["rest", "more/*"]})
    assert list(pairs(tmp_path, data)) == ["1", "2", "3", "4"]
    assert data.notes == ("split train: 2 images have no mask, and are unlabelled",)


@pytest.mark.parametrize(
    "split",
    [
        {"images": "{id}.png", "masks": "{id}_mask.png", "ignore_masks": "{id}_fov.png"},
        {"images": "{id}_rgb.png", "masks": "{id}.png"},
        {"images": "*.png", "masks": {"weed": "{id}_mask.png"}},
        {"images": "{id}.png", "masks": {"crop": "{id}_mask.png", "weed": "{id}_mask_2.png"}},
    ],
)
def test_the_narrower_pattern_has_the_file(tmp_path: Path, split: dict[str, Any]) -> None:
    rgb = "_rgb" if "rgb" in split["images"] else ""
    image(tmp_path, f"1{rgb}.png", f"2{rgb}.png")
    mask(tmp_path, *(pattern.replace("{id}", "1") for key, value in split.items() if key != "images" for pattern in (
        value.values() if isinstance(value, dict) else [value]
    )))  # fmt: skip
    data = found(tmp_path, split | {"unlabeled": "rest"})
    assert list(pairs(tmp_path, data)) == ["1", "2"]
    assert [bool(source.masks) for source in data.splits["train"]] == [True, False]


def test_a_file_of_two_purposes_is_refused(tmp_path: Path) -> None:
    image(tmp_path, "1.png")
    with pytest.raises(
        DataError, match=r"1.png: a file has one purpose, but splits.train.images and splits.train.masks both"
    ):
        found(tmp_path, {"images": "*", "masks": "*.png"})
    mask(tmp_path, "m/1.png")
    with pytest.raises(
        DataError, match=r"but splits.train.masks.crop and splits.train.masks.weed both find it; narrow one"
    ):
        found(tmp_path, {"images": "*", "masks": {"weed": "m/*", "crop": "m/*"}})


def test_an_image_in_both_lists_has_a_way_out(tmp_path: Path) -> None:
    image(tmp_path, "1.jpg", "2.jpg")
    mask(tmp_path, "2.png")
    split = {"images": "*.jpg", "masks": "*.png"}
    with pytest.raises(DataError, match=r"both list 1, 2; those of `images` that have no mask are `unlabeled: rest`"):
        found(tmp_path, split | {"unlabeled": "*.jpg"})
    assert list(pairs(tmp_path, found(tmp_path, split | {"unlabeled": "rest"}))) == ["1", "2"]


@pytest.mark.parametrize("more", [{}, {"unlabeled": "rest"}])
def test_patterns_by_which_nothing_belongs_together_are_refused(tmp_path: Path, more: dict[str, str]) -> None:
    image(tmp_path, "images/1_rgb.png", "images/2_rgb.png")
    mask(tmp_path, "masks/1_mask.png")
    message = (
        r"no mask belongs to an image: ids of images look like '1_rgb', of masks like '1_mask'; mark with `\{id\}`"
    )
    with pytest.raises(DataError, match=message):
        found(tmp_path, {"images": "images/*", "masks": "masks/*"} | more)
    assert "1" in pairs(tmp_path, found(tmp_path, {"images": "images/{id}_rgb.png", "masks": "masks/{id}_mask.png"}))


# ------------------------------------------------------------------------------------------------------------ others


def test_patterns_over_ids_keep_case_and_take_brackets(tmp_path: Path) -> None:
    image(tmp_path, "images/A.png", "images/a.png", "images/x[1].png", "images/x1.png")
    split = {"unlabeled": "images/*"}
    assert list(pairs(tmp_path, found(tmp_path, split | {"exclude": ["a", "x[1]"]}))) == ["A"]
    assert list(pairs(tmp_path, found(tmp_path, split | {"include": "a"}))) == ["a"]


def test_unicode_names_are_one_in_both_forms(tmp_path: Path) -> None:
    image(tmp_path, "images/mu\u0308nchen.png")
    mask(tmp_path, "masks/m\u00fcnchen.png")
    (tmp_path / "train.txt").write_text("m\u00fcnchen\n")
    split = {"images": "images/*", "masks": "masks/*", "list": "train.txt", "include": "mu\u0308n*"}
    assert list(pairs(tmp_path, found(tmp_path, split))) == ["m\u00fcnchen"]


def test_a_list_names_images_by_their_folders_where_names_repeat(tmp_path: Path) -> None:
    image(tmp_path, "images/a/0.png", "images/b/0.png", "images/b/photo 1.png")
    split = {"unlabeled": "images/*/*", "list": "train.txt"}
    (tmp_path / "train.txt").write_text("images\\b\\0.png\r\nimages/b/photo 1.png\r\n", encoding="utf-16")
    assert list(pairs(tmp_path, found(tmp_path, split))) == ["b/0", "b/photo 1"]
    (tmp_path / "train.txt").write_text("0\n")
    with pytest.raises(
        DataError, match=r"train.txt:1: '0' must mean one image of split train, but fits 'a/0' and 'b/0'"
    ):
        found(tmp_path, split)
