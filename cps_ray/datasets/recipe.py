"""How a folder of raw images and masks becomes a data set: classes, raw ids, and which files make up which split."""

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from cps_ray.config import yaml_reader
from cps_ray.config.reader import parse
from cps_ray.config.section import Section
from cps_ray.engine.batch import IGNORE

Byte = Annotated[int, Field(ge=0, le=255, strict=True)]


def _listed(value: Any) -> Any:
    # A tuple, because settings are parsed strictly and what a validator returns no longer counts as JSON.
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _below_raw(pattern: str) -> str:
    path = PurePosixPath(pattern)
    if path.is_absolute() or ".." in path.parts or any("**" in part and part != "**" for part in path.parts):
        raise ValueError(f"a pattern is relative to the raw folder, such as images/train/*.png, but got {pattern!r}.")
    return pattern


Globs = Annotated[tuple[Annotated[str, AfterValidator(_below_raw)], ...], BeforeValidator(_listed)]
"""One pattern or several, relative to the raw folder; `**` is any depth of folders."""
Patterns = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""One pattern or several, over ids."""


class ClassRecipe(Section):
    """One class; its place in the list is its train id."""

    name: Annotated[str, Field(min_length=1)]
    color: tuple[Byte, Byte, Byte]
    """(r, g, b) for overlays."""
    ids: Annotated[tuple[Byte, ...], Field(min_length=1)] | None = None
    """Mask values that mean this class. None: the class's place in the list."""


class SplitRecipe(Section):
    """The files of one split. The id of an image is its file name without extension and `image_suffix`."""

    images: Globs = ()
    """Images that have a mask."""
    masks: Globs = ()
    """Their masks, paired one to one: the name without extension and `mask_suffix` is the image's id."""
    unlabeled: Globs = ()
    """Images that have no mask."""
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
    ignore_ids: tuple[Byte, ...] = ()
    """Mask values that count in no loss and no metric, such as a void class. 255 always is one, unless a class has it."""
    image_suffix: str = ""
    """End of an image's name that is no part of its id, such as `_leftImg8bit`."""
    mask_suffix: str = ""
    """End of a mask's name that is no part of its id, such as `_gtFine_labelIds`."""
    splits: Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")], SplitRecipe], Field(min_length=1)]

    @model_validator(mode="after")
    def _ids_mean_one_thing(self) -> Self:
        names = [entry.name for entry in self.classes]
        if len(set(names)) < len(names):
            raise ValueError(f"class names must be unique, but got {names}.")
        meanings = [raw for ids in self.raw_ids() for raw in ids] + list(self.ignore_ids)
        twice = sorted({raw for raw in meanings if meanings.count(raw) > 1})
        if twice:
            raise ValueError(
                f"a mask value means one class or ignore, but {twice} appear twice in `ids`, `ignore_ids`."
            )
        return self

    def raw_ids(self) -> tuple[tuple[int, ...], ...]:
        """Per train id, the mask values that mean it."""
        return tuple(entry.ids or (place,) for place, entry in enumerate(self.classes))

    def train_ids(self) -> dict[int, int]:
        """Mask value -> train id, or 255 for those that are ignored."""
        ignored = dict.fromkeys((*self.ignore_ids, IGNORE), IGNORE)
        return ignored | {raw: place for place, ids in enumerate(self.raw_ids()) for raw in ids}


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe file. ConfigError, with file and line, if it is no valid recipe."""
    document = yaml_reader.load(path)
    return parse(Recipe, document.data, base=path.parent, where=document.where)
