"""How a folder of raw images and masks becomes a data set: classes, raw ids, and which files make up which split."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from cps_ray.config import yaml_reader
from cps_ray.config.reader import parse, shipped
from cps_ray.config.section import Regex, Section
from cps_ray.datasets.prepare.annotations.coco import Crowd
from cps_ray.datasets.prepare.annotations.outlines import Outlines
from cps_ray.datasets.prepare.annotations.shapes import Overlaps
from cps_ray.datasets.prepare.items import SHAPE_SUFFIXES
from cps_ray.datasets.prepare.masks import Coding, MaskReader, pack_color
from cps_ray.datasets.prepare.patterns import Pattern
from cps_ray.engine.batch import IGNORE
from cps_ray.errors import ConfigError
from cps_ray.text import did_you_mean, display_path, printable

REST = "rest"
"""Word in place of a pattern of unlabelled images: those that `images` finds and that have no mask."""
DRAWN_FROM = "train"
"""Split whose images are drawn for the splits that are a fraction."""
IGNORE_WORD = "ignore"
"""Word in place of the name of a class: pixels that count in no loss and no metric."""
_BACKGROUND = "background"
_SHAPE_SETTINGS = ("uncovered", "overlaps", "crowd", "ignore_labels", "yolo_names")
Byte = Annotated[int, Field(ge=0, le=255, strict=True)]
RawId = Annotated[int, Field(ge=-(2**31), lt=2**31, strict=True)]
_MAX_RANGE = 65536
"""Most values that a range of ids may hold."""


def _expand_ranges(value: Any) -> Any:
    """Returns `ids` with each range, such as "128-255", as the values that it holds."""
    if not isinstance(value, list):
        return value
    ids: list[Any] = []
    for entry in value:
        ends = re.fullmatch(r"\s*(-?\d+)\s*-\s*(-?\d+)\s*", entry) if isinstance(entry, str) else None
        if ends is None:
            ids.append(entry)
            continue
        first, last = int(ends[1]), int(ends[2])
        if not first <= last < first + _MAX_RANGE:
            raise ValueError(f'a range is FIRST-LAST with FIRST <= LAST, such as "128-255", but got {entry!r}.')
        ids += range(first, last + 1)
    return tuple(ids)


Ids = Annotated[tuple[RawId, ...], BeforeValidator(_expand_ranges)]
"""Mask values, and ranges of them: [3, "128-255"]."""
ValuePair = tuple[float, float]
RecipeColor = tuple[Byte, Byte, Byte]
"""(r, g, b) in 0..255."""


def _as_tuple(value: Any) -> Any:
    # A tuple, because settings are parsed strictly and what a validator returns no longer counts as JSON.
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _check_pattern(pattern: str) -> str:
    path = PurePosixPath(pattern)
    nowhere = not path.parts or path.is_absolute() or ".." in path.parts
    if nowhere or any("**" in part and part != "**" for part in path.parts):
        raise ValueError(f"a pattern is relative to the raw folder, such as images/train/*.png, but got {pattern!r}.")
    try:
        _ = Pattern(pattern).regex
    except re.error as error:
        raise ValueError(f"a pattern is written as in a shell, but {pattern!r} is not: {error}.") from None
    return pattern


Globs = Annotated[tuple[Annotated[str, AfterValidator(_check_pattern)], ...], BeforeValidator(_as_tuple)]
"""One pattern or several, relative to the raw folder; see `patterns.Pattern`. `**` is any depth of folders. `{id}` is the part of
the path that is the image's id; without it, the id is the file's name without suffix, or the path where names repeat."""
Patterns = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""One pattern or several that ids are matched with."""
Fraction = Annotated[float, Field(gt=0, lt=1)]


def _check_name(name: str) -> str:
    if printable(name) != name:
        raise ValueError(f"must hold no control characters or line breaks, but got {printable(name)!r}.")
    return name


