"""What masks and photos hold: values or colours, transparency, sizes, how they are turned, bits and bands."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from cps_ray.datasets.prepare.findings import BadItemError
from cps_ray.datasets.prepare.items import Source
from cps_ray.datasets.prepare.masks import MaskReader, color_text
from cps_ray.datasets.prepare.recipe import RecipeColor
from cps_ray.datasets.raster import Raster, UnreadableError, open_raster, turned, upright_size
from cps_ray.engine.batch import IGNORE
from cps_ray.errors import DataError
from cps_ray.text import first_few

_SAMPLE, _DEEP_SAMPLE = 200, 24
"""Masks and photos that are looked at, and photos that are decoded."""
_MAX_VALUES = 64
"""More values than this are grey levels, smoothed edges or instances."""
_THIN = 0.1
"""An area of which a smaller part is left when its border is taken away is a line between others."""
_ENDS = 0.97
"""Part of the pixels of a grey mask that are nearly black or nearly white."""
T = TypeVar("T")
R = TypeVar("R")


def spread(items: Sequence[T], count: int = _SAMPLE) -> list[T]:
    """Returns at most `count` items, evenly spaced."""
    return [items[at] for at in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))]


def each(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Returns what `work` makes of each item, in threads."""
    with ThreadPoolExecutor() as threads:
        return list(threads.map(work, items))


def is_mask(path: Path) -> bool:
    """Returns whether an image seems to be a mask: lossless, with few values."""
    try:
        raster = open_raster(path.read_bytes(), str(path))
    except (OSError, UnreadableError):
        return False
    return not raster.lossy and (raster.palette is not None or len(_counted(_packed(raster.samples))) <= _MAX_VALUES)


@dataclass
class MaskLook:
    """What a mask holds."""

    kind: str
    """`palette`, `grey` or `colors`."""
    counts: Counter[int]
    """Value, or packed colour, that is opaque -> number of pixels."""
    inner: Counter[int] = field(default_factory=Counter)
    """The same without the pixels on borders."""
    clear: int = 0
    """Number of transparent pixels."""
    lossy: bool = False
    palette: dict[int, int] = field(default_factory=dict)
    """Index -> packed colour."""
    size: tuple[int, int] = (0, 0)
    turned_by_exif: bool = False
    edges: NDArray[np.bool_] | None = None


def _packed(samples: NDArray[Any]) -> NDArray[Any]:
    """Returns (H, W) values: of three different channels, packed colours."""
    if samples.shape[2] != 3 or samples.dtype != np.uint8:
        return np.asarray(samples[..., 0])
    red, green, blue = (samples[..., at].astype(np.int32) for at in range(3))
    return red << 16 | green << 8 | blue


def _counted(values: NDArray[Any]) -> Counter[int]:
    """Counts values: of each run, as most neighbours in a mask are equal."""
    flat = values.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    counts: Counter[int] = Counter()
    found, places = np.unique(flat[starts], return_inverse=True)
    pixels = np.bincount(places, np.diff(np.append(starts, flat.size)))
    counts.update({int(value): int(count) for value, count in zip(found, pixels, strict=True)})
    return counts


def look_at_mask(path: str) -> MaskLook | str:
    """Looks into a mask; returns why it cannot be read where it cannot."""
    try:
        data = Path(path).read_bytes()
        if PurePath(path).suffix.lower() in (".npy", ".mat"):
            values = MaskReader("ids", {}, 1).read(path, data).values
            return MaskLook("grey", _counted(values), _inner(values), size=(values.shape[0], values.shape[1]))
        raster = open_raster(data, path)
    except BadItemError as error:
        return error.finding.line
    except (OSError, UnreadableError) as error:
        return f"{path}: {error}"
    samples = raster.samples
    if samples.dtype.kind == "f" and np.array_equal(samples, np.round(samples)):
        samples = samples.astype(np.int64)
    if samples.dtype.kind not in "iu" or samples.shape[2] not in (1, 3):
        return f"{path}: a mask must hold whole numbers or colours, but this is {raster.words}; save it as PNG."
    grey = samples.shape[2] == 1 or np.ptp(samples.astype(np.int32), axis=2).max() <= (24 if raster.lossy else 0)
    values = np.asarray(samples[..., 0]) if grey else _packed(samples)
    kind = "palette" if raster.palette is not None else "grey" if grey else "colors"
    alpha = None if raster.alpha is None else np.asarray(raster.alpha)
    clear = None if alpha is None else alpha < alpha.max() / 2
    opaque = values if clear is None else values[~clear]
    counts = _counted(opaque) if opaque.size else Counter[int]()
    palette = {}
    if raster.palette is not None:
        packed = _packed(raster.palette[None])[0]
        palette = {index: int(packed[index]) for index in counts}
    height, width = samples.shape[:2]
    return MaskLook(
        kind,
        counts,
        _inner(values),
        0 if clear is None else int(clear.sum()),
        raster.lossy or raster.inverted,
        palette,
        (width, height) if raster.orientation >= 5 else (height, width),
        raster.orientation != 1,
        _borders(values),
    )


