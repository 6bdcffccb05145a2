"""Recipes: what a person writes about a folder, and errors that name the line."""

from pathlib import Path
from typing import Any

import pytest

from cps_ray.datasets.prepare.masks import pack_color
from cps_ray.datasets.prepare.recipe import Recipe, SplitRecipe, load_recipe, voc_color
from cps_ray.errors import ConfigError

RECIPE = """\
classes:
  - {name: soil, color: [0, 0, 0]}
  - {name: crop, color: [0, 200, 0], ids: [1, 4]}
ignore_ids: [9]
splits:
  train: {images: images/*, masks: masks/*}
"""


def loaded(tmp_path: Path, text: str) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(text)
    return load_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_from_yaml(tmp_path: Path) -> None:
    found = loaded(tmp_path, RECIPE)
    assert found.splits["train"] == SplitRecipe(images=("images/*",), masks=("masks/*",))
    reader = found.reader()
    assert reader.meanings == {0: 0, 1: 1, 4: 1, 9: 255, 255: 255}
    assert (reader.coding, reader.num_classes) == ("ids", 2)
    assert reader.void_by_default, "the recipe does not say what 255 means"
    assert found.palette() == ((0, 0, 0), (0, 200, 0))


def test_the_shortest_recipe(tmp_path: Path) -> None:
    found = loaded(tmp_path, "classes: [{name: a}, {name: b}]\nsplits: {train: {images: a/*, masks: b/*}}\n")
    assert found.reader().meanings == {0: 0, 1: 1, 255: 255}
    assert found.palette() == ((0, 0, 0), (128, 0, 0)), "without colours, those of VOC"


@pytest.mark.parametrize("void", [0, 11, 254, 255, 65535, -1])
def test_any_value_may_be_void(void: int) -> None:
    reader = recipe(classes=[{"name": "a", "ids": [1]}, {"name": "b", "ids": [2]}], ignore_ids=[void]).reader()
    assert reader.meanings == {1: 0, 2: 1, void: 255, 255: 255}
    assert reader.void_by_default == (void != 255)


def test_255_may_be_a_class() -> None:
    reader = recipe(classes=[{"name": "a"}, {"name": "b", "ids": [255]}]).reader()
    assert reader.meanings == {0: 0, 255: 1}
    assert not reader.void_by_default


def test_colours_may_mean_classes(tmp_path: Path) -> None:
    text = """\
mask_coding: colors
classes:
  - {name: soil, color: [10, 0, 0]}
  - {name: crop, colors: [[0, 200, 0], [0, 0, 255]]}
ignore_colors: [[255, 255, 255]]
value_range: [0, 4095]
splits: {train: {images: images/*, masks: masks/*}}
"""
    found = loaded(tmp_path, text)
    meanings = {
        pack_color((10, 0, 0)): 0,
        pack_color((0, 200, 0)): 1,
        pack_color((0, 0, 255)): 1,
        pack_color((255, 255, 255)): 255,
    }
    assert found.reader().meanings == meanings
    assert found.value_range == (0, 4095)


def test_a_split_is_one_pattern_or_several(tmp_path: Path) -> None:
    text = RECIPE.replace("images: images/*", "images: [a/*, 'b/**/*.png'], unlabeled: more/*, list: t.txt")
    split = loaded(tmp_path, text).splits["train"]
    assert isinstance(split, SplitRecipe)
    assert (split.images, split.unlabeled, split.list) == (("a/*", "b/**/*.png"), ("more/*",), "t.txt")


def test_masks_are_one_pattern_for_all_classes_or_one_per_class(tmp_path: Path) -> None:
    text = RECIPE.replace("soil", "background").replace("masks: masks/*", "masks: {crop: [c/*, d/*], background: s/*}")
    assert loaded(tmp_path, text).files["train"].class_masks == {"crop": ("c/*", "d/*"), "background": ("s/*",)}
    assert loaded(tmp_path, RECIPE).files["train"].class_masks == {"": ("masks/*",)}


