"""Pictures of what a model predicts: images, their masks and predictions side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from cps_ray.datasets.show.picture import PaletteColor, paint_mask
from cps_ray.engine.batch import IGNORE

Example = tuple[str, NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]
"""(id, image (H, W, 3), true mask (H, W), predicted mask (H, W)), uint8 each."""


def write_examples(
    path: Path, columns: Mapping[str, Sequence[Example]], palette: Sequence[PaletteColor], height_px: int = 192
) -> None:
    """Writes a sheet with a row per example image: the image, the truth and each model's prediction."""
    first = next(iter(columns.values()))
    titles = ["image", "truth", *columns]
    rows = []
    for number, (_, image, truth, _) in enumerate(first):
        predictions = [each[number][3] for each in columns.values()]
        # Pixels that count nowhere are hatched in the truth, and in the predictions so that eyes compare like with like.
        masks = [np.where(truth == IGNORE, IGNORE, mask).astype(np.uint8) for mask in (truth, *predictions)]
        tiles = [_tile(picture, height_px) for picture in (image, *(paint_mask(mask, palette) for mask in masks))]
        rows.append(np.hstack(tiles))
    width = max(row.shape[1] for row in rows)
    white = (255, 255, 255)
    rows = [cv2.copyMakeBorder(r, 0, 0, 0, width - r.shape[1], cv2.BORDER_CONSTANT, value=white) for r in rows]
    sheet = np.vstack([_heading(titles, rows[0].shape[1]), *rows])
    cv2.imwrite(str(path), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))  # OpenCV writes BGR


def _tile(picture: NDArray[np.uint8], height_px: int) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    size = (round(width * height_px / height), height_px)
    # Nearest: masks are painted already, and colours between two classes would be those of a third.
    scaled = cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST)
    return np.asarray(
        cv2.copyMakeBorder(scaled, 3, 3, 3, 3, cv2.BORDER_CONSTANT, value=(255, 255, 255)), dtype=np.uint8
    )


def _heading(titles: list[str], width: int) -> NDArray[np.uint8]:
    band = np.full((34, width, 3), 255, dtype=np.uint8)
    column = width // len(titles)
    for number, title in enumerate(titles):
        cv2.putText(
            band, title, (number * column + 8, 23), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (30, 30, 30), 1, cv2.LINE_AA
        )
    return band
