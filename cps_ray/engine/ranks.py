"""Who computes what: rank, world size, device, and the few collectives the engine needs. No-ops when alone."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers. `world > 1` needs an initialised `torch.distributed` process group."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, same shape and dtype; without gradient."""
        if self.world == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def max(self, tensor: Tensor) -> Tensor:
        """Largest over all ranks, same shape and dtype."""
        if self.world == 1:
            return tensor
        largest = tensor.detach().clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

    def roll(self, tensor: Tensor) -> Tensor:
        """Every image's successor in the global batch: (N, ...) -> (N, ...). The last image's is the first one's."""
        first = tensor[:1].contiguous()
        if self.world > 1:
            firsts = [torch.empty_like(first) for _ in range(self.world)]
            dist.all_gather(firsts, first)
            first = firsts[(self.rank + 1) % self.world]
        return torch.cat([tensor[1:], first])
