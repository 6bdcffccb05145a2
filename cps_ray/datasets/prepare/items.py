"""Sources become items: one raw image and its mask are read, checked and brought to the form that shards hold."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from cps_ray.datasets.images import (
    Picture,
    ValueRange,
    encode_image,
    encode_mask,
    is_jpeg,
    perceptual_hash,
    read_image,
)
from cps_ray.datasets.prepare.annotations.shapes import Area, Shape, Size, paint
from cps_ray.datasets.prepare.findings import BadItemError, Finding
from cps_ray.datasets.prepare.masks import MaskReader, RawMask, count_bytes, count_edges
from cps_ray.datasets.raster import UnreadableError
from cps_ray.datasets.shards import sha256
from cps_ray.engine.batch import IGNORE

SHAPE_SUFFIXES = (".json", ".txt")
"""Mask files that hold outlines: LabelMe's, and YOLO's."""


@dataclass(frozen=True, slots=True)
class MaskFile:
    """A file that says which class some or all pixels of an image are."""

    path: str
    train_id: int | None = None
    """The class of every pixel that is not 0. None: the file's own values say which class a pixel is."""
    annotation: str = ""
    """What a COCO file, which describes many images, says of this one, as JSON text; empty where the file is of it alone."""
    categories: tuple[tuple[int, int], ...] = ()
    """(category id, train id) of the COCO file."""

    @property
    def is_shapes(self) -> bool:
        """Whether the file holds outlines, or one class, rather than a value for every pixel."""
        suffix = PurePath(self.path).suffix.lower()
        return self.train_id is not None or bool(self.annotation) or suffix in SHAPE_SUFFIXES


@dataclass(frozen=True, slots=True)
class Source:
    """One image to be prepared."""

    id: str
    image: str = ""
    """Path of the image file; empty where the image is drawn."""
    masks: tuple[MaskFile, ...] = ()
    """Empty for an unlabelled image; several where each file holds one class, or one object of a class."""
    field_of_view: str | None = None
    """Path of a mask in which 0 marks pixels that count in no loss and no metric."""
    tile: tuple[int, int, int, int] | None = None
    """(top, left, height, width) in px of the part of the upright image that is used. None: all of it."""
    num_bytes: int = 0
    """Size of what is in no file of its own."""

    @property
    def mask(self) -> str | None:
        """Path of the first mask file; None for an unlabelled image."""
        return self.masks[0].path if self.masks else None

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all its files, the image first."""
        masks = tuple(mask.path for mask in self.masks)
        return (self.image, *masks, *([self.field_of_view] if self.field_of_view else []))


@dataclass(frozen=True, slots=True)
class Item:
    """One image to be written, its mask if it has one, and what the checks of the whole data set need to know of both."""

    id: str
    image: bytes
    """JPEG or PNG of 8 bits."""
    mask: bytes | None
    """PNG, one channel, uint8 train ids 0..C-1 or 255."""
    size: tuple[int, int]
    """(height, width) in px."""
    pixels: NDArray[np.int64]
    """(C,) number of pixels of each class; zeros without a mask."""
    perceptual_hash: int
    """64 bits; see `images.perceptual_hash`."""
    pixels_sha256: bytes
    """Checksum of the image's size and decoded pixels, whatever it is encoded as."""
    train_ids_sha256: bytes | None
    """Checksum of the mask's train ids; None without a mask."""
    values: Mapping[int, int] = field(default_factory=dict)
    """Number of pixels per raw mask value."""
    edges: tuple[int, int] = (0, 0)
    """Number of (sharp, smooth) edges of the mask; see `masks.count_edges`."""
    peak: int | None = None
    """Largest value of an image with more than 8 bits; None where it has 8."""
    palette: Mapping[int, int] = field(default_factory=dict)
    """Packed colour of each index that the mask of a palette image shows."""
    aside: str = ""
    """What of the image was left aside, in words."""
    shown: tuple[int, ...] = ()
    """Classes that the mask shows before it is shrunk."""


class MakeItem(Protocol):
    """Makes the item of a source. A frozen dataclass: it travels to other processes, and its repr tells settings apart."""

    def __call__(self, source: Source) -> Item:
        """Raises BadItemError where image or mask cannot be used."""
        ...


@dataclass(frozen=True, slots=True)
class MaskFacts:
    """What the raw values of a mask say of the whole data set; see Item."""

    values: Mapping[int, int]
    palette: Mapping[int, int]
    class_pixels: NDArray[np.int64] | None = None
    """(C,) number of pixels of each class, where the values say it."""


_NO_MASK = MaskFacts({}, {})


