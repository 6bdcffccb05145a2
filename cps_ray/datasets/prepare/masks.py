"""Raw mask files become train ids: index, palette and colour-coded images, NumPy and MATLAB arrays.

What is commonly wrong with masks is refused here, before any training sees it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from cps_ray.datasets.prepare.annotations.outlines import Outlines
from cps_ray.datasets.prepare.arrays import read_matlab, read_numpy
from cps_ray.datasets.prepare.findings import BadItemError, Finding
from cps_ray.datasets.raster import Raster, UnreadableError, open_raster, turned
from cps_ray.engine.batch import IGNORE

Coding = Literal["ids", "indices", "colors"]
RawValues = NDArray[np.integer[Any]]
"""(H, W) values of a mask file: class ids, or packed colours."""
_UNKNOWN = -1
_MAX_UNKNOWN_IDS = 32
"""More unknown values than this are taken for grey levels or smoothed edges, not for ids that nobody has mapped."""
_MAX_LISTED = 10
_MOSTLY = 0.8
"""Fraction of the unknown pixels that lie between their neighbours' values where edges are smoothed."""
_OPAQUE = 128
"""Least alpha, of 255, of a pixel that counts as painted: edges of RGBA masks fade."""
_EXPORT = "export the masks again as ids, without smoothing, and resize them with nearest neighbour only"


def pack_color(color: tuple[int, int, int]) -> int:
    """Packs (r, g, b) in 0..255 into one number, the raw value of colour-coded masks."""
    return color[0] << 16 | color[1] << 8 | color[2]


def _packed(entry: NDArray[np.uint8]) -> int:
    red, green, blue = entry.tolist()
    return pack_color((red, green, blue))


def color_text(color: int) -> str:
    """Returns a packed colour as `(r, g, b)`."""
    return f"({color >> 16}, {color >> 8 & 255}, {color & 255})"


@dataclass(frozen=True)
class RawMask:
    """What a mask file holds."""

    values: RawValues
    turned_by_exif: bool = False
    """Whether the file has an EXIF orientation of its own, and its values were turned as that says."""
    clear: NDArray[np.bool_] | None = None
    """(H, W) which pixels are transparent, where the recipe says what those mean; None: none is."""
    palette: Mapping[int, int] = field(default_factory=dict)
    """Colour, packed, of each index that the mask of a palette image shows; empty where values are no indices."""


