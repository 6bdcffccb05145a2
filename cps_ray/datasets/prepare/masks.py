"""Raw mask files become train ids: index, palette and colour-coded images, NumPy and MATLAB arrays.

What is commonly wrong with masks is refused here, before any training sees it.
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
RawValues = NDArray[np.integer[Any]]
"""(H, W) values of a mask file: class ids, or packed colours."""
_UNKNOWN = -1
_MAX_UNKNOWN_IDS = 32
"""More unknown values than this are taken for grey levels or smoothed edges, not for ids that nobody has mapped."""
_MAX_LISTED = 10
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


def pack_color(color: tuple[int, int, int]) -> int:
    """Packs (r, g, b) in 0..255 into one number, the raw value of colour-coded masks."""
    return color[0] << 16 | color[1] << 8 | color[2]


@dataclass(frozen=True)
class RawMask:
    """What a mask file holds."""

    values: RawValues
    turned_by_exif: bool
    """Whether the file has an EXIF orientation of its own, and its values were turned as that says."""


@dataclass(frozen=True)
class MaskReader:
    """Turns the mask files of one data set into train ids."""

    coding: Coding
    """Whether values or colours stand for classes."""
    meanings: Mapping[int, int]
    """Raw value -> train id, or IGNORE."""
    num_classes: int
    void_by_default: bool = False
    """Whether 255 means ignore by convention only, because the recipe says nothing about it."""
    cityscapes_label_ids: bool = False
    """Whether masks are labelIds of Cityscapes, with which labelTrainIds are easily confused."""
    official: str = ""
    """What the masks must be, in words, for data sets that come with their own class table."""

    def read(self, path: str, data: bytes) -> RawMask:
        """Reads the raw values from `data`, the bytes of the mask file at `path`. Raises BadItemError if it holds none."""
        suffix = PurePath(path).suffix.lower()
        if data.startswith(b"version https://git-lfs"):
            raise _bad_item("mask is unreadable", path, "the mask is a Git LFS pointer", "run `git lfs pull`")
        try:
            if suffix == ".npy":
                return RawMask(self._to_plane(path, _read_numpy(data), ".npy"), False)
            if suffix == ".mat":
                return RawMask(self._to_plane(path, _read_matlab(path, data), ".mat"), False)
            with Image.open(io.BytesIO(data)) as image:
                return self._read_image(path, image)
        except Image.DecompressionBombError:
            found, remedy = too_large().split("; ")
            raise _bad_item("mask is too large", path, f"the mask {found}", remedy) from None
        except _DAMAGED as error:
            raise _bad_item(
                "mask is unreadable", path, f"the mask cannot be read ({error})", "get the file again"
            ) from None

    def _read_image(self, path: str, image: Image.Image) -> RawMask:
        if image.format == "JPEG":
            raise _bad_item(
                "mask is JPEG", path, "masks must be lossless, but this is a JPEG, which does not keep ids", _EXPORT
            )
        if getattr(image, "n_frames", 1) > 1:
            raise _bad_item("mask has pages", path, "a mask must have one page", "save each page as a file of its own")
        orientation = orientation_of(image)
        image.load()
        remaining = orientation_of(image)  # Pillow itself turns TIFFs as it loads them
        if image.mode in ("P", "PA") and self.coding == "colors":
            # Not RGB: that would drop the transparency of a palette, which must be refused.
            image = image.convert("RGBA")
        values = self._to_plane(path, np.asarray(image), image.mode)
        return RawMask(turned(values, remaining), orientation != 1)

    def _to_plane(self, path: str, values: NDArray[Any], kind: str) -> RawValues:
        """Turns (H, W) or (H, W, 1..4) of a file into (H, W) raw values; `kind` is Pillow's mode, or an array's suffix."""
        if values.dtype == np.bool_:
            values = values.astype(np.uint8)
        if kind in ("RGBA", "LA", "PA"):
            if values[..., -1].min() < 255:
                raise _bad_item(
                    "mask is transparent", path, "a mask must not be transparent, but this one is in parts", _EXPORT
                )
            values = values[..., :-1]
        if values.ndim == 3 and values.shape[2] == 1:
            values = values[..., 0]
        # Whole numbers saved as floats, as MATLAB does by default.
        if values.dtype.kind == "f" and values.ndim == 2 and np.array_equal(values, np.round(values)):
            values = values.astype(np.int64)
        if values.dtype.kind not in "iu" or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3):
            found = f"a mask must hold (height, width) whole numbers, but this holds {values.shape} of {values.dtype}"
            raise _bad_item("mask is no map of ids", path, found, "save class ids, not probabilities or one-hot planes")
        if self.coding == "colors":
            planes = values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)
            red, green, blue = np.moveaxis(planes.astype(np.int64), 2, 0)
            return np.asarray(red << 16 | green << 8 | blue)
        # Ids saved as RGB: three equal channels are one.
        if values.ndim == 3:
            if not (np.array_equal(values[..., 0], values[..., 1]) and np.array_equal(values[..., 0], values[..., 2])):
                found = f"a mask must have one channel that holds class ids, but this is a colour image ({kind})"
                remedy = "if its colours mean classes, use a recipe with `mask_coding: colors` and the colours"
                raise _bad_item("mask is coloured", path, found, remedy)
            values = values[..., 0]
        return values

    def train_ids(self, path: str, raw: RawValues) -> tuple[NDArray[np.uint8], dict[int, int]]:
        """Maps (H, W) raw values to uint8 (H, W) train ids or IGNORE; also returns the number of pixels per raw value.

        Raises BadItemError for values that are not in the class table.
        """
        # `lookup[positions]` maps every pixel; int16 holds 0..255 and the mark of unknown values.
        if raw.dtype == np.uint8:  # a table of 256 entries, without the sort in np.unique
            counts = np.bincount(raw.ravel(), minlength=256)
            present, pixels, positions = np.flatnonzero(counts), counts[counts > 0], raw
            lookup = np.full(256, _UNKNOWN, np.int16)
            lookup[present] = [self.meanings.get(int(value), _UNKNOWN) for value in present]
            present_ids = lookup[present]
        else:
            present, positions, pixels = np.unique(raw, return_inverse=True, return_counts=True)
            present_ids = lookup = np.array([self.meanings.get(int(value), _UNKNOWN) for value in present], np.int16)
        histogram = {int(value): int(count) for value, count in zip(present, pixels, strict=True)}
        if (present_ids == _UNKNOWN).any():
            unknown = {value: count for value, count in histogram.items() if value not in self.meanings}
            raise BadItemError(self._unknown_values(path, unknown, histogram))
        if self.cityscapes_label_ids:
            self._refuse_train_ids(path, histogram)
        return lookup.astype(np.uint8)[positions].reshape(raw.shape), histogram

    def _unknown_values(self, path: str, unknown: dict[int, int], histogram: dict[int, int]) -> Finding:
        names = [f"{self._value_text(value)} ({count} px)" for value, count in sorted(unknown.items())]
        more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
        listed = ", ".join(names[:_MAX_LISTED]) + more
        what = "colours" if self.coding == "colors" else "values"
        rule, remedy = "mask has unknown values", self._unknown_values_remedy(unknown, histogram)
        return Finding(rule, path, f"mask {what} must be in the class table, but this one also holds {listed}", remedy)

    def _unknown_values_remedy(self, unknown: dict[int, int], histogram: dict[int, int]) -> str:
        if len(unknown) > _MAX_UNKNOWN_IDS:
            return f"so many are grey levels or smoothed edges: {_EXPORT}"
        if self.coding == "colors":
            return "add them to the classes' `colors`, or to `ignore_colors`, in the recipe"
        if self.official:
            return f"the masks must be {self.official}: get them again, or describe your own with `folder` and a recipe"
        if min(histogram) == 1 and list(unknown) == [self.num_classes]:
            return "the ids seem to start at 1: give the classes `ids` in the recipe"
        if max(histogram) > IGNORE:
            return "is this an instance mask? If not, map the values with `ids` or `ignore_ids` in the recipe"
        return "map them with `ids` or `ignore_ids` in the recipe"

    def _refuse_train_ids(self, path: str, histogram: dict[int, int]) -> None:
        """Raises BadItemError for a mask of Cityscapes' labelTrainIds among labelIds."""
        # labelIds nearly always go above 18, and have ids for what is ignored, such as 1 for the ego vehicle.
        if IGNORE in histogram and max(value for value in (0, *histogram) if value != IGNORE) <= 18:
            found = "masks must all be labelIds, but this one holds 0..18 and 255, as labelTrainIds do"
            raise _bad_item("mask is of another kind", path, found, "keep one kind in the tree")

    def _value_text(self, value: int) -> str:
        return f"({value >> 16}, {value >> 8 & 255}, {value & 255})" if self.coding == "colors" else str(value)


