"""Training photos before they are read: cut into tiles, and the values among their bands that become black and white."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cps_ray.datasets.images import chosen_bands
from cps_ray.datasets.prepare.items import Source
from cps_ray.datasets.raster import UnreadableError, open_raster, upright_size
from cps_ray.errors import DataError

_SAMPLED_IMAGES, _SAMPLED_PIXELS = 64, 65536
"""Training images whose quantiles count, and pixels of each, both evenly spaced."""


def cut_into_tiles(sources: Iterable[Source], size_px: int, overlap_px: int) -> tuple[Source, ...]:
    """Returns the sources with those that are larger than a tile cut; ids get `_yTOP_xLEFT`. Each pixel is in a tile at least.

    Tiles have `size_px` on each side, or the image's where that is less; the last ones end where the image does, and so may
    overlap by more than `overlap_px`. An image whose header cannot be read stays whole, and is reported when it is read.
    """
    tiles: list[Source] = []
    for source in sources:
        try:
            (height, width), _ = upright_size(Path(source.image).read_bytes(), source.image)
        except (OSError, UnreadableError):
            tiles.append(source)
            continue
        if height <= size_px and width <= size_px:
            tiles.append(source)
            continue
        tiles += [
            replace(
                source,
                id=f"{source.id}_y{top:05d}_x{left:05d}",
                tile=(top, left, min(size_px, height), min(size_px, width)),
            )
            for top in _starts(height, size_px, overlap_px)
            for left in _starts(width, size_px, overlap_px)
        ]
    return tuple(tiles)


def _starts(length: int, size_px: int, overlap_px: int) -> Iterator[int]:
    """Yields the first pixel of every tile along a side."""
    last = max(0, length - size_px)
    yield from range(0, last, size_px - overlap_px)
    yield last


def stretched_range(
    sources: Sequence[Source], quantiles: tuple[float, float], bands: tuple[int, ...] | None
) -> tuple[tuple[float, float], ...]:
    """Returns, for each band, the values at two quantiles of a sample of the images. Raises DataError if they are 8-bit or flat."""
    sampled = sources[:: max(1, len(sources) // _SAMPLED_IMAGES)]
    with ThreadPoolExecutor() as threads:
        pixels = [
            values for values in threads.map(lambda source: _sample(source, bands), sampled) if values is not None
        ]
    if not pixels:
        raise DataError(
            "`stretch` is for images of more than 8 bits, but none of the training images that were looked at is."
        )
    if len({values.shape[1] for values in pixels}) > 1:
        raise DataError("`stretch` needs images of the same bands, but some are grey and others are not; say `bands`.")
    low, high = np.nanquantile(np.concatenate(pixels), quantiles, axis=0)
    flat = np.flatnonzero(low >= high)
    if flat.size:
        raise DataError(
            f"`stretch` must find two values, but both quantiles of band {flat[0] + 1} are {low[flat[0]]:g}; take wider ones."
        )
    return tuple((float(first), float(last)) for first, last in zip(low, high, strict=True))


def _sample(source: Source, bands: tuple[int, ...] | None) -> NDArray[Any] | None:
    """Returns some pixels of an image, float64 (N, bands), NaN where they are not finite; None for one that cannot be read."""
    try:
        values, _ = chosen_bands(open_raster(Path(source.image).read_bytes(), source.image), bands)
    except (OSError, UnreadableError):
        return None  # reported when it is read
    if values.dtype == np.uint8:
        return None
    flat = values.reshape(-1, values.shape[2])
    sample = flat[:: max(1, len(flat) // _SAMPLED_PIXELS)].astype(np.float64)
    return np.where(np.isfinite(sample), sample, np.nan)