def _borders(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Returns bool (H, W) where a value differs from one beside it."""
    border = np.zeros(values.shape, np.bool_)
    across, down = values[:, 1:] != values[:, :-1], values[1:] != values[:-1]
    border[:, 1:] |= across
    border[:, :-1] |= across
    border[1:] |= down
    border[:-1] |= down
    return border


def _inner(values: NDArray[Any]) -> Counter[int]:
    thick = cv2.dilate(_borders(values).astype(np.uint8), np.ones((5, 5), np.uint8)) == 0
    inner = values[thick]
    return _counted(inner) if inner.size else Counter()


@dataclass
class Classes:
    """What the values of masks mean."""

    entries: list[dict[str, Any]]
    """Settings of each class."""
    settings: dict[str, Any] = field(default_factory=dict)
    comments: list[str] = field(default_factory=list)
    assumed: list[tuple[str, str]] = field(default_factory=list)


def _rgb(packed: int) -> RecipeColor:
    return packed >> 16, packed >> 8 & 255, packed & 255


def find_classes(looks: Sequence[MaskLook], named: Sequence[tuple[str, RecipeColor | None]] | None) -> Classes:
    """Finds what the values of masks mean. `named`: classes of an export, with colours. Raises DataError if they mean nothing."""
    counts: Counter[int] = Counter()
    inner: Counter[int] = Counter()
    for look in looks:
        counts += look.counts
        inner += look.inner
    kinds = {look.kind for look in looks}
    palette: dict[int, set[int]] = {}
    for look in looks:
        for index, color in look.palette.items():
            palette.setdefault(index, set()).add(color)
    if named is not None and any(color for _, color in named):
        return _of_labelmap(looks, named)
    clear = sum(look.clear for look in looks)
    if kinds == {"palette"} and all(len(colors) == 1 for colors in palette.values()):
        classes = _of_ids(counts, inner, clear)
        for entry in classes.entries:
            entry["color"] = _rgb(next(iter(palette.get(entry.pop("_value"), {0}))))
        grey = all(color >> 16 == (color >> 8 & 255) == (color & 255) for (color,) in palette.values())
        if grey:
            classes.settings["mask_coding"] = "indices"
            classes.comments.append("The palette is grey; the indices count, not the grey levels.")
        return classes
    if "palette" in kinds:
        raise DataError(
            "masks are palette images whose indices have other colours from file to file, or of different kinds; export all "
            "of them alike, as ids or as RGB colours."
        )
    if kinds == {"grey"}:
        total = counts.total() or 1
        lossy = any(look.lossy for look in looks)
        ends = sum(count for value, count in counts.items() if value <= 32 or 223 <= value <= 255) / total
        if lossy or len(counts) > _MAX_VALUES:
            if ends < _ENDS or not 0 < sum(count for value, count in counts.items() if value > 127) < total:
                kind = (
                    "JPEG, which does not keep ids,"
                    if lossy
                    else f"{len(counts)} values, such as {sorted(counts)[:5]},"
                )
                raise DataError(
                    f"masks must hold ids, or black and white, but are {kind} and neither; are they instances, or smoothed? "
                    "Export them as class ids, in PNG."
                )
            classes = Classes([{"name": "background", "color": (0, 0, 0)}, {"name": "class_1"}], {"threshold": 127})
            classes.comments.append(
                "Masks are black and white with grey levels at edges or from JPEG: above 127 is class_1."
            )
            classes.assumed.append(
                ("masks are black and white: above 127 is a class", f"high: {100 * ends:.1f} % are near either")
            )
            return classes
        classes = _of_ids(counts, inner, clear)
        for entry in classes.entries:
            entry.pop("_value")
        return classes
    if kinds == {"grey", "colors"}:  # colour masks of which some show nothing but grey colours
        for look in looks:
            if look.kind == "grey":
                look.counts = Counter({value * 0x010101: count for value, count in look.counts.items()})
        counts = sum((look.counts for look in looks), Counter())
    if any(look.lossy for look in looks) or len(counts) > _MAX_VALUES:
        raise DataError(
            f"masks hold {len(counts)} colours, so their edges are smoothed, or they are photos; export them as PNG, without "
            "smoothing."
        )
    classes = Classes([], {"mask_coding": "colors"})
    if clear and 0 not in counts:
        counts[0] = 0
    for number, color in enumerate(sorted(counts)):
        name = "background" if color == 0 else f"class_{number}"
        classes.entries.append({"name": name, "color": _rgb(color), "_share": _share(counts, color)})
    _transparent(classes, clear, counts)
    classes.assumed.append((f"{len(classes.entries)} colours are classes", "high: there are few of them"))
    return _enough(classes)


def _share(counts: Counter[int], value: int) -> str:
    return f"{100 * counts[value] / max(1, counts.total()):.2f} % of the pixels looked at"


def _enough(classes: Classes) -> Classes:
    if len(classes.entries) < 2:
        raise DataError("masks must show two values or colours at least, but all pixels looked at are the same.")
    if len(classes.entries) > 255:
        raise DataError(f"masks hold {len(classes.entries)} values, more than 255 classes; are they instances?")
    return classes


def _transparent(classes: Classes, clear: int, counts: Counter[int]) -> None:
    if clear:
        classes.settings["transparent"] = classes.entries[0]["name"]
        classes.assumed.append(
            (
                f"transparent pixels of masks are {classes.entries[0]['name']}",
                "low: `transparent: ignore` is the other way",
            )
        )


def _of_ids(counts: Counter[int], inner: Counter[int], clear: int) -> Classes:
    """Returns classes of mask values; the caller takes out `_value`."""
    classes = Classes([])
    counts = +counts
    if clear and 0 not in counts and min(counts, default=0) > 0:
        counts = counts.copy()
        counts[0] = 0
    values = sorted(counts)
    ignored = [IGNORE] if IGNORE in values and len(values) > 2 else []
    if ignored:
        classes.settings["ignore_ids"] = ignored
        thin = inner[IGNORE] < _THIN * counts[IGNORE]
        why = "high: thin borders" if thin else "low: the usual number for it, but it covers areas"
        classes.assumed.append((f"mask value 255 counts nowhere ({_share(counts, IGNORE)})", why))
    elif IGNORE in values:
        classes.assumed.append(("255 is a class, not what is ignored", "high: it is one of two values"))
    values = [value for value in values if value not in ignored]
    if any(value > 65535 or value < 0 for value in values) or len(values) > _MAX_VALUES:
        raise DataError(
            f"masks hold {len(values)} values, such as {first_few([str(v) for v in values])}; are they instances?"
        )
    for value in values:
        if value and inner[value] < _THIN * counts[value] and counts[value] > 1000:
            classes.comments.append(
                f"{value} is thin lines: if it means nothing, take its class away and say `ignore_ids: [{value}]`."
            )
    for number, value in enumerate(values):
        is_background = value == 0 and (len(values) == 2 or counts[0] > counts.total() / 2)
        name = "background" if is_background else f"class_{value if values[-1] < _MAX_VALUES else number}"
        entry = {"name": name, "_value": value, "_share": _share(counts, value)}
        if value != number:
            entry["ids"] = [value]
        classes.entries.append(entry)
    classes.comments.append("A void value, if there is one, belongs into `ignore_ids`, not among the classes.")
    classes.assumed.append(
        (
            f"mask values {', '.join(map(str, values[:12]))}{' ...' if len(values) > 12 else ''} are classes",
            "high: there are few of them",
        )
    )
    _transparent(classes, clear, counts)
    return _enough(classes)


def _of_labelmap(looks: Sequence[MaskLook], named: Sequence[tuple[str, RecipeColor | None]]) -> Classes:
    """Returns the classes of a label map, whose colours masks hold."""
    known = {color for _, color in named if color is not None}
    seen: set[int] = set()
    for look in looks:
        colors = look.palette.values() if look.kind == "palette" else look.counts
        seen |= {color * (0x010101 if look.kind == "grey" else 1) for color in colors}
    strange = [color_text(color) for color in sorted(seen) if _rgb(color) not in known]
    if strange:
        raise DataError(f"masks must hold the colours of labelmap.txt, but also hold {first_few(strange)}.")
    classes = Classes([{"name": name, "color": color} for name, color in named], {"mask_coding": "colors"})
    classes.assumed.append(("labelmap.txt says what colours mean", "high: masks hold no others"))
    return _enough(classes)


# ----------------------------------------------------------------------------------------------------- photos


@dataclass
class PhotoLook:
    """What photos hold."""

    size: tuple[int, int]
    """Median (height, width)."""
    largest: tuple[int, int]
    settings: dict[str, Any] = field(default_factory=dict)
    assumed: list[tuple[str, str]] = field(default_factory=list)
    turned: int = 0
    """Photos looked at that have an EXIF orientation."""


def _size(path: str) -> tuple[tuple[int, int], int] | str:
    try:
        return upright_size(Path(path).read_bytes(), path)
    except (OSError, UnreadableError) as error:
        return f"{path}: {error}"


def _raster(path: str) -> Raster | None:
    try:
        return open_raster(Path(path).read_bytes(), path)
    except (OSError, UnreadableError):
        return None


def look_at_photos(paths: Sequence[str]) -> PhotoLook:
    """Looks at photos. Raises DataError if none can be read."""
    found = each(_size, spread(paths))
    sizes = [entry for entry in found if not isinstance(entry, str)]
    if not sizes:
        raise DataError(str(found[0]))
    shapes = np.array([size for size, _ in sizes])
    height, width = np.median(shapes, axis=0).astype(int).tolist()
    largest = shapes[np.prod(shapes, axis=1).argmax()].tolist()
    look = PhotoLook((height, width), (largest[0], largest[1]), turned=sum(turn != 1 for _, turn in sizes))
    if len(sizes) < len(found):
        look.assumed.append((f"{len(found) - len(sizes)} photos cannot be read", "prepare names them"))
    # One at a time: photos may have many megapixels and bands.
    kinds: Counter[tuple[int, str]] = Counter()
    for path in spread(paths, _DEEP_SAMPLE):
        raster = _raster(path)
        if raster is not None:
            bands = 3 if raster.palette is not None else raster.samples.shape[2]
            extra = raster.alpha is not None and raster.format == "TIFF" and bands == 3
            kinds[bands + extra, str(raster.samples.dtype)] += 1
    bands = max((count for count, _ in kinds), default=3)
    if bands not in (1, 3) and min(count for count, _ in kinds) >= min(bands, 3):
        look.settings["bands"] = [1, 2, 3] if bands > 2 else [1]
        sure = "high: the usual order" if bands == 4 else "low: of Sentinel-2's it would be [4, 3, 2]"
        look.assumed.append((f"of {bands} bands, {look.settings['bands']} are red, green and blue", sure))
    if any(dtype != "uint8" for _, dtype in kinds):
        look.settings["stretch"] = [0.02, 0.98]
        look.assumed.append(("photos have more than 8 bits; black and white are their 2 % and 98 % quantiles", "high"))
    return look


# ------------------------------------------------------------------------------------------------ how masks lie


def find_alignment(
    sources: Sequence[Source], looks: Sequence[MaskLook]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Returns `mask_size` and `masks_turned`, where masks need them, and what was assumed."""
    settings: dict[str, Any] = {}
    assumed: list[tuple[str, str]] = []
    scaled, strange = 0, []
    wins: list[float] = []
    for source, look in zip(sources, looks, strict=True):
        found = _size(source.image)
        if isinstance(found, str):
            continue
        size, orientation = found
        sizes = {size} if orientation == 1 or look.turned_by_exif else {size, size[::-1] if orientation >= 5 else size}
        if look.size not in sizes:
            aspect = look.size[0] * size[1] / (look.size[1] * size[0])
            if abs(aspect - 1) < 0.02:
                scaled += 1
            else:
                strange.append(source.id)
        if orientation != 1 and not look.turned_by_exif and (orientation < 5 or size[0] == size[1]) and len(wins) < 24:
            wins.append(_turned_is_better(source, look, orientation))
    if scaled:
        settings["mask_size"] = "resize"
        assumed.append(
            (
                f"{scaled} of {len(looks)} masks have another size than their photo and are resized",
                "high: of the same shape",
            )
        )
    if strange:
        assumed.append(
            (
                f"{len(strange)} of {len(looks)} masks have another shape than their photo: {first_few(strange)}",
                "high: prepare refuses them",
            )
        )
    if wins:
        upright = sum(win > 0 for win in wins)
        settings["masks_turned"] = upright * 2 >= len(wins)
        clear = max(upright, len(wins) - upright) >= 0.8 * len(wins) and abs(float(np.mean(wins))) > 0.1
        how = "on photos as viewers show them" if settings["masks_turned"] else "on the pixels as stored"
        why = f"edges of {max(upright, len(wins) - upright)} of {len(wins)} turned photos agree"
        assumed.append((f"masks were drawn {how}", f"{'high' if clear else 'low'}: {why}; look at overlays.png"))
    return settings, assumed


def _turned_is_better(source: Source, look: MaskLook, orientation: int) -> float:
    """Returns by how much the edges of a photo agree better with a mask on the turned photo than on the stored one."""
    raster = _raster(source.image)
    if raster is None or look.edges is None or not look.edges.any():
        return 0.0
    grey = raster.samples.mean(axis=2).astype(np.float32)
    height, width = look.edges.shape

    def agreement(pixels: NDArray[np.float32]) -> float:
        blurred = cv2.GaussianBlur(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), (3, 3), 0)
        gradient = np.hypot(cv2.Sobel(blurred, cv2.CV_32F, 1, 0), cv2.Sobel(blurred, cv2.CV_32F, 0, 1))
        assert look.edges is not None
        return float(gradient[look.edges].mean() / (gradient.mean() + 1e-6))

    return agreement(turned(grey, orientation)) - agreement(grey)
