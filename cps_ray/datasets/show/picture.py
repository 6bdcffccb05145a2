"""Pictures of masks: overlays, and the contact sheet, a PNG that shows every class of a data set with its colour."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cps_ray.datasets.images import decode_image, decode_mask
from cps_ray.datasets.shards import Encoded, Index
from cps_ray.engine.batch import IGNORE
from cps_ray.errors import DataError

# C classes, H W pixels; colours are uint8 (r, g, b).
PaletteColor = tuple[int, int, int]
Pixels = NDArray[np.uint8]

IGNORED = "ignored"
NO_MASK = "no mask"
SHOWN = 12
"""Images of a sheet, unless the classes need more."""
_BARE = 4
"""Of them, those without a mask where others have one."""
_CANDIDATES = 16
_VISIBLE = 0.005
"""Fraction of an image that makes a class easy to see."""
_OVERLAY = 0.78
"""Fraction of the class's colour in an overlay. The rest is the image in grey, so that hues stay those of the legend."""
_STRANGE = (255, 0, 255)
"""Of ids that are no class."""
_TILE_PX = (200, 400)
"""Height and largest width of an image on the sheet."""
_LEAST_PX, _MOST_PX = 960, 1640
"""Width of a sheet without its margins."""
_MARGIN_PX, _GAP_PX, _SEAM_PX = 20, 16, 2
_NARROWEST_PX = 150
"""Of a captioned picture, so that the caption says something."""
_SWATCH_PX = 16
_TAB_PX = 137
"""Of the legend: twelve to the widest line."""
_PAPER, _INK, _FAINT, _ACCENT = (255, 255, 255), (31, 35, 40), (110, 118, 129), (180, 83, 9)


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """One image of a data set, small."""

    id: str
    picture: Pixels
    """(H, W, 3) RGB: the image, and to its right its overlay if it has a mask."""
    labeled: bool
    """Whether it has a mask."""


def painted(mask: Pixels, palette: Sequence[PaletteColor], image: Pixels | None = None) -> Pixels:
    """uint8 (H, W) train ids -> uint8 (H, W, 3) RGB, over `image` (H, W, 3) if there is one; ignored pixels are hatched."""
    table = np.full((256, 3), _STRANGE, np.uint8)
    table[: len(palette)] = palette
    colors = table[mask].astype(np.float32)
    grey = np.full((*mask.shape, 1), 128, np.float32)
    if image is not None:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)[..., None]
        colors = _OVERLAY * colors + (1 - _OVERLAY) * grey
    rows, columns = np.indices(mask.shape)
    line = np.asarray((rows + columns) % 8 < 2)[..., None]
    hatched = np.where(line, 205, 0.5 * grey + 20)
    return np.asarray(np.where((mask == IGNORE)[..., None], hatched, colors).round(), np.uint8)


def chosen(index: Index, rows: NDArray[np.int64], seed: int, count: int = SHOWN) -> NDArray[np.int64]:
    """Some of these rows, those with masks first, so that every class that any of them shows is shown; `count`, or more if need be.

    Rare classes pick first: each takes, of some random images that show it, the one that shows most of it.
    """
    rng = np.random.default_rng((seed, 0x5EE))
    masked = rng.permutation(rows[index.labeled[rows]])
    bare = rng.permutation(rows[~index.labeled[rows]])
    area = index.height[masked].astype(np.float64) * index.width[masked]
    share = index.pixels[masked] / area[:, None]  # (N, C)
    picked: list[int] = []
    seen = np.zeros(share.shape[1], np.bool_)
    for label in np.argsort((share > 0).sum(axis=0), kind="stable"):
        candidates = np.flatnonzero(share[:, label])[:_CANDIDATES]
        if not seen[label] and candidates.size:
            best = int(candidates[share[candidates, label].argmax()])
            picked.append(best)
            seen |= share[best] >= _VISIBLE
    picked = list(dict.fromkeys(picked))
    more = count - len(picked) - min(len(bare), _BARE)
    picked += [place for place in range(len(masked)) if place not in picked][: max(0, more)]
    rest = max(count - len(picked), min(len(bare), _BARE))
    return np.concatenate([np.sort(masked[picked]), np.sort(bare[:rest])]).astype(np.int64)


def thumbnails(index: Index, rows: NDArray[np.int64], palette: Sequence[PaletteColor]) -> list[Thumbnail]:
    """Of these rows, without those that cannot be read."""
    made = []
    for row in rows.tolist():
        try:
            made.append(_thumbnail(index.locations.read([row])[0], palette))
        except DataError:
            continue
    return made