@dataclass(frozen=True)
class MaskReader:
    """Turns the mask files of one data set into train ids."""

    coding: Coding
    """Whether values or colours stand for classes. `indices`: values do, whatever colours a palette gives them."""
    meanings: Mapping[int, int]
    """Raw value -> train id, or IGNORE."""
    num_classes: int
    void_by_default: bool = False
    """Whether 255 means ignore by convention only, because the recipe says nothing about it."""
    cityscapes_label_ids: bool = False
    """Whether masks are labelIds of Cityscapes, with which labelTrainIds are easily confused."""
    official: str = ""
    """What the masks must be, in words, for data sets that come with their own class table."""
    colors: Mapping[int, int] = field(default_factory=dict)
    """Packed colour -> train id, where the recipe gives its classes colours: what a palette must agree with."""
    threshold: float | None = None
    """Grey values above it become 1 and others 0, before `meanings`."""
    transparent: int | None = None
    """Train id, or IGNORE, of transparent pixels. None: there must be none."""
    variable: str | None = None
    """Which variable of a .mat file is the mask: `labels`, `groundTruth.Segmentation`, `groundTruth[0].Segmentation`."""
    masks_turned: bool | None = None
    """Whether masks without EXIF lie on images as their EXIF turns them. None: sizes must show it."""
    resize: bool = False
    """Whether a mask of another size than its image is brought to it, by nearest neighbour."""
    outlines: Outlines = field(default_factory=Outlines)
    """How masks are read that are outlines, or of one class each."""

    def read(self, path: str, data: bytes) -> RawMask:
        """Reads the raw values from `data`, the bytes of the mask file at `path`. Raises BadItemError if it holds none."""
        suffix = PurePath(path).suffix.lower()
        try:
            if suffix == ".npy" and data[:6] == b"\x93NUMPY":
                return RawMask(self._plane(path, read_numpy(data), "a .npy file"))
            if suffix == ".mat" and not data.startswith(b"version https://git-lfs"):
                return RawMask(self._plane(path, read_matlab(data, self.variable), "a .mat file"))
            return self._of_raster(path, open_raster(data, path))
        except UnreadableError as error:
            raise _bad_item("mask is unreadable", path, error.found, error.remedy) from None

    def _of_raster(self, path: str, raster: Raster) -> RawMask:
        if raster.lossy and self.threshold is None:
            found = f"masks must be lossless, but this is {raster.words}, which does not keep ids"
            remedy = f"{_EXPORT}; for black and white masks, the recipe may say `threshold: 127`"
            raise _bad_item("mask is lossy", path, found, remedy)
        if raster.inverted:
            found = f"this is {raster.words} in which 0 is white, so it is not clear what its values are"
            raise _bad_item("mask is inverted", path, found, "save it as PNG")
        clear = None
        if raster.alpha is not None and (
            raster.palette is None or self.coding == "colors" or self.transparent is not None
        ):
            if self.transparent is None:
                found = "a mask must not be transparent, but this one is in parts"
                remedy = "say in the recipe what that means, `transparent: ignore` or `transparent: NAME` of a class"
                raise _bad_item("mask is transparent", path, found, remedy)
            alpha = np.asarray(raster.alpha)
            clear = turned(
                alpha < _OPAQUE / 255 * (np.iinfo(alpha.dtype).max if alpha.dtype.kind in "iu" else 1),
                raster.orientation,
            )
        palette: dict[int, int] = {}
        samples = raster.samples
        if raster.palette is not None and (self.coding == "colors" or self.threshold is not None):
            samples = raster.palette[samples[..., 0]]
        elif raster.palette is not None:
            used = np.unique(samples if clear is None else samples[~turned(clear, _BACK[raster.orientation])])
            palette = {int(index): _packed(raster.palette[index]) for index in used}
            self._check_palette(path, palette)
        values = self._plane(path, samples, raster.words)
        return RawMask(turned(values, raster.orientation), raster.orientation != 1, clear, palette)

    def _check_palette(self, path: str, palette: Mapping[int, int]) -> None:
        """Raises BadItemError where the colours of a palette say other classes than its indices do."""
        if self.coding == "indices":
            return
        remedy = "say in the recipe which counts: `mask_coding: colors`, or `mask_coding: indices`"
        for index, color in palette.items():
            means, shows = self.meanings.get(index), self.colors.get(color)
            if means is not None and shows is not None and means != shows:
                found = f"index {index} means class {means}, but has in the palette {color_text(color)}, the colour of class {shows}"
                raise _bad_item("palette contradicts the recipe", path, found, remedy)
        if all(color >> 16 == (color >> 8 & 255) == (color & 255) for color in palette.values()):
            # A grey image that was saved with a palette: the ids may be the grey levels.
            by_grey = {index: self.meanings.get(color & 255) for index, color in palette.items()}
            by_default = self.void_by_default and any(color & 255 == IGNORE for color in palette.values())
            if (
                not by_default
                and None not in by_grey.values()
                and any(by_grey[index] != self.meanings.get(index) for index in palette)
            ):
                levels = ", ".join(f"{index}: {color & 255}" for index, color in list(palette.items())[:_MAX_LISTED])
                found = f"its palette is grey, and indices and grey levels mean different classes ({levels})"
                raise _bad_item("palette is ambiguous", path, found, remedy)

    def _plane(self, path: str, values: NDArray[Any], kind: str) -> RawValues:
        """Turns (H, W) or (H, W, C) of a file into (H, W) raw values; `kind` says in words what the file is."""
        if values.dtype == np.bool_:
            values = values.astype(np.uint8)
        if values.ndim == 3 and values.shape[2] == 1:
            values = values[..., 0]
        if self.threshold is not None:
            return self._thresholded(path, values, kind)
        # Whole numbers saved as floats, as MATLAB does by default.
        if values.dtype.kind == "f" and values.ndim == 2 and np.array_equal(values, np.round(values)):
            values = values.astype(np.int64)
        if values.dtype.kind not in "iu" or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3):
            found = f"a mask must hold (height, width) whole numbers, but this holds {values.shape} of {values.dtype}"
            raise _bad_item("mask is no map of ids", path, found, "save class ids, not probabilities or one-hot planes")
        if self.coding == "colors":
            if int(values.min()) < 0 or int(values.max()) > 255:
                found = f"colours must have 8 bits a channel, but this is {kind}"
                raise _bad_item("mask has deep colours", path, found, "save it with 8 bits a channel")
            planes = values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)
            red, green, blue = np.moveaxis(planes.astype(np.int32), 2, 0)
            return np.asarray(red << 16 | green << 8 | blue)
        # Ids saved as RGB: three equal channels are one.
        if values.ndim == 3:
            if not (np.array_equal(values[..., 0], values[..., 1]) and np.array_equal(values[..., 0], values[..., 2])):
                found = f"a mask must have one channel that holds class ids, but this is {kind}"
                remedy = "if its colours mean classes, use a recipe with `mask_coding: colors` and the colours"
                raise _bad_item("mask is coloured", path, found, remedy)
            values = values[..., 0]
        return values

    def _thresholded(self, path: str, values: NDArray[Any], kind: str) -> RawValues:
        if values.dtype.kind not in "iuf" or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3):
            found = f"a mask must hold (height, width) numbers, but this holds {values.shape} of {values.dtype}"
            raise _bad_item("mask is no map of ids", path, found, "save grey values")
        if values.ndim == 3:
            if float(np.ptp(values.astype(np.float32), axis=2).max()) > _MAX_TINT:
                found = f"`threshold` is for grey masks, but this is {kind} with colours"
                raise _bad_item("mask is coloured", path, found, "save it as grey, or use `mask_coding: colors`")
            values = values.mean(axis=2)
        unknown = int((~np.isfinite(values)).sum())
        if unknown:
            found = f"values of a mask must be numbers, but {unknown} are not finite"
            raise _bad_item("mask is no map of ids", path, found, "save 0 or 1 there, or ids, of which one is ignored")
        return np.asarray(values > self.threshold, np.uint8)

    def foreground(self, path: str, raw: RawMask) -> NDArray[np.bool_]:
        """Returns (H, W) where a mask of one class, whose own values do not matter, is not 0 and not transparent.

        Raises BadItemError where it has grey levels, so that an edge would be a matter of taste, or where a palette has another
        colour than black for 0.
        """
        for index, color in raw.palette.items():
            if (index == 0) != (color == 0):
                found = f"index 0 must be black, and others not, but index {index} is {color_text(color)}"
                raise _bad_item("palette is ambiguous", path, found, "save it in grey, 0 where the class is not")
        levels = np.unique(raw.values)
        if len(levels) > _MAX_UNKNOWN_IDS:
            found = f"a mask of one class must hold two values, but this holds {len(levels)}: its edges are smoothed"
            raise _bad_item("edges are smoothed", path, found, "export it without smoothing, or say `threshold: 127`")
        area = np.asarray(raw.values != 0, np.bool_)
        return area if raw.clear is None else area & ~raw.clear

    def train_ids(self, path: str, mask: RawMask) -> tuple[NDArray[np.uint8], dict[int, int]]:
        """Maps (H, W) raw values to uint8 (H, W) train ids or IGNORE; also returns the number of pixels per raw value.

        Raises BadItemError for values that are not in the class table.
        """
        raw, clear = mask.values, mask.clear
        if clear is None:
            return self._train_ids(path, raw)
        assert self.transparent is not None
        opaque = raw[~clear]
        if not opaque.size:
            return np.full(raw.shape, self.transparent, np.uint8), {}
        # What lies below transparency means nothing: one value that counts takes its place.
        train_ids, histogram = self._train_ids(path, np.where(clear, opaque[0], raw))
        histogram[int(opaque[0])] -= int(clear.sum())
        return np.where(clear, np.uint8(self.transparent), train_ids), histogram

    def _train_ids(self, path: str, raw: RawValues) -> tuple[NDArray[np.uint8], dict[int, int]]:
        if raw.dtype == np.uint8:  # on bytes: several times as fast as the sort in np.unique
            counts = count_bytes(np.asarray(raw, np.uint8))
            present, pixels = np.flatnonzero(counts), counts[counts > 0]
        else:
            present, positions, pixels = np.unique(raw, return_inverse=True, return_counts=True)
        present_ids = np.array([self.meanings.get(int(value), _UNKNOWN) for value in present], np.int16)
        histogram = {int(value): int(count) for value, count in zip(present, pixels, strict=True)}
        if (present_ids == _UNKNOWN).any():
            unknown = {value: count for value, count in histogram.items() if value not in self.meanings}
            raise BadItemError(self._unknown_values(path, raw, unknown, histogram))
        if self.cityscapes_label_ids:
            self._refuse_train_ids(path, histogram)
        if raw.dtype == np.uint8:
            table = np.zeros(256, np.uint8)
            table[present] = present_ids.astype(np.uint8)
            ids = raw if np.array_equal(present, present_ids) else np.asarray(cv2.LUT(raw, table), np.uint8)
            return np.ascontiguousarray(ids), histogram
        return present_ids.astype(np.uint8)[positions].reshape(raw.shape), histogram

    def count_classes(self, histogram: Mapping[int, int]) -> NDArray[np.int64]:
        """Returns the number of pixels of each class, int64 (C,), from that of each raw value."""
        counts = np.zeros(self.num_classes, np.int64)
        for value, count in histogram.items():
            if self.meanings[value] != IGNORE:
                counts[self.meanings[value]] += count
        return counts

    def _unknown_values(self, path: str, raw: RawValues, unknown: dict[int, int], histogram: dict[int, int]) -> Finding:
        names = [f"{self._value_text(value)} ({count} px)" for value, count in sorted(unknown.items())]
        more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
        listed = ", ".join(names[:_MAX_LISTED]) + more
        what = "colours" if self.coding == "colors" else "values"
        rule, remedy = "mask has unknown values", self._unknown_values_remedy(raw, unknown, histogram)
        return Finding(rule, path, f"mask {what} must be in the class table, but this one also holds {listed}", remedy)

    def _unknown_values_remedy(self, raw: RawValues, unknown: dict[int, int], histogram: dict[int, int]) -> str:
        if len(unknown) > _MAX_UNKNOWN_IDS:
            return f"so many are grey levels or smoothed edges: {_EXPORT}"
        if _lie_between_neighbours(raw, list(unknown), self.coding == "colors"):
            return f"they lie on edges, between the values on either side, so the edges are smoothed: {_EXPORT}"
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
        return color_text(value) if self.coding == "colors" else str(value)

    def align(self, path: str, raw: RawMask, size: tuple[int, int], orientation: int) -> RawMask:
        """Returns the mask as it lies on the image: (H, W) is `size`, that of the image after turning by its EXIF.

        `orientation` 1..8 is what the image's EXIF says. A mask without EXIF was drawn either on the turned image or on the
        pixels as stored; `masks_turned` says which, else its size does where turning swaps the sides. Raises BadItemError if
        the sizes differ, unless masks are resized, or if nothing shows how the mask lies.
        """
        shape = raw.values.shape
        turn = False
        if orientation != 1 and not raw.turned_by_exif:
            if self.masks_turned is not None:
                turn = not self.masks_turned
            elif orientation < 5 or size[0] == size[1]:
                found = f"the image carries EXIF orientation {orientation}, and nothing tells whether its mask is turned too"
                remedy = (
                    "say in the recipe how masks lie: `masks_turned: true` if they were drawn on the photo as viewers show it, "
                    "`false` if on the pixels as stored"
                )
                raise _bad_item("EXIF is ambiguous", path, found, remedy)
            else:
                turn = _fits(shape, size[::-1], self.resize) and not _fits(shape, size, exact_only=True)
        if turn:
            raw = replace_planes(raw, lambda plane: turned(plane, orientation))
            shape = raw.values.shape
        if shape == size:
            return raw
        sizes = f"the image is {size[1]}x{size[0]} px and the mask {shape[1]}x{shape[0]} px"
        if self.resize:
            if not _fits(shape, size, True):
                found = f"a mask that is resized must have the shape of its image, but {sizes}"
                raise _bad_item("shapes differ", path, found, "pair each image with its own mask")
            return replace_planes(raw, lambda plane: _resized(plane, size))
        remedy = "export both at one size, masks without interpolation"
        if _fits(shape, size, True):
            remedy += "; if it is the same photo at another scale, the recipe may say `mask_size: resize`"
        raise _bad_item("sizes differ", path, f"image and mask must have one size, but {sizes}", remedy)


