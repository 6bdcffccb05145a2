"""Shards to batches in one process: the labelled images of a batch shard, and its unlabelled ones from any stream.

Decoding and augmentation run in threads beside the step (OpenCV frees the GIL), straight into the memory of the batch. What
a batch holds is a function of (config, step, batch shard), so a training may start at any step.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import groupby

import cv2
import numpy as np
import torch
from torch import Tensor

from cps_ray.config.train import TrainConfig
from cps_ray.datasets.augment import TrainView
from cps_ray.datasets.images import decode_image, decode_mask
from cps_ray.datasets.order import LABELED, UNLABELED, ShardPositions, image_at, positions
from cps_ray.datasets.shards import Encoded, ImageLocations, Index, Shards
from cps_ray.datasets.subsets import LabeledSubset, labeled_subset
from cps_ray.engine.batch import Batch, EvalBatch
from cps_ray.errors import DataError

_AHEAD = 2
"""Steps prepared before they are asked for."""
_RUN = 4
"""Images that a thread takes on at once."""
_SECOND = 2
"""Marks the random numbers of an image's second view."""
_KEPT_BYTES = 512 * 2**20
"""Encoded labelled images held in memory, per worker; what does not fit is read again each time."""


@dataclass(frozen=True, slots=True)
class TrainData:
    """The training split, and which of its images are labelled."""

    index: Index
    subset: LabeledSubset

    @property
    def labeled(self) -> ImageLocations:
        """Where the labelled images lie, in the order of the index."""
        return self.index.locations.take(self.subset.labeled)

    @property
    def unlabeled(self) -> ImageLocations:
        """Where the unlabelled images lie, in the order of the index."""
        return self.index.locations.take(self.subset.unlabeled)


def train_data(shards: Shards, config: TrainConfig) -> TrainData:
    """Divides the training split. Raises DataError where that leaves nothing to learn from."""
    index = shards.index("train")
    data = TrainData(index, labeled_subset(config.data, index))
    if config.semi_supervised and not data.subset.unlabeled.size:
        raise DataError(
            f"{shards.folder}: method {config.method} needs unlabelled images, but all {len(index)} training images are labelled. "
            "Lower data.labeled, or prepare images without masks."
        )
    return data


def unlabeled_positions(
    config: TrainConfig, batch_shard: int, num_batch_shards: int, start_step: int
) -> ShardPositions:
    """Positions of a batch shard's unlabelled images, from `start_step` to the last step."""
    return ShardPositions(start_step, config.schedule.steps, config.data.unlabeled_batch, batch_shard, num_batch_shards)


def read_unlabeled(data: TrainData, config: TrainConfig, visited: ShardPositions) -> Iterator[Encoded]:
    """Reads unlabelled images without a cluster, one at a time, in the order in which a batch shard has them."""
    locations = data.unlabeled
    for position in visited:
        yield from locations.read([image_at(position, len(locations), config.seed, UNLABELED)], masks=False)


def train_batches(
    data: TrainData,
    config: TrainConfig,
    *,
    batch_shard: int = 0,
    num_batch_shards: int = 1,
    start_step: int = 0,
    unlabeled: Iterator[Encoded] | None = None,
    threads: int = 2,
) -> Generator[Batch, None, None]:
    """Yields one shard of the global batch after the other, from `start_step` to the last step.

    `unlabeled`: its unlabelled images in the order of `unlabeled_positions`;
    None with method supervised, else they are read here.
    """
    if config.semi_supervised and unlabeled is None:
        unlabeled = read_unlabeled(data, config, unlabeled_positions(config, batch_shard, num_batch_shards, start_step))
    if not config.semi_supervised:
        unlabeled = None
    producer = _Producer(data, config, (batch_shard, num_batch_shards), start_step, unlabeled, threads)
    try:
        yield from producer.batches()
    finally:
        producer.close()


