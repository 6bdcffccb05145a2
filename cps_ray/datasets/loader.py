"""Shards to batches in one process: the labelled images of a batch shard, and its unlabelled ones from any stream.

Decoding and augmentation run in threads beside the step (OpenCV frees the GIL), straight into the memory of the batch. What
a batch holds is a function of (config, step, batch shard), so a training may start at any step.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import groupby

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cps_ray.config.train import HELD_OUT, TrainConfig
from cps_ray.datasets.augment import IMAGENET_MEAN, TrainView
from cps_ray.datasets.images import decode_image, decode_mask
from cps_ray.datasets.order import LABELED, UNLABELED, ShardPositions, image_at, positions
from cps_ray.datasets.shards import Encoded, ImageLocations, Index, Shards, joined
from cps_ray.datasets.subsets import LabeledSubset, drawn_unlabeled, hold_out, labeled_subset
from cps_ray.engine.batch import IGNORE, Batch, EvalBatch
from cps_ray.errors import DataError

_BATCHES_AHEAD = 2
"""Most batches that wait in the queue until the training takes them."""
_IMAGES_PER_TASK = 4
"""Images that a thread of the pool gets at once."""
_SECOND_VIEW = 2
"""Ends the seed of an image's second crop, so that it is drawn apart from the first one."""
_CACHE_BYTES = 512 * 2**20
"""Encoded labelled images held in memory, per worker; what does not fit is read again each time."""
EVAL_BATCH_PX = 2**21
"""Most pixels of a batch of an evaluation, if it holds more than one image: eight of 512x512."""


@dataclass(frozen=True, slots=True)
class TrainData:
    """The index of the training split and of further labelled images, and which of them are labelled."""

    index: Index
    subset: LabeledSubset

    @property
    def labeled(self) -> ImageLocations:
        """Locations of the labelled images, in the order of the index."""
        return self.index.locations.take(self.subset.labeled)

    def weigh(self, config: TrainConfig) -> TrainConfig:
        """Returns the training with weights of its classes in place of powers: those of the labelled images."""
        return config.weighed(self.index.pixels[self.subset.labeled].sum(axis=0).tolist())

    def repeats(self, threshold: float) -> NDArray[np.int64]:
        """Numbers of the labelled images, int64, each as often as it comes up in a pass (`augment.repeat_threshold`)."""
        presence = self.index.presence[self.subset.labeled].astype(bool)
        fraction_C = presence.mean(axis=0)  # noqa: N806
        factor_C = np.sqrt(np.maximum(1.0, threshold / np.maximum(fraction_C, 1e-12)))  # noqa: N806
        factors = np.where(presence, factor_C, 1.0).max(axis=1)
        # Rounded so that the sum over images stays right: an image of 1.5 comes up once or twice.
        return np.repeat(np.arange(len(factors)), np.diff(np.floor(np.cumsum(factors) + 1e-9), prepend=0).astype(int))

    @property
    def unlabeled(self) -> ImageLocations:
        """Locations of the unlabelled images, in the order of the index."""
        return self.index.locations.take(self.subset.unlabeled)


def train_data(shards: Shards, config: TrainConfig) -> TrainData:
    """Divides the training split, and what else is labelled, as the config says.

    DataError if that is impossible, or if a semi-supervised method would have no unlabelled image.
    """
    data, train = config.data, shards.index("train")
    subset, index = labeled_subset(data, train), train
    # For folds, what there is: nothing is given away for val and test.
    further = [name for name in data.further_labeled if data.folds is None or _has_masks(shards, name)]
    if further:
        index = joined([train, *(_with_masks(shards, split, "for data.further_labeled") for split in further)])
        labeled = np.concatenate([subset.labeled, np.arange(len(train), len(index))])
        subset = replace(subset, labeled=labeled)
    if data.folds is not None:
        subset = hold_out(subset, index, data.folds, tiled=shards.manifest.tiles is not None)
    if config.semi_supervised and not subset.unlabeled.size:
        groups = " or belong with those of the fold that is held out" if subset.held_out.size else ""
        raise DataError(
            f"{shards.folder}: method {config.method} needs unlabelled images, but all {len(train)} training images are labelled{groups}. "
            "Lower data.labeled, or prepare images without masks."
        )
    return TrainData(index, replace(subset, unlabeled=drawn_unlabeled(data, subset.unlabeled, len(train))))


