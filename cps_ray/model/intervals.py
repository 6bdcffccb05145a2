"""Whether one arm predicts better than another: their difference in mIoU, its interval, and the words for it. Needs no torch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from cps_ray.text import printable

# T trainings, I images, U units that are left out one by one (groups of images, or folds), C classes, S scores: each class, then the mean.
Counts = NDArray[np.int64]
Score = Callable[[Counts], NDArray[np.float64]]
_MISS = 0.05
_UNITS_AT_ONCE = 256


def class_ious(counts_3C: NDArray[Any]) -> NDArray[np.float64]:
    """Returns the IoU per class of (..., 3, C) found, true and predicted pixels: (..., C); nan where a class is neither true nor predicted."""
    hit, true, predicted = np.moveaxis(counts_3C.astype(np.float64), -2, 0)
    union = true + predicted - hit
    return np.asarray(np.divide(hit, union, out=np.full_like(hit, np.nan), where=union > 0))


def image_ious(counts_3C: NDArray[Any]) -> NDArray[np.float64]:
    """Returns the mean IoU, as `metrics.mean_iou` does, of (..., 3, C) found, true and predicted pixels; nan where nothing was counted."""
    iou = class_ious(counts_3C)
    number = np.isfinite(iou).sum(-1)
    return np.asarray(np.divide(np.nansum(iou, -1), number, out=np.full(np.shape(number), np.nan), where=number > 0))


class ClassDifference(TypedDict):
    """The same of a class. The intervals hold for all classes at once."""

    gain: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """How much better an arm is than another, in mIoU. Scores are in 0..1."""

    gain: float
    low: float | None
    """End of the 95 % interval; None where one group, or one image, gives none."""
    high: float | None
    better: int
    """Number of images on which the arm is better, by its mIoU there, a mean over trainings; equal does not count."""
    worse: int
    images: int
    groups: int
    trainings: int
    """Number of them in each arm."""
    trainings_covered: bool
    """Whether the interval holds for other trainings, too; else it is about these two alone, on new images."""
    classes: dict[str, ClassDifference]
    """Differences in the IoU of each class that is there."""


def difference(
    ours: Iterable[Counts],
    theirs: Iterable[Counts],
    classes: Sequence[str],
    groups: Sequence[str] | None = None,
    *,
    folds: bool = False,
) -> Difference:
    """Returns how much better `ours` predicts new images of the same kind than `theirs`, with a 95 % interval.

    Each holds one array per training: (I, 3, C) pixels that are found, true and predicted. The n-th trainings of the two are a pair: same
    seed, same draw, same images in the same order. Trainings share the images, unless they are `folds`, which have images of their own.
    `groups`: of each image, of all folds one after the other; images of a group are left out together.

    docs/verdict.md says what is estimated, and how.
    """
    pairs = [np.stack(pair, axis=1) for pair in zip(ours, theirs, strict=True)]  # T of (I, 2, 3, C)
    of_images = [_gain(image_ious(pair)) for pair in pairs]
    gain_I = np.concatenate(of_images) if folds else np.mean(of_images, axis=0)
    _, group_I = np.unique(np.arange(len(gain_I)) if groups is None else np.asarray(groups), return_inverse=True)
    if folds:
        # One estimate, that of all held-out images; what is left out is a fold: its images and its training.
        counts_TU23C = np.stack([pair.sum(0) for pair in pairs])[None]
    else:
        counts_TU23C = np.zeros((len(pairs), group_I.max() + 1, *pairs[0].shape[1:]), np.int64)
        for row, pair in zip(counts_TU23C, pairs, strict=True):
            np.add.at(row, group_I, pair)
    gain_S, spreads = _means_and_spreads(counts_TU23C, _gains, folds=folds)
    known_S = np.isfinite(np.sum([each.variance for each in spreads], axis=0))
    # Bonferroni: each of n class intervals misses its class in 5 % / n of all cases, so that all n hold in 95 %.
    miss_S = np.append(np.full(len(classes), _MISS / max(1, known_S[:-1].sum())), _MISS)
    half_S = _half_widths(spreads, miss_S)
    *of_classes, of_mean = (
        ClassDifference(gain=gain, low=gain - half if known else None, high=gain + half if known else None)
        for gain, half, known in zip(gain_S.tolist(), half_S.tolist(), known_S, strict=True)
    )
    return Difference(
        **of_mean,
        better=int((gain_I > 0).sum()),
        worse=int((gain_I < 0).sum()),
        images=len(gain_I),
        groups=int(group_I.max()) + 1,
        trainings=len(pairs),
        trainings_covered=len(pairs) > 1,
        classes={name: each for name, each in zip(classes, of_classes, strict=True) if np.isfinite(each["gain"])},
    )


def gain_interval(counts: Counts, score: Score) -> tuple[float, float | None, float | None]:
    """Returns the mean over trainings of a score, and its 95 % interval (None with a single image).

    `counts`: (T, I, ...) of trainings that share the images; `score` takes their sums over images, (..., without I).
    """
    mean_S, spreads = _means_and_spreads(counts, lambda summed: score(summed)[..., None], folds=False)
    mean, half = float(mean_S[0]), float(_half_widths(spreads, np.array([_MISS]))[0])
    return (mean, None, None) if np.isnan(half) else (mean, mean - half, mean + half)


def _gain(scores_2: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    """Returns ours minus theirs."""
    ours, theirs = np.moveaxis(scores_2, axis, 0)
    return np.asarray(ours - theirs)


def _gains(counts_23C: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns ours minus theirs in the IoU of each class and, last, in their mean: (..., C + 1) of (..., 2, 3, C)."""
    scores_2S = np.concatenate([class_ious(counts_23C), image_ious(counts_23C)[..., None]], axis=-1)
    return _gain(scores_2S, axis=-2)


