"""Random views of training images: zoom, crop, flip, and colour and blur if asked for. uint8 in, uint8 out."""

import threading

import albumentations as A  # noqa: N812
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cps_ray.config.train import AugmentConfig
from cps_ray.engine.batch import IGNORE

_MEAN_COLOR = (124, 116, 104)
"""RGB of ImageNet's mean: what padding becomes after normalisation is zero, as in the CPS reference."""


class TrainView:
    """Makes a view of an image as a function of (image, mask, seed). One object serves many threads."""

    def __init__(self, augment: AugmentConfig, crop_px: tuple[int, int]) -> None:
        """`crop_px`: (height, width) of every view; smaller images are padded, masks with IGNORE."""
        self._augment = augment
        self._crop_px = crop_px
        self._local = threading.local()

    def __call__(
        self, image: NDArray[np.uint8], mask: NDArray[np.uint8] | None, seed: int
    ) -> tuple[Tensor, Tensor | None]:
        """uint8 (H, W, 3) and (H, W) -> uint8 (3, h, w) and (h, w)."""
        compose = self._compose()
        compose.set_random_seed(seed)
        made = compose(image=image) if mask is None else compose(image=image, mask=mask)
        view = torch.from_numpy(np.ascontiguousarray(made["image"].transpose(2, 0, 1)))
        return view, None if mask is None else torch.from_numpy(np.ascontiguousarray(made["mask"]))

    def _compose(self) -> A.Compose:
        """albumentations' random state lives in the object, so each thread has its own."""
        if not hasattr(self._local, "compose"):
            self._local.compose = A.Compose(self._transforms())
        compose: A.Compose = self._local.compose
        return compose

    def _transforms(self) -> list[A.BasicTransform]:
        augment, (height, width) = self._augment, self._crop_px
        low, high = augment.scale
        transforms = [
            A.RandomScale(
                (low - 1.0, high - 1.0), interpolation=cv2.INTER_LINEAR, mask_interpolation=cv2.INTER_NEAREST, p=1.0
            ),
            A.PadIfNeeded(height, width, border_mode=cv2.BORDER_CONSTANT, fill=_MEAN_COLOR, fill_mask=IGNORE),
            A.RandomCrop(height, width),
            A.HorizontalFlip(p=augment.flip),
        ]
        if low == high == 1.0:
            del transforms[0]
        if augment.color > 0.0:
            jitter = 0.4 * augment.color
            around_one = (1.0 - jitter, 1.0 + jitter)
            hue = 0.1 * augment.color
            transforms.append(A.ColorJitter(around_one, around_one, around_one, (-hue, hue), p=0.8))
        if augment.blur > 0.0:
            transforms.append(A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=augment.blur))
        return transforms
