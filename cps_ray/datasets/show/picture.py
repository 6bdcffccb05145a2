"""Pictures of masks: overlays, and the contact sheet, an image that shows every class of a data set with its colour."""

import math
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cps_ray.datasets.images import decode_image, decode_mask
from cps_ray.datasets.shards import Encoded, Index
from cps_ray.engine.batch import IGNORE
from cps_ray.errors import DataError, at
from cps_ray.text import printable

# C classes, H W pixels; colours are uint8 (r, g, b).
PaletteColor = tuple[int, int, int]
Pixels = NDArray[np.uint8]

IGNORED = "ignored"
NO_MASK = "no mask"
NUM_EXAMPLES = 12
"""Number of images on a sheet, unless the classes need more."""
_EXAMPLES_WITHOUT_MASK = 4
"""Number of images without a mask among them, where others have one."""
_CANDIDATES = 16
"""Random images of which the one that shows most of a class is its example."""
_VISIBLE = 0.005
"""Fraction of an image that makes a class easy to see."""
_OVERLAY = 0.78
"""Fraction of the class's colour in an overlay. The rest is the image in grey, so that hues stay those of the legend."""
_UNKNOWN_COLOR = (255, 0, 255)
"""Colour of mask values that are no class."""
_TILE_PX = (200, 400)
"""Largest height and width of an image on the sheet."""
_LEAST_PX, _MOST_PX = 960, 1640
"""Smallest and largest width of a sheet without its margins."""
_MARGIN_PX, _GAP_PX, _SEAM_PX = 20, 16, 2
_NARROWEST_PX = 150
"""Smallest width of a picture with its caption, so that the caption says something."""
_SWATCH_PX = 16
_TAB_PX = 137
"""Distance of the legend's tab stops: twelve to the widest line."""
_FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
"""Where fonts lie; searched where there is no fontconfig to ask."""
_OTHER_STYLES = ("bold", "italic", "oblique", "mono", "condensed", "narrow", "light", "thin", "black")
_NO_CHARACTER = "\U0010ffff"
_CUT = "…"
_PAPER, _INK, _FAINT, _ACCENT = (255, 255, 255), (31, 35, 40), (110, 118, 129), (180, 83, 9)


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A small picture of one image of a data set."""

    id: str
    picture: Pixels
    """uint8 (H, W, 3) RGB: the image, and to its right its overlay if it has a mask."""
    labeled: bool
    """Whether it has a mask."""


def paint_mask(mask: Pixels, palette: Sequence[PaletteColor], image: Pixels | None = None) -> Pixels:
    """Returns uint8 (H, W) train ids as uint8 (H, W, 3) RGB, over `image` (H, W, 3) if there is one; ignored pixels are hatched."""
    color_of = np.full((256, 3), _UNKNOWN_COLOR, np.uint8)
    color_of[: len(palette)] = palette
    colors = color_of[mask]
    grey = np.full_like(mask, 128)
    if image is not None:
        grey = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)
        # In 8 bits: of a photo of many megapixels, floats would take a gigabyte.
        colors = np.asarray(
            cv2.addWeighted(colors, _OVERLAY, cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), 1 - _OVERLAY, 0), np.uint8
        )
    rows, columns = np.nonzero(mask == IGNORE)
    hatched = np.where((rows + columns) % 8 < 2, 205, 0.5 * grey[rows, columns] + 20)
    colors[rows, columns] = hatched.round()[:, None]
    return colors


def choose_examples(index: Index, rows: NDArray[np.int64], seed: int, count: int = NUM_EXAMPLES) -> NDArray[np.int64]:
    """Draws `count` of these rows, or more if it takes more to show every class that any of them shows; those with masks first.

    Rare classes pick first: each takes, of some random images that show it, the one that shows most of it.
    """
    rng = np.random.default_rng((seed, 0x5EE))
    masked = rng.permutation(rows[index.labeled[rows]])
    unmasked = rng.permutation(rows[~index.labeled[rows]])
    area = index.height[masked].astype(np.float64) * index.width[masked]
    fraction = index.pixels[masked] / area[:, None]  # (N, C) of the image's pixels
    picked: list[int] = []  # positions in `masked`
    easy_to_see = np.zeros(fraction.shape[1], np.bool_)
    for label in np.argsort((fraction > 0).sum(axis=0), kind="stable"):
        candidates = np.flatnonzero(fraction[:, label])[:_CANDIDATES]  # random ones, because `masked` is shuffled
        if not easy_to_see[label] and candidates.size:
            best = int(candidates[fraction[candidates, label].argmax()])
            picked.append(best)
            # The image serves every class that is easy to see in it, not only the one that picked it.
            easy_to_see |= fraction[best] >= _VISIBLE
    picked = list(dict.fromkeys(picked))  # several classes may have picked one image
    more = count - len(picked) - min(len(unmasked), _EXAMPLES_WITHOUT_MASK)
    picked += [position for position in range(len(masked)) if position not in picked][: max(0, more)]
    num_unmasked = max(count - len(picked), min(len(unmasked), _EXAMPLES_WITHOUT_MASK))
    return np.concatenate([np.sort(masked[picked]), np.sort(unmasked[:num_unmasked])]).astype(np.int64)


def thumbnails(index: Index, rows: NDArray[np.int64], palette: Sequence[PaletteColor]) -> list[Thumbnail]:
    """Makes thumbnails of the images in these rows; leaves out those that cannot be read."""
    made = []
    for row in rows.tolist():
        try:
            with at(index.locations.ids[row]):
                made.append(_thumbnail(index.locations.read([row])[0], palette))
        except DataError:
            continue
    return made


def _thumbnail(encoded: Encoded, palette: Sequence[PaletteColor]) -> Thumbnail:
    mask = None if encoded.mask is None else decode_mask(encoded.mask)
    return make_thumbnail(encoded.id, decode_image(encoded.image), mask, palette)


def make_thumbnail(image_id: str, image: Pixels, mask: Pixels | None, palette: Sequence[PaletteColor]) -> Thumbnail:
    """Makes a thumbnail of an image uint8 (H, W, 3) and, if it has one, its mask of train ids (H, W)."""
    height, width = image.shape[:2]
    scale = min(_TILE_PX[0] / height, _TILE_PX[1] / width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # INTER_AREA averages what it shrinks; an enlarged image keeps its pixels as squares, like its mask.
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    if mask is None:
        return Thumbnail(image_id, np.asarray(small, np.uint8), labeled=False)
    mask = np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)
    seam = np.full((size[1], _SEAM_PX, 3), 255, np.uint8)
    overlay = paint_mask(mask, palette, np.asarray(small, np.uint8))
    return Thumbnail(image_id, np.hstack([np.asarray(small, np.uint8), seam, overlay]), labeled=True)


def paint_swatch(label: int, palette: Sequence[PaletteColor], side_px: int = _SWATCH_PX) -> Pixels:
    """Returns a square painted as a class, or as IGNORE: uint8 (side, side, 3)."""
    return paint_mask(np.full((side_px, side_px), label, np.uint8), palette)


def contact_sheet(
    title: str,
    examples: Sequence[Thumbnail],
    classes: Sequence[str],
    palette: Sequence[PaletteColor],
    absent: Sequence[str] = (),
) -> Image.Image:
    """Draws title, legend and images with their ids; RGB, as tall as need be. `absent`: classes that are marked so.

    A name that no font on this machine has all characters of stands as `class_label` or `image_label`, which the page lists.
    """
    names = [class_label(name, label) + " (absent)" * (name in absent) for label, name in enumerate(classes)]
    entries = [(paint_swatch(label, palette), name) for label, name in enumerate(names)]
    entries.append((paint_swatch(IGNORE, palette), IGNORED))
    captions = {id(example): image_label(example.id, number) for number, example in enumerate(examples, start=1)}
    lines = list(_wrap_lines(examples))
    width = max([_LEAST_PX, *map(_line_width, lines)])
    strips = [
        _draw_heading(title, width),
        _draw_legend(entries, width),
        *(_draw_line(line, captions, width) for line in lines),
    ]
    height = sum(strip.height for strip in strips) + _GAP_PX * (len(strips) - 1)
    sheet = Image.new("RGB", (width + 2 * _MARGIN_PX, height + 2 * _MARGIN_PX), _PAPER)
    top = _MARGIN_PX
    for strip in strips:
        sheet.paste(strip, (_MARGIN_PX, top))
        top += strip.height + _GAP_PX
    return sheet


def class_label(name: str, label: int) -> str:
    """Returns the name of a class as a sheet draws it: `class 7` where no font has its characters."""
    return _drawable(name) or f"class {label}"


def image_label(image_id: str, number: int) -> str:
    """Returns the id of the sheet's `number`th image as the sheet draws it: `image 12` where no font has its characters."""
    return _drawable(image_id) or f"image {number}"


