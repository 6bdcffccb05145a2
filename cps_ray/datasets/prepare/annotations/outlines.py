"""How a data set reads outlines: what labels mean, what lies on top, and what is under none."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

from cps_ray.datasets.prepare.annotations.coco import Crowd, coco_shapes
from cps_ray.datasets.prepare.annotations.files import read_file
from cps_ray.datasets.prepare.annotations.labelme import labelme_shapes
from cps_ray.datasets.prepare.annotations.shapes import Overlaps, Shape, Size
from cps_ray.datasets.prepare.annotations.yolo import yolo_shapes
from cps_ray.engine.batch import IGNORE


@dataclass(frozen=True)
class Outlines:
    """What a recipe says about masks that are outlines, and about masks of one class each."""

    labels: Mapping[str, int] = field(default_factory=dict)
    """Label in an export -> train id, or IGNORE."""
    uncovered: int = IGNORE
    """Train id, or IGNORE, of pixels that no outline and no mask of a class covers."""
    overlaps: Overlaps = "later"
    crowd: Crowd = "class"
    yolo_names: Mapping[int, str] = field(default_factory=dict)
    """Class number in YOLO's text -> label."""

    def shapes(
        self, path: str, annotation: str, categories: tuple[tuple[int, int], ...], image: str, size: Size
    ) -> list[Shape]:
        """Returns the shapes of an image of (height, width) px in a LabelMe or YOLO file, or in its part of a COCO file.

        Raises BadItemError.
        """
        if annotation:
            return coco_shapes(path, annotation, size, dict(categories), self.crowd)
        data = read_file(path)
        if PurePath(path).suffix.lower() == ".json":
            return labelme_shapes(path, data, size, self.labels, image)
        return yolo_shapes(path, data, size, self.yolo_names, self.labels)
