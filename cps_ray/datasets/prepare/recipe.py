"""How a folder of raw images and masks becomes a data set: classes, raw ids, and which files make up which split."""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from cps_ray.config import yaml_reader
from cps_ray.config.reader import parse, shipped
from cps_ray.config.section import Section
from cps_ray.datasets.prepare.masks import Coding, MaskReader, pack_color
from cps_ray.engine.batch import IGNORE
from cps_ray.errors import ConfigError
from cps_ray.text import display_path

ID = "{id}"
Byte = Annotated[int, Field(ge=0, le=255, strict=True)]
RawId = Annotated[int, Field(ge=-(2**31), lt=2**31, strict=True)]
RecipeColor = tuple[Byte, Byte, Byte]
"""(r, g, b) in 0..255."""


def _as_tuple(value: Any) -> Any:
    # A tuple, because settings are parsed strictly and what a validator returns no longer counts as JSON.
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _check_pattern(pattern: str) -> str:
    path = PurePosixPath(pattern)
    if path.is_absolute() or ".." in path.parts or any("**" in part and part != "**" for part in path.parts):
        raise ValueError(f"a pattern is relative to the raw folder, such as images/train/*.png, but got {pattern!r}.")
    return pattern


Globs = Annotated[tuple[Annotated[str, AfterValidator(_check_pattern)], ...], BeforeValidator(_as_tuple)]
"""One pattern or several, relative to the raw folder. `**` is any depth of folders. `{id}` is the part of the path that is
the image's id; without it, the id is the file's name without extension."""
Patterns = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
"""One pattern or several that ids are matched with."""


def id_in(pattern: str, path: str) -> str:
    """Returns the id of a file that `pattern` found, from its path relative to the raw folder; empty if it has none."""
    if ID not in pattern:
        return PurePosixPath(path).stem
    head, *tails = pattern.split(ID)
    # Where `{id}` stands more than once, all must be the same text.
    repeats = "".join("(?P=id)" + _glob_to_regex(tail) for tail in tails[1:])
    match = re.fullmatch(f"{_glob_to_regex(head)}(?P<id>[^/]+){_glob_to_regex(tails[0])}{repeats}", path)
    return match["id"] if match else ""


def _glob_to_regex(glob: str) -> str:
    # Not fnmatch.translate: its `*` also crosses folders.
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", glob)
    meanings = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        meanings.get(token) or (token.replace("[!", "[^") if token.startswith("[") else re.escape(token))
        for token in tokens
    )


class ClassRecipe(Section):
    """One class; its position in the list is its train id."""

    name: Annotated[str, Field(min_length=1)]
    color: RecipeColor | None = None
    """(r, g, b) in which the class is shown. None: its colour in PASCAL VOC's palette."""
    ids: Annotated[tuple[RawId, ...], Field(min_length=1)] | None = None
    """Mask values that mean this class. None: the class's position in the list."""
    colors: Annotated[tuple[RecipeColor, ...], Field(min_length=1)] | None = None
    """Mask colours that mean this class, with `mask_coding: colors`. None: `color`."""


class SplitRecipe(Section):
    """The files of one split."""

    images: Globs = ()
    """Images that have a mask."""
    masks: Globs = ()
    """Their masks, paired one to one by id."""
    unlabeled: Globs = ()
    """Images that have no mask."""
    list: str | None = None
    """Text file, relative to the raw folder, of the images to use: a line's first column is an id or path. None: all images."""
    include: Patterns = ("*",)
    """Patterns of ids; an image is used only if its id matches one of them."""
    exclude: Patterns = ()
    """Patterns of ids; an image whose id matches one of them is not used."""
    prefix: str = ""
    """Text put in front of this split's ids, for data sets whose file names repeat from split to split."""

    @model_validator(mode="after")
    def _has_files(self) -> Self:
        if bool(self.images) != bool(self.masks):
            raise ValueError("`images` and `masks` belong together; images that have no mask go under `unlabeled`.")
        if not self.images and not self.unlabeled:
            raise ValueError("a split needs `images` and `masks`, or `unlabeled`.")
        return self


class Recipe(Section):
    """A data set in a raw folder: its classes, what mask values mean, and the files of every split."""

    classes: Annotated[tuple[ClassRecipe, ...], Field(min_length=2, max_length=IGNORE)]
    mask_coding: Coding = "ids"
    """What a mask holds: ids (index and palette images, .npy, .mat), or colours that stand for classes."""
    ignore_ids: tuple[RawId, ...] = ()
    """Mask values that count in no loss and no metric, such as a void class. 255 is always one, unless a class has it."""
    ignore_colors: tuple[RecipeColor, ...] = ()
    """Mask colours that count in no loss and no metric, with `mask_coding: colors`."""
    value_range: tuple[float, float] | None = None
    """Values that become black and white in images with more than 8 bits. None: 0 and 65535."""
    splits: Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")], SplitRecipe], Field(min_length=1)]
    """Name of a split -> its files."""

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

    def reader(self) -> MaskReader:
        """Returns the reader that turns this recipe's raw masks into train ids."""
        void = () if self.mask_coding == "colors" else (IGNORE,)
        ignored = dict.fromkeys((*self.ignored_values(), *void), IGNORE)
        # Classes come second, so that a class may have 255.
        meanings = ignored | {raw: train_id for train_id, values in enumerate(self.raw_values()) for raw in values}
        by_default = bool(void) and IGNORE not in self.ignore_ids and meanings[IGNORE] == IGNORE
        return MaskReader(self.mask_coding, meanings, len(self.classes), void_by_default=by_default)

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
