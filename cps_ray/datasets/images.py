"""Decoding and encoding of images and masks: what shards may hold, and how anything else becomes that.

Shards hold JPEG and PNG of 8 bits as they came, and masks as grey PNGs of train ids; any other image is decoded here once,
and stored as PNG.
"""

import io
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from cps_ray.errors import DataError

_STORED_AS_IS = ("JPEG", "MPO", "PNG")
"""Formats whose files shards hold as they came. MPO: a JPEG of a phone, with previews behind it."""
_HASHED_SIDE = 32
"""Side in px to which `perceptual_hash` scales an image."""
_FREQUENCIES = 8
"""Lowest frequencies per side that `perceptual_hash` compares: 8 x 8 are its 64 bits."""


def _buffer(data: bytes | memoryview) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def is_jpeg(data: bytes) -> bool:
    """Returns whether encoded bytes are a JPEG; those in shards are a PNG otherwise."""
    return data.startswith(b"\xff\xd8")


def undecodable(data: bytes) -> str:
    """Returns why bytes are no image; and what to do, after `; `: the end of a sentence that begins with `image` or `mask`."""
    if data.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not an image; fetch the files with `git lfs pull`"
    if not data:
        return "is empty; get the file again"
    return f"cannot be decoded ({len(data)} bytes, the first are {bytes(data[:8])!r}): damaged or cut short; get the file again"


def too_large() -> str:
    """Returns what is wrong with an image that Pillow takes for an attack; and what to do, after `; `: the end of a sentence."""
    # Pillow only warns above MAX_IMAGE_PIXELS; it raises above twice that.
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    return f"must have at most {limit / 1e6:.0f} million px, but has more; cut it into tiles"


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Returns encoded bytes as uint8 (H, W, 3) RGB, turned as the EXIF orientation says. DataError if they are no image."""
    pixels = cv2.imdecode(_buffer(data), cv2.IMREAD_COLOR_RGB) if data else None
    if pixels is None:
        raise DataError(f"image {undecodable(data)}.")
    return np.asarray(pixels, np.uint8)


def encode_image(pixels: NDArray[np.uint8], *, compressed: bool = True) -> bytes:
    """Returns uint8 (H, W, 3) RGB as PNG bytes; not `compressed` they are larger, and decoded several times as fast."""
    settings = (
        [] if compressed else [cv2.IMWRITE_PNG_COMPRESSION, 0, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    )
    success, data = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), settings)
    assert success
    return bytes(data)


def decode_mask(data: bytes) -> NDArray[np.uint8]:
    """Returns PNG bytes as uint8 (H, W) train ids. DataError if they are no image of one channel of 8 bits."""
    pixels = cv2.imdecode(_buffer(data), cv2.IMREAD_UNCHANGED) if data else None
    if pixels is None:
        raise DataError(f"mask {undecodable(data)}.")
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
    orientation: int
    """EXIF orientation, 1..8; 1 is upright."""
    peak: int | None
    """Largest value before the image was brought to 8 bits; None where it had 8."""


def orientation_of(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1..8; 1 without the tag, or if its value is none of these."""
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def turned(pixels: NDArray[np.integer[Any]], orientation: int) -> NDArray[np.integer[Any]]:
    """Returns pixels (H, W) that are stored with an EXIF orientation, 1..8, the right way up."""
    # Transposing comes first: the mirroring below is that of the rows and columns one sees.
    if orientation >= 5:
        pixels = pixels.T
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def read_image(data: bytes, value_range: tuple[float, float] | None = None) -> Picture:
    """Reads JPEG, PNG, TIFF, BMP, WebP and what else OpenCV reads; grey, RGB, RGBA (alpha is dropped), 8 or 16 bit, float.

    `value_range`: the two values that become 0 and 255 in an image of more than 8 bits; None: 0 and 65535. DataError if the
    bytes are no such image, have several pages or frames, or are no integers and there is no `value_range`.
    """
    try:
        with Image.open(io.BytesIO(data)) as header:
            kind, pages, orientation = header.format, getattr(header, "n_frames", 1), orientation_of(header)
    except Image.DecompressionBombError:
        raise DataError(f"image {too_large()}.") from None
    except (OSError, SyntaxError, ValueError):
        kind, pages, orientation = None, 1, 1  # OpenCV has the last word: Pillow knows fewer TIFFs
    if pages > 1 and kind != "MPO":
        raise DataError(f"image has {pages} pages or frames, but must have one; save each as a file of its own.")
    # Without ANYDEPTH, OpenCV would reduce 16 bits to 8 by itself, whatever `value_range` says.
    raw = cv2.imdecode(_buffer(data), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH) if data else None
    if raw is None and data:  # OpenCV does not turn one channel of floats into three
        raw = cv2.imdecode(_buffer(data), cv2.IMREAD_UNCHANGED)
        raw = None if raw is None or raw.ndim != 2 else cv2.merge([raw] * 3)
    if raw is None:
        raise DataError(f"image {undecodable(data)}.")
    if raw.dtype == np.uint8:
        pixels = np.asarray(raw, np.uint8)
        return Picture(data if kind in _STORED_AS_IS else encode_image(pixels), pixels, orientation, None)
    if raw.dtype != np.uint16 and value_range is None:
        raise DataError(
            f"image holds {raw.dtype} values; say in the recipe what is black and white: `value_range: [0, 1]`."
        )
    low, high = value_range or (0, 65535)
    # NaN becomes 0, and infinity what is white or black; clipping then brings all into the range.
    values = np.nan_to_num(raw.astype(np.float64), posinf=high, neginf=low)
    peak = int(min(values.max(), 2**31))
    pixels = np.asarray(np.clip((values - low) * (255 / (high - low)), 0, 255).round(), np.uint8)
    return Picture(encode_image(pixels), pixels, orientation, peak)


def perceptual_hash(pixels: NDArray[np.uint8]) -> int:
    """Returns 64 bits that re-encoding, resizing and small changes of light leave about as they are (pHash: Zauner 2010).

    A bit says whether one of the 8x8 lowest frequencies of the grey image at 32x32 px is above their median. Two hashes of
    one scene differ in few bits, those of two scenes in about 32.
    """
    small = cv2.resize(pixels, (_HASHED_SIDE, _HASHED_SIDE), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    low = np.asarray(cv2.dct(grey))[:_FREQUENCIES, :_FREQUENCIES].ravel()
    bits = low > np.median(low[1:])  # the median leaves out the first coefficient, the mean brightness
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