def _bad_item(rule: str, path: str, found: str, remedy: str) -> BadItemError:
    return BadItemError(Finding(rule, path, found, remedy))


def _read_numpy(data: bytes) -> NDArray[Any]:
    """Reads the array in a .npy file; unlike `np.load`, it takes neither archives nor pickles."""
    return np.asarray(np.lib.format.read_array(io.BytesIO(data), allow_pickle=False))


def _read_matlab(path: str, data: bytes) -> NDArray[Any]:
    """Reads the label map in a .mat file: SBD's `GTcls.Segmentation`, else its only matrix."""
    from scipy.io import loadmat  # takes half a second to import

    try:
        content = loadmat(io.BytesIO(data))
    except NotImplementedError:
        raise _bad_item(
            "mask is unreadable", path, "the mask is MATLAB 7.3", "save it again with `save(..., '-v7')`"
        ) from None
    except Exception as error:  # SciPy's reader trips over damaged bytes in any way, UnboundLocalError among them
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if "GTcls" in content:
        return np.asarray(content["GTcls"]["Segmentation"][0, 0])
    arrays = {k: v for k, v in content.items() if not k.startswith("__") and v.dtype.kind in "iufb" and v.ndim == 2}
    if len(arrays) != 1:
        found = f"a .mat mask must hold `GTcls` as SBD does, or one matrix, but holds {_variable_names(content)}"
        raise _bad_item("mask is unreadable", path, found, "save the label map alone")
    return np.asarray(next(iter(arrays.values())))


