"""In which order images are visited: a function of (seed, position), so that any step can be the first one.

Positions count images over all passes. Step s of a global batch of B images visits positions s*B to (s+1)*B - 1, and
rank r of W takes the r-th of W equal runs of them; the same images make a step on any number of workers.
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


def positions(step: int, batch: int, rank: int, world: int) -> range:
    """Positions of one rank in one step. `batch` is global and divides by `world`."""
    share = batch // world
    first = step * batch + rank * share
    return range(first, first + share)


@dataclass(frozen=True, slots=True)
class Visits:
    """Every position that one rank visits from `start_step` up to and without step `steps`, without a list of them."""

    start_step: int
    steps: int
    batch: int
    """Global; divides by `world`."""
    rank: int
    world: int

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step) * (self.batch // self.world)

    def __iter__(self) -> Iterator[int]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> int:
        """The position visited at `number`, in 0..len - 1."""
        step, place = divmod(number, self.batch // self.world)
        return positions(self.start_step + step, self.batch, self.rank, self.world)[place]
