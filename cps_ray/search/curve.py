"""What more labels, and more unlabelled images, would bring: the learning curve of a sweep's arms, and how it goes on.

Per training, mIoU = a + b log(images) by least squares; twice as many images are then worth b log 2. Curves of this form fit the range that
they are measured over, and are trusted for as many images again, not for more.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cps_ray.config.sweep import SweepConfig
from cps_ray.model.intervals import gain_interval, image_ious
from cps_ray.search.final_phase import EvaluatedRun

LABELS, IMAGES = "labels", "images"


def learning_curve(evaluated: Sequence[EvaluatedRun], config: SweepConfig) -> list[dict[str, Any]]:
    """Returns, for each arm and for LABELS and (where it uses them) IMAGES: `points`, each with its `count` of images, and the mIoU of its trainings; `more`: so
    many images more, and what they would bring: `gain`, `low`, `high` (0..1; None without an interval)."""
    found = []
    for arm in dict.fromkeys(one.run.arm for one in evaluated):
        for what in (LABELS, IMAGES):
            runs: dict[float, dict[int, EvaluatedRun]] = {}
            for one in evaluated:
                fraction = getattr(one.run, what)
                if one.run.arm == arm and (one.run.is_whole or fraction < 1):
                    runs.setdefault(fraction, {})[one.run.repeat] = one
            counts = {_count(of_repeats[min(of_repeats)], what) for of_repeats in runs.values()}
            if len(runs) == len(counts) > 1:
                found.append({"arm": arm, "what": what, **_curve(runs, what)})
    return found


def _curve(runs: Mapping[float, Mapping[int, EvaluatedRun]], what: str) -> dict[str, Any]:
    fractions = sorted(runs)
    repeats = sorted(runs[1.0])
    counts = {fraction: _count(runs[fraction][repeats[0]], what) for fraction in fractions}
    # (trainings, images, fractions, 3, C): all saw the same test images in the same order.
    pixels = np.stack([np.stack([runs[f][r].scores.counts for f in fractions], axis=1) for r in repeats])
    slopes = _slope(np.log([counts[fraction] for fraction in fractions]))
    more = counts[1.0]
    gain, low, high = gain_interval(pixels, lambda summed: image_ious(summed) @ slopes * math.log(2.0))
    points = [
        {"count": counts[f], "values": [float(image_ious(runs[f][r].scores.counts.sum(0))) for r in repeats]}
        for f in fractions
    ]
    return {"points": points, "more": {"count": more, "gain": gain, "low": low, "high": high}}


def _slope(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the weights by which values at `x` sum up to the slope of their least-squares line."""
    centred = x - x.mean()
    return np.asarray(centred / (centred @ centred))


def _count(one: EvaluatedRun, what: str) -> int:
    return one.num_labeled if what == LABELS else one.num_unlabeled