def build_item(
    key: str,
    image: bytes,
    image_pixels: NDArray[np.uint8],
    mask: NDArray[np.uint8] | None,
    num_classes: int,
    class_pixels: NDArray[np.int64] | None = None,
) -> Item:
    """Builds an item from the encoded image, its pixels uint8 (H, W, 3) and its train ids uint8 (H, W).

    `class_pixels`: how many pixels of each class the mask has, int64 (C,), where that is known.
    """
    height, width = image_pixels.shape[:2]
    image_hash = perceptual_hash(image_pixels)
    pixels_sha256 = sha256(b"%d %d\n" % (height, width), image_pixels)
    if mask is None:
        pixels = np.zeros(num_classes, np.int64)
        return Item(key, image, None, (height, width), pixels, image_hash, pixels_sha256, None)
    if class_pixels is None:
        class_pixels = count_bytes(mask)[:num_classes]
    train_ids_sha256 = sha256(mask)
    return Item(
        key, image, encode_mask(mask), (height, width), class_pixels, image_hash, pixels_sha256, train_ids_sha256
    )


@dataclass(frozen=True)
class FromFiles:
    """Makes items from raw files."""

    reader: MaskReader
    value_range: ValueRange | None = None
    """Values that become black and white in images with more than 8 bits; see `images.read_image`."""
    scale: float = 1.0
    """Fraction of their sides, in (0, 1], that images and masks are shrunk to. Scores then hold for that size."""
    compressed: bool = True
    """False: PNG images are stored without compression. JPEGs stay as they are."""
    bands: tuple[int, ...] | None = None
    """Numbers, from 1, of the bands that are red, green and blue; see `images.read_image`."""

    def __call__(self, source: Source) -> Item:
        picture = self._read_picture(source)
        size = (picture.pixels.shape[0], picture.pixels.shape[1])
        mask, raw = read_mask(self.reader, source, size, picture.orientation) if source.masks else (None, _NO_MASK)
        image, pixels = picture.data, picture.pixels
        if source.tile is not None:
            pixels, mask = _cut(pixels, source.tile), None if mask is None else _cut(mask, source.tile)
            image = encode_image(pixels, grey=picture.grey, compressed=self.compressed)
        # Counted at full size, because shrinking by nearest neighbour hides edges that interpolation has smoothed.
        edges = (0, 0) if mask is None else count_edges(mask)
        counts = raw.class_pixels
        if mask is not None and (counts is None or source.tile is not None):
            counts = count_bytes(mask)[: self.reader.num_classes]
        shown = () if counts is None else np.flatnonzero(counts).tolist()
        if self.scale < 1.0:
            size = (max(1, round(pixels.shape[1] * self.scale)), max(1, round(pixels.shape[0] * self.scale)))
            pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
            # A second JPEG would lose again.
            image = encode_image(pixels, grey=picture.grey, compressed=self.compressed)
            if mask is not None:
                # INTER_NEAREST would take the first pixel of each block, not the middle one, and shift the mask.
                mask = np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)
        elif not self.compressed and not is_jpeg(image):
            image = encode_image(pixels, grey=picture.grey, compressed=False)
        known = counts if self.scale == 1.0 else None
        item = build_item(source.id, image, pixels, mask, self.reader.num_classes, known)
        return replace(
            item,
            values=raw.values,
            edges=edges,
            peak=picture.peak,
            palette=raw.palette,
            aside=picture.aside,
            shown=tuple(shown),
        )

    def _read_picture(self, source: Source) -> Picture:
        try:
            return read_image(_read_bytes(source.image), self.value_range, self.bands, source.image)
        except UnreadableError as error:
            raise BadItemError(Finding("image is unreadable", source.image, error.found, error.remedy)) from None


def _cut(pixels: NDArray[np.uint8], tile: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    top, left, height, width = tile
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])


def read_mask(reader: MaskReader, source: Source, size: Size, orientation: int) -> tuple[NDArray[np.uint8], MaskFacts]:
    """Reads the mask files of a labelled source: uint8 (H, W) train ids, and what their raw values show.

    `size` is (H, W) of the image after turning by its EXIF, which says `orientation`. Raises BadItemError.
    """

    def raw_mask(path: str) -> RawMask:
        return reader.align(path, reader.read(path, _read_bytes(path)), size, orientation)

    def area_of(path: str) -> Area:
        return Area(0, 0, reader.foreground(path, raw_mask(path)))

    if source.masks[0].is_shapes:
        shapes: list[Shape] = []
        for mask in source.masks:
            if mask.train_id is not None:
                shapes.append(Shape(mask.train_id, partial(area_of, mask.path)))
            else:
                shapes += reader.outlines.shapes(mask.path, mask.annotation, mask.categories, source.image, size)
        outlines = reader.outlines
        train_ids = paint(shapes, size, uncovered=outlines.uncovered, overlaps=outlines.overlaps)
        facts = _NO_MASK
    else:
        path = source.masks[0].path
        raw = raw_mask(path)
        train_ids, values = reader.train_ids(path, raw)
        facts = MaskFacts(values, raw.palette)
        if raw.clear is None and source.field_of_view is None:
            facts = replace(facts, class_pixels=reader.count_classes(values))
    if source.field_of_view:
        outside = ~reader.foreground(source.field_of_view, raw_mask(source.field_of_view))
        train_ids = np.where(outside, np.uint8(IGNORE), train_ids)
    return train_ids, facts


def _read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        found, remedy = f"the file cannot be read ({error.strerror})", "get it again, or fix its permissions"
        raise BadItemError(Finding("file is unreadable", path, found, remedy)) from None