class _Spread(NamedTuple):
    """Variance (S,) of the gains that comes from one source; nan where it is not known."""

    variance: NDArray[np.float64]
    freedom: int
    """Degrees of freedom of its estimate."""


def _half_widths(spreads: Sequence[_Spread], miss_S: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns half the width of the interval of each score, which misses in `miss_S` of all cases; nan where a variance is not known."""
    from scipy.special import stdtrit  # takes a third of a second to import

    variance_S = np.sum([each.variance for each in spreads], axis=0)
    # Cochran and Cox (1950): the quantile of each variance's own degrees of freedom, weighted by the variances.
    scaled_S = np.sum([stdtrit(each.freedom, 1 - miss_S / 2) * each.variance for each in spreads], axis=0)
    return np.asarray(np.divide(scaled_S, np.sqrt(variance_S), out=np.zeros_like(scaled_S), where=variance_S != 0))


def _means_and_spreads(counts_TU: Counts, score: Score, *, folds: bool) -> tuple[NDArray[np.float64], list[_Spread]]:
    """Returns the scores, means over trainings, and where they vary: over units and, where there are several, over trainings."""
    trainings, units = counts_TU.shape[:2]
    total = counts_TU.sum(1, keepdims=True)
    gain_TS = score(total[:, 0])
    gain_S = gain_TS.mean(0)
    if units == 1:
        return gain_S, [_Spread(np.full_like(gain_S, np.nan), 1)]
    # Jackknife: each unit is left out once. What that changes, squared, is a unit's part of the variance.
    # In parts: ten thousand images of a hundred classes would be gigabytes.
    firsts = range(0, units, _UNITS_AT_ONCE)
    left_out_TUS = np.concatenate([score(total - counts_TU[:, n : n + _UNITS_AT_ONCE]) for n in firsts], axis=1)
    changed_TUS = left_out_TUS - left_out_TUS.mean(1, keepdims=True)
    part_US = changed_TUS.mean(0) ** 2
    if trainings > 1:
        # What an image changes in one training alone is in the variance over trainings already.
        part_US -= changed_TUS.var(0, ddof=1) / trainings
    over_units = _Spread(np.maximum(0, (units - 1) / units * part_US.sum(0)), units - 1)
    if folds:
        # Trainings share most of their images, so folds vary too little: Nadeau and Bengio (2003), whose 1 / K + 1 / (K - 1) this is.
        return gain_S, [over_units._replace(variance=over_units.variance * (1 + units / (units - 1)))]
    if trainings == 1:
        return gain_S, [over_units]
    return gain_S, [over_units, _Spread(gain_TS.var(0, ddof=1) / trainings, trainings - 1)]


def in_words(found: Difference, advice: str = "") -> str:
    """Returns a line such as `better by 6.4 points (95 % interval 5.1 to 7.6; better on 61 of 80 images)`, and names classes that are hurt:
    those whose whole interval is below 0. `advice`: what to do where the two cannot be told apart."""
    points, alone = 100 * found.gain, "" if found.trainings_covered else " for these two trainings alone"
    better, worse = (
        f"{word} on {count} of {found.images} images"
        for word, count in (("better", found.better), ("worse", found.worse))
    )
    if found.low is None or found.high is None:
        return f"{points:+.1f} points ({better}; one image, or one group, gives no interval)"
    low, high = 100 * found.low, 100 * found.high
    if low > 0:
        line = f"better by {points:.1f} points (95 % interval {low:.1f} to {high:.1f}{alone}; {better})"
    elif high < 0:
        line = f"worse by {-points:.1f} points (95 % interval {-high:.1f} to {-low:.1f}{alone}; {worse})"
    else:
        line = f"not distinguishable: {points:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}{alone}; {better})"
        line += f": {advice}" if advice else ""
    hurt = [
        f"{printable(name)} {100 * each['gain']:.1f} ({100 * each['low']:.1f} to {100 * each['high']:.1f})"
        for name, each in found.classes.items()
        if each["low"] is not None and each["high"] is not None and each["high"] < 0
    ]
    return f"{line}; hurt: {', '.join(hurt)}" if hurt else line