def evaluated_images(shards: Shards, config: TrainConfig, split: str) -> Index:
    """Returns the images with masks of a split. With `data.folds`, val and HELD_OUT are the fold that is held out, and val is the labelled
    images where none is held out and val has no masks. DataError if there are none, or if every pixel of theirs is ignored."""
    index = _evaluated_images(shards, config, split)
    if not index.pixels.any():
        raise DataError(
            f"{shards.folder}: the masks of {split!r} must have pixels that count, but every pixel of its {len(index)} is ignored."
        )
    return index


def _evaluated_images(shards: Shards, config: TrainConfig, split: str) -> Index:
    folds = config.data.folds
    if folds is not None and split in ("val", HELD_OUT):
        data = train_data(shards, config)
        if folds.held_out is not None:
            return data.index.take(data.subset.held_out)
        val = shards.manifest.splits.get("val")
        if split == "val" and not (val and val.masks):
            return data.index.take(data.subset.labeled)
    return _with_masks(shards, split, "to be evaluated on")


def _has_masks(shards: Shards, split: str) -> bool:
    return split in shards.manifest.splits and shards.manifest.splits[split].masks > 0


def _with_masks(shards: Shards, split: str, why: str) -> Index:
    index = shards.index(split)
    if not index.labeled.any():
        raise DataError(f"{shards.folder}: split {split!r} must have masks {why}, but has none.")
    return index.take(np.flatnonzero(index.labeled))


def unlabeled_positions(
    config: TrainConfig, batch_shard: int, num_batch_shards: int, start_step: int
) -> ShardPositions:
    """Returns the positions of a batch shard's unlabelled images, from `start_step` to the last step."""
    return ShardPositions(start_step, config.schedule.steps, config.data.unlabeled_batch, batch_shard, num_batch_shards)


def read_unlabeled(data: TrainData, config: TrainConfig, shard_positions: ShardPositions) -> Iterator[Encoded]:
    """Reads unlabelled images without a cluster, one at a time, in the order of a batch shard's positions."""
    locations = data.unlabeled
    for position in shard_positions:
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
    fill: tuple[int, int, int] = IMAGENET_MEAN,
) -> Generator[Batch, None, None]:
    """Yields one worker's batch shard of each step, in order, from `start_step` to the last step.

    `unlabeled`: the unlabelled images of this batch shard, in the order of `unlabeled_positions`; None: they are read here.
    Method `supervised` has none. `threads`: how many decode. `fill`: RGB colour that pads views, the networks' mean. Closing the generator stops all threads, without waiting for them.
    """
    if config.semi_supervised and unlabeled is None:
        unlabeled = read_unlabeled(data, config, unlabeled_positions(config, batch_shard, num_batch_shards, start_step))
    if not config.semi_supervised:
        unlabeled = None
    producer = _Producer(data, config, (batch_shard, num_batch_shards), start_step, unlabeled, threads, fill)
    try:
        yield from producer.batches()
    finally:
        producer.close()


class _LabeledCache:
    """Encoded labelled images by number; kept in memory as far as `_CACHE_BYTES` go. One object serves many threads."""

    def __init__(self, locations: ImageLocations) -> None:
        self._locations = locations
        self._cached: dict[int, Encoded] = {}
        self._free_bytes = _CACHE_BYTES

    def __len__(self) -> int:
        return len(self._locations)

    def __getitem__(self, number: int) -> Encoded:
        # Nothing is removed, so what is found once stays; no lock, so two threads may read the same image at once.
        if number not in self._cached:
            (encoded,) = self._locations.read([number])
            size = len(encoded.image) + len(encoded.mask or b"")
            if size > self._free_bytes:
                return encoded
            # Of two threads that have read it, setdefault keeps the first one's, and only that thread counts the bytes.
            if self._cached.setdefault(number, encoded) is encoded:
                self._free_bytes -= size
        return self._cached[number]


@dataclass(frozen=True, slots=True)
class _PendingBatch:
    """A batch whose images are still being written."""

    batch: Batch
    tasks: list[Future[None]]

    def wait(self) -> Batch:
        """Returns the batch when all of it is written. Raises what a task raised."""
        for task in self.tasks:
            task.result()
        return self.batch


def _call_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()


