"""The order in which images are read: a function of (seed, position), so that any step can be the first one.

Positions count images over all passes. Step s of a global batch of B images reads positions s*B to (s+1)*B - 1, and
batch shard r of W is the r-th of W equal runs of them; the same images make a step on any number of workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Streams: labelled and unlabelled images have random numbers of their own.
LABELED = 1
UNLABELED = 2


# A few orders are alive at once: of both streams, and of two passes or more where a batch crosses a pass boundary.
@lru_cache(maxsize=8)
def permutation(count: int, seed: int, stream: int, pass_number: int) -> NDArray[np.int64]:
    """Returns the order of a pass over the `count` images of a stream: int64 (count,). Cached: do not write to it."""
    return np.random.default_rng((seed, stream, pass_number)).permutation(count)


def image_at(position: int, count: int, seed: int, stream: int) -> int:
    """Returns which of `count` images is read at `position`. Each pass reads every image once."""
    pass_number, offset = divmod(position, count)
    return int(permutation(count, seed, stream, pass_number)[offset])


def positions(step: int, batch: int, batch_shard: int, num_batch_shards: int) -> range:
    """Returns the positions of one batch shard in one step. `batch` is global and divides by `num_batch_shards`."""
    images = batch // num_batch_shards
    first = step * batch + batch_shard * images
    return range(first, first + images)


@dataclass(frozen=True, slots=True)
class ShardPositions:
    """Positions of one batch shard in the steps from `start_step` up to and without `steps`, computed rather than stored."""

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
        """Returns the position with this number, in 0..len - 1."""
        # Positions of later steps are not adjacent: the other batch shards' lie between them.
        step, offset = divmod(number, self.batch // self.num_batch_shards)
        return positions(self.start_step + step, self.batch, self.batch_shard, self.num_batch_shards)[offset]