class ClassRecipe(Section):
    """One class; its position in the list is its train id."""

    name: Annotated[str, Field(min_length=1), AfterValidator(_check_name)]
    color: RecipeColor | None = None
    """(r, g, b) in which the class is shown. None: its colour in PASCAL VOC's palette."""
    ids: Annotated[Ids, Field(min_length=1)] | None = None
    """Mask values that mean this class, and ranges of them, such as "128-255". None: the class's position in the list."""
    colors: Annotated[tuple[RecipeColor, ...], Field(min_length=1)] | None = None
    """Mask colours that mean this class, with `mask_coding: colors`. None: `color`."""
    labels: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)] | None = None
    """Labels that mean this class in COCO, LabelMe and YOLO files. None: its name."""


class SplitRecipe(Section):
    """The files of one split."""

    images: Globs = ()
    """Images that have a mask."""
    masks: Globs | dict[str, Globs] = ()
    """Their masks, one for each id: images, arrays, LabelMe's .json or YOLO's .txt. Or, per class, the files in which all that is
    not 0 is this class; those of an image unite."""
    coco: str | None = None
    """COCO file, relative to the raw folder, with the outlines of `images`, instead of `masks`."""
    unlabeled: Globs = ()
    """Images that have no mask. `rest`: those of `images` that have none."""
    ignore_masks: Globs = ()
    """A mask for each labelled image, such as the field of view of a microscope: pixels that are 0 there count nowhere."""
    list: str | None = None
    """Text file, relative to the raw folder, of the images to use: an id or path in each line. None: all images."""
    include: Patterns = ("*",)
    """Patterns of ids; an image is used only if its id matches one of them."""
    exclude: Patterns = ()
    """Patterns of ids; an image whose id matches one of them is not used."""
    prefix: str = ""
    """Text put in front of this split's ids, for data sets whose file names repeat from split to split."""

    @model_validator(mode="after")
    def _has_files(self) -> Self:
        if self.masks and self.coco is not None:
            raise ValueError("`masks` and `coco` both say what is labelled; give one of them.")
        if bool(self.images) != bool(self.masks or self.coco):
            raise ValueError(
                "`images` and `masks` (or `coco`) belong together; images that have no mask go under `unlabeled`."
            )
        if not self.images and not self.unlabeled:
            raise ValueError("a split needs `images` and `masks`, or `unlabeled`.")
        if REST in self.unlabeled and not self.images:
            raise ValueError("`unlabeled: rest` means images of `images` that have no mask, so it needs `images`.")
        if self.ignore_masks and not self.images:
            raise ValueError("`ignore_masks` are for images with a mask, so they need `images` and `masks`.")
        return self

    @property
    def coco_file(self) -> tuple[str, ...]:
        """The COCO file, if there is one."""
        return () if self.coco is None else (self.coco,)

    @property
    def is_shaped(self) -> bool:
        """Whether masks are outlines, or of one class each, rather than a value for every pixel."""
        patterns = self.masks if isinstance(self.masks, tuple) else ()
        shaped = any(PurePosixPath(pattern).suffix.lower() in SHAPE_SUFFIXES for pattern in patterns)
        return shaped or self.coco is not None or isinstance(self.masks, dict)

    @property
    def class_masks(self) -> dict[str, Globs]:
        """Patterns of mask files per class that all their pixels but 0 are of; "" is the key of masks that hold all classes."""
        if isinstance(self.masks, dict):
            return self.masks
        return {"": self.masks} if self.masks else {}


class TilesRecipe(Section):
    """How training images are cut into tiles."""

    size_px: PositiveInt
    """Height and width of a tile; an image that is smaller stays as it is on that side."""
    overlap_px: NonNegativeInt = 0
    """Pixels that neighbours share at least."""

    @model_validator(mode="after")
    def _tiles_move_on(self) -> Self:
        if self.overlap_px >= self.size_px:
            raise ValueError(f"`overlap_px` must be less than `size_px`, but got {self.overlap_px} of {self.size_px}.")
        return self