class _Labeled:
    """Encoded labelled images by number; kept in memory as far as `_KEPT_BYTES` go. One object serves many threads."""

    def __init__(self, locations: ImageLocations) -> None:
        self._locations = locations
        self._kept: dict[int, Encoded] = {}
        self._room = _KEPT_BYTES

    def __len__(self) -> int:
        return len(self._locations)

    def __getitem__(self, number: int) -> Encoded:
        if number not in self._kept:
            (read,) = self._locations.read([number])
            size = len(read.image) + len(read.mask or b"")
            if size > self._room:
                return read
            if self._kept.setdefault(number, read) is read:  # another thread may have read it meanwhile
                self._room -= size
        return self._kept[number]


@dataclass(frozen=True, slots=True)
class _PendingBatch:
    """A batch whose images are still being written."""

    batch: Batch
    work: list[Future[None]]

    def done(self) -> Batch:
        for run in self.work:
            run.result()
        return self.batch


def _run_all(work: list[Callable[[], None]]) -> None:
    for one in work:
        one()


class _Producer:
    """A thread that walks the steps and hands each image to a pool; the batches come out in order."""

    def __init__(
        self,
        data: TrainData,
        config: TrainConfig,
        shard: tuple[int, int],
        start_step: int,
        unlabeled: Iterator[Encoded] | None,
        threads: int,
    ) -> None:
        self._config, self._shard, self._start_step = config, shard, start_step
        self._labeled = _Labeled(data.labeled)
        self._unlabeled = unlabeled
        self._strong = config.method in ("mean_teacher", "fixmatch")
        cps = config.cps
        self._elsewhere = config.method == "cps" and cps.mix == "cutmix" and cps.cutmix_partner == "self"
        self._view = TrainView(config.augment, config.data.crop_px)
        self._pin = torch.cuda.is_available()
        cv2.setNumThreads(1)  # the threads are over images; OpenCV's own within each would only get in their way
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._ready: queue.Queue[_PendingBatch | BaseException | None] = queue.Queue(maxsize=_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def batches(self) -> Iterator[Batch]:
        while (entry := self._ready.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry.done()

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        try:
            for step in range(self._start_step, self._config.schedule.steps):
                self._put(self._fill(step))
                if self._closed.is_set():
                    return
            self._put(None)
        except BaseException as err:  # carried to the training, which raises it
            if not self._closed.is_set():
                self._put(err)
        finally:
            if isinstance(self._unlabeled, Generator):
                self._unlabeled.close()  # here, as nobody else may while this thread is in it

    def _put(self, entry: _PendingBatch | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(entry, timeout=0.5)
            except queue.Full:
                continue
            return

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)

    def _fill(self, step: int) -> _PendingBatch:
        """Starts to write the batch of a step."""
        data, (height, width) = self._config.data, self._config.data.crop_px
        labeled = positions(step, data.labeled_batch, *self._shard)
        unlabeled = positions(step, data.unlabeled_batch, *self._shard) if self._unlabeled is not None else range(0)
        batch = Batch(
            labeled_image=self._empty(len(labeled), 3, height, width),
            labeled_mask=self._empty(len(labeled), height, width),
            unlabeled_image=self._empty(len(unlabeled), 3, height, width) if unlabeled else None,
            unlabeled_second=self._empty(len(unlabeled), 3, height, width)
            if unlabeled and (self._strong or self._elsewhere)
            else None,
        )
        work: list[Callable[[], None]] = [
            partial(self._write_labeled, position, view, label)
            for position, view, label in zip(labeled, batch.labeled_image, batch.labeled_mask, strict=True)
        ]
        for place, position in enumerate(unlabeled):
            assert self._unlabeled is not None
            assert batch.unlabeled_image is not None
            second = None if batch.unlabeled_second is None else batch.unlabeled_second[place]
            view, encoded = batch.unlabeled_image[place], next(self._unlabeled)
            work.append(partial(self._write_unlabeled, position, encoded, view, second))
        # Handing over costs as much as a tenth of a small image: a few at a time.
        runs = [work[first : first + _RUN] for first in range(0, len(work), _RUN)]
        return _PendingBatch(batch, [self._pool.submit(_run_all, run) for run in runs])

    def _write_labeled(self, position: int, view: Tensor, label: Tensor) -> None:
        encoded = self._labeled[image_at(position, len(self._labeled), self._config.seed, LABELED)]
        assert encoded.mask is not None
        image, mask = decode_image(encoded.image), decode_mask(encoded.mask)
        self._view(image, mask, (self._config.seed, LABELED, position), view=view.numpy(), label=label.numpy())

    def _write_unlabeled(self, position: int, encoded: Encoded, view: Tensor, second: Tensor | None) -> None:
        image, seed = decode_image(encoded.image), (self._config.seed, UNLABELED, position)
        strong = second.numpy() if second is not None and self._strong else None
        self._view(image, None, seed, view=view.numpy(), strong=strong)
        if second is not None and self._elsewhere:
            self._view(image, None, (*seed, _SECOND), view=second.numpy())


def check_data(shards: Shards, config: TrainConfig, evaluated: Sequence[str] = ("val", "test")) -> None:
    """Raises DataError unless there are images to train on, and masks in the splits that are `evaluated`."""
    train_data(shards, config)
    for split in evaluated:
        if not shards.index(split).labeled.any():
            raise DataError(f"{shards.folder}: split {split!r} must have masks to be evaluated on, but has none.")


def metrics_of(shards: Shards, split: str, slices: Mapping[str, str], further: Sequence[str] = ()) -> list[str]:
    """Names of everything that an evaluation of this split measures: mIoU, and IoU of the classes that it shows, each also per
    slice; and the scores `further` of the whole split.
    """
    index = shards.index(split)
    parts = {"": index.labeled}
    for name, pattern in slices.items():
        parts[f"{name}/"] = index.labeled & np.array([fnmatchcase(one, pattern) for one in index.ids])
    names = []
    for prefix, rows in parts.items():
        if rows.any():
            names.append(f"{split}/{prefix}miou")
            shown = np.flatnonzero(index.presence[rows].sum(axis=0))
            names += [f"{split}/{prefix}iou/{shards.classes[label]}" for label in shown]
    return names + ([f"{split}/{name}" for name in further] if index.labeled.any() else [])


def eval_batches(
    shards: Shards, split: str, *, batch_shard: int = 0, num_batch_shards: int = 1, size: int = 8, threads: int = 2
) -> Iterator[EvalBatch]:
    """Yields every n-th image of a split, each exactly once over all n batch shards, in batches of one size of image."""
    index = shards.index(split)
    rows = np.flatnonzero(index.labeled)[batch_shard::num_batch_shards]
    same_size = groupby(rows.tolist(), key=lambda row: (int(index.height[row]), int(index.width[row])))
    chunks = [run[at : at + size] for run in (list(group) for _, group in same_size) for at in range(0, len(run), size)]
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        yield from _ahead(pool, index, chunks, threads)


def hidden_batches(
    data: TrainData, hidden_images: int, *, batch_shard: int = 0, num_batch_shards: int = 1, threads: int = 2
) -> Iterator[EvalBatch]:
    """Yields a batch shard's part of `hidden_images` unlabelled images whose masks exist, spread evenly over them, one by one.

    For measuring pseudo labels; nothing learns from these masks.
    """
    index = data.index
    rows = data.subset.unlabeled[index.labeled[data.subset.unlabeled]]
    spread = rows[np.linspace(0, len(rows) - 1, min(len(rows), hidden_images)).round().astype(int)]
    chunks = [[int(row)] for row in spread[batch_shard::num_batch_shards]]
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
    encoded = index.locations.read(rows)
    images = [torch.from_numpy(decode_image(one.image)).permute(2, 0, 1) for one in encoded]
    masks = [torch.from_numpy(decode_mask(one.mask)) for one in encoded if one.mask is not None]
    return EvalBatch(tuple(one.id for one in encoded), torch.stack(images), torch.stack(masks))
