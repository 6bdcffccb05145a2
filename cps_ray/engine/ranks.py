"""Who computes what: rank, world size, device, and the few collectives the engine needs. No-ops when alone."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cps_ray.config.train import TrainConfig


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers. `world > 1` needs an initialised `torch.distributed` process group.

    With `placement: split`, rank r trains network r % split on share r // split of the global batch; otherwise every rank
    trains all networks on a share of its own.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    split: int = 1
    """Over how many neighbouring ranks the networks are spread; 1: each rank has all of them."""
    alike: Any = None
    """Process group of the ranks that train the same networks as this one. None: all ranks."""
    peers: Any = None
    """Process group of the ranks that train the other networks on the same images."""

    @property
    def share(self) -> int:
        """Which part of the global batch is this rank's."""
        return self.rank // self.split

    @property
    def shares(self) -> int:
        """Parts that the global batch has."""
        return self.world // self.split

    @property
    def own(self) -> int:
        """Number of this rank's network when they are split."""
        return self.rank % self.split

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, same shape and dtype; without gradient."""
        return self._reduce(tensor, self.world, None)

    def share_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the shares of the global batch, same shape and dtype; without gradient."""
        return self._reduce(tensor, self.shares, self.alike)

    def peer_sum(self, tensor: Tensor) -> Tensor:
        """Sum over the networks of this rank's share where they are split, else the tensor itself; without gradient."""
        return self._reduce(tensor, self.split, self.peers)

    def max(self, tensor: Tensor) -> Tensor:
        """Largest over all ranks, same shape and dtype."""
        return self._reduce(tensor, self.world, None, dist.ReduceOp.MAX if self.world > 1 else None)

    def roll(self, tensor: Tensor) -> Tensor:
        """Every image's successor in the global batch: (N, ...) -> (N, ...). The last image's is the first one's."""
        first = tensor[:1].contiguous()
        if self.shares > 1:
            firsts = [torch.empty_like(first) for _ in range(self.shares)]
            dist.all_gather(firsts, first, group=self.alike)
            first = firsts[(self.share + 1) % self.shares]
        return torch.cat([tensor[1:], first])

    def exchange(self, own: list[Tensor]) -> list[Tensor]:
        """What each network says, in the order of the networks, from what this rank's network(s) say."""
        if self.split == 1:
            return own
        (mine,) = own
        said = [torch.empty_like(mine) for _ in range(self.split)]
        dist.all_gather(said, mine.contiguous(), group=self.peers)
        return said

    def _reduce(self, tensor: Tensor, members: int, group: Any, how: Any = None) -> Tensor:
        if members == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM if how is None else how, group=group)
        return total


def join(config: TrainConfig, rank: int, world: int, device: torch.device) -> Ranks:
    """This process among the others, placed as `resources.placement` says. Every rank calls it at the same time."""
    split = config.networks if config.resources.placement == "split" else 1
    if split == 1:
        return Ranks(rank, world, device)
    # Each rank takes part in making every group, also those it is not in.
    alike = [dist.new_group(list(range(first, world, split))) for first in range(split)]
    peers = [dist.new_group(list(range(first, first + split))) for first in range(0, world, split)]
    return Ranks(rank, world, device, split, alike[rank % split], peers[rank // split])
