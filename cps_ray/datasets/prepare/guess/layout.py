"""Which files of a folder are photos and which are masks, as patterns of a recipe."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from cps_ray.datasets.lists import normalized
from cps_ray.datasets.prepare.annotations.coco import read_coco
from cps_ray.datasets.prepare.annotations.files import foreign_annotation, read_json
from cps_ray.datasets.prepare.annotations.labelmap import read_labelmap
from cps_ray.datasets.prepare.annotations.yolo import read_yolo_names
from cps_ray.datasets.prepare.findings import BadItemError
from cps_ray.datasets.prepare.patterns import Pattern
from cps_ray.datasets.prepare.recipe import REST, RecipeColor
from cps_ray.datasets.raster import IMAGE_SUFFIXES
from cps_ray.errors import DataError
from cps_ray.text import first_few, printable

_ARRAYS = frozenset({".npy", ".mat"})
_SAME_SUFFIX = {".jpeg": ".jpg", ".tiff": ".tif"}
_MASK_WORDS = (
    "masks?|labels?|annots?|annotations?|annotated|annos?|gt|gtfine|groundtruths?|ground_?truth|segs?|segmentations?|segmentationclass|"
    "trimaps?|mattes?|labelids|labeltrainids|targets?"
)
_MASK_FOLDER = re.compile(
    rf"(?:.*[^a-z])?(?:{_MASK_WORDS})(?:[^a-z].*)?|(?:train|val|valid|test)(?:{_MASK_WORDS})", re.DOTALL
)
_MASK_STEM = re.compile(rf"(?:{_MASK_WORDS})[_\-. ].*|.*[_\-. ](?:{_MASK_WORDS})", re.DOTALL)
_SPLITS = {
    "train": re.compile(r"(?:.*[^a-z])?train(?:ing)?(?:[^a-z].*|annots?|masks?|labels?|images?|_?\d+)?", re.DOTALL),
    "val": re.compile(
        r"(?:.*[^a-z])?(?:val|valid|validation|dev)(?:[^a-z].*|annots?|masks?|labels?|images?)?", re.DOTALL
    ),
    "test": re.compile(r"(?:.*[^a-z])?test(?:ing)?(?:[^a-z].*|annots?|masks?|labels?|images?)?", re.DOTALL),
}
_LOOKED_AT = 200
_MAX_JSONS, _MAX_LABEL_FILES = 20, 1000
_MAX_FOLDERS = 50
"""Most folders of unlabelled photos that have a pattern each."""
Affix = tuple[str, str]
_NONE: Affix = ("", "")


@dataclass
class Layout:
    """Where photos and masks lie, in the words of a recipe."""

    raw: Path
    splits: dict[str, dict[str, Any]]
    """Name -> settings of a SplitRecipe."""
    classes: list[tuple[str, RecipeColor | None]] | None = None
    """Names, and colours, that an export gives its classes; None: nothing says so."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the recipe that the kind of masks brings with it."""
    kind: str = "masks"
    """What holds the masks, in words."""
    assumed: list[tuple[str, str]] = field(default_factory=list)
    """What was assumed, and how sure that is and why."""

    @property
    def has_values(self) -> bool:
        """Whether masks have a value for every pixel, of which the classes must be found."""
        return self.kind in ("masks", "a CVAT mask export")


def find_layout(photos: Path, masks: Path | None, unlabeled: Path | None, is_mask: Callable[[Path], bool]) -> Layout:
    """Finds photos and what labels them. `is_mask` looks into an image. Raises DataError if nothing is labelled."""
    given = [Path(os.path.abspath(path)) for path in (photos, masks, unlabeled) if path is not None]
    for path in given:
        if not path.exists():
            raise DataError(f"{path}: no such folder.")
    raw = Path(os.path.commonpath([path if path.is_dir() else path.parent for path in given]))
    photos = given[0]
    if not photos.is_dir():
        raise DataError(f"{photos}: must be a folder of photos, but is a file.")
    finder = _Finder(raw, photos, given[1] if masks is not None and given[1] != photos else None, is_mask)
    layout = finder.layout(given[-1] if unlabeled is not None else None)
    if unlabeled is not None and layout.splits:
        more = [file for file in _files(raw, given[-1]) if _suffix(file) in IMAGE_SUFFIXES]
        if not more:
            raise DataError(f"{given[-1]}: --unlabeled must be a folder of photos, but holds none.")
        train = layout.splits["train"]
        train["unlabeled"] = [*train.get("unlabeled", ()), *_patterns(more, _base(more))]
    return layout


