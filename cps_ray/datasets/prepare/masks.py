"""Raw mask files to train ids: index, palette and colour-coded images, NumPy and MATLAB arrays.

What commonly is wrong with masks is refused here, before any training sees it.
"""

import io
import struct
import tokenize
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cps_ray.datasets.images import orientation_of, too_large, turned
from cps_ray.datasets.prepare.findings import BadItemError, Finding
from cps_ray.engine.batch import IGNORE

Coding = Literal["ids", "colors"]
Raw = NDArray[np.integer[Any]]
_UNKNOWN = -1
_MANY_VALUES = 32
_LISTED = 10
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    MemoryError,
    struct.error,
    tokenize.TokenError,
    zlib.error,
)
"""What Pillow, NumPy and SciPy raise on damaged files; found by damaging them at random."""
_EXPORT = "export the masks again as ids, without smoothing, and resize them with nearest neighbour only"


def packed(color: tuple[int, int, int]) -> int:
    """(r, g, b) in 0..255 -> one number, the raw value of colour-coded masks."""
    return color[0] << 16 | color[1] << 8 | color[2]


@dataclass(frozen=True)
class RawMask:
    """The values in a mask file."""

    values: Raw
    """(H, W): class ids, or packed colours."""
    upright: bool
    """Whether the file itself said how it lies, by EXIF, and was turned so."""


