"""Images and masks as shards hold them: how they are decoded, and how a raw image becomes one.

Shards hold upright PNGs of 8 bits and all JPEGs as they came, and masks as grey PNGs of train ids; any other image is read
here once, and stored as PNG: of one channel if it has one.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from cps_ray.datasets.raster import Raster, UnreadableError, open_raster, turned
from cps_ray.errors import DataError

ValueRange = tuple[float, float] | tuple[tuple[float, float], ...]
"""The two values that become black and white, for all bands or for each."""
_HASHED_SIDE = 32
"""Side in px to which `perceptual_hash` scales an image."""
_FREQUENCIES = 8
"""Lowest frequencies per side that `perceptual_hash` compares: 8 x 8 are its 64 bits."""


def _buffer(data: bytes | memoryview) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def is_jpeg(data: bytes) -> bool:
    """Returns whether encoded bytes are a JPEG; those in shards are a PNG otherwise."""
    return data.startswith(b"\xff\xd8")


def _undecodable(data: bytes) -> str:
    return "is empty" if not data else f"cannot be decoded ({len(data)} bytes, the first are {bytes(data[:8])!r})"


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Returns encoded bytes as uint8 (H, W, 3) RGB, turned as the EXIF orientation says. DataError if they are no image."""
    pixels = cv2.imdecode(_buffer(data), cv2.IMREAD_COLOR_RGB) if data else None
    if pixels is None:
        raise DataError(f"image {_undecodable(data)}; prepare the data set again.")
    return np.asarray(pixels, np.uint8)