def _drawable(text: str) -> str:
    """Returns the text without what is no picture: controls as escapes, joiners and marks of direction left out; "" if no font has the rest."""
    text = "".join(c for c in printable(text) if unicodedata.category(c) != "Cf")
    return text if _font_file(_characters(text)) is not None else ""


def _characters(text: str) -> str:
    return "".join(sorted({*text, _CUT}))


@lru_cache
def _font(size: int, file: str = "") -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


@lru_cache
def _font_file(characters: str) -> str | None:
    """Returns the file of a font that has these characters: "" if Pillow's own does, None if none does."""
    if _has_glyphs("", characters):
        return ""
    return next((file for file in _system_fonts(characters) if _has_glyphs(file, characters)), None)


def _has_glyphs(file: str, characters: str) -> bool:
    def drawn(character: str) -> tuple[tuple[int, int], bytes]:
        mask = font.getmask(character)
        return mask.size, bytes(mask)

    try:
        font = _font(16, file)
        # A character that a font lacks looks like any other that it lacks: mostly a box.
        missing = drawn(_NO_CHARACTER)
        return all(drawn(character) != missing for character in characters if not character.isspace())
    except OSError:
        return False  # damaged, or of bitmaps in other sizes


def _system_fonts(characters: str) -> list[str]:
    """Returns files of fonts that may have these characters, plain sans serif ones first."""
    done = None
    if shutil.which("fc-list"):
        charset = " ".join(f"{ord(character):x}" for character in characters if not character.isspace())
        ask = ["fc-list", "--format", "%{file}\n", f":charset={charset}"]
        done = subprocess.run(ask, capture_output=True, text=True, check=False)
    if done is not None and done.returncode == 0:
        files = done.stdout.splitlines()
    else:
        files = [str(path) for folder in _FONT_FOLDERS for path in Path(folder).expanduser().rglob("*")]

    def rank(file: str) -> tuple[bool, bool, int, str]:
        name = Path(file).stem.lower()
        return "sans" not in name, any(style in name for style in _OTHER_STYLES), len(name), file

    # Apple's LastResort has a box for everything.
    fonts = {
        file for file in files if file.lower().endswith((".ttf", ".otf", ".ttc")) and "lastresort" not in file.lower()
    }
    return sorted(fonts, key=rank)


