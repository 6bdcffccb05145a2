"""Raw folders: pairing, mapping, and every trap that a mask can be."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cps_ray.datasets.formats import CAMVID, camvid, folder
from cps_ray.datasets.recipe import Recipe, SplitRecipe, load_recipe
from cps_ray.datasets.shards import decode_mask, write_shards
from cps_ray.errors import ConfigError, DataError

SPLIT = {"images": ["images/*"], "masks": ["masks/*"]}


def recipe(*, classes: int = 3, ids: dict[int, list[int]] | None = None, **settings: Any) -> Recipe:
    """Classes c0, c1, ... of which some have `ids`; one split `train` unless `splits` is given."""
    entries = [{"name": f"c{k}", "color": (k, k, k), "ids": (ids or {}).get(k)} for k in range(classes)]
    return Recipe.model_validate({"classes": entries, "splits": {"train": SPLIT}} | settings)


def save(path: Path, values: Any, mode: str | None = None, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255] + [7] * 759)
        assert image.mode == "P"
    image.save(path, **options)


def save_image(path: Path) -> None:
    save(path, np.random.default_rng(list(str(path.name).encode())).integers(0, 256, (2, 4, 3)))


MASK = [[0, 1, 2, 0], [1, 1, 2, 0]]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        save_image(tmp_path / f"raw/images/{name}.jpg")
        save(tmp_path / f"raw/masks/{name}.png", MASK)
    return tmp_path / "raw"


def read(raw: Path, recipe: Recipe) -> dict[str, Any]:
    """Id -> train ids, or None, of the split `train`."""
    found = {item.id: item.mask for item in folder(raw, recipe)["train"]}
    return {name: None if mask is None else decode_mask(mask).tolist() for name, mask in found.items()}


def test_pairs_by_name_and_keeps_image_bytes(raw: Path) -> None:
    items = list(folder(raw, recipe())["train"])
    assert [item.id for item in items] == ["a", "b"]
    assert items[0].image == (raw / "images/a.jpg").read_bytes()
    assert read(raw, recipe()) == {"a": MASK, "b": MASK}


def test_raw_ids_are_mapped_and_ignored(raw: Path) -> None:
    save(raw / "masks/a.png", [[7, 8, 11, 255], [0, 9, 9, 7]])
    save(raw / "masks/b.png", [[7, 7, 7, 7]] * 2)
    found = read(raw, recipe(ids={0: [7], 1: [8, 9], 2: [11]}, ignore_ids=[0]))
    assert found["a"] == [[0, 1, 2, 255], [255, 1, 1, 0]]


def test_255_can_be_a_class(raw: Path) -> None:
    for name in "ab":
        save(raw / f"masks/{name}.png", [[0, 0, 255, 255]] * 2)
    assert read(raw, recipe(classes=2, ids={1: [255]}))["a"] == [[0, 0, 1, 1]] * 2


def test_palette_masks_keep_their_indices(raw: Path) -> None:
    save(raw / "masks/a.png", MASK, mode="P")
    assert read(raw, recipe())["a"] == MASK


def test_suffixes_unlabeled_include_exclude_and_prefix(tmp_path: Path) -> None:
    for name in ("bonn_1", "bonn_2", "kiel_1", "kiel_2"):
        save_image(tmp_path / f"images/deep/{name}_photo.png")
        save(tmp_path / f"masks/{name}_ids.png", MASK)
    save_image(tmp_path / "more/bonn_9_photo.png")
    (tmp_path / "more/.hidden").write_text("no image")
    both = {"images": "images/**/*.png", "masks": "masks/*"}
    splits = {
        "train": {**both, "unlabeled": ["more/*"], "exclude": "kiel_*"},
        "val": {**both, "include": ["kiel_*"], "exclude": ["kiel_2"], "prefix": "val/"},
    }
    found = folder(tmp_path, recipe(splits=splits, image_suffix="_photo", mask_suffix="_ids"))
    assert [(item.id, item.mask is None) for item in found["train"]] == [
        ("bonn_1", False),
        ("bonn_2", False),
        ("bonn_9", True),
    ]
    assert [item.id for item in found["val"]] == ["val/kiel_1"]


def unknown(raw: Path) -> None:
    save(raw / "masks/a.png", [[0, 1, 2, 3], [0, 1, 2, 3]])
    save(raw / "masks/b.png", [[0, 1, 7, 3], [0, 1, 2, 2]])


def from_one(raw: Path) -> None:
    for name in "ab":
        save(raw / f"masks/{name}.png", [[1, 2, 3, 1]] * 2)


def grey_levels(raw: Path) -> None:
    for name in "ab":
        save_image(raw / f"images/{name}.jpg")
        save(raw / f"masks/{name}.png", np.arange(64).reshape(8, 8))


def colour(raw: Path) -> None:
    save(raw / "masks/b.png", np.zeros((2, 4, 3)))


def jpeg(raw: Path) -> None:
    (raw / "masks/b.png").unlink()
    save(raw / "masks/b.jpg", MASK)


def deep(raw: Path) -> None:
    Image.fromarray(np.full((2, 4), 26001, np.uint16)).save(raw / "masks/b.png")


def binary(raw: Path) -> None:
    for name in "ab":
        save(raw / f"masks/{name}.png", [[0, 0, 255, 255]] * 2)


def pointer(raw: Path) -> None:
    (raw / "masks/b.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def truncated(raw: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 3, (64, 64))
    save(raw / "masks/b.png", noise)
    data = (raw / "masks/b.png").read_bytes()
    (raw / "masks/b.png").write_bytes(data[: len(data) // 2])


def unpaired(raw: Path) -> None:
    for name in "cdefg":
        save_image(raw / f"images/{name}.jpg")
    save(raw / "masks/x.png", MASK)


def same_names(raw: Path) -> None:
    save_image(raw / "images/a.png")


def no_masks(raw: Path) -> None:
    for path in (raw / "masks").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (unknown, r"a.png: mask values must be known, .* train also hold 3 \(3 px\), 7 \(1 px\); map them with `ids`"),
        (from_one, r"hold 3 \(4 px\); the ids seem to start at 1: give the classes `ids`"),
        (grey_levels, r"hold 3 \(2 px\), 4 \(2 px\), .* and 51 more; so many look like grey levels"),
        (colour, r"b.png: masks must have one channel .* colour image \(RGB\); turn colours into ids first"),
        (jpeg, r"b.jpg: masks must be PNG; JPEG does not keep ids"),
        (deep, r"b.png: mask values must be in 0..255, but reach 26001; is this an instance mask\?"),
        (binary, r"a.png: the masks of split train hold only 0 and 255, .* give that class `ids: \[255\]`"),
        (pointer, r"b.png: the mask cannot be read: it is a Git LFS pointer, run `git lfs pull`"),
        (truncated, r"b.png: the mask cannot be read: .*get the file again"),
        (
            unpaired,
            r"5 images have none \(\S+c.jpg, \S+d.jpg, \S+e.jpg and 2 more\), 1 masks have no image \(\S+x.png\)",
        ),
        (same_names, r"splits.train.images: file names must be unique, but \S+a.jpg and \S+a.png share one"),
        (no_masks, r"raw: splits.train.masks 'masks/\*' must match files, but matches none"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_traps(raw: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(raw)
    with pytest.raises(DataError, match=said) as caught:
        read(raw, recipe())
    assert "\n" not in str(caught.value)


def test_a_size_mismatch_tells_both(raw: Path, tmp_path: Path) -> None:
    save(raw / "masks/b.png", np.zeros((4, 2)))
    with pytest.raises(DataError, match=r"train item 'b': .* the image is 4x2 px and the mask 2x4 px; export both"):
        write_shards(
            tmp_path / "out",
            folder(raw, recipe()),
            classes="abc",
            palette=[(0, 0, 0)] * 3,
            made_by="",
            rows_per_shard=1,
        )


def test_a_split_without_images_is_refused(raw: Path) -> None:
    with pytest.raises(DataError, match="split train must have images, but `include` and `exclude` leave none"):
        folder(raw, recipe(splits={"train": SPLIT | {"include": ["z*"]}}))


def test_labeled_or_unlabeled_not_both(raw: Path) -> None:
    with pytest.raises(DataError, match="labelled or unlabelled, but both list a, b"):
        folder(raw, recipe(splits={"train": SPLIT | {"unlabeled": ["images/*"]}}))


def test_missing_raw_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nope: no such folder; it must be the folder that holds train/\*, trainannot/\*"
    ):
        camvid(tmp_path / "nope")


def test_camvid_maps_void_to_ignore(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        save_image(tmp_path / f"{split}/{split}_1.png")
        save(tmp_path / f"{split}annot/{split}_1.png", [[0, 10, 11, 5]] * 2)
    (item,) = camvid(tmp_path)["val"]
    assert item.id == "val_1"
    assert item.mask is not None
    assert decode_mask(item.mask).tolist() == [[0, 10, 255, 5]] * 2


@pytest.mark.skipif("CPS_RAY_CAMVID" not in os.environ, reason="CPS_RAY_CAMVID, the folder of raw CamVid, is not set")
def test_real_camvid() -> None:
    splits = camvid(Path(os.environ["CPS_RAY_CAMVID"]))
    items = {name: [next(items), *items] for name, items in splits.items()}
    assert {name: len(found) for name, found in items.items()} == {"train": 367, "val": 101, "test": 233}
    masks = [decode_mask(item.mask) for item in items["train"] if item.mask is not None]
    counts = np.bincount(np.concatenate([mask.ravel() for mask in masks]), minlength=256)
    share = dict(zip([entry.name for entry in CAMVID.classes], 100 * counts / counts.sum(), strict=False))
    assert share["Road"] == pytest.approx(31.66, abs=0.01)
    assert share["Bicyclist"] == pytest.approx(0.29, abs=0.01)
    assert 100 * counts[255] / counts.sum() == pytest.approx(3.95, abs=0.01)


RECIPE = """\
classes:
  - {name: soil, color: [0, 0, 0]}
  - {name: crop, color: [0, 200, 0], ids: [1, 4]}