class _Producer:
    """Makes batches ahead of the training, in order, in three kinds of threads:

    - the producer's own goes through the steps: it allocates a batch, takes its unlabelled images from the stream, hands all
      images to the pool, and puts the batch into a queue while its images are still being written;
    - the pool's decode and augment; each image has a slice of the batch to itself, so their order does not matter;
    - the training's takes a batch from the queue, and waits until the last of its images is written.
    """

    def __init__(
        self,
        data: TrainData,
        config: TrainConfig,
        batch_shard: tuple[int, int],
        start_step: int,
        unlabeled: Iterator[Encoded] | None,
        threads: int,
        fill: tuple[int, int, int],
    ) -> None:
        """`batch_shard`: (its number, how many there are). The producer's thread starts at once."""
        self._config, self._batch_shard, self._start_step = config, batch_shard, start_step
        self._labeled = _LabeledCache(data.labeled)
        self._labeled_pass = data.repeats(config.augment.repeat_threshold)
        self._unlabeled = unlabeled
        self._further_views = config.unlabeled_views[1:]
        self._view = TrainView(config.augment, config.data.crop_px, fill)
        self._pin_memory = torch.cuda.is_available()
        cv2.setNumThreads(1)  # the threads are over images; OpenCV's own within each would only get in their way
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        # The queue's length is what holds the producer back: one batch more is in work while it waits for room.
        self._queue: queue.Queue[_PendingBatch | BaseException | None] = queue.Queue(maxsize=_BATCHES_AHEAD)
        self._closed = threading.Event()
        # A daemon, because it may be waiting inside the stream when the process wants to end. Starts when all is in place.
        self._thread = threading.Thread(target=self._produce, name="batches", daemon=True)
        self._thread.start()

    def batches(self) -> Iterator[Batch]:
        """Yields the batches; called by the training's thread."""
        # Does not wait for ever: unless it was closed, the producer's last entry is None or an error.
        while (entry := self._queue.get()) is not None:
            # An error of the stream keeps its turn: the batches before it are trained on first.
            if isinstance(entry, BaseException):
                raise entry
            yield entry.wait()

    def close(self) -> None:
        """Lets all threads end after what they have in hand; does not wait for them."""
        # The flag first: the error that `submit` raises after the shutdown finds it set, and is dropped.
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _produce(self) -> None:
        try:
            for step in range(self._start_step, self._config.schedule.steps):
                self._enqueue(self._start_batch(step))
                if self._closed.is_set():
                    return
            self._enqueue(None)
        except BaseException as err:  # carried to the training, which raises it
            if not self._closed.is_set():
                self._enqueue(err)
        finally:
            if isinstance(self._unlabeled, Generator):
                self._unlabeled.close()  # here, because Python lets no other thread close it while this one is in it

    def _enqueue(self, entry: _PendingBatch | BaseException | None) -> None:
        # Not a blocking put: nobody takes from the queue after `close`, and this thread would never end.
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return

    def _allocate(self, *shape: int) -> Tensor:
        # New memory for each batch: the training may hold earlier ones, or still be copying from them to a GPU.
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory)

    def _allocate_boxes(self, images: int) -> Tensor:
        return torch.empty(images, 4, dtype=torch.int32, pin_memory=self._pin_memory)

    def _start_batch(self, step: int) -> _PendingBatch:
        """Starts to write the batch of a step, and returns without waiting for it."""
        data, (height, width) = self._config.data, self._config.data.crop_px
        labeled = positions(step, data.labeled_batch, *self._batch_shard)
        unlabeled = (
            positions(step, data.unlabeled_batch, *self._batch_shard) if self._unlabeled is not None else range(0)
        )
        images = (len(unlabeled), 3, height, width)
        second, third = (self._allocate(*images) if count < len(self._further_views) else None for count in range(2))
        batch = Batch(
            labeled_image=self._allocate(len(labeled), 3, height, width),
            labeled_mask=self._allocate(len(labeled), height, width),
            unlabeled_image=self._allocate(*images) if unlabeled else None,
            unlabeled_second=second,
            unlabeled_third=third,
            labeled_box=self._allocate_boxes(len(labeled)),
            unlabeled_box=self._allocate_boxes(len(unlabeled)) if unlabeled else None,
            second_box=self._allocate_boxes(len(unlabeled)) if "elsewhere" in self._further_views else None,
        )
        writes: list[Callable[[], None]] = [
            partial(self._write_labeled, position, batch, row) for row, position in enumerate(labeled)
        ]
        for row, position in enumerate(unlabeled):
            assert self._unlabeled is not None
            # Taken here and not in the pool: the stream's order is that of the positions, and it serves one thread.
            encoded = next(self._unlabeled, None)
            if encoded is None:
                raise DataError(
                    f"the stream of unlabelled images must last for all {self._config.schedule.steps} steps of the training, but it ended in "
                    f"step {step} after {row} of {len(unlabeled)} images: it needs one image for every position of `unlabeled_positions`."
                )
            writes.append(partial(self._write_unlabeled, position, encoded, batch, row))
        # Handing over costs as much as a tenth of a small image: a few at a time.
        chunks = [writes[first : first + _IMAGES_PER_TASK] for first in range(0, len(writes), _IMAGES_PER_TASK)]
        return _PendingBatch(batch, [self._pool.submit(_call_all, chunk) for chunk in chunks])

    # These two run in the pool; `numpy()` of a CPU tensor is a view of its memory, so they write into the batch itself.

    def _write_labeled(self, position: int, batch: Batch, row: int) -> None:
        in_pass = image_at(position, len(self._labeled_pass), self._config.seed, LABELED)
        encoded = self._labeled[int(self._labeled_pass[in_pass])]
        assert encoded.mask is not None
        assert batch.labeled_box is not None
        image, mask = decode_image(encoded.image), decode_mask(encoded.mask)
        view, label = batch.labeled_image[row].numpy(), batch.labeled_mask[row].numpy()
        box = self._view(image, mask, (self._config.seed, LABELED, position), view=view, label=label)
        batch.labeled_box[row].numpy()[:] = box

    def _write_unlabeled(self, position: int, encoded: Encoded, batch: Batch, row: int) -> None:
        image, seed = decode_image(encoded.image), (self._config.seed, UNLABELED, position)
        assert batch.unlabeled_image is not None
        assert batch.unlabeled_box is not None
        further = [views[row].numpy() for views in (batch.unlabeled_second, batch.unlabeled_third) if views is not None]
        strong = further if batch.second_box is None else further[1:]
        view = batch.unlabeled_image[row].numpy()
        batch.unlabeled_box[row].numpy()[:] = self._view(image, None, seed, view=view, strong=strong)
        if batch.second_box is not None:
            elsewhere = self._view(image, None, (*seed, _SECOND_VIEW), view=further[0])
            batch.second_box[row].numpy()[:] = elsewhere


