"""Pictures of what a model predicts: images, their masks and predictions side by side, and which classes it takes for which."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cps_ray.datasets.show.picture import PaletteColor, class_label, fit_text, image_label, paint_mask
from cps_ray.engine.batch import IGNORE

Example = tuple[str, NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]
"""(id, image (H, W, 3), true mask (H, W), predicted mask (H, W)), uint8 each."""
PAPER, INK, FAINT = (255, 255, 255), (31, 35, 40), (110, 118, 129)
_RIGHT, _WRONG = np.array([38, 109, 176]), np.array([200, 82, 20])
_GAP_PX = 3
_MOST_NUMBERS = 40
"""Largest number of classes whose matrix has numbers in its cells."""


def write_examples(
    path: Path,
    columns: Mapping[str, Sequence[Example]],
    palette: Sequence[PaletteColor],
    notes: Sequence[str] = (),
    height_px: int = 192,
) -> None:
    """Writes a sheet with a row per example image: the image, the truth and each column's prediction, below them its id and its note."""
    first = next(iter(columns.values()))
    rows = []
    for number, (image_id, image, truth, _) in enumerate(first):
        predictions = [each[number][3] for each in columns.values()]
        # Pixels that count nowhere are hatched in the truth, and in the predictions so that eyes compare like with like.
        masks = [np.where(truth == IGNORE, IGNORE, mask).astype(np.uint8) for mask in (truth, *predictions)]
        tiles = [_tile(picture, height_px) for picture in (image, *(paint_mask(mask, palette) for mask in masks))]
        row = Image.fromarray(np.hstack(tiles))
        note = f"{notes[number]}   " if notes else ""
        rows.append((row, f"{note}{image_label(image_id, number + 1)}"))
    width = max(row.width for row, _ in rows)
    strips = [_texts(["image", "truth", *columns], rows[0][0].width, 30, 16, INK)]
    for row, caption in rows:
        strips += [row, _texts([caption], width, 22, 13, FAINT)]
    sheet = Image.new("RGB", (width, sum(strip.height for strip in strips)), PAPER)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    sheet.save(path)


def _tile(picture: NDArray[np.uint8], height_px: int) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    size = (max(1, round(width * height_px / height)), height_px)
    # Nearest: masks are painted already, and colours between two classes would be those of a third.
    scaled = cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST)
    border = (_GAP_PX,) * 4
    return np.asarray(cv2.copyMakeBorder(scaled, *border, cv2.BORDER_CONSTANT, value=PAPER), dtype=np.uint8)


def _texts(texts: Sequence[str], width_px: int, height_px: int, size: int, color: PaletteColor) -> Image.Image:
    """Draws texts side by side in columns of equal width."""
    strip = Image.new("RGB", (width_px, height_px), PAPER)
    draw, column_px = ImageDraw.Draw(strip), width_px // len(texts)
    for number, text in enumerate(texts):
        short, font = fit_text(text, column_px - 2 * _GAP_PX, size)
        draw.text((number * column_px + _GAP_PX, height_px // 2), short, fill=color, font=font, anchor="lm")
    return strip


def confusion_picture(matrix_CC: NDArray[np.int64], classes: Sequence[str]) -> Image.Image:
    """Draws a confusion matrix: a row per true class, a column per predicted class, the percentage of the true class's pixels in each cell."""
    count = len(classes)
    cell_px = 46 if count <= 20 else 34 if count <= _MOST_NUMBERS else 14
    size = 14 if count <= 20 else 11
    names = [class_label(name, label) for label, name in enumerate(classes)]
    fitted = [fit_text(name, 190, size) for name in names]
    left = 24 + round(max(font.getlength(name) for name, font in fitted))
    top, margin = left + 26, 14
    picture = Image.new("RGB", (left + count * cell_px + margin, top + count * cell_px + margin), PAPER)
    draw = ImageDraw.Draw(picture)
    heading, font = fit_text("% of the true class (rows) predicted as (columns)", picture.width - 2 * margin, 15)
    draw.text((margin, 16), heading, fill=INK, font=font, anchor="lm")
    true_C = matrix_CC.sum(1)
    for row in range(count):
        name, font = fitted[row]
        middle = top + row * cell_px + cell_px // 2
        draw.text((left - 8, middle), name, fill=INK, font=font, anchor="rm")
        upright = Image.new("RGB", (left - 16, cell_px), PAPER)
        ImageDraw.Draw(upright).text((0, cell_px // 2), name, fill=INK, font=font, anchor="lm")
        picture.paste(upright.rotate(90, expand=True), (left + row * cell_px, top - 8 - upright.width))
        for column in range(count):
            fraction = matrix_CC[row, column] / true_C[row] if true_C[row] else 0.0
            tint = _RIGHT if row == column else _WRONG
            # The root lets small mistakes be seen.
            color = tuple(int(value) for value in np.array(PAPER) + (tint - 255) * fraction**0.5)
            x, y = left + column * cell_px, top + row * cell_px
            draw.rectangle((x, y, x + cell_px - 2, y + cell_px - 2), fill=color)  # type: ignore[arg-type]
            if count <= _MOST_NUMBERS and true_C[row] and fraction >= 0.0005:
                text = f"{100 * fraction:.0f}" if fraction >= 0.0995 else f"{100 * fraction:.1f}"
                number, font_of_cell = fit_text(text, cell_px, size)
                ink = PAPER if fraction > 0.5 else INK
                draw.text(
                    (x + cell_px // 2 - 1, y + cell_px // 2 - 1), number, fill=ink, font=font_of_cell, anchor="mm"
                )
        if not true_C[row]:
            draw.text((left + 4, middle), "not in these masks", fill=FAINT, font=font, anchor="lm")
    return picture