class Recipe(Section):
    """A data set in a raw folder: its classes, what mask values mean, and the files of every split."""

    classes: Annotated[tuple[ClassRecipe, ...], Field(min_length=2, max_length=IGNORE)]
    mask_coding: Coding = "ids"
    """What a mask holds: ids (index and palette images, .npy, .mat), or colours that stand for classes."""
    ignore_ids: Ids = ()
    """Mask values that count in no loss and no metric, such as a void class. 255 is always one, unless a class has it."""
    ignore_colors: tuple[RecipeColor, ...] = ()
    """Mask colours that count in no loss and no metric, with `mask_coding: colors`."""
    threshold: float | None = None
    """Grey value above which a mask is 1, and else 0, which `ids` then mean; masks may be JPEG then. None: values are ids."""
    transparent: str | None = None
    """What transparent pixels of masks are: the name of a class, or `ignore`. None: masks must not be transparent."""
    mask_variable: str | None = None
    """The matrix in .mat masks, such as `labels` or `groundTruth[0].Segmentation`. None: the only one, or SBD's."""
    masks_turned: bool | None = None
    """Where photos carry an EXIF orientation and masks do not: whether masks were drawn on the photo as viewers show it (true), or
    on the pixels as stored (false). None: sizes must show it."""
    mask_size: Literal["equal", "resize"] = "equal"
    """Whether masks must have the size of their image, or are brought to it by nearest neighbour, keeping the shape."""
    uncovered: str | None = None
    """What pixels are that no outline and no mask of a class covers: the name of a class, or `ignore`. None: a class that is
    called background."""
    overlaps: Overlaps = "later"
    """Where outlines, or masks of classes, overlap: `later` ones lie on top (in the order of the file or of the classes), `smaller`
    ones do, or such pixels are ignored (`ignore`)."""
    crowd: Crowd = "class"
    """What COCO's `iscrowd` areas are: their `class`, or `ignore`."""
    ignore_labels: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    """Labels in COCO, LabelMe and YOLO files whose pixels count in no loss and no metric."""
    yolo_names: str | None = None
    """File (data.yaml), relative to the raw folder, with the names of YOLO's class numbers."""
    bands: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=3)] | None = None
    """Numbers, from 1, of the bands that are red, green and blue in images of many bands; or of one, which is grey."""
    value_range: ValuePair | Annotated[tuple[ValuePair, ...], Field(min_length=1)] | None = None
    """Values that become black and white in images with more than 8 bits, for all bands or one pair for each. None: 0 and the largest
    value that the file can hold, such as 65535."""
    stretch: ValuePair | None = None
    """Quantiles of the training images, such as [0.02, 0.98], whose values become black and white, band by band; the values found
    are stated in the manifest. Instead of `value_range`."""
    tiles: TilesRecipe | None = None
    """Cuts training images, which may have many megapixels, into tiles. Images of other splits stay whole."""
    splits: Annotated[
        dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")], SplitRecipe | Fraction], Field(min_length=1)
    ]
    """Name of a split -> its files, or the fraction of the labelled images of `train` that are drawn for it."""
    draw_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Another seed draws other images for the splits that are a fraction."""
    group_by: Regex | None = None
    """Regular expression that finds, in an id, what images that belong together share: the video of a frame, the patient. Its first
    group counts or, without one, all that it matches. Such images are drawn for one split. None: every image is on its own."""

    @property
    def files(self) -> dict[str, SplitRecipe]:
        """The splits that are described by their files."""
        return {name: split for name, split in self.splits.items() if isinstance(split, SplitRecipe)}

    @property
    def fractions(self) -> dict[str, float]:
        """The splits that are drawn from `train`, with the fraction that each takes."""
        return {name: split for name, split in self.splits.items() if not isinstance(split, SplitRecipe)}

    @model_validator(mode="after")
    def _masks_are_of_classes(self) -> Self:
        names = [entry.name for entry in self.classes]
        for split, files in self.files.items():
            for name in files.class_masks.keys() - {"", *names}:
                raise ValueError(
                    f"`splits.{split}.masks` must name classes, but {name!r} is none.{did_you_mean(name, names)}"
                )
            if "" in files.class_masks and isinstance(files.masks, dict):
                raise ValueError(f"`splits.{split}.masks` must name classes, but one name is empty.")
        return self

    @model_validator(mode="after")
    def _fractions_can_be_drawn(self) -> Self:
        fractions = self.fractions
        if not fractions:
            unused = [name for name in ("group_by", "draw_seed") if name in self.model_fields_set]
            if unused:
                raise ValueError(f"`{unused[0]}` is for splits that are drawn, such as `val: 0.2`, but there is none.")
            return self
        train = self.files.get(DRAWN_FROM)
        if train is None or not train.images:
            raise ValueError(
                "`splits` that are a fraction are drawn from the labelled images of `train`, which needs `images` and `masks`."
            )
        if sum(fractions.values()) >= 1:
            raise ValueError(
                f"`splits` that are a fraction must leave images to `train`, but {', '.join(fractions)} add up to "
                f"{sum(fractions.values()):g}."
            )
        return self

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> Self:
        for low, high in np.reshape(self.value_range or (), (-1, 2)).tolist():
            if low >= high:
                raise ValueError(f"`value_range` must be [low, high] with low < high, but got {[low, high]}.")
        if self.stretch is not None and not 0 <= self.stretch[0] < self.stretch[1] <= 1:
            raise ValueError(f"`stretch` must be two quantiles in 0..1, low < high, but got {list(self.stretch)}.")
        if self.stretch is not None and self.value_range is not None:
            raise ValueError("`stretch` finds what `value_range` gives; give one of them.")
        if self.bands is not None and len(self.bands) == 2:
            raise ValueError(f"`bands` must be three, or one, but got {list(self.bands)}.")
        return self

    @model_validator(mode="after")
    def _masks_can_be_read(self) -> Self:
        names = [entry.name for entry in self.classes]
        for setting in ("transparent", "uncovered"):
            name = getattr(self, setting)
            if name is not None and name not in (*names, IGNORE_WORD):
                hint = did_you_mean(name, [*names, IGNORE_WORD])
                raise ValueError(f"`{setting}` must be the name of a class or `ignore`, but got {name!r}.{hint}")
        if self.threshold is not None and self.mask_coding != "ids":
            raise ValueError("`threshold` makes ids 0 and 1 of grey values, so it needs `mask_coding: ids`.")
        shaped = [name for name, split in self.files.items() if split.is_shaped]
        if shaped and self._uncovered() is None:
            raise ValueError(
                f"`uncovered` must say what pixels are that no outline or mask of a class covers (splits.{shaped[0]}), since no "
                "class is called background: a class, or `ignore`."
            )
        unused = [name for name in _SHAPE_SETTINGS if name in self.model_fields_set] if not shaped else []
        if unused:
            raise ValueError(f"`{unused[0]}` is for outlines and masks of one class each, but there are none.")
        names = [entry.name for entry in self.classes]
        if len(set(names)) < len(names):
            return self  # said by another rule
        labels = [label for entry in self.classes for label in entry.labels or (entry.name,)] + list(self.ignore_labels)
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise ValueError(f"a label means one class or ignore, but {repeated} appear twice.")
        return self

    def _uncovered(self) -> int | None:
        if self.uncovered is not None:
            return self._train_id(self.uncovered)
        names = [entry.name.strip("_ ").casefold() for entry in self.classes]
        return names.index(_BACKGROUND) if _BACKGROUND in names else None

    def _train_id(self, name: str) -> int:
        """Returns the train id of a class, or IGNORE for `ignore`, unless a class is called that."""
        names = [entry.name for entry in self.classes]
        return names.index(name) if name in names else IGNORE

    @model_validator(mode="after")
    def _values_mean_one_thing(self) -> Self:
        names = [entry.name for entry in self.classes]
        if len(set(names)) < len(names):
            raise ValueError(f"class names must be unique, but got {names}.")
        if self.mask_coding == "colors":
            colorless = [entry.name for entry in self.classes if entry.color is None and entry.colors is None]
            if colorless:
                raise ValueError(f"`mask_coding: colors` needs a `color` for every class, but {colorless} have none.")
            if self.ignore_ids or any(entry.ids for entry in self.classes):
                raise ValueError("`ids` and `ignore_ids` are for `mask_coding: ids`; use `colors` and `ignore_colors`.")
        elif self.ignore_colors or any(entry.colors for entry in self.classes):
            raise ValueError("`colors` and `ignore_colors` are for `mask_coding: colors`.")
        meanings = [raw for values in self.raw_values() for raw in values] + list(self.ignored_values())
        repeated = sorted({raw for raw in meanings if meanings.count(raw) > 1})
        if repeated:
            raise ValueError(f"a mask value means one class or ignore, but {repeated} appear twice in the class table.")
        return self

    def raw_values(self) -> tuple[tuple[int, ...], ...]:
        """Returns, per train id, the mask values (or packed colours) that mean it."""
        if self.mask_coding == "colors":
            return tuple(
                tuple(pack_color(color) for color in entry.colors or (entry.color or (0, 0, 0),))
                for entry in self.classes
            )
        return tuple(entry.ids or (train_id,) for train_id, entry in enumerate(self.classes))

    def ignored_values(self) -> tuple[int, ...]:
        """Returns the mask values (or packed colours) that the recipe declares as ignored."""
        return tuple(map(pack_color, self.ignore_colors)) if self.mask_coding == "colors" else self.ignore_ids

    def reader(self, yolo_names: Mapping[int, str] = MappingProxyType({})) -> MaskReader:
        """Returns the reader that turns this recipe's raw masks into train ids; `yolo_names`: what the file of that name says."""
        void = () if self.mask_coding == "colors" else (IGNORE,)
        ignored = dict.fromkeys((*self.ignored_values(), *void), IGNORE)
        # Classes come second, so that a class may have 255.
        meanings = ignored | {raw: train_id for train_id, values in enumerate(self.raw_values()) for raw in values}
        by_default = bool(void) and IGNORE not in self.ignore_ids and meanings[IGNORE] == IGNORE
        labels = dict.fromkeys(self.ignore_labels, IGNORE)
        labels |= {label: at for at, entry in enumerate(self.classes) for label in entry.labels or (entry.name,)}
        uncovered = self._uncovered()
        return MaskReader(
            self.mask_coding,
            meanings,
            len(self.classes),
            void_by_default=by_default,
            colors={pack_color(entry.color): at for at, entry in enumerate(self.classes) if entry.color},
            threshold=self.threshold,
            transparent=None if self.transparent is None else self._train_id(self.transparent),
            variable=self.mask_variable,
            masks_turned=self.masks_turned,
            resize=self.mask_size == "resize",
            outlines=Outlines(
                labels, IGNORE if uncovered is None else uncovered, self.overlaps, self.crowd, dict(yolo_names)
            ),
        )

    def palette(self) -> tuple[RecipeColor, ...]:
        """Returns (r, g, b) in 0..255 per class."""
        return tuple(entry.color or voc_color(train_id) for train_id, entry in enumerate(self.classes))


def voc_color(index: int) -> RecipeColor:
    """Returns entry 0..255 of PASCAL VOC's palette: the bits of the index, spread over the three channels from the top."""
    red = green = blue = 0
    for bit in range(7, -1, -1):
        red |= (index & 1) << bit
        green |= (index >> 1 & 1) << bit
        blue |= (index >> 2 & 1) << bit
        index >>= 3
    return red, green, blue


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe file. Raises ConfigError, with file and line, if it is no valid recipe."""
    if not path.exists():
        # Not taken by its name, as a shipped sweep is: its classes and patterns are examples that fit nobody's folder.
        raise ConfigError(
            f"{path}: no such file. Copy {display_path(shipped('data') / 'recipe.yaml')}, which shows every setting."
        )
    document = yaml_reader.load(path)
    return parse(Recipe, document.data, base=path.parent, where=document.where)
