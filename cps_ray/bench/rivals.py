"""What the stream is compared with: the loader a user would write, and bare decoding. Both read the raw files."""

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


class RawFiles(Dataset[Any]):
    """An unlabelled image and a random labelled one, from raw files through albumentations as its documentation has it.

    Goes over the images again and again within one epoch: few of them are no disadvantage.
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
        first = self._transform(image=_read(image), mask=cv2.imread(str(mask), cv2.IMREAD_UNCHANGED))
        second = self._transform(image=_read(self._unlabeled[number % len(self._unlabeled)][0]))
        planes = (torch.from_numpy(made["image"]).permute(2, 0, 1).contiguous() for made in (first, second))
        return *planes, torch.from_numpy(first["mask"])


def _read(path: str) -> Any:
    return cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)


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
    """torch's DataLoader with `workers` processes, kept over passes: `batch` labelled and as many unlabelled images a step."""
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
    """`threads` threads that read a raw file, decode it with OpenCV and copy a random crop: the limit."""
    cv2.setNumThreads(1)
    end = time.perf_counter() + seconds

    def cut(path: str, flag: int, rng: np.random.Generator) -> None:
        pixels = np.asarray(cv2.imdecode(np.fromfile(path, np.uint8), flag))
        y, x = (int(rng.integers(max(1, side - crop + 1))) for side in pixels.shape[:2])
        pixels[y : y + crop, x : x + crop].copy()

    def work(seed: int) -> int:
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
    """Files of two patterns, paired by their order."""
    found = sorted(map(str, folder.glob(images)))
    if masks is None:
        return [(image, None) for image in found]
    return list(zip(found, sorted(map(str, folder.glob(masks))), strict=True))