def test_a_split_may_be_a_fraction_of_the_labelled_images(tmp_path: Path) -> None:
    found = loaded(tmp_path, RECIPE + "  val: 0.2\n  test: 0.25\ngroup_by: '^a'\ndraw_seed: 3\n")
    assert (list(found.splits), list(found.files)) == (["train", "val", "test"], ["train"])
    assert (found.fractions, found.group_by, found.draw_seed) == ({"val": 0.2, "test": 0.25}, "^a", 3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ids: [1, 4]", "ids: [0, 4]", r"recipe.yaml:.*\[0\] appear twice"),
        ("ids: [1, 4]", "ids: [1, 9]", r"recipe.yaml:.*\[9\] appear twice"),
        ("ids: [1, 4]", "ids: []", "recipe.yaml:3:.*ids"),
        ("ids: [1, 4]", "ids: [one]", "recipe.yaml:3:.*ids"),
        ("ids: [1, 4]", "colors: [[1, 1, 1]]", "recipe.yaml:.*`colors` and `ignore_colors` are for"),
        ("[0, 200, 0]", "[0, 256, 0]", "recipe.yaml:3:.*255"),
        ("name: crop", "name: soil", "recipe.yaml:.*class names must be unique"),
        ("masks: masks/*", "mask: masks/*", "recipe.yaml:6:.*mask"),
        (", masks: masks/*", "", "recipe.yaml:6:.*`splits.train.images` and `splits.train.masks`.* belong together"),
        (
            "images: images/*, masks: masks/*",
            "prefix: x",
            "recipe.yaml:6:.*a split needs `splits.train.images` and `splits.train.masks`",
        ),
        ("images/*", "../images/*", "recipe.yaml:6:.*a pattern is relative to the raw folder"),
        ("images/*", "/images/*", "recipe.yaml:6:.*a pattern is relative to the raw folder"),
        ("images/*", "images/**.png", "recipe.yaml:6:.*a pattern is relative to the raw folder"),
        ("images/*", "''", "recipe.yaml:6:.*a pattern is relative to the raw folder"),
        ("images/*", "'images/[z-a]*'", r"recipe.yaml:6:.*written as in a shell, but 'images/\[z-a\]\*' is not"),
        (
            "masks: masks/*",
            "masks: {corp: m/*}",
            "recipe.yaml:6:.*must name classes, but 'corp' is none. Did you mean crop?",
        ),
        ("masks: masks/*", "masks: {'': m/*}", "recipe.yaml:6:.*must name classes, but one name is empty"),
        (
            "masks: masks/*",
            "masks: {crop: ../m/*}",
            "recipe.yaml:6: splits.train.masks.crop.*relative to the raw folder",
        ),
        (
            "images: images/*, masks: masks/*",
            "unlabeled: rest",
            "recipe.yaml:6:.*`splits.train.unlabeled: rest` means images of .*, so it needs `splits.train.images`",
        ),
        (
            "images: images/*, masks: masks/*",
            "unlabeled: u/*, ignore_masks: m/*",
            "recipe.yaml:6:.*`splits.train.ignore_masks` are for images with a mask",
        ),
        (
            "train: {images: images/*, masks: masks/*}",
            "val: 0.2",
            "recipe.yaml:5:.*drawn from the labelled images of `train`",
        ),
        (
            "train: {images: images/*, masks: masks/*}",
            "{train: {unlabeled: u/*}, val: 0.2}",
            "recipe.yaml:5:.*drawn from the labelled images of `train`",
        ),
        (
            "masks: masks/*}",
            "masks: masks/*}\n  val: 0.6\n  test: 0.4",
            "must leave images to `train`, but val, test add up to 1",
        ),
        ("masks: masks/*}", "masks: masks/*}\n  val: 1", "recipe.yaml:7: splits.val: must be .*less than 1, but got 1"),
        (
            "masks: masks/*}",
            "masks: masks/*}\n  val: 0",
            "recipe.yaml:7: splits.val: must be .*greater than 0, but got 0",
        ),
        (
            "ignore_ids: [9]",
            "group_by: a",
            "recipe.yaml:4: `group_by` is for splits that are drawn, such as `val: 0.2`",
        ),
        ("ignore_ids: [9]", "draw_seed: 1", "recipe.yaml:4: `draw_seed` is for splits that are drawn"),
        ("ignore_ids: [9]", "group_by: '('", r"recipe.yaml:4: group_by: must be a regular expression, but got '\('"),
        ("train:", "tr ain:", "recipe.yaml:6:"),
        ("ignore_ids: [9]", "value_range: [5, 5]", r"recipe.yaml:.*low < high, but got \[5"),
        ("ignore_ids: [9]", "mask_coding: colors", "recipe.yaml:.*`ids` and `ignore_ids` are for"),
        ("ignore_ids: [9]", "mask_suffix: _mask", "recipe.yaml:4:.*mask_suffix"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in RECIPE
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, RECIPE.replace(old, new, 1))


def test_classes_of_colours_need_them(tmp_path: Path) -> None:
    text = (
        RECIPE.replace(", color: [0, 0, 0]", "")
        .replace(", ids: [1, 4]", "")
        .replace("ignore_ids: [9]", "mask_coding: colors")
    )
    with pytest.raises(ConfigError, match=r"needs a `color` for every class, but \['soil'\] have none"):
        loaded(tmp_path, text)


def recipe(**settings: Any) -> Recipe:
    return Recipe.model_validate({"splits": {"train": {"images": "i/*", "masks": "m/*"}}} | settings)


def test_vocs_palette() -> None:
    wanted = "0 0 0, 128 0 0, 0 128 0, 128 128 0, 0 0 128, 128 0 128, 0 128 128, 128 128 128, 64 0 0"
    assert [voc_color(index) for index in range(9)] == [tuple(map(int, color.split())) for color in wanted.split(",")]
    assert (voc_color(20), voc_color(255)) == ((0, 64, 128), (224, 224, 192))


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[3] / "data").rglob("*.yaml")), ids=lambda path: path.name
)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert load_recipe(path).splits
