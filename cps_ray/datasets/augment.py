"""Random views of training images: zoom, crop and flip, and colour and blur if asked for. uint8 in, uint8 out.

The crop comes first: only the window of the image that will be seen is resized, so a view costs what its own size costs,
however wide the image is.
"""

import threading

import albumentations as A  # noqa: N812
import cv2
import numpy as np
from numpy.typing import NDArray

from cps_ray.config.train import AugmentConfig
from cps_ray.engine.batch import IGNORE

_MEAN_COLOR = (124, 116, 104)
"""RGB of ImageNet's mean: what padding becomes after normalisation is zero, as in the CPS reference."""

Pixels = NDArray[np.uint8]


class TrainView:
    """Makes a view of an image as a function of (image, mask, seed). One object serves many threads."""

    def __init__(self, augment: AugmentConfig, crop_px: tuple[int, int]) -> None:
        """`crop_px`: (height, width) of every view; smaller images are padded, masks with IGNORE."""
        self._augment = augment
        self._crop_px = crop_px
        self._local = threading.local()

    def __call__(
        self,
        image: Pixels,
        mask: Pixels | None,
        seed: tuple[int, ...],
        *,
        view: Pixels,
        label: Pixels | None = None,
        strong: Pixels | None = None,
    ) -> None:
        """RGB (H, W, 3) and train ids (H, W) -> into `view` (3, h, w) and `label` (h, w), all uint8.

        `strong`, (3, h, w), if given, gets the view after a second, strong change of colour, grey and blur, as consistency
        methods compare it with the first: ST++ (Yang et al., CVPR 2022), UniMatch (CVPR 2023).
        """
        scale, top, left, flip = np.random.default_rng(seed).random(4).tolist()
        window, place = self._window(image.shape[0], image.shape[1], scale, top, left)
        flipped = flip < self._augment.flip
        seen, spare, blank, spare_label = self._scratch()
        self._crop(image[window], place, flipped, cv2.INTER_LINEAR, blank, spare, seen)
        if mask is not None and label is not None:
            # Centres of pixels map as they do for the image; plain INTER_NEAREST is half a pixel off.
            self._crop(mask[window], place, flipped, cv2.INTER_NEAREST_EXACT, IGNORE, spare_label, label)
        if self._augment.color > 0.0 or self._augment.blur > 0.0:
            seen = self._changed("weak", seen, seed)
        cv2.split(seen, list(view))
        if strong is not None:
            cv2.split(self._changed("strong", seen, seed), list(strong))

    def _scratch(self) -> tuple[Pixels, Pixels, Pixels, Pixels]:
        """Memory of this thread: (h, w, 3) twice, all padding, (h, w). Fresh memory costs as much as resizing into it."""
        if not hasattr(self._local, "scratch"):
            height, width = self._crop_px
            blank = np.tile(np.array(_MEAN_COLOR, np.uint8), (height, width, 1))
            self._local.scratch = blank.copy(), blank.copy(), blank, np.empty((height, width), np.uint8)
        scratch: tuple[Pixels, Pixels, Pixels, Pixels] = self._local.scratch
        return scratch

    def _window(
        self, height: int, width: int, scale: float, top: float, left: float
    ) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """What is seen of the image, and the part of the view that it fills. Draws are in [0, 1)."""
        low, high = self._augment.scale
        zooms = self._augment.scales
        zoom = low + (high - low) * scale if zooms is None else zooms[int(scale * len(zooms))]
        (seen_y, rows), (seen_x, columns) = (
            _span(length, wanted, zoom, draw)
            for length, wanted, draw in zip((height, width), self._crop_px, (top, left), strict=True)
        )
        return (seen_y, seen_x), (rows, columns)

    def _crop(
        self,
        window: Pixels,
        place: tuple[slice, slice],
        flip: bool,
        interpolation: int,
        fill: int | Pixels,
        spare: Pixels,
        made: Pixels,
    ) -> None:
        """The window, resized to `place` in `made` (h, w, ...), with `fill` around it; by way of `spare` if flipped."""
        target = spare if flip else made
        rows, columns = place
        size = (columns.stop - columns.start, rows.stop - rows.start)
        if size != self._crop_px[::-1]:
            target[:] = fill
        cv2.resize(window, size, dst=target[place], interpolation=interpolation)
        if flip:
            cv2.flip(spare, 1, dst=made)

    def _changed(self, kind: str, pixels: Pixels, seed: tuple[int, ...]) -> Pixels:
        """albumentations' random state lives in the object, so each thread has its own."""
        if not hasattr(self._local, kind):
            setattr(self._local, kind, A.Compose(_strong() if kind == "strong" else _weak(self._augment)))
        compose: A.Compose = getattr(self._local, kind)
        compose.set_random_seed(int(np.random.SeedSequence((*seed, 1)).generate_state(1)[0]))
        return np.asarray(compose(image=np.ascontiguousarray(pixels))["image"], np.uint8)


def _span(length: int, wanted: int, zoom: float, place: float) -> tuple[slice, slice]:
    """Along one side: the part of the image that is seen, at a uniform place, and the part of the view that it fills."""
    seen = max(1, round(wanted / zoom))
    if seen > length:  # the zoomed image is smaller than the view: it is seen whole, in the middle
        filled = min(wanted, max(1, round(length * zoom)))
        start = (wanted - filled) // 2
        return slice(0, length), slice(start, start + filled)
    first = int(place * (length - seen + 1))
    return slice(first, first + seen), slice(0, wanted)


def _jitter(light: float, hue: float) -> A.BasicTransform:
    around_one = (1.0 - light, 1.0 + light)
    return A.ColorJitter(around_one, around_one, around_one, (-hue, hue), p=0.8)


def _weak(augment: AugmentConfig) -> list[A.BasicTransform]:
    transforms = []
    if augment.color > 0.0:
        transforms.append(_jitter(0.4 * augment.color, 0.1 * augment.color))
    if augment.blur > 0.0:
        transforms.append(A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=augment.blur))
    return transforms


def _strong() -> list[A.BasicTransform]:
    return [_jitter(0.5, 0.25), A.ToGray(p=0.2), A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5)]