def shorten_text(text: str, width_px: int, size: int) -> str:
    """Returns the text, or as much of its head and tail as fits: file names differ at both ends."""
    return fit_text(text, width_px, size)[0]


def fit_text(text: str, width_px: int, size: int) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """Returns what `shorten_text` does, and the font to draw it in."""
    font = _font(size, _font_file(_characters(text)) or "")
    keep, short = len(text), text
    while font.getlength(short) > width_px and keep > 1:
        keep -= 1
        # An odd character goes to the head.
        short = f"{text[: (keep + 1) // 2]}{_CUT}{text[len(text) - keep // 2 :]}"
    return short, font


def _blank_strip(width_px: int, height_px: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    strip = Image.new("RGB", (width_px, height_px), _PAPER)
    return strip, ImageDraw.Draw(strip)


# Pillow's anchor "lm": the position given is the left end of the text, at the middle of its height.


def _draw_heading(title: str, width_px: int) -> Image.Image:
    strip, draw = _blank_strip(width_px, 30)
    title = _drawable(title) or "".join(c if c.isspace() or _has_glyphs("", c) else "?" for c in title)
    text, font = fit_text(title, width_px, 22)
    draw.text((0, 15), text, fill=_INK, font=font, anchor="lm")
    return strip


def _draw_legend(entries: Sequence[tuple[Pixels, str]], width_px: int) -> Image.Image:
    """Draws swatches and names from left to right, at tab stops; a long name takes several."""
    size, line_px, text_offset_px, gap_px = 15, 24, _SWATCH_PX + 8, 20
    left, line = 0, 0
    placed = []
    # Where everything goes comes first: the strip's height depends on the number of lines.
    for colors, name in entries:
        name, font = fit_text(name, width_px - text_offset_px, size)
        tabs = math.ceil((text_offset_px + font.getlength(name) + gap_px) / _TAB_PX)
        # The last gap of a line may lie beyond its end.
        if left and left + tabs * _TAB_PX > width_px + gap_px:
            left, line = 0, line + 1
        placed.append((left, line * line_px + line_px // 2, colors, name, font))
        left += tabs * _TAB_PX
    strip, draw = _blank_strip(width_px, (line + 1) * line_px)
    for left, middle, colors, name, font in placed:
        top = middle - _SWATCH_PX // 2
        strip.paste(Image.fromarray(colors), (left, top))
        draw.rectangle((left, top, left + _SWATCH_PX - 1, top + _SWATCH_PX - 1), outline=_FAINT)
        draw.text((left + text_offset_px, middle), name, fill=_INK, font=font, anchor="lm")
    return strip


def _captioned_width(thumbnail: Thumbnail) -> int:
    return max(_NARROWEST_PX, int(thumbnail.picture.shape[1]))


def _line_width(line: Sequence[Thumbnail]) -> int:
    return sum(map(_captioned_width, line)) + _GAP_PX * (len(line) - 1)


def _wrap_lines(examples: Sequence[Thumbnail]) -> Iterator[list[Thumbnail]]:
    """Yields lines of as many pictures as fit, at least one."""
    line: list[Thumbnail] = []
    for thumbnail in examples:
        if line and _line_width([*line, thumbnail]) > _MOST_PX:
            yield line
            line = []
        line.append(thumbnail)
    if line:
        yield line


def _draw_line(line: Sequence[Thumbnail], captions: Mapping[int, str], width_px: int) -> Image.Image:
    """Draws pictures side by side on one base line, each above its caption. `captions`: by the thumbnail's identity."""
    size, caption_px = 14, 22
    tallest = max(thumbnail.picture.shape[0] for thumbnail in line)
    strip, draw = _blank_strip(width_px, tallest + caption_px)
    left = 0
    for thumbnail in line:
        strip.paste(Image.fromarray(thumbnail.picture), (left, tallest - thumbnail.picture.shape[0]))
        text_left, text_px = left, _captioned_width(thumbnail)
        if not thumbnail.labeled:
            draw.text((text_left, tallest + caption_px // 2), NO_MASK, fill=_ACCENT, font=_font(size), anchor="lm")
            mark_px = round(_font(size).getlength(f"{NO_MASK}  "))
            text_left, text_px = text_left + mark_px, text_px - mark_px
        name, font = fit_text(captions[id(thumbnail)], text_px, size)
        draw.text((text_left, tallest + caption_px // 2), name, fill=_FAINT, font=font, anchor="lm")
        left += _captioned_width(thumbnail) + _GAP_PX
    return strip