@dataclass(frozen=True)
class MaskReader:
    """How mask files of one data set become train ids."""

    coding: Coding
    """Whether values or colours mean classes."""
    meanings: Mapping[int, int]
    """Raw value -> train id, or IGNORE."""
    classes: int
    void_by_default: bool = False
    """Whether 255 is ignored by custom only, nobody having said so."""
    cityscapes_ids: bool = False
    """Masks are labelIds of Cityscapes, which labelTrainIds are easily taken for."""
    official: str = ""
    """What the masks must be, for data sets that come with their own class table."""

    def read(self, path: str, data: bytes) -> RawMask:
        """Bytes of the mask file at `path` -> its raw values. BadItemError if it holds none."""
        suffix = PurePath(path).suffix.lower()
        if data.startswith(b"version https://git-lfs"):
            raise _bad("mask is unreadable", path, "the mask is a Git LFS pointer", "run `git lfs pull`")
        try:
            if suffix == ".npy":
                return RawMask(self._plane(path, _numpy(data), ".npy"), False)
            if suffix == ".mat":
                return RawMask(self._plane(path, _matlab(path, data), ".mat"), False)
            with Image.open(io.BytesIO(data)) as image:
                return self._image(path, image)
        except Image.DecompressionBombError:
            found, remedy = too_large().split("; ")
            raise _bad("mask is too large", path, f"the mask {found}", remedy) from None
        except _DAMAGED as error:
            raise _bad("mask is unreadable", path, f"the mask cannot be read ({error})", "get the file again") from None

    def _image(self, path: str, image: Image.Image) -> RawMask:
        if image.format == "JPEG":
            raise _bad(
                "mask is JPEG", path, "masks must be lossless, but this is a JPEG, which does not keep ids", _EXPORT
            )
        if getattr(image, "n_frames", 1) > 1:
            raise _bad("mask has pages", path, "a mask must have one page", "save each page as a file of its own")
        orientation = orientation_of(image)
        image.load()
        left = orientation_of(image)  # Pillow itself turns TIFFs as it loads them
        if image.mode in ("P", "PA") and self.coding == "colors":
            image = image.convert("RGBA")
        values = self._plane(path, np.asarray(image), image.mode)
        return RawMask(turned(values, left), orientation != 1)

    def _plane(self, path: str, values: NDArray[Any], kind: str) -> Raw:
        """(H, W) or (H, W, 1..4) of a file -> (H, W) raw values."""
        if values.dtype == np.bool_:
            values = values.astype(np.uint8)
        if kind in ("RGBA", "LA", "PA"):
            if values[..., -1].min() < 255:
                raise _bad(
                    "mask is transparent", path, "a mask must not be transparent, but this one is in parts", _EXPORT
                )
            values = values[..., :-1]
        if values.ndim == 3 and values.shape[2] == 1:
            values = values[..., 0]
        if values.dtype.kind == "f" and values.ndim == 2 and np.array_equal(values, np.round(values)):
            values = values.astype(np.int64)
        if values.dtype.kind not in "iu" or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3):
            found = f"a mask must hold (height, width) whole numbers, but this holds {values.shape} of {values.dtype}"
            raise _bad("mask is no map of ids", path, found, "save class ids, not probabilities or one-hot planes")
        if self.coding == "colors":
            planes = values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)
            red, green, blue = np.moveaxis(planes.astype(np.int64), 2, 0)
            return np.asarray(red << 16 | green << 8 | blue)
        if values.ndim == 3:
            if not (np.array_equal(values[..., 0], values[..., 1]) and np.array_equal(values[..., 0], values[..., 2])):
                found = f"a mask must have one channel that holds class ids, but this is a colour image ({kind})"
                remedy = "if its colours mean classes, use a recipe with `mask_coding: colors` and the colours"
                raise _bad("mask is coloured", path, found, remedy)
            values = values[..., 0]
        return values

    def train_ids(self, path: str, raw: Raw) -> tuple[NDArray[np.uint8], dict[int, int]]:
        """(H, W) raw values -> uint8 (H, W) train ids or IGNORE, and the pixels per raw value. BadItemError for unknown values."""
        if raw.dtype == np.uint8:
            counts = np.bincount(raw.ravel(), minlength=256)
            present, pixels, places = np.flatnonzero(counts), counts[counts > 0], raw
            table = np.full(256, _UNKNOWN, np.int16)
            table[present] = [self.meanings.get(int(value), _UNKNOWN) for value in present]
            known = table[present]
        else:
            present, places, pixels = np.unique(raw, return_inverse=True, return_counts=True)
            known = table = np.array([self.meanings.get(int(value), _UNKNOWN) for value in present], np.int16)
        histogram = {int(value): int(count) for value, count in zip(present, pixels, strict=True)}
        if (known == _UNKNOWN).any():
            raise BadItemError(
                self._unknown(path, {v: n for v, n in histogram.items() if v not in self.meanings}, histogram)
            )
        if self.cityscapes_ids:
            self._refuse_train_ids(path, histogram)
        return table.astype(np.uint8)[places].reshape(raw.shape), histogram

    def _unknown(self, path: str, strange: dict[int, int], histogram: dict[int, int]) -> Finding:
        names = [f"{self._shown(value)} ({count} px)" for value, count in sorted(strange.items())]
        listed = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        what = "colours" if self.coding == "colors" else "values"
        rule, remedy = "mask has unknown values", self._remedy(strange, histogram)
        return Finding(rule, path, f"mask {what} must be in the class table, but this one also holds {listed}", remedy)

    def _remedy(self, strange: dict[int, int], histogram: dict[int, int]) -> str:
        if len(strange) > _MANY_VALUES:
            return f"so many are grey levels or smoothed edges: {_EXPORT}"
        if self.coding == "colors":
            return "add them to the classes' `colors`, or to `ignore_colors`, in the recipe"
        if self.official:
            return f"the masks must be {self.official}: get them again, or describe your own with `folder` and a recipe"
        if min(histogram) == 1 and list(strange) == [self.classes]:
            return "the ids seem to start at 1: give the classes `ids` in the recipe"
        if max(histogram) > IGNORE:
            return "is this an instance mask? Else map the values with `ids` or `ignore_ids` in the recipe"
        return "map them with `ids` or `ignore_ids` in the recipe"

    def _refuse_train_ids(self, path: str, histogram: dict[int, int]) -> None:
        """labelIds of Cityscapes show the ego vehicle and nearly always ids above 18; labelTrainIds have 255 for all that."""
        if IGNORE in histogram and max(value for value in (0, *histogram) if value != IGNORE) <= 18:
            found = "masks must all be labelIds, but this one holds 0..18 and 255, as labelTrainIds do"
            raise _bad("mask is of another kind", path, found, "keep one kind in the tree")

    def _shown(self, value: int) -> str:
        return f"({value >> 16}, {value >> 8 & 255}, {value & 255})" if self.coding == "colors" else str(value)


