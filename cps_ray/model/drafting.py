"""Drafts of masks for people to correct: image files, index PNGs, and outlines for the tools that read COCO or LabelMe json."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cps_ray.config.yaml_reader import dump_yaml
from cps_ray.datasets.images import is_jpeg
from cps_ray.datasets.show.picture import PaletteColor
from cps_ray.errors import DataError
from cps_ray.files import write_json, write_text
from cps_ray.model.outlining import Points, regions, without_specks

SMALLEST_PX = 4
"""Regions of fewer pixels become part of what is around them: nobody wants to correct their outlines."""
_LABELME_VERSION = "5.5.0"
"""Version of the file format that is written."""
_RECIPE_SAYS = """Reads these drafts, once corrected: cps-ray prepare folder THIS_FOLDER SHARDS --recipe THIS_FOLDER/recipe.yaml
As it stands, what LabelMe has written. Of COCO, put in place of `masks`: coco: coco.json. Of the index PNGs: masks: "masks/{id}.png", without `uncovered`."""


@dataclass(frozen=True, slots=True)
class Draft:
    """An image and the mask that a model predicts for it."""

    id: str
    image: bytes
    """JPEG or PNG."""
    mask: NDArray[np.uint8]
    """(H, W) train ids."""


def write_drafts(
    folder: Path, drafts: Iterable[Draft], classes: Sequence[str], palette: Sequence[PaletteColor]
) -> None:
    """Writes images/ with labelme's files beside them, masks/ID.png, coco.json, labels.txt and recipe.yaml into a folder; all say the same of every pixel.

    Regions of fewer than SMALLEST_PX pixels are left out. COCO's polygons are without holes and do not overlap: a region with holes has
    several, cut through the holes. LabelMe's lie over each other, the smaller on top, in the order in which it paints them.
    Raises DataError for an id that leads out of the folder.
    """
    suffixes: set[str] = set()
    coco: dict[str, list[Any]] = {"images": [], "annotations": []}
    colors = [channel for color in palette for channel in color]
    for number, draft in enumerate(drafts, start=1):
        path = PurePosixPath(draft.id)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(f"ids must be names of files in a folder, but one is {draft.id!r}.")
        mask = without_specks(draft.mask, SMALLEST_PX)
        height, width = mask.shape
        name = f"{draft.id}.{'jpg' if is_jpeg(draft.image) else 'png'}"
        image_file, mask_file, labelme_file = (
            _made(folder / kind / file)
            for kind, file in (("images", name), ("masks", f"{draft.id}.png"), ("images", f"{draft.id}.json"))
        )
        image_file.write_bytes(draft.image)
        suffixes.add(image_file.suffix)
        picture = Image.fromarray(mask)
        picture.putpalette(colors)
        picture.save(mask_file)
        painted = []
        for region in regions(mask):
            outline, area = region.painted()
            painted.append((-area, _labelme_shape(classes[region.label], outline)))
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": number,
                    "category_id": region.label + 1,
                    "segmentation": [polygon.ravel().tolist() for polygon in region.filled()],
                    "area": int(np.count_nonzero(region.inside)),
                    "bbox": [region.left, region.top, region.inside.shape[1], region.inside.shape[0]],
                    "iscrowd": 0,
                }
            )
        about = {
            "imagePath": PurePosixPath(name).name,
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        shapes = [shape for _, shape in sorted(painted, key=lambda each: each[0])]
        write_json(labelme_file, {"version": _LABELME_VERSION, "flags": {}, "shapes": shapes, **about})
        coco["images"].append({"id": number, "file_name": name, "width": width, "height": height})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(classes)]
    write_json(folder / "coco.json", {**coco, "categories": categories})
    write_text(folder / "labels.txt", "".join(f"{name}\n" for name in classes))
    recipe = {
        "classes": [{"name": name, "color": list(color)} for name, color in zip(classes, palette, strict=True)],
        "uncovered": "ignore",
        "splits": {
            "train": {"images": [f"images/{{id}}{suffix}" for suffix in sorted(suffixes)], "masks": "images/{id}.json"}
        },
    }
    write_text(folder / "recipe.yaml", dump_yaml(recipe, _RECIPE_SAYS))


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _labelme_shape(label: str, outline: Points) -> dict[str, Any]:
    return {
        "label": label,
        "points": outline.round(2).tolist(),
        "group_id": None,
        "description": "",
        "shape_type": "polygon",
        "flags": {},
        "mask": None,
    }