ignore_ids: [9]
splits:
  train: {images: images/*, masks: masks/*}
"""


def test_recipe_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    found = load_recipe(tmp_path / "recipe.yaml")
    assert found.splits["train"] == SplitRecipe(images=("images/*",), masks=("masks/*",))
    assert found.train_ids() == {0: 0, 1: 1, 4: 1, 9: 255, 255: 255}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("ids: [1, 4]", "ids: [0, 4]", r"recipe.yaml:.*\[0\] appear twice"),
        ("ids: [1, 4]", "ids: [1, 9]", r"recipe.yaml:.*\[9\] appear twice"),
        ("name: crop", "name: soil", "recipe.yaml:.*class names must be unique"),
        ("masks: masks/*", "mask: masks/*", "recipe.yaml:6:.*mask"),
        (", masks: masks/*", "", "recipe.yaml:6:.*`images` and `masks` belong together"),
        ("images/*", "../images/*", "recipe.yaml:6:.*a pattern is relative to the raw folder"),
        ("ids: [1, 4]", "ids: [1, 256]", "recipe.yaml:3:.*255"),
    ],
)
def test_recipe_errors_name_the_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in RECIPE
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(ConfigError, match=said):
        load_recipe(tmp_path / "recipe.yaml")


def test_the_shipped_cityscapes_recipe() -> None:
    found = load_recipe(Path(__file__).parents[2] / "data/cityscapes/recipe.yaml")
    train_ids = found.train_ids()
    assert len(found.classes) == 19
    assert sorted(train_ids) == [*range(34), 255]
    assert (train_ids[7], train_ids[33], train_ids[4]) == (0, 18, 255)
    assert found.splits["train"].exclude == found.splits["val"].include
