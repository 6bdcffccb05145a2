"""Random views of training images: zoom, crop and flip, and colour and blur if asked for. uint8 in, uint8 out.

The crop comes first: only the window of the image that will be seen is resized, so a view costs what its own size costs,
however wide the image is.
"""

import threading
from collections.abc import Sequence

import albumentations as A  # noqa: N812
import cv2
import numpy as np
from numpy.typing import NDArray

from cps_ray.config.train import AugmentConfig
from cps_ray.engine.batch import IGNORE

IMAGENET_MEAN = (124, 116, 104)
"""RGB mean of ImageNet in 0..255."""

Pixels = NDArray[np.uint8]


class TrainView:
    """Makes a view of an image as a function of (image, mask, seed). One object serves many threads."""

    def __init__(
        self, augment: AugmentConfig, crop_px: tuple[int, int], fill: tuple[int, int, int] = IMAGENET_MEAN
    ) -> None:
        """`crop_px`: (height, width) of every view; smaller images are padded with the colour `fill` (RGB), masks with IGNORE.

        With the networks' mean colour, padding is zero after normalisation, as in the CPS reference.
        """
        self._fill = fill
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
        strong: Sequence[Pixels] = (),
    ) -> tuple[int, int, int, int]:
        """Writes RGB (H, W, 3) and train ids (H, W) as a view into `view` (3, h, w) and `label` (h, w), all uint8.

        Each of `strong`, (3, h, w), gets the view after a strong change of colour, grey and blur of its own, because consistency
        methods compare it with the first: ST++ (Yang et al., CVPR 2022), UniMatch (CVPR 2023). Returns the box of the view that
        shows the image, as in `Batch`; the rest is padding.
        """
        # All four are drawn, and in this order, whatever the settings: a view stays the same function of its seed.
        scale, top, left, flip = np.random.default_rng(seed).random(4).tolist()
        window, region = self._window(image.shape[0], image.shape[1], scale, top, left)
        flipped = flip < self._augment.flip
        pixels, unflipped, padding, unflipped_label = self._scratch()
        self._crop(image[window], region, flipped, cv2.INTER_LINEAR, padding, unflipped, pixels)
        if mask is not None and label is not None:
            # Centres of pixels map as they do for the image; plain INTER_NEAREST is half a pixel off.
            self._crop(mask[window], region, flipped, cv2.INTER_NEAREST_EXACT, IGNORE, unflipped_label, label)
        has_weak_change = self._augment.color > 0.0 or self._augment.blur > 0.0
        if has_weak_change:
            pixels = self._change_colors("weak", pixels, (*seed, 1))
        # Writes each channel straight into its plane of the batch: (h, w, 3) becomes (3, h, w) without another copy.
        cv2.split(pixels, list(view))
        # From the weak change's draws a strong one would have the same brightness once more: the changes of a view are numbered.
        for number, target in enumerate(strong, start=int(has_weak_change)):
            # The 1 keeps these random numbers apart from those of zoom, crop and flip, which come from the bare seed.
            colors_seed = (*seed, 1, number) if number else (*seed, 1)
            cv2.split(self._change_colors("strong", pixels, colors_seed), list(target))
        return self._box(region, flipped)

    def _box(self, region: tuple[slice, slice], flipped: bool) -> tuple[int, int, int, int]:
        rows, columns = region
        width = self._crop_px[1]
        left, right = (width - columns.stop, width - columns.start) if flipped else (columns.start, columns.stop)
        return rows.start, rows.stop, left, right

    def _scratch(self) -> tuple[Pixels, Pixels, Pixels, Pixels]:
        """Returns this thread's memory: the view and the view before a flip, (h, w, 3); padding, (h, w, 3), never written to;
        the mask before a flip, (h, w). Fresh memory costs as much as resizing into it.
        """
        if not hasattr(self._local, "scratch"):
            height, width = self._crop_px
            padding = np.tile(np.array(self._fill, np.uint8), (height, width, 1))
            self._local.scratch = padding.copy(), padding.copy(), padding, np.empty((height, width), np.uint8)
        scratch: tuple[Pixels, Pixels, Pixels, Pixels] = self._local.scratch
        return scratch

    def _window(
        self, height: int, width: int, scale: float, top: float, left: float
    ) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Returns the window of the image that is seen, and the region of the view that it fills. Draws are in [0, 1)."""
        low, high = self._augment.scale
        zooms = self._augment.scales
        zoom = low + (high - low) * scale if zooms is None else zooms[int(scale * len(zooms))]
        (window_y, region_y), (window_x, region_x) = (
            _span(image_px, view_px, zoom, draw)
            for image_px, view_px, draw in zip((height, width), self._crop_px, (top, left), strict=True)
        )
        return (window_y, window_x), (region_y, region_x)

    def _crop(
        self,
        window: Pixels,
        region: tuple[slice, slice],
        flip: bool,
        interpolation: int,
        fill: int | Pixels,
        unflipped: Pixels,
        out: Pixels,
    ) -> None:
        """Resizes the window to `region` of `out` (h, w, ...), with `fill` around it; by way of `unflipped` if flipped."""
        target = unflipped if flip else out
        rows, columns = region
        size = (columns.stop - columns.start, rows.stop - rows.start)
        # The target holds an earlier view, or nothing yet: what the window does not cover has to be filled each time.
        if size != self._crop_px[::-1]:
            target[:] = fill
        # Written in place only because size and dtype of `dst` fit: else OpenCV would return new memory.
        cv2.resize(window, size, dst=target[region], interpolation=interpolation)
        if flip:
            cv2.flip(unflipped, 1, dst=out)

    def _change_colors(self, strength: str, pixels: Pixels, seed: tuple[int, ...]) -> Pixels:
        """Changes colours and sharpness. albumentations' random state lives in the object, so each thread has its own."""
        if not hasattr(self._local, strength):
            transforms = _strong_transforms() if strength == "strong" else _weak_transforms(self._augment)
            setattr(self._local, strength, A.Compose(transforms))
        compose: A.Compose = getattr(self._local, strength)
        compose.set_random_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        return np.asarray(compose(image=np.ascontiguousarray(pixels))["image"], np.uint8)


def _span(image_px: int, view_px: int, zoom: float, draw: float) -> tuple[slice, slice]:
    """Returns, along one side, the window of the image at a uniform position, and the region of the view that it fills."""
    window_px = max(1, round(view_px / zoom))
    if window_px > image_px:  # the zoomed image is smaller than the view: all of it is seen, in the middle
        region_px = min(view_px, max(1, round(image_px * zoom)))
        start = (view_px - region_px) // 2
        return slice(0, image_px), slice(start, start + region_px)
    first = int(draw * (image_px - window_px + 1))
    return slice(first, first + window_px), slice(0, view_px)


def _color_jitter(light: float, hue: float) -> A.BasicTransform:
    around_one = (1.0 - light, 1.0 + light)
    return A.ColorJitter(around_one, around_one, around_one, (-hue, hue), p=0.8)


def _weak_transforms(augment: AugmentConfig) -> list[A.BasicTransform]:
    transforms = []
    if augment.color > 0.0:
        transforms.append(_color_jitter(0.4 * augment.color, 0.1 * augment.color))
    if augment.blur > 0.0:
        transforms.append(A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=augment.blur))
    return transforms


def _strong_transforms() -> list[A.BasicTransform]:
    return [_color_jitter(0.5, 0.25), A.ToGray(p=0.2), A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5)]
