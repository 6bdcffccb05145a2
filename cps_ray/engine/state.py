"""Everything a training is at one step, and what of it a checkpoint holds.

Random numbers are a function of (seed, step) and the position in the data is the step, so a checkpoint that holds the
step holds both: a resumed training equals the unbroken one.
"""

import contextlib
import copy
from dataclasses import dataclass
from typing import Any, assert_never

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cps_ray.config.train import NETWORK_NAMES, EmaConfig, OptimConfig, Precision, TrainConfig
from cps_ray.engine.cpu.depthwise import use_cpu_kernels
from cps_ray.engine.networks import Segmenter, build_network, build_networks
from cps_ray.engine.norm import synchronise
from cps_ray.engine.ranks import Ranks
from cps_ray.engine.schedules import average_decay
from cps_ray.errors import CheckpointError

LR_FACTOR = "lr_factor"
"""Key in an optimizer's parameter groups: the multiple of the step's learning rate that they have."""


@dataclass(slots=True)
class TrainState:
    """The mutable heart of a training; `train_step` advances it. The dicts have the networks that this rank trains, by name."""

    networks: dict[str, Segmenter]
    models: dict[str, nn.Module]
    """What learns: each network itself, or DDP around it, which exchanges gradients. Teachers are passed as `networks`. One model per network, so
    that one's pass forward and back ends before the next one's begins."""
    optimizers: dict[str, torch.optim.Optimizer]
    averages: dict[str, Segmenter]
    """Networks with averaged weights, if there is an `ema.decay`: these are evaluated."""
    scalers: dict[str, torch.amp.GradScaler]
    """Loss scales, each network's own: what one network's gradients are like is unknown where another one is trained. They do nothing
    unless autocast is fp16."""
    ranks: Ranks
    step: int = 0
    collapsed: int = 0
    """Evaluations in a row at which the networks did not tell classes apart, and pseudo labels kept that up."""

    @property
    def evaluated(self) -> dict[str, Segmenter]:
        """The networks that are evaluated and exported."""
        return self.averages or self.networks

    def snapshot(self) -> dict[str, Any] | None:
        """Returns what a checkpoint holds: all networks, wherever they are trained, so that it does not depend on the placement.

        A collective of the ranks of batch shard 0; None but on rank 0.
        """
        if self.ranks.batch_shard != 0:
            return None  # the ranks of other shards hold the same networks
        own = {
            name: {
                "network": network.state_dict(),
                "optimizer": self.optimizers[name].state_dict(),
                "average": self.averages[name].state_dict() if self.averages else None,
                "scaler": self.scalers[name].state_dict(),
            }
            for name, network in self.networks.items()
        }
        if self.ranks.ranks_per_shard > 1:
            gathered: list[Any] | None = [None] * self.ranks.ranks_per_shard if self.ranks.rank == 0 else None
            # Through host memory: pickled CUDA tensors would come out on the sender's device number.
            dist.gather_object(_on_cpu(own), gathered, dst=0, group=self.ranks.same_shard)
            if gathered is None:
                return None
            own = {name: saved for each in gathered for name, saved in each.items()}
        return {"step": self.step, "collapsed": self.collapsed, "networks": own}

    def load(self, snapshot: dict[str, Any], source: object) -> None:
        """Continues from a snapshot. Raises CheckpointError, which names `source`, if it is of another config."""
        try:
            for name, network in self.networks.items():
                saved = snapshot["networks"][name]
                network.load_state_dict(saved["network"])
                self.optimizers[name].load_state_dict(saved["optimizer"])
                if self.averages:
                    self.averages[name].load_state_dict(saved["average"])
                if self.scalers[name].is_enabled():  # else there is no scale, and earlier versions saved none here
                    self.scalers[name].load_state_dict(saved["scaler"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as err:
            reason = " ".join(str(err).split())[:300]
            raise CheckpointError(f"{source}: the checkpoint must be of this config's networks, but {reason}") from err
        self.step, self.collapsed = int(snapshot["step"]), int(snapshot["collapsed"])


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu()
    return {key: _on_cpu(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def load_networks(
    config: TrainConfig, snapshot: dict[str, Any], num_classes: int, source: object
) -> dict[str, Segmenter]:
    """Networks of a snapshot, averaged if they were averaged, in evaluation mode on the CPU.

    Raises CheckpointError, which names `source`, if the snapshot is of another config.
    """
    networks = {}
    for number, name in enumerate(NETWORK_NAMES[: config.networks]):
        # All weights come from the snapshot, so none are fetched.
        bare = config.model.of(number).model_copy(update={"weights": "none", "weights_file": None})
        networks[name] = build_network(bare, num_classes, seed=0)
        try:
            saved = snapshot["networks"][name]
            networks[name].load_state_dict(saved["network"] if saved["average"] is None else saved["average"])
        except (RuntimeError, KeyError, TypeError) as err:
            reason = " ".join(str(err).split())[:300]
            raise CheckpointError(f"{source}: must hold this config's network {name}, but {reason}") from err
        networks[name].eval()
    return networks


def build_state(config: TrainConfig, num_classes: int, ranks: Ranks) -> TrainState:
    """Step 0 on this rank's device: networks, optimizers, averages, scalers; wrapped in DDP where others train the same."""
    networks = build_networks(config, num_classes)
    if ranks.ranks_per_shard > 1:
        name = NETWORK_NAMES[ranks.network_index]
        networks = {name: networks[name]}
    models: dict[str, nn.Module] = {}
    optimizers: dict[str, torch.optim.Optimizer] = {}
    averages: dict[str, Segmenter] = {}
    scalers: dict[str, torch.amp.GradScaler] = {}
    for name, network in networks.items():
        network.to(ranks.device)
        if config.compute.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Before everything that wraps or copies: it needs a plain pass, and copies must have the same frozen parameters.
        _freeze_unused(network, config.data.crop_px)
        if ranks.device.type == "cpu" and config.compute.cpu_kernels:
            use_cpu_kernels(network)
        if config.ema.decay is not None:
            averages[name] = copy.deepcopy(network).eval().requires_grad_(False)
        if ranks.num_batch_shards > 1:
            synchronise(network, ranks.device, ranks.same_network)
        if config.compute.compile:
            network.network.compile(dynamic=False)  # in place: names of weights stay
        models[name] = _wrap_in_ddp(network, ranks) if ranks.num_batch_shards > 1 else network
        optimizers[name] = _optimizer(config.optim, network)
        scalers[name] = torch.amp.GradScaler(ranks.device.type, enabled=config.compute.autocast == "fp16")
    return TrainState(networks, models, optimizers, averages, scalers, ranks)


def _wrap_in_ddp(network: Segmenter, ranks: Ranks) -> nn.Module:
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    model = DistributedDataParallel(network, ids, process_group=ranks.same_network, gradient_as_bucket_view=True)
    # Buffers are equal on all ranks already (synchronised batch norm); exchanging them would break a second forward pass. Set
    # here, because torch 2.8 and 2.15 call the constructor's option by different names, and the former also drops the first exchange.
    model.broadcast_buffers = False
    return model


def _freeze_unused(network: Segmenter, crop_px: tuple[int, int]) -> None:
    """Freezes the parameters that no output depends on, such as the classifier's last convolution in smp's EfficientNet.

    DDP would wait for their gradients for ever. One worker alone would not, but freezes them too: the optimizer's state, and with it
    a checkpoint, is then the same on any number of workers.
    """
    image = torch.zeros(1, 3, *crop_px, dtype=torch.uint8, device=network.mean.device)
    network.eval()  # in training mode this pass would change batch norm's running statistics
    network(image).sum().backward()
    for parameter in network.parameters():
        # A gradient of zeros is one: only what backward never reached has None.
        parameter.requires_grad_(parameter.grad is not None)
    network.zero_grad(set_to_none=True)
    network.train()


def _optimizer(optim: OptimConfig, network: Segmenter) -> torch.optim.Optimizer:
    """Weight decay is on weights of two and more dimensions; none on biases and normalisation."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = []
    for factor, members in _by_rate(optim, network, parameters).items():
        rate = {"lr": optim.lr * factor, LR_FACTOR: factor}
        groups += [
            {"params": [p for p in members if p.dim() > 1], "weight_decay": optim.weight_decay, **rate},
            {"params": [p for p in members if p.dim() <= 1], "weight_decay": 0.0, **rate},
        ]
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, fused=True)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=True)
    assert_never(optim.name)


def _by_rate(optim: OptimConfig, network: Segmenter, parameters: list[nn.Parameter]) -> dict[float, list[nn.Parameter]]:
    """Factor of `optim.lr` -> the parameters that have it; with equal rates one entry, in the network's order."""
    encoder = {id(p) for p in network.network.encoder.parameters()}  # type: ignore[union-attr, operator]
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        factor = 1.0 if id(parameter) in encoder else optim.head_lr_factor
        groups.setdefault(factor, []).append(parameter)
    return groups


@torch.no_grad()
def update_averages(ema: EmaConfig, state: TrainState) -> None:
    """Moves the averaged weights, and batch norm's running statistics, towards those after update number `state.step`."""
    decay = average_decay(ema.decay or 0.0, state.step)
    for name, average in state.averages.items():
        for kept, new in zip(average.state_dict().values(), state.networks[name].state_dict().values(), strict=True):
            if kept.is_floating_point():
                kept.lerp_(new, 1.0 - decay)
            else:
                kept.copy_(new)  # counters of batches


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context in which networks run, by `compute.autocast`."""
    if precision == "none":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)
