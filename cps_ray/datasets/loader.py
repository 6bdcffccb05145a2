"""Shards to batches in one process: a rank's labelled images from memory, its unlabelled ones from any stream.

Decoding and augmentation run in threads beside the step (OpenCV frees the GIL). What a batch holds is a function of
(config, step, rank), so a training may start at any step.
"""

import queue
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from cps_ray.config.train import TrainConfig
from cps_ray.datasets.augment import TrainView
from cps_ray.datasets.images import decode_image, decode_mask
from cps_ray.datasets.order import LABELED, UNLABELED, image_at, positions, positions_from
from cps_ray.datasets.shards import Encoded, Index, Shards, read_rows
from cps_ray.datasets.splits import LabeledSplit, split_labeled
from cps_ray.engine.batch import Batch, EvalBatch
from cps_ray.errors import DataError

_AHEAD = 2
"""Steps prepared before they are asked for."""
_View = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class TrainData:
    """The training split and who is labelled in it."""

    index: Index
    split: LabeledSplit

    def places(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """(file, row) of index rows, as `read_rows` wants them."""
        return list(zip(self.index.file[rows].tolist(), self.index.row[rows].tolist(), strict=True))


def train_data(shards: Shards, config: TrainConfig) -> TrainData:
    """Raises DataError where the split leaves nothing to learn from."""
    index = shards.index("train")
    data = TrainData(index, split_labeled(config.data, index))
    if config.method == "cps" and not data.split.unlabeled.size:
        raise DataError(
            f"{shards.folder}: method cps needs unlabelled images, but all {len(index)} training images are labelled. "
            "Lower data.labeled, or prepare images without masks."
        )
    return data


def unlabeled_places(
    data: TrainData, config: TrainConfig, rank: int, world: int, start_step: int
) -> Iterator[tuple[int, int]]:
    """(file, row) of one rank's unlabelled images, in the order it trains on them, from `start_step` to the last step."""
    rows, batch = data.split.unlabeled, config.data.unlabeled_batch
    for position in positions_from(start_step, config.schedule.steps, batch, rank, world):
        row = rows[image_at(position, len(rows), config.seed, UNLABELED)]
        yield int(data.index.file[row]), int(data.index.row[row])


def read_unlabeled(data: TrainData, places: Iterator[tuple[int, int]]) -> Iterator[Encoded]:
    """The unlabelled stream without a cluster: reads one image at a time."""
    for place in places:
        yield from read_rows(data.index.files, [place], masks=False)


def train_batches(
    data: TrainData,
    config: TrainConfig,
    *,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    unlabeled: Iterator[Encoded] | None = None,
    threads: int = 2,
) -> Iterator[Batch]:
    """One rank's batches from `start_step` to the last step.

    `unlabeled`: its unlabelled images in the order of `unlabeled_places`; None with method supervised, else they are
    read here.
    """
    if config.method == "cps" and unlabeled is None:
        unlabeled = read_unlabeled(data, unlabeled_places(data, config, rank, world, start_step))
    if config.method == "supervised":
        unlabeled = None
    producer = _Producer(data, config, rank, world, start_step, unlabeled, threads)
    try:
        yield from producer.batches()
    finally:
        producer.close()


class _Producer:
    """A thread that walks the steps and hands each image to a pool; the batches come out in order."""

    def __init__(
        self,
        data: TrainData,
        config: TrainConfig,
        rank: int,
        world: int,
        start_step: int,
        unlabeled: Iterator[Encoded] | None,
        threads: int,
    ) -> None:
        self._config, self._rank, self._world, self._start_step = config, rank, world, start_step
        self._labeled = read_rows(data.index.files, data.places(data.split.labeled))
        self._unlabeled = unlabeled
        self._view = TrainView(config.augment, config.data.crop_px)
        self._pin = torch.cuda.is_available()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._ready: queue.Queue[tuple[list[Future[_View]], list[Future[_View]]] | BaseException | None]
        self._ready = queue.Queue(maxsize=_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def batches(self) -> Iterator[Batch]:
        while True:
            entry = self._ready.get()
            if entry is None:
                return
            if isinstance(entry, BaseException):
                raise entry
            labeled, unlabeled = ([future.result() for future in part] for part in entry)
            images = torch.stack([image for image, _ in labeled])
            masks = torch.stack([mask for _, mask in labeled if mask is not None])
            others = torch.stack([image for image, _ in unlabeled]) if unlabeled else None
            if self._pin:
                images, masks = images.pin_memory(), masks.pin_memory()
                others = None if others is None else others.pin_memory()
            yield Batch(images, masks, others)

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        try:
            for step in range(self._start_step, self._config.schedule.steps):
                self._put((self._submit_labeled(step), self._submit_unlabeled(step)))
                if self._closed.is_set():
                    return
            self._put(None)
        except BaseException as err:  # carried to the training, which raises it
            if not self._closed.is_set():
                self._put(err)

    def _put(self, entry: tuple[list[Future[_View]], list[Future[_View]]] | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(entry, timeout=0.5)
            except queue.Full:
                continue
            return

    def _submit_labeled(self, step: int) -> list[Future[_View]]:
        config, futures = self._config, []
        for position in positions(step, config.data.labeled_batch, self._rank, self._world):
            encoded = self._labeled[image_at(position, len(self._labeled), config.seed, LABELED)]
            futures.append(self._pool.submit(self._make, encoded, LABELED, position))
        return futures

    def _submit_unlabeled(self, step: int) -> list[Future[_View]]:
        if self._unlabeled is None:
            return []
        wanted = positions(step, self._config.data.unlabeled_batch, self._rank, self._world)
        return [self._pool.submit(self._make, next(self._unlabeled), UNLABELED, position) for position in wanted]

    def _make(self, encoded: Encoded, stream: int, position: int) -> _View:
        seed = int(np.random.SeedSequence((self._config.seed, stream, position)).generate_state(1)[0])
        mask = None if encoded.mask is None else decode_mask(encoded.mask)
        return self._view(decode_image(encoded.image), mask, seed)


def check_data(shards: Shards, config: TrainConfig) -> None:
    """Raises DataError unless the splits a training and its evaluation need are there, with masks to judge by."""
    train_data(shards, config)
    for split in ("val", "test"):
        if not shards.index(split).labeled.any():
            raise DataError(f"{shards.folder}: split {split!r} must have masks to be evaluated on, but has none.")


def metrics_of(shards: Shards, split: str, groups: Mapping[str, str]) -> list[str]:
    """Names of everything an evaluation of this split measures: mIoU, and IoU of the classes that it shows."""
    index = shards.index(split)
    parts = {"": index.labeled}
    for name, pattern in groups.items():
        parts[f"{name}/"] = index.labeled & np.array([fnmatchcase(one, pattern) for one in index.ids])
    names = []
    for prefix, rows in parts.items():
        if rows.any():
            names.append(f"{split}/{prefix}miou")
            shown = np.flatnonzero(index.presence[rows].sum(axis=0))
            names += [f"{split}/{prefix}iou/{shards.classes[label]}" for label in shown]
    return names


def eval_batches(
    shards: Shards, split: str, *, rank: int = 0, world: int = 1, size: int = 8, threads: int = 2
) -> Iterator[EvalBatch]:
    """This rank's images of a split, each exactly once over all ranks, in batches of one size of image."""
    index = shards.index(split)
    rows = np.flatnonzero(index.labeled)[rank::world]
    runs = groupby(rows.tolist(), key=lambda row: (int(index.height[row]), int(index.width[row])))
    chunks = [run[at : at + size] for run in (list(group) for _, group in runs) for at in range(0, len(run), size)]
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        yield from _ahead(pool, index, chunks, threads)


def _ahead(pool: ThreadPoolExecutor, index: Index, chunks: list[list[int]], depth: int) -> Iterator[EvalBatch]:
    """The batches in order, `depth` of them being decoded before they are asked for."""
    waiting: list[Future[EvalBatch]] = []
    for chunk in chunks:
        waiting.append(pool.submit(eval_batch, index, chunk))
        if len(waiting) > depth:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def eval_batch(index: Index, rows: list[int]) -> EvalBatch:
    """These rows of an index, which have masks and one size."""
    places = [(int(index.file[row]), int(index.row[row])) for row in rows]
    encoded = read_rows(index.files, places)
    images = [torch.from_numpy(decode_image(one.image)).permute(2, 0, 1) for one in encoded]
    masks = [torch.from_numpy(decode_mask(one.mask)) for one in encoded if one.mask is not None]
    return EvalBatch(tuple(one.id for one in encoded), torch.stack(images), torch.stack(masks))
