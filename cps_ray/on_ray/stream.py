"""The unlabelled images through Ray Data: one execution for the whole training, in an order that is a function of the step.

Each rank runs its own execution over the chunks of its own positions. Tasks on the cluster's free CPUs read the images;
compressed bytes cross the object store; decoding and augmentation stay beside the step. Starting at any step costs
nothing, and passes follow each other without a break (an execution per pass costs seconds each time). Until the execution
has come up, which takes seconds, the rank reads for itself.
"""

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cps_ray.config.train import TrainConfig
from cps_ray.datasets.loader import TrainData, unlabeled_positions
from cps_ray.datasets.order import UNLABELED, ShardPositions, image_at
from cps_ray.datasets.shards import Encoded, ImageLocations

_CHUNK_BYTES = 32 * 2**20
_CHUNK_IMAGES = (1, 256)
"""A chunk costs the worker about 10 ms of computing, whatever its size."""
_BLOCKS = 512
"""Most blocks of an execution. Ray Data plans all at once, at about 1 ms and 6 kB each; so their number does not grow with the steps."""
_BLOCK_CHUNKS = 64
"""Fewest chunks of a block, except the last one."""
_HELD_CHUNKS = 6
"""What an execution may keep in the object store."""
_READ_HERE = 2
"""Chunks that the execution leaves out, as the rank has read them before it is up."""
_PATIENCE_S = 0.1
"""How long a chunk that is late is waited for before the rank reads it itself."""
_ROUND_S = 0.05
"""Time between two rounds of Ray Data's scheduling loop."""
_READ_CPUS = 0.25
"""Reading waits for disks more than it computes."""


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """What a rank reads, by number of chunk: all that a read task needs, whatever the number of steps."""

    locations: ImageLocations
    """Where every unlabelled image lies."""
    positions: ShardPositions
    seed: int
    chunk: int
    """Images per chunk."""

    def __len__(self) -> int:
        return -(-len(self.positions) // self.chunk)

    def read(self, number: int) -> list[Encoded]:
        """The images of chunk `number`, in order."""
        first = number * self.chunk
        mine = range(first, min(first + self.chunk, len(self.positions)))
        rows = [image_at(self.positions[k], len(self.locations), self.seed, UNLABELED) for k in mine]
        return self.locations.read(rows, masks=False)


def make_plan(
    data: TrainData, config: TrainConfig, batch_shard: int, num_batch_shards: int, start_step: int
) -> StreamPlan:
    """Everything that a rank will read for its batch shard from `start_step` to the last step."""
    locations = data.unlabeled
    chunk = int(np.clip(_CHUNK_BYTES / locations.image[:, 1].mean(), *_CHUNK_IMAGES))
    positions = unlabeled_positions(config, batch_shard, num_batch_shards, start_step)
    return StreamPlan(locations, positions, config.seed, chunk)


def _read(numbers: dict[str, NDArray[np.int64]], plan: StreamPlan, per_block: int) -> Iterator[pa.Table]:
    """Reads a block in a task: yields one table per chunk."""
    (block,) = numbers["item"].tolist()
    # A generator: Ray Data hands each table on as it comes, so a task holds one chunk and not a block of 64.
    first = _READ_HERE + block * per_block
    for number in range(first, min(first + per_block, len(plan))):
        encoded = plan.read(number)
        ids, images = [one.id for one in encoded], [one.image for one in encoded]
        yield pa.table({"chunk": [number] * len(ids), "id": ids, "image": pa.array(images, pa.large_binary())})


def _execution(plan: StreamPlan) -> Iterator[tuple[int, list[Encoded]]]:
    """Yields chunks from `_READ_HERE` on with their numbers, in order, read ahead by Ray Data."""
    import ray

    from cps_ray.on_ray.ray_internals import paced

    context = ray.data.DataContext.get_current()
    context.custom_execution_callback_classes = [paced(_ROUND_S)]
    context.enable_progress_bars = False
    # Any order would be a random one, but not the one that a resumed training has to find again.
    context.execution_options.preserve_order = True
    limits = context.execution_options.resource_limits
    # How far it reads ahead; without a limit it would fill the object store, which all trainings of a node have in common.
    context.execution_options.resource_limits = limits.copy(object_store_memory=_HELD_CHUNKS * _CHUNK_BYTES)
    # By default chunks would wait in their task until they are 128 MiB together.
    context.target_max_block_size, context.target_min_block_size = _CHUNK_BYTES, 1
    count = len(plan) - _READ_HERE
    per_block = max(_BLOCK_CHUNKS, -(-count // _BLOCKS))
    blocks = -(-count // per_block)
    # Numbers from memory: a source that is itself read by tasks would take its turns on the one free CPU before any image.
    numbers = ray.data.from_items(list(range(blocks)), override_num_blocks=blocks)
    settings = {"plan": plan, "per_block": per_block}
    one = ray.data.TaskPoolStrategy(size=1)  # one task at a time per rank: reading is cheap, CPUs are for decoding
    images = numbers.map_batches(_read, batch_size=1, fn_kwargs=settings, num_cpus=_READ_CPUS, compute=one)
    number = _READ_HERE
    chunk: list[Encoded] = []
    # No batch size: blocks come as they are, without a copy.
    for table in images.iter_batches(batch_size=None, prefetch_batches=1, batch_format="pyarrow"):
        for at, key, image in zip(table["chunk"].to_pylist(), table["id"], table["image"], strict=True):
            if at != number:  # a block of Ray Data may hold several chunks, or end within one
                yield number, chunk
                number, chunk = at, []
            chunk.append(Encoded(key.as_py(), image.as_py(), None))
    yield number, chunk


class _PrefetchedChunks:
    """Chunks that the execution has read ahead, taken from it by a thread of its own, so that nobody waits for it to come up.

    Two threads meet here: this one walks through the execution and puts chunks into a queue of one; the batch producer's thread takes
    them with `take`. What the taker has read itself because it was late is skipped by number when it comes.
    """

    def __init__(self, plan: StreamPlan) -> None:
        self._chunks: queue.Queue[tuple[int, list[Encoded] | BaseException]] = queue.Queue(maxsize=1)
        self._wanted = _READ_HERE
        self._caught_up = False
        """Whether the execution is ahead of the training; only then a chunk is waited for."""
        self._closed = threading.Event()
        threading.Thread(target=self._run, args=(plan,), name="stream", daemon=True).start()

    def take(self, number: int) -> list[Encoded] | None:
        """Returns chunk `number`; None if it has not come: then the caller reads it. Raises what the execution raised."""
        while True:
            try:
                arrived, chunk = self._chunks.get(self._caught_up, _PATIENCE_S)
            except queue.Empty:
                self._caught_up, self._wanted = False, number + 1
                return None
            if isinstance(chunk, BaseException):
                raise chunk
            # Else it is one that the caller has read itself meanwhile: look at the next.
            if arrived == number:
                self._caught_up = True
                return chunk

    def close(self) -> None:
        """Lets the thread end when it next hands something over; does not wait for it."""
        self._closed.set()

    def _run(self, plan: StreamPlan) -> None:
        number = _READ_HERE
        try:
            for number, chunk in _execution(plan):
                if self._closed.is_set():
                    return
                if number >= self._wanted:  # else the taker has gone on without it
                    self._put(number, chunk)
        except BaseException as err:  # carried to whoever takes the next chunk
            self._put(number, err)

    def _put(self, number: int, chunk: list[Encoded] | BaseException) -> None:
        # Not a blocking put: nobody takes from the queue once the training has ended, and this thread would never end.
        while not self._closed.is_set():
            try:
                self._chunks.put((number, chunk), timeout=0.1)
            except queue.Full:
                continue
            return


def stream(plan: StreamPlan) -> Generator[Encoded, None, None]:
    """Yields the plan's images in order, read ahead by Ray Data. Needs a connected cluster with one whole free CPU."""
    prefetched = _PrefetchedChunks(plan) if len(plan) > _READ_HERE else None
    try:
        for number in range(len(plan)):
            chunk = prefetched.take(number) if prefetched is not None and number >= _READ_HERE else None
            yield from plan.read(number) if chunk is None else chunk
    finally:
        if prefetched is not None:
            prefetched.close()