def _files(raw: Path, folder: Path) -> list[PurePosixPath]:
    """Returns the files below a folder, or the file itself, relative to `raw`."""
    if folder.is_file():
        return [PurePosixPath(folder.relative_to(raw).as_posix())]
    return [PurePosixPath(found.path.relative_to(raw).as_posix()) for found in Pattern("**/*").find(folder)]


def _suffix(file: PurePosixPath) -> str:
    suffix = file.suffix.lower()
    return _SAME_SUFFIX.get(suffix, suffix)


def _base(files: Iterable[PurePosixPath]) -> PurePosixPath:
    """Returns the deepest folder that holds all files."""
    return PurePosixPath(os.path.commonpath([f"/{file.parent}" for file in files])[1:])


def _split_of(file: PurePosixPath) -> str | None:
    for part in reversed(file.parts[:-1]):
        for name, regex in _SPLITS.items():
            if regex.fullmatch(part.lower()):
                return name
    return None


def _patterns(
    files: Sequence[PurePosixPath], base: PurePosixPath, affix: Affix = _NONE, mirrored: bool = False
) -> list[str]:
    """Returns patterns that find the files in `base`, one for each suffix."""
    nested = any(file.parent != base for file in files)
    prefix, suffix = affix
    stem = f"{prefix}{{id}}{suffix}" if affix != _NONE or mirrored else "*"
    folder = "" if base == PurePosixPath() else f"{base}/"
    return [f"{folder}{'**/' * (nested and not mirrored)}{stem}{end}" for end in sorted({_suffix(f) for f in files})]