def _variable_names(content: Mapping[str, object]) -> str:
    return ", ".join(name for name in content if not name.startswith("__")) or "nothing"


def align_mask(path: str, raw: RawMask, size: tuple[int, int], orientation: int) -> RawValues:
    """Returns the mask's values as they lie on the image: (H, W) is `size`, that of the image after turning by its EXIF.

    `orientation` 1..8 is what the image's EXIF says. A mask without EXIF was drawn either on the turned image or on the
    pixels as stored; its size shows which, where turning swaps the sides. Raises BadItemError if the sizes differ, or if
    nothing shows how the mask lies.
    """
    values = raw.values
    if orientation != 1 and not raw.turned_by_exif:
        if orientation < 5 or size[0] == size[1]:
            found = (
                f"the image carries EXIF orientation {orientation}, and nothing tells whether its mask is turned too"
            )
            raise _bad_item(
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
        raise _bad_item("sizes differ", path, found, "export both at one size, masks without interpolation")
    return values


def count_edges(mask: NDArray[np.uint8]) -> tuple[int, int]:
    """Counts (sharp, smooth) edges along the rows of uint8 (H, W) train ids, where ids differ by 2 or more.

    A sharp edge goes from one id to the other at once. A smooth one passes, over one pixel, through an id between them, as
    interpolation does; in a mask of ids that is rare.
    """
    ids = mask.astype(np.int16)
    left, middle, right = ids[:, :-2], ids[:, 1:-1], ids[:, 2:]
    edges = (left < IGNORE) & (middle < IGNORE) & (right < IGNORE) & (abs(left - right) >= 2)
    smooth = edges & ((left < middle) & (middle < right) | (left > middle) & (middle > right))
    # A sharp edge shows in two windows of three pixels, (a, a, b) and (a, b, b).
    return int((edges & ~smooth).sum()) // 2, int(smooth.sum())
