"""Sources to items: one raw image and its mask, read, checked and brought to the form that shards hold."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from cps_ray.datasets.images import Picture, encode_image, encode_mask, is_jpeg, perceptual_hash, read_image
from cps_ray.datasets.prepare.findings import BadItemError, Finding
from cps_ray.datasets.prepare.masks import MaskReader, aligned, ramps
from cps_ray.errors import DataError


@dataclass(frozen=True, slots=True)
class Source:
    """One image to be prepared."""

    id: str
    image: str = ""
    """Path; empty for what is drawn."""
    mask: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One image to be written, with its mask if it has one, and what was seen while it was made."""

    id: str
    image: bytes
    """JPEG or PNG of 8 bits."""
    mask: bytes | None
    """PNG, one channel, uint8 train ids 0..C-1 or 255."""
    size: tuple[int, int]
    """(height, width) in px."""
    pixels: NDArray[np.int64]
    """(C,) of each class; zeros without a mask."""
    perceptual_hash: int
    values: Mapping[int, int] = field(default_factory=dict)
    """Pixels per raw mask value."""
    steps: tuple[int, int] = (0, 0)
    """See `masks.ramps`."""
    peak: int | None = None
    """Largest value of an image with more than 8 bits."""


class Make(Protocol):
    """Makes the item of a source. A frozen dataclass: it travels to processes, and its repr tells settings apart."""

    def __call__(self, source: Source) -> Item:
        """Raises BadItemError where image or mask cannot be used."""
        ...


def item_of(key: str, image: bytes, shown: NDArray[np.uint8], mask: NDArray[np.uint8] | None, classes: int) -> Item:
    """The item of encoded bytes, their pixels uint8 (H, W, 3) and train ids uint8 (H, W)."""
    height, width = shown.shape[:2]
    if mask is None:
        return Item(key, image, None, (height, width), np.zeros(classes, np.int64), perceptual_hash(shown))
    pixels = np.bincount(mask.ravel(), minlength=256)[:classes].astype(np.int64)
    return Item(key, image, encode_mask(mask), (height, width), pixels, perceptual_hash(shown))


@dataclass(frozen=True)
class FromFiles:
    """Items of raw files."""

    reader: MaskReader
    value_range: tuple[float, float] | None = None
    """Of images with more than 8 bits; see `images.read_image`."""
    scale: float = 1.0
    """Fraction of their sides, in (0, 1], that images and masks are shrunk to. Scores then hold for that size."""
    compressed: bool = True
    """False: PNG images are stored without compression. JPEGs stay as they are."""

    def __call__(self, source: Source) -> Item:
        picture = self._picture(source)
        mask, values = self._mask(source, picture) if source.mask else (None, {})
        image, shown = picture.data, picture.pixels
        steps = (0, 0) if mask is None else ramps(mask)
        if self.scale < 1.0:
            size = (max(1, round(shown.shape[1] * self.scale)), max(1, round(shown.shape[0] * self.scale)))
            shown = np.asarray(cv2.resize(shown, size, interpolation=cv2.INTER_AREA), np.uint8)
            image = encode_image(shown, compressed=self.compressed)  # a second JPEG would lose again
            if mask is not None:
                mask = np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)
        elif not self.compressed and not is_jpeg(image):
            image = encode_image(shown, compressed=False)
        made = item_of(source.id, image, shown, mask, self.reader.classes)
        return replace(made, values=values, steps=steps, peak=picture.peak)

    def _picture(self, source: Source) -> Picture:
        try:
            return read_image(_bytes(source.image), self.value_range)
        except DataError as error:
            found, _, remedy = str(error).removesuffix(".").partition("; ")
            raise BadItemError(Finding("image is unreadable", source.image, found, remedy)) from None

    def _mask(self, source: Source, picture: Picture) -> tuple[NDArray[np.uint8], Mapping[int, int]]:
        path = source.mask or ""
        raw = self.reader.read(path, _bytes(path))
        height, width = picture.pixels.shape[:2]
        return self.reader.train_ids(path, aligned(path, raw, (height, width), picture.orientation))


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        found, remedy = f"the file cannot be read ({error.strerror})", "get it again, or mend its permissions"
        raise BadItemError(Finding("file is unreadable", path, found, remedy)) from None