@dataclass
class _Finder:
    """The files that `init` was given."""

    raw: Path
    photos: Path
    masks: Path | None
    is_mask: Callable[[Path], bool]

    def layout(self, unlabeled: Path | None) -> Layout:
        """Returns the layout. Raises DataError if nothing is labelled."""
        found = _files(self.raw, self.photos)
        labels = found if self.masks is None else _files(self.raw, self.masks)
        if self.masks is not None and self.masks.is_dir():
            inner, outer = (labels, found) if len(labels) <= len(found) else (found, labels)
            if {*inner} <= {*outer}:  # one folder lies in the other
                rest = [file for file in outer if file not in {*inner}]
                found, labels = (rest, labels) if inner is labels else (found, rest)
        if unlabeled is not None:
            extra = {*_files(self.raw, unlabeled)}
            found, labels = ([file for file in files if file not in extra] for files in (found, labels))
        images = [file for file in found if _suffix(file) in IMAGE_SUFFIXES]
        if not images:
            raise DataError(f"{self.photos}: must hold photos (JPEG, PNG, TIFF, BMP, WebP), but holds none.")
        stems = {file.stem for file in images}
        layout = (
            self._coco(images, [file for file in labels if _suffix(file) == ".json" and file.stem not in stems])
            or self._labelme(images, [file for file in labels if _suffix(file) == ".json" and file.stem in stems])
            or self._yolo(images, [file for file in labels if _suffix(file) == ".txt" and file.stem in stems], labels)
            or self._raster(images, labels)
        )
        if layout is None:
            raise DataError(self._nothing(images, labels))
        return layout

    def _nothing(self, images: Sequence[PurePosixPath], labels: Sequence[PurePosixPath]) -> str:
        """Returns why nothing is labelled."""
        for file in [file for file in labels if _suffix(file) in (".json", ".xml", ".txt")][:_MAX_JSONS]:
            try:
                foreign = foreign_annotation((self.raw / file).read_bytes()[: 2**26], file.name)
            except OSError:
                continue
            if foreign:
                return f"{self.raw / file}: masks must be images or outlines, but this {foreign}."
        where = self.masks or self.photos
        names = [file.name for file in (labels if self.masks else images)]
        return (
            f"{where}: must hold a mask of the same name for some photos, but no file belongs to another (such as "
            f"{printable(first_few(names)) or 'none'}); name the two folders: init PHOTOS MASKS, or say how they pair in a recipe."
        )

    # ---------------------------------------------------------------------------------------------------- exports

    def _coco(self, images: Sequence[PurePosixPath], jsons: Sequence[PurePosixPath]) -> Layout | None:
        files = []
        for file in jsons[:_MAX_JSONS]:
            try:
                files.append((file, read_coco(str(self.raw / file))))
            except BadItemError as error:
                if error.finding.rule != "annotation is of another kind":
                    raise DataError(error.finding.line) from None
        files = [(file, coco) for file, coco in files if any(coco.num_annotations.values())]
        if not files:
            return None
        by_name: dict[str, list[PurePosixPath]] = defaultdict(list)
        for image in images:
            by_name[image.name].append(image)
        groups: dict[str, dict[str, Any]] = {}
        names: dict[str, None] = {}
        for file, coco in files:
            bases = Counter(
                str(image)[: len(str(image)) - len(entry.name)]
                for entry in coco.images[:: max(1, len(coco.images) // _LOOKED_AT)]
                for image in by_name[PurePosixPath(entry.name).name]
                if f"/{image}".endswith(f"/{entry.name}")
            )
            if not bases:
                continue
            near = sorted(bases, key=lambda base: (-bases[base], not base.startswith(str(file.parent)), base))[0]
            base = PurePosixPath(near.rstrip("/"))
            split = _split_of(PurePosixPath(*file.parts[:-1], *re.split(r"[_.\-]", file.name))) or "train"
            members = [image for image in images if image.is_relative_to(base)]
            if split in groups:
                raise DataError(
                    f"{self.raw / file}: a split has one COCO file, but this is the second of {split}; merge them."
                )
            groups[split] = {"images": _patterns(members, base), "coco": str(file), "unlabeled": [REST]}
            names |= {coco.categories[key]: None for key, count in coco.num_annotations.items() if count}
        if not groups:
            return None
        layout = Layout(self.raw, _with_train(groups), kind="COCO outlines")
        return _outlined(layout, list(names))

    def _labelme(self, images: Sequence[PurePosixPath], jsons: Sequence[PurePosixPath]) -> Layout | None:
        labels: dict[str, None] = {}
        for file in jsons[:: max(1, len(jsons) // _MAX_LABEL_FILES)]:
            try:
                document = read_json(str(self.raw / file), (self.raw / file).read_bytes(), "LabelMe json")
            except (BadItemError, OSError):
                continue
            shapes = document["shapes"] if isinstance(document["shapes"], list) else []
            labels |= {str(shape["label"]): None for shape in shapes if isinstance(shape, dict) and "label" in shape}
        if not labels:
            return None
        layout = Layout(self.raw, self._paired(images, jsons), kind="LabelMe outlines")
        return _outlined(layout, sorted(labels))

    def _yolo(
        self, images: Sequence[PurePosixPath], texts: Sequence[PurePosixPath], labels: Sequence[PurePosixPath]
    ) -> Layout | None:
        if not any(self._has_outlines(file) for file in texts[:_LOOKED_AT]):
            return None
        tables = [file for file in [*labels, *_files(self.raw, self.photos)] if _suffix(file) in (".yaml", ".yml")]
        settings = {}
        for table in sorted({*tables}, key=lambda file: (file.name != "data.yaml", len(file.parts), str(file))):
            try:
                names = read_yolo_names(str(self.raw / table))
            except BadItemError:
                continue
            settings["yolo_names"] = str(table)
            layout = Layout(self.raw, self._paired(images, texts), settings=settings, kind="YOLO outlines")
            return _outlined(layout, [names[key] for key in sorted(names)])
        raise DataError(
            f"{self.raw}: the labels are YOLO's, whose data.yaml says what its numbers mean, but there is none; "
            "put it there, with `names: [CLASS, ...]`."
        )

    def _has_outlines(self, file: PurePosixPath) -> bool:
        try:
            fields = (self.raw / file).read_bytes().split(b"\n", 1)[0].split()
            return len(fields) >= 7 and fields[0].isdigit() and all(0 <= float(number) <= 1.01 for number in fields[1:])
        except (OSError, ValueError):
            return False

    # ------------------------------------------------------------------------------------------------------ masks

    def _raster(self, images: Sequence[PurePosixPath], labels: Sequence[PurePosixPath]) -> Layout | None:
        photos, masks, how = self._told_apart(images, labels)
        if not photos or not masks:
            return None
        layout = Layout(self.raw, {})
        layout.assumed += how
        layout.splits = self._paired(photos, masks, layout)
        if not layout.splits:
            return None
        maps = [file for file in labels if file.name.lower() == "labelmap.txt"] or [
            file for file in _files(self.raw, self.photos) if file.name.lower() == "labelmap.txt"
        ]
        if maps and not layout.classes:
            layout.kind = "a CVAT mask export"
            layout.classes = [*read_labelmap(str(self.raw / maps[0]))]
        return layout

    def _told_apart(
        self, images: Sequence[PurePosixPath], labels: Sequence[PurePosixPath]
    ) -> tuple[list[PurePosixPath], list[PurePosixPath], list[tuple[str, str]]]:
        """Returns photos and masks, and what was assumed."""
        rasters = [file for file in labels if _suffix(file) in IMAGE_SUFFIXES | _ARRAYS]
        if self.masks is not None:
            return list(images), rasters, []
        arrays = [file for file in rasters if _suffix(file) in _ARRAYS]
        inside = [file for file in rasters if any(_MASK_FOLDER.fullmatch(part.lower()) for part in file.parts[:-1])]
        if inside and len(inside) < len(rasters):
            folders = first_few(sorted({str(file.parent) for file in inside}))
            said = (f"masks are in {folders}", "high: the folder's name says so")
            return [file for file in images if file not in {*inside}], inside, [said]
        if arrays:
            return list(images), arrays, []
        named = [file for file in rasters if _MASK_STEM.fullmatch(file.stem.lower())]
        if named and len(named) < len(rasters):
            said = (f"masks are files such as {named[0].name}", "high: their names say so")
            return [file for file in images if file not in {*named}], named, [said]
        groups: dict[tuple[PurePosixPath, str], list[PurePosixPath]] = defaultdict(list)
        for file in rasters:
            groups[file.parent, _suffix(file)].append(file)
        looks = {
            key: all(self.is_mask(self.raw / file) for file in files[:: max(1, len(files) // 3)][:3])
            for key, files in groups.items()
            if len(groups) <= _LOOKED_AT
        }
        stems = {file.stem for key, files in groups.items() if not looks.get(key) for file in files}
        masks = [
            file
            for key, files in groups.items()
            if looks.get(key) and stems & {f.stem for f in files}
            for file in files
        ]
        said = (f"files such as {masks[0]} are masks" if masks else "", "high: few values, and the name of a photo")
        return [file for file in images if file not in {*masks}], masks, [said] if masks else []

    def _paired(
        self, photos: Sequence[PurePosixPath], masks: Sequence[PurePosixPath], layout: Layout | None = None
    ) -> dict[str, dict[str, Any]]:
        """Returns the splits of photos and masks that belong together; none if no mask belongs to a photo."""
        of_photos, of_masks = (_by_split(files) for files in (photos, masks))
        named = of_photos.keys() & of_masks.keys() - {None}
        if not {"train"} < named or None in of_masks:
            pair = _pair(photos, masks, layout)
            return {"train": pair} if pair else {}
        splits = {}
        for name in (name for name in _SPLITS if name in named):
            pair = _pair(of_photos[name], of_masks[name], layout)
            if pair:
                splits[name] = pair
        bare = [file for name, files in of_photos.items() if name not in splits for file in files]
        if bare and splits and layout is not None:
            layout.assumed.append(
                (
                    f"{len(bare)} photos such as {bare[0]} have no masks and are left out",
                    "low: they may be unlabelled photos",
                )
            )
        return _with_train(splits)


def _by_split(files: Iterable[PurePosixPath]) -> dict[str | None, list[PurePosixPath]]:
    groups: dict[str | None, list[PurePosixPath]] = defaultdict(list)
    for file in files:
        groups[_split_of(file)].append(file)
    return dict(groups)


def _with_train(splits: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the splits; if none is of train, the first one is."""
    if splits and "train" not in splits:
        first = next(iter(splits))
        splits = {"train" if name == first else name: split for name, split in splits.items()}
    return splits


def _outlined(layout: Layout, names: list[str]) -> Layout | None:
    """Returns the layout with the classes of an export, and background for what no outline covers."""
    if not layout.splits:
        return None
    kept = [name for name in names if name.strip("_ ").casefold() not in ("background", "_background_")]
    own = [name for name in names if name not in kept]
    layout.classes = [(own[0] if own else "background", (0, 0, 0)), *((name, None) for name in kept)]
    layout.settings["uncovered"] = layout.classes[0][0]
    layout.assumed.append(("what no outline covers is background", "high: the export says nothing of it"))
    return layout


def _pair(photos: Sequence[PurePosixPath], masks: Sequence[PurePosixPath], layout: Layout | None) -> dict[str, Any]:
    """Returns the settings of a split of these files; empty if no mask belongs to a photo."""
    photo_affix, mask_affix = _affixes([file.stem for file in photos], [file.stem for file in masks])
    keys = [(file, _core(file.stem, photo_affix)) for file in photos]
    ids_of_masks = [_core(file.stem, mask_affix) for file in masks]
    wanted = {key for key in ids_of_masks if key is not None}
    paired = [file for file, key in keys if key in wanted]
    if not paired:
        return {}
    folders = {file.parent for file in paired}
    base = _base(paired)
    inside = [file for file, key in keys if key is not None and (file.parent in folders or file.is_relative_to(base))]
    nested = any(file.parent != base for file in paired)
    if not nested:
        inside = [file for file in inside if file.parent == base]
    mask_base = _base(masks)

    def long(file: PurePosixPath, top: PurePosixPath, affix: Affix) -> str:
        return str(file.relative_to(top).with_name(_core(file.stem, affix) or file.stem))

    long_photos = {long(file, base, photo_affix) for file in inside}
    both = sum(long(file, mask_base, mask_affix) in long_photos for file in masks)
    mirrored = nested and both >= 0.9 * len(paired) and not (photo_affix[0] or mask_affix[0])
    split: dict[str, Any] = {"images": _patterns(inside, base, photo_affix, mirrored)}
    by_folder = Counter((file.parent, key) for file, key in zip(masks, ids_of_masks, strict=True))
    repeated = len({key for _, key in by_folder}) < len(by_folder)
    classes = sorted({file.relative_to(mask_base).parts[0] for file in masks if file.parent != mask_base})
    if layout is not None and repeated and not mirrored and len(classes) > 1:
        split["masks"] = {
            name: _patterns(
                [file for file in masks if file.is_relative_to(mask_base / name)], mask_base / name, mask_affix
            )
            for name in classes
        }
        names = [name for name in classes if name.casefold() != "background"]
        layout.kind, layout.classes = (
            "a folder of masks for each class",
            [("background", (0, 0, 0)), *((name, None) for name in names)],
        )
        layout.settings["uncovered"] = "background"
        layout.assumed.append(
            (f"each folder in {mask_base} holds the masks of one class", "high: each has masks of the same photos")
        )
    else:
        split["masks"] = _patterns(masks, mask_base, mask_affix, mirrored)
    taken = {*inside}
    outside = [file for file in photos if file not in taken]
    unlabeled = [REST] if len(inside) > len(paired) else []
    by_parent: dict[PurePosixPath, list[PurePosixPath]] = defaultdict(list)
    for file in outside:
        by_parent[file.parent].append(file)
    if len(by_parent) <= _MAX_FOLDERS:
        unlabeled += [
            pattern for folder, files in by_parent.items() if folder != base for pattern in _patterns(files, folder)
        ]
    if unlabeled:
        split["unlabeled"] = unlabeled
    return split


def _core(stem: str, affix: Affix) -> str | None:
    """Returns what is left of a stem without prefix and suffix; None if it has not got them."""
    prefix, suffix = affix
    fits = stem.startswith(prefix) and stem.endswith(suffix) and len(stem) > len(prefix) + len(suffix)
    return normalized(stem[len(prefix) : len(stem) - len(suffix)]) if fits else None


def _cores(stem: str) -> list[tuple[str, Affix]]:
    """Returns what may be the id in a stem: all of it, or without its first word, its last one, or its last two."""
    cuts = [cut.start() for cut in re.finditer(r"[_\-. ]", stem) if 0 < cut.start() < len(stem) - 1]
    ends = [(stem[:cut], ("", stem[cut:])) for cut in cuts[-2:]]
    return [(stem, _NONE), *ends[::-1], *((stem[cut + 1 :], (stem[: cut + 1], "")) for cut in cuts[:1])]


def _affixes(photos: Sequence[str], masks: Sequence[str]) -> tuple[Affix, Affix]:
    """Returns what stands round the id in the names of photos, and in those of masks, so that most of them pair."""
    by_core: dict[str, list[Affix]] = defaultdict(list)
    for stem in photos:
        for core, affix in _cores(stem):
            if len(by_core[normalized(core)]) < 4:
                by_core[normalized(core)].append(affix)
    votes: Counter[tuple[Affix, Affix]] = Counter()
    for stem in masks[:: max(1, len(masks) // _LOOKED_AT)]:
        for core, affix in _cores(stem):
            votes.update((other, affix) for other in {*by_core.get(normalized(core), ())})
    # Among equals the shortest: with the same text round it, an id is the whole name.
    best = sorted(votes, key=lambda pair: (-votes[pair], sum(map(len, (*pair[0], *pair[1])))))
    return best[0] if best else (_NONE, _NONE)
