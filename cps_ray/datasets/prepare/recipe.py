"""How a folder of raw images and masks becomes a data set: classes, raw ids, and which files make up which split."""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from cps_ray.config import yaml_reader
from cps_ray.config.reader import parse
from cps_ray.config.section import Section
from cps_ray.datasets.prepare.masks import Coding, MaskReader, packed
from cps_ray.engine.batch import IGNORE

ID = "{id}"
Byte = Annotated[int, Field(ge=0, le=255, strict=True)]
RawId = Annotated[int, Field(ge=-(2**31), lt=2**31, strict=True)]
RecipeColor = tuple[Byte, Byte, Byte]
"""(r, g, b)."""


def _listed(value: Any) -> Any:
    # A tuple, because settings are parsed strictly and what a validator returns no longer counts as JSON.
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _below_raw(pattern: str) -> str:
    path = PurePosixPath(pattern)
    if path.is_absolute() or ".." in path.parts or any("**" in part and part != "**" for part in path.parts):
        raise ValueError(f"a pattern is relative to the raw folder, such as images/train/*.png, but got {pattern!r}.")
    return pattern


Globs = Annotated[tuple[Annotated[str, AfterValidator(_below_raw)], ...], BeforeValidator(_listed)]
"""One pattern or several, relative to the raw folder. `**` is any depth of folders; `{id}` is the part of the path that is
the image's id; without it the id is the file's name without extension."""
Patterns = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""One pattern or several, over ids."""


def id_in(pattern: str, path: str) -> str:
    """The id of a file that `pattern` found, from its path relative to the raw folder."""
    if ID not in pattern:
        return PurePosixPath(path).stem
    head, *tails = pattern.split(ID)
    again = "".join("(?P=id)" + _regex(tail) for tail in tails[1:])
    found = re.fullmatch(f"{_regex(head)}(?P<id>[^/]+){_regex(tails[0])}{again}", path)
    return found["id"] if found else ""


def _regex(glob: str) -> str:
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", glob)
    meanings = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        meanings.get(token) or (token.replace("[!", "[^") if token.startswith("[") else re.escape(token))
        for token in tokens
    )


class ClassRecipe(Section):
    """One class; its place in the list is its train id."""

    name: Annotated[str, Field(min_length=1)]
    color: RecipeColor | None = None
    """For overlays. None: of PASCAL VOC's palette."""
    ids: Annotated[tuple[RawId, ...], Field(min_length=1)] | None = None
    """Mask values that mean this class. None: the class's place in the list."""
    colors: Annotated[tuple[RecipeColor, ...], Field(min_length=1)] | None = None
    """With `mask_coding: colors`, the mask colours that mean this class. None: `color`."""


class SplitRecipe(Section):
    """The files of one split."""

    images: Globs = ()
    """Images that have a mask."""
    masks: Globs = ()
    """Their masks, paired one to one by id."""
    unlabeled: Globs = ()
    """Images that have no mask."""
    list: str | None = None
    """Text file, relative to the raw folder: only the ids in it, one a line, or paths of which the first of a line counts."""
    include: Patterns = ("*",)
    """Only ids that match one of these."""
    exclude: Patterns = ()
    """No id that matches one of these."""
    prefix: str = ""
    """Put in front of this split's ids, for data sets whose file names repeat from split to split."""

    @model_validator(mode="after")
    def _has_files(self) -> Self:
        if bool(self.images) != bool(self.masks):
            raise ValueError("`images` and `masks` belong together; images that have no mask go under `unlabeled`.")
        if not self.images and not self.unlabeled:
            raise ValueError("a split needs `images` and `masks`, or `unlabeled`.")
        return self


class Recipe(Section):
    """A raw folder data set, complete."""

    classes: Annotated[tuple[ClassRecipe, ...], Field(min_length=2, max_length=IGNORE)]
    mask_coding: Coding = "ids"
    """What a mask holds: ids (index and palette images, .npy, .mat), or colours that stand for classes."""
    ignore_ids: tuple[RawId, ...] = ()
    """Mask values that count in no loss and no metric, such as a void class. 255 always is one, unless a class has it."""
    ignore_colors: tuple[RecipeColor, ...] = ()
    """The same for masks of colours."""
    value_range: tuple[float, float] | None = None
    """Of images with more than 8 bits: the values that become black and white. None: 0 and 65535."""
    splits: Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")], SplitRecipe], Field(min_length=1)]

    @model_validator(mode="after")
    def _range_is_a_range(self) -> Self:
        if self.value_range is not None and self.value_range[0] >= self.value_range[1]:
            raise ValueError(f"`value_range` must be [low, high] with low < high, but got {list(self.value_range)}.")
        return self

    @model_validator(mode="after")
    def _values_mean_one_thing(self) -> Self:
        names = [entry.name for entry in self.classes]
        if len(set(names)) < len(names):
            raise ValueError(f"class names must be unique, but got {names}.")
        if self.mask_coding == "colors":
            bare = [entry.name for entry in self.classes if entry.color is None and entry.colors is None]
            if bare:
                raise ValueError(f"`mask_coding: colors` needs a `color` for every class, but {bare} have none.")
            if self.ignore_ids or any(entry.ids for entry in self.classes):
                raise ValueError("`ids` and `ignore_ids` are for `mask_coding: ids`; use `colors` and `ignore_colors`.")
        elif self.ignore_colors or any(entry.colors for entry in self.classes):
            raise ValueError("`colors` and `ignore_colors` are for `mask_coding: colors`.")
        meanings = [raw for values in self.raw_values() for raw in values] + list(self.ignored())
        twice = sorted({raw for raw in meanings if meanings.count(raw) > 1})
        if twice:
            raise ValueError(f"a mask value means one class or ignore, but {twice} appear twice in the class table.")
        return self

    def raw_values(self) -> tuple[tuple[int, ...], ...]:
        """Per train id, the mask values (or packed colours) that mean it."""
        if self.mask_coding == "colors":
            return tuple(tuple(packed(c) for c in one.colors or (one.color or (0, 0, 0),)) for one in self.classes)
        return tuple(entry.ids or (place,) for place, entry in enumerate(self.classes))

    def ignored(self) -> tuple[int, ...]:
        """Mask values (or packed colours) declared to be ignored."""
        return tuple(map(packed, self.ignore_colors)) if self.mask_coding == "colors" else self.ignore_ids

    def reader(self) -> MaskReader:
        """Raw masks to train ids."""
        void = () if self.mask_coding == "colors" else (IGNORE,)
        ignored = dict.fromkeys((*self.ignored(), *void), IGNORE)
        meanings = ignored | {raw: place for place, values in enumerate(self.raw_values()) for raw in values}
        by_default = bool(void) and IGNORE not in self.ignore_ids and meanings[IGNORE] == IGNORE
        return MaskReader(self.mask_coding, meanings, len(self.classes), void_by_default=by_default)

    def palette(self) -> tuple[RecipeColor, ...]:
        """(r, g, b) of every class."""
        return tuple(entry.color or voc_color(place) for place, entry in enumerate(self.classes))


def voc_color(index: int) -> RecipeColor:
    """Entry 0..255 of PASCAL VOC's palette: the bits of the index, spread over the three colours from the top."""
    red = green = blue = 0
    for place in range(7, -1, -1):
        red |= (index & 1) << place
        green |= (index >> 1 & 1) << place
        blue |= (index >> 2 & 1) << place
        index >>= 3
    return red, green, blue


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe file. ConfigError, with file and line, if it is no valid recipe."""
    document = yaml_reader.load(path)
    return parse(Recipe, document.data, base=path.parent, where=document.where)