def check_data(shards: Shards, config: TrainConfig, evaluated: Sequence[str] = ("val", "test")) -> None:
    """Checks that there are images to train on, masks in the splits that are `evaluated`, and one weight per class. With `data.folds` no
    other split needs masks. DataError if not."""
    train_data(shards, config)
    classes = shards.classes
    for section, weights in config.class_weights.items():
        if not isinstance(weights, float) and len(weights) != len(classes):
            raise DataError(
                f"{section}.class_weights: must have one weight for each of the {len(classes)} classes of {shards.folder} "
                f"({', '.join(classes[:3])}, ...), but has {len(weights)}."
            )
    for split in evaluated if config.data.folds is None else ():
        evaluated_images(shards, config, split)


def evaluated_sizes(shards: Shards, config: TrainConfig) -> list[tuple[int, int]]:
    """Returns the different (height, width) in px of images that the training evaluates: those with masks of val and test, with
    `data.folds` of what takes the place of val, and with `evaluation.hidden_images` of train."""
    hidden = config.semi_supervised and config.evaluation.hidden_images > 0
    splits = ("val", "test", "train") if hidden else ("val", "test")
    indexes = [shards.index(split) for split in splits if split in shards.manifest.splits]
    if config.data.folds is not None:
        indexes.append(evaluated_images(shards, config, "val"))
    sizes = {
        (int(height), int(width))
        for index in indexes
        for height, width in zip(index.height[index.labeled], index.width[index.labeled], strict=True)
    }
    return sorted(sizes)


def metrics_of(shards: Shards, config: TrainConfig, split: str, extra: Sequence[str] = ()) -> list[str]:
    """Returns the names of everything that an evaluation of this split measures: mIoU and the IoU of each class that is there,
    for the whole split and per slice, and the scores `extra` of the whole split. A slice without masks, or without a pixel that counts, has no metrics."""
    index = evaluated_images(shards, config, split)
    rows_of = {"": np.ones(len(index), bool)}  # by the prefix of their metrics; the whole split has none
    for name, pattern in config.data.slices.items():
        rows_of[f"{name}/"] = np.array([fnmatchcase(image_id, pattern) for image_id in index.ids])
    names = []
    for prefix, rows in rows_of.items():
        if index.pixels[rows].any():
            names.append(f"{split}/{prefix}miou")
            present = np.flatnonzero(index.presence[rows].sum(axis=0))
            names += [f"{split}/{prefix}iou/{shards.classes[label]}" for label in present]
    return names + [f"{split}/{name}" for name in extra]


