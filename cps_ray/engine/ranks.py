"""Who computes what: rank, world size, device, and the few collectives the engine needs. No-ops when alone."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cps_ray.config.train import TrainConfig


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the others. `world > 1` needs an initialised `torch.distributed` process group.

    With `placement: replicated` every rank trains all networks on a batch shard of its own. With `one_network_per_worker` and n
    networks, rank r trains network r % n on batch shard r // n: ranks 0..n-1 compute shard 0 together, and so on.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    ranks_per_shard: int = 1
    """Neighbouring ranks that compute one batch shard together: the number of networks when each has its worker, else 1."""
    same_network: Any = None
    """Process group of the ranks that train the same networks as this one, on other batch shards. None: all ranks."""
    same_shard: Any = None
    """Process group of the ranks that train the other networks on the same batch shard."""

    @property
    def batch_shard(self) -> int:
        """Number of the batch shard that this rank computes."""
        return self.rank // self.ranks_per_shard

    @property
    def num_batch_shards(self) -> int:
        """Number of shards that the global batch is cut into."""
        return self.world // self.ranks_per_shard

    @property
    def network_index(self) -> int:
        """Number of this rank's network, when each worker has one."""
        return self.rank % self.ranks_per_shard

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, same shape and dtype; without gradient."""
        return self._reduce(tensor, self.world, None)

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        """Sum over the batch shards, same shape and dtype; without gradient."""
        return self._reduce(tensor, self.num_batch_shards, self.same_network)

    def sum_over_networks(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks of this batch shard, hence over all networks; the tensor itself where this rank has them all."""
        return self._reduce(tensor, self.ranks_per_shard, self.same_shard)

    def max(self, tensor: Tensor) -> Tensor:
        """Largest over all ranks, same shape and dtype."""
        return self._reduce(tensor, self.world, None, dist.ReduceOp.MAX if self.world > 1 else None)

    def roll(self, tensor: Tensor) -> Tensor:
        """Every image's successor in the global batch: (N, ...) -> (N, ...). The last image's is the first one's."""
        first = tensor[:1].contiguous()
        if self.num_batch_shards > 1:
            # Only a shard's last image has its successor elsewhere: one image crosses, not the batch.
            firsts = [torch.empty_like(first) for _ in range(self.num_batch_shards)]
            dist.all_gather(firsts, first, group=self.same_network)
            first = firsts[(self.batch_shard + 1) % self.num_batch_shards]
        return torch.cat([tensor[1:], first])

    def exchange(self, own: list[Tensor]) -> list[Tensor]:
        """Returns one tensor per network, in their order, from those of this rank's network(s)."""
        if self.ranks_per_shard == 1:
            return own
        (mine,) = own
        gathered = [torch.empty_like(mine) for _ in range(self.ranks_per_shard)]
        dist.all_gather(gathered, mine.contiguous(), group=self.same_shard)
        return gathered

    def _reduce(self, tensor: Tensor, members: int, group: Any, how: Any = None) -> Tensor:
        if members == 1:
            return tensor
        total = tensor.detach().clone()  # all_reduce overwrites
        dist.all_reduce(total, op=dist.ReduceOp.SUM if how is None else how, group=group)
        return total


def join(config: TrainConfig, rank: int, world: int, device: torch.device) -> Ranks:
    """Gives this process its place among the others, as `resources.placement` says. A collective: every rank calls it at the same time."""
    if config.resources.placement == "replicated":
        return Ranks(rank, world, device)
    n = config.networks
    same_network, same_shard = _groups(world, n)
    return Ranks(rank, world, device, n, same_network[rank % n], same_shard[rank // n])


@cache  # a process that trains again has them already
def _groups(world: int, n: int) -> tuple[list[Any], list[Any]]:
    # torch wants every rank to make every group, in the same order, also those that it is not in.
    same_network = [dist.new_group(list(range(network, world, n))) for network in range(n)]
    same_shard = [dist.new_group(list(range(first, first + n))) for first in range(0, world, n)]
    return same_network, same_shard
