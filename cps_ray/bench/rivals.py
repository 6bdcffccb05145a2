"""What `bench stream` compares the stream with: the loader a user would write, and bare decoding. Both read the raw files."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count, repeat
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

Pair = tuple[str, str | None]
"""Image file and mask file."""
_EPOCH = 100_000
"""Nominal number of items in an epoch; the images are repeated to fill it."""


class RawFiles(Dataset[Any]):
    """Pairs of an unlabelled image and a random labelled one, read from raw files and augmented by albumentations.

    One epoch goes over the images many times, so that a small data set is no disadvantage.
    """

    def __init__(self, labeled: Sequence[Pair], unlabeled: Sequence[Pair], crop: int) -> None:
        self._labeled, self._unlabeled = labeled, unlabeled
        self._transform = A.Compose(
            [
                A.RandomScale((-0.5, 1.0), interpolation=cv2.INTER_LINEAR, mask_interpolation=cv2.INTER_NEAREST, p=1.0),
                A.PadIfNeeded(crop, crop, border_mode=cv2.BORDER_CONSTANT, fill=(124, 116, 104), fill_mask=255),
                A.RandomCrop(crop, crop),
                A.HorizontalFlip(p=0.5),
            ]
        )

    def __len__(self) -> int:
        return _EPOCH

    def __getitem__(self, number: int) -> Any:
        image, mask = self._labeled[int(torch.randint(len(self._labeled), ()))]
        labeled = self._transform(image=_read(image), mask=cv2.imread(str(mask), cv2.IMREAD_UNCHANGED))
        unlabeled = self._transform(image=_read(self._unlabeled[number % len(self._unlabeled)][0]))
        planes = (torch.from_numpy(view["image"]).permute(2, 0, 1).contiguous() for view in (labeled, unlabeled))
        return *planes, torch.from_numpy(labeled["mask"])


def _read(path: str) -> Any:
    return cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)  # no threads of OpenCV beside the loader's own processes


def data_loader(
    labeled: Sequence[Pair],
    unlabeled: Sequence[Pair],
    crop: int,
    *,
    batch: int,
    workers: int,
    warm_s: float,
    seconds: float,
) -> dict[str, float]:
    """Measures torch's DataLoader with `workers` processes that live over all passes.

    A step has `batch` labelled and as many unlabelled images. Returns `first_s`, seconds to the first batch, and `images_per_s`
    over `seconds` after a warm-up of `warm_s`.
    """
    begin = time.perf_counter()
    loader = DataLoader(
        RawFiles(labeled, unlabeled, crop),
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
        worker_init_fn=_one_thread,
    )
    return _timed(chain.from_iterable(repeat(loader)), begin, 2 * batch, warm_s, seconds)


def _timed(batches: Iterator[Any], begin: float, images: int, warm_s: float, seconds: float) -> dict[str, float]:
    next(batches)
    first = time.perf_counter() - begin
    warm = time.perf_counter() + warm_s
    while time.perf_counter() < warm:
        next(batches)
    start, done = time.perf_counter(), 0
    while (now := time.perf_counter()) < start + seconds:
        next(batches)
        done += images
    return {"first_s": first, "images_per_s": done / (now - start)}


def bare(
    labeled: Sequence[Pair], unlabeled: Sequence[Pair], crop: int, seconds: float, threads: int
) -> dict[str, float]:
    """Measures `threads` threads that read raw files, decode them with OpenCV and copy random crops: the upper limit.

    Returns `images_per_s`.
    """
    cv2.setNumThreads(1)
    end = time.perf_counter() + seconds

    def cut(path: str, flag: int, rng: np.random.Generator) -> None:
        pixels = np.asarray(cv2.imdecode(np.fromfile(path, np.uint8), flag))
        y, x = (int(rng.integers(max(1, side - crop + 1))) for side in pixels.shape[:2])
        pixels[y : y + crop, x : x + crop].copy()

    def work(seed: int) -> int:
        """Decodes until the time is up; returns the number of images."""
        rng, done = np.random.default_rng(seed), 0
        for number in count():
            if time.perf_counter() > end:
                return done
            image, mask = labeled[int(rng.integers(len(labeled)))]
            other, _ = unlabeled[int(rng.integers(len(unlabeled)))]
            cut(image, cv2.IMREAD_COLOR, rng)
            cut(str(mask), cv2.IMREAD_UNCHANGED, rng)
            cut(other, cv2.IMREAD_COLOR, rng)
            done = 2 * (number + 1)
        return done

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(work, range(threads)))
    return {"images_per_s": done / (time.perf_counter() - begin)}


def pairs_of(folder: Path, images: str, masks: str | None) -> list[Pair]:
    """Returns the files of two glob patterns, paired by their order; mask None without `masks`."""
    image_files = sorted(map(str, folder.glob(images)))
    if masks is None:
        return [(image, None) for image in image_files]
    return list(zip(image_files, sorted(map(str, folder.glob(masks))), strict=True))