def eval_batches(
    shards: Shards,
    split: str,
    *,
    batch_shard: int = 0,
    num_batch_shards: int = 1,
    size_px: int = EVAL_BATCH_PX,
    threads: int = 2,
) -> Iterator[EvalBatch]:
    """Yields a batch shard's images with masks of a split, the largest first, in batches of one height and width: as many images as have
    at most `size_px` pixels together, and at least one.

    Each image comes exactly once over all batch shards: no batch is filled up with repeated images.
    """
    index = shards.index(split)
    mine = {"batch_shard": batch_shard, "num_batch_shards": num_batch_shards}
    yield from image_batches(index, np.flatnonzero(index.labeled), masks=True, **mine, size_px=size_px, threads=threads)


def image_batches(
    index: Index,
    rows: NDArray[np.int64],
    *,
    masks: bool = False,
    batch_shard: int = 0,
    num_batch_shards: int = 1,
    size_px: int = EVAL_BATCH_PX,
    threads: int = 2,
) -> Iterator[EvalBatch]:
    """Yields a batch shard's images of these rows in batches of one size, as `eval_batches` does. All pixels are IGNORE where there is no
    mask, or where `masks` are not read."""
    # By size, so that images of one size come together although they lie far apart. The largest first: if memory does not
    # suffice, that shows at once. Every n-th of them, so that all batch shards have about as many pixels.
    height, width = index.height[rows].astype(np.int64), index.width[rows].astype(np.int64)
    mine = rows[np.lexsort((width, -height * width))][batch_shard::num_batch_shards]
    chunks = []
    for (tall, wide), same_size in groupby(
        mine.tolist(), key=lambda row: (int(index.height[row]), int(index.width[row]))
    ):
        members, count = list(same_size), max(1, size_px // (tall * wide))
        chunks += [members[first : first + count] for first in range(0, len(members), count)]
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        yield from _decode_ahead(pool, index, chunks, threads, masks)


def hidden_batches(
    data: TrainData, hidden_images: int, *, batch_shard: int = 0, num_batch_shards: int = 1, threads: int = 2
) -> Iterator[EvalBatch]:
    """Yields a batch shard's part of `hidden_images` unlabelled images whose masks exist, spread evenly over all of these; batches
    are those of `eval_batches`.

    For measuring pseudo labels; nothing learns from these masks.
    """
    index = data.index
    rows = data.subset.unlabeled[index.labeled[data.subset.unlabeled]]
    spread = rows[np.linspace(0, len(rows) - 1, min(len(rows), hidden_images)).round().astype(int)]
    mine = {"batch_shard": batch_shard, "num_batch_shards": num_batch_shards}
    yield from image_batches(index, spread, masks=True, **mine, threads=threads)


def _decode_ahead(
    pool: ThreadPoolExecutor, index: Index, chunks: list[list[int]], depth: int, masks: bool
) -> Iterator[EvalBatch]:
    """Yields the batches in order, while the pool works on the next `depth` of them."""
    pending: list[Future[EvalBatch]] = []
    for chunk in chunks:
        pending.append(pool.submit(eval_batch, index, chunk, masks=masks))
        # Only so many at a time: a pool takes any number of tasks, and would hold the whole split in memory.
        if len(pending) > depth:
            yield pending.pop(0).result()
    for future in pending:
        yield future.result()


def eval_batch(index: Index, rows: list[int], *, masks: bool = True) -> EvalBatch:
    """Reads and decodes these rows of an index, which have one size; without a mask, or with `masks` not read, all pixels are IGNORE."""
    encoded = index.locations.read(rows, masks=masks)
    images = [torch.from_numpy(decode_image(item.image)).permute(2, 0, 1) for item in encoded]
    target_NHW = torch.full((len(rows), *images[0].shape[1:]), IGNORE, dtype=torch.uint8)  # noqa: N806
    for number, item in enumerate(encoded):
        if item.mask is not None:
            target_NHW[number] = torch.from_numpy(decode_mask(item.mask))
    return EvalBatch(tuple(item.id for item in encoded), torch.stack(images), target_NHW)