_MAX_TINT = 24
"""Largest difference between the channels of a grey JPEG that was saved as RGB."""
_BACK = (0, 1, 2, 3, 4, 5, 8, 7, 6)
"""Orientation -> the one that undoes it."""


def replace_planes(raw: RawMask, change: Callable[[NDArray[Any]], NDArray[Any]]) -> RawMask:
    """Returns the mask with its values, and what is transparent, changed alike."""
    return replace(raw, values=change(raw.values), clear=None if raw.clear is None else change(raw.clear))


def _fits(shape: tuple[int, ...], size: tuple[int, int], resize: bool = False, *, exact_only: bool = False) -> bool:
    """Returns whether a mask of this shape may be one of an image of this size; with `resize`, at another scale."""
    if shape == size or exact_only or not resize:
        return shape == size
    # Sides of a scaled mask are rounded to whole px, up or down.
    scale = size[0] / shape[0]
    return (
        abs(shape[1] * scale - size[1]) <= max(1.0, scale) * 1.5 or abs(size[1] / shape[1] * shape[0] - size[0]) <= 1.5
    )


def _resized(plane: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Returns the plane at (height, width), each pixel the one whose centre is nearest."""
    rows, columns = (
        ((np.arange(wanted) + 0.5) * (have / wanted)).astype(np.int64)
        for have, wanted in zip(plane.shape, size, strict=True)
    )
    return np.ascontiguousarray(plane[rows[:, None], columns[None]])


def _lie_between_neighbours(raw: RawValues, unknown: list[int], packed: bool) -> bool:
    """Returns whether most pixels of unknown values lie between the values around them, as interpolation makes them.

    An area of a value of its own does not: inside it, all neighbours have that value.
    """
    where = np.isin(raw, unknown)
    planes = [raw >> 16, raw >> 8 & 255, raw & 255] if packed else [raw]
    between = np.ones(int(where.sum()), np.bool_)
    differs = np.zeros_like(between)
    kernel = np.ones((3, 3), np.uint8)
    for plane in planes:
        levels = np.clip(plane.astype(np.int64), -(2**24), 2**24).astype(np.float32)  # floats hold these exactly
        low, high = cv2.erode(levels, kernel)[where], cv2.dilate(levels, kernel)[where]
        own = levels[where]
        between &= ((low < own) & (own < high)) | (low == high)
        differs |= low < high
    return bool((between & differs).mean() >= _MOSTLY)


def _bad_item(rule: str, path: str, found: str, remedy: str) -> BadItemError:
    return BadItemError(Finding(rule, path, found, remedy))


def count_bytes(plane: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Returns how often each value occurs in uint8 (H, W): int64 (256,)."""
    if plane.size >= 2**24:  # OpenCV counts in floats, which are exact up to there
        return np.bincount(plane.ravel(), minlength=256).astype(np.int64)
    return np.asarray(cv2.calcHist([plane], [0], None, [256], [0, 256])).ravel().astype(np.int64)


def count_edges(mask: NDArray[np.uint8]) -> tuple[int, int]:
    """Counts (sharp, smooth) edges along the rows of uint8 (H, W) train ids, where ids differ by 2 or more.

    A sharp edge goes from one id to the other at once. A smooth one passes, over one pixel, through an id between them, as
    interpolation does; in a mask of ids that is rare.
    """
    # Few pixels are at an edge, so only those are compared in full.
    rows, columns = np.divmod(np.flatnonzero(mask[:, :-2] != mask[:, 2:]), max(1, mask.shape[1] - 2))
    first = rows * mask.shape[1] + columns
    left, middle, right = (mask.ravel()[first + at].astype(np.int16) for at in range(3))
    edges = (left < IGNORE) & (middle < IGNORE) & (right < IGNORE) & (abs(left - right) >= 2)
    smooth = edges & ((left < middle) & (middle < right) | (left > middle) & (middle > right))
    # A sharp edge shows in two windows of three pixels, (a, a, b) and (a, b, b).
    return int((edges & ~smooth).sum()) // 2, int(smooth.sum())
