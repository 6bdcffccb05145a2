"""In which order images are visited: a function of (seed, position), so that any step can be the first one.

Positions count images over all passes. Step s of a global batch of B images visits positions s*B to (s+1)*B - 1, and
batch shard r of W is the r-th of W equal runs of them; the same images make a step on any number of workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

LABELED = 1
UNLABELED = 2


@lru_cache(maxsize=8)
def permutation(count: int, seed: int, stream: int, number: int) -> NDArray[np.int64]:
    """Order of pass `number` over `count` images of a stream: int64 (count,)."""
    return np.random.default_rng((seed, stream, number)).permutation(count)


def image_at(position: int, count: int, seed: int, stream: int) -> int:
    """Which of `count` images is visited at `position`. Each pass visits every image once."""
    number, place = divmod(position, count)
    return int(permutation(count, seed, stream, number)[place])


def positions(step: int, batch: int, batch_shard: int, num_batch_shards: int) -> range:
    """Positions of one batch shard in one step. `batch` is global and divides by `num_batch_shards`."""
    images = batch // num_batch_shards
    first = step * batch + batch_shard * images
    return range(first, first + images)


@dataclass(frozen=True, slots=True)
class ShardPositions:
    """Every position that one batch shard visits from `start_step` up to and without step `steps`, without a list of them."""

    start_step: int
    steps: int
    batch: int
    """Images of the global batch; divides by `num_batch_shards`."""
    batch_shard: int
    num_batch_shards: int

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step) * (self.batch // self.num_batch_shards)

    def __iter__(self) -> Iterator[int]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> int:
        """The position visited at `number`, in 0..len - 1."""
        step, place = divmod(number, self.batch // self.num_batch_shards)
        return positions(self.start_step + step, self.batch, self.batch_shard, self.num_batch_shards)[place]