def encode_image(pixels: NDArray[np.uint8], *, grey: bool = False, compressed: bool = True) -> bytes:
    """Returns uint8 (H, W, 3) RGB as PNG bytes; not `compressed` they are larger, and decoded several times as fast.

    `grey`: the three channels are equal, and one is stored.
    """
    settings = (
        [] if compressed else [cv2.IMWRITE_PNG_COMPRESSION, 0, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    )
    stored = pixels[..., 0] if grey else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    success, data = cv2.imencode(".png", stored, settings)
    assert success
    return bytes(data)


def decode_mask(data: bytes) -> NDArray[np.uint8]:
    """Returns PNG bytes as uint8 (H, W) train ids. DataError if they are no image of one channel of 8 bits."""
    pixels = cv2.imdecode(_buffer(data), cv2.IMREAD_UNCHANGED) if data else None
    if pixels is None:
        raise DataError(f"mask {_undecodable(data)}; prepare the data set again.")
    if pixels.ndim != 2 or pixels.dtype != np.uint8:
        raise DataError(f"mask must have one channel of uint8, but has shape {pixels.shape} of {pixels.dtype}.")
    return np.asarray(pixels, np.uint8)


def encode_mask(mask: NDArray[np.uint8]) -> bytes:
    """Returns uint8 (H, W) train ids as PNG bytes."""
    success, data = cv2.imencode(".png", mask)
    assert success
    return bytes(data)


@dataclass(frozen=True, slots=True)
class Picture:
    """A raw image that was read, and what a shard holds of it."""

    data: bytes
    """JPEG or PNG of 8 bits: the file's own bytes where they are that."""
    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB, turned as the EXIF orientation says."""
    grey: bool
    """Whether the file has one channel; the three of `pixels` are then equal."""
    orientation: int
    """EXIF orientation, 1..8; 1 is upright."""
    peak: int | None
    """Largest value before the image was brought to 8 bits; None where it had 8, or the file says its white."""
    aside: str = ""
    """What of the file was left aside, in words; empty for nothing."""


def read_image(
    data: bytes, value_range: ValueRange | None = None, bands: tuple[int, ...] | None = None, name: str = ""
) -> Picture:
    """Reads JPEG, PNG, TIFF, BMP, WebP, GIF and PNM of grey, RGB or `bands`, of 8 or more bits; alpha is left aside.

    `bands`: the numbers, from 1, of the three bands (or of one) that are red, green and blue. `value_range`: what becomes 0 and
    255 in an image of more than 8 bits; None: 0 and the largest value that its kind can have. Raises UnreadableError if the
    bytes are no such image, have more bands and no `bands` say which, or are signed or floats and there is no `value_range`.
    """
    raster = open_raster(data, name)
    pixels, grey, peak, aside = to_rgb(raster, value_range, bands)
    # A PNG is stored upright, since decoders differ in whether they turn it; a JPEG would lose by being encoded again.
    as_it_came = (raster.format == "PNG" and raster.orientation == 1 and peak is None) or (
        raster.format == "JPEG" and _decoded_as(data, pixels, raster)
    )
    stored = data if as_it_came and bands is None else encode_image(pixels, grey=grey)
    if raster.white not in (None, 65535):  # a file that says its largest value, 4095 of 12 bits, is not dark for it
        peak = None
    return Picture(stored, pixels, grey, raster.orientation, peak, aside)


def to_rgb(
    raster: Raster, value_range: ValueRange | None, bands: tuple[int, ...] | None
) -> tuple[NDArray[np.uint8], bool, int | None, str]:
    """Returns a raster as uint8 (H, W, 3) RGB, upright, and `grey`, `peak` and `aside` as in `Picture`. Settings and errors: `read_image`."""
    values, aside = chosen_bands(raster, bands)
    grey = values.shape[2] == 1
    if values.dtype == np.uint8:
        pixels, peak = np.asarray(values, np.uint8), None
        if raster.white != 255:
            pixels = np.asarray((pixels.astype(np.float32) * (255 / (raster.white or 255))).round(), np.uint8)
    else:
        pixels, peak = _to_8_bits(raster, values, value_range)
    if raster.inverted:
        pixels = 255 - pixels
    return turned(np.repeat(pixels, 3, axis=2) if grey else pixels, raster.orientation), grey, peak, aside


def _decoded_as(data: bytes, pixels: NDArray[np.uint8], raster: Raster) -> bool:
    """Returns whether training, which lets OpenCV turn a JPEG as its EXIF says, will see the same pixels."""
    if raster.orientation == 1 and b"Exif" not in data[:65536]:
        return True
    return np.array_equal(decode_image(data), pixels)


def chosen_bands(raster: Raster, bands: tuple[int, ...] | None) -> tuple[NDArray[np.generic], str]:
    """Returns (H, W, 1 or 3) values, and in words what was left aside. UnreadableError if there are no such bands."""
    if raster.palette is not None:
        return raster.palette[raster.samples[..., 0]], ""
    values = raster.samples
    if bands is not None:
        if raster.alpha is not None:
            values = np.dstack([values, raster.alpha])  # what a TIFF calls alpha may be infrared
        if max(bands) > values.shape[2]:
            found = f"the file should have band {max(bands)}, as `bands` says, but is {raster.words}"
            raise UnreadableError(found, "choose among the bands that every image has")
        return values[..., [band - 1 for band in bands]], ""
    if values.shape[2] not in (1, 3):
        found = f"the file should be grey or RGB, but is {raster.words}"
        raise UnreadableError(found, "say in the recipe which are red, green and blue: `bands: [3, 2, 1]`")
    aside = f"the fourth band of {raster.words}" if raster.alpha is not None and raster.format == "TIFF" else ""
    return values, aside


def _to_8_bits(
    raster: Raster, values: NDArray[np.generic], value_range: ValueRange | None
) -> tuple[NDArray[np.uint8], int]:
    """Returns (H, W, C) values of more than 8 bits as uint8, and the largest of them."""
    if value_range is None and (raster.white is None or raster.white > 65535):
        raise UnreadableError(
            f"the file holds {values.dtype} values", "say in the recipe what is black and white: `value_range: [0, 1]`"
        )
    pairs = np.array(value_range or (0, raster.white), np.float64).reshape(-1, 2)
    if len(pairs) not in (1, values.shape[2]):
        found = f"the file has {values.shape[2]} bands, but `value_range` gives black and white of {len(pairs)}"
        raise UnreadableError(found, "give one pair for all bands, or one for each")
    low, high = pairs.T
    # NaN becomes 0, and infinity what is white or black; clipping then brings all into the range.
    wide = np.nan_to_num(values.astype(np.float64), posinf=float(pairs.max()), neginf=float(pairs.min()))
    scaled = (wide - low) * (255 / (high - low))
    return np.asarray(np.clip(scaled, 0, 255).round(), np.uint8), int(min(wide.max(), 2**31))


def perceptual_hash(pixels: NDArray[np.uint8]) -> int:
    """Returns 64 bits that re-encoding, resizing and small changes of light leave about as they are (pHash: Zauner 2010).

    A bit says whether one of the 8x8 lowest frequencies of the grey image at 32x32 px is above their median. Two hashes of
    one scene differ in few bits, those of two scenes in about 32.
    """
    # Grey first: one channel is averaged instead of three. Of large images every k-th pixel, still 64 or more of each of the 32x32.
    k = max(1, min(pixels.shape[:2]) // (8 * _HASHED_SIDE))
    grey = cv2.cvtColor(np.ascontiguousarray(pixels[::k, ::k]), cv2.COLOR_RGB2GRAY)
    grey = cv2.resize(grey, (_HASHED_SIDE, _HASHED_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = np.asarray(cv2.dct(grey))[:_FREQUENCIES, :_FREQUENCIES].ravel()
    bits = low > np.median(low[1:])  # the median leaves out the first coefficient, the mean brightness
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