def _thumbnail(one: Encoded, palette: Sequence[PaletteColor]) -> Thumbnail:
    image = decode_image(one.image)
    height, width = image.shape[:2]
    scale = min(_TILE_PX[0] / height, _TILE_PX[1] / width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    if one.mask is None:
        return Thumbnail(one.id, np.asarray(small, np.uint8), labeled=False)
    mask = np.asarray(cv2.resize(decode_mask(one.mask), size, interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)
    seam = np.full((size[1], _SEAM_PX, 3), 255, np.uint8)
    overlay = painted(mask, palette, np.asarray(small, np.uint8))
    return Thumbnail(one.id, np.hstack([np.asarray(small, np.uint8), seam, overlay]), labeled=True)


def swatch(label: int, palette: Sequence[PaletteColor], side_px: int = _SWATCH_PX) -> Pixels:
    """uint8 (side, side, 3): how a class, or IGNORE, is painted."""
    return painted(np.full((side_px, side_px), label, np.uint8), palette)


def contact_sheet(
    title: str,
    shown: Sequence[Thumbnail],
    classes: Sequence[str],
    palette: Sequence[PaletteColor],
    absent: Sequence[str] = (),
) -> Image.Image:
    """Title, legend and images with their ids; RGB, as tall as need be. `absent`: classes that are marked so."""
    names = [f"{name} (absent)" if name in absent else name for name in classes]
    entries = [(swatch(label, palette), name) for label, name in enumerate(names)]
    entries.append((swatch(IGNORE, palette), IGNORED))
    lines = list(_wrapped(shown))
    width = max([_LEAST_PX, *map(_line_width, lines)])
    strips = [_heading(title, width), _legend(entries, width), *(_line(line, width) for line in lines)]
    height = sum(strip.height for strip in strips) + _GAP_PX * (len(strips) - 1)
    sheet = Image.new("RGB", (width + 2 * _MARGIN_PX, height + 2 * _MARGIN_PX), _PAPER)
    top = _MARGIN_PX
    for strip in strips:
        sheet.paste(strip, (_MARGIN_PX, top))
        top += strip.height + _GAP_PX
    return sheet


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def fitted(text: str, width_px: int, size: int) -> str:
    """The text, or as much of its head and tail as fits: file names differ at both ends."""
    font = _font(size)
    keep, short = len(text), text
    while font.getlength(short) > width_px and keep > 1:
        keep -= 1
        short = f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"
    return short


def _strip(width_px: int, height_px: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    strip = Image.new("RGB", (width_px, height_px), _PAPER)
    return strip, ImageDraw.Draw(strip)


def _heading(title: str, width_px: int) -> Image.Image:
    strip, draw = _strip(width_px, 30)
    draw.text((0, 15), fitted(title, width_px, 22), fill=_INK, font=_font(22), anchor="lm")
    return strip


def _legend(entries: Sequence[tuple[Pixels, str]], width_px: int) -> Image.Image:
    """Swatches and names from left to right, at tab stops; a long name takes several."""
    size, line_px, beside_px, gap_px = 15, 24, _SWATCH_PX + 8, 20
    font, left, line = _font(size), 0, 0
    placed = []
    for colors, name in entries:
        name = fitted(name, width_px - beside_px, size)
        tabs = math.ceil((beside_px + font.getlength(name) + gap_px) / _TAB_PX)
        if left and left + tabs * _TAB_PX > width_px + gap_px:
            left, line = 0, line + 1
        placed.append((left, line * line_px + line_px // 2, colors, name))
        left += tabs * _TAB_PX
    strip, draw = _strip(width_px, (line + 1) * line_px)
    for left, middle, colors, name in placed:
        top = middle - _SWATCH_PX // 2
        strip.paste(Image.fromarray(colors), (left, top))
        draw.rectangle((left, top, left + _SWATCH_PX - 1, top + _SWATCH_PX - 1), outline=_FAINT)
        draw.text((left + beside_px, middle), name, fill=_INK, font=font, anchor="lm")
    return strip


def _width(one: Thumbnail) -> int:
    return max(_NARROWEST_PX, int(one.picture.shape[1]))


def _line_width(shown: Sequence[Thumbnail]) -> int:
    return sum(map(_width, shown)) + _GAP_PX * (len(shown) - 1)


def _wrapped(shown: Sequence[Thumbnail]) -> Iterator[list[Thumbnail]]:
    """As many to a line as fit, at least one."""
    line: list[Thumbnail] = []
    for one in shown:
        if line and _line_width([*line, one]) > _MOST_PX:
            yield line
            line = []
        line.append(one)
    if line:
        yield line


def _line(shown: Sequence[Thumbnail], width_px: int) -> Image.Image:
    """Pictures side by side on one base line, each above its id."""
    size, caption_px = 14, 22
    tallest = max(one.picture.shape[0] for one in shown)
    strip, draw = _strip(width_px, tallest + caption_px)
    left = 0
    for one in shown:
        strip.paste(Image.fromarray(one.picture), (left, tallest - one.picture.shape[0]))
        at, room = left, _width(one)
        if not one.labeled:
            draw.text((at, tallest + caption_px // 2), NO_MASK, fill=_ACCENT, font=_font(size), anchor="lm")
            taken = round(_font(size).getlength(f"{NO_MASK}  "))
            at, room = at + taken, room - taken
        name = fitted(one.id, room, size)
        draw.text((at, tallest + caption_px // 2), name, fill=_FAINT, font=_font(size), anchor="lm")
        left += _width(one) + _GAP_PX
    return strip