def _bad(rule: str, path: str, found: str, remedy: str) -> BadItemError:
    return BadItemError(Finding(rule, path, found, remedy))


def _numpy(data: bytes) -> NDArray[Any]:
    """The array in a .npy file; unlike `np.load` it takes neither archives nor pickles."""
    return np.asarray(np.lib.format.read_array(io.BytesIO(data), allow_pickle=False))


def _matlab(path: str, data: bytes) -> NDArray[Any]:
    """The label map in a .mat file: SBD's `GTcls.Segmentation`, else its only matrix."""
    from scipy.io import loadmat  # takes half a second to import

    try:
        content = loadmat(io.BytesIO(data))
    except NotImplementedError:
        raise _bad(
            "mask is unreadable", path, "the mask is MATLAB 7.3", "save it again with `save(..., '-v7')`"
        ) from None
    except Exception as error:  # SciPy's reader trips over damaged bytes in any way, UnboundLocalError among them
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if "GTcls" in content:
        return np.asarray(content["GTcls"]["Segmentation"][0, 0])
    arrays = {k: v for k, v in content.items() if not k.startswith("__") and v.dtype.kind in "iufb" and v.ndim == 2}
    if len(arrays) != 1:
        found = f"a .mat mask must hold `GTcls` as SBD does, or one matrix, but holds {_names(content)}"
        raise _bad("mask is unreadable", path, found, "save the label map alone")
    return np.asarray(next(iter(arrays.values())))


def _names(content: Mapping[str, object]) -> str:
    """Variables of a .mat file, for a message."""
    return ", ".join(name for name in content if not name.startswith("__")) or "nothing"


def aligned(path: str, raw: RawMask, size: tuple[int, int], orientation: int) -> Raw:
    """The mask's values (H, W) as they lie on the image of `size`, whose EXIF says `orientation` 1..8.

    A mask without EXIF was drawn either on the turned image or on the pixels as stored; its size tells which where the
    turn swaps the sides. BadItemError if the sizes differ, or if nobody can tell.
    """
    values = raw.values
    if orientation != 1 and not raw.upright:
        if orientation < 5 or size[0] == size[1]:
            found = (
                f"the image carries EXIF orientation {orientation}, and nothing tells whether its mask is turned too"
            )
            raise _bad(
                "EXIF is ambiguous",
                path,
                found,
                "turn the pixels and drop the tag (`mogrify -auto-orient`), or drop it",
            )
        if values.shape == size[::-1]:
            values = np.asarray(turned(values, orientation))
    if values.shape != size:
        found = (
            f"image and mask must have one size, but the image is {size[1]}x{size[0]} px "
            f"and the mask {values.shape[1]}x{values.shape[0]} px"
        )
        raise _bad("sizes differ", path, found, "export both at one size, masks without interpolation")
    return values


def ramps(mask: NDArray[np.uint8]) -> tuple[int, int]:
    """Steps between classes whose ids differ by 2 or more, along rows of uint8 (H, W) train ids: (of 1 px, of 2 px).

    A mask resized with interpolation passes through the ids between: steps of 2 px, monotone, are rare in a mask of ids.
    """
    ids = mask.astype(np.int16)
    ids[mask == IGNORE] = 10_000
    left, middle, right = ids[:, :-2], ids[:, 1:-1], ids[:, 2:]
    counted = (left < IGNORE) & (middle < IGNORE) & (right < IGNORE) & (abs(left - right) >= 2)
    between = counted & ((left < middle) & (middle < right) | (left > middle) & (middle > right))
    return int((counted & ~between).sum()) // 2, int(between.sum())
