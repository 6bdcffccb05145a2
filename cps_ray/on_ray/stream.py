"""The unlabelled images through Ray Data: one execution for the whole training, in an order that is a function of the step.

Each rank runs its own execution over the chunks of its own positions. Tasks on the cluster's free CPUs read the rows;
compressed bytes cross the object store; decoding and augmentation stay beside the step. Starting at any step costs
nothing, and passes follow each other without a break (an execution per pass costs seconds each time).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cps_ray.config.train import TrainConfig
from cps_ray.datasets.loader import TrainData
from cps_ray.datasets.order import UNLABELED, image_at, positions_from
from cps_ray.datasets.shards import Encoded, read_rows

_CHUNK_BYTES = 8 * 2**20
_ROUND_S = 0.1
_READ_CPUS = 0.25
"""Reading waits for disks more than it computes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which rows a rank reads, by number of chunk: all a read task needs."""

    files: tuple[str, ...]
    file: NDArray[np.int32]
    row: NDArray[np.int32]
    """(N,) place of every unlabelled image."""
    positions: NDArray[np.int64]
    """(P,) the rank's positions, in order."""
    seed: int
    chunk: int
    """Images per chunk."""

    def __len__(self) -> int:
        return -(-len(self.positions) // self.chunk)

    def places(self, number: int) -> list[tuple[int, int]]:
        """(file, row) of chunk `number`, in order."""
        mine = self.positions[number * self.chunk : (number + 1) * self.chunk]
        images = [image_at(int(position), len(self.row), self.seed, UNLABELED) for position in mine]
        return [(int(self.file[image]), int(self.row[image])) for image in images]


def make_plan(data: TrainData, config: TrainConfig, rank: int, world: int, start_step: int) -> Plan:
    """Everything `rank` will read from `start_step` to the last step."""
    rows = data.split.unlabeled
    mine = positions_from(start_step, config.schedule.steps, config.data.unlabeled_batch, rank, world)
    # A PNG of a photo takes about a byte per pixel, a JPEG less.
    image_bytes = float((data.index.height[rows].astype(float) * data.index.width[rows]).mean())
    chunk = int(np.clip(_CHUNK_BYTES / image_bytes, 8, 256))
    places = (data.index.file[rows], data.index.row[rows])
    return Plan(data.index.files, *places, np.fromiter(mine, np.int64), config.seed, chunk)


def _read(numbers: dict[str, NDArray[np.int64]], plan: Plan) -> pa.Table:
    encoded = [one for number in numbers["id"] for one in read_rows(plan.files, plan.places(int(number)), masks=False)]
    return pa.table(
        {"id": [one.id for one in encoded], "image": pa.array([one.image for one in encoded], pa.large_binary())}
    )


def stream(plan: Plan) -> Iterator[Encoded]:
    """The plan's images in order, read ahead by Ray Data. Needs a connected cluster with one whole free CPU."""
    if not len(plan):
        return
    import ray
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pace(ExecutionCallback):  # type: ignore[misc]
        """Ray Data's scheduling loop does not wait while it is held back: it spins, and takes a core and this process's
        interpreter lock from the training (measured on 2 cores: a third of the speed). Ten rounds a second are plenty.
        """

        def on_execution_step(self, executor: object) -> None:
            time.sleep(_ROUND_S)

    context = ray.data.DataContext.get_current()
    context.custom_execution_callback_classes = [Pace]
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    chunks = ray.data.range(len(plan), override_num_blocks=len(plan))
    images = chunks.map_batches(_read, batch_size=1, fn_kwargs={"plan": plan}, num_cpus=_READ_CPUS)
    for table in images.iter_batches(batch_size=None, prefetch_batches=2, batch_format="pyarrow"):
        for name, image in zip(table["id"], table["image"], strict=True):
            yield Encoded(name.as_py(), image.as_py(), None)
